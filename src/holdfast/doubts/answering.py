"""Adaptive attacks that answer a raised doubt, and the checks that they must pass."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from holdfast.attacks.costs import expected_passes
from holdfast.attacks.parts.ascent import gradient
from holdfast.attacks.parts.losses import dlr, margin, margin_loss
from holdfast.attacks.pgd import margin_pgd
from holdfast.attacks.protocol import Attack
from holdfast.core.batch import Batch
from holdfast.core.constraints import Constraint, extent
from holdfast.core.draws import Draws
from holdfast.core.evidence import AnswerCheck, CheckState, Columns, Doubt
from holdfast.core.model import Bounds, Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Mask, PerExample
from holdfast.doubts.probing import doubt_test
from holdfast.doubts.protocol import percent
from holdfast.doubts.zero_gradient import ZERO_GRADIENTS

WHOLE_BOX = 0.05
"""largest share of examples that the attack may leave if every valid input is allowed"""
LARGER = 0.5
"""smallest share of the examples that survive which the attack must break with a larger eps"""
AGREES = 0.75
"""smallest share of examples for which a step along the gradient must lower the margin more than a step against it; for
a meaningless gradient, 24 of 32 have a probability of 0.4 %"""
OF_CHOICES = 0.1
"""largest share of examples that may survive if the model chooses among outcomes without a gradient"""
_REACH = 0.5  # length of these steps in multiples of eps


def larger_sizes(constraint: Constraint, batch: Batch, bounds: Bounds, most: int) -> tuple[float, ...]:
    """Return up to `most` larger values of eps: twice eps, four times, and so on, below half of the largest distance of
    two inputs, with which every input becomes the same point. There is at least one.
    """
    widest = extent(constraint, batch.x, bounds)
    sizes = [constraint.eps * 2**k for k in range(1, most + 1)]
    return tuple(size for size in sizes if size < widest / 2) or (min(2 * constraint.eps, widest),)


def agreeing(model: Model, batch: Batch, constraint: Constraint, rng: Draws, draws: int) -> Mask:
    """Return a mask of the examples for which a step along the gradient of the margin, from a random point inside the
    constraint, lowers the margin more than a step against it. Gradients and margins are means over `draws` passes.
    """
    x = constraint.sample(batch, model.bounds, rng.at("gradient"))
    mean = torch.stack([gradient(model, batch.at(x), margin_loss)[0] for _ in range(draws)]).mean(0)
    step = _REACH * constraint.eps * constraint.steepest(mean, x, model.bounds)

    def height(sign: int) -> PerExample:
        moved = batch.at(model.bounds.clamp(x + sign * step))
        with torch.no_grad():
            return torch.stack([margin(model(moved.x, batch.ids), batch) for _ in range(draws)]).mean(0)

    return height(1) < height(-1)


def answer_checks(columns: Columns, *, changed: int = 0) -> tuple[AnswerCheck, ...]:
    """Return the checks from the columns of their stage: `ran`, the examples that `survived` all attacks, those that
    `box` leaves with the whole box (-1 if no method was run), the number of the `larger` eps that broke each survivor
    (0 if none did), those that the search from labels broke (`success`) and whether it was run (`searched`), whether
    the gradient `agrees` (-1 without gradients), whether outputs `changed` with earlier queries, and whether the model
    `chooses` among outcomes without a gradient. `changed` is the number of examples with another output during the
    attack.
    """
    ran, survived = columns["ran"].bool(), columns["survived"].bool()
    n, left = int(ran.sum()), int((ran & survived).sum())
    in_box, searched = ran & (columns["box"] >= 0), bool(columns["searched"][ran & survived].bool().all())
    boxed, n_in_box = int((in_box & (columns["box"] > 0)).sum()), int(in_box.sum())
    larger = int((columns["larger"] > 0).sum())
    labels = int((columns["success"] & survived).sum())
    tested = ran & (columns["agrees"] >= 0)
    agrees, changed = int((columns["agrees"] > 0).sum()), changed + int((columns["changed"] > 0).sum())
    chooses, alive = bool((columns["chooses"][ran] > 0).any()), left / max(n, 1)
    share, rest = agrees / max(int(tested.sum()), 1), boxed / max(n_in_box, 1)
    checks = [
        ("whole-box", rest <= WHOLE_BOX, rest, WHOLE_BOX, n_in_box,
         f"with every valid input allowed, it leaves {boxed} of {n_in_box} examples"),
        ("larger-eps", larger >= LARGER * left, larger / max(left, 1), LARGER, left,
         f"larger eps break {larger} of the {left} examples that survive"),
        ("labels-only", not labels, float(labels), 0.0, left,
         f"a search with labels only breaks {labels} of the {left} examples that survive it"
         if searched or labels else "the search with labels only was not run on all examples that survive"),
        ("gradient", share >= AGREES, share, AGREES, int(tested.sum()),
         f"its gradient predicts the effect of a step for {percent(share)} of the examples"
         if tested.any() else "the attack has no gradient"),
        ("same-output", not changed, float(changed), 0.0, n,
         f"after further queries, {changed} examples had an input with another output"),
        ("choices", alive <= OF_CHOICES, alive, OF_CHOICES, n,
         f"the model chooses among outcomes, of which the attack did not try each, and {left} of {n} examples survive"
         if chooses else "the model does not choose among outcomes without a gradient"),
    ]  # fmt: skip
    if_passed: dict[str, CheckState] = {
        "whole-box": "passed" if torch.equal(in_box, ran) else "not measured",
        "labels-only": "passed" if searched else "not measured",  # it breaks nothing if it was not run
        "gradient": "passed" if tested.any() else "not applicable",
        "choices": "passed" if chooses else "not applicable",
    }
    return tuple(
        AnswerCheck(
            name,
            _state(n, if_passed.get(name, "passed"), passed=passed),
            value,
            limit,
            of,
            text,
        )
        for name, passed, value, limit, of, text in checks
    )


def _state(n: int, if_passed: CheckState, *, passed: bool) -> CheckState:
    if not n:
        return "not measured"
    return if_passed if passed or if_passed == "not applicable" else "failed"


DRAWS = 20
"""number of forward passes over which EOT (expectation over transformation) averages a gradient"""
SURE = 0.95
"""fraction of the forward passes that must misclassify an example before EOT stops; a mere majority may not last"""
Means = Literal["bypass", "search", "average"]
"""kinds of adaptive attacks, as in `DoubtTest.answered_by`"""
BUDGET = 20_000
"""default for the largest number of forward and backward passes of all adaptive attacks and checks for each example"""
FIXED = 0.75
"""largest share of the budget for the attacks with fixed settings; otherwise only the adaptive search is run"""
CHECKED = 3
"""the checks of the adaptive search use this part of its passes"""
SEARCH = "AdaptiveSearch"
"""name of the attack that divides its budget among several methods"""
DETECTOR = "a detector"
"""reason, listed with the doubts, for attacks on a network together with its detector"""
EVEN = 0.3
"""weight of the detector's score, in multiples of the weight that balances it with the margins of the classes"""
WEIGHTS = {"Pair": EVEN, "Pair-light": EVEN / 10, "Pair-heavy": EVEN * 10}
"""weight of the detector's score in each attack on a network and its detector, by name of the attack"""


