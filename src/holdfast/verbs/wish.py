"""The settings of a hardening, and the manifest that identifies its run."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from holdfast.core.batch import Data
from holdfast.core.chain import canonical, digest
from holdfast.core.threat import ThreatModel
from holdfast.engine.identity import code_digest, versions
from holdfast.engine.resuming import repeatable
from holdfast.reports.numbers import strict
from holdfast.verbs.candidates import Candidate
from holdfast.verbs.request import AssessRequest, Subject


@dataclass(frozen=True)
class Wish:
    """The settings of a hardening."""

    name: str
    """name of the recipe, as requested"""
    candidates: tuple[Candidate, ...]
    """the recipe, or the recipes to choose from, the fastest first"""
    threat: ThreatModel
    judge: AssessRequest
    """how the model is measured before and after"""
    budget_s: float | None = None
    """wall-clock time of the training, evaluations on held-out examples included; None uses the recipe's epochs"""
    seed: int = 0
    device: str = "cpu"
    command: str = ""
    examples: int = 0
    """number of training examples for learned attacks of the evaluation, if it has some"""
    apart: Data | None = None
    """data that must not be trained on: the whole set of which the judged examples are a part; None for the judged
    ones only"""
    opens: str = ""
    """command-line options that open the new model, in addition to its file and the data"""


def manifest_of(
    subject: Subject,
    digests: list[str],
    test: Data,
    wish: Wish,
    plan: Mapping[str, Any],
    machine: str,
) -> dict[str, Any]:
    """Content of `run.json`. `digests` are those of the judged examples and of the training examples."""
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
    """Entries that may differ between two equal runs: time and command."""
    return {"created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), "command": repeatable(wish.command)}
