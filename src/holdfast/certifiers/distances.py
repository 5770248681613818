"""Certified distances to the decision boundary, and local Lipschitz constants, of single examples."""

import torch
from torch import Tensor

from holdfast.certifiers.bounds.crown import relaxed
from holdfast.certifiers.bounds.graph import Graph
from holdfast.certifiers.bounds.jacobian import dual_size, local_lipschitz
from holdfast.certifiers.bounds.region import region_of
from holdfast.certifiers.protocol import Prover
from holdfast.certifiers.provers import GraphProver, prepared_graph
from holdfast.core.batch import Batch
from holdfast.core.constraints import L1, L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Labels, PerExample


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
