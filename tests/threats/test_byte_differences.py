"""Differences of files as edits."""

import pytest

from holdfast.threats.byte_changes import ByteChanges
from holdfast.threats.byte_differences import Edit, applied, edits_of

OLD = b"0123456789"
ALL = ByteChanges(change=4, append=4, insert=4)


@pytest.mark.parametrize(
    "new, edits",
    [
        (OLD, ()),
        (b"0ab34c6789", (Edit(1, b"12", b"ab"), Edit(5, b"5", b"c"))),
        (OLD + b"xy", (Edit(10, b"", b"xy"),)),
        (b"01xy23456789", (Edit(2, b"", b"xy"),)),
        (
            b"a1xy2b456789z",
            (Edit(0, b"0", b"a"), Edit(2, b"", b"xy"), Edit(3, b"3", b"b"), Edit(10, b"", b"z")),
        ),
        (b"xya123456789", (Edit(0, b"", b"xy"), Edit(0, b"0", b"a"))),
        (b"01234", (Edit(5, b"56789", b""),)),
    ],
)
def test_edits_change_a_file_into_the_other_one(new, edits):
    """Also all edits of single bytes, and of a file that no constraint allows because it is shorter."""
    assert edits_of(ALL, new, OLD) == edits
    assert applied(edits, OLD) == new
    assert applied([single for edit in edits for single in edit.singles()], OLD) == new


def test_limits_of_the_constraint_decide_between_appended_and_inserted_bytes():
    assert edits_of(ByteChanges(insert=2), OLD + b"99", OLD) == (Edit(9, b"", b"99"),)
    assert edits_of(ByteChanges(append=2), OLD + b"99", OLD) == (Edit(10, b"", b"99"),)
