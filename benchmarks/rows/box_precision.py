"""Average precision of detections beside pycocotools on random cases, and the time of its interval."""

import contextlib
import io
import time

import torch
from torch import Tensor

from benchmarks.peers import peer, version
from benchmarks.record import Cells, Claim, Outcome
from holdfast.core.draws import Draws
from holdfast.tasks.box_matching import IOUS, average_precision, class_precisions, match

WHAT = "average precision of detections beside pycocotools, and the time of its bootstrap interval"
CASES, CLASSES = 200, 4
IMAGES, DETECTIONS = 500, 20
"""size of the case whose interval is timed; its detections are near objects, as hits take the time"""
NAMES = {1: "AP at .5", len(IOUS): "AP at .5:.95"}


def case(seed: int, n: int = 6, m: int = 20, k: int = 6, shift: float = 3) -> tuple[Tensor, Tensor]:
    """Detections (n, m, 6) and objects (n, k, 6), in half of the cases on a grid of whole numbers, so that several IoU
    are equal. Scores have ties, and there are crowds, images without detections or objects, and classes without them.
    """
    rng, ids = Draws(seed).at("case"), torch.arange(n)
    whole = seed % 2 == 0

    def numbers(place: str, high: float, *shape: int) -> Tensor:
        uniform = rng.at(place).uniform(ids, *shape, dtype=torch.float64) * high
        return uniform.floor() if whole else uniform

    def classes(place: str, rows: int) -> Tensor:
        return rng.at(place).integers(ids, CLASSES, rows)

    corners = numbers("corner", 10, k, 2)
    objects = torch.cat((corners, corners + 1 + numbers("side", 8, k, 2)), 2)
    crowd = rng.at("crowd").integers(ids, 8, k) == 0
    # the last class is missing in every third case
    labels = classes("label", k) % (CLASSES - (seed % 3 == 0))
    truth = torch.cat((objects, labels[..., None], crowd[..., None]), 2)
    near = rng.at("near").integers(ids, k, m)
    boxes = objects.gather(1, near[..., None].expand(n, m, 4)) + numbers("shift", shift, m, 4) - shift // 2
    boxes[..., 2:] = torch.maximum(boxes[..., 2:], boxes[..., :2] + 0.25)
    own = rng.at("own").integers(ids, 4, m) > 0
    predicted = torch.where(own, labels.gather(1, near), classes("predicted", m))
    scores = (1 + rng.at("score").integers(ids, 8, m)) / 8
    outputs = torch.cat((boxes, scores[..., None], predicted[..., None]), 2)
    empty = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, -1.0], dtype=torch.float64)
    nothing = torch.tensor([0.0, 0.0, 0.0, 0.0, -1.0, 0.0], dtype=torch.float64)
    gone = rng.at("gone").integers(ids, 10, 2)
    outputs[(rng.at("no").integers(ids, 4, m) == 0) | (gone[:, :1] == 0)] = empty
    truth[(rng.at("none").integers(ids, 4, k) == 0) | (gone[:, 1:] == 0)] = nothing
    return outputs, truth


def reference(outputs: Tensor, truth: Tensor) -> tuple[float, float]:
    """AP at .5 and at .5:.95 by pycocotools."""
    coco, evaluation = peer("pycocotools.coco"), peer("pycocotools.cocoeval")
    images = [{"id": i} for i in range(len(outputs))]
    sides: list[list[Cells]] = []
    for rows, label in ((truth.tolist(), 4), (outputs.tolist(), 5)):
        sides.append([])
        for image, each in enumerate(rows):
            for x1, y1, x2, y2, *rest in (row for row in each if row[label] >= 0):
                size = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
                values = {"iscrowd": int(rest[1])} if label == 4 else {"score": rest[0]}
                category = int(rest[label - 4])
                named = {"id": len(sides[-1]) + 1, "image_id": image, "category_id": category}
                sides[-1].append(named | size | values)
    with contextlib.redirect_stdout(io.StringIO()):
        data = []
        for annotations in sides:
            data.append(coco.COCO())
            categories = [{"id": label} for label in range(CLASSES)]
            data[-1].dataset = {"images": images, "annotations": annotations, "categories": categories}
            data[-1].createIndex()
        evaluated = evaluation.COCOeval(*data, "bbox")
        evaluated.evaluate()
        evaluated.accumulate()
        evaluated.summarize()
    return float(evaluated.stats[1]), float(evaluated.stats[0])


def measured() -> Outcome:
    differences = dict.fromkeys(NAMES, 0.0)
    values: list[Cells] = []
    for seed in range(CASES):
        outputs, truth = case(seed)
        matching, expected = match(outputs, truth), reference(outputs, truth)
        weights = torch.ones(1, len(outputs), dtype=torch.float64)
        ours = [float(class_precisions(matching, weights, n_ious).nanmean()) for n_ious in NAMES]
        for n_ious, own, theirs in zip(NAMES, ours, expected, strict=True):
            differences[n_ious] = max(differences[n_ious], abs(own - theirs))
        values.append({"seed": seed, "AP at .5": expected[0], "AP at .5:.95": expected[1]})
    start, matching = time.process_time(), match(*case(1, IMAGES, DETECTIONS, DETECTIONS, shift=0.2))
    table: list[Cells] = [
        {
            "what": f"matches of {IMAGES} images, {DETECTIONS} detections each",
            "CPU s": time.process_time() - start,
        }
    ]
    for n_ious, name in NAMES.items():
        start, estimate = time.process_time(), average_precision(matching, n_ious)
        seconds = time.process_time() - start
        table.append(
            {
                "what": f"{name} with its interval, 2,000 resamples",
                "CPU s": seconds,
                "value": f"{estimate.value:.4f} ({estimate.low:.4f}–{estimate.high:.4f})",
                "largest difference from pycocotools": differences[n_ious],
            }
        )
    claims = [
        Claim("largest difference from pycocotools <= 1e-9", max(differences.values()), 1e-9),
        Claim("CPU s of an interval <= 2", max(row["CPU s"] for row in table[1:]), 2.0),
    ]
    config: Cells = {"cases": CASES, "pycocotools": version("pycocotools")}
    return Outcome(table, claims, config, {"cases": values})
