"""The summary of a run, which the option `-o FILE.json` writes, and from which all other reports are created.

Its schema is versioned (`json_schemas.py`). Strict JSON has no infinity: a number that is not finite is one of the
strings "inf", "-inf" and "nan".
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

from holdfast.core.estimate import Estimate
from holdfast.core.evidence import AttackRecord, Cost, Doubt, Evidence, Looks, PassRecord, Places, Residual
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Mask
from holdfast.doubts.probing import doubt_test
from holdfast.gates.judging import Judgement, exit_code, overall
from holdfast.metrics.shares import TooFew, within
from holdfast.reports import json_schemas as forms
from holdfast.reports.certification import certification
from holdfast.reports.charts import geometry_results
from holdfast.reports.curves import (
    accuracy_curves,
    estimate_to_json,
    groups,
    judged,
    per_class_to_json,
    robust_examples,
)
from holdfast.reports.defences import rotation as rotated
from holdfast.reports.defences import stateful_results
from holdfast.reports.gallery import example_images
from holdfast.reports.transfer import across, transfer
from holdfast.reports.words import headline, open_doubts, strict, threat_in_words, why
from holdfast.statistics.intervals import CONFIDENCE, median, proportion
from holdfast.threats.domains import domain_of
from holdfast.threats.stored import threat_for_report

Json = dict[str, Any]

SUMMARY_VERSION = 2
"""Version of the format. It is increased if a reader of the previous version would misinterpret the new one.

