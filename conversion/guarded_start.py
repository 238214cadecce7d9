"""Run a worker without network, and without any code but what was compared: the child's half of isolation.py.

Once installed, an audit hook cannot be taken away. It refuses every connection, and every code file and library below
the worker's own folder, where all that it was given lies and all that transformers copies, unless its hash was given.
"""

from __future__ import annotations

import hashlib
import json
import os
import runpy
import sys
from pathlib import Path
from types import CodeType
from typing import Any

NETWORK = frozenset(
    {
        "socket.bind",
        "socket.connect",
        "socket.getaddrinfo",
        "socket.gethostbyaddr",
        "socket.gethostbyname",
        "socket.sendmsg",
        "socket.sendto",
    }
)


class Guard:
    """What the process may do; called with every event that Python audits."""

    def __init__(self, root: str, compared: list[str]) -> None:
        self.root = os.path.join(os.path.realpath(root), "")
        self.compared = {hashlib.sha256(b"").hexdigest(), *compared}  # transformers makes empty __init__.py files

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in NETWORK:
            raise PermissionError(f"{event} was refused: a repo is checked without network")
        if event == "exec" and isinstance(arguments[0], CodeType):
            self.require_compared(arguments[0].co_filename)
        elif event == "import" and isinstance(arguments[1], str):  # a compiled module
            self.require_compared(arguments[1])
        elif event == "ctypes.dlopen" and isinstance(arguments[0], str):
            self.require_compared(arguments[0])

    def require_compared(self, name: str) -> None:
        path = os.path.realpath(name)
        if not os.path.isabs(name) or not path.startswith(self.root):  # such as <string>: code that code made
            return
        if not os.path.isfile(path) or hashlib.sha256(Path(path).read_bytes()).hexdigest() not in self.compared:
            raise PermissionError(f"{os.path.basename(path)} was refused: it is no code that was compared before")


def limit_memory(size: int) -> None:
    """Let no more than this be allocated, where the system can say so."""
    try:
        import resource
    except ImportError:
        return
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    limit = size if most == resource.RLIM_INFINITY else min(size, most)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, most))


def main(guard_file: str, *command: str) -> None:
    """Guard this process and run `command`, a script with its arguments."""
    settings = json.loads(Path(guard_file).read_text(encoding="utf-8"))
    limit_memory(settings["memory"])
    sys.argv = list(command)
    sys.addaudithook(Guard(settings["root"], settings["compared"]))
    runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
