"""The verdict on a hardening by its measurements, and what would help a hardening that improved nothing."""

from collections.abc import Mapping
from typing import Any

from holdfast.core.constraints import Constraint
from holdfast.core.evidence import Evidence
from holdfast.core.goal import Goal
from holdfast.gates.training_verdicts import training_verdict
from holdfast.metrics.catalogue import estimate
from holdfast.metrics.paired import basis, change, improvement
from holdfast.threats.domains import TEXT

Json = dict[str, Any]

_EPOCHS = 10
"""Number of epochs below which more of them are advised; the recipe `pgd` wants as many (`auto`)."""
_FEW = 0.2
"""Robust accuracy below which a smaller eps is advised."""
_QUICK = ("fgsm", "fgsm-rs", "n-fgsm", "free", "atta")
"""Recipes with cheap updates."""
_COMPRESSING = ("int8", "prune")
"""Recipes whose purpose is a smaller network, which no other one gives."""
_SLOWER, _LONGER = 4, 2
"""Advised divisor of the learning rate and factor of the warm-up after a collapse."""
_LONGEST = 0.9
"""Largest warm-up that is advised."""


def verdict_entries(before: Evidence, after: Evidence, goal: Goal) -> Json:
    """Return the entries of a card on the verdict: its name, and the metric of both models with its change."""
    difference = change(goal.metric, after, before)
    suite_only = goal.metric == "robust_accuracy" and basis(after, before) == "suite only"
    compared = "suite_robust_accuracy" if suite_only else goal.metric
    values = {
        "before": estimate(compared, before).value,
        "after": estimate(compared, after).value,
        **vars(difference),
    }
    verdict = training_verdict(improvement(goal, difference))
    return {"verdict": verdict, "change": {"metric": goal.metric, "better": goal.better, **values}}


def advice(card: Mapping[str, Any], constraint: Constraint) -> Json:
    """Return what would help the hardening with a card that improved nothing: more epochs with the budget that they
    need, another recipe, a smaller eps, and after a collapse a smaller learning rate and a longer warm-up. Entries are
    None if they would not help or are not known, as a smaller eps under a constraint without a size.
    """
    eps = float(constraint.eps) if constraint.has_size else None
    ways: Json = dict.fromkeys(("epochs", "budget_s", "recipe", "eps", "lr", "warmup"))
    if card["verdict"] == "improved" or (
        card["change"]["better"] == "higher" and card["change"]["before"] == 1
    ):
        return ways
    training = card["settings"]["training"]
    if card["ended_by"] == "collapse":
        lr, warmup = training.get("lr"), training.get("warmup")
        ways["lr"] = None if lr is None else lr / _SLOWER
        ways["warmup"] = None if warmup is None else min(_LONGER * warmup, _LONGEST)
        ways["eps"] = None if eps is None else eps / 2
        return ways
    short = card["epochs"] < _EPOCHS
    if short and card["ended_by"] != "patience":
        ways["epochs"] = _EPOCHS
        ways["budget_s"] = _budget_s(card["plan"], card["recipe"])
    if constraint.domain is TEXT:
        ways["recipe"] = "masked-words" if card["recipe"] == "standard" else None
    elif card["change"]["metric"] == "robust_accuracy" and eps is not None:
        ways["recipe"] = _other_recipe(card["recipe"], card["ended_by"], short=short)
        ways["eps"] = eps / 2 if card["change"]["after"] < _FEW else None
    return ways


def _budget_s(plan: Mapping[str, Any], recipe: str) -> float | None:
    """Seconds of a budget for `_EPOCHS` epochs, by the timings of the plan; None for a training without a budget."""
    attempt = next(attempt for attempt in plan["attempts"] if attempt["recipe"] == recipe)
    if plan["budget_s"] is None:
        return None
    seconds: float = plan["planning_s"] + _EPOCHS * attempt["epoch_s"]
    return seconds


def _other_recipe(recipe: str, ended_by: str, *, short: bool) -> str | None:
    """A recipe that may give more robust accuracy: one with cheaper updates if a budget left few epochs, otherwise one
    that trains on stronger attacks.
    """
    if recipe in _COMPRESSING:
        return None
    if short and ended_by == "budget":
        return None if recipe in _QUICK else "fgsm-rs"
    if recipe == "pgd":
        return None if short else "trades"
    return "pgd"
