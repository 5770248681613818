"""Broken examples for reports: images as small pictures, clips as spectrograms and sounds, texts with their changed
words, files as lists of their changed bytes, and rows of tables as lists of the features with the largest changes.
"""

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, adaptive_max_pool2d

from holdfast.core.evidence import Evidence
from holdfast.reports.curves import class_name, robust_examples
from holdfast.reports.words import strict
from holdfast.threats.domains import BYTES, IMAGE, SIGNAL, TEXT, domain_of

if TYPE_CHECKING:
    from holdfast.threats.table_rules import Rules

Json = dict[str, Any]

MOST_EXAMPLES = 12
"""Largest number of examples. With three pictures for each example, the page is smaller than 2 MB."""
LONGEST_SIDE = 96
"""Longest side of a picture in pixels. 36 pictures of noise, the worst case for PNG, have 1.3 MB at this size."""
MOST_FEATURES = 5
"""Largest number of changed features that are listed for a row of a table."""
MOST_EDITS, MOST_BYTES = 32, 256
"""Largest number of edits of a file that are listed, and of bytes that are written for each."""
_CONTEXT = 4
"""Number of unchanged bytes that are shown before and after an edit."""

_DISTANCES = ("distance_linf", "distance_l2", "distance_l1", "distance_l0")


def example_images(
    evidence: Evidence, classes: Sequence[str], attacks: Sequence[str], side: int = LONGEST_SIDE
) -> list[Json]:
    """Return the broken examples that the report shows, each with its clean input, its adversarial input and its
    predictions, as JSON. `side` is the longest side of pictures.
    """
    if "id" not in evidence.gallery:
        return []
    low, high = range_of_inputs(evidence.model)
    entries = []
    for place, example_id in enumerate(evidence.gallery["id"][:MOST_EXAMPLES]):
        rows = (evidence["id"] == example_id).nonzero()[:, 0].tolist()
        if not rows:
            continue
        x, x_adv = evidence.gallery["x"][place].float(), evidence.gallery["x_adv"][place].float()
        entry = _facts(evidence, rows[0], classes, attacks)
        domain = domain_of(evidence.threat.constraint, x.shape)
        if domain is TEXT:
            entry |= _texts(x, x_adv)
        elif domain is BYTES:
            entry |= _files(x, x_adv, evidence)
        elif domain is IMAGE:
            entry |= _pictures(x, x_adv, low, high, side)
        elif domain is SIGNAL:
            from holdfast.reports.sounds import signal_example  # late: few inputs are clips

            entry |= signal_example(x, x_adv, evidence.data.get("sampling_rate"))
        else:
            entry |= _changes(x, x_adv, evidence)
        entries.append(entry)
    return entries


def _facts(evidence: Evidence, row: int, classes: Sequence[str], attacks: Sequence[str]) -> Json:
    def label(column: str) -> str | None:
        if column not in evidence:
            return None
        value = int(evidence[column][row])
        return class_name(value, tuple(classes)) if value >= 0 else None

    broken_by = int(evidence["broken_by"][row]) if "broken_by" in evidence else -1
    distances = {
        name.removeprefix("distance_"): strict(float(evidence[name][row]))
        for name in _DISTANCES
        if name in evidence
    }
    return {
        "id": int(evidence["id"][row]),
        "label": label("y"),
        "clean_prediction": label("prediction"),
        "adversarial_prediction": label("adversarial_prediction"),
        "robust": bool(robust_examples(evidence)[row]),
        "broken_by": attacks[broken_by] if 0 <= broken_by < len(attacks) else None,
        "distances": distances,
    }


def range_of_inputs(model: Mapping[str, Any]) -> tuple[float, float]:
    """Return the range of the inputs, if the model gives it as two numbers, else 0 to 1."""
    bounds = model.get("bounds")
    if (
        isinstance(bounds, Sequence)
        and len(bounds) == 2
        and all(isinstance(side, int | float) for side in bounds)
    ):
        return float(bounds[0]), float(bounds[1])
    return 0.0, 1.0


def _pictures(x: Tensor, x_adv: Tensor, low: float, high: float, side: int) -> Json:
    """Clean input, changed input and difference as PNG; the difference is amplified, and grey where it is zero."""
    delta = x_adv - x
    largest = float(delta.abs().max())
    # no division by 0 if the bounds of the model are equal
    width = high - low or 1.0
    amplified = width / (2 * largest) if largest > 0 and math.isfinite(largest) else 1.0
    difference = _shrunk_signed(delta, side) * amplified / width + 0.5
    return {
        "kind": "image",
        "clean": png((shrunk(x, side) - low) / width),
        "perturbed": png((shrunk(x_adv, side) - low) / width),
        "difference": png(difference),
        "amplified": round(2 * amplified, 2),
        "shape": list(x.shape),
    }


