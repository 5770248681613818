"""Bounds and CPU time of IBP, CROWN and alpha-CROWN beside those of auto_LiRPA, on the same images in one process, and
of CROWN on a transformer encoder with two layers.

auto_LiRPA has no release that can be installed: `HOLDFAST_AUTO_LIRPA` names a checkout of
Verified-Intelligence/auto_LiRPA, which needs the packages appdirs, graphviz, tqdm, packaging and PyYAML. Both sides use
one thread and are run in turns on chunks of the images; the side that begins changes with every chunk. Every image is
bounded, also those that the network gets wrong. alpha-CROWN is run on the images that CROWN leaves undecided, with 20
steps on both sides. The encoder is trained here, for a few seconds, to tell apart noisy copies of ten inputs of 8
tokens. auto_LiRPA gets the CIFAR-10 network without its normalisation, and normalised boxes.
"""

import math
import os
import sys
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.absent import Absent
from benchmarks.meter import cpu_seconds
from benchmarks.networks import CACHE, images, network
from benchmarks.record import Cells, Claim, Outcome
from holdfast import Batch, Classifier, Linf, ThreatModel
from holdfast.certifiers.branching import AlphaCrown
from holdfast.certifiers.objectives import margin_rows
from holdfast.certifiers.protocol import Prover
from holdfast.certifiers.provers import IBP, Crown

WHAT = "bounds and CPU time of IBP, CROWN and alpha-CROWN beside those of auto_LiRPA, one thread"
SETTINGS = (("mnist_kw01", 0.1), ("mnist_cnn_a_adv", 0.1))
CIFAR, CIFAR_EPS = "cifar_cnn_a_adv", 2 / 255
ENCODER, ENCODER_EPS = "encoder", 0.002
IMAGES, FOR_ALPHA, CIFAR_IMAGES, SEQUENCES = 200, 6, 24, 48
CHUNK = 8
"""images of a turn"""
PEER_BATCH, PEER_BATCH_OF_ENCODER = 4, 1
"""examples that auto_LiRPA bounds at once: its fastest batches on these networks"""
STEPS = 20
LOOSER = {CIFAR: 0.01, ENCODER: 0.02}
"""by how much the mean bound of CROWN may be below that of auto_LiRPA, in parts of its magnitude"""
CPU = {CIFAR: 0.6, ENCODER: 0.7}

Bounding = Callable[[Tensor, Tensor], Tensor]
"""function from images and labels to lower bounds of the smallest margin"""


def measured() -> Outcome:
    folder = Path(os.environ.get("HOLDFAST_AUTO_LIRPA") or CACHE / "auto_LiRPA")
    if not (folder / "auto_LiRPA").is_dir():
        raise Absent(
            f"{folder} is missing; git clone https://github.com/Verified-Intelligence/auto_LiRPA, and let "
            "HOLDFAST_AUTO_LIRPA name the checkout"
        )
    sys.path.append(str(folder.resolve()))
    try:
        import auto_LiRPA  # noqa: F401
    except ModuleNotFoundError as error:
        raise Absent(f"{error}; pip install appdirs graphviz tqdm packaging PyYAML") from error
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        table = [row for name, eps in SETTINGS for row in compared_on(name, eps, IMAGES, FOR_ALPHA)]
        table += [compared_on_cifar(CIFAR_IMAGES), compared_on_encoder(SEQUENCES)]
    finally:
        torch.set_num_threads(threads)
    by = {(row["network"], row["method"]): row for row in table}
    claims = []
    for name, part in LOOSER.items():
        row = by[name, "crown"]
        least = row["mean bound of auto_LiRPA"] - part * abs(row["mean bound of auto_LiRPA"])
        claims += [
            Claim(f"{name}: mean bound of CROWN >= {least:.4f}, that of auto_LiRPA less {part:.0%}",
                  row["mean bound"], least, least=True),
            Claim(f"{name}: CPU of CROWN / that of auto_LiRPA <= {CPU[name]:g}", row["CPU ratio"], CPU[name]),
        ]  # fmt: skip
    config: Cells = {"threads": 1, "steps of alpha-CROWN": STEPS, "eps of the encoder": ENCODER_EPS}
    return Outcome(table, claims, config)


def compared_on(name: str, eps: float, n: int, n_alpha: int) -> list[Cells]:
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


def compared_on_cifar(n: int) -> Cells:
    """The row of CROWN on a CIFAR-10 network, of which auto_LiRPA gets normalised boxes and not the normalisation."""
    net = network(CIFAR)
    x, y = images(net.data, n)
    normalise, rest = net.module[0], net.module[1]  # type: ignore[index]
    for parameter in net.module.parameters():
        parameter.requires_grad_(requires_grad=False)
    ours = _ours(net.module, x, y, CIFAR_EPS, Crown())
    theirs = _theirs(rest, x, CIFAR_EPS, "crown", before=normalise)
    return _timed(CIFAR, "crown", ours, theirs, x, y)[0]


