"""Keeping a pool turning: what is made ahead, when it swaps, and what serves where nothing can be had."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from holdfast.core.errors import Inconclusive, UsageError
from holdfast.rotation import AnswersPerPrincipal, Elapsed
from holdfast.rotation.steps import rotation_run as watching
from holdfast.rotation.steps.admission_gates import Admission, Judged
from holdfast.rotation.steps.rotation_run import LoopSettings, RotationLoop
from runs import steps
from runs.collected_pool import terms


def rotation_loop(of, *triggers, keep=2, **more):
    return RotationLoop(of, terms(), LoopSettings(triggers, keep, **more))


@pytest.fixture
def generous(replace_step):
    """An admission that takes every candidate."""

    def admit(request, **given):
        of = request.pool
        found = (*of.candidates, *of.unjudged)
        for name in found:
            of.admit(name, against=[one.name for one in of.ledger.exposed()])
        return Admission(tuple(Judged(name, "admitted", (), "") for name in found), ())

    replace_step("admit", admit)


@pytest.fixture
def strict(replace_step):
    """One that takes none."""

    def admit(request, **given):
        of = request.pool
        found = of.candidates
        for name in found:
            of.refuse(name, "it falls")
        judged = tuple(Judged(name, "refused", (), "it falls", by="A1") for name in found)
        return Admission(judged, ())

    replace_step("admit", admit)


@pytest.mark.slow
@pytest.mark.usefixtures("generous")
def test_the_first_admitted_set_serves_before_the_others_are_trained(pool, replace_step):
    one, draw, drawn = rotation_loop(pool, by="retraining"), watching.draw, []

    def recorded(request, **given):
        drawn.append((pool.serving is not None, request.sets))
        return draw(request, **given)

    replace_step("draw", recorded)
    one.fill()
    assert drawn == [(False, 1), (True, 2)]
    assert pool.serving.epoch == 1 and len(pool.ahead) == 2
    before = pool.ledger.entries
    one.fill()
    assert pool.ledger.entries == before, "and does nothing where that is so already"


@pytest.mark.usefixtures("generous")
def test_the_loop_swaps_after_answers_or_an_exposure_and_fills_the_pool(pool):
    one = rotation_loop(pool, AnswersPerPrincipal(50))
    one.fill()
    assert one.check() and pool.serving.epoch == 1
    pool.answered(1, {"alice": 49, "bob": 30})
    assert one.check() and pool.serving.epoch == 1
    pool.answered(1, {"alice": 1})
    assert one.check() and pool.serving.epoch == 2 and len(pool.ahead) == 2
    waited = pool.ahead
    pool.expose(pool.serving.name, "laptop stolen")
    assert one.check() and pool.serving.epoch == 3
    assert pool.ledger.member(pool.serving.name).why == "listed as stolen: laptop stolen"
    assert len(pool.ahead) == 2 and set(waited) & set(pool.ahead) and not pool.unjudged, "judged again"


@pytest.mark.slow
@pytest.mark.usefixtures("generous")
def test_an_exposure_does_not_wait_until_the_pool_is_full_again(pool, replace_step):
    rotation_loop(pool).fill()
    one, draw, admit, served = rotation_loop(pool, keep=4), watching.draw, watching.admit, []

    def drawn(*given, **more):
        found = draw(*given, **more)
        if not served:
            pool.expose(pool.serving.name, "laptop stolen")
        served.append(pool.serving.epoch)
        return found

    def admitted(*given, **more):
        served.append(pool.serving.epoch)
        return admit(*given, **more)

    replace_step("draw", drawn)
    replace_step("admit", admitted)
    assert one.check()
    assert served[:2] == [1, 2], "it swapped before what was drawn was judged"
    assert len(pool.ahead) == 3 and one.check() and len(pool.ahead) == 4


@pytest.mark.slow
@pytest.mark.usefixtures("generous")
def test_time_counts_from_the_date_in_the_ledger(pool, replace_step):
    one = rotation_loop(pool, Elapsed(3600))
    one.fill()
    assert one.check() and pool.serving.epoch == 1

    class Later(datetime):
        hours = 2

        @classmethod
        def now(cls, tz=None):
            later = datetime.now(UTC) + timedelta(hours=cls.hours)
            cls.hours = 0  # the set that is swapped in has not served for two hours
            return later

    replace_step("datetime", Later)
    assert one.check() and pool.serving.epoch == 2


@pytest.fixture
def begun(pool, strict):
    """A loop whose first set serves and whose second waits, before admissions refuse everything, and its messages."""
    for name in ("first", "second"):
        (drawn,) = steps.draw(pool, terms(), 1).names
        pool.admit(drawn, name)
    one, said = rotation_loop(pool, AnswersPerPrincipal(5), keep=1), []
    one.fill()
    one.notify = said.append
    return one, said


@pytest.mark.slow
def test_the_loop_ends_and_the_serving_set_remains_if_no_set_is_admitted(pool, begun):
    one, _ = begun
    pool.answered(1, {"alice": 5})
    with pytest.raises(
        Inconclusive, match="5 sets trained from fresh weights were refused in a row"
    ) as caught:
        one.watch(checks=3, sleep=lambda _: None)
    assert caught.value.exit_code == 4
    now = pool.serving
    assert now.epoch == 2, "the one that waited serves"
    assert f"{now.name} remains the serving set, in epoch 2, and 0 admitted sets are waiting" in str(
        caught.value
    )
    refused = [member for member in pool.ledger.members if member.why == "it falls"]
    assert [bool(member.bases) for member in refused] == [True] + [False] * 5, "the generator's, then others"


@pytest.mark.slow
def test_the_loop_continues_with_pauses_while_sets_wait(pool, begun):
    one, said = begun
    one.settings, waited = replace(one.settings, keep=2), []
    one.watch(checks=1, sleep=waited.append)
    assert pool.serving.epoch == 1 and len(pool.ahead) == 1, "nothing is due, and one set waits"
    assert waited[-1] > 30 and "were refused in a row" in said[-1]


@pytest.mark.slow
def test_an_admitted_set_serves_although_fewer_than_required_were_admitted(pool, replace_step):
    left = iter([True] + [False] * 99)

    def admit(request, **given):
        of = request.pool
        found = [(name, "admitted" if next(left) else "refused") for name in (*of.candidates, *of.unjudged)]
        for name, verdict in found:
            (of.admit if verdict == "admitted" else of.refuse)(name, "it was judged")
        return Admission(tuple(Judged(name, verdict, (), "it was judged") for name, verdict in found), ())

    replace_step("admit", admit)
    with pytest.raises(
        Inconclusive, match="remains the serving set, in epoch 1, and 0 admitted sets are waiting"
    ):
        rotation_loop(pool, keep=2).fill()
    assert pool.serving.epoch == 1


@pytest.mark.slow
@pytest.mark.usefixtures("generous")
def test_only_an_exposure_lets_a_set_serve_that_was_not_judged_against_it(pool):
    one = rotation_loop(pool, AnswersPerPrincipal(5), keep=1)
    one.fill()
    base = next(member.name for member in pool.ledger.members if member.role == "base")
    pool.expose(base, "laptop stolen")
    pool.answered(1, {"alice": 5})
    one.swap_if_due()
    assert pool.serving.epoch == 1 and len(pool.unjudged) == 1, "answers alone wait for the judgement"
    pool.expose(pool.serving.name, "")
    one.swap_if_due()
    assert pool.serving.epoch == 2, "whatever the reason says, and be it nothing"


@pytest.mark.slow
@pytest.mark.usefixtures("generous")
def test_it_waits_where_another_process_draws(pool):
    one, said = rotation_loop(pool, AnswersPerPrincipal(5), keep=1), []
    one.fill()
    one.notify = said.append
    pool.answered(1, {"alice": 5})
    with pool.alone_at("draw"):
        assert not one.check() and pool.serving.epoch == 2, "what waited serves"
    assert "another process runs draw" in said[-1]
    assert one.check() and len(pool.ahead) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("strict")
def test_five_refusals_in_a_row_end_it(pool):
    one = rotation_loop(pool, Elapsed(3600), keep=2, by="generator")
    with pytest.raises(Inconclusive, match="6 sets of the generator were refused in a row.*no set serves"):
        one.fill()
    assert pool.serving is None
    assert sum(member.why == "it falls" for member in pool.ledger.members) == 6


@pytest.mark.slow
@pytest.mark.usefixtures("strict")
def test_sets_are_trained_anew_where_the_generator_draws_nothing_that_is_admitted(pool):
    said = []
    one = RotationLoop(pool, terms(), LoopSettings((Elapsed(3600),), keep=3), notify=said.append)
    with pytest.raises(Inconclusive):
        one.fill()
    drawn = [member for member in pool.ledger.members if member.why == "it falls"]
    assert [bool(member.bases) for member in drawn] == [True] * 4 + [False] * 5
    assert sum("from now on sets are trained from fresh weights" in text for text in said) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("strict")
def test_another_process_remembers_that_the_generator_draws_nothing_that_is_admitted(pool):
    said = []
    with pytest.raises(Inconclusive):
        rotation_loop(pool, Elapsed(3600), keep=5, by="generator").fill()
    one = RotationLoop(pool, terms(), LoopSettings((Elapsed(3600),), keep=5), notify=said.append)
    with pytest.raises(Inconclusive):
        one.fill()
    drawn = [member for member in pool.ledger.members if member.why == "it falls"]
    assert [bool(member.bases) for member in drawn] == [True] * 6 + [False] * 5
    assert (
        said[0]
        == "note: the last 5 generated sets were refused; from now on sets are trained from fresh weights"
    )


@pytest.mark.slow
@pytest.mark.usefixtures("generous")
def test_a_schedule_faster_than_generation_is_refused(pool):
    with pytest.raises(
        UsageError, match="a swap is due every 1e-06 s, but it takes .* to produce an admitted set"
    ):
        replace_every(rotation_loop(pool), Elapsed(1e-6)).fill()


@pytest.mark.slow
@pytest.mark.usefixtures("generous")
def test_swaps_that_are_faster_than_generation_are_reported_and_filling_ends(pool):
    one, said = rotation_loop(pool), []
    one.fill()
    one = replace_every(one, Elapsed(1e-6))
    one.notify = said.append
    one.fill()
    assert pool.serving.epoch > 1
    assert sum("a swap is due every 1e-06 s" in text for text in said) == 1
    before = pool.serving.epoch
    one.watch(checks=2, sleep=lambda _: None)
    assert pool.serving.epoch >= before + 2


@pytest.mark.slow
@pytest.mark.usefixtures("generous")
def test_the_absence_of_a_serving_set_is_reported(pool):
    one, said = rotation_loop(pool), []
    one.fill()
    pool.retire(pool.serving.name, "by hand")
    one.notify = said.append
    assert not one.check() and "no set serves" in said[-1]
    assert pool.serving is None


def replace_every(one, trigger):
    return RotationLoop(one.pool, one.common, replace(one.settings, triggers=(trigger,)))
