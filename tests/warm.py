"""
A Python that has already imported the library: each program that it runs is a fork of one process.

Importing torch, transformers and datasets takes 6 to 9 seconds, and the tests start some seventy programs. This process
imports once and then forks on request, so that a program starts in milliseconds. A fork has imported everything but has
run nothing: no thread, no random number, no file. `start` writes a folder of executables (`python`, `rlhf_reward`,
`accelerate`) that replace the real ones; `warm_client.py` is what they run.

As a script: `python tests/warm.py FOLDER PID` serves until the process PID is gone.
"""
import atexit
import gc
import importlib
import io
import json
import locale
import os
import pkgutil
import random
import resource
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from pathlib import Path

TESTS = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
COMMANDS = ("rlhf_reward", "accelerate")  # console scripts that get a warm twin
MODULES = (
    "IPython.core.application",
    "IPython.core.logger",
    "IPython.core.magics",
    "accelerate.commands.launch",
    "datasets",
    "datasets.packaged_modules.generator.generator",
    "httpx",
    "hypothesis.strategies",
    "matplotlib.pyplot",
    "nbdev.test",
    "pandas",
    "pandas.io.formats.html",
    "peft",
    "pexpect",
    "scipy.io",
    "scipy.stats",
    "sqlite3",
    "torch._subclasses.schema_check_mode",
    "torch.distributed.run",
    "torch.utils.serialization",
    "transformers",
    "transformers.conversion_mapping",
    "transformers.hf_argparser",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.trainer",
    "uvicorn",
    "uvicorn.protocols.http.h11_impl",
    "uvicorn.lifespan.on",
    "uvicorn.loops.auto",
)


# ----- for the tests


