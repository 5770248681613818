"""Geometry of the decision boundary around an example, and proved upper bounds of local Lipschitz constants."""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from holdfast.attacks import DDN, FMN
from holdfast.certifiers.bounds import operations
from holdfast.certifiers.bounds.crown import relaxed
from holdfast.certifiers.bounds.graph import Graph, Relaxation, gamma, region_of
from holdfast.certifiers.bounds.lipschitz import PreparedLipschitz
from holdfast.certifiers.bounds.tracing import traced
from holdfast.certifiers.protocol import Prover
from holdfast.certifiers.provers import Crown, GraphProver, prepared_graph
from holdfast.core.batch import Batch, spread
from holdfast.core.constraints import L1, L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.errors import NoBounds, Remedy, UsageError
from holdfast.core.evidence import Table
from holdfast.core.meter import batch_size_for, margin
from holdfast.core.model import Bounds, Classifier, Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Inputs, Labels, PerExample

_CELLS = 32
"""number of parts of an interval in which the slope of a smooth function is bounded"""

WITH_SLOPES = operations.ReLU | operations.Piecewise | operations.Smooth | operations.MaxPool
"""nonlinear operations whose slopes are bounded"""


def local_lipschitz(relaxation: Relaxation, rows: Tensor, norm: Linf | L2 | L1) -> Tensor:
    """Return proved Lipschitz constants (n, k), over the region of a relaxation, of linear functions of the logits with
    the coefficients `rows` (n, k, classes).

    Distances of inputs are measured in `norm`. The computation is exact up to rounding, which is covered.
    """
    graph = relaxation.graph
    pending: dict[int, tuple[Tensor, Tensor]] = {graph.output: (rows, torch.zeros_like(rows))}
    for index in range(graph.output, 0, -1):
        if index not in pending:
            continue
        centre, radius = pending.pop(index)
        node = graph.node(index)
        shapes = [graph.shape_of(i) for i in node.inputs]
        if isinstance(node.operation, operations.Linear):
            back = _transposed(node.operation, centre, radius, shapes)
        else:
            if not isinstance(node.operation, WITH_SLOPES):
                where = f", at {node.place}" if node.place else ""
                raise NoBounds(f"no bounds of the slopes of {type(node.operation).__name__} are known{where}")
            bound = relaxation.bound(node.inputs[0])
            back = (_through(node.operation, centre, radius, bound, shapes[0]),)
        for i, (middle, width) in zip(node.inputs, back, strict=True):
            if i in pending:
                middle, width = middle + pending[i][0], width + pending[i][1]
            pending[i] = middle, width
    centre, radius = pending[0]
    sizes = (centre.abs() + radius).flatten(2)
    error = 1 + gamma(sizes.shape[2] + graph.output + 8, sizes.dtype)
    return dual_size(sizes, norm) * error


def dual_size(gradients: Tensor, norm: Linf | L2 | L1) -> Tensor:
    """Return the sizes (…) of gradients (…, features) in the dual of a norm of the inputs."""
    order = 1.0 if isinstance(norm, Linf) else 2.0 if isinstance(norm, L2) else torch.inf
    sizes: Tensor = torch.linalg.vector_norm(gradients, order, dim=-1)
    return sizes


_Centred = tuple[Tensor, Tensor]
"""centres and radii (n, k, *shape) of intervals"""


def _transposed(
    operation: operations.Linear, centre: Tensor, radius: Tensor, shapes: Sequence[torch.Size]
) -> tuple[_Centred, ...]:
    middles = operation.transposed(centre, shapes)
    # the rounding errors of the centres are a part of the radii
    widened = radius + gamma(operation.terms + 4, centre.dtype) * (centre.abs() + radius)
    flat = widened.flatten(0, 1)
    zeros = [flat.new_zeros(len(flat), *shape) for shape in shapes]
    pull = torch.func.vjp(operation.magnitude_bound, *zeros)[1]
    widths = [width.reshape(*radius.shape[:2], *width.shape[1:]) for width in pull(flat)]
    return tuple(zip(middles, widths, strict=True))


def _through(
    operation: operations.Activation | operations.MaxPool,
    centre: Tensor,
    radius: Tensor,
    x: operations.Interval,
    shape: torch.Size,
) -> _Centred:
    """Intervals of the coefficients before a nonlinear operation, from those after it."""
    if isinstance(operation, operations.MaxPool):
        return _before_maximum(operation, centre, radius, x, shape)
    least, most = (each[:, None] for each in slopes_over(operation, x))
    below, above = centre - radius, centre + radius
    products = torch.stack((below * least, below * most, above * least, above * most))
    low, high = products.amin(0), products.amax(0)
    middle = (low + high) / 2
    error = 4 * torch.finfo(low.dtype).eps * torch.maximum(low.abs(), high.abs())
    return middle, (high - low) / 2 + error


