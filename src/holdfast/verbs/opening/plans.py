"""Converts the settings of an assessment to its request: the plan of the attacks, the gates and the limits."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch

from holdfast.attacks.corruption import Corruption
from holdfast.attacks.patch_attack import PatchAttack
from holdfast.attacks.protocol import Attack, Learned, ThresholdAttack
from holdfast.attacks.suites import VARIANTS, curve, suite, suite_of_task, variant
from holdfast.certifiers.protocol import Prover
from holdfast.core.batch import Data
from holdfast.core.catalogue import (
    BY_OPERATIONS,
    CASCADE,
    LATE,
    PARTITIONS,
    PATCH_MASKS,
    PROVERS_OF_TASKS,
    TREES,
    Arithmetic,
    load,
)
from holdfast.core.constraints import Constraint
from holdfast.core.errors import Placeholder, Remedy, UsageError
from holdfast.core.evidence import Evidence
from holdfast.core.names import kind_of, slug
from holdfast.core.tasks import Task
from holdfast.core.threat import ThreatModel
from holdfast.core.types import ACCESS_ORDER, Access
from holdfast.doubts.answering import BUDGET
from holdfast.gates.grammar import parse as parse_gate
from holdfast.runs.assess.request import AssessRequest
from holdfast.runs.assess.result import Result
from holdfast.runs.documents.stored_runs import open_run
from holdfast.runs.harness.kinds.baseline import Baseline, baseline_of
from holdfast.runs.harness.plan import DoubtsWanted, Plan, adaptive_members, members_of
from holdfast.runs.harness.stage import Member
from holdfast.settings.grammar import (
    AUTO,
    DEFAULT_SUITE,
    attack_listed,
    chosen,
    norms_of_suite,
    seconds,
    usual_suite,
)
from holdfast.threats.transformations import OF_OBJECTS, Patch
from holdfast.threats.word_embeddings import WordEmbeddings
from holdfast.verbs.configuration import opening_settings
from holdfast.verbs.opening.declared import opened_threat
from holdfast.verbs.opening.recipes import attack_class, build_attack, checked_attack
from holdfast.verbs.settings import Assess, Certify, Harden

Measuring = Assess | Certify | Harden
"""Settings of those verbs that measure a model with a suite."""

AttackLike = Attack | type[Attack] | str | Mapping[str, Any]
"""An attack, a class of attacks (for its default settings), a name, or a mapping such as `{"use": "pgd", "steps":
100}`."""

SuiteLike = AttackLike | Sequence[AttackLike]
"""The name of a suite, an attack, or a list of attacks."""

_EXPECTED = (
    "expected the name of a suite or of an attack, an attack such as holdfast.attacks.PGD(steps=100), or a list of "
    "attacks and their names"
)

_USUAL = {
    "linf": "8/255",
    "l2": "0.5",
    "l1": "12",
    "l0": "10",
    "snr": "40dB",
    "peak": "30dB",
}  # usual sizes, for an error message


def examples_to_fit(plan: Plan) -> int:
    """Return the number of examples that must be available to fit the learned attacks of a plan, or 0 if it has no
    learned attack.

    These examples are sampled at random, because files are often sorted by class.
    """
    return max((m.attack.examples for m in plan.members if isinstance(m.attack, Learned)), default=0)


def baseline_run(settings: Measuring) -> Result | None:
    """Return the earlier run of the setting `baseline`: a result, or that in the folder of a finished run."""
    run = settings.baseline
    if run is None or isinstance(run, Result):
        return run
    if isinstance(run, Evidence):
        return Result(run)
    if not isinstance(run, str):
        raise UsageError(f"baseline is {kind_of(run)}; give a result, or the folder of a run")
    return open_run(Path(run))


def baseline_evidence(settings: Measuring) -> Evidence | None:
    """Return the evidence of the run with which gates compare."""
    run = baseline_run(settings)
    return None if run is None else run.evidence


def with_stored_inputs(request: AssessRequest, run: Result, data: Data) -> AssessRequest:
    """Return the request with the attack that uses the stored adversarial inputs of an earlier run.

    If they cannot be used, a note states the reason if a gate compares with the run, or the threat has no norm, where
    metrics compare with it, too. Otherwise this raises `UsageError`. Corruptions are not searched, and have no attack
    that could begin with stored inputs.
    """
    constraint = request.plan.threat.constraint
    if constraint.drawn_at_random:
        return request
    attack = baseline_of(run.evidence, run.adversarial)
    refusal = _unusable(attack, request, run.evidence, data)
    if refusal is None:
        return replace(request, plan=replace(request.plan, baseline=attack))
    if constraint.is_ball and not any(claim.versus == "baseline" for claim in request.gates):
        raise refusal
    note = f"no attack begins with the baseline: {refusal.message}"
    return replace(request, notes=(*request.notes, note))


def _unusable(
    attack: Baseline | None, request: AssessRequest, run: Evidence, data: Data
) -> UsageError | None:
    """Return the error for a run that cannot begin with the stored inputs of an earlier one; None if it can."""
    plan, earlier, alone = request.plan, run.threat, Remedy("baseline")
    threat, constraint = plan.threat, plan.threat.constraint
    if not constraint.is_ball:
        return UsageError(
            f"baseline starts attacks only under a norm, and the threat {threat.text} has no norm", alone
        )
    if plan.smallest:
        return UsageError(
            "baseline starts attacks within an eps, and the suite searches for the smallest change",
            alone,
        )
    if earlier.constraint.name != constraint.name:
        under = threat.with_change(str(earlier.constraint))
        return UsageError(
            f"baseline is a run under {earlier.text}, and the threat is {threat.text}",
            Remedy("threat", under),
            alone,
        )
    if attack is None:
        return UsageError(
            "baseline stores no adversarial examples of its suite; a run with save_adversarial stores them",
            alone,
        )
    more = _further_access(run, request)
    if more:
        return UsageError(
            f"baseline is a run whose attacks had {more}, which the threat {threat.text} does not give; its "
            "adversarial examples would count as found without it",
            alone,
        )
    if len(data) and not attack.occurs_in(data):
        stored = f"{len(attack.x):,} input{'s' * (len(attack.x) != 1)} of {run.data.get('name', 'data')}"
        given = f"the {len(data):,} example{'s' * (len(data) != 1)} of {data.name}"
        return UsageError(
            f"baseline stores adversarial examples of {stored}; none of these inputs is among {given} with the same "
            "label",
            alone,
        )
    return None


def _further_access(run: Evidence, request: AssessRequest) -> str:
    """Return in words what the attacks of an earlier run had and those of the request lack: access to the model,
    queries or surrogates. It is empty if they lack nothing.
    """
    earlier, threat = run.threat, request.plan.threat
    of_model: Access = run.model.get("access", earlier.access)
    access: Access = min(earlier.access, of_model, key=ACCESS_ORDER.index)
    if not threat.gives(access):
        return f"access to {access}"
    if threat.queries is not None and (earlier.queries is None or earlier.queries > threat.queries):
        return "any number of queries" if earlier.queries is None else f"{earlier.queries:,} queries"
    own = {surrogate.digest for surrogate in request.surrogates}
    if not threat.gives("gradients") and any(card["digest"] not in own for card in run.surrogates):
        return "other surrogates"
    return ""


def assess_request(
    settings: Measuring,
    *,
    baseline: Evidence | None = None,
    device: str | None = None,
    target: Access = "gradients",
    trees: bool = False,
    task: Task | None = None,
    command: str = "",
) -> AssessRequest:
    """Return the request of an assessment, created from its settings.

    If given, `device` replaces the device of the settings. `target` is the highest access that the model allows, and
    `trees` states whether the model is an ensemble of trees. `task` is what it returns, if not one score for each
    class.
    """
    claims = tuple(parse_gate(gate) for gate in settings.gates)
    if baseline is None and any(claim.versus == "baseline" for claim in claims):
        raise UsageError(
            f"gate {next(c.text for c in claims if c.versus == 'baseline')!r} compares with another run",
            Remedy("baseline", Placeholder("RUN")),
        )
    on_device = device_of(settings.device) if device is None else device
    return AssessRequest(
        plan(settings, target, trees=trees, task=task),
        claims,
        baseline,
        settings.accept_doubts,
        settings.batch_size,
        time_budget_s=None if settings.time_budget is None else seconds(settings.time_budget, "time_budget"),
        workers=settings.workers,
        ray=settings.ray_options(on_device),
        device=on_device,
        sampled=settings.sample is not None,
        command=command,
        opening=opening_settings(settings),
    )


def listed_attacks(settings: Measuring) -> tuple[Member, ...] | None:
    """Return the attacks that the settings list individually, or None if the settings name a whole suite or no attacks
    at all.
    """
    if settings.attacks is not None:
        return members_of(build_attack(spec, f"attacks.{k}") for k, spec in enumerate(settings.attacks))
    if settings.suite is None or isinstance(settings.suite, str):
        return None
    return members_given(settings.suite, settings.threat.opened().constraint)


def members_given(given: object, constraint: Constraint, where: str = "suite") -> tuple[Member, ...]:
    """Return the named attacks for a Python argument, which is an attack, an attack class, a name, a mapping with the
    name in `use`, or several of these.
    """
    if isinstance(given, Attack | type | Mapping):
        return (_member_given(given, constraint, where),)
    names = given if isinstance(given, str) else None
    if names is not None:
        given = [name.strip() for name in names.split(",") if name.strip()]
    several = tuple(given) if isinstance(given, Iterable) and not isinstance(given, bytes) else ()
    if not several:
        raise UsageError(f"{where} is {(given if names is None else names)!r}; {_EXPECTED}")
    return tuple(_member_given(item, constraint, where) for item in several)


def _member_given(item: object, constraint: Constraint, where: str) -> Member:
    if isinstance(item, Member):
        return item
    if isinstance(item, Mapping):
        return members_of([build_attack(item, where)])[0]
    if isinstance(item, str):
        return _named(attack_listed(item), constraint)
    if isinstance(item, type) and not is_dataclass(item):
        raise UsageError(f"{where} is the class {item.__qualname__}, which is not an attack; {_EXPECTED}")
    attack = _default_attack(item, item.__name__) if isinstance(item, type) else item
    if not isinstance(attack, Attack):
        raise UsageError(f"{where} contains {item!r}; {_EXPECTED}")
    return members_of([checked_attack(attack)])[0]


def _named(name: str, constraint: Constraint) -> Member:
    if name not in VARIANTS:
        return Member(name, _default_attack(attack_class(name), name))
    attack = variant(name, constraint)
    if attack is None:
        raise UsageError(
            f"{name} is the name of {VARIANTS[name]} in suites under {', '.join(norms_of_suite(name))}, and the "
            f"threat is {constraint.name}; choose such a threat, or name {VARIANTS[name]}"
        )
    return Member(name, attack)


def _default_attack(cls: type[Any], name: str) -> Any:
    """Return an attack with default settings. Raises `UsageError` if a setting has no default."""
    needed = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    if needed:
        raise UsageError(
            f"{name} needs {', '.join(needed)}; give an attack with it, as {name}({needed[0]}=...)"
        )
    return cls()


def task_members(threat: ThreatModel, task: Task, target: Access) -> tuple[Member, ...]:
    """Return the attacks of the default suite under a threat on a model with another task than classes, whose highest
    access is `target`.
    """
    access: Access = min(threat.access, target, key=ACCESS_ORDER.index)
    name = usual_suite(replace(threat, access=access))
    return tuple(map(Member.of, suite_of_task(name, task.surrogates, threat.constraint, access).specs))


def plan(
    settings: Measuring, target: Access = "gradients", *, trees: bool = False, task: Task | None = None
) -> Plan:
    """Return the plan of an assessment: its attacks in the order in which they run, and the threat model of the
    settings.

    The default suite depends on the access that the threat model and the model allow.
    """
    threat = opened_threat(settings)
    if not threat.constraint.changes_inputs:
        return _without_attacks(settings, threat)
    if isinstance(threat.constraint, WordEmbeddings):
        return Plan((), threat, settings.seed, doubts="none")
    access: Access = min(threat.access, target, key=ACCESS_ORDER.index)
    members = listed_attacks(settings)
    if members is not None:
        name, smallest = "", threat.constraint.eps == float("inf")
    else:
        suite_name = str(settings.suite or "") or usual_suite(
            replace(threat, access=access), trees=trees and threat.access == "gradients"
        )
        composed = (
            suite(suite_name, threat.constraint, access)
            if task is None
            else suite_of_task(suite_name, task.surrogates, threat.constraint, access)
        )
        members = tuple(map(Member.of, composed.specs))
        name, smallest = str(composed), composed.smallest
    if threat.access != "gradients":
        members = tuple(_without_reading(member) for member in members)
    _refuse_endless(replace(threat, access=access), settings, smallest=smallest)
    corrupting = threat.constraint.drawn_at_random
    in_ball = threat.constraint.is_ball
    _refuse_strangers(members, settings, corrupting=corrupting)
    _refuse_other_triggers(members, threat.constraint)
    _refuse_out_of_place(members, threat.constraint)
    if settings.curve and not in_ball:
        raise UsageError(f"{settings.threat} has no eps, which a curve needs", Remedy("curve"))
    probing: DoubtsWanted = "all" if name and in_ball else "free"
    selected = _selected(members, settings.only, settings.skip)
    left_out = [member.name for member in members if member not in selected]
    if name and left_out:
        name += f" without {', '.join(left_out)}"
    return Plan(
        selected,
        threat,
        settings.seed,
        name,
        smallest=smallest,
        attacked=bool(name) and not smallest and in_ball and task is None,
        curve=(Member(*curve(threat.constraint)),) if settings.curve and not smallest else (),
        full=settings.full or corrupting or task is not None,
        keep_adversarial=settings.save_adversarial,
        shown=settings.examples,
        doubts=probing if settings.doubts else "none",
        adaptive=_adaptive(threat, settings, smallest=smallest, corrupting=corrupting),
        adaptive_budget=BUDGET if settings.adaptive_budget is None else settings.adaptive_budget,
        proofs=_proofs(settings, smallest=smallest, trees=trees, task=task),
    )


def _refuse_out_of_place(members: Sequence[Member], constraint: Constraint) -> None:
    """Raise `UsageError` for attacks that do not choose the position of a patch by the objects of each image."""
    if not isinstance(constraint, Patch) or constraint.at not in OF_OBJECTS:
        return
    for member in members:
        if not isinstance(member.attack, PatchAttack):
            raise UsageError(
                f"{member.name} does not place patches by the objects of each image, as at={constraint.at} requires; "
                "PatchAttack does, with gradients",
                Remedy("suite", "PatchAttack"),
            )


def _without_attacks(settings: Measuring, threat: ThreatModel) -> Plan:
    """Return the plan of a measurement under a threat that changes no input. Raises `UsageError` if the settings
    contain attacks.
    """
    from holdfast.threats.triggers import TrainingSet  # late: few threats are on training sets

    given = [name for name in ("suite", "attacks", "surrogates", "only", "skip") if getattr(settings, name)]
    given += [name for name in ("curve", "full", "adaptive", "save_adversarial") if getattr(settings, name)]
    if given:
        assert isinstance(threat.constraint, TrainingSet)
        refusal = threat.constraint.refusal()
        # an assessment may be of another threat, and the others are of this one
        raise refusal if isinstance(settings, Assess) else UsageError(refusal.message, Remedy(given[0]))
    # the votes of an ensemble hide the gradients, and both assessments of a training have the same threat
    threat = replace(threat, access="none")
    return Plan((), threat, settings.seed, doubts="none", proofs=(prover(PARTITIONS),))


def _without_reading(member: Member) -> Member:
    """Return an attack that does not read thresholds, because the attacker gets scores only."""
    if not isinstance(member.attack, ThresholdAttack):
        return member
    return replace(member, attack=member.attack.without_reading())


def _proofs(settings: Measuring, *, smallest: bool, trees: bool, task: Task | None) -> tuple[Prover, ...]:
    """Return the quick methods of certification that an assessment with `certify` begins with."""
    if not isinstance(settings, Assess) or not settings.certify:
        return ()
    if smallest:
        raise UsageError(
            "the suite searches for the smallest change, and robustness is proved within an eps",
            Remedy("certify"),
            Remedy("suite", DEFAULT_SUITE),
        )
    names = methods(settings, trees=trees, task=task)
    if PATCH_MASKS in names:
        raise UsageError(
            f"the threat is {settings.threat}, against which holdfast certify certifies another model than the given "
            "one, the vote over masks",
            Remedy("certify"),
        )
    return tuple(prover(name) for name in names if name not in LATE)


def methods(settings: Assess | Certify, *, trees: bool, task: Task | None) -> tuple[str, ...]:
    """Return the names of the methods of certification of a run on a model with a task, which may be an ensemble of
    trees. Raises `UsageError` if one proves nothing about the task.
    """
    names = settings.threat.constraint.provers or ((TREES,) if trees else CASCADE)
    if isinstance(settings, Certify) and settings.method != AUTO:
        names = (settings.method,)
    elif task is not None and names == CASCADE:
        names = tuple(name for name in PROVERS_OF_TASKS[task.name] if name in CASCADE[1:])
    if isinstance(settings, Certify) and settings.arithmetic != "exact":
        for name in names:
            if name not in BY_OPERATIONS:
                raise UsageError(
                    f"the method is {name}, which bounds no operations of a network, and arithmetic is "
                    f"{settings.arithmetic}; the methods with an arithmetic are {', '.join(BY_OPERATIONS)}",
                    Remedy("arithmetic"),
                )
    if task is None:
        return names
    own = PROVERS_OF_TASKS[task.name]
    if not own:
        raise UsageError(
            f"the task of the model is {task.name}, about which nothing is proved: no bounds pass through the "
            "selection of boxes (non-maximum suppression); attack it with holdfast assess"
        )
    for name in names:
        if name not in own:
            raise UsageError(
                f"the task of the model is {task.name}, about which the method {name} proves nothing; its methods are "
                f"{', '.join(own)}, for a threat of the norm linf, l2 or l1, and for a network in torch"
            )
    if isinstance(settings, Certify) and settings.geometry is not None:
        raise UsageError(
            f"geometry measures the boundary between classes, and the task of the model is {task.name}",
            Remedy("geometry"),
        )
    return names


def prover(name: str, timeout_s: float | None = None, arithmetic: Arithmetic = "exact") -> Prover:
    """Return the method of certification with a name of the catalogue. `timeout_s` limits the time for each example in
    seconds, if the method has a time limit. Methods in `BY_OPERATIONS` have an arithmetic.
    """
    cls = load("certifiers", name, type)
    timed = timeout_s is not None and "timeout_s" in {field.name for field in fields(cls)}
    settings: dict[str, Any] = {"timeout_s": timeout_s} if timed else {}
    if name in BY_OPERATIONS:
        settings["arithmetic"] = arithmetic
    method: Prover = cls(**settings)
    return method


def _adaptive(
    threat: ThreatModel, settings: Measuring, *, smallest: bool, corrupting: bool
) -> tuple[Member, ...]:
    """Return the adaptive attacks, from which raised doubts select."""
    if not settings.adaptive:
        return ()
    if not settings.doubts:
        raise UsageError(
            "adaptive attacks are chosen by the doubts that are raised, and no doubts are measured",
            Remedy("doubts", True),
            Remedy("adaptive"),
        )
    if smallest or corrupting:
        why = "the suite searches for the smallest change" if smallest else f"the threat is {settings.threat}"
        raise UsageError(
            f"adaptive attacks need an eps, and {why}",
            Remedy("adaptive"),
            _within_eps(threat),
        )
    return adaptive_members(threat.constraint)


def _within_eps(threat: ThreatModel) -> Remedy:
    """Return the choice of a suite under a finite eps: that of the threat if it has one."""
    searching = Remedy("suite", DEFAULT_SUITE if threat.gives("gradients") else "black-box")
    if threat.constraint.is_ball and threat.constraint.eps < float("inf"):
        return searching
    norm = threat.name if threat.name in _USUAL else "linf"
    return Remedy("threat", threat.with_change(f"{norm}:{_USUAL[norm]}"), also=(searching,))


def _refuse_endless(threat: ThreatModel, settings: Measuring, *, smallest: bool) -> None:
    """Raise `UsageError` for a threat without eps, unless the suite searches for the smallest change."""
    if threat.constraint.eps == float("inf") and not smallest:
        searched = (Remedy("suite", "minimum-norm"),) if threat.gives("gradients") else ()
        raise UsageError(
            f"{settings.threat} has no eps, which means the smallest change",
            *searched,
            Remedy("threat", threat.with_change(f"{threat.name}:{_USUAL[threat.name]}")),
        )


def _refuse_strangers(members: Sequence[Member], settings: Measuring, *, corrupting: bool) -> None:
    """Raise `UsageError` for a mixture of corruptions with other attacks or threats."""
    for member in members:
        if isinstance(member.attack, Corruption) and not corrupting:
            raise UsageError(
                f"{member.name} is a common corruption, and the threat is {settings.threat}",
                Remedy("threat", "corruptions:3"),
            )
        if corrupting and not isinstance(member.attack, Corruption):
            raise UsageError(
                f"{member.name} is not a common corruption, and the threat is {settings.threat}",
                Remedy("threat", "linf:8/255"),
            )


def _refuse_other_triggers(members: Sequence[Member], constraint: Constraint) -> None:
    """Raise `UsageError` for the attack with a trigger under another threat, and for another attack under a trigger."""
    if constraint.name != "trigger" and all(member.attack.needs != "none" for member in members):
        return
    from holdfast.attacks.trigger_stamp import (
        TriggerStamp,
        refuse_no_trigger,
    )  # late: few runs have a trigger
    from holdfast.threats.triggers import Stamped

    for member in members:
        if isinstance(member.attack, TriggerStamp):
            refuse_no_trigger(constraint)
        elif isinstance(constraint, Stamped):
            raise constraint.refusal()


def _selected(members: tuple[Member, ...], only: Sequence[str], skip: Sequence[str]) -> tuple[Member, ...]:
    kept = chosen([member.name for member in members], only, skip)
    return tuple(member for member in members if slug(member.name) in kept)


SUPPORTED_DEVICES = ("cpu", "cuda")
"""Types of the torch devices on which runs are tested."""


def device_of(name: str) -> str:
    """Return the name of the torch device for a setting; `auto` selects a GPU if there is one. Raises `UsageError` for
    an unknown device.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    accepted = ("auto", "cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count())))
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")  # refused below
    if device.type not in SUPPORTED_DEVICES:
        raise UsageError(
            f"device is {name!r}, which is not supported; expected one of {', '.join(accepted)} on this machine"
            f"{'' if 'cuda' in accepted else ', or cuda on a machine with a GPU'}",
            Remedy("device", "cpu"),
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device is {name!r}, but this machine has {torch.cuda.device_count()} GPUs",
            Remedy("device", "cpu"),
        )
    return name
