"""Run folders of a stranger: what they name, hold and leave out is refused or noted, and nothing of it runs."""

import json
import os
import shutil
from typing import Literal, NotRequired

import pytest
from click.testing import CliRunner
from typing_extensions import TypedDict

from holdfast.cli.app import run as command_line
from holdfast.cli.app import verbs
from holdfast.core.chain import GENESIS, Link, canonical, digest
from holdfast.core.errors import TargetError
from holdfast.core.evidence import Seconds
from holdfast.rotation.pool import Pool
from holdfast.runs.documents.stored_runs import open_run, runs_in
from holdfast.runs.store import journal
from holdfast.runs.store.columns import Count, Real, refuse_form
from holdfast.runs.store.encryption import KEY_VARIABLE
from holdfast.runs.store.folder import open_run_folder
from holdfast.runs.store.leases import ShardTimes, leased, spent_in
from holdfast.runs.store.verify import verify
from holdfast.verbs.opening.models import settings_of_pool
from runs import stored
from store.forging import line_of
from store.test_folder import MANIFEST, SHARDS


@pytest.fixture
def run(tmp_path):
    return shutil.copytree(stored.assessment(), tmp_path / "run")


def rewritten(run, name, change=None, *, judged=True):
    """Change a document, or take a changed file as it is, and compute the chain again, as a stranger can. With
    `judged`, the verdict then states the changed file as one from which it was computed.
    """
    if change is not None:
        content = json.loads((run / name).read_text())
        change(content)
        (run / name).write_text(json.dumps(content))
    records = [json.loads(line)["content"] for line in (run / "chain.jsonl").read_text().splitlines()]
    for recorded in records:
        if recorded["file"] == name:
            recorded["digest"] = digest((run / name).read_bytes())
    verdict = next((recorded for recorded in records if recorded["kind"] == "verdict"), None)
    judged = judged and verdict is not None and name != "verdict.json"
    stated = json.loads((run / "verdict.json").read_text()) if judged else {}
    if "computed_from" in stated:
        stated["computed_from"] = {
            recorded["file"]: digest(canonical(recorded))
            for recorded in records
            if recorded["kind"] != "verdict"
        }
        (run / "verdict.json").write_text(json.dumps(stated))
        verdict["digest"] = digest((run / "verdict.json").read_bytes())
    lines, previous = b"", GENESIS
    for recorded in records:
        link = Link(previous, recorded)
        lines, previous = lines + line_of(link), link.digest
    (run / "chain.jsonl").write_bytes(lines)


WRONG = [
    ("run.json", lambda c: c["config"]["stages"][0].update(name="../clean")),
    ("run.json", lambda c: c["config"]["stages"][0].update(name=3)),
    ("run.json", lambda c: c["plan"].update(stages="/etc/passwd")),
    ("run.json", lambda c: c["config"]["stages"].append(c["config"]["stages"][0])),
    ("run.json", lambda c: c.update(digests=[])),
    ("run.json", lambda c: c["config"]["threat"].update(eps="much")),
    ("run.json", lambda c: c["data"].update(classes={"a": 1})),
    ("run.json", lambda c: c.pop("versions")),
    ("verdict.json", lambda c: c.update(judged="../other", gates=None)),
    ("verdict.json", lambda c: c.update(verdict_of="after", exit_code=0)),
    ("verdict.json", lambda c: c.update(gates=[7])),
    ("doubts.json", lambda c: c["doubts"][0].update(state="odd")),
    ("doubts.json", lambda c: c.update(broken=[])),
    ("doubts.json", lambda c: c["doubts"][0].update(n=-5)),
    ("doubts.json", lambda c: c["doubts"][0].update(n="7")),
    ("doubts.json", lambda c: c["doubts"][0].update(statistic="0.25")),
    ("doubts.json", lambda c: c["doubts"][0].pop("message")),
    ("verdict.json", lambda c: c.update(exit_code=float(c["exit_code"]))),
    ("verdict.json", lambda c: c["gates"][0].update(compared={"value": 1, "low": 1, "high": 1, "n": "20"})),
    ("verdict.json", lambda c: c["gates"][0].update(compared={"value": True, "low": 1, "high": 1, "n": 20})),
    ("verdict.json", lambda c: c.pop("computed_from")),
]


