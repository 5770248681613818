"""Admission: who may serve, on what evidence, and what the ledger keeps of it, whatever is killed on the way."""

import pytest
import torch

from holdfast.core.constraints import Linf
from holdfast.core.errors import UsageError
from holdfast.core.evidence import Evidence
from holdfast.core.threat import ThreatModel
from holdfast.gates.grammar import parse
from holdfast.gates.judging import Doubts
from holdfast.rotation import Live, RotatingModel, canary
from holdfast.rotation.pool import Pool
from holdfast.rotation.steps.admission_gates import Admission, Judged, Measurements, gate_results
from holdfast.rotation.steps.admit import _Admitting, duplicate_gate
from holdfast.rotation.steps.alternatives import ATTACKS, TransferAttacker
from holdfast.rotation.steps.set_measuring import (
    Attacker,
    Attackers,
    SetMeasurements,
    TransferExamples,
    TransferResult,
    attackers_against,
    exposed_for,
    worst,
)
from holdfast.runs.engine.run import Run
from holdfast.runs.store.encryption import KEY_VARIABLE
from runs.rotating import DRAWING, begun, immunised, nearby, state, terms, trained
from runs.steps import admit

QUICK = TransferAttacker({"MI": ATTACKS["MI"]})


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "5a" * 32)


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A pool with an exposed base, and what became of four candidates; their names by what they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_VARIABLE, "5a" * 32)
        pool = begun(tmp_path_factory.mktemp("pool") / "pool")
        stolen = pool.ledger.members[0].name
        pool.expose(stolen, "a laptop was lost")
        good, broken = state(immunised(2)), state(trained(3))
        broken["0.weight"][0, 0, 0, 0] = torch.inf
        names = {
            "good": pool.add(good, DRAWING),
            "copy": pool.add(state(nearby(trained(0), 0.01)), DRAWING),
            "blown up": pool.add({key: 4 * value for key, value in state(trained(3)).items()}, {}),
            "broken": pool.add(broken, DRAWING),
        }
        claims = ["transfer_success <= 0.5 of static", "clean_accuracy >= 0.9"]
        found = admit(pool, terms(), claims=claims, transfer_attacker=QUICK)
    return pool, names, stolen, found


def gates(found, name):
    return {one.name: one for one in next(each for each in found.judged if each.name == name).gates}


@pytest.mark.slow
def test_a_set_that_holds_against_what_leaked_is_admitted_with_its_canary(judged):
    pool, names, stolen, found = judged
    assert found.admitted == (names["good"],) and found.exit_code == 0 and found.kept_out == ""
    member = pool.ledger.member(names["good"])
    assert member.state == "admitted" and "A1 " + stolen in member.why
    x = terms().held_out.x[:256]
    assert member.canary == canary(terms().of_set(pool, names["good"]), x)
    passed = gates(found, names["good"])
    assert {one.verdict for one in passed.values()} == {"pass"}
    assert {
        "tensors",
        "clean accuracy",
        "robust accuracy",
        "theft",
        "theft of static",
        "ensemble theft",
        "churn",
    } <= {*passed}
    assert passed["transfer_success <= 0.5 of static"].estimate == passed["theft"].estimate
    told = next(one for one in found.judged if one.name == names["good"])
    assert told.against == (stolen,) and {"worst_class", "calibration_error", "sibling_transfer"} <= {
        *told.reported
    }


@pytest.mark.slow
def test_an_admitted_set_can_be_served_from_the_pool_alone(judged):
    pool, names, _, _ = judged
    member, inputs = pool.ledger.member(names["good"]), pool.kept("canaries").columns["x"]

    def current():
        return Live(member.name, 1, pool.weights(member.name), member.canary)

    served = RotatingModel(terms().model, current, inputs)
    assert served.answer(inputs[:2], principal="alice").shape[0] == 2 and len(inputs) > 2


@pytest.mark.slow
def test_a_copy_of_a_stolen_set_is_refused_by_attacks_on_the_stolen_set(judged):
    pool, names, stolen, found = judged
    refused = gates(found, names["copy"])
    assert refused["theft"].verdict == "fail" and refused["theft of static"].verdict == "fail"
    assert refused["clean accuracy"].verdict == "pass"
    why = pool.ledger.member(names["copy"]).why
    assert why.startswith(f"theft: examples of A1 {stolen} by MI break ") and "1.2 times the" in why


