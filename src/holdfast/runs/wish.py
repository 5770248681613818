"""What a hardening is asked for, and how its run knows that it is the same one."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from holdfast.core.batch import Data
from holdfast.core.chain import canonical, digest
from holdfast.core.threat import ThreatModel
from holdfast.reports.numbers import strict
from holdfast.runs.candidates import Candidate
from holdfast.runs.identity import code_digest, versions
from holdfast.runs.order import Order, Subject
from holdfast.runs.repeating import repeatable


@dataclass(frozen=True)
class Wish:
    """What a hardening is asked for."""

    name: str
    """of the recipe, as it was asked for"""
    candidates: tuple[Candidate, ...]
    """the recipe, or those to choose from, the quickest first"""
    threat: ThreatModel
    judge: Order
    """how the model is measured before and after"""
    budget_s: float | None = None
    """wall time of the training, its looks at held-out examples included; None goes by the recipe's epochs"""
    seed: int = 0
    device: str = "cpu"
    command: str = ""
    examples: int = 0
    """training examples that attacks of the judge are learned on, where some are"""
    apart: Data | None = None
    """what nothing is learned from: all that the judged examples are taken from; None for those alone"""
    opens: str = ""
    """flags that the new model is opened with, beside its file and the data"""


def manifest_of(
    subject: Subject,
    digests: list[str],
    test: Data,
    wish: Wish,
    plan: Mapping[str, Any],
    machine: str,
) -> dict[str, Any]:
    """What `run.json` says; `digests` are of the judged examples and of those to train on."""
    constraint = wish.threat.constraint
    around = wish.judge.surrogates
    config = strict(
        {
            "recipe": wish.name,
            "settings": {one.name: one.settings for one in wish.candidates},
            "threat": {"norm": type(constraint).__name__, "eps": constraint.eps},
            "suite": wish.judge.plan.suite,
            "surrogates": {f"{k} {one.card['name']}": one.digest for k, one in enumerate(around, 1)},
            "budget_s": wish.budget_s,
            "seed": wish.seed,
        }
    )
    return {
        "verb": "harden",
        "digests": {
            "config": digest(canonical(config)),
            "model": subject.digest,
            "data": digest(canonical(digests)),
            "code": code_digest(),
        },
        "config": config,
        "model": strict(dict(subject.card)),
        "data": {"name": test.name, "n": len(test)},
        "versions": versions(),
        "hardware": machine,
        "seed": wish.seed,
        "plan": dict(plan),
    }


def about(wish: Wish) -> dict[str, Any]:
    """What may differ between two equal runs."""
    return {"created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), "command": repeatable(wish.command)}