@dataclass(frozen=True)
class Arm:
    """An adaptive attack: one that is run after the suite if a doubt is raised that it can test. An attack with a
    `weight` is also run on every model with a detector.
    """

    name: str
    """name of the attack in reports, such as `EOT`"""
    attack: Attack
    means: tuple[Means, ...]
    """what the attack does: bypass masked gradients, search without gradients, or average gradients. Each doubt states
    which of these test it (`DoubtTest.answered_by`)"""
    weight: float | None = None
    """weight of a detector's score, in multiples of the weight that balances it with the classes; if it is set, the
    attack runs on every model with a detector"""

    @property
    def averages(self) -> bool:
        """Whether the gradients of the attack are means over several forward passes."""
        return self.attack.needs == "gradients" and "average" in self.means

    @property
    def single_draw(self) -> bool:
        """Whether the adaptive attack uses the gradient of a single forward pass, which is not reliable for a
        randomised model.
        """
        return self.attack.needs == "gradients" and not self.averages


def arms(constraint: Constraint) -> tuple[Arm, ...]:
    """Return the adaptive attacks that are possible under a constraint: attacks whose gradients bypass gradient
    masking, followed by a search without gradients, and by the search that divides its budget among several methods.

    Expectation over transformation (Athalye et al., "Synthesizing robust adversarial examples", ICML 2018,
    arXiv:1707.07397) needs steps that can be averaged, which L0 attacks lack. Under L2 and L1, minimum-norm attacks are
    added, since they break examples that survive attacks inside the ball (docs/decisions/0008).
    """
    from holdfast.attacks import ALMA, APGD, FAB, SparseRS, Square  # only for runs with adaptive attacks

    pair = margin_pgd(steps=100, restarts=8)
    on_pair = tuple(Arm(name, pair, ("bypass",), weight) for name, weight in WEIGHTS.items())
    if constraint.counts_changes:
        return (
            *on_pair,
            Arm("BPDA", margin_pgd(steps=100, restarts=5), ("bypass",)),
            Arm("Search", SparseRS(queries=10_000), ("search",)),
        )
    nearest = (
        Arm("BPDA-ALMA", ALMA(steps=100, reach=4, refine=20), ("bypass",)),
        Arm("BPDA-FAB", FAB(steps=100, targets=9, eta=1.3, refine=20), ("bypass",)),
    )
    searches: tuple[Arm, ...] = ()
    if constraint.in_input_units:
        from holdfast.attacks.adaptive_search import AdaptiveSearch  # only for runs with adaptive attacks

        searches = (Arm(SEARCH, AdaptiveSearch(passes=BUDGET), ("bypass", "average", "search")),)
    return (
        *on_pair,
        Arm("EOT", APGD(loss=margin_loss, steps=100, restarts=2, draws=DRAWS, sure=SURE), ("average",)),
        Arm("BPDA", APGD(loss=margin_loss, steps=100, restarts=2), ("bypass",)),
        Arm("BPDA-T", APGD(loss=dlr, steps=100, targets=9), ("bypass",)),
        *(() if constraint.bounds_each_value else nearest),
        Arm("Search", Square(queries=5000), ("average", "search")),
        *searches,
    )


