"""How much the output of a generator changes with its input, what a part of the audit is, and attacks on functions of a
generator.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from holdfast.audits.finding import Finding, Picture, Table, in_unit_range
from holdfast.core.batch import Batch
from holdfast.core.constraints import L2
from holdfast.core.draws import Draws
from holdfast.core.errors import TargetError
from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Columns
from holdfast.core.model import Bounds
from holdfast.core.types import Inputs, Labels, PerExample, Positive, Restarts, Steps
from holdfast.io.models.generators import OpenedGenerator
from holdfast.reports.words import percent
from holdfast.runs.store.columns import Form, whole
from holdfast.statistics.intervals import Support, mean
from holdfast.statistics.repeats import nearest_example

Function = Callable[[Tensor], Tensor]
UNBOUNDED = Bounds(-math.inf, math.inf)
"""bounds of latent vectors"""


@dataclass(frozen=True)
class Search:
    """PGD that maximises any function of each row."""

    steps: Steps = 20
    restarts: Restarts = 2
    step_size: Positive = 8.0
    """first step size as a multiple of the radius; with it, PGD on a linear decoder converges like power iteration"""

    def __call__(
        self,
        value: Function,
        x: Inputs,
        radius: Tensor,
        bounds: Bounds,
        rng: Draws,
        start: Inputs | None = None,
    ) -> Inputs:
        """Return, for each row of `x`, the valid point within the Euclidean `radius` (n) that was found to have the
        largest `value`, a function that returns one number for each row (n). The search begins at random points of the
        boundary of the ball, and at first at `start` if it is given. Cost: `restarts` times `steps` backward passes.
        """
        best, best_value = x.clone(), torch.full_like(radius, -math.inf)
        for restart in range(self.restarts):
            given = start if restart == 0 else None
            point = perturbed(x, radius, bounds, rng.at("restart", restart)) if given is None else given
            point = L2().within(point, x, bounds, radius)
            for step in range(self.steps + 1):
                point = point.detach().requires_grad_()
                with torch.enable_grad():
                    found = value(point)
                    (slope,) = torch.autograd.grad(found.sum(), point)
                better = found.detach() > best_value
                best[better], best_value[better] = point.detach()[better], found.detach()[better]
                size = self.step_size * (1 + math.cos(math.pi * step / self.steps)) / 2
                moved = point.detach() + _rows(size * radius, x) * L2().steepest(slope, x, bounds)
                point = L2().within(moved, x, bounds, radius)
        return best


SEARCH = Search()
"""search with the usual settings"""


def perturbed(x: Inputs, radius: Tensor, bounds: Bounds, rng: Draws) -> Inputs:
    """Return each row moved by `radius` (n) in a random direction, clipped to the bounds."""
    noise = rng.normal(torch.arange(len(x), device=x.device), *x.shape[1:], dtype=x.dtype)
    moved = x + _rows(radius, x) * L2().steepest(noise, x, bounds)
    return L2().within(moved, x, bounds, radius)


def distances(a: Tensor, b: Tensor) -> PerExample:
    """Return the Euclidean distance of the rows of two tensors (n, *features)."""
    found: PerExample = torch.linalg.vector_norm((a - b).flatten(1), dim=1)
    return found


def squared(a: Tensor, b: Tensor) -> PerExample:
    """Return the squared Euclidean distance of the rows, whose gradient is defined everywhere."""
    return (a - b).flatten(1).square().sum(1)


def latent_radius(z: Tensor, eps: float) -> Tensor:
    """Return the radius (n) of changes of latent vectors of a root mean square of `eps`: eps times the square root of
    the number of elements.
    """
    return torch.full((len(z),), eps * math.sqrt(z[0].numel()), dtype=z.dtype, device=z.device)


def worst_latents(
    decode: Function,
    z: Tensor,
    eps: float,
    rng: Draws,
    direction: Tensor | None = None,
    search: Search = SEARCH,
) -> Tensor:
    """Return latent vectors (n, *latent) within `latent_radius` of `z` that change the output of `decode` most, as the
    Euclidean distance |decode(z + d) - decode(z)|. The first restart begins in a `direction` (*latent) of length 1 if
    it is given.
    """
    with torch.no_grad():
        before = decode(z)
    radius = latent_radius(z, eps)
    start = None if direction is None else z + _rows(radius, z) * direction
    return search(lambda points: squared(decode(points), before), z, radius, UNBOUNDED, rng, start)


def sensitive_directions(
    decode: Function, z: Tensor, count: int, rng: Draws, iterations: int = 10
) -> tuple[Tensor, PerExample]:
    """Return the `count` orthonormal directions (count, *latent) to which the output is most sensitive, in descending
    order, and their gains (count): the root mean square, over the rows of `z`, of the change of the output for each
    unit of a small change in the direction.

    They are the eigenvectors of the mean of the products of the transposed Jacobian with itself, by orthogonal
    iteration; for a linear decoder, the right singular vectors and singular values of its matrix. Cost: one forward
    pass, and about two backward passes for each direction, in each iteration.
    """
    size = z[0].numel()
    count = min(count, size)
    basis = rng.normal(torch.arange(count, device=z.device), size, dtype=z.dtype).T
    basis = torch.linalg.qr(basis).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(_product(decode, z, basis)).Q
    product = _product(decode, z, basis)
    # the eigenvectors inside the subspace, in descending order
    small = basis.T @ product
    values, rotation = torch.linalg.eigh((small + small.T) / 2)
    directions = (basis @ rotation).flip(1).T
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    directions = directions * torch.where(largest < 0, -1, 1)  # an eigenvector has no sign
    return directions.view(count, *z.shape[1:]), values.flip(0).clamp_min(0).sqrt()


def _product(decode: Function, z: Tensor, basis: Tensor) -> Tensor:
    """The mean over the rows of the transposed Jacobian times the Jacobian, times each column of a basis."""
    z, columns = z.detach().requires_grad_(), []
    with torch.enable_grad():
        output = decode(z)
        # the product of the transposed Jacobian with weights is linear in them; its derivative is the Jacobian
        weights = torch.zeros_like(output, requires_grad=True)
        (pulled,) = torch.autograd.grad(output, z, weights, create_graph=True)
    for column in basis.T:
        direction = column.view(1, *z.shape[1:]).expand_as(z)
        (change,) = torch.autograd.grad(pulled, weights, direction, retain_graph=True)
        (product,) = torch.autograd.grad(output, z, change, retain_graph=True)
        columns.append(product.flatten(1).mean(0))
    return torch.stack(columns, 1)


def _rows(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.dim() - 1))


@dataclass(frozen=True)
class Context:
    """What a part may look at."""

    samples: Tensor
    """samples of the generator (n, *features), in the space of the training examples"""
    training: Batch
    held_out: Batch
    generator: OpenedGenerator | None
    """None for a file of samples"""
    device: torch.device
    rng: Draws
    """random numbers of the part"""


def shown(estimate: Estimate) -> tuple[str, str]:
    """Return the texts of an estimate and of its interval for a table."""
    return f"{estimate.value:.3g}", f"{estimate.low:.3g} to {estimate.high:.3g}"


def share_and_range(estimate: Estimate) -> tuple[str, str]:
    """Return the texts of the estimate of a share and of its interval for a table."""
    return percent(estimate.value), f"{percent(estimate.low)} to {percent(estimate.high)}"


class Part(Protocol):
    """Protocol of a part of the audit."""

    @property
    def name(self) -> str:
        """Name of the stage of the run."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics of the finding."""

    @property
    def title(self) -> str:
        """What the part measures, for the table of the parts that do not apply."""

    def missing(self, context: Context) -> str:
        """Return what the generator or the data lack, as in `decode(z)`; empty if the part applies."""

    def measure(self, context: Context) -> Columns:
        """Measure, and return the columns that are stored. The column `id` numbers the rows."""

    def forms(self) -> Mapping[str, Form]:
        """Return the forms of the columns from which the finding is computed."""

    def concluded(self, columns: Columns) -> Finding:
        """Return the finding of stored columns. Its verdict is `flagged` if the part alone suffices to flag the
        generator, and `unclear` if its measurement is not enough to decide. Its headline is a clause that follows that
        of the audit, or empty. It computes nothing that takes long.
        """

    def images(self, columns: Columns, context: Context) -> Mapping[str, Tensor]:
        """Return the images of the pictures of the finding by name, in the range of the training examples."""


