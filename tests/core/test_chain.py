"""The hash chain: nothing can be changed, dropped, added inside or reordered without being seen."""

import hashlib
import json

import pytest

from holdfast.core.chain import GENESIS, Link, broken_at, canonical, digest


def chain(*contents):
    links, previous = [], GENESIS
    for content in contents:
        links.append(Link(previous, content))
        previous = links[-1].digest
    return links


LINKS = chain({"k": 0}, {"k": 1}, {"k": 2}, {"k": 3})


def test_a_chain_holds_and_so_does_an_empty_one():
    assert broken_at(LINKS) is None
    assert broken_at([]) is None


@pytest.mark.parametrize("place", range(3))
def test_a_changed_record_breaks_the_next(place):
    changed = [*LINKS]
    changed[place] = Link(changed[place].previous, {"k": 99})
    assert broken_at(changed) == place + 1


@pytest.mark.parametrize(
    "tampered, at",
    [
        (LINKS[1:], 0),
        ([LINKS[0], *LINKS[2:]], 1),
        ([LINKS[0], LINKS[2], LINKS[1], LINKS[3]], 1),
        ([LINKS[0], Link(LINKS[0].digest, {"k": 0.5}), *LINKS[1:]], 2),
        ([*LINKS, Link(GENESIS, {"k": 4})], 4),
    ],
)
def test_what_is_missing_swapped_or_slipped_in_is_found(tampered, at):
    assert broken_at(tampered) == at


def test_the_digest_is_sha_256_of_canonical_json():
    link = Link(GENESIS, {"b": 1, "a": [1.5, "é"]})
    text = json.dumps(
        {"content": {"a": [1.5, "é"], "b": 1}, "previous": GENESIS}, sort_keys=True, separators=(",", ":")
    )
    assert link.digest == hashlib.sha256(text.encode()).hexdigest() == digest(text.encode())


def test_equal_content_is_equal_bytes_and_no_number_is_refused():
    assert canonical({"b": 1, "a": 2}) == canonical({"a": 2, "b": 1}) == b'{"a":2,"b":1}'
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            canonical({"x": value})