@pytest.mark.slow
def test_sets_whose_numbers_are_not_like_others_are_refused_by_name(judged):
    pool, names, _, found = judged
    assert "0.weight contains values that are not finite" in pool.ledger.member(names["broken"]).why
    assert [*gates(found, names["broken"])] == ["tensors"]
    assert "standard deviations; all values finite" in pool.ledger.member(names["blown up"]).why


@pytest.mark.slow
def test_each_gate_follows_from_runs_with_columns_for_each_example(judged):
    pool, names, _, _ = judged
    runs = {path.name.rsplit("-", 1)[0]: path for path in (pool.path / "admission" / names["good"]).iterdir()}
    assert {"a0-a1-0-1000", "a3-0-200", "white-box-0-1000"} <= {*runs}
    stages = {path.name for path in runs["a0-a1-0-1000"].iterdir()}
    assert any(name.startswith("2-a1-") for name in stages)


@pytest.mark.slow
def test_five_refusals_in_a_row_end_the_call(tmp_path):
    pool = begun(tmp_path / "pool")
    for k in range(6):
        broken = state(trained(3))
        broken["0.bias"][k] = torch.inf
        pool.add(broken, {})
    heard = []
    found = admit(pool, terms(), transfer_attacker=QUICK, notify=heard.append)
    assert found.exit_code == 4 and len(found.judged) == 5 and len(found.left) == 1 == len(heard) - 5
    assert (
        "none of 5 candidates was admitted (5 by tensors). 5 in a row were refused, and 1 are not judged yet"
        in found.kept_out
    )
    assert "--immunise" in found.kept_out and pool.serving is None


def test_a_call_without_candidates_or_with_a_claim_beyond_it_is_refused(tmp_path):
    pool = begun(tmp_path / "pool", bases=(0,))
    with pytest.raises(UsageError, match="holdfast rotate draw"):
        admit(pool, terms(), transfer_attacker=QUICK)
    with pytest.raises(UsageError, match="an admission can test transfer_success"):
        admit(pool, terms(), claims=["f1 >= 0.5"], transfer_attacker=QUICK)


@pytest.mark.slow
def test_a_second_process_is_refused_before_it_measures(tmp_path):
    pool = begun(tmp_path / "pool", bases=(0,))
    pool.add(state(trained(6)), {})
    with pool.alone_at("admit"), pytest.raises(UsageError, match="another process runs admit in .*; wait"):
        admit(Pool.open(pool.path), terms(), transfer_attacker=QUICK)
    assert not (pool.path / "admission").exists()


@pytest.mark.slow
def test_a_kill_before_the_entry_loses_nothing_and_bases_are_listed(tmp_path, monkeypatch):
    pool = begun(tmp_path / "pool")
    base = pool.ledger.members[0].name
    name = pool.add(state(immunised(2)), {}, bases=[base])
    assert exposed_for(pool, name) == (base,)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Pool, "admit", killed)
        with pytest.raises(KeyboardInterrupt):
            admit(pool, terms(), transfer_attacker=QUICK)
    assert pool.ledger.states[name] == "candidate"
    again = Pool.open(pool.path)
    with monkeypatch.context() as patch:
        patch.setattr(TransferAttacker, "crafted", killed)  # what was measured is not made anew
        found = admit(again, terms(), transfer_attacker=QUICK)
    assert found.admitted == (name,) and found.judged[0].against == (base,)
    (listed,) = [one for one in again.ledger.exposed() if one.name == base]
    assert listed.automatic and again.ledger.member(name).against == (base,) and not again.unjudged
    again.expose(base, "laptop stolen")
    assert again.unjudged == (name,), "what is stolen after it was listed calls for a new judgement"


