"""Converts the parts of the evidence that are not columns, such as doubts and judged gates, to strict JSON and back."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter

from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Cost, Doubt
from holdfast.doubts.concluding import Findings
from holdfast.gates.grammar import parse
from holdfast.gates.judging import Judgement, exit_code
from holdfast.reports.numbers import strict
from holdfast.runs.harness import KINDS, Outline, Probes, StageOutline
from holdfast.runs.store.folder import Split
from holdfast.threats.stored import threat_from_json, threat_to_json

Json = dict[str, Any]

VERDICT = "verdict"
"""Name of the document with the verdicts of the gates."""
_OF_STEP = ("name", "attack", "settings", "wave_of", "adaptive")
doubt_from_json = TypeAdapter(Doubt).validate_python
"""Function that returns the doubt in a JSON object."""


def outline_to_json(outline: Outline) -> Json:
    """Return the outline of a run as strict JSON: its stages, threat model, seed and suite."""
    return {
        "stages": [strict({**vars(step), "kind": step.kind.name}) for step in outline.steps],
        "threat": threat_to_json(outline.threat),
        "seed": outline.seed,
        "suite": outline.suite,
        "minimum_norm": outline.smallest,
    }


def outline_from_json(content: Mapping[str, Any]) -> Outline:
    """Return the outline of a run, such as its stages and threat model, from its JSON. It is the inverse of
    `outline_to_json`.
    """
    return Outline(
        tuple(
            StageOutline(
                **{name: step[name] for name in _OF_STEP},
                kind=KINDS[step["kind"]],
                notes=tuple(step["notes"]),
            )
            for step in content["stages"]
        ),
        threat_from_json(content["threat"]),
        content["seed"],
        content["suite"],
        content["minimum_norm"],
    )


def judgement_to_json(judgement: Judgement) -> Json:
    """Return a judged gate, with its estimate and its verdict, as strict JSON."""
    return {
        "condition": judgement.claim.text,
        "estimate": strict(vars(judgement.estimate)),
        "verdict": judgement.verdict,
        "open_doubts": list(judgement.open_doubts),
        **({} if judgement.scope is None else {"scope": judgement.scope}),
    }


def judgement_from_json(content: Mapping[str, Any]) -> Judgement:
    """Return the judged gate that the JSON `content` describes. It is the inverse of `judgement_to_json`."""
    estimate = TypeAdapter(Estimate).validate_python(content["estimate"])
    doubts, scope = tuple(content["open_doubts"]), content.get("scope")
    return Judgement(parse(content["condition"]), estimate, content["verdict"], doubts, scope)


def verdict_to_json(judgements: Sequence[Judgement], accepted: Mapping[str, str]) -> Json:
    """Return the judged gates, the accepted doubts and the exit code as strict JSON."""
    return {
        "gates": [judgement_to_json(judgement) for judgement in judgements],
        "accepted_doubts": dict(accepted),
        "exit_code": exit_code(judgement.verdict for judgement in judgements),
    }


def doubts_to_json(
    findings: Findings, probes: Probes, cost: Cost, remarks: Sequence[str], splits: Sequence[Split]
) -> Json:
    """Return the content of `doubts.json`: the doubts, the examples that the probes broke, the cost of the probes, and
    notes on the run, and the smallest batch of each stage in which memory ran out.
    """
    return {
        "doubts": [strict(vars(doubt)) for doubt in findings.doubts],
        "broken": {name: ids.tolist() for name, ids in findings.missed.items()},
        "probes": list(probes),
        "notes": [*remarks, *_halved(splits)],
        **({"batches": _smallest_batches(splits)} if splits else {}),
        "cost": {name: getattr(cost, name) for name in ("forwards", "backwards", "queries")},
    }


def _smallest_batches(splits: Sequence[Split]) -> dict[str, int]:
    """The smallest number of examples that were processed at once, by stage, where memory ran out."""
    sizes: dict[str, int] = {}
    for split in splits:
        sizes[split["stage"]] = min(split["size"], sizes.get(split["stage"], split["size"]))
    return sizes


def _halved(splits: Sequence[Split]) -> list[str]:
    """A note on the smallest batch that memory allowed."""
    if not splits:
        return []
    size = min(split["size"] for split in splits)
    return [
        (
            f"memory ran out, and the run continued with batches of {size} examples; --batch-size {size} starts with "
            "that size"
        )
    ]
