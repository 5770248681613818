"""What every command says of itself, word for word: a change of the help is a change that somebody looks at.

Written anew with `HOLDFAST_WRITE_HELP=1 python -m pytest tests/cli/test_help.py`.
"""

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from holdfast.cli.app import _COMMANDS, verbs

KEPT = Path(__file__).parent / "help"
PAGES = [
    [],
    *([name] for name in _COMMANDS),
    *(["data", name] for name in ("list", "show", "fetch", "import")),
    *(
        ["rotate", name]
        for name in (
            "collect",
            "train",
            "draw",
            "admit",
            "swap",
            "expose",
            "status",
            "head",
            "migrate",
            "run",
        )
    ),
]


@pytest.mark.parametrize("words", PAGES, ids=lambda words: " ".join(words) or "holdfast")
def test_the_help_is_what_was_agreed_on(words):
    shown = CliRunner().invoke(verbs, [*words, "--help"], prog_name="holdfast", terminal_width=100)
    assert shown.exit_code == 0
    page = KEPT / f"{'-'.join(words) or 'holdfast'}.txt"
    if os.environ.get("HOLDFAST_WRITE_HELP"):
        page.write_text(shown.output)
    assert shown.output == page.read_text()
    assert max(map(len, shown.output.splitlines())) <= 100


def test_no_page_is_left_over():
    assert {page.stem for page in KEPT.iterdir()} == {"-".join(words) or "holdfast" for words in PAGES}
