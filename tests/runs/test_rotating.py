"""The address `rotating:POOL`, and the table of attackers of a pool on a problem that is learned in a second."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import holdfast
from holdfast.core.draws import Draws
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Classifier
from holdfast.gates.judging import protection_verdict, with_effects
from holdfast.recipes import SingleStep, Standard
from holdfast.recipes.training.recipe import trained_as
from holdfast.rotation import Codec, LatentDiffusion
from holdfast.rotation.pool import Pool
from holdfast.rotation.steps import attackers, rotation_request
from holdfast.rotation.steps.alternatives import ATTACKS, Alternatives, TransferAttacker, doubt, hardened
from holdfast.rotation.steps.attackers import ATTACKERS, AcrossSwaps, AttackerTable, Means
from holdfast.runs.documents.stored_runs import open_run
from holdfast.runs.engine.progress import Step
from holdfast.runs.store.verify import verify
from holdfast.verbs import rotate
from holdfast.verbs.checked_settings import check_settings
from holdfast.verbs.opening.resolve import open_subject
from holdfast.verbs.settings import Assess, RotateSettings
from rotation.problem import examples
from runs import steps
from store.test_foreign import rewritten

NET = "from rotation.problem import network\n\n\ndef make():\n    return network()\n"
FEW = TransferAttacker({"MI": ATTACKS["MI"]})
MEANS = Means(FEW, FEW, (2, 4), AcrossSwaps(queries=12, every=5), labels=64, epochs=1)
INSTEAD = (
    "static", "weight noise", "checkpoints of a run", "soup", "SWAG", "independent seeds",
    "adversarial fine-tuning", "PGD training", "DVERGE-like diversity",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def lenient_limits():
    """A generator that was trained for a short time is accepted, and so is each set that it draws."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"draw._LOST": 0.2, "draw._POINT": 1.0}.items():
            patch.setattr(f"holdfast.rotation.steps.{name}", value)
        yield


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """A pool with a generator and four candidates, of a model at an address."""
    place = tmp_path_factory.mktemp("collected")
    (place / "net.py").write_text(NET)
    for name, (seed, n) in {"train": (0, 480), "test": (1, 64)}.items():
        batch = examples(seed, n)
        np.savez(place / f"{name}.npz", x=batch.x.numpy(), y=batch.y.numpy())
    said = {
        "model": f"{place}/net.py:make", "data": f"{place}/test.npz", "fit": f"{place}/train.npz",
        "threat": "linf:0.1", "initialisation": "own", "trust_code": True,
        "recipe": {
            "use": "standard",
            "training": {"epochs": 5, "batch": 32, "lr": 0.01, "averaging": "none"},
        },
        "source": {"use": "basins", "seeds": 2, "sets": 3, "every": 2, "lr": 1e-3},
    }  # fmt: skip
    terms = rotate.rotate_request(check_settings(said, "test", kind=RotateSettings))
    pool = steps.create(place / "pool", terms)
    stages: list[Step] = []
    steps.collect(pool, terms, progress=stages.append)
    assert [f"{s.place}/{s.of_stages} {s.stage}" for s in stages if s.done == s.of] == [
        "1/6 run 1", "2/6 run 2", *(f"{2 + k}/6 surrogate {k}" for k in (1, 2, 3, 4)),
        "6/6 collected",
    ]  # fmt: skip
    steps.train(
        pool, terms, Codec(dims=8, hidden=64, steps=100), LatentDiffusion(width=64, depth=2, steps=100)
    )
    steps.draw(pool, terms, 2, by="retraining")
    steps.draw(pool, terms, 1)
    return place, terms


@pytest.fixture
def pool(collected, tmp_path):
    shutil.copytree(collected[0] / "pool", tmp_path / "pool")
    shutil.copy(collected[0] / "pool.key", tmp_path / "pool.key")
    return Pool.open(tmp_path / "pool")


@pytest.fixture
def serving(pool):
    """The same with a set that serves and one that waits."""
    one, other, _ = pool.candidates
    pool.admit(one)
    pool.swap()
    pool.admit(other)
    return pool


class Interrupted(AcrossSwaps):
    """A search that is interrupted."""

    def __call__(self, *given, **more):
        raise ZeroDivisionError


class Unused(tuple):
    """Numbers of generated sets that must not be read, because their row is measured already."""

    __slots__ = ()

    def __iter__(self):
        raise AssertionError("the attacker with the generator was measured again")


@pytest.fixture
def means():
    """The means of the attackers."""
    return SimpleNamespace(now=MEANS)


@pytest.fixture
def quick(monkeypatch, means):
    """The pools of which a table of attackers was made, which are measured with few resources."""
    found = []

    def table(pool, terms):
        found.append(pool.path)
        return AttackerTable(pool, terms, means.now)

    monkeypatch.setattr(attackers, "AttackerTable", table)
    return found


