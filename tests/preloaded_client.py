"""The program of `tests.preloaded`: ask the server for a fork, pass signals to it, and end as it ends.

`tests.preloaded` copies this file, with SERVED filled in, next to the socket of the server.
"""

# pathlib takes longer to import than the rest of this program runs.
# ruff: noqa: PTH100, PTH109, PTH118, PTH120, PTH208

import marshal
import os
import signal
import socket
import sys

SERVED: dict[str, str] = {}
"""The variables in READ_AT_IMPORT that the server has."""
# A caller with other values than the server gets a new interpreter.
READ_AT_IMPORT = ("LD_PRELOAD", "LD_LIBRARY_PATH", "TRITON_INTERPRET")
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def request(words: list[str]) -> dict[str, object] | None:
    """Return the request for a command line of Python, or None if the server cannot answer it."""
    actions, unbuffered = [], False
    # -B, which multiprocessing passes on, says that no bytecode is written.
    while words and words[0][:2] in ("-W", "-u", "-B"):
        option, *words = words
        if option == "-W":
            option, *words = option + words[0], *words[1:]
        actions += [option[2:]] * option.startswith("-W")
        unbuffered |= option == "-u"
    if any(os.environ.get(name) != SERVED.get(name) for name in READ_AT_IMPORT) or not words:
        return None
    if words[0] in ("-m", "-c"):
        kind, what, *arguments = words
    elif not words[0].startswith("-"):
        kind, (what, *arguments) = "script", words
    else:
        return None
    return {
        "kind": kind,
        "what": what,
        "arguments": arguments,
        "environment": dict(os.environb),
        "folder": os.getcwd(),
        "parent": os.getppid(),
        "warnings": actions,
        "unbuffered": unbuffered,
    }


def inherited_files() -> list[int]:
    """Return the numbers of the files that the caller has handed down."""
    found = []
    for number in sorted(map(int, os.listdir("/proc/self/fd"))):
        try:
            if os.get_inheritable(number):
                found.append(number)
        except OSError:  # the listing itself, which is closed by now
            continue
    return found


def main() -> None:
    wanted = request(sys.argv[1:])
    if wanted is None:
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
    files = inherited_files()
    text = marshal.dumps({**wanted, "files": files})
    server = socket.socket(socket.AF_UNIX)
    server.connect(os.path.join(os.path.dirname(os.path.abspath(sys.argv[0])), "socket"))
    socket.send_fds(server, [len(text).to_bytes(8, "big")], files)
    server.sendall(text)
    for passed in PASSED_ON:
        signal.signal(passed, lambda number, _: server.sendall(bytes([number])))
    # The files are now those of the fork. A reader of its output must see the end when the fork ends.
    for number in files:
        os.close(number)
    answer = b""
    while piece := server.recv(64):
        answer += piece
    code = marshal.loads(answer) if answer else 1
    if code < 0:
        if -code in PASSED_ON:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
