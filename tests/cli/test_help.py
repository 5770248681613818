"""What every command says of itself, word for word: a change of the help is a change that somebody looks at.

Written anew with `HOLDFAST_WRITE_HELP=1 python -m pytest tests/cli/test_help.py`.
"""

import os
import shlex
from itertools import chain
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from holdfast.cli.app import _COMMANDS, _GROUPS, run, verbs
from holdfast.cli.vnn import vnn

KEPT = Path(__file__).parent / "help"


def words_of_commands(command, context, words=()):
    """The words of a command, and of every command inside it."""
    yield words
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            yield from words_of_commands(command.get_command(context, name), context, (*words, name))


PAGES = list(words_of_commands(verbs, click.Context(verbs)))
# `demo` measures for a minute; tests/cli/test_assess.py runs it.
EVERY_COMMAND = [(verbs, words) for words in PAGES if words != ("demo",)] + [
    (vnn, words) for words in words_of_commands(vnn, click.Context(vnn))
]


def page_of(words):
    """Name of the file with the help of a command, whose last word is `--help` or `--help-all`."""
    return f"{'-'.join(words[:-1]) or 'holdfast'}{'-all' * (words[-1] == '--help-all')}.txt"


WITHOUT_A_FILE = {("keys", "list"), ("validate",)}
"""Commands that read a file with a default name, which is not there."""


def command_of(words):
    command = verbs
    for word in words:
        command = command.get_command(click.Context(command), word)
    return command


ABRIDGED = [words for words in PAGES if getattr(command_of(words), "abridged", False)]


@pytest.mark.parametrize(
    "words",
    [*((*words, "--help") for words in PAGES), *((*words, "--help-all") for words in ABRIDGED)],
    ids=" ".join,
)
def test_the_help_is_what_was_agreed_on(words):
    shown = CliRunner().invoke(verbs, words, prog_name="holdfast", terminal_width=100)
    assert shown.exit_code == 0
    page = KEPT / page_of(words)
    if os.environ.get("HOLDFAST_WRITE_HELP"):
        page.write_text(shown.output)
    assert shown.output == page.read_text()
    assert max(map(len, shown.output.splitlines())) <= 100


def test_no_page_is_left_over():
    pages = {page_of((*words, "--help")) for words in PAGES} | {
        page_of((*words, "--help-all")) for words in ABRIDGED
    }
    assert {page.name for page in KEPT.iterdir()} == pages


@pytest.mark.parametrize("words", ABRIDGED, ids=" ".join)
def test_the_help_shows_the_common_options_and_the_number_of_the_others(words):
    lines = [
        CliRunner().invoke(verbs, [*words, option], prog_name="holdfast").output.splitlines()
        for option in ("--help", "--help-all")
    ]
    shown, every = ({line.split()[0] for line in page if line.startswith("  -")} for page in lines)
    assert shown < every and len(shown) <= 24
    assert (
        lines[0][-1].strip()
        == f"{len(every) - len(shown)} further options: holdfast {' '.join(words)} --help-all"
    )


def test_every_command_is_in_one_group():
    assert sorted(chain(*_GROUPS.values())) == sorted(_COMMANDS)


@pytest.mark.parametrize(
    ("program", "words"), EVERY_COMMAND, ids=[f"{program.name} {' '.join(w)}" for program, w in EVERY_COMMAND]
)
def test_every_command_runs_without_arguments_or_names_the_missing_one(
    program, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)  # `init` writes a file
    code, written = run(list(words), program), capsys.readouterr()
    assert code in ((3,) if words in WITHOUT_A_FILE else (0, 2)), written.err
    assert written.out or written.err
    if code == 2:
        assert "Usage" in written.err or "missing" in written.err.lower()


@pytest.mark.parametrize("line", [line for _, _, *lines in _COMMANDS.values() for line in lines])
def test_an_example_of_a_help_text_is_a_command_with_its_options(line):
    """Files that an example names need not exist."""
    command, words = verbs, shlex.split(line)
    while isinstance(command, click.Group) and words:
        command = command.get_command(click.Context(command), words.pop(0))
    _, rest, _ = command.make_parser(click.Context(command)).parse_args(words)
    assert not rest
