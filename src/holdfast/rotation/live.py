"""A parameter set on its way into service: built beside the one that serves, and asked the canaries before it does."""

import hashlib
import re
import secrets
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from holdfast.core.errors import Inconclusive, TargetError
from holdfast.core.estimate import Estimate
from holdfast.core.model import Classifier, Model, refuse_lazy
from holdfast.core.types import Inputs, Labels, Logits
from holdfast.ops.statistics import proportion
from holdfast.rotation.members import Weights, refuse_foreign

CANARIES = 256
"""Inputs that a set answers before it serves, unless others are given."""

_CLEAR = 2**-7
"""lead of a class, as a share of the largest logit, that no rounding takes: bfloat16 keeps 8 bits"""
_AT_ONCE = 64  # canaries of one forward, so that requests get their turn
_KNOWN = re.compile(r"([0-9a-f]{64})(?:/(\d+(?:,\d+)*))?")


@dataclass(frozen=True, eq=False)
class Live:
    """The set that is to serve, as whoever keeps the sets gives it."""

    name: str
    epoch: int
    """how many sets have served so far, this one included: what tells one time of service from another"""
    weights: Weights
    """state dict of the network: parameters, and buffers such as the statistics of batch norm"""
    canary: str
    """what `canary` said of it when it was admitted"""


def loaded(model: Classifier, weights: Weights, name: str) -> Classifier:
    """A frozen copy of the model in eval mode, with those weights for its own.

    `TargetError` where the set `name` has tensors, shapes or types that the network lacks, lacks some itself, or holds
    a value that is no finite number. Neither the model nor the weights are touched.
    """
    refuse_foreign(weights, _state(model), f"set {name!r}")
    copied = deepcopy(model).eval().requires_grad_(False)
    assert isinstance(copied.net, nn.Module)
    taken = {value.data_ptr() for value in _state(model).values() if value.numel()}
    if any(value.data_ptr() in taken for value in _state(copied).values()):
        raise TargetError(
            "a copy of the model shares its weights, so a swap would change what serves; let its __deepcopy__ copy them"
        )
    copied.net.load_state_dict(weights)
    for wanted, value in _state(copied).items():
        if not torch.equal(value, weights[wanted].to(value.device)):
            raise TargetError(
                f"set {name!r} gives {wanted} values that the network did not keep: it shares that tensor with another "
                f"name, for which the set gives others; write the set from the state dict of one network"
            )
    return copied


def _state(model: Classifier) -> dict[str, Tensor]:
    """What a set must hold; `TargetError` where the model has nothing that can be swapped."""
    state = model.net.state_dict() if isinstance(model.net, nn.Module) else {}
    if not state:
        raise TargetError("the model has no parameters to swap; give a network, as in net.py:make")
    refuse_lazy(model)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TargetError(
                f"{name} of the model is a {type(value).__name__}, and a set holds tensors alone; keep what "
                f"get_extra_state returns in buffers, with register_buffer"
            )
    return dict(state)


def canary(model: Model, x: Inputs) -> str:
    """What a set is known by: SHA-256 of the classes that it gives the canaries `x`, in hex.

    Of classes, for logits differ between machines in their last digits, while weights that were damaged or taken for
    others show in what they predict. Canaries whose best two classes rounding might exchange are left out, and their
    places named after a slash: `5f…c0/17,203`. `TargetError` where that is more than half of them.
    """
    logits = _logits(model, x)
    best = logits.topk(2, 1).values
    close = (best[:, 0] - best[:, 1] <= _CLEAR * logits.abs().amax(1)).nonzero()[:, 0].tolist()
    if 2 * len(close) > len(x):
        raise TargetError(
            f"the set decides {len(x) - len(close)} of {len(x)} canaries clearly, and half of them were expected; give "
            f"inputs like those that it was trained on"
        )
    left_out = f"/{','.join(map(str, close))}" if close else ""
    return _digest(logits.argmax(1), close) + left_out


def refuse_strange(model: Model, x: Inputs, known: str, name: str) -> None:
    """`TargetError` where a set answers the canaries otherwise than when `known` was said of it."""
    found = _KNOWN.fullmatch(known)
    if found is None:
        raise TargetError(
            f"set {name!r} comes with the canary {known!r}; expected 64 hex digits, as rotation.canary gives them"
        )
    close = [int(place) for place in (found[2] or "").split(",") if place]
    if 2 * len(close) > len(x):
        raise TargetError(
            f"set {name!r} comes with a canary that leaves {len(close)} of {len(x)} inputs out, and at most half were "
            f"expected; admit the set again"
        )
    digest = _digest(_logits(model, x).argmax(1), close)
    if digest != found[1]:
        raise TargetError(
            f"set {name!r} answers the {len(x)} canaries by classes of digest {digest[:12]}…, where {found[1][:12]}… "
            f"was expected: its weights, the canaries or the preprocessing are not those that it was admitted with. "
            f"Bring those back, or admit the set again"
        )


@torch.no_grad()
def _logits(model: Model, x: Inputs) -> Logits:
    logits = torch.cat([model(some) for some in torch.split(x, _AT_ONCE)])
    broken = ~logits.isfinite().all(1)
    if broken.any():
        raise TargetError(
            f"{int(broken.sum())} of {len(x)} canaries are answered by NaN or infinity, where finite logits were "
            f"expected; leave the set out"
        )
    return logits


def _digest(classes: Labels, left_out: Sequence[int]) -> str:
    apart = set(left_out)
    said = ",".join(str(k) for place, k in enumerate(classes.tolist()) if place not in apart)
    return hashlib.sha256(said.encode()).hexdigest()


def next_set(waiting: Sequence[str]) -> str:
    """One of the admitted sets that wait, drawn by the operating system: no seed of a run foretells it."""
    if not waiting:
        raise Inconclusive(
            "no admitted set waits to be swapped in, so the one that serves goes on; draw and admit more"
        )
    return secrets.choice(waiting)


@torch.no_grad()
def churn(one: Model, other: Model, x: Inputs) -> Estimate:
    """Share of inputs whose predicted class is not the same with both sets; covers at least 95 %."""
    return proportion(
        torch.cat([one(some).argmax(1) != other(some).argmax(1) for some in torch.split(x, _AT_ONCE)])
    )
