"""Streams that go on when nobody reads them any more, as after `holdfast report RUN | head -1`.

What a command has still to do, such as writing its reports, and the exit code it ends with do not depend on the reader.
"""

import os
import sys
from typing import Any, TextIO, cast


class Lasting:
    """A stream whose closed pipe is replaced by nothing."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write; the text is dropped where nobody reads."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._let_go()
            return len(text)

    def flush(self) -> None:
        """Flush; what was buffered is dropped where nobody reads."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._let_go()
            self._stream.flush()  # what is left goes the same way now, and not when Python ends

    def _let_go(self) -> None:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self._stream.fileno())
        os.close(nothing)


def outlive_readers() -> None:
    """Let stdout and stderr of this process outlive those who read them."""
    if sys.stdout is not None:  # there is none where it was closed before the start
        sys.stdout = cast(TextIO, Lasting(sys.stdout))
    if sys.stderr is not None:
        sys.stderr = cast(TextIO, Lasting(sys.stderr))
