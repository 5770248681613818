"""The hardening of a policy: the assessment of the given one, the training of a new one, and its assessment."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from pydantic import Strict
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from typing_extensions import TypedDict

from holdfast.audits import control
from holdfast.audits.control import ControlRun, finding_of, rows_of
from holdfast.audits.finding import Finding, Images, Number, StoredSteps, Table
from holdfast.control.hardening import Hardening, hardened
from holdfast.control.learning import typical
from holdfast.control.policies import Network, Policy
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.evidence import Columns
from holdfast.reports.words import plain
from holdfast.runs.engine.run import Run
from holdfast.runs.store.columns import Form

BEFORE, AFTER, COURSE, WEIGHTS = "before-", "after-", "course", "weights"
"""Prefixes of the steps of the two assessments, and names of the document and of the stage of the training."""


@dataclass(frozen=True)
class PolicyHardening:
    """What a hardening of a policy trains and measures."""

    given: ControlRun
    how: Hardening
    budget_s: float | None
    """time of the training in seconds; None for all of its updates"""

    @property
    def steps(self) -> tuple[str, ...]:
        """Names of the stages and documents in their order."""
        own = (control.ENVIRONMENT, *self.given.stages)
        return (*(BEFORE + step for step in own), WEIGHTS, COURSE, *(AFTER + step for step in own))


def measure(run: Run, work: PolicyHardening) -> tuple[Images, Policy]:
    """Take the steps of a hardening, and return the new policy."""
    given = work.given
    control.measure(run, given, BEFORE)
    course: list[dict[str, Any]] = []
    stored = run.stage(WEIGHTS, lambda: _trained(work, course))
    run.document(COURSE, lambda: {"returns": course})
    new = policy_from(stored.columns, given)
    control.measure(run, replace(given, policy=new), AFTER)
    return dict, new


def _trained(work: PolicyHardening, course: list[dict[str, Any]]) -> Columns:
    given, best = work.given, None
    deadline = float("inf") if work.budget_s is None else time.monotonic() + work.budget_s
    scale = typical(given.visited())
    rng = Draws(given.seed).at("robust-policy")
    for progress, policy in hardened(
        given.environment, given.ball(), work.how, rng, scale=scale, deadline=deadline
    ):
        best = policy
        mean = progress.mean_return
        course.append({"update": progress.update, "return": mean if mean == mean else None})
    if best is None:
        raise UsageError("the budget ended before the first update of the policy; give a longer one")
    network = best.function
    assert isinstance(network, Network)
    first = network.body[0]
    assert isinstance(first, torch.nn.Linear)
    return {
        "id": torch.arange(1),
        "width": torch.tensor([first.out_features]),
        "value": parameters_to_vector(network.parameters())[None].double(),
        "mean": network.mean[None].double(),
        "scale": network.scale[None].double(),
    }


def policy_from(columns: Mapping[str, torch.Tensor], given: ControlRun) -> Policy:
    """Return the policy in the columns of the training."""
    actions = given.environment.actions
    outputs = getattr(actions, "n", None) or given.environment.actions.size  # type: ignore[union-attr]
    network = Network(given.environment.observations.size, outputs, int(columns["width"][0]))
    vector_to_parameters(columns["value"][0].float(), network.parameters())
    network.mean.copy_(columns["mean"][0])
    network.scale.copy_(columns["scale"][0])
    return Policy(network.requires_grad_(False), actions)


class _Course(TypedDict):
    returns: list[Mapping[str, Number | None]]


class _Settings(control.Settings):
    recipe: Mapping[str, Any]
    budget_s: Annotated[float, Strict()] | None


def concluded(steps: StoredSteps) -> Finding:
    """Return the finding of the assessment of the new policy, with that of the given one beside it."""
    settings = steps.settings(_Settings)
    course = steps.document(COURSE, _Course)["returns"]
    steps.columns(
        WEIGHTS, {"value": Form(("n", "k")), "mean": Form(("n", "d")), "scale": Form(("n", "d"))}, n=1
    )
    sides = []
    for prefix in (BEFORE, AFTER):
        within = steps.within(prefix)
        sides.append(rows_of(within, settings))
    before, after = sides
    ignored = steps.within(AFTER).document(control.ENVIRONMENT, control.EnvironmentForm)["ignores_seed"]
    finding = finding_of(settings, after, ignored=ignored)
    low = min(row.estimate.value for row in before[1:])
    high = finding.metrics["worst_return"].value
    table = Table(
        "Mean return of the given and the new policy",
        ("attacker", "given", "new", "interval of the new"),
        [
            (
                new.name,
                round(old.estimate.value, 1),
                round(new.estimate.value, 1),
                f"{plain(round(new.estimate.low, 1))} to {plain(round(new.estimate.high, 1))}",
            )
            for old, new in zip(before, after, strict=True)
        ],
        f"The recipe {settings['recipe']['method']} took {len(course)} updates.",
    )
    return replace(
        finding,
        headline=f"the lowest mean return is {plain(high)} for the new policy, and {plain(low)} for the given one "
        f"({settings['threat']})",
        tables=(table, *finding.tables),
        facts={**finding.facts, "given_worst_return": low, "updates": len(course)},
    )