ROWS = 50
"""largest number of latent vectors or examples that are attacked, so that an audit takes seconds"""
_LEAST = 8  # latent vectors, so that there is an interval
_DIRECTIONS = 3
_OFFSETS = (-2.0, -1.0, 0.0, 1.0, 2.0)
"""positions of the pictures of a direction, in standard deviations of an element of the latent vector"""
_OTHERS = 9  # other conditions of each latent vector, so that many classes do not take long
_FEATURES = 5
_LOWER = "The worst change of the output was found by a search with gradients. A better search may find a larger one."


@dataclass(frozen=True)
class LatentChange:
    """Part of the audit: changes of the latent vector and of the condition."""

    eps: float
    """root mean square of the change of the elements of a latent vector, whose standard deviation is 1"""
    condition: int | None = None
    """class of all samples; None for all classes in turn"""
    work: float = 2e9
    """floating-point operations of decoding the latent vectors once, from which their number follows: a diffusion model
    has hundreds of times as many as a GAN"""
    name: str = "sensitivity"
    title: str = "change of the latent vector"
    metrics: tuple[str, ...] = ("latent_sensitivity",)

    def missing(self, context: Context) -> str:
        """Return the ability that the generator lacks."""
        if missing := lacking(context, ("decode", "latent_shape"), "decode(z)"):
            return missing
        generator = opened(context)
        z = torch.zeros(2, *generator.latent_shape, device=generator.device)
        return without_gradients("decode(z)", decoder(context, _conditions(generator, 2, self.condition)), z)

    def measure(self, context: Context) -> Columns:
        """Search for the worst changes of random latent vectors, and for the directions."""
        generator, rng = opened(context), context.rng
        z = rng.at("latent").normal(torch.arange(ROWS), *generator.latent_shape).to(generator.device)
        conditions = _conditions(generator, ROWS, self.condition)
        decode = decoder(context, conditions)
        z = z[: _affordable(decode, z, self.work)]
        directions, gains = sensitive_directions(
            decode, z[: max(2, len(z) // 10)], _DIRECTIONS, rng.at("directions")
        )
        worst = worst_latents(decode, z, self.eps, rng.at("worst"), directions[0])
        noise = perturbed(z, latent_radius(z, self.eps), UNBOUNDED, rng.at("noise"))
        offsets = z.new_tensor(_OFFSETS).view(1, -1, *[1] * (z.dim() - 1))
        same = None if conditions is None else conditions[:1].expand(len(_OFFSETS))
        with torch.no_grad():
            before, after, noisy = decode(z), decode(worst), decode(noise)
            along = torch.stack(
                [decoder(context, same)(row) for row in z[:1] + offsets * directions[:, None]]
            )
        change = distances(after, before)
        largest = int(change.argmax())
        columns = {
            "latent": change,
            "latent_random": distances(noisy, before),
            "sample": distances(before, before.roll(1, 0)),
            "gains": gains,
            "random_gain": (noisy - before).square().sum().div(len(z)).sqrt()[None]
            / latent_radius(z, self.eps)[:1],
            "along": along,
            "nearest": torch.stack(
                [nearest_example(row[[0, -1]].cpu(), context.training.x.cpu())[1] for row in along]
            ),
            "shown": torch.stack((before[largest], after[largest])),
            "moved": torch.stack([(x - before).abs().mean(0) for x in (after, noisy)]),
            **_condition_changes(context, z, conditions, before),
        }
        return {"id": torch.arange(len(z)), **{key: value.cpu() for key, value in columns.items()}}

    def forms(self) -> Mapping[str, Form]:
        """Return the forms of the changes of the outputs and of the directions."""
        changes = {name: Form(rows=(1, ROWS), low=0) for name in ("latent", "latent_random", "sample")}
        condition = {
            name: Form(rows=(1, ROWS), low=0, optional=True) for name in ("condition", "condition_random")
        }
        gains = Form(("directions",), rows=(1, _DIRECTIONS))
        nearest = whole("directions", 2)
        return {
            **changes, **condition, "gains": gains, "random_gain": Form((1,)), "nearest": nearest,
            "moved": Form((2,), further=True),
        }  # fmt: skip

    def images(self, columns: Columns, context: Context) -> Mapping[str, Tensor]:
        """Return the samples along each direction with the training examples nearest to its ends, and the sample that
        changes most, before and after, with the mean change of each pixel.
        """
        x = context.training.x
        found = {
            f"direction-{k}": torch.cat((along, x[nearest.to(x.device)].to(along)))
            for k, (along, nearest) in enumerate(zip(columns["along"], columns["nearest"], strict=True))
        }
        low, high = float(x.min()), float(x.max())
        moved = columns["moved"].mean(2, keepdim=True).expand_as(columns["moved"])
        scaled = low + (high - low) * moved / moved.max().clamp_min(1e-12)
        return as_images({**found, "moved": torch.cat((columns["shown"], scaled))}, context)

    def concluded(self, columns: Columns) -> Finding:
        """Return the mean worst change, and what explains it."""
        names = ("latent", "latent_random", "condition", "condition_random", "sample")
        found = {name: positive_mean(columns[name]) for name in names if name in columns}
        facts = {name: estimate.value for name, estimate in found.items()}
        rows = [
            (f"{name} change", *shown(found[name]), *shown(found[f"{name}_random"]))
            for name in ("latent", "condition")
            if name in found
        ]
        rows.append(("new sample", "–", "–", *shown(found["sample"])))
        table = Table(
            "Sensitivity",
            ("outputs differ by", "worst", "interval", "random", "interval"),
            rows,
            f"Mean Euclidean distance between the outputs of {found['sample'].n} latent vectors before and after a "
            f"change. The elements of a latent vector change by a root mean square of {self.eps:g}. A worst condition "
            "is the other class that changes the output most, and a random one is the next class.",
        )
        return Finding(
            "not flagged",
            f"a latent change of {self.eps:g} changes the output by {facts['latent']:.3g} "
            f"(random: {facts['latent_random']:.3g}, new sample: {facts['sample']:.3g})",
            facts={**facts, "eps": self.eps, "gains": columns["gains"].tolist()},
            metrics={"latent_sensitivity": found["latent"]},
            tables=(table, *_explaining(columns)),
            pictures=(*_directions(columns), _MOVED),
            limits=(_LOWER,),
        )


def opened(context: Context) -> OpenedGenerator:
    """Return the generator of a part that applies."""
    assert context.generator is not None  # `missing` of the part states it otherwise
    return context.generator


def lacking(context: Context, names: tuple[str, ...], shown_as: str) -> str:
    """Return the first of the abilities that the generator lacks; for a file of samples, `shown_as`."""
    return shown_as if context.generator is None else context.generator.lacks(*names)


def decoder(context: Context, conditions: Labels | None) -> Function:
    """Return the decoder as a function of latent vectors (n, *latent), the first n of which have the `conditions`, to
    samples in the space of the training examples. Raises `TargetError` if it returns another shape.
    """
    generator, shape = opened(context), context.training.example_shape

    def decode(z: Tensor) -> Tensor:
        given = () if conditions is None else (conditions[: len(z)],)
        found = generator.call("decode", z, *given)
        if found[0].numel() != torch.Size(shape).numel():
            raise TargetError(
                f"decode(z) of {generator.name} returned samples of shape {tuple(found.shape[1:])}, and training "
                f"examples have {shape}; the same shape was expected"
            )
        return found.reshape(len(z), *shape)

    return decode


def without_gradients(name: str, function: Function, given: Tensor) -> str:
    """Return what is missing if the output of a function does not depend on its input in a differentiable way."""
    given = given.detach().requires_grad_()
    with torch.enable_grad():
        found = function(given)
        if found.requires_grad and torch.autograd.grad(found.sum(), given, allow_unused=True)[0] is not None:
            return ""
    return f"gradients of {name}"


def positive_mean(values: PerExample) -> Estimate:
    """Return the mean of values of at least 0 with its interval."""
    return mean(values, support=Support(0.0))


def as_images(found: Mapping[str, Tensor], context: Context) -> dict[str, Tensor]:
    """Return samples by the names of pictures, scaled by the range of the training examples."""
    low, high = float(context.training.x.min()), float(context.training.x.max())
    return {name: in_unit_range(samples, low, high) for name, samples in found.items()}


def _affordable(decode: Function, z: Tensor, work: float) -> int:
    """The number of latent vectors that are attacked, which is smaller for a decoder of many operations."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        decode(z[:1])
    return int(min(ROWS, max(_LEAST, work / max(counter.get_total_flops(), 1))))


def _conditions(generator: OpenedGenerator, n: int, condition: int | None) -> Labels | None:
    """The classes (n) with which latent vectors are decoded: one class, or all in turn."""
    if generator.classes is None:
        return None
    turns = torch.arange(n, device=generator.device) % generator.classes
    return turns if condition is None else torch.full_like(turns, condition)


def _condition_changes(
    context: Context, z: Tensor, conditions: Labels | None, before: Tensor
) -> dict[str, Tensor]:
    """The change of the output for the worst of the other classes, and for the next class."""
    classes = opened(context).classes or 1
    if conditions is None or classes < 2:
        return {}
    with torch.no_grad():
        others = [(conditions[: len(z)] + k) % classes for k in range(1, min(classes, _OTHERS + 1))]
        changes = torch.stack([distances(decoder(context, other)(z), before) for other in others])
    return {"condition": changes.amax(0), "condition_random": changes[0]}


def _directions(columns: Columns) -> list[Picture]:
    """The samples along each direction, and the training examples nearest to its ends."""
    found = list[Picture]()
    for k, (nearest, gain) in enumerate(
        zip(columns["nearest"].tolist(), columns["gains"].tolist(), strict=True)
    ):
        captions = [f"latent vector moved by {offset:+g}" for offset in _OFFSETS]
        captions += [
            f"training example nearest to the {end}, row {row}"
            for end, row in zip(("first", "last"), nearest, strict=True)
        ]
        title = f"Sensitive latent direction {k + 1}: the output changes by {gain:.3g} for each unit"
        found.append(Picture(f"direction-{k}", title, captions))
    return found


_MOVED = Picture(
    "moved",
    "The part of the output that changes with the latent vector",
    (
        "sample that changes most",
        "after the worst change of its latent vector",
        "mean change of each pixel, worst changes",
        "mean change of each pixel, random changes, on the same scale",
    ),
)


def _explaining(columns: Columns) -> tuple[Table, ...]:
    """The gains of the directions, and for other examples than images the features that change most."""
    random = f"{columns['random_gain'].item():.3g}"
    gains = [(k + 1, f"{gain:.3g}", random) for k, gain in enumerate(columns["gains"].tolist())]
    note = (
        "Root mean square of the change of the output for each unit of a small change in a latent direction."
    )
    table = Table(
        "Most sensitive latent directions", ("direction", "change", "random direction"), gains, note
    )
    if columns["moved"].dim() != 2:
        return (table,)
    worst, noise = columns["moved"]
    most = worst.argsort(descending=True, stable=True)[:_FEATURES].tolist()
    moving = [(row, f"{float(worst[row]):.3g}", f"{float(noise[row]):.3g}") for row in most]
    note = "Mean absolute change of a feature, counted from 0, for worst and random changes of the latent vector."
    headings = ("feature", "worst change", "random change")
    return (table, Table("Features that change most", headings, moving, note))
