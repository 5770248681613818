"""Names of files, columns and runs that a stranger chose, in what the command line says."""

import re
import shutil

from holdfast.cli.app import run
from holdfast.cli.options import Voice
from holdfast.core.names import line
from reports.test_hostile_strings import CI_COMMAND
from runs.stored import assessment

HOSTILE = "a\n::error file=x::owned\x1b[2J[red]##[error]"


def test_a_line_is_one_line_and_no_command():
    assert line("a\n::error::x\x1b[2J") == "a :\\:error::x\ufffd[2J"
    assert line("##vso[task.complete]##[error]") == "#\\#vso[task.complete]#\\#[error]"
    for usual in ("linf:8/255", "http://[::1]:8000/v2/models/a", "## heading", "std::array"):
        assert line(usual) == usual


def _obeyed(said):
    return CI_COMMAND.search(said) or re.search(r"[^\n -~\u00a1-\uffff]", said)


def test_the_output_of_a_command_has_no_control_characters(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Voice().say(f"note: {HOSTILE}")
    table = tmp_path / "data.csv"
    table.write_text(f'"{HOSTILE}","label"\n1,0\nno number,1\n')
    assert run(["data", "show", str(table), "--label", HOSTILE.replace("owned", "own")]) in (2, 3)
    assert run(["data", "show", str(table), "--label", "label"]) in (2, 3)
    assert run(["report", HOSTILE]) == 3
    said = capsys.readouterr()
    assert not _obeyed(said.out + said.err)
    assert len(said.err.splitlines()) == 4


def test_odd_folders_do_not_end_the_list_of_runs_and_their_names_are_not_obeyed(capsys, tmp_path):
    shutil.copytree(assessment(), tmp_path / HOSTILE.replace("/", ""))
    for odd in ("[]", "{", '{"schema_version": 1}', '{"schema_version": 2, "digests": 3}'):
        (tmp_path / f"odd-{len(odd)}").mkdir()
        (tmp_path / f"odd-{len(odd)}" / "run.json").write_text(odd)
    assert run(["runs", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert not _obeyed(said.out + said.err)
    assert "[red]" in said.out and len(said.out.splitlines()) == 2
