"""Attacks on a generator: adversarial inputs of its encoder, and membership inference, which tests whether an example
was in its training set.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.audits.finding import Finding, Picture, Table
from holdfast.audits.generator.sensitivity import (
    ROWS,
    Context,
    Function,
    Search,
    as_images,
    decoder,
    distances,
    lacking,
    opened,
    perturbed,
    positive_mean,
    share_and_range,
    shown,
    squared,
    without_gradients,
)
from holdfast.audits.membership_references import auc, needed, threshold, tpr_of_one
from holdfast.core.draws import Draws
from holdfast.core.errors import TargetError
from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Columns
from holdfast.core.model import Bounds
from holdfast.core.types import PerExample
from holdfast.io.models.generators import OpenedGenerator
from holdfast.reports.words import percent
from holdfast.runs.store.columns import Form, whole
from holdfast.statistics.intervals import CONFIDENCE, bonferroni, proportion
from holdfast.statistics.repeats import copy_threshold, nearest_example

_SIZES = (0.1, 0.2, 0.4, 0.7)  # of the curve, as shares of the distance of an example to its target
_TARGETED = 20
_REJECTED = 0.05
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
        """Return the finding from the columns: the mean distances by which adversarial inputs and random changes of the
        same size move the reconstructions, with intervals.

        It includes the area under the curve of the distance to the reconstruction of a target, for growing changes of
        the input; the area is larger for a more robust autoencoder. The verdict is always `not flagged`.
        """
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
            "threshold": torch.quantile(real.double(), _REJECTED)[None],
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
            + f" A sample is scored as real above {threshold:.4g}, as {percent(1 - _REJECTED, 0)} of one half of the "
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


FPR = 0.01
"""false-positive rate among the held-out examples at which members are found"""
CANDIDATES, OWN = 1000, 500
"""largest numbers of training and of held-out examples, and of own samples of the generator"""
TIMES, NOISES = (0.1, 0.15, 0.2), 2
"""times of the diffusion at which the denoising loss is measured, and noises at each, the same for all examples"""
LOW = 0.05
"""time of the diffusion at which the norm of the score is measured"""
_FEWEST_SAMPLES = 100  # samples, a quarter of which are own samples of the generator
_HIGH = 0.05  # share of own samples that count as members from which the headline states it
_SHIFTED = 4.0  # standard errors of the area under the curve of the control from which the examples differ
_ROWS = 250  # examples of one call of the generator
_SHOWN = 6
_MEMBER, _OUTSIDE, _OWN = range(3)
_TITLES = {
    "distance": "calibrated nearest distance",
    "denoising": "denoising loss",
    "score_norm": "norm of the score",
    "log_prob": "log-density",
}
_CONTROL, _MEMORISED = "reference", "memorised"
_WEAK = (
    "A membership score that finds nothing does not show that nothing leaks. Attacks with reference models, or with "
    "more samples, find more."
)
_SPLIT = (
    "Membership is meaningful only if training and held-out examples are random parts of the same data. Published "
    "scores for diffusion models failed on such splits (CopyMark, arXiv:2410.03640)."
)


@dataclass(frozen=True)
class Membership:
    """Part of the audit: membership inference, and memorised training examples."""

    name: str = "membership"
    title: str = "membership"
    metrics: tuple[str, ...] = ("membership_tpr_at_1_percent",)

    def missing(self, context: Context) -> str:
        """Return what is missing if there are too few samples."""
        return "" if len(context.samples) >= _FEWEST_SAMPLES else f"at least {_FEWEST_SAMPLES} samples"

    def measure(self, context: Context) -> Columns:
        """Compute the scores of training examples, held-out examples and own samples: the higher, the more a score
        takes an example for a training example.
        """
        training, held_out, samples = (
            each.cpu() for each in (context.training.x, context.held_out.x, context.samples)
        )
        members = _drawn(len(training), context.rng.at("members"))[:CANDIDATES]
        order = _drawn(len(held_out), context.rng.at("held-out"))
        n, own = min(CANDIDATES, len(order) // 2), min(OWN, len(samples) // 4)
        x = torch.cat((training[members], held_out[order[:n]], samples[:own].to(training)))
        reference, _ = nearest_example(x, held_out[order[n:]])
        distance, _ = nearest_example(x, samples[own:].to(training))
        group = torch.tensor([_MEMBER] * len(members) + [_OUTSIDE] * n + [_OWN] * own)
        rows = torch.cat((members, order[:n], torch.arange(own)))
        scores = {"distance": reference - distance, **_of_generator(x, context), _CONTROL: reference}
        stored = {name: score.cpu().double() for name, score in scores.items()}
        return {"id": torch.arange(len(x)), "group": group, "row": rows, **stored}

    def forms(self) -> Mapping[str, Form]:
        """Return the forms of the groups and of the scores."""
        optional = {
            name: Form(infinite=True, optional=True) for name in ("denoising", "score_norm", "log_prob")
        }
        return {
            "group": whole("n", high=_OWN),
            "row": whole("n"),
            "distance": Form(),
            _CONTROL: Form(),
            **optional,
        }

    def images(self, columns: Columns, context: Context) -> Mapping[str, Tensor]:
        """Return the training examples with the smallest norm of the score."""
        if "score_norm" not in columns:
            return {}
        x, rows = context.training.x, _most_memorised(columns)
        return as_images({_MEMORISED: x[rows.to(x.device)]}, context)

    def concluded(self, columns: Columns) -> Finding:
        """Return the true-positive rate of the score that finds most, and what it takes own samples for."""
        if min(int((columns["group"] == each).sum()) for each in (_MEMBER, _OUTSIDE, _OWN)) < 2:
            raise TargetError(
                f"the columns of {self.name} lack training examples, held-out examples or own samples; restore them "
                "from a copy"
            )
        names = [name for name in _TITLES if name in columns]
        confidence = bonferroni(CONFIDENCE, len(names))
        results = {name: rated(columns[name], columns["group"], confidence) for name in names}
        best = max(names, key=lambda name: (results[name].tpr.value, results[name].auc))
        control, found = rated(columns[_CONTROL], columns["group"], confidence), results[best]
        shifted = control.deviation(columns["group"]) > _SHIFTED
        memorised = _memorised(columns)
        return Finding(
            "flagged" if found.tpr.low > FPR and not shifted else "not flagged",
            _headline(_TITLES[best], found, shifted=shifted),
            reasons=_reasons(_TITLES[best], found, shifted=shifted),
            facts={
                **{name: result.facts for name, result in {**results, "control": control}.items()},
                "best": best,
                "different_data": shifted,
                **memorised.facts,
            },
            metrics={"membership_tpr_at_1_percent": found.tpr},
            tables=(_table(results, control, columns["group"]), *memorised.tables),
            pictures=memorised.pictures,
            limits=(_SPLIT, _WEAK),
        )


@dataclass(frozen=True)
class Rated:
    """What a score finds."""

    tpr: Estimate
    """share of the training examples above the threshold that `FPR` of the held-out examples exceed"""
    auc: float
    """area under the curve of training and held-out examples"""
    own: Estimate
    """share of the generator's own samples above the same threshold"""

    @property
    def facts(self) -> Mapping[str, float]:
        """The numbers for programs."""
        return {
            "tpr": self.tpr.value,
            "low": self.tpr.low,
            "high": self.tpr.high,
            "auc": self.auc,
            "own": self.own.value,
        }

    def deviation(self, group: Tensor) -> float:
        """Return the distance of the area under the curve from 0.5, in its standard errors for equal groups (Mann and
        Whitney).
        """
        m, n = int((group == _MEMBER).sum()), int((group == _OUTSIDE).sum())
        return float(abs(self.auc - 0.5) / ((m + n + 1) / (12 * m * n)) ** 0.5)


