"""Proved upper bounds of local Lipschitz constants: interval bounds of the gradients of functions of the logits.

The Jacobian of a network is propagated backwards with an interval for each entry: a linear operation maps the centre by
its transpose and the radius by the transpose of its magnitudes, and an activation multiplies by the interval of its
slopes over the bounds of its input. On a convex region, the largest dual norm of a gradient is a Lipschitz constant.
Weng et al., "Towards Fast Computation of Certified Robustness for ReLU Networks", ICML 2018, arXiv:1804.09699
(Fast-Lip); Zhang, Zhang & Hsieh, "RecurJac: An Efficient Recursive Algorithm for Bounding Jacobian Matrix of Neural
Networks and Its Applications", AAAI 2019, arXiv:1810.11783. Differs: the bounds of values are those of CROWN, and the
smooth activations are covered by the Lipschitz constants of their slopes.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from holdfast.certifiers.bounds import operations
from holdfast.certifiers.bounds.graph import Relaxation, gamma
from holdfast.core.constraints import L1, L2, Linf

_CELLS = 32
"""number of parts of an interval in which the slope of a smooth function is bounded"""


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

    For other activations than those of the package, the bounds are those of the slopes of secants of their linear
    bounds, which do not exist: `TypeError` is raised.
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
            raise TypeError(f"no bounds of the slopes of {type(operation).__name__} are known")


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
