"""The result of a hardening: the new model, its model card, the measurements before and after, and the verdict."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Generic

import torch
from torch import Tensor
from typing_extensions import TypeVar

from holdfast.core.chain import canonical, digest
from holdfast.core.constraints import Constraint
from holdfast.core.estimate import Goal
from holdfast.core.evidence import Evidence
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.gates.judging import TrainingVerdict, training_verdict
from holdfast.io.models.architectures import int8_layers
from holdfast.io.models.composed import Ensemble
from holdfast.io.models.models import CARD, PROGRAM, WEIGHTS
from holdfast.metrics.catalogue import estimate
from holdfast.metrics.comparisons import basis, change, improvement
from holdfast.metrics.shares import classes_of, robust_error_gap
from holdfast.recipes.training.follow_up import MOST_RAISED
from holdfast.recipes.training.recipe import facts_of
from holdfast.reports.card import card_report, checkpoint_text, compared_metrics, curve, judged
from holdfast.reports.formats.html import svg
from holdfast.reports.tree import Report
from holdfast.reports.words import percent, plain, strict
from holdfast.reports.write import rendered
from holdfast.runs.assess.request import DescribedModel
from holdfast.runs.assess.result import Result
from holdfast.runs.harden.candidates import Candidate, EndedBy, announced_s, standard_error
from holdfast.runs.harden.checkpoints import Point
from holdfast.runs.store.files import BY_UMASK, usable, write_atomically
from holdfast.runs.store.folder import document
from holdfast.statistics.intervals import against_majority, proportion
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


MODEL = WEIGHTS
"""Name of the file with the new model."""


ModelT = TypeVar("ModelT", default=Classifier)
ResultT = TypeVar("ResultT", default=Result)


@dataclass(frozen=True)
class CardForm:
    """How the card of a new model is shown."""

    files: Callable[[Any, Path], Mapping[str, bytes]]
    """function that returns the files of a `Hardened` for a folder, by name"""
    line: Callable[[Mapping[str, Any]], str]
    """function from the card to one line"""
    report: Callable[[Mapping[str, Any]], Report]
    """function from the card to its report"""


def _files(hardened: "Hardened", place: Path) -> dict[str, bytes]:
    card = {**hardened.card, "opened_by": hardened.opened_by(place)}
    return {
        MODEL: hardened.weights,
        **({} if hardened.program is None else {PROGRAM: hardened.program}),
        CARD: document(card),
        "card.md": rendered(card_report(card), ".md").encode(),
        "curve.svg": svg(curve(card)).encode(),
    }


def _line(card: Mapping[str, Any]) -> str:
    before, after = (card[side]["metrics"] for side in ("before", "after"))
    names, at_chance = compared_metrics(card), card["before"]["at_chance"]
    metrics = [
        f"{name} {'' if at_chance else percent(before[name]['value']) + ' → '}{percent(after[name]['value'])}"
        for name in names
    ]
    epoch = checkpoint_text(card["chosen"], card["epochs"])
    text = f"{card['recipe']}: {', '.join(metrics)} ({epoch})"
    if at_chance:
        text += f"; the given model was at chance ({names[0]} {percent(before[names[0]]['value'])})"
    return text


@dataclass(frozen=True)
class Hardened(Generic[ModelT, ResultT]):
    """The result of a hardening: the new model, its training, and the measurements of the original and new models. The
    model is a classifier with assessments, or a GAN with audits.
    """

    model: ModelT
    before: ResultT
    after: ResultT
    curve: tuple[Point, ...]
    """training curve of the new model, with one point for each epoch that was evaluated"""
    card: Mapping[str, Any]
    """recipe, settings, plan, both measurements, cost and versions, as strict JSON"""
    weights: bytes
    """content of the safetensors file with the new model"""
    folder: Path | None = None
    program: bytes | None = None
    """content of the file with the program of a member of an ensemble, with which it is opened without its code"""
    form: CardForm = CardForm(_files, _line, card_report)

    def opened_by(self, folder: Path) -> str:
        """Return the command line that assesses the new model in the file in `folder`."""
        return _placed(self.card["opened_by"], folder)

    def write(self, folder: str | Path) -> Path:
        """Write the weights and the card of the new model to a folder, and its training curve if there is one. Return
        the path of the folder.

        The folder is created if it does not exist. On the card, the command that opens the model contains `folder` as
        given.
        """
        place = Path(folder)
        with usable(place):
            place.mkdir(parents=True, exist_ok=True)
            for name, content in self.form.files(self, place).items():
                write_atomically(place / name, content, BY_UMASK)
        return place

    @property
    def report(self) -> Report:
        """The card of the new model as a report."""
        return self.form.report(self.card)

    @property
    def verdict(self) -> TrainingVerdict:
        """Whether the new model is better than the given one by the metric of the recipe: `improved`, `no difference
        shown` or `worse`. For a generator, the verdict of the audit of the new one.
        """
        verdict: TrainingVerdict = self.card["verdict"]
        return verdict

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on the training of the new model for the report."""
        return tuple(self.card["notes"])

    def __str__(self) -> str:
        return self.form.line(self.card)


