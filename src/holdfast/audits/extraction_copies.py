"""Copies of a model that are trained on its answers: the choice of the queries, what an answer reveals, the training,
and the exact extraction of a softmax model.

Orekondy et al., "Knockoff Nets: Stealing Functionality of Black-Box Models", CVPR 2019, arXiv:1812.02766: a network
that is trained on the scores of other images. Greedy k-centre: Sener & Savarese, "Active Learning for Convolutional
Neural Networks: A Core-Set Approach", ICLR 2018, arXiv:1708.00489, in the space of the copy's probabilities, as in Pal
et al., "ActiveThief", AAAI 2020. Exact extraction: Tramèr et al., "Stealing Machine Learning Models via Prediction
APIs", USENIX Security 2016, arXiv:1609.02943.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.attacks.parts.substitutes import network_for
from holdfast.core.draws import Draws
from holdfast.core.model import Bounds, Classifier
from holdfast.core.types import Inputs, Logits
from holdfast.recipes.training.fit import drawing

Answers = Literal["scores", "top-3", "rounded", "labels"]
"""what the attacker receives: all probabilities, the three largest, probabilities of two digits, or the class"""
ANSWERS: tuple[Answers, ...] = get_args(Answers)
Choice = Literal["random", "k-centre"]
"""how the queries are chosen from a pool"""

_TOP, _DIGITS = 3, 2
_LEAD = 1e-4
"""added to the predicted class, which the attacker knows also where rounded probabilities are equal or all 0"""
_LEAST_BATCH = 16
_PIECE = 500
"""inputs in one forward pass"""
_LEAST_SIDE = 8
"""sides of an image, in pixels, from which a network for images begins with convolutions"""


def revealed(p: Tensor, answers: Answers) -> Tensor:
    """Return the class probabilities (n, classes) that the attacker derives from an answer, given those of the model.

    With `top-3`, the rest of the probability is spread evenly over the other classes.
    """
    if answers == "labels":
        return F.one_hot(p.argmax(1), p.shape[1]).to(p.dtype)
    if answers == "rounded":
        rounded = p.round(decimals=_DIGITS) + _LEAD * F.one_hot(p.argmax(1), p.shape[1])
        return rounded / rounded.sum(1, keepdim=True)
    if answers == "top-3" and p.shape[1] > _TOP:
        largest = p.topk(_TOP, dim=1)
        rest = (1 - largest.values.sum(1, keepdim=True)).clamp_min(0) / (p.shape[1] - _TOP)
        return rest.expand_as(p).scatter(1, largest.indices, largest.values)
    return p


@dataclass(frozen=True)
class CopyTraining:
    """Settings of the training of a copy: Adam on the cross-entropy to the answers, with a learning rate that rises for
    a tenth of the updates and falls along a cosine.
    """

    epochs: int = 8
    """number of passes over many answers"""
    seen: int = 64_000
    """number of answers that are seen over all passes, repeats counted, if these would be fewer"""
    most_epochs: int = 100
    """largest number of passes over few answers"""
    batch: int = 64
    """largest number of answers in one update; of few answers, each pass has at least eight updates"""
    lr: float = 2e-3

    def size(self, n: int) -> int:
        """Return the number of answers in one update, of `n` answers."""
        return min(n, self.batch, max(_LEAST_BATCH, n // 8))

    def updates(self, n: int) -> int:
        """Return the number of updates on `n` answers."""
        return math.ceil(min(self.most_epochs, max(self.epochs, self.seen / n)) * n / self.size(n))

    def __call__(self, copy: Classifier, x: Inputs, targets: Tensor, rng: Draws) -> Classifier:
        """Train a copy on inputs (n, …) and class probabilities (n, classes). Return it in eval mode."""
        updates, size = self.updates(len(x)), self.size(len(x))
        parameters = [parameter for parameter in copy.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(parameters, self.lr, fused=True)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda k: min(1.0, 10 * (k + 1) / updates) * (1 + math.cos(math.pi * k / updates)) / 2
        )
        copy.train()
        with torch.enable_grad(), drawing(rng.at("noise")):
            for rows, _ in zip(
                _batches(len(x), size, rng.at("order"), x.device), range(updates), strict=False
            ):
                optimizer.zero_grad()
                F.cross_entropy(copy(x[rows]), targets[rows]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                scheduler.step()
        return copy.eval().requires_grad_(requires_grad=False)


def _batches(n: int, size: int, rng: Draws, device: torch.device) -> Iterator[Tensor]:
    places, epoch = torch.arange(n), 0
    while True:
        order = rng.at(epoch).bits(places).argsort().to(device)
        yield from (order[start : start + size] for start in range(0, n - size + 1, size))
        epoch += 1


def small_copy(x: Inputs, classes: int, bounds: Bounds, rng: Draws) -> Classifier:
    """Return a small network with random weights for inputs like `x` (n, …), of which it subtracts the mean."""
    spatial = tuple(range(2, x.dim()))
    mean, std = x.mean((0, *spatial)), x.std((0, *spatial), correction=0).clamp_min(1e-3)
    net = _network(x.shape[1:], classes)
    copy = Classifier(net, bounds=bounds, mean=mean.tolist(), std=std.tolist(), classes=classes)
    with drawing(rng), torch.no_grad():
        copy(x[:1].cpu())  # gives lazy layers their size
        for layer in copy.modules():
            if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
                layer.reset_parameters()
    return copy.to(x.device, x.dtype)


def _network(shape: torch.Size, classes: int) -> nn.Module:
    if len(shape) != 3 or min(shape[1:]) < _LEAST_SIDE:
        return network_for(shape, classes)
    return nn.Sequential(
        nn.Conv2d(shape[0], 16, 4, 2, 1), nn.ReLU(),
        nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(100), nn.ReLU(),
        nn.Linear(100, classes),
    )  # fmt: skip


@torch.no_grad()
def logits_in_pieces(model: Callable[[Inputs], Logits], x: Inputs) -> Logits:
    """Return the logits (n, classes) of inputs in float64 on the CPU."""
    return torch.cat([model(piece).cpu().double() for piece in torch.split(x, _PIECE)])


def k_centre(candidates: Tensor, centres: Tensor, n: int) -> Tensor:
    """Return the positions of `n` candidates (m, d), each the farthest from all centres (k, d) and those before it."""
    nearest = torch.cat([torch.cdist(piece, centres).amin(1) for piece in torch.split(candidates, 1000)])
    chosen = torch.empty(n, dtype=torch.int64)
    for place in range(n):
        chosen[place] = farthest = nearest.argmax()
        nearest = torch.minimum(nearest, (candidates - candidates[farthest]).norm(dim=1))
        nearest[farthest] = -1.0
    return chosen


@dataclass(frozen=True)
class SoftmaxWeights:
    """Weights of a softmax model, up to a term that is common to all classes."""

    weight: Tensor
    """(features, classes)"""
    bias: Tensor
    """(classes)"""

    def __call__(self, x: Inputs) -> Logits:
        """Return the logits (n, classes) in float64, whose mean over the classes is 0."""
        return x.flatten(1).double() @ self.weight + self.bias


def centred(logits: Logits) -> Logits:
    """Return logits in float64 without the term that is common to all classes, which probabilities do not determine."""
    z = logits.double().log_softmax(1)
    return z - z.mean(1, keepdim=True)


def softmax_weights(query: Callable[[Inputs], Logits], like: Inputs, bounds: Bounds) -> SoftmaxWeights:
    """Return the weights of a softmax model from d + 1 queries for d features: the lowest valid input, and the same
    with the highest value of one feature each.

    `like` (n, …) states the shape and the data type of the inputs. The error is that of the scores divided by the width
    of the range.
    """
    low, high = (end.expand(like[:1].shape).flatten() for end in bounds.like(like))
    corners = torch.cat(
        (low[None], torch.where(torch.eye(len(low), dtype=torch.bool, device=low.device), high, low))
    )
    z = centred(query(corners.view(-1, *like.shape[1:])))
    width = (corners[1:].diagonal() - low).double().cpu()
    weight = (z[1:] - z[:1]) / width[:, None]
    return SoftmaxWeights(weight, z[0] - low.double().cpu() @ weight)


PAIRS, _CURVED = 4, 1e-3
"""number of pairs of inputs between which linearity is tested, and largest deviation of the logits of a softmax model
relative to the largest one"""


def is_softmax(query: Callable[[Inputs], Logits], x: Inputs) -> bool:
    """Return whether logits in the middle between inputs are the mean of theirs, as those of a softmax model. It costs
    12 queries.
    """
    first, second = x[:PAIRS], x[PAIRS : 2 * PAIRS]
    z = centred(query(torch.cat((first, second, (first + second) / 2))))
    a, b, middle = torch.split(z, len(first))
    return is_small(middle - (a + b) / 2, z)


def is_small(difference: Tensor, logits: Logits) -> bool:
    """Return whether differences between logits are finite and small beside the largest logit."""
    return bool(difference.isfinite().all() and difference.abs().max() <= _CURVED * logits.abs().max())
