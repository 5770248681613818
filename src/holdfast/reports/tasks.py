"""What models with another task than classes returned, for reports: masks and boxes of examples before and after an
attack, and the score of each class before and after it.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise, zip_longest
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d, interpolate

from holdfast.core.evidence import Evidence
from holdfast.core.tasks import CLEAN, MEASURED
from holdfast.reports import tree
from holdfast.reports.curves import bar, class_name, estimate_to_json
from holdfast.reports.gallery import LONGEST_SIDE, example_images, png, range_of_inputs, shrunk
from holdfast.reports.words import amount, count_text, interval, percent, plain
from holdfast.statistics.intervals import CONFIDENCE, bonferroni, ratios
from holdfast.tasks.box_matching import CONFIDENT, classes_of, match, overlaps
from holdfast.tasks.segmentation import image_ious

Json = dict[str, Any]

MOST_NUMBERS = 5
"""Largest number of outputs of a regression, or of labels, that are written for an example."""
MOST_OBJECTS = 100
"""Largest number of objects, and of false boxes, of an example."""
MOST_ROWS = 1000
"""Largest number of classes in a table; those of the lowest score after the attacks are listed."""
_FIRST, _OTHERS = (
    "#bdbdbd",
    ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442", "#d55e00", "#0072b2", "#5a3d2b"),
)
"""Colours of class 0, which is often the background, and of the following ones (Okabe & Ito, "Color Universal Design",
2008), which are repeated in a light and a dark shade."""
_COLOURS = (
    *_OTHERS,
    *("#" + "".join(f"{(int(c[k : k + 2], 16) + 255) // 2:02x}" for k in (1, 3, 5)) for c in _OTHERS),
    *("#" + "".join(f"{int(c[k : k + 2], 16) // 2:02x}" for k in (1, 3, 5)) for c in _OTHERS),
)
_FURTHER = "#000000"
_KINDS = ("before", "after")
_OPAQUE = 0.7  # of the colour of a class over its pixel
NOTES: Final = {
    "segmentation": "",
    "detection": " Solid boxes find an object, dashed ones are objects that are not found, and dotted ones find none.",
}
"""Sentences on how the examples of a task are read."""
CHANGES: Final = (
    ("right before, wrong after", "#d55e00"),
    ("wrong before and after", "#333333"),
    ("wrong before, right after", "#0072b2"),
)
"""Names and colours of the pixels that are not right before and after an attack, those that an attacker wants first."""


def named(evidence: Evidence) -> str:
    """Return the name of the task of the model of a run, `classes` if it has none."""
    return str(evidence.model.get("task", {}).get("name", "classes"))


def example_texts(evidence: Evidence, row: int) -> tuple[str | None, str, str]:
    """Return the truth of an example in words, or None if it is shown only, and what the model returned for the clean
    input and in the worst case.
    """
    task, names, card = named(evidence), _names(evidence), evidence.model["task"]
    if task == "segmentation":
        before, after = (f"mean IoU {percent(_iou(evidence, kind, row))}" for kind in (CLEAN, MEASURED))
        return None, before, after
    if task == "detection":
        (found, n), (left, _) = (_found(evidence, kind, row) for kind in (CLEAN, MEASURED))
        return amount(n, "objects"), f"{found} found", f"{left} found"
    truth, *outputs = (
        evidence[name][row] for name in (f"{MEASURED}truth", f"{CLEAN}output", f"{MEASURED}output")
    )
    if task == "multilabel":
        labels = [
            _listed([class_name(k, names) for k in v.nonzero()[:, 0].tolist()]) for v in (truth, *outputs)
        ]
        return labels[0] or "none", labels[1] or "none", labels[2] or "none"
    numbers = [_listed([plain(value, 4) for value in values.tolist()]) for values in outputs]
    sizes = [card["tolerance"] * (abs(value) if card["relative"] else 1) for value in truth.tolist()]
    target = [f"{plain(value, 4)} ± {plain(size)}" for value, size in zip(truth.tolist(), sizes, strict=True)]
    return _listed(target), numbers[0], numbers[1]


def _listed(texts: Sequence[str]) -> str:
    more = [f"{len(texts) - MOST_NUMBERS} more"] if len(texts) > MOST_NUMBERS else []
    return ", ".join([*texts[:MOST_NUMBERS], *more])


def _iou(evidence: Evidence, of: str, row: int) -> float:
    """Mean IoU of an image over the classes in its mask; 1 without such classes."""
    return float(image_ious(evidence[f"{of}pixels"][row : row + 1].double())[0])


def _found(evidence: Evidence, of: str, row: int) -> tuple[int, int]:
    """Numbers of the objects of an image that are found, and of all."""
    matching = match(evidence[f"{of}boxes"][row : row + 1], evidence[f"{MEASURED}truth"][row : row + 1])
    return int(matching.found.sum()), int((matching.objects >= 0).sum())


def _names(evidence: Evidence) -> tuple[str, ...]:
    return tuple(str(name) for name in evidence.data.get("classes") or ())


# --- examples


def _colours_of(masks: Sequence[Tensor]) -> dict[int, str]:
    """The colour of each class that occurs in masks, by its number."""
    classes = _present(masks)
    others = [k for k in classes if k > 0]
    drawn = dict(zip(others, (*_COLOURS, *[_FURTHER] * len(others)), strict=False))
    return ({0: _FIRST} if 0 in classes else {}) | drawn


def _present(masks: Sequence[Tensor]) -> list[int]:
    return sorted({int(k) for mask in masks for k in torch.unique(mask)})


def examples_of_task(evidence: Evidence, attacks: Sequence[str], side: int = LONGEST_SIDE) -> list[Json]:
    """Return the examples of the gallery as `example_images` does, with the truth and what the model returned for each
    in words, and in pictures if it returned masks or boxes. `side` is the longest side of pictures.
    """
    gallery, task, names = evidence.gallery, named(evidence), _names(evidence)
    low, high = range_of_inputs(evidence.model)
    examples = example_images(evidence, names, attacks, side)
    for example in examples:
        row, place = (int((ids == example["id"]).nonzero()[0, 0]) for ids in (evidence["id"], gallery["id"]))
        label, clean, attacked = example_texts(evidence, row)
        # the columns have the distances of lost examples only
        delta = (gallery["x_adv"][place] - gallery["x"][place]).flatten().double().nan_to_num(0.0)
        example |= {
            "task": task,
            "label": label,
            "clean_prediction": clean,
            "adversarial_prediction": attacked,
        }
        example["distances"] = {"linf": float(delta.abs().max()), "l2": float(delta.norm())}
        if "output" in gallery and task in ("segmentation", "detection"):
            outputs = [gallery[name] for name in ("truth", "clean", "output")]
            truth, before, after = (each[place] for each in outputs)
            picture = (gallery["x"][place].float() - low) / ((high - low) or 1.0)
            example["change"] = change_of_task(evidence, row)
            example["outputs"] = {"task": task} | (
                _boxes(truth, before, after, picture.shape[-2:], names)
                if task == "detection"
                else _masks(picture, truth, before, after, _colours_of(outputs), names, side)
            )
    return examples


def change_of_task(evidence: Evidence, row: int) -> str:
    """Return what the attacks changed for an example whose outputs are shown as pictures, in words."""
    if named(evidence) == "segmentation":
        before, after = (percent(_iou(evidence, kind, row)) for kind in (CLEAN, MEASURED))
        return f"mean IoU falls from {before} to {after}"
    (found, n), (left, _) = (_found(evidence, kind, row) for kind in (CLEAN, MEASURED))
    return f"{found} of {amount(n, 'objects')} found before, and {left} after"


def _masks(
    picture: Tensor,
    truth: Tensor,
    before: Tensor,
    after: Tensor,
    colours: Mapping[int, str],
    names: tuple[str, ...],
    side: int,
) -> Json:
    """Pictures of the masks `before` and `after` an attack (height, width), over the `picture` (channels,
    height, width), and of the pixels that changed with respect to the `truth`, with their numbers. Pixels whose truth
    is negative do not count. `side` is the longest side of the pictures.
    """
    counted = truth >= 0
    was, is_right = (before == truth) & counted, (after == truth) & counted
    changes = [was & ~is_right, ~was & ~is_right & counted, ~was & is_right]
    grey = shrunk(picture, side).mean(0, keepdim=True)
    size = (grey.shape[-2], grey.shape[-1])
    # the first kind is drawn last, so that no lost pixel disappears in a small picture
    drawn = (0.6 + 0.4 * grey).expand(3, *size)
    for mask, (_, colour) in reversed([*zip(changes, CHANGES, strict=True)]):
        cells = adaptive_max_pool2d(mask[None, None].float(), size)[0, 0] > 0
        drawn = torch.where(cells, _rgb(colour), drawn)
    return {
        "true": png(_overlay(grey, truth, colours)),
        "before": png(_overlay(grey, before, colours)),
        "after": png(_overlay(grey, after, colours)),
        "changes": png(drawn),
        "lost": int(changes[0].sum()),
        "gained": int(changes[2].sum()),
        "counted": int(counted.sum()),
        "key": [
            {"name": class_name(k, names), "colour": colours[k]}
            for k in _present((truth, before, after))
            if k >= 0
        ],
    }


def _rgb(colour: str) -> Tensor:
    return torch.tensor([int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)])[:, None, None]


def _overlay(grey: Tensor, mask: Tensor, colours: Mapping[int, str]) -> Tensor:
    """The colour of the class of each pixel over the image in grey; black where no class is."""
    cells = interpolate(mask[None, None].float(), grey.shape[-2:], mode="nearest-exact")[0, 0].long()
    drawn = torch.zeros(3, *grey.shape[-2:])
    for k, colour in colours.items():
        drawn = torch.where(cells == k, _OPAQUE * _rgb(colour) + (1 - _OPAQUE) * grey, drawn)
    return drawn


def _boxes(truth: Tensor, before: Tensor, after: Tensor, size: Sequence[int], names: tuple[str, ...]) -> Json:
    """The objects of an image of a size (height, width), each with the box by which it is found before and after
    an attack, and the boxes that find none. Boxes are in pixels.
    """
    returned = dict(zip(_KINDS, (_returned(rows, truth, names) for rows in (before, after)), strict=True))
    return {
        "size": [int(size[1]), int(size[0])],
        "objects": [
            {
                "name": class_name(int(row[4]), names),
                "box": row[:4].tolist(),
                **{kind: found.get(k) for kind, (found, _) in returned.items()},
            }
            for k, row in enumerate(truth)
            if row[4] >= 0 and row[5] == 0
        ][:MOST_OBJECTS],
        "false": {kind: false[:MOST_OBJECTS] for kind, (_, false) in returned.items()},
    }


def _returned(rows: Tensor, truth: Tensor, names: tuple[str, ...]) -> tuple[dict[int, Json], list[Json]]:
    """The confident boxes (m, 6) of an image by the number of the object that they find, and those that find none."""
    rows = rows[(rows[:, 4] >= CONFIDENT) & (rows[:, 5] >= 0)]
    rows = rows[rows[:, 4].argsort(descending=True, stable=True)]
    crowd = (truth[:, 5] > 0) & (truth[:, 4] >= 0)
    ious = overlaps(rows[None, :, :4], truth[None, :, :4], crowd[None])[0]
    near = ious.where(rows[:, None, 5] == truth[:, 4], 0.0) >= CONFIDENT
    found: dict[int, Json] = {}
    false: list[Json] = []
    for row, values, own in zip(rows, ious, near, strict=True):
        free = [k for k in own.nonzero()[:, 0].tolist() if not crowd[k] and k not in found]
        entry = {"name": class_name(int(row[5]), names), "score": float(row[4]), "box": row[:4].tolist()}
        if free:
            best = max(free, key=lambda k: (float(values[k]), k))
            found[best] = {**entry, "iou": float(values[best])}
        elif not bool(own[crowd].any()):
            false.append(entry)
    return found, false


def blocks_of_task(example: Mapping[str, Any]) -> list[tree.Block]:
    """Return the blocks with what the model returned for an example."""
    shown, at, said = (
        example["outputs"],
        example["id"],
        (example["clean_prediction"], example["adversarial_prediction"]),
    )
    if shown["task"] == "detection":
        urls = (example["clean"], example["perturbed"])
        boxed = [_boxed(shown, at, *each) for each in zip(_KINDS, urls, said, strict=True)]
        return [tree.Pictures(boxed, columns=2, depth="notebook"), _table_of_boxes(shown)]
    share = percent(shown["lost"] / max(shown["counted"], 1))
    pictures = [
        tree.Picture(url, caption, f"Image {at}: {caption}", value)
        for url, caption, value in (
            (example["clean"], "image", ""),
            (shown["before"], "mask before", said[0]),
            (shown["after"], "mask after", said[1]),
            (shown["changes"], "what changed", f"{share} lost"),
        )
    ]
    words = f"{amount(shown['lost'], 'pixels')} ({share}) were right before and are wrong after the attack"
    return [tree.Pictures(pictures, columns=2, depth="notebook"), tree.Paragraph(words, "text")]


def keys_of_masks(examples: Sequence[Json]) -> list[tree.Key]:
    """Return the keys of the colours of masks, of the classes that occur and of changes; none for other outputs."""
    if "key" not in examples[0].get("outputs", {}):
        return []
    classes = {e["colour"]: e["name"] for example in examples for e in example["outputs"]["key"]}
    classes |= {_FURTHER: "others"} if _FURTHER in classes else {}
    order = [colour for colour in (_FIRST, *_COLOURS, _FURTHER) if colour in classes]
    named = tuple((classes[colour], colour) for colour in order)
    return [tree.Key("Classes", named), tree.Key("What changed", CHANGES)]


def _boxed(shown: Json, at: int, kind: str, url: str, said: str) -> tree.Picture:
    """The image with the boxes before or after the attack."""
    boxes = [
        tree.Box("lost" if each[kind] is None else "found", tuple((each[kind] or each)["box"]), str(number))
        for number, each in enumerate(shown["objects"], 1)
    ]
    boxes += [
        tree.Box("false", tuple(each["box"]), _letter(k)) for k, each in enumerate(shown["false"][kind])
    ]
    width, height = shown["size"]
    text = f"Boxes in image {at} {kind} the attack: {said}"
    return tree.Picture(url, kind, text, said, boxes=tuple(boxes), size=(width, height))


def _letter(k: int) -> str:
    return chr(ord("a") + k % 26) * (1 + k // 26)


def _table_of_boxes(shown: Json) -> tree.Table:
    """The objects, and the boxes that find none, with scores."""
    rows = [
        (
            f"{number} {each['name']}",
            *("not found" if each[kind] is None else f"found, {each[kind]['score']:.2f}" for kind in _KINDS),
        )
        for number, each in enumerate(shown["objects"], 1)
    ]
    false = ([f"{each['name']}, {each['score']:.2f}" for each in shown["false"][kind]] for kind in _KINDS)
    rows += [
        (f"{_letter(k)} (no object)", *texts) for k, texts in enumerate(zip_longest(*false, fillvalue=""))
    ]
    return tree.Table(("box", *_KINDS), rows, texts=frozenset({1, 2}))


# --- classes


def by_class(evidence: Evidence) -> list[Json]:
    """Return tables of the score by class before and after the attacks for the summary of a run: the IoU of classes,
    the recall of objects by class and by size, or the recall of labels. The intervals of a table hold together. There
    are none for a search for smallest changes.
    """
    if math.isinf(evidence.threat.constraint.eps):
        return []
    task, names = named(evidence), _names(evidence)
    if task == "segmentation":
        pixels = [evidence[f"{kind}pixels"].double() for kind in (CLEAN, MEASURED)]
        parts = [(each[..., 0], each[..., 1] + each[..., 2] - each[..., 0]) for each in pixels]
        counts = (pixels[0][..., 2] > 0).sum(0)
        rows = [class_name(k, names) for k in range(len(counts))]
        return [_by("class", "images", "IoU", rows, counts, parts)]
    if task == "multilabel":
        truth = evidence[f"{MEASURED}truth"].double()
        parts = [(evidence[f"{kind}output"] * truth, truth) for kind in (CLEAN, MEASURED)]
        rows = [class_name(k, names) for k in range(truth.shape[1])]
        return [_by("label", "examples", "recall", rows, truth.sum(0), parts)]
    return _of_objects(evidence, names) if task == "detection" else []


def _of_objects(evidence: Evidence, names: tuple[str, ...]) -> list[Json]:
    truth = evidence[f"{MEASURED}truth"]
    matchings = [match(evidence[f"{kind}boxes"], truth) for kind in (CLEAN, MEASURED)]
    objects, sizes = matchings[0].objects, matchings[0].sizes
    if not bool((objects >= 0).any()):
        return []
    labels = classes_of(matchings[0])
    thirds = sizes[objects >= 0].quantile(torch.tensor([1 / 3, 2 / 3], dtype=sizes.dtype)).round()
    ends = sorted(set(thirds.tolist()))
    place = torch.searchsorted(torch.tensor(ends, dtype=sizes.dtype), sizes.contiguous())
    of_size = place.where(objects >= 0, -1)[..., None] == torch.arange(len(ends) + 1)
    ranges = [
        f"up to {plain(ends[0])} pixels",
        *(f"{plain(a)} to {plain(b)} pixels" for a, b in pairwise(ends)),
    ]
    groups = (
        ("class", objects[..., None] == labels, [class_name(k, names) for k in labels.tolist()]),
        ("size", of_size, [*ranges, f"above {plain(ends[-1])} pixels"]),
    )
    return [
        _by(
            group,
            "objects",
            "recall",
            rows,
            masks.sum((0, 1)),
            [((masks & matching.found[..., None]).sum(1), masks.sum(1)) for matching in matchings],
        )
        for group, masks, rows in groups
    ]


def _by(
    group: str,
    noun: str,
    measure: str,
    rows: Sequence[str],
    counts: Tensor,
    parts: Sequence[tuple[Tensor, Tensor]],
) -> Json:
    """A table of ratios of sums, the lowest after the attacks first, from both sums of clean and of attacked inputs,
    (n, rows) each, without the rows of which there are none.
    """
    kept = counts.nonzero()[:, 0]
    confidence = bonferroni(CONFIDENCE, len(kept))
    clean, attacked = (ratios(above[:, kept], below[:, kept], confidence) for above, below in parts)
    scored = sorted(zip(kept.tolist(), clean, attacked, strict=True), key=lambda each: each[2].value)
    entries = [
        {"name": rows[k], "n": int(counts[k]), "clean": estimate_to_json(a), "attacked": estimate_to_json(b)}
        for k, a, b in scored[:MOST_ROWS]
    ]
    return {"group": group, "noun": noun, "measure": measure, "rows": entries}


_OF_CLASSES: Final = {
    "IoU": "IoU of all pixels on clean images, and on the worst case of each image",
    "recall": "share that the model finds on clean inputs, and on the worst case of each input",
}


def section_of_classes(tables: Sequence[Json]) -> tree.Section:
    """Return the section of the score by class, and by size of objects."""
    first = tables[0]
    blocks = [
        tree.Table(
            (table["group"], table["noun"], "clean", "attacked", "interval"),
            [
                (
                    row["name"],
                    count_text(row["n"]),
                    percent(row["clean"]["value"]),
                    bar(row["attacked"]),
                    interval("recall", row["attacked"]),
                )
                for row in table["rows"]
            ],
            f"{table['measure']} by {table['group']}",
            extra=frozenset({1, 4}),
        )
        for table in tables
    ]
    lead = f"{_OF_CLASSES[first['measure']]}; the intervals of a table hold together"
    lead += "; sizes are square roots of areas" * any(table["group"] == "size" for table in tables)
    title = "Labels" if first["group"] == "label" else "Classes"
    return tree.Section(title, blocks, lead, "classes", title)
