"""What a command says while a progress bar stands on the terminal."""

import io
import re
from collections.abc import Callable
from contextlib import redirect_stderr

import pytest

from holdfast.cli import running
from holdfast.cli.options import Voice
from holdfast.cli.running import progress_bar
from holdfast.runs.engine.progress import EpochMeasures, Step
from waiting import until


class Terminal(io.StringIO):
    """A terminal that remembers what was written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer = io.BytesIO()

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal of 100 columns, to which tests redirect the standard error."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    return Terminal()


def test_a_message_replaces_the_line_of_the_progress_bar(terminal: Terminal) -> None:
    with redirect_stderr(terminal), progress_bar(Voice()):
        Voice().say("a set is drawn")
    assert not terminal.buffer.getvalue(), "nothing goes round the bar"
    assert re.search(r"starting.*\r\x1b\[2Ka set is drawn\n", terminal.getvalue(), re.DOTALL)


def test_the_bar_of_what_is_done_does_not_stand_under_what_follows(terminal: Terminal) -> None:
    def stands() -> bool:
        Voice().say("a set is drawn")
        return "1/12 run 1" in terminal.getvalue().rpartition("a set is drawn")[2]

    with redirect_stderr(terminal), progress_bar(Voice()) as progress:
        progress(Step("run 1", 1, 12, 1, 2, 0, 0))
        until(stands)  # the bar is drawn anew ten times a second
        progress(Step("run 1", 1, 12, 2, 2, 0, 0))
        until(lambda: not stands())


def test_lines_of_a_hardening_are_written_for_each_epoch_and_repeated_where_nothing_happens(
    set_limit, capsys: pytest.CaptureFixture[str]
) -> None:
    set_limit("holdfast.cli.running._REPEATED_S", 0.02)
    said = []

    def repeated() -> bool:
        said.append(capsys.readouterr().err)
        return said[-1].count("; last finished: stage 1/3: clean, 0 of 9") > 1

    with running.progress_bar(Voice(), piped=running.timed_lines) as progress:
        progress(Step("clean", 1, 3, 0, 9, 0, 0))
        until(repeated)
        progress(Step("training pgd", 2, 3, 1, 2, 3, 9, EpochMeasures(1, 2, 0.5, 1 / 3, 1.0, 9, 30.0)))
    expected = "epoch 1 of 2: loss 0.5, robust 33.3 % and clean 100.0 % of 9 held-out examples, about 30 s"
    assert f"training pgd, {expected} left\n" in capsys.readouterr().err


@pytest.fixture
def written(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Function that returns the lines that steps of a run write."""

    def written(*steps: Step) -> str:
        with running.progress_bar(Voice(), piped=running.bound_lines) as progress:
            for step in steps:
                progress(step)
        return capsys.readouterr().err

    return written


def test_a_bound_of_the_robust_accuracy_is_written_when_it_falls_and_at_most_every_few_seconds(
    set_limit, written: Callable[..., str]
) -> None:
    part, clean, attacked = (
        Step("clean", 1, 3, 50, 100, 48, 50, n=100),
        Step("clean", 1, 3, 100, 100, 93, 100, n=100),
        Step("1-pgd", 2, 3, 50, 100, 60, 100, n=100),
    )
    first = "robust accuracy at most 96.0 % (86.3 to 99.5 %), estimated from 50 of 100 examples\n"
    assert written(part, clean, attacked) == first
    set_limit("holdfast.cli.running._BETWEEN_S", 0.0)
    later = (
        "robust accuracy at most 93.0 % (86.1 to 97.1 %)\nrobust accuracy at most 60.0 % (49.7 to 69.7 %)\n"
    )
    assert written(part, clean, clean, attacked, Step("training", 1, 1, 1, 1, 3, 9)) == first + later


def test_the_bound_of_a_run_that_measures_ever_more_examples_does_not_rise_at_a_new_look(
    set_limit, written: Callable[..., str]
) -> None:
    set_limit("holdfast.cli.running._BETWEEN_S", 0.0)
    clean, attacked, second, lower = (
        Step("clean", 1, 3, 32, 32, 31, 32, n=300, in_looks=True),
        Step("1-pgd", 2, 3, 32, 32, 4, 32, n=300, in_looks=True),
        Step("clean", 1, 3, 48, 48, 46, 48, n=300, in_looks=True),
        Step("1-pgd", 2, 3, 48, 48, 6, 48, n=300, in_looks=True),
    )
    lines = written(clean, attacked, second, lower).splitlines()
    bounds = [float(line.split("at most ")[1].split(" %")[0]) for line in lines]
    assert len(bounds) == 3 and bounds == sorted(bounds, reverse=True)
    assert lines[-1].endswith("(95 % confidence), from 48 of 300 examples")
