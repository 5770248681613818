"""The plan of a measurement, which is a list of stages: the attacks, the threat model and the seed."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from holdfast.attacks.protocol import Attack, Learned
from holdfast.attacks.suites import is_possible, suite
from holdfast.attacks.transfer import Transfer
from holdfast.certifiers.protocol import Prover
from holdfast.core.constraints import Constraint
from holdfast.core.errors import OTHER_EXAMPLES, SURROGATE, Remedy, UsageError
from holdfast.core.names import slug, suite_name
from holdfast.core.threat import ThreatModel
from holdfast.core.types import ACCESS_ORDER, Access
from holdfast.doubts.answering import BUDGET, Arm, arms, within
from holdfast.runs.harness.kinds import KINDS
from holdfast.runs.harness.kinds.baseline import Baseline
from holdfast.runs.harness.kinds.checks import Geometer, Trials
from holdfast.runs.harness.stage import Against, Member, Outline, Stage, StageOutline

DoubtsWanted = Literal["all", "free", "none"]


@dataclass(frozen=True)
class Plan:
    """Everything that determines the results of a measurement except the model and the data, such as the attacks, the
    threat model and the seed.
    """

    members: tuple[Member, ...]
    threat: ThreatModel
    seed: int = 0
    suite: str = ""
    """name and version of the suite; empty for a list of attacks"""
    smallest: bool = False
    """search for the smallest change that breaks an example, instead of any change within eps"""
    attacked: bool = False
    """run the fixed PGD-40 pass, from which entropy, margin, F1 and calibration are computed"""
    detection: bool = False
    """run the passes that evaluate the detector of a model that rejects inputs"""
    curve: tuple[Member, ...] = ()
    """minimum-norm attacks that are run on every example, for accuracy as a function of eps"""
    matrix: bool = False
    """measure how examples computed on the model and on each surrogate transfer to each other model"""
    across: bool = False
    """measure how perturbations transfer between the data of the run and further data sets"""
    geometry: Geometer | None = None
    """measures the geometry of the decision boundary around the first examples, for the report; None for no geometry"""
    trials: Trials | None = None
    """attacks the first examples with and without a query detector; None without such a detector"""
    full: bool = False
    """run every attack on every correct example, even on those that are already broken"""
    keep_adversarial: bool = False
    """store every adversarial input, and not only a few for the report"""
    alone: bool = False
    """run no pass in addition to the attacks, and store the resulting inputs of all attacked examples"""
    shown: bool = True
    """store a few adversarial inputs for the report"""
    doubts: DoubtsWanted = "free"
    proofs: tuple[Prover, ...] = ()
    """methods of certification that are run before the attacks of the suite; these then skip certified examples"""
    late_proofs: tuple[Prover, ...] = ()
    """methods of certification that are run after the attacks of the suite, on the examples that are still undecided"""
    baseline: Baseline | None = None
    """attack with the stored adversarial inputs of an earlier run, before those of the suite; None without them"""
    adaptive: tuple[Member, ...] = ()
    """attacks that are run if raised doubts require them, on the examples that survive all other attacks"""
    adaptive_budget: int = BUDGET
    """largest number of forward and backward passes for each example, over all adaptive attacks and their checks"""

    def stages(self) -> tuple[Stage, ...]:
        """Return the stages of the plan in the order in which they run, with those of adaptive attacks at the end."""
        stages = [stage for kind in KINDS.values() for stage in kind.stages(self)]
        return (*(s for s in stages if not s.adaptive), *(s for s in stages if s.adaptive))

    def outline(self, classes: int) -> Outline:
        """Return a description of the plan in plain values, which is stored with a run, for a model with `classes`
        classes.
        """
        steps = tuple(self._step(stage, classes) for stage in self.stages())
        return Outline(steps, self.threat, self.seed, self.suite, self.smallest)

    def _step(self, stage: Stage, classes: int) -> StageOutline:
        if stage.prover is not None:
            return StageOutline(stage.name, stage.kind, stage.prover.name, settings(stage.prover))
        if stage.member is None:
            return StageOutline(stage.name, stage.kind)
        plain_settings = settings(stage.member.attack)
        aimed, against = self.threat.goal is not None, stage.member.against
        weighed: tuple[str, ...] = ()
        if against is not None and against.weight:
            weight = f"{against.weight:g} times what balances it with the classes"
            weighed = (f"the detector's score weighs {weight}",)
        return StageOutline(
            stage.name,
            stage.kind,
            stage.member.name,
            plain_settings,
            (*few_classes(plain_settings, classes, aimed=aimed), *weighed),
            "".join(stage.earlier[:1]),
            stage.member.after,
            stage.adaptive,
        )


def adaptive_members(constraint: Constraint) -> tuple[Member, ...]:
    """Return all adaptive attacks that are possible under a constraint, with their names."""
    return tuple(map(_member, arms(constraint)))


def _member(arm: Arm) -> Member:
    return Member(arm.name, arm.attack, against=None if arm.weight is None else Against(arm.weight))


def within_budget(plan: Plan, *, randomised: bool) -> Plan:
    """Return the plan with those adaptive attacks that fit into its budget of passes for each example.

    Attacks that are not those of `arms`, as for a list of attacks in Python, are unchanged.
    """
    known = {arm.name: arm for arm in arms(plan.threat.constraint)} if plan.adaptive else {}
    chosen = [
        replace(known[member.name], attack=member.attack) for member in plan.adaptive if member.name in known
    ]
    if len(chosen) < len(plan.adaptive):
        return plan
    limited = within(plan.adaptive_budget, chosen, plan.threat, randomised=randomised)
    return replace(plan, adaptive=tuple(map(_member, limited)))


def on_detector(plan: Plan, *, rejects: bool) -> Plan:
    """Return the plan with additional attacks on the detector of the model if it has one, and otherwise without attacks
    on detectors.

    `rejects` states whether the model has a detector.
    """
    if not rejects:
        return replace(plan, adaptive=tuple(member for member in plan.adaptive if member.against is None))
    detection = plan.attacked and plan.threat.goal is None and plan.threat.gives("gradients")
    return replace(plan, detection=detection)


def members_of(attacks: Iterable[Attack]) -> tuple[Member, ...]:
    """Return a list of attacks as the members of a suite, each named after its class."""
    return tuple(Member(type(attack).__name__, attack) for attack in attacks)


def settings(attack: Attack | Prover) -> dict[str, Any]:
    """Return the settings of an attack or a prover as values that JSON can represent. Functions are replaced by their
    names, and nested attacks by name and settings.
    """
    plain: dict[str, Any] = {}
    for f in fields(attack):  # type: ignore[arg-type]
        if not f.repr:  # stored inputs, which `run` identifies
            continue
        value = getattr(attack, f.name)
        if isinstance(value, Attack):
            plain[f.name] = {"use": type(value).__name__, **settings(value)}
        else:
            plain[f.name] = value.__name__ if callable(value) else value
    return plain


def few_classes(attack_settings: Mapping[str, Any], classes: int, *, aimed: bool) -> tuple[str, ...]:
    """Return notes on those settings of an attack that have a different effect because the model has few classes."""
    targets = attack_settings.get("targets") or 0
    needed, notes = 4 if targets or aimed else 3, []
    if attack_settings.get("loss") == "dlr" and classes < needed:
        notes.append(f"DLR needs {needed} classes; with {classes} the margin is used instead")
    if targets >= classes:
        notes.append(f"{targets} targets were asked for; with {classes} classes there are {classes - 1}")
    return tuple(notes)


def refuse_unfitted(plan: Plan, *, fit: bool) -> None:
    """Raise `UsageError` if a learned attack of the plan cannot be fitted, or if examples for fitting are given but no
    attack is a learned one.

    `fit` states whether examples for fitting are given.
    """
    if fit and not any(isinstance(member.attack, Learned) for member in plan.members):
        raise UsageError(
            "examples to fit attacks to are given, and no attack of the suite is fitted; list one, as in attacks: "
            "[{use: AdversarialPatch}]",
            Remedy("fit"),
        )
    for member in plan.members:
        if not isinstance(member.attack, Learned):
            continue
        if plan.smallest:
            raise UsageError(
                f"{member.name} is fitted for one eps; give one, as in linf:0.2, or leave it out"
            )
        if plan.threat.queries is not None:
            raise UsageError(
                f"{member.name} is fitted with an unlimited number of queries, which no budget counts; "
                f"leave queries={plan.threat.queries} out, or leave it out"
            )
        if not fit:
            raise UsageError(
                f"{member.name} is first fitted to examples that are not judged; leave the attack out",
                OTHER_EXAMPLES,
            )


def refuse_what_is_hidden(plan: Plan, target: Access, why: str = "") -> Plan:
    """Return the plan with the attacker's access limited to that of the model. Raises `UsageError` if an attack needs
    more access.

    `why` is added to the message of the error.
    """
    least: Access = min(plan.threat.access, target, key=ACCESS_ORDER.index)
    limited = replace(plan, threat=replace(plan.threat, access=least))
    limited = replace(
        limited, adaptive=tuple(m for m in plan.adaptive if limited.threat.gives(m.attack.needs))
    )
    for member in (*limited.members, *limited.curve):
        if isinstance(member.attack, Transfer) and not limited.threat.surrogates:
            raise UsageError(
                f"{member.name} computes its examples on surrogates, and none is given", SURROGATE
            )
        if not limited.threat.gives(member.attack.needs):
            visible = "nothing to be seen" if least == "none" else f"{least} only"
            limit = f"the threat model allows {visible}"
            if not replace(plan.threat, access=target).gives(member.attack.needs):
                limit = f"the model gives {least} only{f' ({why})' if why else ''}"
            raise UsageError(
                f"{member.name} needs {member.attack.needs}, and {limit}{_more_access(member, limited, target)}",
                *_remedies(member, limited),
            )
    return limited


def _suite(plan: Plan, name: str) -> Remedy:
    """Return the choice of a suite, which `holdfast.attack` has as its argument `attack`."""
    return Remedy("attack" if plan.alone else "suite", name)


def _remedies(member: Member, plan: Plan) -> tuple[Remedy, ...]:
    """Return the remedies if an attack needs more access than the threat model allows or the target gives."""
    threat, remedies = plan.threat, list[Remedy]()
    hidden = [m for m in plan.members if not threat.gives(m.attack.needs)]
    if member not in hidden:
        return (Remedy("curve"),)
    if len(hidden) < len(plan.members) and not plan.alone:
        remedies.append(Remedy("skip", tuple(slug(m.name) for m in hidden), repeated=True))
    if is_possible("black-box", threat.constraint, threat.access) and suite_name(plan.suite) != "black-box":
        searches = ", ".join(spec.name for spec in suite("black-box", threat.constraint, threat.access).specs)
        remedies.append(replace(_suite(plan, "black-box"), reason=f"({searches})"))
    elif threat.access == "none" and is_possible("transfer", threat.constraint, "none"):
        remedies.append(replace(_suite(plan, "transfer"), also=(SURROGATE,)))
    return tuple(remedies)


def _more_access(member: Member, plan: Plan, target: Access) -> str:
    """Return the part of the message about an attack that needs more access that states where there is more."""
    threat, norm = plan.threat, plan.threat.name
    more = replace(threat, access=target).gives(member.attack.needs)
    text = f"; the threat can allow more, as in access={member.attack.needs}" if more else ""
    alone = not threat.constraint.is_ball or is_possible("black-box", threat.constraint, "labels")
    if threat.access == "labels" and not alone:
        return f"{text}; no attack under {norm} works with labels alone, and some under linf and l2 do"
    if more or _remedies(member, plan):
        return text
    return f"; no attack under {norm} needs less, and some under linf and l2 do"
