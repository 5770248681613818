"""A mix of an accurate and a robust network, which is robust where the robust network is confident.

MixedNUTS: Bai, Zhou, Patel & Sojoudi, "MixedNUTS: Training-Free Accuracy-Robustness Balance via Nonlinearly Mixed
Classifiers", TMLR 2024, arXiv:2402.02263. The logits of the robust network pass layer norm, a shift, a GELU, a power
and a scale, which increases its margin where it is confident, and the probabilities of both networks are averaged.
Differs from the paper: the parameters are searched on a grid (`fitted`), and the logarithm of the average is
computed from logarithms, so that gradients do not vanish in rounding.
"""

import math
from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.core.errors import TargetError, UsageError
from holdfast.core.types import Inputs, Labels, Logits
from holdfast.io.models.ensembles import outputs_of

_TINY = 1e-6  # keeps the gradient of a power finite at zero
_SCALES, _POWERS, _SHIFTS = (
    (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0),
    (1.0, 2.0, 3.0, 4.0),
    (-1.5, -1.0, -0.5, 0.0),
)


class Mixture(nn.Module):
    """Network that averages the probabilities of an accurate network and those of the transformed logits of a robust
    one. It returns the logarithm of the average.
    """

    def __init__(
        self,
        accurate: nn.Module,
        robust: nn.Module,
        *,
        weight: float = 0.8,
        scale: float = 0.5,
        power: float = 3.0,
        shift: float = 0.0,
        names: Sequence[str] = (),
    ) -> None:
        super().__init__()
        for name, value, valid, expected in (
            ("weight", weight, 0 < weight < 1, "a number between 0 and 1, the weight of the robust network"),
            ("scale", scale, 0 < scale < math.inf, "a positive number"),
            ("power", power, 1 <= power < math.inf, "a number of at least 1"),
            ("shift", shift, abs(shift) < math.inf, "a finite number"),
        ):
            if not valid:
                raise UsageError(f"{name} of the mix is {value}; expected {expected}")
        self.members = nn.ModuleList((accurate, robust))
        self.weight, self.scale, self.power, self.shift = weight, scale, power, shift
        self.names = tuple(names)

    @property
    def parameters_of_mix(self) -> dict[str, float]:
        """The parameters of the mix by name."""
        return {"weight": self.weight, "scale": self.scale, "power": self.power, "shift": self.shift}

    def forward(self, x: Inputs) -> Tensor:
        """Return the logarithms of the mixed probabilities (n, classes)."""
        accurate, robust = outputs_of(self.members, x, names=self.names)
        if robust.shape[1] < 3:
            raise TargetError(
                f"the members of the mix have {robust.shape[1]} classes; expected at least 3, because the layer norm "
                "of two logits contains no confidence; give an ensemble of both networks"
            )
        robust = transformed(robust, self.scale, self.power, self.shift)
        return torch.logaddexp(
            accurate.log_softmax(1) + math.log1p(-self.weight), robust.log_softmax(1) + math.log(self.weight)
        )


def transformed(logits: Logits, scale: float, power: float, shift: float) -> Logits:
    """Return the logits (n, classes) of a robust network after layer norm, shift, GELU, power and scale. The order of
    classes above the smallest value of the GELU does not change.
    """
    activated = F.gelu(F.layer_norm(logits, logits.shape[1:]) + shift)
    powered: Logits = scale * activated.sign() * (activated.abs() + _TINY) ** power
    return powered


def fitted(clean: Logits, attacked: Logits, y: Labels, *, kept: float = 0.985) -> dict[str, float]:
    """Return the parameters of a mix from the logits (n, classes) of the robust network on `clean` and on `attacked`
    inputs with the labels `y`, which are no test examples.

    Where the accurate network is sure of a wrong class, the mix still returns the class of the robust network if the
    margin of this class among the transformed probabilities is at least (1 - weight) / weight. For each transformation
    of a grid, the weight is such that this is true of the share `kept` of the attacked inputs that the robust network
    classifies correctly. Of these transformations, the one is returned for which it is true of the fewest clean inputs that the
    robust network classifies wrongly, where the accurate one shall decide. Raises `UsageError` if the robust network
    classifies all clean inputs correctly, or no attacked one.
    """
    chosen = clean.argmax(1)
    wrong, robust = chosen != y, attacked.argmax(1) == y
    if not wrong.any() or not robust.any():
        raise UsageError(
            f"the robust network classifies {int(robust.sum())} of {len(y)} attacked inputs correctly and "
            f"{int(wrong.sum())} clean ones wrongly; at least one of each was expected to fit a mix"
        )
    best, parameters = math.inf, dict[str, float]()
    for scale, power, shift in product(_SCALES, _POWERS, _SHIFTS):
        won, lost = (
            _margins(transformed(logits, scale, power, shift), classes)
            for logits, classes in ((attacked[robust], y[robust]), (clean[wrong], chosen[wrong]))
        )
        threshold = float(won.quantile(1 - kept))
        overruled = float((lost >= threshold).double().mean())
        if 0 < threshold < 1 and overruled < best:
            best = overruled
            parameters = {"weight": 1 / (1 + threshold), "scale": scale, "power": power, "shift": shift}
    if not parameters:
        raise UsageError(
            "no transformation of the robust network's logits has a margin between 0 and 1 on attacked inputs; give "
            "more attacked inputs, or a robust network with other logits"
        )
    return parameters


def _margins(logits: Logits, classes: Labels) -> Tensor:
    """Return the probability of the class of each example minus the largest one of another class. It is negative where
    a transformation has changed the order of the classes.
    """
    probabilities = logits.softmax(1)
    own = probabilities.gather(1, classes[:, None])
    others = probabilities.scatter(1, classes[:, None], -1.0).amax(1)
    difference: Tensor = own[:, 0] - others
    return difference
