"""Adversarial inputs of the encoder and the discriminator of a generator.

Autoencoders: the latent attack of Kos, Fischer and Song, "Adversarial examples for generative models", 2018,
arXiv:1702.06832. The area under the distortion-distortion curve (AUDDC): Gondim-Ribeiro, Tabacof and Valle,
"Adversarial attacks on variational autoencoders", 2018, arXiv:1806.04646.

Differs from the papers: changes are projected to a Euclidean ball instead of penalised, and the curve is measured at
four sizes of the change.
"""

import math
from dataclasses import dataclass

import torch

from holdfast.attacks.parts.generators import Function, Search, distances, perturbed, squared
from holdfast.audits.finding import Picture, Table
from holdfast.audits.generator.parts import Context, PartFinding
from holdfast.audits.generator.sensitivity import (
    ROWS,
    decoder,
    is_image,
    positive_mean,
    shown,
    visible,
    without_gradients,
)
from holdfast.core.evidence import Columns
from holdfast.core.model import Bounds
from holdfast.statistics.intervals import proportion

_SIZES = (0.1, 0.2, 0.4, 0.7)  # of the curve, as shares of the distance of an example to its target
_TARGETED = 50
_LEAST = 0.05
"""share of the held-out examples whose scores count as generated"""
_PAIRS = 3
_RADIUS = (
    "Inputs change by a Euclidean distance of {eps:g} standard deviations of the training examples for each feature, "
    "{radius:.3g} in total."
)
_ATTACKED = "Adversarial inputs were searched for with gradients. A better search may find stronger ones."