def settings(pool, data, **changes):
    said = {
        "model": f"rotating:{pool.path}", "data": f"{data}/test.npz", "threat": "linf:0.1", "n": 24,
        "attacks": [{"use": "PGD", "steps": 5}], "trust_code": True,
    }  # fmt: skip
    return check_settings({**said, **changes}, "test", kind=Assess)


def subject_of(settings):
    return open_subject(settings, adaptive=settings.adaptive)


# --- the address


@pytest.mark.slow
def test_the_address_opens_the_set_that_serves(serving, collected):
    subject = subject_of(settings(serving, collected[0]))
    weights, now = serving.weights(serving.serving.name), serving.serving
    for name, value in subject.model.net.state_dict().items():
        assert torch.equal(value, weights[name])
    card = subject.card
    assert (card["how"], card["set"], card["epoch"]) == ("rotating", now.name, 1)
    assert card["name"] == f"rotating:{serving.path}"
    assert "(A5), which rotation does not change; add --adaptive" in subject.notes[-1]
    assert not subject_of(settings(serving, collected[0], adaptive=True)).notes


def test_another_set_is_another_model(serving, collected):
    of = settings(serving, collected[0])
    before = subject_of(of)
    serving.swap()
    after = subject_of(of)
    assert after.card["epoch"] == 2 and before.digest != after.digest


def test_a_pool_without_a_serving_set_is_refused_with_a_remedy(pool, collected):
    of = settings(pool, collected[0])
    with pytest.raises(UsageError, match="no set serves in .* holdfast rotate admit .*, then .* swap"):
        subject_of(of)
    pool.admit(pool.candidates[0])
    with pytest.raises(UsageError, match="1 admitted sets wait.*: holdfast rotate swap"):
        subject_of(of)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"trust_code": False}, "refers to code .*give trust_code=True .*if you trust it"),
        ({"arch": "mnist-cnn"}, "determines arch, and arch was given"),
        ({"model": "rotating:"}, "contains no folder"),
    ],
)
def test_what_the_address_does_not_take(serving, collected, changes, says):
    with pytest.raises(UsageError, match=says):
        subject_of(settings(serving, collected[0], **changes))


def test_no_pool_is_no_model(tmp_path, collected):
    with pytest.raises(TargetError, match="is not a pool"):
        subject_of(settings(serving_at(tmp_path), collected[0]))


def serving_at(path):
    return type("Nowhere", (), {"path": path / "nowhere"})


def test_a_pool_is_no_surrogate(serving, collected):
    of = settings(serving, collected[0], surrogates=[{"model": f"rotating:{serving.path}"}])
    with pytest.raises(UsageError, match="can only be the model of an assessment"):
        of.open()


# --- the table


@pytest.mark.slow
def test_the_table_is_measured_kept_shown_and_not_measured_again(serving, collected, quick, tmp_path):
    serving.expose(rotation_request.bases(serving)[0], "laptop stolen")
    serving.expose(rotation_request.bases(serving)[1], "laptop stolen")
    of = settings(serving, collected[0], adaptive=True)
    run = tmp_path / "run"
    result = of.run(run)
    found = result.summary()["rotation"]
    assert [row["attacker"] for row in found["rows"]] == list(ATTACKERS)
    assert [row["alternative"] for row in found["alternatives"]] == list(INSTEAD)
    by = {row["attacker"]: row for row in found["rows"]}
    assert by["A0"]["has"].startswith("4 surrogates, trained by standard on")
    assert "2 stolen sets" in by["A1"]["has"] and by["A2"]["has"] == "2 stolen sets"
    assert by["A1u"]["effect"] == "not measured" and by["A1u"]["share"] is None
    assert "the generator and 1 set of the same draw" in by["A3"]["has"]
    assert by["A4"]["has"] == "12 queries per input, 2 sets swapped every 5 queries"
    assert by["A5"]["effect"] == "not affected"
    assert by["A5"]["share"]["value"] == pytest.approx(result.metrics["attack_success_rate"].value)
    document = json.loads((run / "rotation.json").read_text())
    assert all(set(row["broken_ids"]) <= set(document["ids"]) for row in document["rows"])
    assert verify(run).complete and run.stat().st_mode & 0o777 == 0o700
    raised = next(each for each in result.doubts if each.name == "fine-tuning")
    assert raised.state == "raised" and "half an epoch of adversarial fine-tuning" in raised.message
    told = result.table
    assert "A6 distils answers" in told and "adversarial fine-tuning" in told
    for suffix in ("html", "md"):
        text = result.write(tmp_path / f"report.{suffix}").read_text()
        assert "A1u has one unlisted set" in text and "weight noise" in text
    again = of.run(run, resume=True)
    assert len(quick) == 1 and again.summary()["rotation"] == found
    assert open_run(run).summary()["rotation"] == found
    assert open_run(run).doubts == result.doubts
    rewritten(run, "rotation.json", lambda c: c.update(conclusion="every attacker is stopped"), judged=False)
    with pytest.raises(TargetError, match=r"rotation\.json' is not the file"):
        open_run(run)


