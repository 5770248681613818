"""Child processes that receive messages over a pipe and send messages over another one.

A message is its length and its content. A child keeps the pipes for itself, so that neither the libraries and the model
nor their own child processes read or write messages.
"""

import json
import os
import queue
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from holdfast.core.errors import HoldfastError, UsageError, failure_to_json
from holdfast.core.remedies import Remedy

_START = """\
import os, sys
inbox, outbox = os.dup(0), os.dup(1)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
os.dup2(2, 1)
sys.path[:] = sys.argv[1:]
from {module} import main
sys.exit(main(inbox, outbox, *{arguments}))
"""
"""Code of a child process, which sets `sys.path` before any import of a library."""
_BEGINNING = b"\0holdfast worker\0"
"""First bytes of the messages of a child. All output of Python before them, such as from a `sitecustomize`, is
skipped."""
_LENGTH = struct.Struct("<Q")
"""Format of the number of bytes that precedes each message."""
Send = Callable[[bytes, Any], None]
"""Function that sends the kind of a message, one letter, and its content as JSON."""


class Child:
    """A child process that runs `main(inbox, outbox, *arguments)` of a module, with a thread that reads its messages
    and one that writes those to it, which could block until the child has imported its libraries.

    `received` is called with each message of the child, and with an empty one at the end of its pipe.
    """

    def __init__(
        self, module: str, received: Callable[[bytes], object], *arguments: int, **options: Any
    ) -> None:
        # a session of its own, since Ctrl-C is handled by this process, which ends its children
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START.format(module=module, arguments=arguments), *import_path()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            **options,
        )
        self._received = received
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        for work in (self._read, self._write):
            threading.Thread(target=work, daemon=True).start()

    def send(self, content: bytes) -> None:
        """Send a message to the child."""
        self._outgoing.put(content)

    def close(self) -> None:
        """Close the pipe to the child after the messages that were sent."""
        self._outgoing.put(None)

    def _read(self) -> None:
        assert self.process.stdout is not None
        try:
            with suppress(OSError, ValueError), self.process.stdout as pipe:
                _skip_to(_BEGINNING, pipe)
                while (message := read_message(pipe)) is not None:
                    self._received(message)
        finally:
            self._received(b"")

    def _write(self) -> None:
        assert self.process.stdin is not None
        # the end of the child is noticed by the thread that reads
        with suppress(OSError), self.process.stdin as pipe:
            while (content := self._outgoing.get()) is not None:
                write_message(pipe, content)


def serve_parent(inbox: int, outbox: int, work: Callable[[IO[bytes], IO[bytes], Send], object]) -> int:
    """Call `work` in a child process with its two pipes and a function that sends messages, and return the exit code.
    An error is sent to the parent as a message of the kind E, with its remedies.
    """
    lock = threading.Lock()
    # unbuffered: a buffer would be written again when it is closed, and is locked while a thread reads into it
    with os.fdopen(inbox, "rb", buffering=0) as tasks, os.fdopen(outbox, "wb", buffering=0) as pipe:

        def send(kind: bytes, content: Mapping[str, Any]) -> None:
            # the end of the parent is noticed by the thread that reads
            message = kind + json.dumps(content).encode()
            with lock, suppress(BrokenPipeError, ValueError):  # a closed pipe, as the process ends
                write_message(pipe, message)

        with suppress(BrokenPipeError):
            pipe.write(_BEGINNING)
        try:
            work(tasks, pipe, send)
        except HoldfastError as error:
            send(b"E", failure_to_json(error))
        except Exception:  # noqa: BLE001 - the parent raises or reports it
            message = f"a worker failed:\n{traceback.format_exc()}"
            send(b"E", failure_to_json(HoldfastError(message)))
        else:
            return 0
    return 1


def unshared(error: Exception) -> UsageError:
    """Return the error for a model or data that cannot be pickled, and so cannot be sent to a worker process."""
    return UsageError(
        f"a worker process cannot receive the model, the data or an attack ({type(error).__name__}: {error}); define "
        "them in a file that can be imported, or give addresses such as file.py:factory",
        Remedy("workers"),
    )


def import_path() -> list[str]:
    """Return the module search path of a worker process, which is that of this process without the current folder.

    If this process has imported a module from the current folder, as a script may do, the folder is added at the end.
    """
    here = Path.cwd()
    known = [getattr(module, "__dict__", {}) for name, module in list(sys.modules.items()) if "." not in name]
    places = [each.get("__path__") or [each.get("__file__") or ""] for each in known]
    others = [entry for entry in sys.path if entry and Path(entry).absolute() != here]
    imported = any(Path(place).parent == here for of_one in places for place in of_one if place)
    return [*others, str(here)] if imported else others


def write_message(file: IO[bytes], content: bytes) -> None:
    """Write a message and its length to the pipe between two processes."""
    for part in (_LENGTH.pack(len(content)), content):
        left = memoryview(part)
        while left:  # an unbuffered file may write a part
            left = left[file.write(left) :]
    file.flush()


def _skip_to(beginning: bytes, file: IO[bytes]) -> None:
    """Read and discard the bytes of a pipe until the bytes `beginning` were read, or until the end of the pipe."""
    last = b""
    while last != beginning and (byte := file.read(1)):
        last = (last + byte)[-len(beginning) :]


def read_message(file: IO[bytes]) -> bytes | None:
    """Return the next message from a pipe, or None if the pipe ends before the message is complete."""
    head = _read(file, _LENGTH.size)
    return None if head is None else _read(file, _LENGTH.unpack(head)[0])


def _read(file: IO[bytes], n: int) -> bytes | None:
    """The next `n` bytes of a pipe, of which each read may return a part; None if it ends before."""
    parts: list[bytes] = []
    while n:
        part = file.read(n)
        if not part:
            return None
        parts.append(part)
        n -= len(part)
    return b"".join(parts)
