"""Geometry of the decision boundary around single examples: certified distances beside those of attacks, local
Lipschitz constants, and slices of the boundary.
"""

import math
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from holdfast.attacks import DDN, FMN
from holdfast.certifiers.bounds.lipschitz import PreparedLipschitz
from holdfast.certifiers.bounds.tracing import traced
from holdfast.certifiers.distances import certified_distance, lipschitz_from_above, lipschitz_from_below
from holdfast.certifiers.protocol import Prover
from holdfast.certifiers.provers import Crown
from holdfast.certifiers.slices import beside, boundary_slices
from holdfast.core.batch import Batch
from holdfast.core.constraints import L1, L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.evidence import Table
from holdfast.core.meter import margin
from holdfast.core.model import Classifier
from holdfast.core.remedies import Remedy
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Inputs, Labels, PerExample

CROWN = Crown()
SIDE = 41
"""number of points of a slice in each direction; the middle one is the clean input"""
REACH = 2.0
"""half of the width of a slice, as a multiple of the distance to the adversarial example"""
SAMPLES = 64
"""number of gradients from which a Lipschitz constant is estimated from below"""
STEPS = 100
"""number of steps of the attacks that search for the smallest change"""


@dataclass(frozen=True)
class _Proved:
    """What is proved about each example: the distance, and the Lipschitz constant in the ball."""

    distance: PerExample
    constant: PerExample


@dataclass(frozen=True)
class BoundaryGeometry:
    """The geometry of the decision boundary around the first `n` examples, as a part of a run."""

    n: int
    prover: Prover = CROWN

    def __call__(self, model: Classifier, batch: Batch, threat: ThreatModel, seed: int) -> Table:
        """Return the geometry around the examples of a batch, see `boundary_geometry`."""
        return boundary_geometry(model, batch, threat, seed, prover=self.prover)


def boundary_geometry(
    model: Classifier, batch: Batch, threat: ThreatModel, seed: int, *, prover: Prover = CROWN
) -> Table:
    """Return the geometry of the decision boundary around the examples of a batch, as a table of the evidence with one
    row for each.

    Columns: `id`, `y`, `prediction`; `rival`, the most likely class other than the label, and `margin`, the logit of
    the label minus that of the rival; `lower`, a certified lower bound of the distance to the nearest misclassified
    input, by bisection with `prover`, and `upper`, the distance of the nearest adversarial example that attacks found
    (inf if there is none; both are 0 if the clean input is misclassified); `radius`, the eps of the threat model or,
    without an eps, `upper`; `lipschitz_below` and `lipschitz_above`, an estimate from below and a proved upper bound of
    the Lipschitz constant of the margin over the rival in the ball of that radius; `slice_attacks` and `slice_random`
    (n, 41, 41), predicted classes in the plane of the changes of two attacks, and in that of the first change and a
    random direction orthogonal to it, where class k outside of the bounds is -1 - k. Distances and Lipschitz constants
    are in the norm of the threat.

    Under L2 the bounds by the Lipschitz constants of the layers are used where they are better. If there are no sound
    bounds for an operation of the model, `lower` and `lipschitz_above` are NaN. Raises `UsageError` for a threat that
    is no ball of Linf, L2 or L1, or that has a target.
    """
    norm = threat.constraint
    if not isinstance(norm, Linf | L2 | L1) or threat.goal is not None:
        raise UsageError(
            f"the geometry is that of balls of linf, l2 and l1 without a target class; the threat model is {norm}, "
            f"goal={threat.goal}",
            Remedy("geometry"),
            Remedy("threat", replace(threat, goal=None).with_change("linf:8/255")),
        )
    model = model.eval()
    rng = Draws(seed).at("geometry")
    with torch.no_grad():
        logits = model(batch.x)
    rivals = logits.scatter(1, batch.y[:, None], -torch.inf).argmax(1)
    first, second, upper = _attacked(model, batch, norm, rng)
    radius = torch.full_like(upper, norm.eps) if norm.eps < torch.inf else upper
    radius = radius.where(radius < torch.inf, 0.0)
    proved = _proved(model, batch, norm, prover, upper, radius, rivals)
    below = lipschitz_from_below(model, batch, norm, radius, rivals, samples=SAMPLES, rng=rng.at("lipschitz"))
    across = first - batch.x
    random = rng.at("slice").normal(batch.ids, *batch.x.shape[1:], dtype=batch.x.dtype)
    slices = [
        boundary_slices(
            model, batch.x, across, beside(across, other), bounds=model.bounds, side=SIDE, reach=REACH
        )
        for other in (second - batch.x, random)
    ]
    columns = {
        "id": batch.ids,
        "y": batch.y,
        "prediction": logits.argmax(1),
        "rival": rivals,
        "margin": margin(logits, batch).double(),
        "lower": proved.distance,
        "upper": upper,
        "radius": radius,
        "lipschitz_below": below,
        "lipschitz_above": proved.constant,
        "slice_attacks": slices[0],
        "slice_random": slices[1],
    }
    return Table("example", {name: values.detach().cpu() for name, values in columns.items()})


