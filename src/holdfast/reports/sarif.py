"""The report of a run in the format SARIF 2.1.0 for code scanning, with failed and unclear gates and raised doubts as
results.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from holdfast.core.names import printable
from holdfast.reports.concerns import CONCERNS
from holdfast.reports.words import interval, sentences, shown

Json = dict[str, Any]

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_LEVELS = {"fail": "error", "unclear": "warning"}
_GATES = {
    "gate-fail": "A gate failed: the whole interval misses the threshold.",
    "gate-unclear": "A gate is unclear: the interval contains the threshold, or a doubt is open.",
}


def sarif_document(summary: Mapping[str, Any]) -> str:
    """Return the report of a run in the format SARIF, with one result for each gate that does not pass and for each
    raised doubt.

    Results for accepted doubts are suppressed.
    """
    results = [_gate(gate, summary) for gate in summary["gates"] if gate["verdict"] != "pass"]
    results += [_doubt(doubt, summary) for doubt in summary["doubts"] if doubt["state"] == "raised"]
    used = sorted({result["ruleId"] for result in results})
    for result in results:
        result["ruleIndex"] = used.index(result["ruleId"])
    driver = {
        "name": "Holdfast",
        "version": str(summary["versions"].get("holdfast", "0")),
        "rules": [_rule(rule, summary) for rule in used],
    }
    run = {
        "tool": {"driver": driver},
        "automationDetails": {"id": printable(f"holdfast/{_about(summary)}")},
        "invocations": [
            {
                "executionSuccessful": True,
                "exitCode": summary["exit_code"],
                "commandLine": printable(summary["reproduce"]),
            }
        ],
        "results": results,
        "properties": {"verdict": summary["verdict"], "headline": printable(summary["headline"])},
    }
    return (
        json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2, allow_nan=False) + "\n"
    )


def _about(summary: Mapping[str, Any]) -> str:
    """Identity of the assessment, the same for runs of the same model, data and threat model."""
    names = (summary["model"].get("name", "model"), summary["data"].get("name", "data"))
    return "/".join([*map(str, names), summary["threat"]["constraint"]])


def _rule(rule: str, summary: Mapping[str, Any]) -> Json:
    if rule in _GATES:
        return {"id": rule, "shortDescription": {"text": _GATES[rule]}}
    name = rule.removeprefix("doubt-")
    doubt = next(doubt for doubt in summary["doubts"] if printable(doubt["name"]) == name)
    title, meaning, advice = (printable(doubt[key]) for key in ("title", "meaning", "advice"))
    entry: Json = {"id": rule, "shortDescription": {"text": title}}
    if name in CONCERNS:
        entry |= {"fullDescription": {"text": meaning}, "help": {"text": advice}}
    return entry


def _result(rule: str, level: str, message: str, subject: str, summary: Mapping[str, Any]) -> Json:
    # no measured value, so that a later run gives the same fingerprint to the same finding
    key = "\n".join((rule, subject, _about(summary)))
    return {
        "ruleId": printable(rule),
        "level": level,
        "message": {"text": _unlinked(printable(message))},
        "locations": [
            {
                "physicalLocation": {
                    "artifactLocation": {"uri": model_address(summary["model"])},
                    "region": {"startLine": 1},
                }
            }
        ],
        "partialFingerprints": {"holdfast/v1": hashlib.sha256(key.encode()).hexdigest()},
    }


def _gate(gate: Mapping[str, Any], summary: Mapping[str, Any]) -> Json:
    value, interval_text = (
        shown(gate["metric"], gate["estimate"]["value"]),
        interval(gate["metric"], gate["estimate"]),
    )
    message = f"{gate['condition']}: {gate['verdict']}. Measured {value}, interval {interval_text}: {gate['message']}."
    return _result(f"gate-{gate['verdict']}", _LEVELS[gate["verdict"]], message, gate["condition"], summary)


def _doubt(doubt: Mapping[str, Any], summary: Mapping[str, Any]) -> Json:
    message = sentences(doubt["title"], doubt["message"], doubt["advice"])
    result = _result(f"doubt-{doubt['name']}", "warning", message, doubt["name"], summary)
    reason = summary["accepted_doubts"].get(doubt["name"])
    if reason is not None:
        result["suppressions"] = [
            {"kind": "external", "status": "accepted", "justification": printable(reason)}
        ]
    return result


def _unlinked(text: str) -> str:
    """A message in which `[words](address)` is not interpreted as a link."""
    return text.replace("](", "\\](")


def model_address(model: Mapping[str, Any]) -> str:
    """Return the file of the model as a URI for SARIF. A relative path remains relative, so that it refers to the
    scanned repository.
    """
    files = model.get("files")
    name = next(iter(files), None) if isinstance(files, Mapping | list) else None
    path = Path(printable(str(name or model.get("name") or "model")).removeprefix("bundled:"))
    return path.as_uri() if path.is_absolute() else quote(path.as_posix())
