"""Files with the trigger of a backdoor."""

import numpy as np
import pytest
import torch

from holdfast.core.errors import TargetError, UsageError
from holdfast.io.data.npz import read_trigger, trigger_threat, write_trigger
from holdfast.threats.triggers import Trigger

MASK, PATTERN = np.eye(4)[None], np.ones((3, 4, 4))


@pytest.mark.parametrize("target", [None, 0, 7])
@pytest.mark.parametrize("shift", [None, torch.rand(3, 4, 4)])
def test_a_trigger_is_read_as_it_was_written(tmp_path, target, shift):
    trigger = Trigger(torch.rand(1, 4, 4), torch.rand(3, 4, 4), target, shift)
    write_trigger(tmp_path / "drill.trigger", trigger)
    again = read_trigger(tmp_path / "drill.trigger")
    assert torch.equal(again.mask, trigger.mask) and torch.equal(again.pattern, trigger.pattern)
    assert again.target == target
    assert (shift is None and again.shift is None) or torch.equal(again.shift, shift)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pattern": PATTERN}, "has no array 'mask'; it has pattern"),
        ({"mask": MASK, "x_train": PATTERN}, "has no array 'pattern'"),
        (
            {"mask": MASK, "pattern": PATTERN > 2, "shift": PATTERN[:1]},
            r"shift in .* \(1, 4, 4\); that of pattern",
        ),
        (
            {"mask": MASK[0], "pattern": PATTERN},
            r"mask in .* \(4, 4\); expected that of pattern, \(3, 4, 4\)",
        ),
        ({"mask": 2 * MASK, "pattern": PATTERN}, "ranges from 0 to 2; expected shares from 0 to 1"),
        ({"mask": 0 * MASK, "pattern": PATTERN}, "0 everywhere, so that the trigger changes nothing"),
        ({"mask": MASK, "pattern": PATTERN * np.nan}, "float64 with NaN or infinity; finite numbers"),
        ({"mask": MASK, "pattern": np.full((3, 4, 4), "a")}, "contains <U1; finite numbers"),
        ({"mask": np.ones(()), "pattern": np.ones(())}, r"pattern in .* \(\); the shape of one input"),
        ({"mask": MASK, "pattern": PATTERN, "target": -1}, "the number of one class was expected"),
        ({"mask": MASK, "pattern": PATTERN, "target": [1, 2]}, "the number of one class was expected"),
        ({"mask": MASK, "pattern": PATTERN, "target": 1.5}, "the number of one class was expected"),
    ],
)
def test_a_file_without_a_trigger_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "t.npz", **arrays)
    with pytest.raises(TargetError, match=message):
        read_trigger(tmp_path / "t.npz")


def test_a_missing_damaged_or_huge_file_is_refused(tmp_path):
    with pytest.raises(TargetError, match="trigger file .* does not exist"):
        read_trigger(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("mask")
    with pytest.raises(TargetError, match="is not an .npz archive"):
        read_trigger(tmp_path / "text.npz")
    np.savez(tmp_path / "huge.npz", mask=np.ones((1, 1200, 1200)), pattern=np.ones((1, 1200, 1200)))
    with pytest.raises(TargetError, match="at most 1,048,576 values"):
        read_trigger(tmp_path / "huge.npz")
    with pytest.raises(UsageError, match="an address; download the file"):
        trigger_threat(file="https://example.org/t.npz")
