"""Opens a policy and its environment, and assesses, certifies, hardens or explains the policy."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from holdfast.audits import certified_actions, control
from holdfast.audits import hardened_policy as hardened_policies
from holdfast.audits.audit import AuditRequest, AuditResult, audited
from holdfast.audits.control import ControlRun, settings_of
from holdfast.audits.finding import Images
from holdfast.control.environments import Discrete
from holdfast.control.hardening import Hardening
from holdfast.control.opening import POLICY, Opened, open_environment, open_policy, saved
from holdfast.control.policies import Policy
from holdfast.core.errors import Remedy, UsageError
from holdfast.reports.audit import audit_report, headline
from holdfast.reports.write import rendered
from holdfast.runs.engine.progress import Notify, Progress, ignore, silent
from holdfast.runs.engine.run import Run
from holdfast.runs.harden.hardened import CardForm, Hardened
from holdfast.settings.grammar import seconds
from holdfast.threats.policies import Actions, Observations, Parameters
from holdfast.verbs.opening.arguments import gradients
from holdfast.verbs.opening.recipes import built
from holdfast.verbs.opening.resolve import free_folder_of
from holdfast.verbs.settings import Assess, Certify, Harden

_EPISODES = 100
"""number of episodes that judge, if `n` is not given"""
_OWN = frozenset(
    {
        "model",
        "data",
        "threat",
        "gates",
        "n",
        "seed",
        "output",
        "model_args",
        "arch",
        "trust_code",
        "device",
        "file_version",
    }
)
"""settings that commands have for policies"""


def refuse_other_settings(settings: Assess | Certify | Harden, *further: str) -> None:
    """Raise `UsageError` for a setting that has no meaning for a policy."""
    for name in sorted(settings.model_fields_set - _OWN - {*further}):
        value = getattr(settings, name)
        if value not in (None, [], {}, False, ()):
            raise UsageError(
                f"{name} is {value!r}, and the threat {settings.threat} is for a policy in an environment, for which "
                f"{settings.verb} has no such setting",
                Remedy(name),
            )
    threat = settings.threat
    if threat.access != "gradients" or threat.queries is not None:
        raise UsageError(
            f"the threat is {threat}; the attackers of a policy have the policy itself: leave access and queries "
            "out"
        )
    if settings.device not in (None, "auto", "cpu"):
        raise UsageError(f"device is {settings.device!r}; episodes run on the CPU", Remedy("device", "cpu"))


def opened(settings: Assess | Certify | Harden) -> tuple[ControlRun, Opened, Opened]:
    """Open the policy and the environment of the settings."""
    environment = open_environment(settings.data)
    policy = open_policy(
        settings.model,
        environment.value,
        settings.model_args,
        trust_code=settings.trust_code,
        arch=settings.arch,
    )
    threat = settings.threat.constraint
    assert isinstance(threat, Observations | Actions | Parameters)  # the domain of the threat is CONTROL
    how = ControlRun(
        environment.value, policy.value, threat, settings.threat.unit, settings.n or _EPISODES, settings.seed
    )
    how.refuse_unfit()
    return how, policy, environment


def request_of(
    settings: Assess | Certify | Harden,
    kind: str,
    how: ControlRun,
    policy: Opened,
    environment: Opened,
    *,
    own: Mapping[str, Any],
    steps: tuple[str, ...],
    command: str,
) -> AuditRequest:
    """Return the request of a run with a policy."""
    return AuditRequest(
        kind,
        own,
        {"name": policy.name, "digest": policy.digest},
        {"name": environment.name, "digest": environment.digest, "n": how.n},
        steps,
        gates=tuple(settings.gates),
        seed=settings.seed,
        command=command,
        notes=(*policy.notes, *environment.notes),
    )


@gradients()
def measured(
    settings: Assess | Certify,
    folder: str | Path | None = None,
    *,
    resume: bool = False,
    progress: Progress = silent,
    notify: Notify = ignore,
    command: str = "",
) -> AuditResult:
    """Measure the return of a policy under each attacker, or certify its actions, and judge the gates."""
    refuse_other_settings(settings)
    place = free_folder_of(folder, resume=resume)
    how, policy, environment = opened(settings)
    if isinstance(settings, Certify):
        kind, measure = "certified-actions", certified_actions.measure
        steps: tuple[str, ...] = (certified_actions.STATES,)
        own = {**settings_of(how), "discrete": isinstance(environment.value.actions, Discrete)}
        own = {name: own[name] for name in ("threat", "n", "discrete", "scaled")}
    else:
        kind, measure, steps = "control", control.measure, (control.ENVIRONMENT, *how.stages)
        own = settings_of(how)
    request = request_of(settings, kind, how, policy, environment, own=own, steps=steps, command=command)
    return audited(request, partial(measure, how=how), place, resume=resume, progress=progress, notify=notify)


HardenedPolicy = Hardened[Policy, AuditResult]
"""A new policy with the assessments of the given and the new one, which share their episodes."""


@gradients()
def hardened_policy(
    settings: Harden,
    folder: str | Path | None = None,
    *,
    resume: bool = False,
    progress: Progress = silent,
    notify: Notify = ignore,
    command: str = "",
) -> HardenedPolicy:
    """Train a new policy with the recipe `robust-policy`, and assess it beside the given one."""
    refuse_other_settings(settings, "recipe", "budget")
    place = free_folder_of(folder, resume=resume)
    how, policy, environment = opened(settings)
    given = {name: value for name, value in settings.recipe.items() if name != "use"}
    recipe = built(Hardening, given, "recipe robust-policy", "recipe")
    budget = None if settings.budget is None else seconds(settings.budget, "budget")
    work = hardened_policies.PolicyHardening(how, recipe, budget)
    own = {**settings_of(how), "recipe": asdict(recipe), "budget_s": budget}
    request = replace(
        request_of(
            settings, "hardened-policy", how, policy, environment, own=own, steps=work.steps, command=command
        ),
        writes=True,  # the new policy is read from the stored steps
    )
    trained: list[Policy] = []

    def measure(run: Run) -> Images:
        images, new = hardened_policies.measure(run, work)
        trained.append(new)
        return images

    result = audited(request, measure, place, resume=resume, progress=progress, notify=notify)
    card = {**result.summary(), "recipe": settings.recipe["use"], "notes": list(request.notes)}
    form = CardForm(_files, headline, audit_report)
    return Hardened(trained[-1], result, result, (), card, saved(trained[-1]), result.folder, form=form)


def _files(hardened: HardenedPolicy, place: Path) -> dict[str, bytes]:
    report = audit_report(hardened.card)
    cards = {f"card{suffix}": rendered(report, suffix).encode() for suffix in (".json", ".md")}
    return {POLICY: hardened.weights, **cards}
