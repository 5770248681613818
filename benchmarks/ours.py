"""Our side of a measurement: what a user's `assess` with a list of attacks runs, on tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from holdfast.attacks.protocol import Attack
from holdfast.attacks.suites import suite
from holdfast.core.batch import Batch
from holdfast.core.constraints import L0, L1, L2, Constraint, Linf
from holdfast.core.evidence import Evidence
from holdfast.core.model import Classifier, Model
from holdfast.core.threat import ThreatModel
from holdfast.runs.harness.measure import measure, measure_plan
from holdfast.runs.harness.plan import Plan
from holdfast.runs.harness.stage import Member

NORMS: dict[str, type[Linf] | type[L2] | type[L1] | type[L0]] = {"Linf": Linf, "L2": L2, "L1": L1, "L0": L0}


def constraint(norm: str, eps: float | None) -> Constraint:
    """The ball of that norm; without eps, only its distance is asked."""
    return NORMS[norm](torch.inf if eps is None else eps)


def batch(x: Tensor, y: Tensor) -> Batch:
    """All examples with their rows as ids."""
    return Batch(x, y, torch.arange(len(x)))


def assessed(
    net: nn.Module, x: Tensor, y: Tensor, attacks: Sequence[Attack], norm: str, eps: float | None, *,
    seed: int = 0, queries: int | None = None, size: int = 256, surrogates: tuple[Model, ...] = (),
) -> Evidence:  # fmt: skip
    """The evidence of a list of attacks with the free doubts, exactly as the harness gathers it."""
    threat = ThreatModel(constraint(norm, eps), queries=queries, surrogates=surrogates)
    return measure(Classifier(net), [batch(x, y)], attacks, threat, seed=seed, batch_size=size)


def robust_accuracy(evidence: Evidence) -> float:
    """Share of all examples that are right both clean and attacked."""
    return (evidence["correct"] & ~evidence["success"]).double().mean().item()


def distance(evidence: Evidence, norm: str) -> Tensor:
    """Of each example: 0 where it is wrong when clean, inf where nothing was found."""
    return evidence[f"distance_{norm.lower()}"]


def median_distance(evidence: Evidence, norm: str) -> float:
    """Median over all examples with inf kept; the lower of the two middle ones, as torch's own median."""
    return distance(evidence, norm).double().quantile(0.5, interpolation="lower").item()


def by_suite(
    net: nn.Module, x: Tensor, y: Tensor, name: str, norm: str, eps: float, *, seed: int = 0, size: int = 256
) -> Evidence:
    """The evidence of a named suite, waves and all, without the fixed pass and the doubts of a run."""
    composed = suite(name, constraint(norm, eps))
    members = tuple(map(Member.of, composed.specs))
    plan = Plan(members, ThreatModel(constraint(norm, eps)), seed)
    return measure_plan(Classifier(net), [batch(x, y)], plan, batch_size=size)
