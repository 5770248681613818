"""What is measured: the attacks, the threat model and the seed, as a list of stages."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from holdfast.attacks import PGD, Transfer
from holdfast.attacks.protocol import Attack, Learned
from holdfast.core.constraints import L0, L1, L2, Constraint, Limited, Linf
from holdfast.core.errors import UsageError
from holdfast.core.guard import Aim
from holdfast.core.names import slug
from holdfast.core.patches import Patch
from holdfast.core.threat import ThreatModel
from holdfast.core.transformations import Transformations
from holdfast.core.types import ACCESS_ORDER, Access
from holdfast.doubts.answering import EVEN, arms
from holdfast.ops.ascent import flat
from holdfast.ops.losses import cross_entropy
from holdfast.suites import suite

Kind = Literal["clean", "fit", "attack", "attacked", "detection", "curve", "transfer", "across"]
DoubtsWanted = Literal["all", "free", "none"]


@dataclass(frozen=True)
class Against:
    """How an attack takes the detector of a model that rejects, in terms of what it says of the clean inputs."""

    weight: float
    """of the score, in multiples of what balances its spread with the margins of the classes; 0 leaves it out"""
    rejecting: float | None = None
    """aim at the threshold that rejects this share of the clean inputs; None is the model's own"""


@dataclass(frozen=True)
class Member:
    """An attack and what the suite calls it, such as `APGD-CE`."""

    name: str
    attack: Attack
    waves: int = 0
    """how often the examples that stand are halved to get those that it begins with; 0 is all of them at once"""
    against: Against | None = None
    """how it takes a detector; None takes it as it is"""


@dataclass(frozen=True)
class Stage:
    """One step of a measurement; `name` is its place in the plan, which its draws and its file are named after."""

    name: str
    kind: Kind
    member: Member | None = None
    earlier: tuple[str, ...] = ()
    """the names of the earlier waves of the same attack"""
    adaptive: bool = False
    """run after the doubts were asked, if one calls for it, by an attacker who goes round what masks gradients"""
    aim: Aim = Aim()
    """how it takes a detector"""


@dataclass(frozen=True)
class Step:
    """A stage in plain values, which can be written down and read back."""

    name: str
    kind: Kind
    attack: str = ""
    """what the suite calls it"""
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """what a reader must know of it"""
    wave_of: str = ""
    """the name of the first wave of the same attack, where this is a later one"""
    adaptive: bool = False
    """run only where a raised doubt called for it"""


@dataclass(frozen=True)
class Outline:
    """What evidence needs to know of a plan."""

    steps: tuple[Step, ...]
    threat: ThreatModel
    seed: int
    suite: str
    smallest: bool


@dataclass(frozen=True)
class Plan:
    """Everything that decides what is measured, but the model, the data and how they are shared out."""

    members: tuple[Member, ...]
    threat: ThreatModel
    seed: int = 0
    suite: str = ""
    """name and version; empty for a list of attacks"""
    smallest: bool = False
    """ask every attack for its smallest change on every example, instead of for any change within eps"""
    attacked: bool = False
    """run the fixed PGD-40 pass that entropy, margin, F1 and calibration are read from"""
    detection: bool = False
    """run the passes that show what the detector of a model that rejects is worth"""
    curve: tuple[Member, ...] = ()
    """minimum-norm attacks on every example, for accuracy against eps"""
    matrix: bool = False
    """measure how examples made on the model and on each surrogate turn the others"""
    across: bool = False
    """measure how changes made on the data turn inputs of other data sets, and theirs those of the data"""
    full: bool = False
    """run every attack on every example, standing or not"""
    keep_adversarial: bool = False
    """keep every successful input, and not only a few to look at"""
    alone: bool = False
    """make no pass beside the attacks, and keep what they return on every example that they are run on"""
    shown: bool = True
    """keep a few successful inputs to look at"""
    doubts: DoubtsWanted = "free"
    adaptive: tuple[Member, ...] = ()
    """what raised doubts may call for, on the examples that the attacks before left standing"""

    def stages(self) -> tuple[Stage, ...]:
        """The steps in order."""
        attacks = [
            stage for k, m in enumerate(self.members, 1) for stage in self._waves(f"{k}-{slug(m.name)}", m)
        ]
        fixed = (
            [Stage("attacked", "attacked", FIXED)] if self.attacked and self.threat.gives("gradients") else []
        )
        detection = [Stage(slug(m.name), "detection", m) for m in DETECTION if self.detection]
        curve = [Stage(f"curve-{k}-{slug(m.name)}", "curve", m) for k, m in enumerate(self.curve, 1)]
        matrix = [Stage("transfer", "transfer", MATRIX)] if self.matrix else []
        across = [Stage("across", "across", MATRIX)] if self.across else []
        arms = [
            Stage(f"{k}-{slug(m.name)}", "attack", m, adaptive=True)
            for k, m in enumerate(self.adaptive, len(self.members) + 1)
        ]
        return (Stage("clean", "clean"), *attacks, *fixed, *detection, *curve, *matrix, *across, *arms)

    def _waves(self, name: str, member: Member) -> list[Stage]:
        later = 0 if self.full or self.smallest else member.waves
        names = (name, *(f"{name}-wave-{wave + 2}" for wave in range(later)))
        fit = [Stage(fit_of(name), "fit", member)] if isinstance(member.attack, Learned) else []
        return [*fit, *(Stage(each, "attack", member, names[:k]) for k, each in enumerate(names))]

    def outline(self, classes: int) -> Outline:
        """The plan in plain values, for a model of so many classes."""
        steps = tuple(self._step(stage, classes) for stage in self.stages())
        return Outline(steps, self.threat, self.seed, self.suite, self.smallest)

    def _step(self, stage: Stage, classes: int) -> Step:
        if stage.member is None:
            return Step(stage.name, stage.kind)
        plain = settings(stage.member.attack)
        aimed = self.threat.goal is not None
        return Step(
            stage.name,
            stage.kind,
            stage.member.name,
            plain,
            (*few_classes(plain, classes, aimed=aimed), *_weighed(stage.member.against)),
            "".join(stage.earlier[:1]),
            stage.adaptive,
        )