def start(owner: int):
    "Start the warm process. Return the folder of its executables; they work until the process `owner` is gone."
    folder = Path(tempfile.mkdtemp(prefix="warm-", dir="/tmp"))  # a socket's path must be short
    client = f'exec "{sys.executable}" -I -S "{TESTS / "warm_client.py"}" "{folder / "socket"}"'
    scripts = {"python": ""} | {name: f' "{BIN / name}"' for name in COMMANDS}
    for name, script in scripts.items():
        executable = folder / name
        executable.write_text(f'#!/bin/sh\nexport COLD_PYTHON="{sys.executable}"\n{client}{script} "$@"\n')
        executable.chmod(0o755)
    with open(folder / "log", "wb") as log:
        server = subprocess.Popen(
            [sys.executable, str(TESTS / "warm.py"), str(folder), str(owner)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"},
        )
    while not (folder / "socket").exists():
        if server.poll() is not None:
            raise RuntimeError(f"The warm process did not start:\n{(folder / 'log').read_text()}")
        time.sleep(0.05)
    return folder


# ----- the process that imports and forks


def import_everything():
    "Import the library and what its programs use, without starting a thread."
    gc.disable()  # of the objects that imports make, none is garbage
    import rlhf_reward

    for module in pkgutil.walk_packages(rlhf_reward.__path__, "rlhf_reward."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in rlhf_reward.__all__:
        getattr(rlhf_reward, name)
    for name in MODULES:
        importlib.import_module(name)
    # of which the first model that is opened compiles a thousand patterns
    sys.modules["transformers.conversion_mapping"].get_checkpoint_conversion_mapping("llama")
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    names.remove(Path("/proc/self/comm").read_text().strip())
    lost = [name for name in names if name != "jemalloc_bg_thd"]  # pyarrow's, which knows of forks
    if lost:
        raise RuntimeError(f"The imports started the threads {lost}, which a fork would lose; expected none.")


def serve(folder, owner):
    "Fork for each connection, until the owner is gone. Return the request in a fork that is to run a program."
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(folder / "binding"))
    listener.listen(64)
    gc.collect()
    gc.freeze()  # what is not collected is not copied
    gc.enable()
    os.rename(folder / "binding", folder / "socket")  # there at once and ready
    while is_running(owner):
        readable, _, _ = select.select([listener], [], [], 1)
        if readable:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                return supervise(connection)
            connection.close()
        reap()
    shutil.rmtree(folder)
    os._exit(0)


def is_running(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def reap():
    "Collect the supervisors that have ended."
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def supervise(connection):
    "Fork the program, forward signals to it, and send its wait status. Return the request in the program's process."
    header, files, _, _ = socket.recv_fds(connection, 8, 3)
    size = int.from_bytes(header, "big")
    payload = b""
    while len(payload) < size:
        payload += connection.recv(size - len(payload))
    program = os.fork()
    if program == 0:
        os.setsid()
        connection.close()
        for target, file in enumerate(files):
            os.dup2(file, target)
            os.close(file)
        return json.loads(payload)
    for file in files:
        os.close(file)
    handle = os.pidfd_open(program)
    while True:
        readable, _, _ = select.select([handle, connection], [], [])
        if handle in readable:
            break
        received = connection.recv(1)
        if not received:  # the client was killed
            kill_group(program)
            break
        os.kill(program, received[0])
    _, status, used = os.wait4(program, 0)
    print(f"{used.ru_utime + used.ru_stime:.2f} {json.loads(payload)['arguments']}"[:300], flush=True)
    kill_group(program)  # whatever it left running
    try:
        connection.sendall(status.to_bytes(4, "big"))
    except OSError:
        pass
    os._exit(0)


def kill_group(leader):
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        pass


def prepare(request, executable):
    "Make this fork look like a process that was just started for the request."
    os.environ.clear()
    os.environ.update(request["environment"])
    if os.environ.get("PYTHONCOERCECLOCALE") == "0":  # the locale as it is, in which files are opened by default
        locale.setlocale(locale.LC_CTYPE, "")
    resource.setrlimit(resource.RLIMIT_NOFILE, request["files"])
    os.chdir(request["folder"])
    sys.executable = str(executable)
    is_unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    # new ones: those that were opened for the log of this process believe that they can seek
    sys.stdin = open(0, closefd=False)
    sys.stdout = io.TextIOWrapper(open(1, "wb", closefd=False), write_through=is_unbuffered)
    sys.stderr = io.TextIOWrapper(open(2, "wb", closefd=False), errors="backslashreplace", line_buffering=True)
    for folder in reversed(os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        if folder and folder not in sys.path:
            sys.path.insert(0, folder)
    import datasets.fingerprint
    import numpy

    numpy.random.seed()  # a fork would draw what all the others draw
    datasets.fingerprint.fingerprint_rng = random.Random()


def run(arguments):
    "Run a program as the interpreter does: -m MODULE, -c CODE or SCRIPT, with arguments."
    kind, *rest = arguments
    if kind == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = rest
        sys.modules.pop(rest[0], None)  # imported already, and now to be run
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *rest[1:]]
        main = types.ModuleType("__main__")
        sys.modules["__main__"] = main
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.path.insert(0, os.path.dirname(os.path.realpath(kind)))
        sys.argv = arguments
        runpy.run_path(kind, run_name="__main__")


def run_and_end(arguments):
    """
    Run a program and end as the interpreter does: after its threads and its functions for the end.

    What follows there, and is left out, is the release of a million objects one by one, most of them shared with the
    warm process: copying their memory took longer than many a program. A member of a process group of torch, which can
    be aborted then, and a program that fails end as usual.
    """
    status = None
    try:
        run(arguments)
    except SystemExit as end:
        status = end.code
    from torch import distributed

    if distributed.is_initialized():
        sys.exit(status)
    sys.stdout.flush()
    if not isinstance(status, (int, type(None))):
        print(status, file=sys.stderr)
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit((status or 0) & 0xFF)


if __name__ == "__main__":
    sys.path.remove(str(TESTS))
    serving = Path(sys.argv[1])
    import_everything()
    asked = serve(serving, int(sys.argv[2]))
    prepare(asked, serving / "python")
    run_and_end(asked["arguments"])