@dataclass(frozen=True)
class Made:
    """A model that was trained with one candidate recipe of a hardening, and the course of its training."""

    candidate: Candidate
    attempt: Mapping[str, Any]
    subject: DescribedModel
    curve: tuple[Point, ...]
    chosen: Point
    raised: int
    """how often the guard of the recipe increased its number of attack steps"""
    ended_by: EndedBy
    plans: int = 0
    """number of plans made within the budget"""
    state: Mapping[str, Tensor] = field(default_factory=dict)
    """state of the recipe in the chosen checkpoint, for a recipe with a follow-up"""

    @property
    def epochs(self) -> float:
        """Number of epochs for which the model was trained. It is an integer if the last epoch is complete."""
        epochs = self.curve[-1].epochs
        return int(epochs) if epochs == int(epochs) else epochs


def trained_under(threat: ThreatModel) -> str:
    """Return the threat model of a training as its card states it, such as `linf:0.1`, without goal and access."""
    return ThreatModel(threat.constraint, unit=threat.unit).text


def weights_metadata(subject: DescribedModel, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata that is written to the weights file of a hardened model: how the model is opened, and the
    digest of its training.
    """
    architecture = {
        key: subject.card[key] for key in ("architecture", "arguments", "denoiser") if key in subject.card
    }
    architecture |= structure_metadata(subject.model.net)
    properties = {
        key: subject.card[key]
        for key in ("bounds", "mean", "std", "classes")
        if subject.card.get(key) is not None
    }
    model = subject.model
    output_properties = {
        "output": model.output,
        "layout": model.layout,
        "class_names": model.class_names or manifest["data"].get("classes"),
    }
    properties |= {key: value for key, value in output_properties.items() if value is not None}
    return {
        **architecture,
        **properties,
        "training": training_digest(manifest),
    }


def structure_metadata(net: object) -> dict[str, Any]:
    """Return the metadata of a weights file on the structure of a network beyond its architecture: the members of an
    ensemble, and layers of 8-bit integers.
    """
    ensemble = {"ensemble": net.metadata()} if isinstance(net, Ensemble) else {}
    layers = [*int8_layers(net)]
    return ensemble | ({"int8": layers} if layers else {})


def training_digest(manifest: Mapping[str, Any]) -> str:
    """Return the SHA-256 that identifies the hardening with a manifest in the file of its new model, in hex."""
    return digest(canonical([manifest["digests"], manifest["plan"]]))


def timeless(card: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model card without its times and its command line, which may differ between two equal runs."""
    points = [_timeless_point(point) for point in card["curve"]]
    entries = {name: value for name, value in card.items() if name not in {"cost", "command"}}
    return {
        **entries,
        "curve": points,
        "chosen": _timeless_point(card["chosen"]),
    }


def _timeless_point(point: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in point.items() if name not in {"cpu_s", "wall_s"}}


def card_of(
    trained: Sequence[Made],
    best: Made,
    sides: tuple[Result, Result],
    manifest: Mapping[str, Any],
    entries: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the model card of the best model that a hardening trained.

    `trained` are all trained models and `best` is one of them. `sides` are the results before and after the training.
    `entries` contains the entries of the card that come from the request.
    """
    recipes = [attempt.candidate.name for attempt in trained]
    given = sides[0].evidence
    at_chance = against_majority(given["correct"], given["y"], classes_of(given.model)).at_chance
    card: dict[str, Any] = strict(
        {
            **entries,
            "name": best.subject.card["name"],
            "evaluated_under": sides[1].evidence.threat.text,
            "recipe": best.candidate.name,
            "reason": best.attempt["reason"],
            "epochs": best.epochs,
            "ended_by": best.ended_by,
            "settings": _as_trained(best),
            "plan": manifest["plan"],
            "recipes_tried": recipes,
            **verdict_entries(sides[0].evidence, sides[1].evidence, facts_of(best.candidate.recipe).goal),
            "scope": basis(sides[0].evidence, sides[1].evidence),
            "before": {**judged(sides[0].summary()), "at_chance": at_chance},
            "after": judged(sides[1].summary()),
            "chosen": best.chosen.to_json(),
            "held_out": _held_out(best.chosen, **entries["held_out"]),
            "generalisation": generalisation(
                entries["held_out"]["n"], best.chosen.robust, **entries["generalisation"]
            ),
            "curve": [point.to_json() for point in best.curve],
            "notes": [
                *entries["notes"],
                *(note for attempt in trained for note in _training_notes(attempt)),
                *_attempts_note(recipes, best),
            ],
            "cost": _cost(trained, best, manifest["plan"]),
            "model": dict(best.subject.card),
            "data": manifest["data"],
            "versions": manifest["versions"],
            "hardware": ", then ".join(dict.fromkeys(point.hardware for point in best.curve)),
        }
    )
    constraint = sides[1].evidence.threat.constraint
    card["advice"] = strict(advice(card, constraint))
    return card


def _cost(trained: Sequence[Made], best: Made, plan: Mapping[str, Any]) -> dict[str, float]:
    """Cost of all trainings and of the planning; `budget_used` is their share of the time that was announced for so
    many trainings, `announced_s`.
    """
    points = [point for attempt in trained for point in attempt.curve]
    totals = {name: sum(getattr(point, name) for point in points) for name in ("forwards", "cpu_s", "wall_s")}
    totals["planning_s"] = plan["planning_s"]
    if plan["budget_s"] is None:
        return totals
    announced = announced_s(plan["budget_s"], len(trained))
    return {
        **totals,
        "budget_s": plan["budget_s"],
        "announced_s": announced,
        "budget_used": (plan["planning_s"] + totals["wall_s"]) / announced,
        "plans": best.plans,
    }


def _as_trained(trained: Made) -> dict[str, Any]:
    """The settings of the recipe, updated by the plan, the defaults, and out-of-memory splits."""
    settings_of_training, last = trained.candidate.recipe.training, trained.curve[-1]
    lr = trained.attempt.get("lr")
    decided: dict[str, float | None] = {"epochs": trained.epochs, "weight_decay": settings_of_training.decay}
    if lr is not None:
        settings_of_training = replace(settings_of_training, lr=lr)
        decided["lr"] = lr
    if last.batch != settings_of_training.batch:  # batches were split after an out-of-memory error
        decided |= {
            "batch": last.batch,
            "lr": settings_of_training.lr * last.batch / settings_of_training.batch,
        }
    if "optimizer" in settings_of_training.functions:  # which determines them
        decided = {name: value for name, value in decided.items() if name in {"epochs", "batch"}}
    settings = trained.candidate.settings
    return {**settings, "training": {**settings.get("training", {}), **decided}}


def _held_out(chosen: Point, n: int, before: tuple[float, float]) -> dict[str, Any]:
    """Metrics of both models, with intervals, on the examples that chose the checkpoint, and the standard error of the
    robust accuracy of the new one.
    """
    after = held_out_metrics(n, chosen.clean, chosen.robust)
    error = standard_error(chosen.robust, n)
    return {"n": n, "standard_error": error, "before": held_out_metrics(n, *before), "after": after}


def generalisation(n: int, robust: float, n_training: int, robust_in_training: float) -> dict[str, Any]:
    """Return the robust accuracy on training examples, and the robust error on `n` held-out examples minus that on the
    training examples.
    """
    counts = round(robust * n), n, round(robust_in_training * n_training), n_training
    return {
        "n_training": n_training,
        "robust_in_training": robust_in_training,
        "robust_error_gap": vars(robust_error_gap(*counts)),
    }


def held_out_metrics(n: int, clean: float, robust: float) -> dict[str, Any]:
    """Return the clean and the robust accuracy on `n` held-out examples with their intervals, from their values."""
    shares = {"clean_accuracy": clean, "robust_accuracy": robust}
    return {name: vars(proportion(torch.arange(n) < round(share * n))) for name, share in shares.items()}


def _placed(command: str, folder: Path) -> str:
    """The command that opens the model, with the path of the file in `folder`."""
    words = shlex.split(command)
    return shlex.join(str(folder / MODEL) if word == MODEL else word for word in words)


def opened_by(opens: str, data: str) -> str:
    """Return the command line that assesses the new model. It contains the placeholder `DATA` if the data cannot be
    named in one word.
    """
    return f"holdfast assess {MODEL} {'DATA' if ' ' in data else shlex.quote(data)} {opens}".rstrip()


def _attempts_note(recipes: Sequence[str], best: Made) -> list[str]:
    """A note on why there was more than one training."""
    if len(recipes) == 1:
        return []
    return [
        (
            f"doubts were raised, so several recipes were tried: {', '.join(recipes)}; the result is that of "
            f"{best.candidate.name}"
        )
    ]


def _training_notes(trained: Made) -> list[str]:
    """Notes on a training: where memory ran out, how often its guard added a step, and its certified accuracy."""
    notes = _batch_size_notes(trained.curve, trained.candidate)
    if trained.raised:
        times = "once" if trained.raised == 1 else f"{trained.raised} times"
        limit_text = ", which is as often as it may" if trained.raised == MOST_RAISED else ""
        guard_text = (
            f"a single step was overfitted to, so the guard asked for another one {times}{limit_text}"
        )
        notes.append(f"{trained.candidate.name}: {guard_text}")
    if trained.ended_by == "collapse":
        notes.append(_collapse_note(trained))
    elif trained.chosen.is_constant:
        notes.append(
            f"{trained.candidate.name}: the new model predicts one class for "
            f"{percent(trained.chosen.most_predicted)} of the held-out examples; no checkpoint was better"
        )
    if trained.chosen.certified is not None:
        notes.append(
            f"{trained.candidate.name}: the checkpoint was chosen by the accuracy that CROWN-IBP proves on the "
            f"held-out examples, {100 * trained.chosen.certified:.1f} %; better bounds prove as much or more"
        )
    return notes


def _collapse_note(trained: Made) -> str:
    """A note on the epoch in which the network collapsed to one class, and what helps."""
    chosen = trained.chosen
    last, training = trained.curve[-1], trained.candidate.recipe.training
    lr = trained.attempt.get("lr") or training.lr
    result = "; the new model is such a constant prediction too, because no epoch was better"
    return (
        f"{trained.candidate.name}: in epoch {last.epoch} the network collapsed to one class, which it predicts for "
        f"{percent(last.most_predicted)} of the held-out examples (clean accuracy {percent(last.clean)}, after epoch "
        f"{chosen.epoch} {percent(chosen.clean)}), so the training was stopped{result if chosen.is_constant else ''}. "
        f"A smaller learning rate than {plain(lr)} and a longer warm-up than {plain(training.warmup)} of the training "
        "may help"
    )


def _batch_size_notes(curve: tuple[Point, ...], candidate: Candidate) -> list[str]:
    """Notes on where memory ran out, and the new batch size."""
    sizes = [(0, candidate.recipe.training.batch), *((point.epoch, point.batch) for point in curve)]
    return [
        f"memory ran out in epoch {epoch}: batches of {size} in place of {size_before} from there on, the rate scaled "
        "alike"
        for (_, size_before), (epoch, size) in pairwise(sizes)
        if size != size_before
    ]