def within(
    budget: int, available: Sequence[Arm], threat: ThreatModel, *, randomised: bool
) -> tuple[Arm, ...]:
    """Return the adaptive attacks that fit into a budget, the largest number of forward and backward passes for each
    example, with the adaptive search limited to what the others leave.

    If the others with fixed settings need more than the share `FIXED` of the budget, only the adaptive search and the
    attacks on detectors are run. Without an adaptive search, the attacks are unchanged.
    """
    search = next((arm for arm in available if arm.name == SEARCH), None)
    if search is None:
        return tuple(available)
    fixed = [arm for arm in available if arm.name != SEARCH]
    averages = randomised and any(arm.averages for arm in fixed)
    needed = {
        arm.name: _passes(arm.attack, threat)
        for arm in fixed
        if arm.weight is not None or not (arm.single_draw if averages else arm.averages)
    }
    if sum(needed.values()) > FIXED * budget:
        fixed = [arm for arm in fixed if arm.weight is not None]
    left = budget - math.ceil(sum(needed.get(arm.name, 0.0) for arm in fixed))
    settings: Any = search.attack
    return (*fixed, replace(search, attack=replace(settings, passes=max(1, left * CHECKED // (CHECKED + 1)))))


def _passes(attack: Attack, threat: ThreatModel) -> float:
    """Forward and backward passes of an attack for an example that it does not break; DLR targets need the classes."""
    forwards, backwards = expected_passes(attack, threat, classes=10)
    return (forwards + backwards) * int(vars(attack).get("draws", 1))


def required_attacks(available: Sequence[Arm], doubts: Sequence[Doubt]) -> dict[str, tuple[str, ...]]:
    """Return the names of those adaptive attacks that the raised doubts require, each with the names of these doubts.

    On a randomised model, EOT is the only attack that uses gradients, since a single misclassified forward pass proves
    nothing.
    """
    answers = {doubt.name: doubt_test(doubt.name).answered_by for doubt in doubts}
    averaged = any(arm.averages for arm in available) and any(
        "average" in answers[doubt.name] and _random(doubt) for doubt in doubts
    )
    required: dict[str, tuple[str, ...]] = {}
    for arm in available:
        if averaged and arm.single_draw:
            continue
        means = {*arm.means, "bypass"} if averaged and arm.averages else {*arm.means}
        because = tuple(d.name for d in doubts if d.state == "raised" and means & {*answers[d.name]})
        # these attacks run on every model with a detector, whether or not a doubt requires them
        if arm.weight:
            because = (DETECTOR, *because)
        required |= {arm.name: because} if because else {}
    return required


def _random(doubt: Doubt) -> bool:
    """Whether the doubt shows that the model is randomised, even if a suite that averages over draws has cleared it."""
    moved = doubt.statistic is not None and doubt.threshold is not None and doubt.statistic > doubt.threshold
    return doubt.state == "raised" or moved


def with_answers(
    doubts: Sequence[Doubt],
    ran: Mapping[str, Columns],
    because: Mapping[str, tuple[str, ...]],
    *,
    bypassed: bool,
    survivor_broken: bool,
    blind: bool = False,
    checks: Sequence[AnswerCheck] = (),
) -> tuple[Doubt, ...]:
    """Return the doubts of a run after its adaptive attacks. A raised doubt becomes answered if the attacks that it
    requires were run.

    `ran` are the columns of each attack that was run, and `because` the doubts that required each attack. A doubt is
    answered if all attacks that it requires were run on all surviving examples, and none of the `checks` of the
    adaptive attack is failed or not measured. There are three exceptions: the
    gradient of the attack itself is still zero, also with respect to a detector (`blind`); the gradient is shattered,
    and no attack averaged it or bypassed a stage (`bypassed`); and `not-exhausted`, while an example that a probe
    broke survives (`survivor_broken`).
    """

    def with_answer(doubt: Doubt) -> Doubt:
        required = [arm for arm, names in because.items() if doubt.name in names]
        if doubt.state != "raised" or not required or not set(required) <= set(ran):
            return doubt
        failed = [check.name for check in checks if check.state in ("failed", "not measured")]
        if failed:
            without = f"the adaptive attack did not pass every check of it ({', '.join(failed)})"
            return replace(doubt, message=f"{doubt.message}; {without}")
        unless = doubt_test(doubt.name).unanswered_if
        dead = unless == "dead" and (blind or _dead(ran, required))
        if dead or (unless == "not bypassed" and not bypassed and "EOT" not in required):
            return replace(doubt, message=f"{doubt.message}; the adaptive attacks did not circumvent it")
        if unless == "survivor broken" and survivor_broken:
            return doubt
        return _answered(doubt, ran, required)

    return tuple(map(with_answer, doubts))


def _answered(doubt: Doubt, ran: Mapping[str, Columns], required: Sequence[str]) -> Doubt:
    attacked = torch.stack([ran[arm]["ran"] for arm in required]).any(0)
    broke = torch.stack([ran[arm]["success"] for arm in required]).any(0)
    answer = (
        f"answered by {' and '.join(required)}, which broke {int(broke.sum()):,} of the {int(attacked.sum()):,} "
        f"examples that they were run on"
    )
    return replace(doubt, state="answered", message="; ".join(filter(None, (doubt.message, answer))))


def _dead(ran: Mapping[str, Columns], arms: Sequence[str]) -> bool:
    """Whether the first gradients of these attacks were zero or NaN for more than 1 % of the examples.

    True if none of them used gradients.
    """
    for arm in arms:
        with_gradients = ran[arm]["dead"] | (ran[arm]["backwards"] > 0)
        if with_gradients.any():
            return float(ran[arm]["dead"][with_gradients].double().mean()) > ZERO_GRADIENTS
    return True
