"""Small networks that are trained on the answers of a model at queried points, and attacked in its place.

Papernot et al., "Practical black-box attacks against machine learning", AsiaCCS 2017, arXiv:1602.02697. Differs from
the paper: the answers are scores where the model has them, and the points lie around the attacked examples.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.core.draws import Draws
from holdfast.core.model import Bounds
from holdfast.core.types import Ids, Inputs, Logits

_MINIBATCH = 128
_RATE = 2e-3
_RECENT = 0.5
"""share of a minibatch that is drawn from the newest points, along the path of the attack"""
_NEWEST = 0.25
"""share of the stored points that are the newest ones"""
_CONFIDENCE = 4.0
"""difference of the two largest logits after scaling, as in the loss `scaled_cross_entropy`"""
_MOST_STORED = 40_000_000
"""largest number of stored input values, 160 MB in float32"""
_WIDTH = 128
"""width of the hidden layers"""
_DENSE = 4000
"""largest number of values of an image for which all layers are dense"""
_PATCHES = 16
"""number of patches along the shorter side of a larger image"""


def network_for(shape: Sequence[int], classes: int) -> nn.Module:
    """Return an untrained network for inputs (n, *shape).

    Large images (channels, height, width) and long sequences (channels, length) pass a convolution of patches first,
    which bounds the number of weights; other inputs pass dense layers alone, which are many times faster and were not
    worse on digits.
    """
    first: list[nn.Module] = []
    if len(shape) in (2, 3) and math.prod(shape) > _DENSE:
        convolution = nn.Conv2d if len(shape) == 3 else nn.Conv1d
        side = max(2, math.ceil(min(shape[1:]) / _PATCHES))
        first = [convolution(shape[0], _WIDTH // 4, side, side), nn.ReLU()]
    return nn.Sequential(
        *first, nn.Flatten(),
        nn.LazyLinear(_WIDTH), nn.ReLU(),
        nn.Linear(_WIDTH, _WIDTH), nn.ReLU(),
        nn.Linear(_WIDTH, classes),
    )  # fmt: skip


class SmallNetwork:
    """Network that learns the answers of a model. As a `Model` it has the logits of the network.

    Its weights, and the order of the points in training, are determined by `rng`.
    """

    def __init__(self, like: Inputs, classes: int, bounds: Bounds, rng: Draws) -> None:
        self.bounds, self._rng, self._classes = bounds, rng, classes
        self._mean = like.mean()
        self._scale = like.std(unbiased=False).clamp_min(1e-6)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(rng.key >> 1)  # of the CPU alone, which is restored
            net = network_for(like.shape[1:], classes)
            net(torch.zeros(1, *like.shape[1:]))  # gives the lazy layer its size
        self.net = net.to(like).requires_grad_(False)
        self._adam: torch.optim.Adam | None = None
        self._x: list[Tensor] = []
        self._answers: list[Tensor] = []
        self._trainings = 0

    def __call__(self, x: Inputs, ids: Ids | None = None) -> Logits:
        """Return the logits of the network."""
        logits: Logits = self.net((x - self._mean) / self._scale)
        return logits

    def add(self, x: Inputs, logits: Logits) -> None:
        """Store queried points and their answers. Those that are not finite are left out."""
        finite = logits.isfinite().all(1) & x.flatten(1).isfinite().all(1)
        self._x.append(x.detach()[finite])
        self._answers.append(logits.detach()[finite])
        while len(self._x) > 1 and sum(part.numel() for part in self._x) > _MOST_STORED:
            del self._x[0], self._answers[0]

    def train(self, steps: int) -> None:
        """Take `steps` steps of Adam on the stored points. Later calls continue with more points."""
        x, answers = torch.cat(self._x), torch.cat(self._answers)
        if not len(x):
            return
        targets = soft_targets(answers)
        draw = torch.Generator().manual_seed(self._rng.at("training", self._trainings).key >> 1)
        self._trainings += 1
        self.net.requires_grad_(True)
        adam = self._adam = self._adam or torch.optim.Adam(self.net.parameters(), _RATE)
        newest, recent = int((1 - _NEWEST) * len(x)), int(_RECENT * _MINIBATCH)
        with torch.enable_grad():
            for _ in range(steps):
                rows = torch.cat(
                    (
                        torch.randint(newest, len(x), (recent,), generator=draw),
                        torch.randint(len(x), (_MINIBATCH - recent,), generator=draw),
                    )
                ).to(x.device)
                adam.zero_grad()
                F.cross_entropy(self(x[rows]), targets[rows]).backward()  # type: ignore[no-untyped-call]
                adam.step()
        adam.zero_grad()
        self.net.requires_grad_(False)


def soft_targets(answers: Logits) -> Tensor:
    """Return class probabilities (n, classes) to learn from answers of a model, whose logits may have any scale.

    Half of the weight is on the predicted class, so that answers with two values, such as labels, stay decided.
    """
    top = answers.topk(2, dim=1).values
    gaps = top[:, 0] - top[:, 1]
    usual = gaps[gaps > 0].median() if bool((gaps > 0).any()) else gaps.new_ones(())
    chances = (answers * (_CONFIDENCE / usual.clamp_min(1e-12))).softmax(1)
    decided = F.one_hot(answers.argmax(1), answers.shape[1]).to(chances.dtype)
    return (chances + decided) / 2
