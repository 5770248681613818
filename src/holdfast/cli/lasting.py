"""Streams that survive the end of their reader, as after `holdfast report RUN | head -1`.

The rest of a command, such as writing its reports, and its exit code do not depend on the reader.
"""

import os
import sys
from typing import Any, TextIO, cast


class Lasting:
    """A stream that discards its output after its pipe was closed."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text. It is discarded if the pipe is closed."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._let_go()
            return len(text)

    def flush(self) -> None:
        """Flush the stream. Buffered text is discarded if the pipe is closed."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._let_go()
            self._stream.flush()  # discards the rest now instead of at the end of Python

    def _let_go(self) -> None:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self._stream.fileno())
        os.close(nothing)


def outlive_readers() -> None:
    """Let stdout and stderr of this process survive the end of their readers."""
    if sys.stdout is not None:  # there is none if it was closed before the start
        sys.stdout = cast(TextIO, Lasting(sys.stdout))
    if sys.stderr is not None:
        sys.stderr = cast(TextIO, Lasting(sys.stderr))
