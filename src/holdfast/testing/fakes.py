"""Small models and batches for tests. They use float64, because rounding in float32 could change whether an example
counts as broken.
"""

import torch
from torch import Tensor, nn

from holdfast.core.batch import Batch
from holdfast.core.model import Classifier

SHAPE = (3, 4, 4)
"""channels, height and width of the small images"""


class Sine(nn.Module):
    """Layer that computes sin(8 z) of each value z. A network with this layer has a loss with many local minima."""

    def forward(self, z: Tensor) -> Tensor:
        """Return sin(8 z) of each value of `z`."""
        return torch.sin(8 * z)


def network(
    seed: int = 0, *, classes: int = 4, shape: tuple[int, ...] = SHAPE, rippled: bool = False
) -> Classifier:
    """Return a two-layer network with random weights in eval mode, for inputs in [0, 1].

    Its loss is smooth, or has many local minima if `rippled` is true.
    """
    draw, features = torch.Generator().manual_seed(seed), torch.Size(shape).numel()
    hidden, last = nn.Linear(features, 16).double(), nn.Linear(16, classes).double()
    with torch.no_grad():
        for weight in (*hidden.parameters(), *last.parameters()):
            weight.copy_(torch.randn(weight.shape, generator=draw, dtype=torch.float64) / 2)
    between = Sine() if rippled else nn.Tanh()
    return Classifier(nn.Sequential(nn.Flatten(), hidden, between, last)).eval().requires_grad_(False)


def examples(
    seed: int = 0, *, n: int = 21, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float64
) -> Batch:
    """Return random inputs in [0, 1], some values of which are at the bounds, with labels 0 and unordered ids."""
    draw = torch.Generator().manual_seed(seed)
    x = (torch.rand(n, *shape, generator=draw, dtype=torch.float64) * 1.2 - 0.1).clamp(0, 1).to(dtype)
    ids = torch.randperm(4 * n, generator=draw)[:n]
    return Batch(x, torch.zeros(n, dtype=torch.int64), ids)


def labelled(model: Classifier, batch: Batch) -> Batch:
    """Return the batch with the model's predictions as labels, so that every example is classified correctly."""
    with torch.no_grad():
        return Batch(batch.x, model(batch.x).argmax(1), batch.ids)


class Constant(nn.Module):
    """Test model that returns the same logits for every input."""

    def __init__(self, logits: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("logits", torch.tensor(logits, dtype=torch.float64))
        self.logits: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Return the constant logits for each input, with a gradient of zero with respect to the input."""
        return self.logits.to(x.dtype).expand(len(x), -1) + 0 * x.flatten(1).sum(1, keepdim=True)


class Gradientless(nn.Module):
    """Test model whose outputs have no gradient, like those of a network with a `no_grad` decorator."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the network, detached from the inputs."""
        logits: Tensor = self.net(x.detach())
        return logits.detach()


class NaNBeyond(nn.Module):
    """Test model that returns NaN for inputs farther than `reach` from the inputs `clean`, and otherwise the logits of
    a network.
    """

    def __init__(self, net: nn.Module, clean: Tensor, reach: float) -> None:
        super().__init__()
        self.net, self.reach = net, reach
        self.register_buffer("clean", clean)
        self.clean: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the network for inputs near the clean inputs, and NaN for all others."""
        distance = torch.cdist(x.detach().flatten(1), self.clean.flatten(1)).amin(1)
        logits: Tensor = self.net(x)
        return torch.where(distance[:, None] > self.reach, torch.nan, logits)
