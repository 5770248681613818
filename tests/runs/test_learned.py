"""What an attack learns is a stage of the run: kept, found again, and cut off by time."""

from dataclasses import replace

import pytest

from holdfast.attacks import Universal
from holdfast.core.errors import UsageError
from holdfast.io.data.loaders import as_data
from holdfast.runs.assess.assess import assess
from holdfast.runs.harness.kinds.attack import AttackKind, Fit
from holdfast.runs.harness.stage import Member
from runs.fakes import FAST, data, order, settled, subject

LEARNED = Member("Universal", Universal(examples=30, steps=10, batch=10))


def wanted(**changes):
    return replace(order(FAST, LEARNED, attacked=False, **changes), fit=data(60, seed=2))


def test_a_learned_attack_is_learned_once_and_read_again(tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assess(subject(), data(), wanted(), run=whole)

    def fails(kind, stage, work):
        raise MemoryError(stage.name)

    with monkeypatch.context() as patch:
        real = AttackKind.run
        patch.setattr(
            AttackKind,
            "run",
            lambda kind, stage, work: (fails if stage.name == "2-universal" else real)(kind, stage, work),
        )
        with pytest.raises(MemoryError):
            assess(subject(), data(), wanted(), run=cut)
    monkeypatch.setattr(Fit, "run", fails)
    assess(subject(), data(), wanted(), run=cut, resume=True)
    assert settled(cut) == settled(whole)


def test_other_examples_are_another_run(tmp_path):
    run = tmp_path / "run"
    assess(subject(), data(), wanted(), run=run)
    with pytest.raises(UsageError, match="config"):
        assess(subject(), data(), replace(wanted(), fit=data(60, seed=3)), run=run, resume=True)


def test_a_learned_attack_is_omitted_if_time_runs_out(tmp_path):
    result = assess(subject(), data(), wanted(time_budget_s=1e-9), run=tmp_path / "run")
    assert any("Universal" in note and "finished none" in note for note in result.evidence.notes)


def test_an_attack_may_be_learned_on_examples_of_another_type_than_the_model_takes():
    batch = data(60, seed=2).read(0, 60)
    found = assess(subject(), data(), replace(wanted(), fit=as_data(batch.x.float(), batch.y)))
    assert [record.name for record in found.attacks][-1] == "Universal"