def _target(x: Tensor, side: int) -> tuple[int, int] | None:
    height, width = x.shape[1:]
    scale = side / max(height, width)
    return None if scale >= 1 else (max(1, round(height * scale)), max(1, round(width * scale)))


def shrunk(x: Tensor, side: int = LONGEST_SIDE) -> Tensor:
    """Return an image (channels, height, width) whose longest side is at most `side`."""
    target_size = _target(x, side)
    return x if target_size is None else adaptive_avg_pool2d(x[None], target_size)[0]


def _shrunk_signed(delta: Tensor, side: int) -> Tensor:
    """Downsample by the largest change in each cell, with its sign, since averages would remove fine patterns."""
    target_size = _target(delta, side)
    if target_size is None:
        return delta
    most, least = (
        adaptive_max_pool2d(delta[None], target_size)[0],
        -adaptive_max_pool2d(-delta[None], target_size)[0],
    )
    return torch.where(most.abs() >= least.abs(), most, least)


def png(pixels: Tensor) -> str:
    """Return a picture of values (channels, height, width) from 0 to 1 as the data URL of a PNG."""
    from PIL import Image

    levels = (pixels.nan_to_num(0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    array = levels[0].numpy() if len(levels) == 1 else levels[:3].permute(1, 2, 0).contiguous().numpy()
    file = io.BytesIO()
    Image.fromarray(array).save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _texts(x: Tensor, x_adv: Tensor) -> Json:
    """Both texts, and the parts of the changed text, with the word of the clean text for each changed word."""
    from holdfast.core.batch import decoded  # late: few inputs are texts

    clean, perturbed = decoded(torch.stack((x, x_adv)))
    before, after = (re.findall(r"\s+|\S+", text) for text in (clean, perturbed))
    parts: list[Json] = []
    for old, new in zip_longest(before, after, fillvalue=""):
        if old == new and parts and parts[-1]["clean"] is None:
            parts[-1]["text"] += new
        else:
            parts.append({"text": new.replace("\u200b", "[U+200B]"), "clean": None if old == new else old})
    changed = sum(part["clean"] is not None and not part["text"].isspace() for part in parts)
    return {
        "kind": "text",
        "distances": {},
        "changed": changed,
        "clean": clean,
        "perturbed": perturbed,
        "parts": parts,
    }


def _files(x: Tensor, x_adv: Tensor, evidence: Evidence) -> Json:
    """The edits of a file in the order of their offsets, each with the unchanged bytes around it."""
    from holdfast.core.batch import decoded_files  # late: few inputs are files
    from holdfast.threats.byte_changes import ByteChanges
    from holdfast.threats.byte_differences import edits_of

    changes = evidence.threat.constraint
    assert isinstance(changes, ByteChanges)
    clean, perturbed = decoded_files(torch.stack((x, x_adv)))
    edits = edits_of(changes, perturbed, clean)
    return {
        "kind": "bytes",
        "distances": {},
        "length": len(clean),
        "changed": sum(len(edit.after) for edit in edits if edit.before),
        "inserted": sum(len(edit.after) for edit in edits if not edit.before and edit.offset < len(clean)),
        "appended": sum(len(edit.after) for edit in edits if not edit.before and edit.offset == len(clean)),
        "edits": [
            {
                "offset": edit.offset,
                "clean": edit.before[:MOST_BYTES].hex(),
                "perturbed": edit.after[:MOST_BYTES].hex(),
                "preceding": clean[max(0, edit.offset - _CONTEXT) : edit.offset].hex(),
                "following": clean[edit.offset + len(edit.before) :][:_CONTEXT].hex(),
            }
            for edit in edits[:MOST_EDITS]
        ],
        "left_out": max(0, len(edits) - MOST_EDITS),
    }


def _changes(x: Tensor, x_adv: Tensor, evidence: Evidence) -> Json:
    """The features with the largest changes, in decreasing order; under rules of a table, relative to their units."""
    clean, perturbed = x.flatten(), x_adv.flatten()
    moved = (perturbed - clean).abs().nan_to_num(0.0)
    names, constraint = evidence.data.get("features"), evidence.threat.constraint
    rules: Rules | None = getattr(constraint, "rules", None)
    if rules is not None:
        moved = moved / torch.tensor([rules.unit(name) for name in rules.names])

    def shown(value: Tensor, at: int) -> Any:
        values = () if rules is None else rules.columns[rules.names[at]].values
        return values[int(value)] if values and not value.isnan() else strict(float(value))

    has_names = isinstance(names, Sequence) and not isinstance(names, str) and len(names) == len(clean)
    changes = [
        {
            "feature": str(names[at]) if has_names and names is not None else f"feature {at}",
            "clean": shown(clean[at], at),
            "perturbed": shown(perturbed[at], at),
        }
        for at in moved.argsort(descending=True, stable=True)[:MOST_FEATURES].tolist()
        if moved[at] > 0
    ]
    return {"kind": "table", "changed": int((moved > 0).sum()), "features": len(clean), "changes": changes}