@pytest.mark.parametrize("name, change", WRONG, ids=range(len(WRONG)))
def test_a_document_of_another_form_is_refused_by_name_and_does_not_end_the_list_of_runs(run, name, change):
    other = shutil.copytree(run, run.with_name("good"))
    rewritten(run, name, change)
    with pytest.raises(TargetError, match=f"{name}|{run.name}"):
        open_run(run)
    assert other in [entry.path for entry in runs_in(run.parent)]


class Form(TypedDict):
    a: list[Count]
    b: NotRequired[dict[str, Real | None]]
    c: NotRequired[Literal["x"]]
    d: NotRequired[str]


def test_a_form_names_the_field_the_value_and_what_was_expected(tmp_path):
    refuse_form(tmp_path, {"a": [0], "b": {"k": None, "l": "inf", "m": 0.5}, "more": 1}, Form)
    for content, said in (
        ({"a": [0, -1]}, r"a\[1\] is -1; greater than or equal to 0 was"),
        ({"a": [True]}, "a valid integer"),
        ({"a": ["x"] * 5000}, "5,000 fields have other types"),
        ({"a": [], "b": {"k": "much"}}, "b.k is 'much'; a number"),
        ({"a": [], "b": {"k" * 1000: "much"}}, r"b\.k{1,40}\.\.\.k{1,40} is 'much'"),
        ({"a": [], "c": "y"}, "c is 'y'; 'x' was expected"),
        ({"a": [], "d": ["long" * 1000]}, r"d is \['long.{1,60}'\]; a valid string was expected"),
        ({}, "an object with 'a'"),
        ([], "the document is \\[\\]; an object"),
    ):
        with pytest.raises(TargetError, match=said):
            refuse_form(tmp_path, content, Form)


def test_columns_that_do_not_fit_are_no_internal_error(run):
    rewritten(run, "run.json", lambda content: content["config"]["stages"].pop(0))
    with pytest.raises(TargetError, match="are inconsistent"):
        open_run(run)


def test_errors_that_only_a_report_finds_have_exit_code_3(run, capsys):
    rewritten(run, "run.json", lambda content: content["model"].update(bounds=["x", 1]))
    for words in (["report", str(run)], ["compare", str(run), str(stored.assessment())]):
        assert command_line(words) == 3
        assert f"the run in {str(run)!r} are inconsistent" in capsys.readouterr().err


def test_links_and_devices_are_not_opened(run):
    kept = run.parent / "elsewhere.json"
    (run / "doubts.json").rename(kept)
    (run / "doubts.json").symlink_to(kept)
    for reader in (verify, open_run):
        with pytest.raises(TargetError, match="is a link, a folder or a device"):
            reader(run)
    (run / "chain.jsonl").unlink()
    os.mkfifo(run / "chain.jsonl")
    with pytest.raises(TargetError, match="is a link, a folder or a device"):
        verify(run)


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        b'{"stage":"clean","attempts":1,"cpu_s":"x","wall_s":1}',
        b'{"stage":"clean","attempts":1,"cpu_s":-1.0,"wall_s":1}',
        b'{"stage":"clean","attempts":1,"cpu_s":Infinity,"wall_s":1}',
        b'{"stage":"../x","attempts":1,"cpu_s":1,"wall_s":1}',
    ],
)
def test_times_of_another_form_are_ignored(tmp_path, line):
    run = tmp_path / "run"
    with open_run_folder(run, MANIFEST, {}, resume=False) as folder:
        folder.lease.spend("clean", 0, Seconds(1.0, 1.0))
        with (run / "times.jsonl").open("ab") as file:
            file.write(b"\n" + line)
        folder.lease.spend("clean", 0, Seconds(1.0, 1.0))
    assert spent_in(run) == {"clean": ShardTimes(2.0, 2.0, 0)}


@pytest.mark.parametrize("name", ["lease.json", "lease.lock", "times.jsonl"])
def test_links_in_place_of_the_lease_and_the_times_are_not_followed(tmp_path, name):
    victim = tmp_path / "victim"
    victim.write_text("x")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(victim)
    with leased(tmp_path / "run") as lease:
        lease.begin("clean", 0)
    assert victim.read_text() == "x" and not (tmp_path / "run" / name).is_symlink()


