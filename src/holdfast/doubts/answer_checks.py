"""Checks of the adaptive attack itself: only if they are passed do its results answer a doubt.

The checks are those of the doubts: Athalye, Carlini & Wagner, ICML 2018, arXiv:1802.00420, section 3.1, and Tramèr et
al., NeurIPS 2020, arXiv:2002.08347.
"""

import torch

from holdfast.attacks.parts.ascent import gradient
from holdfast.attacks.parts.losses import margin, margin_loss
from holdfast.core.batch import Batch
from holdfast.core.constraints import Constraint, extent
from holdfast.core.draws import Draws
from holdfast.core.evidence import AnswerCheck, CheckState, Columns
from holdfast.core.model import Bounds, Model
from holdfast.core.types import Mask, PerExample
from holdfast.doubts.protocol import percent

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
