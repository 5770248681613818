"""Reads and writes the trigger of a backdoor: an `.npz` file with the arrays `mask` and `pattern`, and optionally
`shift`, `target`, and the valid range of the values, `low` and `high`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from holdfast.core.errors import TargetError
from holdfast.io.data.npz import Npz
from holdfast.io.files import refuse_address, replacing
from holdfast.threats.triggers import Stamped, Trigger, trigger_text

MOST_VALUES = 1 << 20
"""Largest number of values of a pattern, because the trigger is stored with each run: more than an image of 3x512x512
has."""
_MOST_CLASSES = 10**6


def read_trigger(path: str | Path) -> Trigger:
    """Return the trigger in a file. Raises `TargetError` if it contains none."""
    name, archive = repr(str(path)), Npz(Path(path), "trigger file")
    pattern, mask = (_values(archive, array, name) for array in ("pattern", "mask"))
    shape = tuple(pattern.shape)
    if not shape or not 0 < pattern.numel() <= MOST_VALUES:
        raise TargetError(
            f"pattern in {name} has the shape {shape}; the shape of one input was expected, with at most "
            f"{MOST_VALUES:,} values"
        )
    if tuple(mask.shape) not in (shape, (1, *shape[1:])):
        raise TargetError(
            f"mask in {name} has the shape {tuple(mask.shape)}; expected that of pattern, {shape}, or with a first "
            "axis of size 1"
        )
    if mask.min() < 0 or mask.max() > 1:
        raise TargetError(
            f"mask in {name} ranges from {float(mask.min()):.4g} to {float(mask.max()):.4g}; expected shares from 0 to "
            "1"
        )
    shift = _values(archive, "shift", name) if "shift" in archive.names else None
    if shift is not None and tuple(shift.shape) != shape:
        raise TargetError(
            f"shift in {name} has the shape {tuple(shift.shape)}; that of pattern, {shape}, was expected"
        )
    if not mask.any() and (shift is None or not shift.any()):
        raise TargetError(
            f"mask and shift in {name} are 0 everywhere, so that the trigger changes nothing; write a trigger with "
            "values above 0"
        )
    return Trigger(mask, pattern, _target(archive, name), shift, _ends(archive, name))


def write_trigger(path: str | Path, trigger: Trigger) -> None:
    """Write a trigger to a file that `read_trigger` reads. Raises `TargetError` if it cannot be written."""
    arrays = {"mask": trigger.mask, "pattern": trigger.pattern, "shift": trigger.shift}
    present = {
        name: values.detach().cpu().numpy().astype(np.float32)
        for name, values in arrays.items()
        if values is not None
    }
    target: dict[str, Any] = {} if trigger.target is None else {"target": np.int64(trigger.target)}
    if trigger.ends is not None:
        target |= dict(zip(("low", "high"), map(np.float64, trigger.ends), strict=True))
    try:
        with replacing(Path(path)) as file:  # savez would append another suffix to a name
            np.savez(file, allow_pickle=False, **present, **target)
    except OSError as error:
        raise TargetError(f"{path} cannot be written: {error.strerror or error}") from error


def trigger_threat(*, file: str) -> Stamped:
    """Return the constraint that inputs get the trigger of a file. Raises `UsageError` or `TargetError` for a file that
    contains none.
    """
    refuse_address(file, "the trigger is", "trigger:drill.trigger.npz")
    return Stamped(file, trigger_text(read_trigger(file)))


def _values(archive: Npz, array: str, name: str) -> Tensor:
    """Return an array of finite numbers of the archive as 32-bit floats."""
    values = archive.array(array)
    if values.dtype.kind not in "fiub" or not np.isfinite(values).all():
        raise TargetError(
            f"{array} in {name} contains {values.dtype}{' with NaN or infinity' if values.dtype.kind == 'f' else ''}; "
            "finite numbers were expected"
        )
    return torch.from_numpy(values.astype(np.float32))


def _ends(archive: Npz, name: str) -> tuple[float, float] | None:
    """Return the lowest and the highest valid value of the archive; None without them."""
    present = [key for key in ("low", "high") if key in archive.names]
    if not present:
        return None
    if len(present) == 1:
        raise TargetError(
            f"{name} has the array {present[0]}; both low and high, or none of them, were expected"
        )
    values = [_values(archive, key, name) for key in ("low", "high")]
    if any(each.numel() != 1 for each in values) or float(values[0]) >= float(values[1]):
        raise TargetError(f"low and high in {name} are not one number each, the first below the second")
    return float(values[0]), float(values[1])


def _target(archive: Npz, name: str) -> int | None:
    """Return the target class of the archive; None without one."""
    if "target" not in archive.names:
        return None
    target = archive.array("target")
    if target.size != 1 or target.dtype.kind not in "iu" or not 0 <= int(target.reshape(())) < _MOST_CLASSES:
        raise TargetError(
            f"target in {name} is an array {target.dtype} of shape {target.shape}; the number of one class was "
            "expected, 0 or more"
        )
    return int(target.reshape(()))