def _attacked(
    model: Classifier, batch: Batch, norm: Linf | L2 | L1, rng: Draws
) -> tuple[Inputs, Inputs, PerExample]:
    """The nearest adversarial example of two attacks, another one, and the distance of the first, for each example.

    Under L2 the attacks are FMN and DDN; otherwise the second one is FMN towards the class after the rival.
    """
    free = ThreatModel(type(norm)())
    first = FMN(steps=STEPS)(model, batch, free, rng=rng.at("fmn"))
    second = _towards_third(model, batch, free, rng.at("third"))
    if isinstance(norm, L2):
        other = DDN(steps=STEPS)(model, batch, free, rng=rng.at("ddn"))
        nearer = _distance(model, batch, norm, other) < _distance(model, batch, norm, first)
        first = torch.where(nearer.view(-1, *(1,) * (first.dim() - 1)), other, first)
    upper = _distance(model, batch, norm, first)
    by_second = _distance(model, batch, norm, second)
    closer = (by_second < upper).view(-1, *(1,) * (first.dim() - 1))
    first, second = torch.where(closer, second, first), torch.where(closer, first, second)
    return first, second, torch.minimum(upper, by_second)


def _towards_third(model: Classifier, batch: Batch, free: ThreatModel, rng: Draws) -> Inputs:
    """Adversarial examples of the second most likely class other than the label; of the rival if there are two classes
    only.
    """
    with torch.no_grad():
        others = model(batch.x).scatter(1, batch.y[:, None], -torch.inf)
    order = others.argsort(dim=1, descending=True)
    third = order[:, 1] if others.shape[1] > 2 else order[:, 0]
    x_adv = batch.x.clone()
    for goal in third.unique().tolist():
        rows = (third == goal).nonzero()[:, 0]
        part = batch.take(rows).towards(third[rows])
        aimed = ThreatModel(free.constraint, goal=int(goal))
        x_adv[rows] = FMN(steps=STEPS)(model, part, aimed, rng=rng)
    return x_adv


def _distance(model: Classifier, batch: Batch, norm: Linf | L2 | L1, x_adv: Inputs) -> PerExample:
    """Distance of adversarial examples in float64, infinity for inputs that the model classifies correctly, and 0 where
    it misclassifies the clean input.
    """
    with torch.no_grad():
        wrong = ~(margin(model(x_adv), batch) > 0)
        clean_wrong = ~(margin(model(batch.x), batch) > 0)
    distance = norm.distance(x_adv.double(), batch.x.double())
    return torch.where(clean_wrong, 0.0, torch.where(wrong, distance, torch.inf))


def _proved(
    model: Classifier,
    batch: Batch,
    norm: Linf | L2 | L1,
    prover: Prover,
    upper: PerExample,
    radius: PerExample,
    rivals: Labels,
) -> _Proved:
    most = torch.where(upper < torch.inf, upper, _extent(norm, batch, model))
    found: list[_Proved] = []
    with suppress(UsageError):  # an operation without sound bounds
        graph = traced(model, batch.x)
        distance = certified_distance(prover, model, batch, norm, most)
        found.append(_Proved(distance, lipschitz_from_above(graph, model, batch, norm, radius, rivals)))
    if isinstance(norm, L2):
        with suppress(UsageError):
            layers = PreparedLipschitz.of(model, batch, ThreatModel(norm))
            constants = layers.bounds.margins[batch.y.cpu(), rivals.cpu()]
            found.append(_Proved(layers.radii(batch).cpu(), constants))
    if not found:
        unknown = torch.full((len(batch),), math.nan, dtype=torch.float64)
        return _Proved(unknown, unknown)
    return _Proved(
        torch.stack([each.distance for each in found]).amax(0),
        torch.stack([each.constant for each in found]).amin(0),
    )


def _extent(norm: Linf | L2 | L1, batch: Batch, model: Classifier) -> Tensor:
    low, high = model.bounds.like(batch.x.double())
    corner = torch.zeros_like(batch.x, dtype=torch.float64)
    return norm.distance(corner + high, corner + low)