class EncoderLayer(nn.Module):
    """A layer of a transformer encoder in operations that auto_LiRPA knows."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.of_head = heads, width // heads
        self.query, self.key, self.value, self.joined = (nn.Linear(width, width) for _ in range(4))
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (n, tokens, width)."""
        tokens, width = x.shape[1:]
        q, k, v = (
            layer(x).view(-1, tokens, self.heads, self.of_head).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        weights = torch.softmax(torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(self.of_head), -1)
        x = self.first(x + self.joined(torch.matmul(weights, v).transpose(1, 2).reshape(-1, tokens, width)))
        return self.second(x + self.down(torch.relu(self.up(x))))


class Encoder(nn.Module):
    """Two layers, and a linear layer on the mean over the tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(EncoderLayer(width, 4, 2 * width), EncoderLayer(width, 4, 2 * width))
        self.last = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (n, 10)."""
        return self.last(self.layers(x).mean(1))


def trained_encoder(n: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A trained encoder with `n` new inputs (n, 8, 64) and their classes."""
    torch.manual_seed(0)
    originals = torch.rand(10, 8, 64)

    def drawn(count: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(10, (count,))
        return 0.5 * originals[y] + 0.5 * torch.rand(count, 8, 64), y

    net = Encoder(64)
    optimiser = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(60):
        x, y = drawn(64)
        optimiser.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimiser.step()
    x, y = drawn(n)
    return net.eval().requires_grad_(requires_grad=False), x, y


def compared_on_encoder(n: int) -> Cells:
    """The row of CROWN on the encoder."""
    net, x, y = trained_encoder(n)
    ours = _ours(net, x, y, ENCODER_EPS, Crown())
    theirs = _theirs(net, x, ENCODER_EPS, "crown", PEER_BATCH_OF_ENCODER)
    return _timed(ENCODER, "crown", ours, theirs, x, y)[0]


def _timed(
    name: str, method: str, ours: Bounding, theirs: Bounding, x: Tensor, y: Tensor, chunk: int = CHUNK
) -> tuple[Cells, Tensor, Tensor]:
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
    row: Cells = {
        "network": name,
        "method": method,
        "images": n,
        "CPU ms": 1000 * seconds["ours"] / n,
        "CPU ms of auto_LiRPA": 1000 * seconds["theirs"] / n,
        "CPU ratio": seconds["ours"] / seconds["theirs"],
        "certified": int((mine > 0).sum()),
        "by auto_LiRPA": int((peers > 0).sum()),
        "mean bound": float(mine.mean()),
        "mean bound of auto_LiRPA": float(peers.mean()),
    }
    return row, mine, peers


def _ours(module: nn.Module, x: Tensor, y: Tensor, eps: float, prover: Prover) -> Bounding:
    model = Classifier(module).eval()
    ids = torch.arange(len(x))
    ready = prover.ready(model, Batch(x, y, ids), ThreatModel(Linf(eps)))

    def bound(images_of_turn: Tensor, labels: Tensor) -> Tensor:
        return ready(Batch(images_of_turn, labels, torch.arange(len(labels)))).bound

    return bound


def _theirs(
    module: nn.Module,
    x: Tensor,
    eps: float,
    method: str,
    batch: int = PEER_BATCH,
    before: nn.Module | None = None,
) -> Bounding:
    """`before` is an increasing function that is applied to the ends of the boxes instead of inside the network."""
    given = nn.Identity() if before is None else before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm

    options = {"optimize_bound_args": {"iteration": STEPS}} if method == "alpha-crown" else {}
    # a copy, because it changes which parameters require gradients
    bounded = BoundedModule(deepcopy(module), given(x[:1]), bound_opts=options)
    names = {"ibp": "IBP", "crown": "CROWN", "alpha-crown": "CROWN-Optimized"}

    def bound(images_of_turn: Tensor, labels: Tensor) -> Tensor:
        lower = []
        for part, part_labels in zip(images_of_turn.split(batch), labels.split(batch), strict=True):
            low, high = given((part - eps).clamp(min=0)), given((part + eps).clamp(max=1))
            ball = PerturbationLpNorm(x_L=low, x_U=high)
            rows = margin_rows(part_labels, 10, part.dtype)
            found, _ = bounded.compute_bounds(
                x=(BoundedTensor(given(part), ball),), C=rows, method=names[method], bound_upper=False
            )
            lower.append(found.detach().amin(1))
        return torch.cat(lower)

    return bound