def rated(score: PerExample, group: Tensor, confidence: float = CONFIDENCE) -> Rated:
    """Return what a score (n) finds, for training examples, held-out examples and own samples, which have the groups 0,
    1 and 2.
    """
    known = group != _OWN
    member, shown = group[known] == _MEMBER, score[known]
    own = score[group == _OWN] > threshold(shown, member, FPR)
    return Rated(tpr_of_one(shown, member, FPR, confidence), auc(shown, member), proportion(own))


def _drawn(n: int, rng: Draws) -> Tensor:
    """The numbers below `n` in random order."""
    return rng.bits(torch.arange(n)).argsort(stable=True)


def _of_generator(x: Tensor, context: Context) -> dict[str, PerExample]:
    """The scores from the methods that the generator has."""
    generator, found = context.generator, dict[str, PerExample]()
    if generator is None:
        return found
    if not generator.lacks("denoising_loss"):
        noises = [
            (t, context.rng.at("noise", i, j).normal(torch.zeros(1, dtype=torch.int64), *x.shape[1:]))
            for i, t in enumerate(TIMES)
            for j in range(NOISES)
        ]
        losses = [_called(generator, x, _loss(generator, t, noise)) for t, noise in noises]
        found["denoising"] = -torch.stack(losses).mean(0)
        # the estimate of no noise is the score, multiplied by the same number for all examples
        silence = torch.zeros(1, *x.shape[1:])
        found["score_norm"] = -_called(generator, x, _loss(generator, LOW, silence)).clamp_min(0).sqrt()
    if not generator.lacks("log_prob"):
        found["log_prob"] = _called(generator, x, lambda rows: generator.call("log_prob", rows))
    return found


