"""Compares the steps of an adaptation with the records of the same steps in the audit chain of the server."""

from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.adaptation.journal import Adaptation
from holdfast.core.chain import canonical

APPROVAL, END = "approval", "end"
"""steps that are in the chain of the server alone: the request for an approval, and the outcome"""


def difference(stored: Adaptation, records: Sequence[Mapping[str, Any]]) -> str:
    """Return the first difference between the steps of a finished run and the records of a server; empty if they agree.

    A step may be recorded several times, because a run that is resumed sends its last one again.
    """
    of_run = [each for each in records if each.get("run") == stored.run]
    if not of_run:
        return "they have no record of this run"
    sent: dict[str, list[bytes]] = {}
    for each in of_run:
        if each["kind"] == "adapt":
            sent.setdefault(str(each.get("step")), []).append(canonical(each.get("facts")))
    facts = {step.step: step.facts for step in stored.steps}
    expected = {**facts, END: {"outcome": stored.outcome, "reason": stored.reason}}
    for name, content in expected.items():
        if name not in sent:
            return f"they have no step {name}"
        if any(each != canonical(content) for each in sent[name]):
            return f"they have other facts of the step {name}"
    order = [name for name in sent if name != APPROVAL]
    if order != list(expected):
        return f"they have the steps {', '.join(order)}"
    return _other_approval(facts.get("approved", {}), of_run)


def _other_approval(facts: Mapping[str, Any], of_run: Sequence[Mapping[str, Any]]) -> str:
    if not facts.get("required"):
        return ""
    decided = [each.get("approved") for each in of_run if each["kind"] == APPROVAL]
    approved = not facts.get("ends")
    if approved in decided and (not approved) not in decided:
        return ""
    return f"they have no {'approval' if approved else 'rejection'} of the candidate"
