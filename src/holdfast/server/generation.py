"""A generation of weights: what a worker serves, from its opening and its test to its retirement."""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import safetensors.torch
import torch
from torch import Tensor

from holdfast.core.errors import TargetError
from holdfast.core.model import Classifier
from holdfast.guard.decisions import NoRules, RequestGuard
from holdfast.server.messages import Prepare

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


State = Literal["prepared", "serving", "canary", "retired", "refused"]
"""`prepared`: opened and tested by a worker, or loaded by all; `serving`; `canary`: serving a share of the requests
beside the serving generation; `retired`: has served; `refused`: cannot serve, or died as a canary"""
NAME_DIGITS = 16
"""number of digits of the digest of a model that are its name in audit records"""


@dataclass(frozen=True)
class Candidate:
    """The model of a canary: the run that requests it, its file, and the digest that the worker must report."""

    run: str
    model: str
    digest: str


@dataclass(frozen=True, eq=False)
class PoolSet:
    """What the pool states about a parameter set, with its parameters."""

    weights: Mapping[str, Tensor] = field(repr=False)
    canary: str = ""
    """its fingerprint on the canary inputs"""
    recorded: bool = False
    """whether the ledger records already that it serves, because another process swapped"""
    unjudged: bool = False
    """whether it was not judged against all stolen sets, and replaces a stolen one"""


@dataclass(eq=False)
class Generation:
    """Weights that serve, have served or are to serve, under one name and number in the audit."""

    name: str
    epoch: int = 1
    """number of the generations that have served up to this one"""
    digest: str = ""
    """SHA-256 of the model with its settings; empty for a parameter set, and for a model without a file"""
    classes: int | None = None
    """number of classes; None before a worker has opened it"""
    why: str = ""
    state: State = "prepared"
    announced: bool = True
    """whether name and digest are known; otherwise the first worker that opens the file states them"""
    reason: str = ""
    """why it was refused"""
    candidate: Candidate | None = None
    """the model of a canary"""
    pooled: PoolSet | None = None
    """the parameter set of a pool"""

    @cached_property
    def prepare(self) -> bytes:
        """The message that sends the parameter set of a pool to a worker."""
        assert self.pooled is not None, "a parameter set of a pool"
        tensors = {name: value.contiguous() for name, value in self.pooled.weights.items()}
        return pickle.dumps(Prepare(self.name, self.epoch, safetensors.torch.save(tensors)))

    def fault(self, digest: str, classes: int) -> str:
        """Return why a worker must not serve the model that it has opened as this one, or an empty text."""
        if self.classes not in (None, classes):
            return (
                f"the file has a model with {classes} classes, and {self.classes} are served; start another server for "
                "it, as clients expect the outputs that the metadata state"
            )
        if digest != self.digest:
            return (
                f"the model that was opened has the digest {digest[:NAME_DIGITS]}, and {self.digest[:NAME_DIGITS]} "
                "serves: its file has changed, or its code returns another model each time; restore the file, or "
                "reload the model (SIGHUP)"
            )
        return ""