def _loss(generator: OpenedGenerator, t: float, noise: Tensor) -> Callable[[Tensor], PerExample]:
    return lambda rows: generator.call("denoising_loss", rows, t, noise.to(rows).expand_as(rows))


@torch.no_grad()
def _called(generator: OpenedGenerator, x: Tensor, function: Callable[[Tensor], PerExample]) -> PerExample:
    """What a function returns for examples on the device of the generator, in pieces."""
    return torch.cat([function(rows.to(generator.device)).cpu().double() for rows in x.split(_ROWS)])  # type: ignore[no-untyped-call]


def _memorised(columns: Columns) -> Finding:
    """The share of the training examples at which the score of a diffusion model is smaller than at 99 % of held-out
    examples, as a table, and the smallest as pictures; nothing for other generators.
    """
    if "score_norm" not in columns:
        return Finding("not flagged", "")
    norm, group = -columns["score_norm"], columns["group"]
    unseen, members = norm[group == _OUTSIDE], norm[group == _MEMBER]
    limit = copy_threshold(unseen)
    shares = {
        "training examples": proportion(members < limit),
        "held-out examples": proportion(unseen[1::2] < limit),
        "own samples": proportion(norm[group == _OWN] < limit),
    }
    table = Table(
        "Memorised examples",
        ("examples", "share", "interval"),
        [(name, *share_and_range(share)) for name, share in shares.items()],
        f"Share of the examples at which the norm of the score, at time {LOW:g} of the diffusion and without noise, is "
        "smaller than at 99 % of one half of the held-out examples. The row of held-out examples is the other half.",
    )
    share, control = shares["training examples"], shares["held-out examples"]
    title = "The training examples with the smallest norm of the score"
    captions = [f"training example, row {row}" for row in _most_memorised(columns).tolist()]
    memorised = (Picture(_MEMORISED, title, captions),) if share.low > control.high else ()
    return Finding(
        "not flagged",
        "",
        facts={"memorised": share.value, "memorised_held_out": control.value},
        tables=(table,),
        pictures=memorised,
    )


def _most_memorised(columns: Columns) -> Tensor:
    """The rows of the training examples with the smallest norm of the score."""
    members = columns["group"] == _MEMBER
    return columns["row"][members][(-columns["score_norm"][members]).argsort(stable=True)[:_SHOWN]]


def _headline(title: str, found: Rated, *, shifted: bool) -> str:
    if shifted:
        return "membership cannot be concluded, because training and held-out examples differ"
    own = f", and takes {percent(found.own.value)} of the generator's own samples for training examples"
    return (
        f"the {title} finds {percent(found.tpr.value)} of the training examples at a false-positive rate of "
        f"{percent(FPR, 0)} ({percent(found.tpr.low)} to {percent(found.tpr.high)})"
        f"{own if found.own.low > _HIGH else ''}"
    )


def _reasons(title: str, found: Rated, *, shifted: bool) -> list[str]:
    if shifted:
        reason = (
            "the distance to other held-out examples, which does not depend on the generator, tells training from "
            "held-out examples; give held-out examples that are a random part of the data of the training examples"
        )
        return [reason]
    if found.tpr.low > FPR:
        return [f"the {title} tells training examples from held-out examples better than chance"]
    return []


def _table(results: Mapping[str, Rated], control: Rated, group: Tensor) -> Table:
    m, n, own = (int((group == each).sum()) for each in (_MEMBER, _OUTSIDE, _OWN))
    named = {**{_TITLES[name]: result for name, result in results.items()}, "control, no generator": control}
    rows = [
        (title, *share_and_range(result.tpr), f"{result.auc:.3f}", *share_and_range(result.own))
        for title, result in named.items()
    ]
    few = (
        ""
        if n >= needed(FPR)
        else f" With fewer than {needed(FPR):,} held-out examples, the threshold is imprecise."
    )
    return Table(
        "Membership",
        ("score", "found", "interval", "AUC", "own samples", "interval"),
        rows,
        f"Share of {m:,} training examples whose score exceeds the threshold that {percent(FPR, 0)} of {n:,} held-out "
        f"examples exceed, and of {own:,} own samples of the generator, none of which is a training example by origin. "
        f"Chance is {percent(FPR, 0)}, and an AUC of 0.5. The intervals of {percent(CONFIDENCE, 0)} hold for all "
        f"scores together. The control is the distance to other held-out examples.{few}",
    )
