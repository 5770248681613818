"""Adversarial inputs of the encoder and the discriminator of a generator.

Autoencoders: the latent attack of Kos, Fischer and Song, "Adversarial examples for generative models", 2018,
arXiv:1702.06832. The area under the distortion-distortion curve (AUDDC): Gondim-Ribeiro, Tabacof and Valle,
"Adversarial attacks on variational autoencoders", 2018, arXiv:1806.04646.

Differs from the papers: changes are projected to a Euclidean ball instead of penalised, and the curve is measured at
four sizes of the change.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.attacks.parts.generators import Function, Search, distances, perturbed, squared
from holdfast.audits.finding import Finding, Picture, Table
from holdfast.audits.generator.parts import Context, share_and_range, shown
from holdfast.audits.generator.sensitivity import (
    ROWS,
    as_images,
    decoder,
    lacking,
    opened,
    positive_mean,
    without_gradients,
)
from holdfast.core.evidence import Columns
from holdfast.core.model import Bounds
from holdfast.reports.numbers import percent
from holdfast.runs.store.columns import Form
from holdfast.statistics.intervals import proportion

_SIZES = (0.1, 0.2, 0.4, 0.7)  # of the curve, as shares of the distance of an example to its target
_TARGETED = 20
_LEAST = 0.05
"""share of the held-out examples whose scores count as generated"""
_KINDS = ("unchanged", "random", "worst")
_ATTACKED = "Adversarial inputs were searched for with gradients. A better search may find stronger ones."


@dataclass(frozen=True)
class Autoencoder:
    """Part of the audit: adversarial inputs whose reconstruction moves towards that of another example, or away."""

    eps: float
    """root mean square of the change of the features, as a multiple of the standard deviation of training examples"""
    name: str = "autoencoder"
    title: str = "adversarial inputs of the autoencoder"
    metrics: tuple[str, ...] = ()

    def missing(self, context: Context) -> str:
        """Return the ability that the generator lacks."""
        return lacking(context, ("encode", "decode"), "encode(x)") or without_gradients(
            "decode(encode(x))", _rebuilt(context), _first(context, 2)
        )

    def measure(self, context: Context) -> Columns:
        """Search for adversarial inputs of held-out examples."""
        generator, rng, bounds, rebuilt = opened(context), context.rng, _bounds(context), _rebuilt(context)
        x, radius = _first(context, ROWS), input_radius(context, self.eps)
        target = context.held_out.x[ROWS : ROWS + _TARGETED].to(x)
        with torch.no_grad():
            before, goal, latent = rebuilt(x), rebuilt(target), generator.call("encode", target)
        radii = x.new_full((len(x),), radius)
        away = Search()(lambda point: squared(rebuilt(point), before), x, radii, bounds, rng.at("away"))
        noise = perturbed(x, radii, bounds, rng.at("noise"))
        with torch.no_grad():
            columns = {
                "away": distances(rebuilt(away), before),
                "away_random": distances(rebuilt(noise), before),
                "error": distances(before, x),
                "target": distances(before[: len(target)], goal),
                "radius": torch.tensor([radius], dtype=torch.float64),
            }
        few = x[: len(target)]
        full = distances(few, target).clamp_min(1e-12)
        for suffix, size in (("", radii[: len(few)]), *((f".{share}", share * full) for share in _SIZES)):
            start = few + (target - few) * (size / full).view(-1, *[1] * (x.dim() - 1))
            point = Search(restarts=1)(
                lambda point: -squared(generator.call("encode", point), latent), few, size, bounds, rng, start
            )
            random = perturbed(few, size, bounds, rng.at("random", suffix))
            with torch.no_grad():
                moved = rebuilt(point)
                columns[f"towards{suffix}"] = distances(moved, goal)
                columns[f"towards_random{suffix}"] = distances(rebuilt(random), goal)
            if not suffix:
                columns["shown"] = torch.stack((few[0], target[0], point[0], before[0], moved[0]))
        return {"id": torch.arange(len(x)), **{key: value.cpu() for key, value in columns.items()}}

    def forms(self) -> Mapping[str, Form]:
        """Return the forms of the distances."""
        towards = [
            f"{kind}{at}" for kind in ("towards", "towards_random") for at in ("", *(f".{s}" for s in _SIZES))
        ]
        return {
            **{name: Form(rows=(1, ROWS), low=0) for name in ("away", "away_random", "error")},
            **{name: Form(("targets",), rows=(1, _TARGETED), low=0) for name in ("target", *towards)},
            "radius": Form((1,), low=0),
        }

    def images(self, columns: Columns, context: Context) -> Mapping[str, Tensor]:
        """Return an input, its target and their reconstructions."""
        return as_images({"autoencoder": columns["shown"]}, context)

    def concluded(self, columns: Columns) -> Finding:
        """Return the distances of the reconstructions, and the area under the curve."""
        names = ("away", "away_random", "target", "towards", "towards_random", "error")
        found = {name: positive_mean(columns[name]) for name in names}
        facts = {name: estimate.value for name, estimate in found.items()}
        facts |= {"auddc": _area(columns, "towards"), "auddc_random": _area(columns, "towards_random")}
        rows = [
            (title, start, *shown(found[name]), *shown(found[f"{name}_random"]))
            for title, name, start in (
                ("from the reconstruction of the example", "away", "0"),
                ("to the reconstruction of a target", "towards", f"{facts['target']:.3g}"),
            )
        ]
        table = Table(
            "Adversarial inputs of the autoencoder",
            ("distance", "unchanged", "adversarial", "interval", "random", "interval"),
            rows,
            _sizes(columns, self.eps)
            + f" The distance of an example to its reconstruction is {facts['error']:.3g}. The area under the "
            f"distortion-distortion curve (AUDDC) is {facts['auddc']:.3f}, and with random changes "
            f"{facts['auddc_random']:.3f}; a robust autoencoder has a higher one.",
        )
        captions = (
            "example",
            "target",
            "adversarial input",
            "its reconstruction before",
            "and after the attack",
        )
        title = "An input whose reconstruction moves towards that of a target"
        return Finding(
            "not flagged",
            f"adversarial inputs change the reconstruction by {facts['away']:.3g} (random: "
            f"{facts['away_random']:.3g})",
            facts=facts,
            tables=(table,),
            pictures=(Picture("autoencoder", title, captions),),
            limits=(_ATTACKED,),
        )


@dataclass(frozen=True)
class Discriminator:
    """Part of the audit: small changes after which the discriminator takes generated samples for real examples, or
    real examples for generated ones.
    """

    eps: float
    """root mean square of the change of the features, as a multiple of the standard deviation of training examples"""
    name: str = "discriminator"
    title: str = "evasion of the discriminator"
    metrics: tuple[str, ...] = ()

    def missing(self, context: Context) -> str:
        """Return the ability that the generator lacks."""
        return lacking(context, ("discriminate",), "discriminate(x)") or without_gradients(
            "discriminate(x)", _scores(context), _first(context, 2)
        )

    def measure(self, context: Context) -> Columns:
        """Search for changes of samples and of one half of the held-out examples; the threshold is from the other."""
        scores, bounds, device = _scores(context), _bounds(context), opened(context).device
        with torch.no_grad():
            real = torch.cat([scores(x.to(device)) for x in torch.split(context.held_out.x[::2], 500)])
        radius = input_radius(context, self.eps)
        columns = {
            "threshold": torch.quantile(real.double(), _LEAST)[None],
            "radius": torch.tensor([radius], dtype=torch.float64),
        }
        sets = (("generated", context.samples, 1), ("real", context.held_out.x[1::2], -1))
        for name, given, sign in sets:
            x, rng = given[:ROWS].to(device), context.rng.at(name)
            radii = x.new_full((len(x),), radius)

            def goal(point: Tensor, sign: int = sign) -> Tensor:
                return sign * scores(point)

            worst = Search()(goal, x, radii, bounds, rng.at("worst"))
            noise = perturbed(x, radii, bounds, rng.at("noise"))
            with torch.no_grad():
                found = [scores(points) for points in (x, noise, worst)]
            columns |= {f"{name}_{kind}": each for kind, each in zip(_KINDS, found, strict=True)}
        return {"id": torch.arange(ROWS), **{key: value.cpu() for key, value in columns.items()}}

    def forms(self) -> Mapping[str, Form]:
        """Return the forms of the scores."""
        scores = {
            f"{name}_{kind}": Form((name,), rows=(1, ROWS))
            for name in ("generated", "real")
            for kind in _KINDS
        }
        return {**scores, "threshold": Form((1,)), "radius": Form((1,), low=0)}

    def images(self, columns: Columns, context: Context) -> Mapping[str, Tensor]:
        """Return nothing, because the changed inputs are not stored."""
        return {}

    def concluded(self, columns: Columns) -> Finding:
        """Return how many inputs are on the wrong side of the threshold."""
        threshold = columns["threshold"].item()
        rates = {
            f"{name}_{kind}": proportion((columns[f"{name}_{kind}"] > threshold) == (name == "generated"))
            for name in ("generated", "real")
            for kind in _KINDS
        }
        rows = []
        for name, title in (
            ("generated", "generated, scored as real"),
            ("real", "real, scored as generated"),
        ):
            unchanged, random, worst = (share_and_range(rates[f"{name}_{kind}"]) for kind in _KINDS)
            rows.append((title, unchanged[0], random[0], *worst))
        table = Table(
            "Evasion of the discriminator",
            ("samples", "unchanged", "random", "adversarial", "interval"),
            rows,
            _sizes(columns, self.eps)
            + f" A sample is scored as real above {threshold:.4g}, as {percent(1 - _LEAST, 0)} of one half of the "
            "held-out examples are; the other half is attacked.",
        )
        facts = {name: rate.value for name, rate in rates.items()}
        return Finding(
            "not flagged",
            f"the discriminator scores {percent(facts['generated_worst'])} of adversarially changed samples as "
            f"real ({percent(facts['generated_unchanged'])} unchanged)",
            facts={"threshold": threshold, **facts},
            tables=(table,),
            limits=(_ATTACKED,),
        )


def input_radius(context: Context, eps: float) -> float:
    """Return the Euclidean size of a change whose root mean square is `eps` standard deviations of the features of
    training examples.
    """
    x = context.training.x
    return eps * float(x.std()) * math.sqrt(x[0].numel())


def _sizes(columns: Columns, eps: float) -> str:
    return (
        f"Inputs change by a root mean square of {eps:g} standard deviations of the training examples, which is a "
        f"Euclidean distance of {float(columns['radius'][0]):.3g}."
    )


def _first(context: Context, n: int) -> Tensor:
    """The first held-out examples, on the device of the generator."""
    return context.held_out.x[:n].to(opened(context).device)


def _bounds(context: Context) -> Bounds:
    """The range of training examples and samples, inside which inputs are changed."""
    sets = (context.training.x, context.held_out.x, context.samples)
    return Bounds(min(float(x.min()) for x in sets), max(float(x.max()) for x in sets))


def _rebuilt(context: Context) -> Function:
    generator, decode = opened(context), decoder(context, None)
    return lambda x: decode(generator.call("encode", x))


def _scores(context: Context) -> Function:
    generator = opened(context)
    return lambda x: generator.call("discriminate", x).reshape(len(x))


def _area(columns: Columns, kind: str) -> float:
    """The area under the curve, which is 1 without a change, and 0 where the target itself is the input."""
    goal = columns["target"].clamp_min(1e-12)
    shares = [float((columns[f"{kind}.{size}"] / goal).mean()) for size in _SIZES]
    return float(torch.trapezoid(torch.tensor([1.0, *shares, 0.0]), torch.tensor([0.0, *_SIZES, 1.0])))
