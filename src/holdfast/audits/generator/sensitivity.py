"""How much the output of a generator changes for a small change of its latent vector or its condition, the latent
directions to which the output is most sensitive, and the part of the output that changes.

The worst change is searched for by PGD (`holdfast.attacks.parts.generators`), and is a lower bound on the largest one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.attacks.parts.generators import (
    UNBOUNDED,
    Function,
    distances,
    latent_radius,
    perturbed,
    sensitive_directions,
    worst_latents,
)
from holdfast.audits.finding import Picture, Table, in_unit_range
from holdfast.audits.generator.parts import Context, PartFinding
from holdfast.core.errors import TargetError
from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Columns
from holdfast.core.types import Labels, PerExample
from holdfast.io.models.generators import OpenedGenerator
from holdfast.statistics.intervals import Support, mean
from holdfast.statistics.nearest import nearest_example

ROWS = 100
"""number of latent vectors or examples that are attacked, so that an audit takes seconds"""
_DIRECTIONS, _FEW = 3, 10  # directions of the report, and latent vectors from which they are computed
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
    """class of all samples; None for random classes"""
    name: str = "sensitivity"
    title: str = "change of the latent vector"

    def missing(self, context: Context) -> str:
        """Return the ability that the generator lacks."""
        if context.generator is None:
            return "decode(z)"
        if lacking := context.generator.lacks("decode", "latent_shape"):
            return lacking
        z = torch.zeros(2, *context.generator.latent_shape, device=context.generator.device)
        conditions = _conditions(context.generator, 2, self.condition)
        return without_gradients("decode(z)", decoder(context, conditions), z)

    def measure(self, context: Context) -> Columns:
        """Search for the worst changes of random latent vectors, and for the directions."""
        generator = context.generator
        assert generator is not None  # as `missing` states
        ids, rng = torch.arange(ROWS), context.rng
        z = rng.at("latent").normal(ids, *generator.latent_shape).to(generator.device)
        conditions = _conditions(generator, ROWS, self.condition)
        decode = decoder(context, conditions)
        directions, gains = sensitive_directions(decode, z[:_FEW], _DIRECTIONS, rng.at("directions"))
        worst = worst_latents(decode, z, self.eps, rng.at("worst"), directions[0])
        noise = perturbed(z, latent_radius(z, self.eps), UNBOUNDED, rng.at("noise"))
        offsets = z.new_tensor(_OFFSETS).view(1, -1, *[1] * (z.dim() - 1))
        path = z[:1] + offsets * directions[:, None]
        with torch.no_grad():
            before, after, noisy = decode(z), decode(worst), decode(noise)
            along = torch.stack([decoder(context, _same(conditions, row))(row) for row in path])
        change = distances(after, before)
        largest = int(change.argmax())
        columns = {
            "change": change,
            "noise": distances(noisy, before),
            "apart": distances(before, before.roll(1, 0)),
            "radius": latent_radius(z, self.eps),
            "gains": gains,
            "along": along,
            "shown": torch.stack((before[largest], after[largest])),
            "moved": torch.stack([(x - before).abs().mean(0) for x in (after, noisy)]),
            **_condition_changes(context, z, conditions, before),
        }
        return {"id": ids, **{key: value.cpu() for key, value in columns.items()}}

    def concluded(self, columns: Columns, context: Context) -> PartFinding:
        """Return the mean worst change, and what explains it."""
        worst, noise = positive_mean(columns["change"]), positive_mean(columns["noise"])
        apart = positive_mean(columns["apart"])
        rows = [
            ("latent vector", *shown(worst), *shown(noise)),
            ("new latent vector", "–", "–", *shown(apart)),
        ]
        facts = {"eps": self.eps, "worst": worst.value, "random": noise.value, "new_latent": apart.value}
        if "other" in columns:
            other, single = positive_mean(columns["other"]), positive_mean(columns["single"])
            rows.append(("condition", *shown(other), *shown(single)))
            facts |= {"condition": other.value, "single_condition": single.value}
        table = Table(
            "Sensitivity",
            ("change of", "worst", "interval", "random", "interval"),
            rows,
            f"Mean Euclidean distance between the outputs of {ROWS} latent vectors before and after a change. The "
            f"elements of a latent vector change by a root mean square of {self.eps:g}. A worst condition is the other "
            "class that changes the output most, and a random one is the next class.",
        )
        pictures, tables = _explained(columns, context)
        return PartFinding(
            headline=f"a latent change of {self.eps:g} changes the output by {worst.value:.3g} "
            f"(random: {noise.value:.3g}, new latent vector: {apart.value:.3g})",
            facts={**facts, "gains": columns["gains"].tolist()},
            metrics={"latent_sensitivity": worst},
            tables=(table, *tables),
            pictures=pictures,
            limits=(_LOWER,),
        )


def decoder(context: Context, conditions: Labels | None) -> Function:
    """Return the decoder as a function of latent vectors (n, *latent), the first n of which have the `conditions`, to
    samples in the space of the training examples. Raises `TargetError` if it returns another shape.
    """
    generator, shape = context.generator, context.training.example_shape
    assert generator is not None

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
    with torch.enable_grad():
        found = function(given.detach().requires_grad_())
    return "" if found.requires_grad else f"gradients of {name}"


def positive_mean(values: PerExample) -> Estimate:
    """Return the mean of values of at least 0 with its interval."""
    return mean(values, support=Support(0.0))


def shown(estimate: Estimate) -> tuple[str, str]:
    """Return the texts of an estimate and of its interval for a table."""
    return f"{estimate.value:.3g}", f"{estimate.low:.3g} to {estimate.high:.3g}"


def is_image(context: Context) -> bool:
    """Return whether the examples are images, which a report can show."""
    shape = context.training.example_shape
    return len(shape) == 3 and shape[0] in (1, 3)


def visible(images: Tensor, context: Context) -> Tensor:
    """Return images with the range of the training examples scaled to 0 to 1."""
    return in_unit_range(images, float(context.training.x.min()), float(context.training.x.max()))


def _conditions(generator: OpenedGenerator, n: int, condition: int | None) -> Labels | None:
    """The classes (n) with which latent vectors are decoded: one class, or all in turn."""
    if generator.classes is None:
        return None
    turns = torch.arange(n, device=generator.device) % generator.classes
    return turns if condition is None else torch.full_like(turns, condition)


def _same(conditions: Labels | None, like: Tensor) -> Labels | None:
    return None if conditions is None else conditions[:1].expand(len(like))


def _condition_changes(
    context: Context, z: Tensor, conditions: Labels | None, before: Tensor
) -> dict[str, Tensor]:
    """The change of the output for the worst of the other classes, and for the next class."""
    assert context.generator is not None
    classes = context.generator.classes or 1
    if conditions is None or classes < 2:
        return {}
    with torch.no_grad():
        changes = torch.stack(
            [
                distances(decoder(context, (conditions + k) % classes)(z), before)
                for k in range(1, min(classes, _OTHERS + 1))
            ]
        )
    return {"other": changes.amax(0), "single": changes[0]}


def _explained(columns: Columns, context: Context) -> tuple[tuple[Picture, ...], tuple[Table, ...]]:
    """The directions and the moving part of the output: pictures of images, and tables of other examples."""
    gains = columns["gains"]
    random = float(columns["noise"].square().mean().sqrt() / columns["radius"][0])
    if is_image(context):
        along = [_direction(k, columns["along"][k], float(gains[k]), context) for k in range(len(gains))]
        return (*along, _heat(columns, context)), ()
    rows = [(k + 1, f"{float(gain):.3g}", f"{random:.3g}") for k, gain in enumerate(gains)]
    note = (
        "Root mean square of the change of the output for each unit of a small change in a latent direction."
    )
    worst, noise = columns["moved"].flatten(1)
    most = worst.argsort(descending=True, stable=True)[:_FEATURES].tolist()
    moving = [(row, f"{float(worst[row]):.3g}", f"{float(noise[row]):.3g}") for row in most]
    return (), (
        Table("Most sensitive latent directions", ("direction", "gain", "random direction"), rows, note),
        Table(
            "Features that change most",
            ("feature", "worst change", "random change"),
            moving,
            "Mean absolute change of a feature for the worst and for random changes of the latent vectors.",
        ),
    )


def _direction(k: int, along: Tensor, gain: float, context: Context) -> Picture:
    """The samples along a direction, and the training examples nearest to its ends."""
    _, nearest = nearest_example(along[[0, -1]], context.training.x)
    images = torch.cat((along, context.training.x[nearest].to(along)))
    captions = [f"latent vector moved by {offset:+g}" for offset in _OFFSETS]
    captions[_OFFSETS.index(0)] = "sample"
    captions += [
        f"training example nearest to {offset:+g}, row {int(row)}"
        for offset, row in zip((_OFFSETS[0], _OFFSETS[-1]), nearest, strict=True)
    ]
    title = f"Sensitive latent direction {k + 1}: the output changes by {gain:.3g} for each unit"
    return Picture(title, visible(images, context), captions)


def _heat(columns: Columns, context: Context) -> Picture:
    """The sample that changes most, before and after, and the mean change of each pixel."""
    moved = columns["moved"].mean(1, keepdim=True).expand_as(columns["moved"])
    moved = moved / moved.max().clamp_min(1e-12)
    return Picture(
        "The part of the output that changes with the latent vector",
        torch.cat((visible(columns["shown"], context), moved)),
        (
            "sample that changes most",
            "after the worst change of its latent vector",
            "mean change of each pixel, worst changes",
            "mean change of each pixel, random changes, on the same scale",
        ),
    )