@pytest.mark.slow
def test_unclear_gates_are_judged_on_twice_as_many_examples_while_there_are_more(tmp_path):
    pool = begun(tmp_path / "pool", bases=(0,))
    name = pool.add(state(trained(6)), {})
    found = admit(pool, terms(1_000), claims=["churn <= 0.02"], transfer_attacker=QUICK, n_judged=250)
    runs = {path.name.rsplit("-", 1)[0] for path in (pool.path / "admission" / name).iterdir()}
    assert {"a0-0-250", "a0-250-500"} <= runs
    theft = gates(found, name)["theft"]
    assert theft.verdict == "pass" and "no set is listed as stolen" in theft.why
    assert found.exit_code == 4 and gates(found, name)["clean accuracy"].estimate.n > 250


# --- what leaks while sets wait


@pytest.fixture
def judge(monkeypatch):
    """A function that replaces the judgement of a candidate, which takes seconds; it admits what is no copy."""

    def set_judge(judged):
        monkeypatch.setattr(_Admitting, "_judged", judged)

    set_judge(admit_unless_equal)
    return set_judge


@pytest.fixture
def waits(tmp_path, judge):
    """A pool with a base, a copy of it and another set, both admitted."""
    pool = begun(tmp_path / "pool", bases=(0,))
    names = {
        "copy": pool.add(state(nearby(trained(0), 1e-9)), {}),
        "other": pool.add(state(trained(6)), {}),
    }
    for name in names.values():
        pool.admit(name, "at first")
    return pool, pool.ledger.members[0].name, names


def admit_unless_equal(admitting, name):
    exposed = tuple(exposed_for(admitting.pool, name))
    weights = {exposed_name: admitting.weights(exposed_name) for exposed_name in exposed}
    same = duplicate_gate(admitting.weights(name), weights, [*admitting.weights(name)])
    return Judged(
        name, "refused" if same else "admitted", (), same.description if same else "holds", "", exposed
    )


def test_waiting_sets_are_judged_again_after_an_exposure(waits):
    pool, base, names = waits
    with pytest.raises(UsageError, match="contains no candidate"):
        admit(pool, terms(), transfer_attacker=QUICK)
    pool.expose(base, "laptop stolen")
    assert set(pool.unjudged) == set(pool.ahead) == set(names.values())
    found = admit(pool, terms(), transfer_attacker=QUICK)
    assert found.admitted == (names["other"],) == pool.ahead and pool.unjudged == ()
    member = pool.ledger.member(names["copy"])
    assert member.state == "refused" and "it equals the stolen set" in member.why
    assert Pool.open(pool.path).ledger.member(names["other"]).why == "holds"


def test_a_set_that_is_exposed_during_a_judgement_counts_before_the_admission(waits, judge):
    pool, base, names = waits
    pool.ledger.retire(names["copy"])
    pool.expose(names["copy"], "laptop stolen")
    heard = []

    def judged(self, name):
        found = admit_unless_equal(self, name)
        if len(heard) == 1:  # only the expected time so far
            pool.expose(base, "another one")
        return found

    judge(judged)
    found = admit(pool, terms(), transfer_attacker=QUICK, notify=heard.append)
    assert "another set was listed as stolen in the meantime, so this one is judged again" in heard[1]
    assert found.judged[0].against == (names["copy"], base) and pool.unjudged == ()


def test_a_set_that_serves_meanwhile_keeps_serving_and_its_verdict_is_reported(waits, judge):
    pool, base, names = waits
    pool.ledger.retire(names["other"])
    pool.expose(base, "laptop stolen")
    heard = []

    def judged(self, name):
        pool.swap(unjudged=True)
        return admit_unless_equal(self, name)

    judge(judged)
    assert admit(pool, terms(), transfer_attacker=QUICK, notify=heard.append).judged == ()
    assert pool.serving.name == names["copy"]
    assert f"note: {names['copy']} is serving already, so the verdict refused is not recorded: " in heard[1]


# --- gates on columns that are made up

N = 400
OLD, NEW, OWN, DRAWN = (
    Attacker("A1", ("old",)),
    Attacker("A1", ("new",)),
    Attacker("A0", ("own 4",)),
    Attacker("A3", ("x",)),
)


def columns(correct=N, fell=0):
    """Evidence in which the first `correct` are right and the first `fell` fall."""
    rows = torch.arange(N)
    right = rows < correct
    found = {
        "id": rows,
        "y": rows % 4,
        "prediction": torch.where(right, rows % 4, (rows + 1) % 4),
        "correct": right,
        "confidence": torch.full((N,), 0.9),
        "success": rows < fell,
    }
    return Evidence(found, ThreatModel(Linf(0.1)), "", (), 0)


