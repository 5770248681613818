"""The distance of a changed file from the unchanged one, and the places that rules state."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.core.errors import TargetError
from holdfast.core.threat import ThreatModel
from holdfast.threats.byte_changes import ByteChanges
from holdfast.threats.stored import threat_from_json, threat_to_json


def changes(rule=None, **limits):
    named = {} if rule is None else {"file": "rules.json", "content": json.dumps({"rules": [rule]})}
    return ByteChanges(**limits, **named)


def smallest(constraint, new, old):
    """The distance by its definition: the smallest over all ways to explain the new file."""
    places, found = constraint.places(old), [np.inf]
    for inserted in range(constraint.insert + 1):
        for place in places.insert.tolist() if inserted else [0]:
            appended = len(new) - len(old) - inserted
            end = len(new) - appended
            if appended < 0 or (appended and not places.append):
                continue
            moved = new[:place] + new[place + inserted : end]
            fresh = new[place : place + inserted] + new[end:]
            differ = [k for k in range(len(old)) if moved[k] != old[k]]
            fits = set(differ) <= set(places.change.tolist())
            if fits and {*fresh, *(moved[k] for k in differ)} <= set(places.values.tolist()):
                counts = (
                    (len(differ), constraint.change),
                    (appended, constraint.append),
                    (inserted, constraint.insert),
                )
                found.append(max(n / limit if limit else (np.inf if n else 0) for n, limit in counts))
    return min(found) if min(found) <= 1 else np.inf


FILES = st.lists(st.sampled_from(b"ab"), min_size=1, max_size=6).map(bytes)
RULES = st.one_of(
    st.none(),
    st.fixed_dictionaries(
        {
            "change": st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 6)), max_size=2),
            "insert": st.lists(st.integers(-3, 3), max_size=2),
            "append": st.booleans(),
            "values": st.sampled_from(["", "a"]),
        }
    ),
)


@given(
    old=FILES,
    new=FILES,
    rule=RULES,
    limits=st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(1, 2)),
)
def test_the_distance_is_the_smallest_over_all_explanations_of_a_file(old, new, rule, limits):
    constraint = changes(rule, change=limits[0], append=limits[1], insert=limits[2])
    assert constraint.size(new, old) == (0 if new == old else smallest(constraint, new, old))


def test_rules_state_places_by_offsets_patterns_and_the_beginning_of_files():
    rules = [
        {"starts": "#", "change": "(?m)^#(.*?)$", "insert": "\n", "append": True, "values": "[ -~]"},
        {"change": [[0, 2], [-1, None]]},
    ]
    constraint = ByteChanges(1, 1, 1, "rules.json", json.dumps({"rules": rules}))
    of_text, of_others = constraint.places(b"#ab\nc"), constraint.places(b"01234")
    assert (of_text.change.tolist(), of_text.insert.tolist(), of_text.append) == ([1, 2], [4], True)
    assert of_text.values.tolist() == list(range(32, 127))
    assert (of_others.change.tolist(), of_others.insert.tolist(), of_others.append) == ([0, 1, 4], [], False)
    assert changes({"starts": "x", "append": True}, append=4).size(b"y0", b"y") == np.inf
    assert ByteChanges(4, 8).resized(0.5) == ByteChanges(2, 4)


@pytest.mark.parametrize("limits", [{}, {"change": 1, "file": "rules.json"}])
def test_a_constraint_without_changes_or_with_half_of_its_rules_is_refused(limits):
    with pytest.raises(Exception, match="allows no change|one is missing"):
        ByteChanges(**limits)


@pytest.mark.parametrize("rule", [{"format": "zap"}, {"starts": "("}, {"begins": "PK"}])
def test_damaged_rules_of_a_stored_run_are_refused(rule):
    stored = threat_to_json(ThreatModel(changes({"append": True}, append=1)))
    stored["limits"]["content"] = json.dumps({"rules": [rule]})
    with pytest.raises(TargetError, match="the limits of the threat model are damaged"):
        threat_from_json(stored)
