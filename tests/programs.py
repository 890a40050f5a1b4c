"Run programs, each in a process group that is destroyed afterwards, and show everything that a failed one printed."
import os
import signal
import subprocess
import sys
from pathlib import Path

BIN = Path(sys.executable).parent


def kill_group(process):
    "Kill a program that was started with `start_new_session=True`, and everything that it started."
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def run(*command, status=0, timeout=600, environment=None, **options):
    """
    Run a program. Return its result with `stdout` and `stderr`; fail unless it ends with `status` (None: any).

    What it starts by name comes from the folder of the program itself, then from the folder of this interpreter.
    """
    command = [str(part) for part in command]
    path = os.pathsep.join([os.path.dirname(command[0]) or str(BIN), str(BIN), os.environ["PATH"]])
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": path, **(environment or {})},
        **options,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_group(process)
        stdout, stderr = process.communicate()
        raise AssertionError(described(command, f"not done in {timeout} s", stdout, stderr)) from None
    finally:
        kill_group(process)
    if status is not None and process.returncode != status:
        raise AssertionError(described(command, f"status {process.returncode}; expected {status}", stdout, stderr))
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def described(command, problem, stdout, stderr):
    "Everything there is to know about a program that failed."
    shown = " ".join(map(str, command))
    return f"{shown}\n{problem}\n----- stdout\n{stdout}\n----- stderr\n{stderr}"
