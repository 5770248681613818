"""The audit of a training procedure that claims differential privacy: canaries, guesses which of them were trained on,
and the epsilon that the guesses refute.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, Strict
from torch import Tensor
from torch.nn.functional import cross_entropy
from typing_extensions import TypedDict

from holdfast.audits.finding import Finding, Images, Share, Size, StoredSteps, Table
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import Remedy, TargetError, UsageError
from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Columns
from holdfast.core.model import Bounds, Classifier
from holdfast.core.types import Inputs, Labels, Mask, PerExample
from holdfast.reports.words import percent
from holdfast.runs.engine.run import Run
from holdfast.runs.store.columns import Form, flag, whole
from holdfast.statistics.intervals import CONFIDENCE, clopper_pearson
from holdfast.statistics.privacy_budget import RowBudget

CanaryKind = Literal["mislabelled", "random"]
"""`mislabelled`: examples of the data with a wrong label. `random`: uniform noise with a random label"""


@dataclass(frozen=True)
class Canaries:
    """Canaries with what the seed decided about them, and the examples without them."""

    x: Inputs
    y: Labels
    """wrong or random labels"""
    included: Mask
    """whether the network is trained on a canary"""
    rest: Batch
    """examples on which the network is always trained"""

    @property
    def training(self) -> tuple[Tensor, Tensor]:
        """Inputs and labels of the training: the other examples, and the included canaries at the end."""
        x, y = self.x[self.included], self.y[self.included]
        return torch.cat((self.rest.x, x)), torch.cat((self.rest.y, y))


def planted(data: Batch, classes: int, bounds: Bounds, *, n: int, kind: CanaryKind, rng: Draws) -> Canaries:
    """Return `n` canaries, whose inclusion is decided by the seed.

    Mislabelled canaries are taken out of the data, so that they are in the training with the wrong label or not at all.
    """
    rows = torch.arange(n, device=data.ids.device)
    if kind == "mislabelled":
        order = rng.at("canaries").bits(data.ids).argsort()
        source, rest = data.take(order[:n]), data.take(order[n:].sort().values)
        x, shift = source.x, 1 + rng.at("labels").integers(rows, classes - 1)
        y = (source.y + shift) % classes
    else:
        low, high = bounds.like(data.x)
        noise = rng.at("inputs").uniform(rows, *data.example_shape).to(data.x.dtype)
        x, rest = low + (high - low) * noise, data
        y = rng.at("labels").integers(rows, classes)
    included = rng.at("included").bits(rows) < 0
    return Canaries(x, y, included, rest)


def right_guesses(losses: PerExample, included: Mask, guesses: int) -> int:
    """Return how many of `guesses` guesses are right: one half, rounded down, guesses that the canaries with the
    smallest losses were included, and the rest that those with the largest losses were not.

    The number of guesses is fixed before the losses are known, as the bound requires. Equal losses are ordered by the
    position, which does not depend on the inclusion.
    """
    order = losses.double().argsort(stable=True)
    yes = guesses // 2
    no = guesses - yes
    return int(included[order[:yes]].sum() + (~included[order[len(order) - no :]]).sum())


_LARGEST = 60.0
"""an epsilon that no number of guesses can show; at it, a guess of randomised response is right in float64"""
_HALVINGS = 60
"""bisection steps, after which the interval is smaller than the precision of float64"""


def p_value(right: int, guesses: int, epsilon: float, delta: float = 0.0, canaries: int = 0) -> float:
    """Return the largest probability of at least `right` of `guesses` right guesses under (epsilon, delta)-differential
    privacy.

    `canaries` is the number of canaries about which a guess could be made; 0 for as many as guesses. It matters only
    if delta is not 0.
    """
    from scipy.stats import binom

    chance = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(right - 1, guesses, chance))
    if not delta or not right:
        return min(tail, 1.0)
    below = np.cumsum(binom.pmf(np.arange(right - 1, -1, -1), guesses, chance))
    steepest = float((below / np.arange(1, right + 1)).max())
    return min(tail + 2 * (canaries or guesses) * delta * steepest, 1.0)


def epsilon_from_guesses(
    right: int, guesses: int, *, delta: float = 0.0, canaries: int = 0, confidence: float = CONFIDENCE
) -> float:
    """Return the lower bound of epsilon from `right` of `guesses` right guesses in one training; 0 if none is shown.

    `canaries` is as in `p_value`. With probability `confidence` the bound does not exceed the true epsilon.

    >>> round(epsilon_from_guesses(100, 100), 2), round(epsilon_from_guesses(600, 1000), 3)
    (3.49, 0.297)
    """
    if not 0 <= right <= guesses:
        raise UsageError(f"right is {right}; expected a number from 0 to guesses={guesses}")
    low, high = 0.0, _LARGEST
    if p_value(right, guesses, low, delta, canaries) > 1 - confidence:
        return 0.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if p_value(right, guesses, middle, delta, canaries) > 1 - confidence:
            high = middle
        else:
            low = middle
    return low


def epsilon_from_rates(
    hits: int, members: int, alarms: int, others: int, *, delta: float = 0.0, confidence: float = CONFIDENCE
) -> float:
    """Return the lower bound of epsilon from independent trainings; 0 if none is shown.

    An attack says "member" in `hits` of `members` trainings with the example, and in `alarms` of `others` trainings
    without it. Its threshold must have been fixed on other trainings. Both rates have Clopper-Pearson bounds, which
    together hold with probability `confidence`. The complement of the attack is used if its bound is larger.
    """
    hit_rate = clopper_pearson(hits, members, confidence)
    alarm_rate = clopper_pearson(alarms, others, confidence)
    ratios = ((hit_rate[0] - delta, alarm_rate[1]), (1 - alarm_rate[1] - delta, 1 - hit_rate[0]))
    return max(0.0, *(math.log(top / bottom) if top > 0 else 0.0 for top, bottom in ratios))


LOSSES = "losses"
"""name of the stage with the losses of the canaries"""
_DOUBLINGS, _DIGITS = 8, 10  # of the canaries and of delta, up to which a possible audit is searched
_PIECE, _SEEN = 256, 1000
"""examples in a forward pass, and largest number of other training examples whose accuracy is reported"""

_WEAK = (
    "The bound holds with 95 % confidence and is a lower one: other canaries, another attack or another seed may "
    "show more, and a small bound is no proof of privacy."
)

Train = Callable[[Inputs, Labels, int], Classifier]
"""function that trains a network on inputs and labels with a seed"""


@dataclass(frozen=True)
class PrivacyAudit:
    """Settings of the audit."""

    epsilon: float
    """epsilon that the training claims"""
    delta: float
    """delta that the training claims"""
    canaries: int
    kind: CanaryKind
    share: float
    """share of the canaries about which a guess is made"""
    equal_rows: int
    """largest number of examples with equal inputs"""
    seed: int

    @property
    def claim(self) -> RowBudget:
        """The claimed budget of each row."""
        return RowBudget(self.epsilon, self.delta, self.equal_rows)

    @property
    def guesses(self) -> int:
        """Number of guesses."""
        return max(round(self.share * self.canaries), 1)

    def bound(self, right: int) -> float:
        """Return the lower bound of epsilon from the number of right guesses."""
        return epsilon_from_guesses(right, self.guesses, delta=self.delta, canaries=self.canaries)

    @property
    def largest(self) -> float:
        """The bound if all guesses are right."""
        return self.bound(self.guesses)

    @property
    def able(self) -> bool:
        """Whether the bound exceeds the claimed epsilon if all guesses are right."""
        chance = p_value(self.guesses, self.guesses, self.epsilon, self.delta, self.canaries)
        return chance < 1 - CONFIDENCE

    def _able(self) -> "PrivacyAudit | None":
        """The audit with more canaries that can exceed the claim, if there is none also with a smaller delta."""
        for digits in range(_DIGITS):
            delta = float(f"{self.delta / 10**digits:.1e}")
            for power in range(_DOUBLINGS + 1):
                audit = replace(self, canaries=self.canaries * 2**power, delta=delta)
                if audit.able:
                    return audit
        return None

    def refuse_unable(self, n: int, classes: int) -> None:
        """Raise `UsageError` if no result could exceed the claimed epsilon, or if there are too few of `n` examples."""
        if not self.able:
            able = self._able()
            if able is None:
                raise UsageError(
                    f"the claimed epsilon is {self.epsilon:g}, which is too large for a test by canaries: even if all "
                    f"guesses about {self.canaries * 2**_DOUBLINGS:,} canaries were right, they would not show more; "
                    "expected a smaller epsilon"
                )
            changes = {"canaries": able.canaries, "delta": able.delta}
            changed = [Remedy(name, value) for name, value in changes.items() if value != getattr(self, name)]
            if self.kind == "mislabelled" and able.canaries > n // 2:
                changed.append(Remedy("canary", "random"))
            reason = "" if able.delta == self.delta else "if the training claims this delta"
            raise UsageError(
                f"{self.canaries:,} canaries show an epsilon of at most {self.largest:.2f} at delta={self.delta:g}, "
                f"and {self.epsilon:g} is claimed, so that no result could exceed it",
                replace(changed[0], also=tuple(changed[1:]), reason=reason),
            )
        if self.kind == "mislabelled" and self.canaries > n // 2:
            raise UsageError(
                f"{self.canaries} mislabelled canaries would replace more than half of the {n} examples; expected "
                "more examples, fewer canaries, or random canaries",
                Remedy("canary", "random"),
            )
        if classes < 2:
            raise UsageError(
                "the model has one class, so that no label is wrong; expected two classes or more"
            )


def measure(run: Run, train: Train, data: Batch, model: Classifier, how: PrivacyAudit) -> Images:
    """Train one network with canaries, and store their losses. The training is one step of the run.

    `model` states the bounds of the inputs and the number of classes.
    """
    classes = model.classes
    assert classes is not None

    def measured() -> Columns:
        rng = Draws(how.seed).at("privacy")
        canaries = planted(data, classes, model.bounds, n=how.canaries, kind=how.kind, rng=rng)
        return _measured(train, canaries, how.seed) | {"counts": data.y.cpu().bincount(minlength=classes)}

    run.stage(LOSSES, measured)
    return dict


class _Settings(TypedDict):
    epsilon: Annotated[float, Strict(), Field(gt=0, le=1e4)]
    delta: Share
    canaries: Annotated[Size, Field(ge=1)]
    kind: CanaryKind
    share: Share
    equal_rows: Annotated[Size, Field(ge=1)]


_FORMS = {
    "canary": flag("n"),
    "included": flag("n"),
    "loss": Form(),
    "right": flag("n"),
    "counts": whole("classes", high=2**31),
}


def concluded(steps: StoredSteps) -> Finding:
    """Return the lower bound of epsilon from guesses which canaries were included."""
    settings = steps.settings(_Settings)
    how = PrivacyAudit(
        **{name: settings[name] for name in _Settings.__annotations__}, seed=steps.manifest["seed"]
    )
    columns = steps.columns(LOSSES, _FORMS)
    shown, counts = columns["canary"] == 1, columns["counts"]
    n_canaries, n = int(shown.sum()), int(counts.sum())
    if n_canaries != how.canaries or n_canaries == len(shown) or not n:
        raise steps.refuse(
            LOSSES,
            f"{n_canaries:,} canaries and {len(shown) - n_canaries:,} other examples",
            f"{how.canaries:,} canaries beside others",
        )
    losses, included = columns["loss"][shown], columns["included"][shown] == 1
    accuracy = float((columns["right"][~shown] == 1).double().mean())
    found = _finding(how, right_guesses(losses, included, how.guesses), n, accuracy, losses, included)
    majority = float(counts.max()) / n
    if found.verdict == "flagged" or accuracy > majority:
        return found
    untrained = (
        f"The network classifies {percent(accuracy)} of its other training examples correctly, and the most frequent "
        f"class is {percent(majority)} of them: a training that learns nothing reveals nothing."
    )
    return replace(found, verdict="unclear", reasons=[untrained, *found.reasons])


def _measured(train: Train, canaries: Canaries, seed: int) -> dict[str, Tensor]:
    """Losses of the canaries, and of some of the other training examples, under a network that is trained once."""
    model = train(*canaries.training, seed)
    order = (
        Draws(seed).at("privacy", "rest").bits(canaries.rest.ids.cpu()).argsort()
    )  # a file may be sorted by class
    rest = canaries.rest.take(order[:_SEEN].to(canaries.x.device))
    y = torch.cat((canaries.y, rest.y))
    logits = _logits(model, torch.cat((canaries.x, rest.x)))
    n, n_rest = len(canaries.y), len(rest)
    zeros = torch.zeros(n_rest, dtype=torch.int64)
    return {
        "id": torch.arange(n + n_rest),
        "canary": (torch.arange(n + n_rest) < n).long(),
        "included": torch.cat((canaries.included.cpu().long(), zeros + 1)),
        "label": y.cpu(),
        "loss": cross_entropy(logits, y, reduction="none").double().cpu(),
        "right": (logits.argmax(1) == y).long().cpu(),
    }


def _logits(model: Classifier, x: Inputs) -> Tensor:
    with torch.no_grad():
        logits = torch.cat([model(piece).double() for piece in torch.split(x, _PIECE)])
    if not logits.isfinite().all():
        raise TargetError(
            "the trained network returns values that are not finite, so that canaries cannot be guessed; expected a "
            "training that converges"
        )
    return logits


def _finding(
    how: PrivacyAudit, right: int, n: int, accuracy: float, losses: Tensor, included: Tensor
) -> Finding:
    guesses, epsilon = how.guesses, how.bound(right)
    flagged = epsilon > how.epsilon
    chance = 1 / (1 + math.exp(-how.epsilon))
    compared = (
        f"more than the claimed {how.epsilon:g}" if flagged else f"not more than the claimed {how.epsilon:g}"
    )
    counted = f"{right} of {guesses} guesses are right"
    reasons = [f"{counted}; each is with probability {chance:.3f} at most if epsilon is {how.epsilon:g}"]
    if how.delta >= 1 / n:
        reasons.append(
            f"delta is {how.delta:g}, which is not smaller than 1/n = {1 / n:.2g}: a training that publishes one of "
            f"the {n:,} examples could have this delta"
        )
    medians = [float(losses[part].median()) if part.any() else math.nan for part in (included, ~included)]
    return Finding(
        "flagged" if flagged else "not flagged",
        f"epsilon is at least {epsilon:.2f}, {compared}",
        reasons,
        {
            "epsilon_lower": epsilon,
            "epsilon_claimed": how.epsilon,
            **{name: value for name, value in how.claim.entry().items() if name != "epsilon"},
            "largest_possible": how.largest,
            "canaries": how.canaries,
            "guesses": guesses,
            "right": right,
            "right_interval": clopper_pearson(right, guesses),
            "training_accuracy": accuracy,
            "median_loss_included": medians[0],
            "median_loss_not_included": medians[1],
        },
        # the bound is a function of the counts; an interval around a bound would have no meaning
        metrics={"epsilon_lower": Estimate(epsilon, epsilon, epsilon, guesses)},
        tables=(
            Table(
                "Guesses",
                ("canaries", "guesses", "right", "bound at 95 %", "bound if all were right"),
                [(how.canaries, guesses, right, round(epsilon, 3), round(how.largest, 3))],
                "The canaries with the smallest losses are guessed to be included, those with the largest not.",
            ),
            Table(
                "Losses",
                ("canaries", "number", "median loss"),
                [
                    ("included", int(included.sum()), medians[0]),
                    ("not included", int((~included).sum()), medians[1]),
                ],
                f"The network classifies {percent(accuracy)} of its other training examples correctly.",
            ),
        ),
        limits=(
            f"The claim is for rows: {how.claim.sentence()}.",
            _WEAK,
            f"{guesses} guesses show an epsilon of at most {how.largest:.2f}.",
        ),
    )