def _before_maximum(
    operation: operations.MaxPool, centre: Tensor, radius: Tensor, x: operations.Interval, shape: torch.Size
) -> _Centred:
    """A maximum is one of the values of its window: its slopes are between 0 and 1, and 0 for values that are smaller
    than another one over the whole region.
    """
    low, high = (operation.windows(each).masked_fill(operation.padding, -torch.inf) for each in x)
    possible = (high >= low.amax(-1, keepdim=True)).to(centre.dtype)[:, None]
    certain = possible * (possible.sum(-1, keepdim=True) == 1)
    below, above = (centre - radius)[..., None], (centre + radius)[..., None]
    smallest = torch.where(certain > 0, below, below.clamp(max=0)) * possible
    largest = torch.where(certain > 0, above, above.clamp(min=0)) * possible
    ends = []
    for entries in ((smallest + largest) / 2, (largest - smallest) / 2):
        flat = entries.flatten(0, 1)
        pull = torch.func.vjp(operation.windows, flat.new_zeros(len(flat), *shape))[1]
        ends.append(pull(flat)[0].reshape(*centre.shape[:2], *shape))
    middle, width = ends
    rounding = gamma(operation.padding.shape[-1] + 8, middle.dtype) * (middle.abs() + width)
    return middle, width + rounding


def slopes_over(operation: operations.Activation, x: operations.Interval) -> operations.Interval:
    """Return bounds (n, *shape) of the slopes of an activation over the given intervals of its input.

    Raises `NoBounds` for other activations.
    """
    low, high = x
    match operation:
        case operations.ReLU():
            return (low >= 0).to(low.dtype), (high > 0).to(low.dtype)
        case operations.Piecewise():
            return _piecewise_slopes(operation, low, high)
        case operations.Smooth():
            return _smooth_slopes(operation, low, high)
        case _:
            raise NoBounds(f"no bounds of the slopes of {type(operation).__name__} are known")


def _piecewise_slopes(operation: operations.Piecewise, low: Tensor, high: Tensor) -> operations.Interval:
    """All slopes if a point between two pieces is inside the interval, otherwise the one in its middle."""
    slope = _slope(operation, (low + high) / 2)
    kinked = torch.zeros_like(low, dtype=torch.bool)
    for point in operation.points:
        kinked |= (low <= point) & (point <= high)
    least, most = min(operation.slopes), max(operation.slopes)
    return torch.where(kinked, least, slope), torch.where(kinked, most, slope)


def _smooth_slopes(operation: operations.Smooth, low: Tensor, high: Tensor) -> operations.Interval:
    half = (high - low) / (2 * _CELLS)
    least = torch.full_like(low, torch.inf)
    most = -least
    for cell in range(_CELLS):
        slope = _slope(operation, low + (2 * cell + 1) * half)
        least, most = torch.minimum(least, slope), torch.maximum(most, slope)
    error = operation.curvature * half * (1 + 1e-6) + 64 * torch.finfo(low.dtype).eps
    return least - error, most + error


