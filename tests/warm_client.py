"""
Ask the process of `warm.py` to run a Python program, and end as the program ends.

It takes the place of the interpreter: `python -I -S warm_client.py SOCKET [-m MODULE | -c CODE | SCRIPT] ARGUMENT…`.
Input, output, folder, environment, signals and the limit of open files are those of this process.
"""
import json
import os
import resource
import signal
import socket
import sys


def run(path, arguments):
    "Run the program in a fork of the warm process. Return its wait status."
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    request = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ), "files": files}
    payload = json.dumps(request).encode()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(path)
        for forwarded in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(forwarded, lambda number, frame: connection.sendall(bytes([number])))
        socket.send_fds(connection, [len(payload).to_bytes(8, "big")], [0, 1, 2])
        connection.sendall(payload)
        answer = b""
        while len(answer) < 4:
            received = connection.recv(4 - len(answer))
            if not received:
                sys.exit("The warm process ended before its program did.")
            answer += received
    return int.from_bytes(answer, "big")


def end_like(status):
    "End this process as another one ended: by the same signal, or with the same exit status."
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.WEXITSTATUS(status))


if __name__ == "__main__":
    path, *arguments = sys.argv[1:]
    if arguments[:1] == ["-u"]:  # as launchers start their processes
        os.environ["PYTHONUNBUFFERED"] = "1"
        arguments.pop(0)
    first = arguments[0] if arguments else "-"
    if first.startswith("-") and first not in ("-m", "-c"):  # other options need an interpreter of their own
        os.execv(os.environ["COLD_PYTHON"], [os.environ["COLD_PYTHON"], *arguments])
    end_like(run(path, arguments))
