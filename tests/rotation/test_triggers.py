"""When a swap is due, by a clock that the test holds; and schedules that no generation keeps up with."""

import re

import pytest

from holdfast.core.errors import UsageError
from holdfast.rotation.rotating_model import (
    AnswersPerPrincipal,
    Counters,
    Elapsed,
    Watch,
    alarmed,
    due_triggers,
    exposed,
    refuse_faster,
)

ALL = (AnswersPerPrincipal(50), Elapsed(86400), alarmed, exposed)


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize(
    "trigger, before, after, why",
    [
        (AnswersPerPrincipal(50), Counters(answers=49), Counters(answers=50), "50 answers .*, of at most 50"),
        (Elapsed(60), Counters(served_s=59.9), Counters(served_s=60.0), "served for 60 s, of at most 60"),
        (alarmed, Counters(exposure="laptop stolen"), Counters(alarm="near duplicates"), "near duplicates"),
        (exposed, Counters(alarm="near duplicates"), Counters(exposure="laptop stolen"), "laptop stolen"),
    ],
)
def test_a_trigger_gives_its_reason_from_its_limit_on(trigger, before, after, why):
    assert trigger(before) == ""
    assert re.search(why, trigger(after))


def test_all_reasons_are_given_in_the_order_of_the_triggers():
    assert due_triggers(ALL, Counters()) == ()
    told = due_triggers(ALL, Counters(70, 90_000.0, "near duplicates", "laptop stolen"))
    assert [why.split()[0] for why in told] == ["one", "the", "alarm:", "listed"]
    assert due_triggers((), Counters(70, 90_000.0, "near duplicates", "laptop stolen")) == ()


def test_a_watch_counts_from_the_swap_and_forgets_what_was_raised_before_it():
    clock = Clock()
    watch = Watch(ALL, clock)
    assert watch.due(49) == ()
    clock.now += 86_400
    watch.alarm("near duplicates")
    watch.expose("laptop stolen")
    assert len(watch.due(50)) == 4
    watch.swapped()
    assert watch.due(0) == ()
    clock.now += 86_399
    assert watch.due(0) == ()
    clock.now += 1
    assert watch.due(0) == ("the set has served for 86400 s, of at most 86400",)


def test_a_watch_resumes_after_a_restart():
    clock = Clock()
    watch = Watch([Elapsed(60)], clock, served_s=50.0)
    assert not watch.due(0)
    clock.now += 10
    assert watch.due(0)


def test_a_schedule_faster_than_generation_is_refused_with_numbers():
    with pytest.raises(
        UsageError, match=r"every 60 s, .* takes 86.4 s to produce .* every 87s or less often"
    ):
        refuse_faster((*ALL[:1], Elapsed(60)), 86.4)
    with pytest.raises(
        UsageError,
        match=r"after 50 answers .* at 2 answers a second is every 25 s, .* takes 40.5 s .* after 81q/principal or",
    ):
        refuse_faster(ALL, 40.5, answers_per_s=2.0)


def test_a_schedule_that_generation_keeps_up_with_is_let_pass():
    refuse_faster(ALL, 86_400.0)  # without a rate limit, answers have no pace
    refuse_faster(ALL, 25.0, answers_per_s=2.0)
    refuse_faster((alarmed, exposed), 1e9, answers_per_s=1e9)
    refuse_faster((), 1e9)