def _slope(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    with torch.enable_grad():
        point = at.detach().requires_grad_()
        (slope,) = torch.autograd.grad(function(point).sum(), point)
    return slope


def certified_distance(
    prover: Prover, model: Classifier, batch: Batch, norm: Linf | L2 | L1, most: PerExample, *, steps: int = 8
) -> PerExample:
    """Return for each example the largest radius, of those that a bisection tries, at which a prover certifies it: a
    lower bound of the distance to the decision boundary, in float64.

    `most` are radii at which the search begins, such as the distances at which an attack succeeds; the result is at
    most these. `steps` halvings leave a gap of 2^-steps of them to the largest radius that the prover can certify.
    Examples that are misclassified have the distance 0.
    """
    graph = prepared_graph(model, batch) if isinstance(prover, GraphProver) else None

    def certified(one: Batch, eps: float) -> bool:
        threat = ThreatModel(type(norm)(eps))
        if isinstance(prover, GraphProver) and graph is not None:  # one graph serves for every radius
            return bool(prover.on(graph, model, threat)(one).certified.all())
        return bool(prover.ready(model, one, threat)(one).certified.all())

    low, high = torch.zeros(len(batch), dtype=torch.float64), most.double().cpu().clone()
    with torch.no_grad():
        right = (model(batch.x).argmax(1) == batch.y).cpu()
    for row in range(len(batch)):
        one = batch.take(torch.tensor([row]))
        below, above = 0.0, float(high[row])
        if not right[row] or not 0 < above < torch.inf:
            continue
        for _ in range(steps):
            eps = (below + above) / 2
            below, above = (eps, above) if certified(one, eps) else (below, eps)
        low[row] = below
    return low


def lipschitz_from_above(
    graph: Graph, model: Classifier, batch: Batch, norm: Linf | L2 | L1, radius: PerExample, rivals: Labels
) -> PerExample:
    """Return for each example a proved Lipschitz constant of its margin over a rival class, on the ball of a radius
    around it, in float64. Distances are those of `norm`.
    """
    constants = torch.zeros(len(batch), dtype=torch.float64)
    graph = graph.to(torch.float64)
    with torch.no_grad():
        for row in range(len(batch)):
            one = batch.take(torch.tensor([row]))
            region = region_of(one.x.double(), type(norm)(float(radius[row])), model.bounds)
            functions = _margin(one.y, rivals[row : row + 1], graph.shape_of(graph.output)[0])
            constants[row] = local_lipschitz(relaxed(graph, region), functions.to(one.x.device), norm)[0, 0]
    return constants


def lipschitz_from_below(
    model: Classifier,
    batch: Batch,
    norm: Linf | L2 | L1,
    radius: PerExample,
    rivals: Labels,
    *,
    samples: int,
    rng: Draws,
) -> PerExample:
    """Return for each example the largest dual norm of the gradient of its margin over a rival class, at random points
    of the ball of a radius around it: a lower bound of the Lipschitz constant there, in float64.

    The clean input is one of the points. Weng et al., "Evaluating the Robustness of Neural Networks: An Extreme Value
    Theory Approach", ICLR 2018, arXiv:1801.10578 (CLEVER), extrapolate from such samples; the largest one is returned
    here without an extrapolation. Each sample costs one forward and one backward pass.
    """
    largest = torch.zeros(len(batch), dtype=torch.float64)
    balls = [
        (type(norm)(float(size)), one) for size, one in zip(radius.tolist(), batch.split(1), strict=True)
    ]
    for sample in range(samples):
        x = batch.x
        if sample and balls:
            draws = rng.at("sample", sample)
            x = torch.cat([ball.sample(one, model.bounds, draws) for ball, one in balls])
        point = x.detach().requires_grad_()
        with torch.enable_grad():
            logits = model(point)
            margins = logits.gather(1, batch.y[:, None]) - logits.gather(1, rivals[:, None])
            (gradient,) = torch.autograd.grad(margins.sum(), point)
        largest = torch.maximum(largest, dual_size(gradient.double().flatten(1), norm).cpu())
    return largest


def _margin(y: Labels, rivals: Labels, classes: int) -> Tensor:
    """The coefficients (n, 1, classes) of the margins of labels over rival classes."""
    rows = torch.zeros(len(y), 1, classes, dtype=torch.float64)
    rows[torch.arange(len(y)), 0, y.cpu()] = 1.0
    rows[torch.arange(len(y)), 0, rivals.cpu()] -= 1.0
    return rows


def beside(first: Inputs, second: Inputs) -> Inputs:
    """Return the part of each direction `second` (n, *features) that is orthogonal to `first`, in the Euclidean length
    of `first`.

    It is zero if the directions are parallel.
    """
    length = first.flatten(1).norm(dim=1)
    unit = first / spread(length.clamp_min(1e-12), first)
    rest = second - spread((second * unit).flatten(1).sum(1), second) * unit
    size = rest.flatten(1).norm(dim=1)
    parallel = size <= 1e-6 * second.flatten(1).norm(dim=1)
    scaled = rest * spread(length / size.clamp_min(1e-12), rest)
    return torch.where(spread(parallel, scaled), 0.0, scaled)


def boundary_slices(
    model: Model, x: Inputs, across: Inputs, up: Inputs, *, bounds: Bounds, side: int, reach: float
) -> Tensor:
    """Return the predicted classes (n, side, side) at points x + s * across + t * up, int16, for s and t from -reach to
    reach. A point outside the bounds at which class k is predicted has the number -1 - k.

    The first dimension of a grid is t, from `reach` downwards, and the second is s, as in a picture. `side` is odd, so
    that the middle of the grid is the input itself. Costs side^2 forward passes for each input.
    """
    steps = torch.linspace(-reach, reach, side, dtype=x.dtype, device=x.device)
    grids = []
    low, high = bounds.like(x)
    at_once = batch_size_for(x[:1].numel(), x.device.type)
    for place in range(len(x)):
        rows = []
        t, s = torch.meshgrid(steps.flip(0), steps, indexing="ij")
        for some_t, some_s in zip(
            torch.split(t.flatten(), at_once), torch.split(s.flatten(), at_once), strict=True
        ):
            shape = (-1, *(1,) * (x.dim() - 1))
            points = x[place] + some_s.view(shape) * across[place] + some_t.view(shape) * up[place]
            with torch.no_grad():
                predicted = model(points).argmax(1)
            inside = ((points >= low - 1e-6) & (points <= high + 1e-6)).flatten(1).all(1)
            rows.append(torch.where(inside, predicted, -1 - predicted))
        grids.append(torch.cat(rows).view(side, side).to(torch.int16).cpu())
    return torch.stack(grids) if grids else torch.zeros(0, side, side, dtype=torch.int16)


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
