"""Provers of tests, which need no traced graph: they know that the network is a stack of linear layers and ReLUs."""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch

from holdfast.certifiers.protocol import Proofs
from holdfast.core.draws import Draws


@dataclass(frozen=True)
class Interval:
    """Interval bounds. With `shrink` below 1 the box is too small, so that certificates are wrong."""

    name: ClassVar[str] = "interval"
    shrink: float = 1.0

    def ready(self, model, sample, threat):
        READIED.append(self.name)
        return partial(self.proofs, model, threat.constraint.eps * self.shrink)

    def proofs(self, model, eps, batch):
        low, high = (batch.x - eps).clamp(0, 1).flatten(1), (batch.x + eps).clamp(0, 1).flatten(1)
        layers = [layer for layer in model.net if not isinstance(layer, torch.nn.Flatten)]
        for layer in layers[:-1]:
            if isinstance(layer, torch.nn.Linear):
                low, high = interval(layer.weight, layer.bias, low, high)
            else:
                low, high = low.relu(), high.relu()
        last = layers[-1]
        weight = last.weight[batch.y][:, None] - last.weight
        bias = last.bias[batch.y][:, None] - last.bias
        bound = (weight.clamp_min(0) @ low[..., None] + weight.clamp_max(0) @ high[..., None])[..., 0] + bias
        bound = bound.scatter(1, batch.y[:, None], torch.inf).amin(1)
        return replace(Proofs.none(batch), certified=bound > 0, bound=bound, work=torch.ones_like(batch.ids))


def interval(weight, bias, low, high):
    positive, negative = weight.clamp_min(0), weight.clamp_max(0)
    return low @ positive.T + high @ negative.T + bias, high @ positive.T + low @ negative.T + bias


@dataclass(frozen=True)
class Corners:
    """Counterexamples among random corners of the box; it certifies nothing."""

    name: ClassVar[str] = "corners"
    tries: int = 64
    stops: bool = True

    def ready(self, model, sample, threat):
        READIED.append(self.name)
        return partial(self.proofs, model, threat.constraint.eps)

    def proofs(self, model, eps, batch):
        best, found = batch.x.clone(), torch.zeros_like(batch.ids, dtype=torch.bool)
        for k in range(self.tries):
            signs = Draws(0).at("corner", k).uniform(batch.ids, *batch.x.shape[1:], dtype=batch.x.dtype) - 0.5
            x = (batch.x + eps * signs.sign()).clamp(0, 1)
            with torch.no_grad():
                wrong = (model(x).argmax(1) != batch.y) & ~found
            best[wrong], found = x[wrong], found | wrong
        return replace(Proofs.none(batch), x_adv=best, broken=found, stopped=~found & self.stops)


READIED: list[str] = []
"""Names of the provers that were prepared, in order."""
