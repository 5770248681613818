"""The hardening of a policy: the assessment of the given one, the training of a new one, and its assessment."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from pydantic import Strict
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from holdfast.audits import control
from holdfast.audits.control import ControlRun, finding_of, rows_of
from holdfast.audits.finding import Finding, Images, StoredSteps, Table
from holdfast.control.environments import Discrete
from holdfast.control.hardening import Hardening, hardened
from holdfast.control.learning import typical
from holdfast.control.policies import Network, Policy
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.evidence import Columns
from holdfast.reports.words import plain
from holdfast.runs.engine.run import Run
from holdfast.runs.store.columns import Form, whole

BEFORE, AFTER, WEIGHTS = "before-", "after-", "weights"
"""Prefixes of the steps of the two assessments, and name of the stage with the trained policy."""


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
        return (*(BEFORE + step for step in own), WEIGHTS, *(AFTER + step for step in own))


def measure(run: Run, work: PolicyHardening) -> tuple[Images, Policy]:
    """Take the steps of a hardening, and return the new policy."""
    given = work.given
    control.measure(run, given, BEFORE)
    stored = run.stage(WEIGHTS, lambda: _trained(work))
    new = policy_from(stored.columns, given)
    control.measure(run, replace(given, policy=new), AFTER)
    return dict, new


def _trained(work: PolicyHardening) -> Columns:
    given, best, updates = work.given, None, 0
    deadline = float("inf") if work.budget_s is None else time.monotonic() + work.budget_s
    scale = typical(given.visited())
    rng = Draws(given.seed).at("robust-policy")
    for progress, policy in hardened(
        given.environment, given.ball(), work.how, rng, scale=scale, deadline=deadline
    ):
        best, updates = policy, progress.update
    if best is None:
        raise UsageError("the budget ended before the first update of the policy; give a longer one")
    network = best.function
    assert isinstance(network, Network)
    first = network.body[0]
    assert isinstance(first, torch.nn.Linear)
    return {
        "id": torch.arange(1),
        "width": torch.tensor([first.out_features]),
        "updates": torch.tensor([updates]),
        "value": parameters_to_vector(network.parameters())[None].double(),
        "mean": network.mean[None].double(),
        "scale": network.scale[None].double(),
    }


def policy_from(columns: Mapping[str, torch.Tensor], given: ControlRun) -> Policy:
    """Return the policy in the columns of the training."""
    actions = given.environment.actions
    outputs = actions.n if isinstance(actions, Discrete) else actions.size
    network = Network(given.environment.observations.size, outputs, int(columns["width"][0]))
    vector_to_parameters(columns["value"][0].float(), network.parameters())
    network.mean.copy_(columns["mean"][0])
    network.scale.copy_(columns["scale"][0])
    return Policy(network.requires_grad_(False), actions)


class _Settings(control.Settings):
    recipe: Mapping[str, Any]
    budget_s: Annotated[float, Strict()] | None


_FORMS = {
    "value": Form(("n", "k")),
    "mean": Form(("n", "d")),
    "scale": Form(("n", "d")),
    "updates": whole("n", high=2**31),
}


def concluded(steps: StoredSteps) -> Finding:
    """Return the finding of the assessment of the new policy, with that of the given one beside it."""
    settings = steps.settings(_Settings)
    trained = steps.columns(WEIGHTS, _FORMS, n=1)
    updates = int(trained["updates"][0])
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
        f"The recipe {settings['recipe']['method']} took {updates} updates.",
    )
    return replace(
        finding,
        headline=f"the lowest mean return is {plain(high)} for the new policy, and {plain(low)} for the given one "
        f"({settings['threat']})",
        tables=(table, *finding.tables),
        facts={**finding.facts, "given_worst_return": low, "updates": updates},
    )