@dataclass(frozen=True)
class Autoencoder:
    """Part of the audit: adversarial inputs whose reconstruction moves towards that of another example, or away."""

    eps: float
    """root mean square of the change of the features, as a multiple of the standard deviation of training examples"""
    name: str = "autoencoder"
    title: str = "adversarial inputs of the autoencoder"

    def missing(self, context: Context) -> str:
        """Return the ability that the generator lacks."""
        if context.generator is None:
            return "encode(x)"
        if lacking := context.generator.lacks("encode", "decode"):
            return lacking
        x = context.held_out.x[:2].to(context.generator.device)
        return without_gradients("decode(encode(x))", _rebuilt(context), x)

    def measure(self, context: Context) -> Columns:
        """Search for adversarial inputs of held-out examples."""
        generator, rng, bounds = context.generator, context.rng, _bounds(context)
        assert generator is not None  # as `missing` states
        rebuilt = _rebuilt(context)
        x = context.held_out.x[:ROWS].to(generator.device)
        target = context.held_out.x[ROWS : ROWS + _TARGETED].to(x)
        radius = torch.full((len(x),), input_radius(context, self.eps), device=x.device)
        with torch.no_grad():
            before, goal, latent = rebuilt(x), rebuilt(target), generator.call("encode", target)
        away = Search()(lambda point: squared(rebuilt(point), before), x, radius, bounds, rng.at("away"))
        noise = perturbed(x, radius, bounds, rng.at("noise"))
        few = x[: len(target)]
        full = distances(few, target)
        columns = {"error": distances(before, x), "apart": distances(before, before.roll(1, 0))}
        for row, size in enumerate((radius[: len(few)], *(share * full for share in _SIZES))):
            start = few + (target - few) * (size / full.clamp_min(1e-12)).view(-1, *[1] * (x.dim() - 1))
            point = Search(restarts=1)(
                lambda point: -squared(generator.call("encode", point), latent), few, size, bounds, rng, start
            )
            random = perturbed(few, size, bounds, rng.at("random", row))
            with torch.no_grad():
                columns[f"towards.{row}"] = distances(rebuilt(point), goal)
                columns[f"random.{row}"] = distances(rebuilt(random), goal)
            if row == 0:
                columns["shown"] = torch.stack((few[0], target[0], point[0], before[0], rebuilt(point)[0]))
        with torch.no_grad():
            columns["away"] = distances(rebuilt(away), before)
            columns["noise"] = distances(rebuilt(noise), before)
        columns["goal"] = distances(before[: len(few)], goal)
        return {
            "id": torch.arange(len(x)),
            **{key: value.detach().cpu() for key, value in columns.items()},
        }

    def concluded(self, columns: Columns, context: Context) -> PartFinding:
        """Return the distances of the reconstructions, and the area under the curve."""
        goal = columns["goal"].clamp_min(1e-12)
        shares = {
            kind: [float((columns[f"{kind}.{row}"] / goal).mean()) for row in range(len(_SIZES) + 1)]
            for kind in ("towards", "random")
        }
        area = {kind: _area(values[1:]) for kind, values in shares.items()}
        away, noise, towards, random = (
            positive_mean(columns[key]) for key in ("away", "noise", "towards.0", "random.0")
        )
        start, error = positive_mean(columns["goal"]), positive_mean(columns["error"])
        table = Table(
            "Adversarial inputs of the autoencoder",
            ("distance", "unchanged", "adversarial", "interval", "random", "interval"),
            (
                ("from the reconstruction, attack away", "0", *shown(away), *shown(noise)),
                ("to the reconstruction of a target", f"{start.value:.3g}", *shown(towards), *shown(random)),
            ),
            _RADIUS.format(eps=self.eps, radius=input_radius(context, self.eps))
            + f" The distance of an example to its reconstruction is {error.value:.3g}. The area under the "
            f"distortion-distortion curve (AUDDC) is {area['towards']:.3f}, and with random changes "
            f"{area['random']:.3f}; a robust autoencoder has a higher one.",
        )
        facts = {
            "away": away.value,
            "away_random": noise.value,
            "target": start.value,
            "towards": towards.value,
            "towards_random": random.value,
            "auddc": area["towards"],
            "auddc_random": area["random"],
            "error": error.value,
        }
        return PartFinding(
            headline=f"adversarial inputs change the reconstruction by {away.value:.3g} (random: {noise.value:.3g})",
            facts=facts,
            tables=(table,),
            pictures=_reconstructions(columns, context),
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

    def missing(self, context: Context) -> str:
        """Return the ability that the generator lacks."""
        if context.generator is None:
            return "discriminate(x)"
        if lacking := context.generator.lacks("discriminate"):
            return lacking
        x = context.held_out.x[:2].to(context.generator.device)
        return without_gradients("discriminate(x)", _scores(context), x)

    def measure(self, context: Context) -> Columns:
        """Search for changes of samples and of one half of the held-out examples; the threshold is from the other."""
        assert context.generator is not None  # as `missing` states
        scores, bounds, device = _scores(context), _bounds(context), context.generator.device
        with torch.no_grad():
            real = torch.cat([scores(x.to(device)) for x in context.held_out.x[::2].split(500)])
        columns = {"threshold": torch.quantile(real.double(), _LEAST)[None]}
        sets = {"generated": (context.samples[:ROWS], 1), "real": (context.held_out.x[1::2][:ROWS], -1)}
        for name, (given, sign) in sets.items():
            x, rng = given.to(device), context.rng.at(name)
            radius = torch.full((len(x),), input_radius(context, self.eps), device=device)
            worst = Search()(
                lambda point, sign=sign: sign * scores(point), x, radius, bounds, rng.at("worst")
            )
            noise = perturbed(x, radius, bounds, rng.at("noise"))
            with torch.no_grad():
                for kind, points in (("unchanged", x), ("noise", noise), ("worst", worst)):
                    columns[f"{name}.{kind}"] = scores(points)
            columns[f"{name}.shown"] = torch.cat((x[:_PAIRS], worst[:_PAIRS]))
        return {"id": torch.arange(ROWS), **{key: value.cpu() for key, value in columns.items()}}

    def concluded(self, columns: Columns, context: Context) -> PartFinding:
        """Return how many inputs are on the wrong side of the threshold."""
        threshold = columns["threshold"].item()
        rates = {}
        for name in ("generated", "real"):
            for kind in ("unchanged", "noise", "worst"):
                as_real = columns[f"{name}.{kind}"] > threshold
                rates[name, kind] = proportion(as_real if name == "generated" else ~as_real)
        rows = [
            (
                title,
                *(f"{rates[name, kind].value:.1%}" for kind in ("unchanged", "noise", "worst")),
                f"{rates[name, 'worst'].low:.1%} to {rates[name, 'worst'].high:.1%}",
            )
            for name, title in (
                ("generated", "generated, scored as real"),
                ("real", "real, scored as generated"),
            )
        ]
        table = Table(
            "Evasion of the discriminator",
            ("samples", "unchanged", "random", "adversarial", "interval"),
            rows,
            _RADIUS.format(eps=self.eps, radius=input_radius(context, self.eps))
            + f" A sample is scored as real above {threshold:.4g}, as {1 - _LEAST:.0%} of one half of the held-out "
            "examples are; the other half is attacked.",
        )
        worst, clean = rates["generated", "worst"], rates["generated", "unchanged"]
        return PartFinding(
            headline=f"the discriminator scores {worst.value:.1%} of adversarially changed samples as real "
            f"({clean.value:.1%} unchanged)",
            facts={
                "threshold": threshold,
                **{f"{name}_{kind}": rate.value for (name, kind), rate in rates.items()},
            },
            tables=(table,),
            pictures=_changed(columns, context),
            limits=(_ATTACKED,),
        )


def input_radius(context: Context, eps: float) -> float:
    """Return the Euclidean size of a change whose root mean square is `eps` standard deviations of the features of
    training examples.
    """
    x = context.training.x
    return eps * float(x.std()) * math.sqrt(x[0].numel())


def _bounds(context: Context) -> Bounds:
    """The range of training examples and samples, inside which inputs are changed."""
    sets = (context.training.x, context.held_out.x, context.samples)
    return Bounds(min(float(x.min()) for x in sets), max(float(x.max()) for x in sets))


def _rebuilt(context: Context) -> Function:
    generator, decode = context.generator, decoder(context, None)
    assert generator is not None
    return lambda x: decode(generator.call("encode", x))


def _scores(context: Context) -> Function:
    generator = context.generator
    assert generator is not None
    return lambda x: generator.call("discriminate", x).reshape(len(x))


def _area(values: list[float]) -> float:
    """The area under the curve, which is 1 without a change, and 0 where the target itself is the input."""
    points = torch.tensor([1.0, *values, 0.0], dtype=torch.float64)
    return float(torch.trapezoid(points, torch.tensor([0.0, *_SIZES, 1.0], dtype=torch.float64)))


def _reconstructions(columns: Columns, context: Context) -> tuple[Picture, ...]:
    if not is_image(context):
        return ()
    captions = (
        "example",
        "target",
        "adversarial input",
        "reconstruction of the example",
        "reconstruction of the adversarial input",
    )
    title = "An input whose reconstruction moves towards that of a target"
    return (Picture(title, visible(columns["shown"], context), captions),)


def _changed(columns: Columns, context: Context) -> tuple[Picture, ...]:
    if not is_image(context):
        return ()
    scores = torch.cat([columns[f"generated.{kind}"][:_PAIRS] for kind in ("unchanged", "worst")])
    state = ("unchanged", "adversarial")
    captions = [f"{state[row >= _PAIRS]}, score {float(score):.3g}" for row, score in enumerate(scores)]
    title = "Generated samples, and the same samples changed so that the discriminator scores them higher"
    return (Picture(title, visible(columns["generated.shown"], context), captions),)
