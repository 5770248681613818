"""A model as a worker opens it, and its test before it serves."""

from dataclasses import dataclass

import torch

from holdfast.core.errors import TargetError
from holdfast.core.model import Classifier
from holdfast.guard.protocol import NoRules, RequestGuard

_PROBES = 8
"""number of inputs on which a model is tested before it serves"""


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model that a worker has opened."""

    model: Classifier
    digest: str = ""
    """SHA-256 of the model with its settings; empty for the network of a pool, and for an upstream server"""
    guard_digest: str | None = None
    """digest that a calibration of a guard must name; None if any calibration is accepted"""


def no_rules(model: str | None) -> RequestGuard:
    """Return the guard without rules."""
    return NoRules()


def refuse_damaged(model: Classifier, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise `TargetError` for a model with parameters that are NaN, or without any finite score for random inputs of
    this shape. Costs 8 forward passes of one input.
    """
    names = [name for name, value in model.named_parameters() if bool(value.isnan().any())]
    if names:
        raise TargetError(
            f"{len(names)} parameters of the model contain NaN, such as {names[0]}; restore its file"
        )
    x = torch.rand(_PROBES, *shape, generator=torch.Generator().manual_seed(0))
    low, high = model.bounds.like(x)
    x = low + x * (high - low) if bool((high - low).isfinite().all()) else model.bounds.clamp(x)
    with torch.inference_mode():  # one by one, because a file may accept batches of one input only
        finite = [bool(model(row.to(device)).isfinite().any()) for row in torch.split(x, 1)]
    if not any(finite):
        raise TargetError(
            f"all scores of the model for {_PROBES} random inputs are NaN or infinite; restore its file, or correct "
            "bounds, mean and std"
        )