def adaptive_members(constraint: Constraint) -> tuple[Member, ...]:
    """All that doubts, or a detector, may call for under a constraint."""
    return tuple(
        Member(arm.name, arm.attack, against=None if arm.weight is None else Against(arm.weight))
        for arm in arms(constraint)
    )


def fit_of(stage: str) -> str:
    """The name of the stage that an attack is learned in, by the name of its own."""
    return f"fit-{stage}"


FIXED = Member("PGD-40", PGD(steps=40, reach=2.5, loss=cross_entropy, schedule=flat, drop=False))
"""The pass that does not depend on the suite's order: every example, never dropped."""

FALSE_POSITIVES = (0.5, 0.05, 0.01)
"""Rates at which a detector is attacked, the lowest threshold first: what gets below it is below the others."""

AWARE = PGD(restarts=3)
"""What goes against network and detector at once."""

DETECTION = (
    Member("Oblivious", FIXED.attack, against=Against(0.0)),
    *(Member(f"Aware-{100 * rate:g}", AWARE, against=Against(EVEN, rate)) for rate in FALSE_POSITIVES),
    Member("Aware", AWARE, against=Against(EVEN)),
)
"""The passes on a model that rejects: of who knows of no detector, then at each threshold of who does."""

MATRIX = Member("Transfer", Transfer(reach=2.5, diversity=0.5, neighbours=0))
"""What makes the examples of the transfer matrix, and the changes that are carried across data sets."""


def labelled(attacks: Iterable[Attack]) -> tuple[Member, ...]:
    """Attacks named after their classes."""
    return tuple(Member(type(attack).__name__, attack) for attack in attacks)


def settings(attack: Attack) -> dict[str, Any]:
    """The settings of an attack as plain values: functions by their name, nested attacks by theirs."""
    plain: dict[str, Any] = {}
    for f in fields(attack):  # type: ignore[arg-type]
        value = getattr(attack, f.name)
        if isinstance(value, Attack):
            plain[f.name] = {"use": type(value).__name__, **settings(value)}
        else:
            plain[f.name] = value.__name__ if callable(value) else value
    return plain


def few_classes(plain: Mapping[str, Any], classes: int, *, aimed: bool) -> tuple[str, ...]:
    """What an attack of these settings does differently where there are few classes, in words."""
    targets = plain.get("targets") or 0
    needed, notes = 4 if targets or aimed else 3, []
    if plain.get("loss") == "dlr" and classes < needed:
        notes.append(f"DLR needs {needed} classes; with {classes} the margin is climbed instead")
    if targets >= classes:
        notes.append(f"{targets} targets were asked for; with {classes} classes there are {classes - 1}")
    return tuple(notes)


def _weighed(against: Against | None) -> tuple[str, ...]:
    """How much an attack makes of a detector, in words."""
    if against is None or not against.weight:
        return ()
    return (f"the detector's score weighs {against.weight:g} times what balances it with the classes",)