def seen(
    theft=8,
    nothing=40,
    same_draw=20,
    white=100,
    before=100,
    bases=100,
    changed=0,
    lost=0,
    *,
    serves=True,
    looks=1,
):
    fell = {(OWN, "MI"): torch.arange(N) < nothing, (OLD, "MI"): torch.arange(N) < theft}
    return Measurements(
        Attackers(OWN, (OLD,), None, None, DRAWN),
        TransferResult(columns(correct=N - changed), fell),
        columns(fell=white),
        TransferResult(columns(), {(DRAWN, "MI"): torch.arange(N) < same_draw}),
        (columns(correct=N - lost),),
        (columns(fell=before),),
        (columns(), columns(correct=N - 4)),
        (columns(fell=bases),),
        serves,
        dict.fromkeys(("transfer", "white-box", "same draw"), looks),
    )


def test_churn_counts_once_clients_of_a_set_would_see_it():
    assert verdicts(seen(changed=N // 10))["churn"] == "fail"
    assert verdicts(seen(changed=N // 10, serves=False))["churn"] == "pass"
    assert verdicts(seen(changed=N // 200))["churn"] == "pass"


def verdicts(found, accepted=None, claims=()):
    given = gate_results(found, Doubts((), accepted or {}), tuple(map(parse, claims)))
    return {one.name: one.verdict for one in given}


def test_the_remedy_names_the_gate_that_refused_sets():
    lost, stolen = (Judged("one", "refused", (), "", gate) for gate in ("clean accuracy", "theft of static"))
    assert "reduce the loss" in Admission((lost, lost), ()).kept_out
    assert "--by retraining" in Admission((lost, stolen), ()).kept_out


def test_the_accuracy_loss_of_swaps_does_not_accumulate():
    """A set as good as an incumbent that is worse than the bases were would pass, were it compared with that alone."""
    assert verdicts(seen())["clean accuracy"] == verdicts(seen())["robust accuracy"] == "pass"
    assert verdicts(seen(changed=24, lost=24))["clean accuracy"] == "fail"
    assert verdicts(seen(white=140, before=140, bases=100))["robust accuracy"] == "fail"
    assert verdicts(seen(white=140, before=100, bases=140))["robust accuracy"] == "fail"
    assert verdicts(seen(lost=24))["clean accuracy"] == "pass"
    claim = "clean_accuracy_drop <= 0.02 vs baseline"
    assert verdicts(seen(changed=24, lost=24), claims=[claim])[claim] == "fail"


@pytest.mark.slow
def test_bases_are_measured_once_for_all_admissions(tmp_path):
    pool = begun(tmp_path / "pool", bases=(0,))
    base = pool.ledger.members[0].name
    first = pool.add(state(trained(6)), {})
    pool.admit(first)
    pool.swap()

    def measured(share):
        pool.add(state(nearby(trained(6), share)), {})
        admit(pool, terms(64), transfer_attacker=QUICK, n_judged=64)
        found = (pool.path / "admission" / base).iterdir()
        return {path.name: (path / "run.json").stat().st_mtime_ns for path in found}

    once = measured(0.01)
    assert {name.rsplit("-", 1)[0] for name in once} >= {"clean-0-64", "white-box-0-32"}
    assert measured(0.02).items() >= once.items()


@pytest.mark.parametrize(
    "theft, nothing, says",
    [
        (8, 40, "pass"),
        (8, 0, "pass"),
        (40, 40, "pass"),
        (52, 40, "unclear"),
        (160, 40, "fail"),
        (40, 0, "fail"),
    ],
)
def test_a_theft_may_bring_little_or_hardly_more_than_no_theft(theft, nothing, says):
    assert verdicts(seen(theft, nothing))["theft"] == says


def test_a_theft_may_bring_half_of_what_the_incumbent_loses():
    assert verdicts(seen(theft=8, before=100))["theft of static"] == "pass"
    assert verdicts(seen(theft=50, before=100))["theft of static"] == "unclear"
    assert verdicts(seen(theft=2, before=0))["theft of static"] == "pass"  # there is nothing to halve


@pytest.mark.parametrize(
    "theft, nothing, says",
    [
        (60, 60, "pass"),  # half of 100 is less, and who stole nothing has as much
        (60, 40, "unclear"),
        (90, 0, "fail"),
        (96, 96, "unclear"),  # it brings nothing, and may bring what the sets themselves would
        (120, 120, "fail"),  # rotation does nothing, whether anything was stolen or not
    ],
)
def test_a_theft_may_add_little_where_half_is_broken_without_it(theft, nothing, says):
    assert verdicts(seen(theft, nothing, before=100))["theft of static"] == says


def test_a_set_that_sets_of_its_draw_break_and_stolen_sets_do_not_raises_a_doubt_until_it_is_accepted():
    odd = seen(theft=8, same_draw=100, white=108, before=90)
    assert verdicts(odd)["odd-gradients"] == "unclear"
    assert verdicts(odd, {"odd-gradients": "it was aligned on purpose"})["odd-gradients"] == "pass"
    assert verdicts(seen(theft=8, same_draw=100, white=90, before=90))["odd-gradients"] == "pass"


def test_of_several_looks_each_needs_more_so_that_all_of_them_hold_together():
    claims = ["transfer_success <= 0.08", "sibling_transfer <= 0.08", "robust_accuracy >= 0.7"]
    close = {"theft": 21, "nothing": 0, "same_draw": 21, "white": 100}
    once, often = (verdicts(seen(**close, looks=looks), claims=claims) for looks in (1, 3))
    assert [once[claim] for claim in claims] == ["pass"] * 3
    assert [often[claim] for claim in claims] == ["unclear"] * 3
    assert verdicts(seen(theft=11, nothing=0))["theft"] == "pass"
    assert verdicts(seen(theft=11, nothing=0, looks=3))["theft"] == "unclear"
    assert seen(looks=3).confidence("transfer") == pytest.approx(1 - 0.05 / 3)


def test_the_number_of_examples_decides_the_number_of_looks(tmp_path):
    pool = begun(tmp_path / "pool", bases=(0,))
    measuring = SetMeasurements(pool, TransferExamples(pool, terms(1_000), QUICK))
    one = _Admitting(measuring, Run(()), (), {}, 250, print)
    assert one._looks == {"transfer": 3, "white-box": 4, "same draw": 7}, (
        "250, 500, 1,000; from 125 on; from 25 on"
    )


def test_claims_are_judged_beside_the_gates_and_of_static_by_what_the_incumbent_loses():
    claims = ["transfer_success <= 0.2 of static", "sibling_transfer <= 0.1 of static", "churn <= 0.05"]
    found = verdicts(seen(theft=2, same_draw=60, before=100), claims=claims)
    assert [found[claim] for claim in claims] == ["pass", "fail", "pass"]
    assert verdicts(seen(), claims=["robust_accuracy >= 0.9"])["robust_accuracy >= 0.9"] == "fail"


def test_the_worst_theft_is_named_and_its_interval_holds_for_the_largest():
    fell = {
        (OLD, "MI"): torch.arange(N) < 10,
        (NEW, "MI"): torch.arange(N) < 60,
        (NEW, "SWAG"): torch.arange(N) < 50,
    }
    found = worst(TransferResult(columns(), fell), [OLD, NEW])
    assert found.by == "A1 new by MI" and found.estimate.value == 0.15
    assert found.estimate.low < 0.1174 and found.estimate.high == pytest.approx(0.1888, abs=0.001)
    assert worst(TransferResult(columns(), fell), []) is None


def test_a_theft_of_several_holds_as_many_as_leaked_last_and_is_compared_with_as_many(monkeypatch):
    class Shop:
        own = (1, 2, 3, 4)

        def surrogate_only(self, size=None):
            return Attacker("A0", (f"own {size or 4}",))

    of = attackers_against(Shop(), "me", ["a", "b", "c", "d", "e"], ["s", "t"])
    assert of.several.sources == ("b", "c", "d", "e") and of.evenly == of.nothing and len(of.one) == 5
    assert attackers_against(Shop(), "me", ["a", "b"], []).evenly.sources == ("own 2",)
    assert attackers_against(Shop(), "me", ["a"], []).several is None
