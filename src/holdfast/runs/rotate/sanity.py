"""Whether a set's numbers are like those of others of its architecture, before anything is measured.

Distance of weights is no distance for an attack: it orders candidates, and tells a set that is another one over again.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from holdfast.core.estimate import Estimate
from holdfast.rotation import Members
from holdfast.rotation.distances import l1
from holdfast.runs.rotate.ruling import Ruling

_SIGMAS = 3.0
_LEAST_SPREAD = 0.25  # of the mean norm: half an epoch against what leaked moves biases by a third of it
_LEAST_SIZE = 1e-3  # of the norm a number: biases that hardly left zero
_SAME = 1e-6  # of the mean size of a number: as far as rounding goes


def endless(weights: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that hold infinities, or no numbers, where the network itself has none: a mask may hold some."""
    return [
        name for name, value in weights.items() if bool((~value.isfinite() & like[name].isfinite()).any())
    ]


def tensors(
    weights: Mapping[str, Tensor], known: Sequence[Mapping[str, Tensor]], names: Sequence[str]
) -> Ruling:
    """All numbers finite, and the norm of each parameter within three deviations of those of sets that are known."""
    bound = f"all finite, norms within {_SIGMAS:g} deviations of {len(known)} sets trained as the pool says"
    broken = endless(weights, known[0])
    if broken:
        return Ruling("tensors", None, bound, "fail", f"{broken[0]} holds values that are not finite")
    worst, where = max((_sigmas(name, weights, known), name) for name in names)
    seen = Estimate(worst, worst, worst, len(known))
    why = f"the norm of {where} is {worst:.1f} deviations from theirs"
    return Ruling("tensors", seen, bound, "pass" if worst <= _SIGMAS else "fail", why)


def _sigmas(name: str, weights: Mapping[str, Tensor], known: Sequence[Mapping[str, Tensor]]) -> float:
    norms = torch.stack([one[name].double().norm() for one in known])
    mean = float(norms.mean())
    spread = float(norms.std()) if len(norms) > 1 else 0.0
    least = max(_LEAST_SPREAD * mean, _LEAST_SIZE * math.sqrt(weights[name].numel()))
    return abs(float(weights[name].double().norm()) - mean) / max(spread, least)


def distance(
    weights: Mapping[str, Tensor], exposed: Mapping[str, Mapping[str, Tensor]], names: Sequence[str]
) -> tuple[float, str]:
    """Mean absolute difference to the nearest exposed set, and its name; 0 for what is not finite."""
    if not exposed:
        return math.inf, ""
    if not all(bool(weights[name].isfinite().all()) for name in names):
        return 0.0, ""
    some, others = _side_by_side([weights], names), _side_by_side([*exposed.values()], names)
    found = l1(some, others)[0]
    place = int(found.argmin())
    return float(found[place]), list(exposed)[place]


def twin(
    weights: Mapping[str, Tensor], exposed: Mapping[str, Mapping[str, Tensor]], names: Sequence[str]
) -> Ruling | None:
    """The ruling on a set that is an exposed one but for rounding; None for any other."""
    apart, name = distance(weights, exposed, names)
    size = sum(float(weights[each].abs().sum()) for each in names) / sum(
        weights[each].numel() for each in names
    )
    if not exposed or apart > _SAME * size:
        return None
    seen = Estimate(apart, apart, apart, len(exposed))
    return Ruling(
        "distance",
        seen,
        "another set than any exposed one",
        "fail",
        f"it is {name} over again, which is exposed",
    )


def _side_by_side(sets: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> Members:
    return Members.of([{name: one[name] for name in names} for one in sets], range(len(sets)))