@pytest.mark.parametrize("recipe", [Standard(), SingleStep()], ids=lambda one: type(one).__name__)
def test_alternatives_are_trained_for_the_same_number_of_passes(serving, collected, recipe, monkeypatch):
    terms, passes, forward = collected[1], [], Classifier.forward
    terms = replace(terms, candidate=replace(terms.candidate, recipe=trained_as(recipe, terms.training)))
    live = terms.of_set(serving, serving.serving.name)
    instead = Alternatives(serving, terms, live, terms.held_out, terms.threat, Draws(0), FEW)

    def counting(model, x, ids=None):
        passes[-1] += len(x) * torch.is_grad_enabled()
        return forward(model, x, ids)

    monkeypatch.setattr(Classifier, "forward", counting)
    monkeypatch.setattr(Alternatives, "_row", lambda self, serves, stolen, says: says)
    for trained in (lambda: instead.tuned, instead._pgd, instead._diverse):
        passes.append(0)
        said = trained()
    assert passes == pytest.approx([len(terms.train)] * 3, rel=0.1)
    assert said.startswith(f"as many passes: {'0.2' if hardened(terms) else '0.33'} of an epoch, and ")


@pytest.mark.slow
def test_rows_that_were_measured_before_a_kill_are_kept(serving, collected, quick, means, tmp_path):
    of = settings(serving, collected[0], adaptive=True)
    means.now = replace(MEANS, query_search=Interrupted(queries=12, every=5))
    with pytest.raises(ZeroDivisionError):
        of.run(tmp_path / "run")
    before = json.loads((tmp_path / "run" / "rotation.json").read_text())
    assert [row["attacker"] for row in before["rows"]] == list(ATTACKERS[:6]) and not before["complete"]
    means.now = replace(MEANS, draws=Unused())
    of.run(tmp_path / "run", resume=True)
    after = json.loads((tmp_path / "run" / "rotation.json").read_text())
    assert after["complete"] and after["rows"][0]["share"] == before["rows"][0]["share"]


@pytest.mark.slow
def test_rows_from_before_something_leaked_are_measured_anew(serving, collected, quick, means, tmp_path):
    of, run = settings(serving, collected[0], adaptive=True), tmp_path / "run"
    first, second = rotation_request.bases(serving)[:2]
    serving.expose(first, "laptop stolen")
    means.now = replace(MEANS, query_search=Interrupted(queries=12, every=5))
    with pytest.raises(ZeroDivisionError):
        of.run(run)
    means.now = MEANS
    serving.expose(second, "another stolen")
    rows = of.run(run, resume=True).summary()["rotation"]["rows"]
    by = {row["attacker"]: row["has"] for row in rows}
    assert (
        by["A1"] == "one of 2 stolen sets, the one with the highest success rate"
        and by["A2"] == "2 stolen sets"
    )


def test_without_adaptive_there_is_no_table(serving, collected, quick):
    result = holdfast.assess(
        holdfast.open_model(f"rotating:{serving.path}", trust_code=True),
        f"{collected[0]}/test.npz",
        "linf:0.1",
        n=8,
        doubts=False,
    )
    assert not quick and result.summary()["rotation"] is None
    assert any("add --adaptive for the table" in note for note in result.summary()["notes"])


def test_a_set_beside_a_stolen_one_has_no_protection(serving, collected, quick):
    near = serving.weights(rotation_request.bases(serving)[0])
    near = {name: value * 1.001 for name, value in near.items()}
    serving.admit(serving.add(near, {"by": "another method"}))
    serving.expose(rotation_request.bases(serving)[0], "laptop stolen")
    serving.serve(serving.ahead[-1], unjudged=True)
    of = settings(serving, collected[0], adaptive=True, threat="linf:0.12")
    summary = of.run().summary()
    by = {row["attacker"]: row for row in summary["rotation"]["rows"]}
    assert by["A1"]["effect"] == "not affected"
    assert summary["rotation"]["conclusion"].startswith("no protection: an attack on one stolen set breaks")
    assert any("collected for another threat model" in note for note in summary["notes"])


def test_a_threat_that_the_table_does_not_cover_is_reported(serving, collected, quick):
    of = settings(serving, collected[0], adaptive=True, threat="l0:3", attacks=None, suite="fast", n=4)
    summary = of.run().summary()
    assert summary["rotation"] is None
    assert any("needs an eps under Linf, L2 or L1" in note for note in summary["notes"])


