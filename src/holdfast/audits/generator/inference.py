"""Membership inference: tests whether an attacker can recognise the training examples of a generator among other
examples, and whether a diffusion model has memorised them.

Chen et al., "GAN-Leaks: A Taxonomy of Membership Inference Attacks against Generative Models", CCS 2020,
arXiv:1909.03935, for the calibrated nearest distance; Carlini et al., "Extracting Training Data from Diffusion Models",
USENIX Security 2023, arXiv:2301.13188, for the denoising loss; "MGI", arXiv:2606.23872, for the generator's own samples
as a third class; arXiv:2601.20642 for the norm of the score at low noise.

Differs from the papers: distances are calibrated by held-out examples instead of a second generator, losses are not
compared with those of reference models, and the norm is that of the score without a condition.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.audits.finding import Finding, Picture, Table
from holdfast.audits.generator.parts import Context, share_and_range
from holdfast.audits.generator.sensitivity import as_images
from holdfast.audits.membership.scores import auc, needed, threshold, tpr_of_one
from holdfast.core.draws import Draws
from holdfast.core.errors import TargetError
from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Columns
from holdfast.core.types import PerExample
from holdfast.io.models.generators import OpenedGenerator
from holdfast.reports.numbers import percent
from holdfast.runs.store.columns import Form, whole
from holdfast.statistics.intervals import CONFIDENCE, bonferroni, proportion
from holdfast.statistics.repeats import copy_threshold, nearest_example

FPR = 0.01
"""false-positive rate among the held-out examples at which members are found"""
CANDIDATES, OWN = 1000, 500
"""largest numbers of training and of held-out examples, and of own samples of the generator"""
TIMES, NOISES = (0.1, 0.15, 0.2), 2
"""times of the diffusion at which the denoising loss is measured, and noises at each, the same for all examples"""
LOW = 0.05
"""time of the diffusion at which the norm of the score is measured"""
_LEAST = 100  # samples, a quarter of which are own samples of the generator
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
        return "" if len(context.samples) >= _LEAST else f"at least {_LEAST} samples"

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