def refuse_unfitted(plan: Plan, *, fit: bool) -> None:
    """`UsageError` where an attack must be learned and cannot be, or where there is something to `fit` for none."""
    if fit and not any(isinstance(member.attack, Learned) for member in plan.members):
        raise UsageError(
            "there are examples to learn attacks on, and none of the attacks is learned; leave --fit out, or list one, "
            "as in attacks: [{use: AdversarialPatch}]"
        )
    for member in plan.members:
        if not isinstance(member.attack, Learned):
            continue
        if plan.smallest:
            raise UsageError(
                f"{member.name} is learned for one eps; give one, as in linf:0.2, or leave it out"
            )
        if plan.threat.queries is not None:
            raise UsageError(
                f"{member.name} is learned with as many queries as it takes, which no budget counts; "
                f"leave queries={plan.threat.queries} out, or leave it out"
            )
        if not fit:
            raise UsageError(
                f"{member.name} is learned first, on examples that are not judged; name some with --fit DATA "
                f"(in Python fit=…), or leave it out"
            )


def refuse_what_is_hidden(plan: Plan, target: Access, why: str = "") -> Plan:
    """The plan with the access that the target can give at most; `UsageError` if an attack needs more, saying `why`."""
    least: Access = min(plan.threat.access, target, key=ACCESS_ORDER.index)
    seen = replace(plan, threat=replace(plan.threat, access=least))
    seen = replace(seen, adaptive=tuple(m for m in plan.adaptive if seen.threat.gives(m.attack.needs)))
    for member in (*seen.members, *seen.curve):
        if isinstance(member.attack, Transfer) and not seen.threat.surrogates:
            way = "--surrogate MODEL, as often as you have one"
            raise UsageError(
                f"{member.name} makes its examples on surrogates, and there is none; name a model of the same classes "
                f"with {'surrogates=[net]' if plan.alone else way}"
            )
        if not seen.threat.gives(member.attack.needs):
            seeable = "nothing to be seen" if least == "none" else f"{least} only"
            limit = f"the threat model allows {seeable}"
            if not replace(plan.threat, access=target).gives(member.attack.needs):
                limit = f"the model gives {least} only{f' ({why})' if why else ''}"
            raise UsageError(
                f"{member.name} needs {member.attack.needs}, and {limit}; {_way_out(member, seen, target)}"
            )
    return seen


def _searched(threat: ThreatModel) -> bool:
    """Whether the suite `black-box` has an attack that needs no more than can be seen."""
    constraint = threat.constraint
    if isinstance(constraint, (Linf, L2)):
        return threat.gives("labels")
    bent = isinstance(constraint, Limited) and "flow" in constraint.limits
    return threat.gives("scores") and not bent and not isinstance(constraint, Patch)


def _suite(plan: Plan, name: str) -> str:
    """How a user names a suite: by a flag, or by the argument of `holdfast.attack` where that made the plan."""
    return f"attack={name!r}" if plan.alone else f"--suite {name}"


def _way_out(member: Member, plan: Plan, target: Access) -> str:
    """What helps where an attack needs more than the threat model of the plan and the target allow."""
    threat, ways = plan.threat, []
    hidden = [each for each in plan.members if not threat.gives(each.attack.needs)]
    if member not in hidden:
        ways.append("leave --curve out")
    elif len(hidden) < len(plan.members) and not plan.alone:
        ways.append(f"leave it out with {' '.join(f'--skip {slug(each.name)}' for each in hidden)}")
    if _searched(threat) and not plan.suite.startswith("black-box@"):
        searches = ", ".join(name for name, _ in suite("black-box", threat.constraint, threat.access).attacks)
        ways.append(f"choose {_suite(plan, 'black-box')} ({searches})")
    elif threat.access == "none" and not isinstance(threat.constraint, Transformations):
        ways.append(
            "give attack='transfer' and surrogates=[net]"
            if plan.alone
            else "choose --suite transfer, which makes its examples on a --surrogate MODEL"
        )
    if replace(threat, access=target).gives(member.attack.needs):
        ways.append(f"let the attacker see more, as in access={member.attack.needs}")
    norm = type(threat.constraint).__name__.lower()
    if threat.access == "labels" and isinstance(threat.constraint, (L1, L0)):
        ways.append(f"use linf or l2, because no attack under {norm} works with labels alone")
    return ", or ".join(ways) or f"there is no attack under {norm} that needs less; use linf or l2"