@pytest.mark.slow
def test_a_white_box_is_one_whatever_the_suite_was_let_see(serving, collected, quick):
    spec = [{"use": "Square", "queries": 2}]
    of = settings(serving, collected[0], adaptive=True, threat="linf:0.1,access=scores", attacks=spec)
    result = of.run()
    by = {row["attacker"]: row for row in result.summary()["rotation"]["rows"]}
    assert by["A5"]["attack"] == "MI"
    assert by["A5"]["share"]["value"] > result.metrics["attack_success_rate"].value


# --- words


def share(value, half=0.01):
    return {"value": value, "low": max(value - half, 0), "high": value + half, "n": 400}


def rows(**shares):
    values = dict.fromkeys(ATTACKERS, 0.5) | shares
    return with_effects(
        [{"attacker": who, "share": None if v is None else share(v)} for who, v in values.items()]
    )


def test_words_go_by_the_interval_and_by_the_white_box():
    found = {
        row["attacker"]: row["effect"]
        for row in rows(A0=0.2, A1=0.03, A1u=0.22, A2=0.3, A2c=0.42, A3=None, A4=0.225, A5=0.8, A6=0.45)
    }
    assert found == {
        "A0": "not affected", "A1": "stopped", "A1u": "stopped", "A2": "slowed", "A2c": "not affected",
        "A3": "not measured", "A4": "stopped", "A5": "not affected", "A6": "not affected",
    }  # fmt: skip


def test_an_interval_that_decides_nothing_is_unclear_and_not_unaffected():
    few = {"value": 0.07, "low": 0.03, "high": 0.14, "n": 99}
    known = [{"attacker": who, "share": few if who == "A1" else share(0.23)} for who in ATTACKERS]
    found = with_effects(known)
    assert [row["effect"] for row in found if row["attacker"] in ("A0", "A1", "A2")] == [
        "not affected",
        "unclear",
        "not affected",
    ]
    assert "A1 is unclear because there are too few inputs" in protection_verdict(found)


def test_no_protection_is_not_concluded_for_a_robust_set_or_a_wide_interval():
    nothing = [{"attacker": who, "share": share(0.0)} for who in ATTACKERS]
    assert protection_verdict(with_effects(nothing)).startswith(
        "white-box attacks on the serving set break nothing"
    )
    wide = {"value": 0.24, "low": 0.05, "high": 0.5, "n": 9}
    known = [{"attacker": who, "share": wide if who == "A1" else share(0.25)} for who in ATTACKERS]
    assert "no protection" not in protection_verdict(
        with_effects(known)
    ) and "A1 is unclear" in protection_verdict(with_effects(known))


def test_an_attacker_with_a_stolen_set_is_compared_with_the_same_attacks_on_the_serving_set():
    known = [
        {"attacker": who, "share": share({"A0": 0.3, "A1": 0.3, "A5": 0.9}.get(who, 0.2))}
        for who in ATTACKERS
    ]
    assert with_effects(known)[1]["effect"] == "stopped"
    itself = share(0.35)
    assert with_effects(known, itself)[1]["effect"] == "not affected"
    assert protection_verdict(with_effects(known, itself), itself).startswith("no protection: ")


def test_an_attacker_is_not_stopped_if_attacks_without_theft_break_all():
    found = {row["attacker"]: row["effect"] for row in rows(A0=0.8, A1=0.8, A5=0.8)}
    assert found["A0"] == found["A1"] == "not affected"


def test_the_verdict_names_all_attackers():
    said = protection_verdict(rows(A0=0.2, A1=0.03, A2=0.3, A5=0.8))
    assert said == (
        "against the serving set, A1 is stopped; A2 is slowed; A0, A1u, A2c, A3, A4, A5 and A6 are not affected"
    )
    assert protection_verdict(rows(A0=0.2, A1=0.7, A5=0.8)).startswith("no protection: ")
    assert not protection_verdict(rows(A0=0.2, A1=0.03, A5=0.03)).startswith("no protection"), (
        "what is stopped is no theft"
    )


def test_sets_that_were_hardened_carry_no_doubt(collected):
    terms = collected[1]
    robust = replace(terms, candidate=replace(terms.candidate, recipe=SingleStep()))
    row = {"stolen_set": share(0.1), "white_box": share(0.2)}
    known = {"adversarial fine-tuning": row, "static": row}
    assert doubt(known, terms, share(0.3))["state"] == "raised"
    assert "an attacker with one stolen set breaks 30.0 %" in doubt(known, terms, share(0.3))["message"]
    assert doubt(known, robust, share(0.3))["state"] == "clear"
