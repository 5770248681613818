"""Tests whether the tensors of a parameter set are plausible for its architecture, before the set is assessed.

The distance between parameters does not predict whether attacks transfer. It is only used to order candidates and to
detect duplicates.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from holdfast.core.estimate import Estimate
from holdfast.rotation import Members
from holdfast.rotation.distances import l1
from holdfast.rotation.steps.admission_gates import GateResult

_SIGMAS = 3.0  # standard deviations: few sets that were trained in the same way are beyond
_LEAST_SPREAD = 0.25  # share of the mean norm: half an epoch of immunisation changes biases by a third of it
_LEAST_SIZE = 1e-3  # norm for each parameter, for biases that are still close to zero
_SAME = 1e-6  # share of the mean absolute parameter, for rounding errors


def nonfinite_tensors(weights: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tensors of a parameter set with infinite or NaN values where the original network has finite
    values.
    """
    return [
        name for name, value in weights.items() if bool((~value.isfinite() & like[name].isfinite()).any())
    ]


def tensor_gate(
    weights: Mapping[str, Tensor],
    known: Sequence[Mapping[str, Tensor]],
    names: Sequence[str],
    *,
    trained_alike: bool,
) -> GateResult:
    """Return the result of the gate that tests the values of a new set's tensors.

    It passes if all values are finite and, for a set that was trained in the same way as the known sets
    (`trained_alike`), each norm is within three standard deviations of their norms.
    """
    bound = "all values finite"
    if trained_alike:
        bound += f", norms within {_SIGMAS:g} standard deviations of those of {len(known)} sets trained in the same way"
    broken = nonfinite_tensors(weights, known[0])
    if broken:
        return GateResult("tensors", None, bound, "fail", f"{broken[0]} contains values that are not finite")
    if not trained_alike:
        return GateResult("tensors", None, bound, "pass", "all values are finite")
    worst, where = max((_sigmas(name, weights, known), name) for name in names)
    estimate = Estimate(worst, worst, worst, len(known))
    reason = f"the norm of {where} differs by {worst:.1f} standard deviations"
    return GateResult("tensors", estimate, bound, "pass" if worst <= _SIGMAS else "fail", reason)


def _sigmas(name: str, weights: Mapping[str, Tensor], known: Sequence[Mapping[str, Tensor]]) -> float:
    norms = torch.stack([weights_of_set[name].double().norm() for weights_of_set in known])
    mean = float(norms.mean())
    spread = float(norms.std()) if len(norms) > 1 else 0.0
    # Sets of few runs have nearly equal norms; without a least spread, rounding would be several standard deviations.
    least_spread = max(_LEAST_SPREAD * mean, _LEAST_SIZE * math.sqrt(weights[name].numel()))
    return abs(float(weights[name].double().norm()) - mean) / max(spread, least_spread)


def distance(
    weights: Mapping[str, Tensor], exposed: Mapping[str, Mapping[str, Tensor]], names: Sequence[str]
) -> tuple[float, str]:
    """Return the mean absolute difference between the parameters of a set and those of the nearest stolen set, and the
    name of the stolen set.

    The difference is 0 if values are not finite, and infinite if there is no stolen set.
    """
    if not exposed:
        return math.inf, ""
    if not all(bool(weights[name].isfinite().all()) for name in names):
        return 0.0, ""
    tested, stolen = _side_by_side([weights], names), _side_by_side([*exposed.values()], names)
    distances = l1(tested, stolen)[0]
    place = int(distances.argmin())
    return float(distances[place]), list(exposed)[place]


def duplicate_gate(
    weights: Mapping[str, Tensor], exposed: Mapping[str, Mapping[str, Tensor]], names: Sequence[str]
) -> GateResult | None:
    """Return a failed gate if a parameter set is equal to a stolen set up to rounding, or None for any other set."""
    difference, name = distance(weights, exposed, names)
    size = sum(float(weights[tensor_name].abs().sum()) for tensor_name in names) / sum(
        weights[tensor_name].numel() for tensor_name in names
    )
    if not exposed or difference > _SAME * size:
        return None
    estimate = Estimate(difference, difference, difference, len(exposed))
    return GateResult(
        "distance",
        estimate,
        "different from every stolen set",
        "fail",
        f"it equals the stolen set {name}",
    )


def _side_by_side(sets: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> Members:
    return Members.of([{name: weights[name] for name in names} for weights in sets], range(len(sets)))
