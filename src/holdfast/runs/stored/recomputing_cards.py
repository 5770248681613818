"""Computes again what the card of a stored hardening states about its measurements, and refuses a card that differs. No
model is queried.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.core.chain import canonical, digest
from holdfast.core.errors import TargetError
from holdfast.core.goal import Goal
from holdfast.gates.training_verdicts import Before
from holdfast.io.models.weights import METADATA_KEY, digest_of_weights
from holdfast.metrics.catalogue import estimate
from holdfast.metrics.paired import basis
from holdfast.reports.card import judged
from holdfast.runs.assess.result import Result
from holdfast.runs.engine.identity import code_digest
from holdfast.runs.harden.advice import advice, verdict_entries
from holdfast.runs.harden.candidates import standard_error
from holdfast.runs.harden.hardened import (
    MODEL,
    generalisation,
    held_out_metrics,
    trained_under,
    training_digest,
    weights_and_metadata,
)
from holdfast.runs.store.files import MANIFEST
from holdfast.runs.stored.documents import VERDICT
from holdfast.runs.stored.recomputing_columns import refuse_other
from holdfast.statistics.absent_classes import classes_of
from holdfast.statistics.intervals import against_majority
from holdfast.threats.stored import threat_from_json

Json = Mapping[str, Any]

_PLANNED = ("epochs", "weight_decay", "batch", "lr")
"""Settings of a training that its plan may change."""


@dataclass(frozen=True)
class StoredHardening:
    """The documents of a finished hardening, and its measurements `before` and `after`."""

    path: Path
    manifest: Json
    card: Json
    training: Json
    weights: str
    """digest of the file of the new model"""
    inner: Mapping[str, Json]
    """the manifests of the measurements"""
    sides: Mapping[str, Result]


def refuse_other_card(run: StoredHardening) -> None:
    """Raise `TargetError` if the card of a hardening states something else than its measurements, its settings or its
    training curve, or if these measurements are not those of the models of the run on the same examples.

    Of a run that another version wrote, only the metrics, the raised doubts, the chosen epoch and the digest of the
    model are compared.
    """
    for side, result in run.sides.items():
        _refuse_metrics(run, side, result)
    _refuse_verdict(run)
    refuse_other(run.path / "card.json", "chosen.epoch", run.card["chosen"]["epoch"], run.training["chosen"])
    refuse_other(run.path / "training.json", "weights", run.training["weights"], run.weights)
    for side, inner in run.inner.items():
        code = run.manifest["digests"]["code"]
        refuse_other(run.path / side / MANIFEST, "digests.code", inner["digests"]["code"], code)
    if run.manifest["digests"]["code"] == code_digest():
        _refuse_models(run)
        _refuse_settings(run)
        _refuse_training(run)


def _refuse_metrics(run: StoredHardening, side: str, result: Result) -> None:
    file, stated = run.path / "card.json", run.card[side]
    refuse_other(file, f"{side}.n", stated["n"], len(result.evidence))
    for name, values in stated["metrics"].items():
        computed = estimate(name, result.evidence)
        for key in ("value", "low", "high", "n"):
            refuse_other(file, f"{side}.metrics.{name}.{key}", values[key], getattr(computed, key))
    raised = [doubt.name for doubt in result.doubts if doubt.state == "raised"]
    refuse_other(file, f"{side}.doubts", [doubt["name"] for doubt in stated["doubts"]], raised)
    own = run.manifest["digests"]["code"] == code_digest()
    if side == "before":
        evidence = result.evidence
        at_chance = against_majority(evidence["correct"], evidence["y"], classes_of(evidence.model)).at_chance
        refuse_other(file, "before.at_chance", stated["at_chance"], at_chance)
    if own:
        for name, value in judged(result.summary()).items():
            if name != "notes":  # which contain those on a baseline, which is not part of the run
                refuse_other(file, f"{side}.{name}", stated[name], value)


def _refuse_verdict(run: StoredHardening) -> None:
    """Compare the verdict on the training, and the gates on it, with the two measurements."""
    file, (before, after) = run.path / "card.json", (run.sides[side].evidence for side in ("before", "after"))
    goal = Goal(**run.manifest["config"].get("goals", {}).get(run.card["recipe"], {}))
    for name, value in verdict_entries(before, after, goal).items():
        refuse_other(file, name, run.card[name], value)
    expected = vars(Before(before, goal).improvement(after))
    for gate in run.sides["after"].gates:
        if gate.claim.versus == "before":
            refuse_other(
                run.path / "after" / f"{VERDICT}.json", "gates.estimate", vars(gate.estimate), expected
            )


def _refuse_models(run: StoredHardening) -> None:
    """Compare the digests, models, data and settings of the two measurements with each other and with those of the
    hardening, and the file of the new model with the model that was measured.
    """
    before, after = run.inner["before"], run.inner["after"]
    manifest, models = run.manifest, {side: _without(card["model"]) for side, card in run.inner.items()}
    for side, inner in run.inner.items():
        file = run.path / side / MANIFEST
        refuse_other(file, "verb", inner["verb"], "assess")
        for key in ("data", "config"):
            refuse_other(file, f"digests.{key}", inner["digests"][key], after["digests"][key])
    refuse_other(run.path / MANIFEST, "model", manifest["model"], models["before"])
    refuse_other(
        run.path / MANIFEST, "digests.config", manifest["digests"]["config"], _digest(manifest["config"])
    )
    refuse_other(run.path / MANIFEST, "data.n", manifest["data"]["n"], len(run.sides["after"].evidence))
    refuse_other(run.path / "card.json", "model", run.card["model"], models["after"])
    tensors, metadata = weights_and_metadata(run.path / MODEL)
    given = {"before": manifest["digests"]["model"], "after": digest_of_weights(tensors)}
    for side, inner in (("before", before), ("after", after)):
        computed = _digest([given[side], inner["model"]["randomised"]])
        refuse_other(run.path / side / MANIFEST, "digests.model", inner["digests"]["model"], computed)
    refuse_other(
        run.path / MODEL, f"{METADATA_KEY}.training", metadata.get("training"), training_digest(manifest)
    )


def _refuse_settings(run: StoredHardening) -> None:
    """Compare the settings on the card with those of the run."""
    card, manifest, config = run.card, run.manifest, run.manifest["config"]
    attempts = {attempt["recipe"]: attempt for attempt in manifest["plan"]["attempts"]}
    recipe = card["recipe"]
    if recipe not in attempts or recipe not in config["settings"]:
        refuse_other(run.path / "card.json", "recipe", recipe, next(iter(attempts), None))
    tried = len(card["recipes_tried"])
    threat = threat_from_json(config["threat"])
    expected = {
        "name": f"{manifest['model'].get('name', 'model')}, {recipe}",
        "requested_recipe": config["recipe"],
        "recipes_tried": [attempt["recipe"] for attempt in manifest["plan"]["attempts"]][:tried],
        "reason": attempts[recipe]["reason"],
        "threat": trained_under(threat),
        "evaluated_under": run.sides["after"].evidence.threat.text,
        "seed": config["seed"],
        "advice": advice(card, threat.constraint),
        "scope": basis(run.sides["before"].evidence, run.sides["after"].evidence),
        "settings": _unplanned(config["settings"][recipe]),
        **{key: manifest[key] for key in ("plan", "data", "versions")},
    }
    for name, value in expected.items():
        stated = _unplanned(card[name]) if name == "settings" else card[name]
        refuse_other(run.path / "card.json", name, stated, value)


def _refuse_training(run: StoredHardening) -> None:
    """Compare what the card states about the training and the held-out examples with its curve."""
    card, file = run.card, run.path / "card.json"
    chosen, held_out = card["chosen"], card["held_out"]
    if chosen not in card["curve"]:
        raise TargetError(
            f"{str(file)!r} states that epoch {chosen['epoch']} was chosen with values that its curve does not "
            "contain; restore the run from a copy, or measure it again"
        )
    last = card["curve"][-1]
    refuse_other(file, "epochs", card["epochs"], last["epoch"] - 1 + last["part"])
    machines = ", then ".join(dict.fromkeys(point["hardware"] for point in card["curve"]))
    refuse_other(file, "hardware", card["hardware"], machines)
    stated = [held_out["before"][f"{name}_accuracy"]["value"] for name in ("clean", "robust")]
    shares = {"before": stated, "after": [chosen["clean"], chosen["robust"]]}
    for side, values in shares.items():
        refuse_other(file, f"held_out.{side}", held_out[side], held_out_metrics(held_out["n"], *values))
    error = standard_error(chosen["robust"], held_out["n"])
    refuse_other(file, "held_out.standard_error", held_out["standard_error"], error)
    stated = card["generalisation"]
    on_training = {name: stated[name] for name in ("n_training", "robust_in_training")}
    expected = generalisation(held_out["n"], chosen["robust"], **on_training)
    refuse_other(file, "generalisation", stated, expected)


def _without(model: Json) -> dict[str, Any]:
    """The card of a model in a measurement, without the fact that the measurement adds."""
    return {name: value for name, value in model.items() if name not in ("randomised", "outputs")}


def _unplanned(settings: Json) -> dict[str, Any]:
    trained = {name: value for name, value in settings.get("training", {}).items() if name not in _PLANNED}
    return {**settings, "training": trained}


def _digest(content: object) -> str:
    return digest(canonical(content))