Additional keys do not increase it.
"""
MOST_NAMES = 1000
"""Largest number of names of classes or features in the summary."""


def summary(
    evidence: Evidence,
    *,
    metrics: Mapping[str, Estimate],
    gates: Sequence[Judgement] = (),
    accepted_doubts: Mapping[str, str] | None = None,
    run: Mapping[str, Any] | None = None,
    rotation: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> Json:
    """Return the summary of a run, which contains everything that reports show, as strict JSON.

    `run` contains what the evidence does not: `verb`, `folder`, `created` (ISO 8601), `command` (which repeats the
    run), `hashes`, `versions`, `hardware`; unknown keys are omitted. `accepted_doubts` maps names to reasons.
    `rotation` is the document of the table of attackers. `training` is the verdict on a training. `notes` are added
    to those of the evidence.
    """
    content: Json = {
        "schema_version": SUMMARY_VERSION,
        "verb": str((run or {}).get("verb", "assess")),
        "verdict": overall([gate.verdict for gate in gates]) if gates else "no gate",
        "headline": "",
        "exit_code": exit_code(gate.verdict for gate in gates),
        "n": int(judged(evidence).sum()),
        "noun": _noun(evidence),
        "confidence": CONFIDENCE,
        "metrics": {name: estimate_to_json(value) for name, value in metrics.items()},
        "gates": [_gate(gate) for gate in gates],
        **_measured(evidence),
        "rotation": rotated(rotation),
        "training": None if training is None else dict(training),
        "accepted_doubts": {str(name): str(reason) for name, reason in (accepted_doubts or {}).items()},
        **_about(run or {}),
    }
    content["notes"] = [*content["notes"], *notes]
    doubts = open_doubts(content)
    content["gates"] = [gate | {"message": why(gate, doubts)} for gate in content["gates"]]
    task = evidence.model.get("task", {}).get("name", "classes")
    content["threat"]["description"] = threat_in_words(content["threat"], content["surrogates"], task)
    content["headline"] = headline(content)
    written: Json = strict(content)
    return written


def _measured(evidence: Evidence) -> Json:
    """The parts of the summary that come from the evidence."""
    classes = tuple(str(name) for name in evidence.data.get("classes") or ())
    names = [*(record.name for record in evidence.attacks), *(record.name for record in evidence.passes)]
    threat = threat_for_report(evidence.threat)
    return {
        "suite": evidence.suite,
        "attacks": _attacks(evidence),
        "doubts": [_doubt(doubt, evidence.model.get("output")) for doubt in evidence.doubts],
        "answer_checks": [strict(asdict(check)) for check in evidence.answer_checks],
        "certification": certification(evidence, threat["constraint"]),
        "geometry": _geometry(evidence, classes),
        "query_detector": stateful_results(evidence.tables.get("stateful")),
        "threat": {**threat, "unit": eps_unit(evidence.threat, evidence.model)},
        "model": _bounded(evidence.model),
        "data": _bounded(evidence.data),
        "seed": evidence.seed,
        "cost": _cost(evidence.cost),
        "doubts_cost": _cost(evidence.doubts_cost),
        "served": dict(evidence.served),
        "curves": accuracy_curves(evidence),
        "per_class": [] if "task" in evidence.model else per_class_to_json(evidence, classes),
        "groups": groups(evidence),
        "surrogates": [_bounded(card) for card in evidence.surrogates],
        "transfer": transfer(evidence),
        "other_data": [_bounded(card) for card in evidence.others],
        "data_transfer": across(evidence),
        "passes": [_pass(record) for record in evidence.passes],
        "notes": list(evidence.notes),
        "details": list(evidence.details),
        **_examples(evidence, classes, names),
    }


def _examples(evidence: Evidence, classes: Sequence[str], attacks: Sequence[str]) -> Json:
    """The examples that are shown, and the scores by class of a model with another task than classes."""
    if "task" not in evidence.model:
        return {"examples": example_images(evidence, classes, attacks)}
    from holdfast.reports import tasks  # late: most models are of classes

    return {"by_class": tasks.by_class(evidence), "examples": tasks.examples_of_task(evidence, attacks)}


def _geometry(evidence: Evidence, classes: Sequence[str]) -> Json | None:
    """The geometry of the decision boundary; None if it was not measured."""
    table = evidence.tables.get("geometry")
    if table is None:
        return None
    norm, unit = type(evidence.threat.constraint).__name__, _noun(evidence).removesuffix("s")
    # under L2 the better of two bounds counts for each example
    method = "crown or lipschitz" if norm == "L2" else "crown"
    return geometry_results(table, classes, norm=norm, unit=unit, method=method)


def _about(run: Mapping[str, Any]) -> Json:
    """The parts of the summary that do not come from the evidence."""
    return {
        "reproduce": str(run.get("command", "")),
        "run": {key: str(run[key]) for key in ("folder", "created", "hardware") if run.get(key)},
        "hashes": run.get("hashes", {}),
        "versions": run.get("versions", {}),
    }


def _noun(evidence: Evidence) -> str:
    """What the examples are called: the noun of the data, else by the shape of an input."""
    if "noun" in evidence.data:
        return str(evidence.data["noun"])
    shape = evidence.data.get("shape")
    if shape is None and "x" in evidence.gallery:
        shape = evidence.gallery["x"].shape[1:]
    return domain_of(evidence.threat.constraint, shape).noun


def later_gate(gate: Judgement, content: Mapping[str, Any]) -> forms.Gate:
    """Return the JSON entry of the summary for a gate that was judged after the end of the run."""
    entry = _gate(gate)
    judged: forms.Gate = strict({**entry, "message": why(entry, open_doubts(content))})
    return judged


def _gate(gate: Judgement) -> forms.Gate:
    claim = gate.claim
    return {
        "condition": claim.text,
        "metric": claim.metric,
        "relation": claim.relation,
        "bound": claim.bound,
        "eps": claim.eps,
        "decibels": claim.decibels,
        "versus": claim.versus,
        "verdict": gate.verdict,
        "estimate": estimate_to_json(gate.estimate),
        "scope": gate.scope,
        "looks": _looks(gate.looks),
        "too_few": _too_few(gate.too_few),
        "message": "",
    }


def _too_few(found: TooFew | None) -> forms.TooFewJson | None:
    if found is None:
        return None
    return {"counts": dict(islice(found.counts.items(), MOST_NAMES)), "needed": found.needed}


def _looks(looks: Looks | None) -> forms.LooksJson | None:
    if looks is None or looks.ended is None:
        return None
    return {"look": looks.look, "examples": looks.examples, "of": looks.of, "ended": looks.ended}


def _attacks(evidence: Evidence) -> list[forms.Attack]:
    """An entry for each attack, with the robust accuracy after it and all before it."""
    chosen = judged(evidence)
    bounded = math.isfinite(evidence.threat.constraint.eps)  # else a large enough change breaks any example
    broken_by = evidence["broken_by"].long() if bounded and "broken_by" in evidence else None
    not_robust = ~robust_examples(evidence)
    # not robust and broken by no attack: misclassified when clean
    not_surviving = not_robust if broken_by is None else not_robust & (broken_by < 0)
    entries = []
    for place, record in enumerate(evidence.attacks):
        after = None
        if broken_by is not None:
            not_surviving = not_surviving | not_robust & _broke(evidence, place)
            after = estimate_to_json(proportion(~not_surviving[chosen])) if chosen.any() else None
        entries.append(_attack(record, after, _smallest(evidence, record)))
    return entries


def _broke(evidence: Evidence, place: int) -> Mask:
    """Mask of the examples that an attack broke; in a minimum-norm run, all that it broke within eps."""
    broken: Mask = evidence["broken_by"] == place
    distance = f"{evidence.attacks[place].stage}.distance"
    if distance in evidence:
        broken |= within(evidence[distance], evidence.threat.constraint.eps)
    return broken


def _smallest(evidence: Evidence, record: AttackRecord) -> forms.Smallest:
    """The fraction of examples and the median distance that a minimum-norm attack found; None for other attacks."""
    missing: forms.Smallest = {"success_rate": None, "median_distance": None}
    if f"{record.stage}.distance" not in evidence:
        return missing
    distance, attacked = evidence[f"{record.stage}.distance"], judged(evidence) & evidence["correct"].bool()
    if not attacked.any():
        return missing
    # a misclassified example has distance 0, unless the attack must reach a target class
    counted = judged(evidence) if evidence.threat.goal is None else attacked
    return {
        "success_rate": estimate_to_json(proportion(distance[attacked].isfinite())),
        "median_distance": estimate_to_json(median(distance[counted])),
    }


def _attack(record: AttackRecord, after: forms.EstimateJson | None, smallest: forms.Smallest) -> forms.Attack:
    return {
        "stage": record.stage,
        "name": record.name,
        "settings": strict(record.settings),
        "surviving_before": record.surviving_before,
        "surviving_after": record.surviving_after,
        "robust_accuracy": after,
        **_cost(record.cost),
        "notes": list(record.notes),
        "not_tried": _not_tried(record.residual),
        "adaptive": record.adaptive,
        "fits": record.fits,
        "positions": _positions(record.places),
        "search": None if record.search is None else strict(asdict(record.search)),
        "left": strict(record.left),
        "baseline": None if record.reuse is None else strict(asdict(record.reuse)),
        **smallest,
    }


def _not_tried(residual: Residual | None) -> forms.NotTried | None:
    if residual is None:
        return None
    return {"n": residual.untried, "max_success_rate": residual.at_most}


def _positions(places: Places | None) -> forms.Positions | None:
    if places is None:
        return None
    return {"tried": places.tried, "surviving_at_random": places.surviving_at_random}


def _pass(record: PassRecord) -> forms.Pass:
    return {
        "stage": record.stage,
        "name": record.name,
        "tried": record.tried,
        "broken": record.broke,
        "settings": dict(record.settings),
    }


def _cost(cost: Cost) -> forms.CostJson:
    return {
        "forwards": cost.forwards,
        "backwards": cost.backwards,
        "queries": cost.queries,
        "seconds": strict(cost.wall_s),
        "cpu_seconds": strict(cost.cpu_s),
    }


def _doubt(doubt: Doubt, output: str | None) -> forms.Doubt:
    test = doubt_test(doubt.name)
    saturated = test.advice_for_probabilities if output == "probability" else ""
    return {
        "name": doubt.name,
        "state": doubt.state,
        "statistic": strict(doubt.statistic),
        "threshold": strict(doubt.threshold),
        "n": doubt.n,
        "title": test.title,
        "meaning": test.meaning,
        "message": doubt.message,
        "advice": saturated or test.advice,
    }


_UNITS = {"range": "the range of the bounds of each feature", "std": "the standard deviation of each feature"}
"""Units of eps in words, by their text in a threat model."""


def eps_unit(threat: ThreatModel, model: Mapping[str, Any]) -> str:
    """Return the unit of the perturbation radius eps for the report, or an empty string if eps is not a size of changes
    of input values.
    """
    if not threat.constraint.in_input_units:
        return ""
    if threat.unit:
        return _UNITS.get(threat.unit, f"the units of the features in {threat.unit.removeprefix('@')}")
    low, high = (float(end) for end in model.get("bounds") or (0.0, 1.0))
    range_text = f"legal values from {low:g} to {high:g}"
    if model.get("data_normalised"):
        return f"units before the normalisation of the data, with {range_text}"
    return f"units of the inputs, with {range_text}"


def _bounded(about: Mapping[str, Any]) -> Json:
    """The properties of a model or a data set, with long lists truncated."""
    return {
        str(key): value[:MOST_NAMES] if isinstance(value := strict(item), list) else value
        for key, item in about.items()
    }
