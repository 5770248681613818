"""Files of runs as another user of the machine sees them: only the owner can read what a run stores."""

import json
import os
import shutil
import stat
import sys
from contextlib import contextmanager

import pytest
import torch

from conclusions import concluding
from holdfast.adaptation.journal import open_journal
from holdfast.audits.audit import AuditRequest, audited
from holdfast.audits.finding import Finding
from holdfast.core.catalogue import names
from holdfast.io.remote.http_client import Totals
from holdfast.runs.assess.assess import assess
from holdfast.runs.documents.stored_runs import open_run
from holdfast.runs.harden.hardened import Hardened
from holdfast.runs.store.folder import open_run_folder
from holdfast.runs.store.journal import NAME as ANSWERS
from holdfast.runs.store.journal import Journal as Answers
from runs import fakes, stored

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="modes are of POSIX")
DIGESTS = dict.fromkeys(("config", "data", "model", "code"), "0" * 64)
SHARD = {"id": torch.arange(3), "x": torch.rand(3, 2)}


@contextmanager
def umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.fixture(autouse=True)
def usual_umask():
    with umask(0o022):
        yield


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def open_to_others(folder):
    """The folder and all files and folders in it that somebody else than the owner may use."""
    assert any(path.is_file() for path in folder.rglob("*"))
    return [path for path in (folder, *folder.rglob("*")) if mode(path) & 0o077]


def test_finished_runs_are_their_owners_alone():
    with umask(0o022):
        for run in (stored.assessment(), stored.hardening()):
            assert not open_to_others(run), run
    assert {path.name for path in stored.hardening().iterdir()} >= {"before", "after", "checkpoints"}


@contextmanager
def interrupted(run):
    with open_run_folder(run, {"digests": DIGESTS}, {}, resume=False) as folder:
        folder.keep_shard("clean", 0, SHARD)
        folder.complete("clean", SHARD)
        folder.keep_shard("1-pgd", 0, SHARD)
        folder.add_split("1-pgd", 0, 1, 1)
        folder.record("doubts", {})
        yield folder


def test_files_of_a_running_run_are_its_owners_alone(tmp_path):
    run = tmp_path / "runs" / "a"
    with interrupted(run):
        names_of_files = {path.name for path in run.rglob("*")}
        assert {
            "lease.json",
            "lease.lock",
            "times.jsonl",
            "00000.safetensors",
            "splits.json",
        } <= names_of_files
        assert not open_to_others(run)
    assert not open_to_others(run) and mode(run.parent) == 0o755


def test_a_folder_of_the_user_keeps_its_mode_and_the_files_in_it_are_private(tmp_path):
    run = tmp_path / "a"
    run.mkdir(mode=0o755)
    with interrupted(run):
        pass
    assert open_to_others(run) == [run] and mode(run) == 0o755


def test_files_of_an_earlier_version_become_private_when_they_are_written_again(tmp_path):
    run = tmp_path / "a"
    with interrupted(run):
        pass
    (run / "chain.jsonl").chmod(0o644)
    with open_run_folder(run, {"digests": DIGESTS}, {}, resume=True) as folder:
        folder.record("verdict", {})
    assert mode(run / "chain.jsonl") == 0o600


def test_audits_are_their_owners_alone(tmp_path):
    about = {"name": "a", "digest": "0" * 64}

    def measure(run):
        run.stage("scores", lambda: SHARD)
        return lambda: {"a": torch.rand(1, 1, 8, 8)}

    with concluding(lambda steps: Finding("unclear", "nothing was measured")):
        audited(AuditRequest("poison", {}, about, about, ("scores",)), measure, tmp_path / "a")
    assert not open_to_others(tmp_path / "a")


def test_answers_of_a_server_are_their_owners_alone(tmp_path):
    with interrupted(tmp_path / "run"):
        pass
    answers = Answers(None, tmp_path / "run" / ANSWERS)
    answers.attach()
    assert not open_to_others(tmp_path / "run")
    answers.done("clean")
    answers.finish()
    assert (tmp_path / "run" / "served.journal").is_file() and not open_to_others(tmp_path / "run")
    assert answers.totals == Totals()


def test_an_adaptation_and_its_copies_of_weights_are_their_owners_alone(tmp_path):
    with open_journal(tmp_path / "a", {"server": "http://server"}, resume=False) as journal:
        journal.keep("candidate.safetensors", b"weights")
        journal.take("begin", lambda: {"ends": "at once"})
        journal.end()
    assert not open_to_others(tmp_path / "a")


def test_a_model_that_is_written_by_a_hardening_has_the_mode_of_the_umask(tmp_path):
    result, card = open_run(stored.hardening()), json.loads((stored.hardening() / "card.json").read_text())
    cost = dict.fromkeys(("wall_s", "cpu_s", "forwards", "planning_s"), 0)
    card |= {"command": "", "hardware": "", "cost": cost}  # which are not in the chain
    hardened = Hardened(result.evidence, result, result, (), card, b"weights", program=b"program")
    hardened.write(tmp_path / "b")
    assert {mode(path) for path in (tmp_path / "b").iterdir()} == {0o644} and mode(tmp_path / "b") == 0o755


def test_reports_and_models_that_a_user_names_have_the_mode_of_the_umask(tmp_path):
    result = open_run(stored.assessment())
    for suffix in names("reports"):
        assert mode(result.write(tmp_path / f"report{suffix}")) == 0o644
    run = shutil.copytree(stored.assessment(), tmp_path / "run")
    assert mode(result.write(run / "report.html")) == 0o600  # a report beside the columns of its run


def test_a_run_in_memory_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assess(fakes.subject(), fakes.data(), fakes.order(stored.WEAK))
    assert not list(tmp_path.iterdir())
