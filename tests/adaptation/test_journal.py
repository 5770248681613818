"""The journal of an adaptation is a run: its chain, its form, its outcome, and the records of the server."""

import json
import shutil

import pytest
from click.testing import CliRunner

from holdfast.adaptation.journal import OF_FILE, concluded, open_journal, read_adaptation
from holdfast.cli.app import run as command
from holdfast.cli.app import verbs
from holdfast.core.errors import TargetError, UsageError
from holdfast.io.files import digest
from holdfast.runs.store.folder import document
from holdfast.server.adaptations import Adaptations
from holdfast.server.audit_folder import AuditFolder
from holdfast.verbs.reports import annex_of, verify

CONFIG = {"server": "http://a", "seed": 0}
FACTS = {"approved": {"required": True, "by": "operator"}, "canary": {"pairs": 3, "share": 0.25}}
ENDED = {"ends": "the gate did not pass"}


def written(folder, steps=OF_FILE, facts=FACTS, *, ends=True):
    """A folder with the steps of an adaptation."""
    with open_journal(folder, CONFIG, resume=False) as journal:
        journal.keep("incumbent.safetensors", b"weights")
        for step in steps:
            journal.take(step, lambda step=step: facts.get(step, {}))
        if ends:
            journal.end()
    return folder


def recorded(folder, adaptation, *, skip="", other=None, approved=True):
    """The audit folder of a server to which the steps were sent, without one of them or with other facts of it."""
    audit = AuditFolder.open(folder, {"model": "m"})
    server = Adaptations(audit.record)
    for step in adaptation.steps:
        if step.step == "approved":
            server.took(adaptation.run, "approval", {"gates": []})
            server.approve(adaptation.run, approved, by="operator")
        if step.step != skip:
            server.took(adaptation.run, step.step, (other or {}).get(step.step, step.facts))
    server.took(adaptation.run, "end", {"outcome": adaptation.outcome, "reason": adaptation.reason})
    audit.close()
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return written(tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


def test_steps_are_taken_once_and_the_run_is_resumed(tmp_path):
    folder = tmp_path / "run"
    with open_journal(folder, CONFIG, resume=False) as journal:
        run, facts = journal.run, journal.take("begin", lambda: {"x": (1, 2)})
        assert facts == {"x": [1, 2]} and journal.facts("harden") is None
        with (
            pytest.raises(UsageError, match="is in use by process"),
            open_journal(folder, CONFIG, resume=True),
        ):
            pass
    with open_journal(folder, CONFIG, resume=True) as journal:
        assert journal.run == run and journal.take("begin", lambda: 1 / 0) == facts
        journal.take("trigger", lambda: ENDED)
        journal.end()
    stored = read_adaptation(folder)
    assert (stored.outcome, stored.reason) == ("not promoted", ENDED["ends"])
    assert stored.steps[0].time > 1e9 and verify(folder).complete
    with (
        pytest.raises(UsageError, match="contains a run already"),
        open_journal(folder, CONFIG, resume=False),
    ):
        pass
    for other in ({**CONFIG, "server": "http://b"}, {**CONFIG, "seed": 1}):
        with (
            pytest.raises(UsageError, match="another configuration"),
            open_journal(folder, other, resume=True),
        ):
            pass


def test_only_the_owner_reads_the_folder_and_the_copies_of_weights(finished):
    assert finished.stat().st_mode & 0o777 == 0o700
    assert (finished / "incumbent.safetensors").stat().st_mode & 0o777 == 0o600


def test_the_outcome_follows_from_the_steps():
    step = read_adaptation.__globals__["Step"]
    taken = [step(name, 0.0, {}) for name in OF_FILE]
    assert concluded([]) is None and concluded(taken[:-1]) is None and concluded(taken) == ("promoted", "")
    assert concluded([*taken[:3], step("harden", 0.0, ENDED)])[0] == "not promoted"
    assert concluded([*taken[:-1], step("watch", 0.0, ENDED)])[0] == "rolled back"


def rewritten(folder, name, content, *, record=True):
    """Change a document, and its digest in the chain if `record`, as someone who writes a folder can do."""
    file = folder / f"{name}.json"
    data = content if isinstance(content, bytes) else document(content)
    file.write_bytes(data)
    if record:
        from holdfast.runs.store.append_log import GENESIS, Link
        from store.forging import line_of

        chain, previous = folder / "chain.jsonl", GENESIS
        lines = []
        for text in chain.read_text().splitlines():
            about = json.loads(text)["content"]
            about = {**about, "digest": digest(data)} if about["kind"] == name else about
            link = Link(previous, about)
            lines.append(line_of(link))
            previous = link.digest
        chain.write_bytes(b"".join(lines))


@pytest.mark.parametrize(
    ("name", "content", "record", "reason"),
    [
        ("canary", {"pairs": 4}, False, "is not what the chain recorded"),
        ("verdict", {"verdict_of": "adapt", "outcome": "rolled back", "reason": ""}, True, "does not follow"),
        ("verdict", {"verdict_of": "adapt", "outcome": "good", "reason": ""}, True, "has another format"),
        ("gates", ENDED, True, "up to the one that ends the run"),
        ("gates", {"ends": 3}, True, "is no text"),
        ("gates", b'{"x": 1e999}', True, "is not finite"),
        ("gates", b"[]", True, "an object was expected"),
        ("harden", {"chain": "0" * 64}, True, "is not the run whose chain"),
    ],
)
def test_changed_steps_are_refused(copy, name, content, record, reason):
    rewritten(copy, name, content, record=record)
    with pytest.raises(TargetError, match=reason):
        read_adaptation(copy)
    for words in (["verify", str(copy)], ["report", str(copy), "--annex", "aisvs"]):
        assert command(words) == 3


def test_odd_times_are_refused(copy):
    for times in ('{"canary": NaN}', '{"canary": 1e300}', '{"canary": "x"}', "[]"):
        (copy / "about.json").write_text(f'{{"times": {times}}}')
        with pytest.raises(TargetError, match="has another format|is not finite"):
            read_adaptation(copy)
    (copy / "about.json").unlink()
    assert read_adaptation(copy).steps[0].time == 0


def test_a_report_states_the_steps_and_how_the_adaptation_ended(finished, tmp_path, capsys):
    assert command(["report", str(finished), "-o", str(tmp_path / "report.json")]) == 0
    shown = capsys.readouterr()
    assert "canary" in shown.out and "The candidate was promoted." in shown.err
    content = json.loads((tmp_path / "report.json").read_text())
    assert [step["step"] for step in content["steps"]] == list(OF_FILE)
    refused = written(tmp_path / "refused", ("begin",), {"begin": {"ends": "a reason"}})
    assert command(["report", str(refused)]) == 1
    assert "not promoted: a reason" in capsys.readouterr().err
    assert command(["report", str(written(tmp_path / "open", ("begin",), ends=False))]) == 3
    assert "is not finished" in capsys.readouterr().err


def test_an_adaptation_is_no_assessment(finished, capsys):
    assert command(["compare", str(finished), str(finished)]) == 3
    assert "is an adaptation, and a run of assess" in capsys.readouterr().err


def test_a_folder_without_a_chain_is_no_adaptation(tmp_path):
    former = tmp_path / "former"
    former.mkdir()
    (former / "adaptation.json").write_text('{"version": 1, "outcome": "promoted"}')
    with pytest.raises(TargetError, match="contains no run, audit, pool"):
        annex_of([former], "aisvs")
    with pytest.raises(UsageError, match="is not a run folder"), open_journal(former, CONFIG, resume=True):
        pass


def evidence(*folders):
    """The statement of the first folder, and whether it is evidence."""
    content = annex_of(folders, "aisvs").content
    named = {each["folder"] for requirement in content["requirements"] for each in requirement["evidence"]}
    return content["folders"][0]["statement"], str(folders[0]) in named


def test_an_annex_compares_the_journal_with_the_records_of_the_server(finished, tmp_path):
    stored = read_adaptation(finished)
    text, counts = evidence(finished)
    assert "proves nothing" in text and "No audit chain of the server was given" in text and counts
    text, counts = evidence(finished, recorded(tmp_path / "same", stored))
    assert "has the same 11 steps" in text and counts
    for place, changes, reason in (
        ("skipped", {"skip": "gates"}, "no step gates"),
        ("other", {"other": {"canary": {"pairs": 4}}}, "other facts of the step canary"),
        ("rejected", {"approved": False}, "no approval of the candidate"),
    ):
        text, counts = evidence(finished, recorded(tmp_path / place, stored, **changes))
        assert reason in text and not counts
    text, counts = evidence(written(tmp_path / "by-hand"), tmp_path / "same")
    assert "no record of this run" in text and not counts


def test_hostile_texts_are_shown_in_one_line(tmp_path):
    folder = written(tmp_path / "run", ("begin",), {"begin": {"ends": "\x1b]0;x\x07\n::error::x"}})
    done = CliRunner().invoke(verbs, ["report", str(folder), "--annex", "aisvs"], catch_exceptions=False)
    assert done.exit_code == 0 and "\x1b" not in done.output and "\n::error" not in done.output


def test_runs_lists_adaptations_beside_others_and_skips_altered_ones(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "promoted")
    written(tmp_path / "ended", ("begin", "trigger"), {"trigger": ENDED})
    written(tmp_path / "begun", ("begin",), ends=False)
    altered = shutil.copytree(finished, tmp_path / "altered")
    (altered / "gates.json").write_text("{}")
    shown = CliRunner().invoke(verbs, ["runs", str(tmp_path)])
    lines = {
        row.split()[0].rpartition("/")[2]: " ".join(row.split()[1:]) for row in shown.output.splitlines()[1:]
    }
    assert lines == {
        "promoted": "exit 0 adapt http://a",
        "ended": "exit 1 adapt http://a",
        "begun": f"1 of {len(OF_FILE)} stages adapt http://a",
    }
    strange = shutil.copytree(finished, tmp_path / "strange")
    manifest = json.loads((strange / "run.json").read_text())
    (strange / "run.json").write_text(json.dumps(manifest | {"config": 3}))
    assert CliRunner().invoke(verbs, ["runs", str(tmp_path)]).output == shown.output