def test_files_that_no_record_names_are_noted_or_refused(tmp_path):
    run = tmp_path / "run"
    with open_run_folder(run, MANIFEST, {"created": "now"}, resume=False) as folder:
        folder.complete("clean", SHARDS[0])
    for known in ("report.html", "report.json", "junit.xml", "served.journal", "answers.journal", ".x.part"):
        (run / known).write_text("")
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "last.safetensors").write_text("")
    assert verify(run).notes == ()
    (run / "notes.txt").write_text("")
    (run / "more").mkdir()
    (run / "more" / "a.bin").write_text("")
    noted = [f"{str(run / name)!r} is in no record of the chain" for name in ("more/a.bin", "notes.txt")]
    assert list(verify(run).notes) == noted
    said = CliRunner().invoke(verbs, ["verify", str(run)])
    assert said.exit_code == 0 and "notes.txt' is in no record" in said.output
    for name in ("doubts.json", "Adaptive.JSON", "9-made-up.safetensors"):
        (run / name).write_text("{}")
        with pytest.raises(TargetError, match=f"{name}' is in no record of the chain; remove it"):
            verify(run)
        (run / name).unlink()


def test_a_run_that_the_chain_does_not_name_is_refused_within_a_finished_run(tmp_path):
    run = tmp_path / "run"
    with open_run_folder(run, MANIFEST, {}, resume=False) as folder:
        shutil.copytree(stored.assessment(), run / "after")
        assert not verify(run).complete
        folder.record("verdict", {"exit_code": 0, "verdict_of": "after"})
    with pytest.raises(TargetError, match="is a run that is in no record of the chain"):
        verify(run)


@pytest.mark.slow
def test_a_hardening_reports_only_the_run_that_its_chain_names(tmp_path):
    run = shutil.copytree(stored.hardening(), tmp_path / "run")
    assert open_run(run).metrics["robust_accuracy"].value == 0.5
    rewritten(run / "after", "verdict.json", lambda content: content.update(exit_code=1))
    for reader in (open_run, verify):
        with pytest.raises(TargetError, match=r"is not the run whose chain is recorded in '?after\.json'?"):
            reader(run)
    shutil.rmtree(run / "after")
    (run / "after").symlink_to(stored.assessment())
    for reader in (open_run, verify):
        with pytest.raises(TargetError, match="has no inner run|is a link"):
            reader(run)


def test_files_beside_the_chain_are_validated(run):
    (run / "about.json").write_text(json.dumps({"created": "now", "verb": "forged", "hashes": {}}))
    assert open_run(run).about["verb"] == "assess"
    (run / "served.journal").write_text(json.dumps({"rows": 3}))
    with pytest.raises(TargetError, match="served.journal"):
        open_run(run)
    (run / "served.journal").unlink()
    (run / "about.json").write_text(json.dumps({"created": 7}))
    with pytest.raises(TargetError, match=r"about\.json.*created is 7; a valid string was expected"):
        open_run(run)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            b'{"t": "answer", "stage": "a", "shard": 0, "kind": "clean", "n": %d, "width": 0, "type": "<f4"}'
            % (10**12),
            "fewer than",
        ),
        (b"[" * 5000, "another form"),
    ],
)
def test_a_journal_holds_the_answers_that_it_counts(tmp_path, line, says):
    record = line + b"\n"
    framed = journal._framed(record, journal._next(b"", record))
    (tmp_path / "answers.journal").write_bytes(journal._head(len(framed)) + framed)
    with pytest.raises(TargetError, match=f"was changed: .*{says}"):
        journal.Journal(None, tmp_path / "answers.journal", resume=True)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"bounds": ["a", "b"]}, r"about\.settings\.bounds\[0\] is 'a'"),
        ({"bounds": [0]}, r"about\.settings\.bounds is \[0\]; a longer list"),
        ({"classes": "x"}, r"about\.settings\.classes is 'x'"),
        ({"data_normalised": [1]}, r"data_normalised\[0\] is 1"),
        (["model"], r"about\.settings is \['model'\]"),
    ],
)
def test_the_description_of_the_model_of_a_pool_has_one_form(tmp_path, monkeypatch, settings, says):
    monkeypatch.setenv(KEY_VARIABLE, "5a" * 32)
    pool = Pool.create(tmp_path / "pool", {"settings": settings})
    with pytest.raises(TargetError, match=says):
        settings_of_pool(pool)
    (tmp_path / "pool" / "pool.json").write_text('{"schema_version": 2}')
    with pytest.raises(
        TargetError, match=r"pool\.json' has another format than this version writes: .* an object with 'id'"
    ):
        Pool.open(tmp_path / "pool")
