"""Bounds and CPU time of IBP, CROWN and alpha-CROWN beside those of auto_LiRPA, on the same images in one process.

auto_LiRPA has no release that can be installed, so a developer gives a checkout of Verified-Intelligence/auto_LiRPA:

    python -m benchmarks.against_auto_lirpa --source FOLDER [--dependencies FOLDER] [--images 200] [--alpha 6]

It needs appdirs, graphviz, tqdm, packaging and PyYAML, which may be in a folder of their own. Both sides use one thread
and are run in turns on chunks of the images; the side that begins changes with every chunk. Every image is bounded,
also those that the network gets wrong. alpha-CROWN is run on the images that CROWN leaves undecided, with 20 steps on
both sides.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.meter import cpu_seconds
from benchmarks.networks import images, network
from holdfast import Batch, Classifier, Linf, ThreatModel
from holdfast.certifiers.branching import AlphaCrown
from holdfast.certifiers.objectives import margin_rows
from holdfast.certifiers.protocol import Prover
from holdfast.certifiers.provers import IBP, Crown

SETTINGS = (("mnist_kw01", 0.1), ("mnist_cnn_a_adv", 0.1))
CHUNK = 8
"""images of a turn"""
PEER_BATCH = 4
"""images that auto_LiRPA bounds at once: its fastest batch on these networks"""
STEPS = 20

Bounding = Callable[[Tensor, Tensor], Tensor]
"""function from images and labels to lower bounds of the smallest margin"""


def main() -> None:
    """Measure what the command line asks for, and print it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.against_auto_lirpa")
    parser.add_argument("--source", required=True, help="folder that contains the package auto_LiRPA")
    parser.add_argument("--dependencies", help="folder with the packages that it imports")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--alpha", type=int, default=6, help="images of each network for alpha-CROWN")
    parser.add_argument("--json", help="file for the numbers")
    options = parser.parse_args()
    for folder in (options.dependencies, options.source):
        if folder:
            sys.path.append(str(Path(folder).resolve()))
    torch.set_num_threads(1)
    rows = []
    for name, eps in SETTINGS:
        rows += compared_on(name, eps, options.images, options.alpha)
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")


def compared_on(name: str, eps: float, n: int, n_alpha: int) -> list[dict[str, object]]:
    """The rows of one network: each method on the first `n` images, and alpha-CROWN on undecided ones."""
    net = network(name)
    x, y = images(net.data, n)
    for parameter in net.module.parameters():
        parameter.requires_grad_(requires_grad=False)
    rows, undecided = [], torch.ones(n, dtype=torch.bool)
    for method, prover in (("ibp", IBP()), ("crown", Crown())):
        ours, theirs = _ours(net.module, x, y, eps, prover), _theirs(net.module, x, eps, method)
        row, bounds, peer_bounds = _timed(name, method, ours, theirs, x, y)
        rows.append(row)
        undecided = ~((bounds > 0) | (peer_bounds > 0))
    left = (undecided & (net.module(x).argmax(1) == y)).nonzero()[:, 0][:n_alpha]
    if len(left):
        prover = AlphaCrown(steps=STEPS)
        ours, theirs = _ours(net.module, x, y, eps, prover), _theirs(net.module, x, eps, "alpha-crown")
        rows.append(_timed(name, "alpha-crown", ours, theirs, x[left], y[left], chunk=1)[0])
    return rows


def _timed(
    name: str, method: str, ours: Bounding, theirs: Bounding, x: Tensor, y: Tensor, chunk: int = CHUNK
) -> tuple[dict[str, object], Tensor, Tensor]:
    sides = {"ours": ours, "theirs": theirs}
    for work in sides.values():  # what is computed once
        work(x[:chunk], y[:chunk])
    seconds = dict.fromkeys(sides, 0.0)
    bounds: dict[str, list[Tensor]] = {side: [] for side in sides}
    for turn, (images_of_turn, labels) in enumerate(zip(x.split(chunk), y.split(chunk), strict=True)):
        for side in list(sides) if turn % 2 else reversed(list(sides)):

            def work(
                side: str = side, images_of_turn: Tensor = images_of_turn, labels: Tensor = labels
            ) -> None:
                bounds[side].append(sides[side](images_of_turn, labels))

            seconds[side] += cpu_seconds(work)
    mine, peers = torch.cat(bounds["ours"]).double(), torch.cat(bounds["theirs"]).double()
    n = len(x)
    row: dict[str, object] = {
        "network": name,
        "method": method,
        "images": n,
        "ms": round(1000 * seconds["ours"] / n, 2),
        "peer_ms": round(1000 * seconds["theirs"] / n, 2),
        "ratio": round(seconds["ours"] / seconds["theirs"], 3),
        "certified": int((mine > 0).sum()),
        "peer_certified": int((peers > 0).sum()),
        "same_set": bool(((mine > 0) == (peers > 0)).all()),
        "mean_bound": round(float(mine.mean()), 4),
        "peer_mean_bound": round(float(peers.mean()), 4),
    }
    print(json.dumps(row), flush=True)
    return row, mine, peers


def _ours(module: nn.Module, x: Tensor, y: Tensor, eps: float, prover: Prover) -> Bounding:
    model = Classifier(module).eval()
    ids = torch.arange(len(x))
    ready = prover.ready(model, Batch(x, y, ids), ThreatModel(Linf(eps)))

    def bound(images_of_turn: Tensor, labels: Tensor) -> Tensor:
        return ready(Batch(images_of_turn, labels, torch.arange(len(labels)))).bound

    return bound


def _theirs(module: nn.Module, x: Tensor, eps: float, method: str) -> Bounding:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm

    options = {"optimize_bound_args": {"iteration": STEPS}} if method == "alpha-crown" else {}
    # a copy, because it changes which parameters require gradients
    bounded = BoundedModule(deepcopy(module), x[:1], bound_opts=options)
    names = {"ibp": "IBP", "crown": "CROWN", "alpha-crown": "CROWN-Optimized"}

    def bound(images_of_turn: Tensor, labels: Tensor) -> Tensor:
        lower = []
        for part, part_labels in zip(images_of_turn.split(PEER_BATCH), labels.split(PEER_BATCH), strict=True):
            ball = PerturbationLpNorm(x_L=(part - eps).clamp(min=0), x_U=(part + eps).clamp(max=1))
            rows = margin_rows(part_labels, 10, part.dtype)
            found, _ = bounded.compute_bounds(
                x=(BoundedTensor(part, ball),), C=rows, method=names[method], bound_upper=False
            )
            lower.append(found.detach().amin(1))
        return torch.cat(lower)

    return bound


if __name__ == "__main__":
    main()
