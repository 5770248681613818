"""Scores of the bundled networks of scenes that are left under an assessment, beside attacks of others with as many
passes, and the mean IoU beside scikit-learn.
"""

import time
from collections.abc import Mapping

import numpy as np
import torch
from sklearn.metrics import jaccard_score
from torch import Tensor

import holdfast
from benchmarks.dense_peers import ON_BOXES, ON_MASKS, PeerAttack, network
from benchmarks.peers import version
from benchmarks.record import Cells, Claim, Outcome
from holdfast.core.evidence import Evidence
from holdfast.core.tasks import Task
from holdfast.io.data.scenes import CLASSES, scenes
from holdfast.metrics.tasks import miou
from holdfast.tasks.box_matching import match, recall
from holdfast.tasks.catalogue import task_of
from holdfast.threats.parsing import parse_threat

WHAT = "scores left of networks for segmentation and detection beside SegPGD, TOG and ART at equal passes"
N, SEEDS, RANDOM_CASES = 100, (0, 1, 2), 200
SETTINGS: Mapping[str, tuple[str, str, str, Mapping[str, PeerAttack]]] = {
    "scenes-unet": ("linf:2/255", "miou", "fast", ON_MASKS),
    "scenes-detector": ("linf:8/255,goal=vanish", "object_recall", "quick", ON_BOXES),
}
"""threat, metric, suite and other attacks of each network"""


def measured() -> Outcome:
    table: list[Cells] = []
    claims: list[Claim] = []
    for name, (threat, metric, suite, peers) in SETTINGS.items():
        made = scenes(N)
        images = torch.from_numpy(made.x).float() / 255
        on_boxes = name == "scenes-detector"
        truth = torch.from_numpy(made.boxes if on_boxes else made.masks)
        card: Mapping[str, object] = (
            {"name": "detection", "ids": tuple(range(len(CLASSES)))} if on_boxes else {"name": "segmentation"}
        )
        for seed in SEEDS:
            start = time.process_time()
            run = holdfast.assess(name, "scenes", n=N, threat=threat, suite=suite, seed=seed, doubts=False)
            passes = int(run.evidence["queries"].max())  # of the image with the most; others may end early
            ours = {"clean": run.metrics[f"clean_{metric}"].value, "left": run.metrics[metric].value}
            others = {"Holdfast": (ours["left"], passes, time.process_time() - start)}
            for other, attack in peers.items():
                start = time.process_time()
                x = attack(images, truth, passes, seed)
                left = score(name, task_of(card), x, truth)
                others[other] = (left, passes, time.process_time() - start)
                claims.append(
                    Claim(f"{name}, seed {seed}: {metric} left under Holdfast <= {other}", ours["left"], left)
                )
            table += [
                {
                    "network": name, "threat": threat, "seed": seed, "attack": attack, "clean, %": 100 * ours["clean"],
                    f"{metric} left, %": 100 * left, "passes an image": count, "CPU s": seconds,
                }
                for attack, (left, count, seconds) in others.items()
            ]  # fmt: skip
    largest = max(abs(difference) for difference in iou_differences())
    table.append({"network": "random masks", "attack": "", "largest difference from jaccard_score": largest})
    claims.append(Claim("mean IoU: largest difference from scikit-learn <= 1e-9", largest, 1e-9))
    config: Cells = {"n": N, "seeds": list(SEEDS), "random masks": RANDOM_CASES, "art": version("art")}
    return Outcome(table, claims, config)


def score(name: str, task: Task, x: Tensor, truth: Tensor) -> float:
    """The metric of a network on attacked images."""
    with torch.no_grad():
        outputs = torch.cat([task.read(network(name)(part), part) for part in torch.split(x, 50)])
    columns = task.measured(outputs, truth)
    if task.name == "detection":
        return recall(match(columns["boxes"], truth)).value
    right, predicted, true = columns["pixels"].sum(0).double().unbind(1)
    return float((right / (predicted + true - right)).mean())


def iou_differences() -> list[float]:
    """Differences of the mean IoU from that of scikit-learn on random masks, with pixels that do not count."""
    draws, differences = np.random.default_rng(0), []
    for _ in range(RANDOM_CASES):
        n, classes, size = (int(draws.integers(*ends)) for ends in ((1, 6), (2, 7), (2, 12)))
        truth = draws.integers(-1, classes, (n, size, size))
        outputs = torch.from_numpy(draws.normal(size=(n, classes, size, size)))
        task = task_of({"name": "segmentation"})
        pixels = task.measured(outputs, torch.from_numpy(truth))["pixels"]
        if not (truth >= 0).any():
            continue
        evidence = Evidence(
            {"id": torch.arange(n), "task.pixels": pixels}, parse_threat("linf:0.1"), "", (), 0
        )
        counted = truth >= 0
        theirs = jaccard_score(truth[counted], outputs.argmax(1).numpy()[counted], average="macro")
        differences.append(miou(evidence).value - theirs)
    return differences
