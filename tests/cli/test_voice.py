"""What a command says while a progress bar stands on the terminal."""

import io
import re
import sys

import pytest

from holdfast.cli.options import Voice
from holdfast.cli.running import watched


class Terminal(io.StringIO):
    """A terminal that remembers what was written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer = io.BytesIO()

    def isatty(self) -> bool:
        return True


def test_what_is_said_takes_the_place_of_the_bar_and_does_not_go_on_its_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stderr", terminal)
    with watched(Voice()):
        Voice().say("a set is drawn")
    assert not terminal.buffer.getvalue(), "nothing goes round the bar"
    assert re.search(r"starting.*\r\x1b\[2Ka set is drawn\n", terminal.getvalue(), re.DOTALL)
