"""Preparation of a parameter set for serving: it is loaded into a copy of the model and tested on fixed inputs, the
canaries.
"""

import hashlib
import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from holdfast.core.errors import TargetError
from holdfast.core.estimate import Estimate
from holdfast.core.model import Classifier, Model, refuse_lazy
from holdfast.core.names import kind_of
from holdfast.core.types import Inputs, Labels, Logits
from holdfast.rotation.parameter_sets import Weights, refuse_foreign
from holdfast.statistics.intervals import proportion

CANARIES = 256
"""default number of canary inputs on which a parameter set is tested before it serves"""

_CLEAR = 2**-7
"""smallest difference of the two largest logits, relative to the largest absolute logit, that rounding cannot
reverse: bfloat16 has a precision of 8 bits"""
_AT_ONCE = 64  # canaries in one forward pass, small so that requests are not delayed
_KNOWN = re.compile(r"([0-9a-f]{64})(?:/(\d+(?:,\d+)*))?")  # digest of the classes, / and inputs left out


@dataclass(frozen=True, eq=False)
class Live:
    """The parameter set that should serve, with its name, the number of sets that have served so far, and the
    fingerprint of its predictions.
    """

    name: str
    epoch: int
    """number of sets that have served so far, including this one; it increases with each swap"""
    weights: Weights
    """state dict of the network: parameters, and buffers such as the statistics of batch norm"""
    canary: str
    """return value of `canary` for this set at its admission"""


def loaded(model: Classifier, weights: Weights, name: str) -> Classifier:
    """Return a frozen copy of the model in eval mode with the parameters and buffers of a set.

    Raises `TargetError` if the set `name` does not have exactly the tensors of the network, in shape and type, or if
    it contains a value that is not finite. Neither the model nor the weights are changed.
    """
    refuse_foreign(weights, _state(model), f"set {name!r}")
    copied = deepcopy(model).eval().requires_grad_(False)
    assert isinstance(copied.net, nn.Module)
    # by address, since a copy that shares storage is still another tensor object
    addresses = {value.data_ptr() for value in _state(model).values() if value.numel()}
    if any(value.data_ptr() in addresses for value in _state(copied).values()):
        raise TargetError(
            "a copy of the model shares its weights, so a swap would change the serving model; let its "
            "__deepcopy__ copy them"
        )
    copied.net.load_state_dict(weights)
    for tensor_name, value in _state(copied).items():
        if not torch.equal(value, weights[tensor_name].to(value.device)):
            raise TargetError(
                f"set {name!r} contains values of {tensor_name} that the network did not keep: the network shares "
                "that tensor with another name, for which the set contains other values; write the set from the state "
                "dict of one network"
            )
    return copied


def _state(model: Classifier) -> dict[str, Tensor]:
    """Tensors that a set must have. Raises `TargetError` if the model has none, or state that is not a tensor."""
    state = model.net.state_dict() if isinstance(model.net, nn.Module) else {}
    if not state:
        raise TargetError("the model has no parameters to swap; give a network, as in net.py:make")
    refuse_lazy(model)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TargetError(
                f"{name} of the model is {kind_of(value)}, but a set contains tensors only; store the "
                "result of get_extra_state in buffers, with register_buffer"
            )
    return dict(state)


def canary(model: Model, x: Inputs) -> str:
    """Return a fingerprint of a parameter set: the SHA-256, in hex, of the classes that it predicts for the fixed
    inputs `x`.

    Classes are used because logits differ between machines in their last digits, while damaged or wrong parameters
    change predictions. Canaries whose two largest logits are too close for rounding are excluded, and their indices
    follow a slash: `5f…c0/17,203`. Raises `TargetError` if more than half of them are excluded.
    """
    logits = _logits(model, x)
    largest = logits.topk(2, 1).values
    close = (largest[:, 0] - largest[:, 1] <= _CLEAR * logits.abs().amax(1)).nonzero()[:, 0].tolist()
    if 2 * len(close) > len(x):
        raise TargetError(
            f"the set classifies {len(x) - len(close)} of {len(x)} canary inputs clearly; at least half of them "
            "were expected; give inputs similar to those of its training"
        )
    suffix = f"/{','.join(map(str, close))}" if close else ""
    return _digest(logits.argmax(1), close) + suffix


def refuse_strange(model: Model, x: Inputs, stored: str, name: str) -> None:
    """Raise `TargetError` if the classes that a parameter set predicts for fixed inputs do not match its stored
    fingerprint `stored`.
    """
    fingerprint = _KNOWN.fullmatch(stored)
    if fingerprint is None:
        raise TargetError(
            f"set {name!r} has the canary {stored!r}; expected 64 hex digits, as rotation.canary returns them"
        )
    close = [int(place) for place in (fingerprint[2] or "").split(",") if place]
    if 2 * len(close) > len(x):
        raise TargetError(
            f"set {name!r} has a canary that excludes {len(close)} of {len(x)} inputs; at most half were expected; "
            "admit the set again"
        )
    digest = _digest(_logits(model, x).argmax(1), close)
    if digest != fingerprint[1]:
        raise TargetError(
            f"the classes that set {name!r} predicts for the {len(x)} canary inputs have the digest "
            f"{digest[:12]}…, but {fingerprint[1][:12]}… was expected: its weights, the canary inputs or the "
            "preprocessing are not those of its admission. Restore those, or admit the set again"
        )


@torch.no_grad()
def _logits(model: Model, x: Inputs) -> Logits:
    logits = torch.cat([model(part) for part in torch.split(x, _AT_ONCE)])
    broken = ~logits.isfinite().all(1)
    if broken.any():
        raise TargetError(
            f"the logits of {int(broken.sum())} of {len(x)} canary inputs are NaN or infinite; finite logits were "
            "expected; leave the set out"
        )
    return logits


def _digest(classes: Labels, excluded: Sequence[int]) -> str:
    excluded_set = set(excluded)
    text = ",".join(str(k) for place, k in enumerate(classes.tolist()) if place not in excluded_set)
    return hashlib.sha256(text.encode()).hexdigest()


@torch.no_grad()
def churn(first: Model, second: Model, x: Inputs) -> Estimate:
    """Return the fraction of inputs for which two models predict different classes, with an interval of at least 95 %
    coverage.
    """
    return proportion(
        torch.cat([first(part).argmax(1) != second(part).argmax(1) for part in torch.split(x, _AT_ONCE)])
    )
