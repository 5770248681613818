"""Suites of attacks, with names and versions. Suites with equal names and versions contain the same attacks with the
same settings.

`fast` is Holdfast's default suite. Its order starts with the attacks that break the most examples for their cost. The
later attacks process the examples in waves, those nearest to being broken first, and stop after a wave in which they
break none (docs/decisions/0007). Under Linf, Square is run only if the last searches of Relay broke an example
(docs/decisions/0056). `quick` consists of its first attack, with other settings.

`standard` is the composition of AutoAttack standard (Croce & Hein, "Reliable evaluation of adversarial robustness with
an ensemble of diverse parameter-free attacks", ICML 2020, arXiv:2003.01690; for L1 "Mind the box", ICML 2021,
arXiv:2103.01208), and `rand` that of its version for randomised models, so that the numbers can be compared with
published ones. There is no AutoAttack for L0; there `standard` consists of projected gradient descent, PDPGD, SigmaZero
and Sparse-RS.

`black-box` uses only what the threat model allows: scores, or labels. `transfer` sends no queries to the target and
computes its examples on surrogates. `trees` is the default for tree ensembles, whose thresholds its first attack reads.
Under common corruptions, `fast` and `standard` are `corruptions`, the fifteen of Hendrycks & Dietterich.

The tables name the attacks and their settings, and do not import torch: names are checked before it is imported.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal, cast, get_args

from holdfast.core.catalogue import ATTACKS
from holdfast.core.errors import Remedy, UsageError
from holdfast.metrics.names import CORRUPTIONS
from holdfast.threats.parsing import Sees

if TYPE_CHECKING:
    from holdfast.attacks.protocol import Attack
    from holdfast.core.constraints import Constraint
    from holdfast.core.threat import Change
    from holdfast.core.types import Access

SuiteName = Literal[
    "quick", "fast", "standard", "rand", "black-box", "minimum-norm", "corruptions", "transfer", "trees"
]
Kind = Literal[
    "linf",
    "l2",
    "l1",
    "l0",
    "corruptions",
    "patch",
    "spatial",
    "colour",
    "flow",
    "text",
    "table",
    "trigger",
    "bytes",
]
"""What the attacker may change: the name of a constraint, or `flow` for images that are warped."""

LEAST: Final = 32
"""Smallest number of examples in a wave; from fewer examples, little can be concluded if none of them is broken."""
_FEW: Final = 8
"""The same for attacks under Linf, where the examples that break have the lowest margins (docs/decisions/0056)."""


@dataclass(frozen=True)
class AttackSpec:
    """An attack of a suite: its name there, the name of its class, and the settings that differ from the defaults."""

    name: str
    attack: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    waves: int = 0
    """number of halvings of the robust examples, for an attack that starts with those nearest to being broken"""
    least: int = LEAST
    """smallest number of examples in a wave"""
    after: str = ""
    """name of an earlier attack of the suite: this attack is run only if that one broke an example. Empty for none"""
    surrogate: str = ""
    """loss of another task than classes that the attack maximises; empty for the first one of the task"""

    def build(self) -> "Attack":
        """Return the attack."""
        from holdfast import attacks
        from holdfast.attacks.parts import losses

        settings = {
            name: getattr(losses, value) if name == "loss" else value for name, value in self.settings.items()
        }
        built: Attack = getattr(attacks, self.attack)(**settings)
        return built


Specs = tuple[AttackSpec, ...]


@dataclass(frozen=True)
class Suite:
    """A list of attacks with a name and a version. The attacks are run in the order of the list."""

    name: str
    version: int
    specs: Specs
    smallest: bool = False
    """whether the suite searches for the smallest change of every example, instead of any change within eps"""

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def attacks(self) -> tuple[tuple[str, "Attack"], ...]:
        """Name in the suite and attack, for each attack."""
        return tuple((spec.name, spec.build()) for spec in self.specs)


def _spec(
    name: str, attack: str = "", *, waves: int = 0, least: int = LEAST, after: str = "", **settings: Any
) -> AttackSpec:
    return AttackSpec(name, attack or name, MappingProxyType(settings), waves, least, after)


def _pgd(steps: int, restarts: int) -> AttackSpec:
    """PGD with the settings of `holdfast.attacks.pgd.margin_pgd`."""
    return _spec("PGD", steps=steps, reach=20.0, restarts=restarts, loss="margin_loss")


def _apgd_t(*, waves: int = 0, least: int = LEAST, **settings: Any) -> AttackSpec:
    return _spec("APGD-T", "APGD", waves=waves, least=least, loss="dlr", **settings)


def _relay(name: str, *, waves: int, searches: int, rounds: int) -> AttackSpec:
    return _spec(
        name,
        "Relay",
        waves=waves,
        least=_FEW,
        restarts=1,
        targets=3,
        searches=searches,
        rounds=rounds,
        queries=150,
    )


def _last(*, least: int = LEAST, after: str = "") -> Specs:
    return (
        _spec("Square", waves=5, least=least, after=after, queries=500),
        _apgd_t(waves=5, least=least, steps=50, targets=3),
    )


PUBLISHED: Final[Specs] = (
    _spec("MI-FGSM", "Transfer", reach=1, neighbours=0),
    _spec("NI-FGSM", "Transfer", reach=1, neighbours=0, ahead=True),
    _spec("DI-FGSM", "Transfer", reach=1, diversity=0.5, neighbours=0, momentum=0),
    _spec("TI-FGSM", "Transfer", reach=1, shifts=7, neighbours=0, momentum=0),
    _spec("SI-NI-FGSM", "Transfer", reach=1, neighbours=0, ahead=True, halvings=4),
    _spec("VMI-FGSM", "Transfer", reach=1, neighbours=5, around=1.5),
)
"""`Transfer` with the settings of published attacks, except that VMI has 5 neighbours and its paper 20."""

_TRANSFER = (_spec("Transfer"), *PUBLISHED)
_CORRUPTIONS = tuple(AttackSpec(name, "Corruption", {"name": name}) for name in CORRUPTIONS)
_SQUARE = _spec("Square", queries=5000)
_SPARSE_RS = _spec("SparseRS", queries=5000)
_PATCHES = (_spec("PatchAttack", places=50), _pgd(100, 2))
_WHOLE_IMAGE = (_spec("TransformPGD"), _spec("GridSearch"))
# a few short gradient runs: in `quick`, two from random starts and two towards the nearest classes. `fast` uses one
# random start, and under L2 and L1 no target class, because more attacks follow and targeted runs break nothing that
# later attacks do not break (docs/decisions/0007)
_SPRINT = _spec("Sprint", "Relay", searches=0, rounds=0)
_SHORT_SPRINT = _spec("Sprint", "Relay", searches=0, rounds=0, restarts=1, targets=0)
# 60 % beyond the plane breaks more than 5 %, and patience ends runs that would stay outside the ball
_PLANES = _spec("FAB-T", "FAB", waves=4, steps=60, targets=5, eta=1.6, patience=10, refine=20)
# a first step of twice the length breaks other examples than the default one
_WIDER = _spec("ALMA-2", "ALMA", waves=3, steps=60, reach=4, refine=20)
_WINDOWS = _spec("Relay", waves=5, restarts=0, targets=0, searches=2, rounds=0, queries=100)
_TEXTS = (_spec("TextSearch"),)
_BYTES = (_spec("ByteSearch"),)
_TRIGGER = (_spec("TriggerStamp"),)
_TABLE_SCORES = (_spec("ColumnSearch"), _spec("GeneticSearch"))
_RAND = (
    _spec("APGD-CE", "APGD", loss="cross_entropy", steps=100, draws=20),
    _spec("APGD-DLR", "APGD", loss="dlr", steps=100, draws=20),
)


def _standard(*, sparse: bool) -> Specs:
    return (
        _spec("APGD-CE", "APGD", loss="cross_entropy", steps=100, restarts=5 if sparse else 1, shrink=sparse),
        _apgd_t(steps=100, targets=5 if sparse else 9, shrink=sparse),
        _spec("FAB-T", "FAB", steps=100, targets=9),
        _spec("Square", queries=5000, scale_schedule=False),
    )


SUITES: Final[Mapping[SuiteName, Mapping[Kind, Specs]]] = {
    "quick": {
        **dict.fromkeys(("linf", "l2", "l1"), (_SPRINT,)),
        "l0": (_pgd(50, 2),),
        "patch": (_spec("PatchAttack", places=8),),
        **dict.fromkeys(("spatial", "colour"), (_spec("TransformPGD"),)),
        "flow": (_spec("Flow", restarts=2),),
        "text": (_spec("TextSearch", beam=1, queries=500),),
        "bytes": (_spec("ByteSearch", queries=300),),
        "table": (_spec("CAPGD", steps=30, restarts=2),),
        "trigger": _TRIGGER,
    },
    "fast": {
        "linf": (
            _spec("Sprint", "Relay", searches=0, rounds=0, restarts=1),
            _spec("FMN", waves=4, steps=60),
            # two Relays, the second on the margins that the first has lowered, break more than one of twice the length
            _relay("Relay", waves=5, searches=2, rounds=2),
            _relay("Relay-2", waves=4, searches=3, rounds=3),
            *_last(least=_FEW, after="Relay-2"),
        ),
        "l2": (
            _SHORT_SPRINT,
            _spec("ALMA", waves=3, steps=60, refine=20),
            _PLANES,
            _WIDER,
            _spec("PDPGD", waves=4, steps=50, refine=20),
            # steps of 30 % beyond the plane break examples that those of 60 % miss
            _spec("FAB-T-2", "FAB", waves=4, steps=45, targets=4, eta=1.3, patience=15, refine=20),
            _WINDOWS,
            *_last(),
        ),
        "l1": (
            _SHORT_SPRINT,
            _spec("PDPGD", waves=4, steps=100, refine=20),
            _PLANES,
            _WIDER,
            _WINDOWS,
            _spec("Square", waves=5, queries=1000),
            _apgd_t(waves=5, steps=100, targets=3),
        ),
        "l0": (_pgd(100, 2), _spec("SparseRS", waves=4, queries=5000)),
        "corruptions": _CORRUPTIONS,
        "patch": _PATCHES,
        **dict.fromkeys(("spatial", "colour"), _WHOLE_IMAGE),
        "flow": (_spec("Flow"),),
        "text": _TEXTS,
        "bytes": _BYTES,
        "table": (_spec("CAPGD"), *_TABLE_SCORES),
        "trigger": _TRIGGER,
    },
    "standard": {
        **dict.fromkeys(("linf", "l2"), _standard(sparse=False)),
        "l1": _standard(sparse=True),
        "l0": (
            _pgd(100, 5),
            _spec("PGD-CE", "PGD", steps=100, reach=20.0, restarts=2, loss="cross_entropy"),
            _spec("PDPGD", steps=100),
            _spec("SigmaZero", steps=100),
            _SPARSE_RS,
        ),
        "corruptions": _CORRUPTIONS,
        "patch": _PATCHES,
        **dict.fromkeys(("spatial", "colour"), _WHOLE_IMAGE),
        "flow": (_spec("Flow"),),
        "text": _TEXTS,
        "bytes": _BYTES,
        "table": (
            _spec("CAPGD", steps=100, restarts=8),
            _spec("ColumnSearch", columns=60, queries=30000),
            _spec("GeneticSearch", population=60, generations=160),
        ),
        "trigger": _TRIGGER,
    },
    "rand": dict.fromkeys(("linf", "l2", "l1", "l0"), _RAND),
    "black-box": {
        **dict.fromkeys(("linf", "l2", "l1"), (_SQUARE,)),
        "l0": (_SPARSE_RS,),
        **dict.fromkeys(("spatial", "colour"), (_spec("GridSearch"),)),
        "text": _TEXTS,
        "bytes": _BYTES,
        "table": _TABLE_SCORES,
        "trigger": _TRIGGER,
    },
    "minimum-norm": {
        "linf": (_spec("DeepFool"), _spec("FMN", steps=100)),
        "l2": (_spec("DeepFool"), _spec("ALMA", steps=100), _spec("PDPGD", steps=100)),
        "l1": (_spec("ALMA", steps=100), _spec("PDPGD", steps=200)),
        "l0": (_spec("PDPGD", steps=100), _spec("SigmaZero", steps=200)),
    },
    "corruptions": {"corruptions": _CORRUPTIONS},
    "transfer": dict.fromkeys(("linf", "l2", "l1", "l0", "patch"), _TRANSFER),
    "trees": {"linf": (_spec("Thresholds"), _SQUARE)},
}
"""The attacks of each suite, by what the attacker may change."""

_VERSIONS: Final[Mapping[SuiteName, int]] = {"fast": 2}
"""The versions of the suites that have changed; that of the others is 1."""

LABELS_ONLY: Final[Mapping[Kind, Specs]] = {
    "linf": (_spec("RayS", queries=5000),),
    "l2": (_spec("HopSkipJump", queries=5000), _spec("SurFree", queries=5000)),
}
"""The attacks of the suite `black-box` for an attacker who gets only the predicted labels."""

_CURVE: Final[Mapping[Kind, AttackSpec]] = {
    "linf": _spec("FMN", steps=100),
    "l2": _spec("ALMA", steps=100),
}

_ON_HELD_OUT: Final[Mapping[Kind, AttackSpec]] = {
    "text": _spec("TextSearch", queries=32),  # since a search for one text takes milliseconds
    "trigger": _spec("TriggerStamp"),
}

_FIRST: tuple[SuiteName, ...] = (
    "standard", "quick", "fast", "rand", "minimum-norm", "corruptions", "transfer", "black-box", "trees"
)  # fmt: skip
"""Names of suites, in the order in which `variant` searches them for the name of an attack."""


def _all_specs() -> Iterator[AttackSpec]:
    for name in _FIRST:
        for specs in SUITES[name].values():
            yield from specs


VARIANTS: Final[Mapping[str, str]] = {
    spec.name: spec.attack for spec in _all_specs() if spec.name != spec.attack
}
"""Names of attacks with certain settings in suites and tables, with the names of these attacks."""


def attacks_of(name: SuiteName, kind: Kind, access: "Access" = "gradients") -> Specs:
    """Return the attacks of a suite, or an empty tuple if it has none for what the attacker may change."""
    if name == "black-box" and access == "labels" and kind in ("linf", "l2", "l1", "l0"):
        return LABELS_ONLY.get(kind, ())
    return SUITES[name].get(kind, ())


def is_possible(name: SuiteName, constraint: "Constraint | Change", access: "Access") -> bool:
    """Return whether a suite has an attack under a constraint that needs no more than the access of the attacker."""
    order, specs = get_args(Sees), attacks_of(name, kind_of_change(constraint), access)
    return any(order.index(ATTACKS[spec.attack].needs) <= order.index(access) for spec in specs)


def attack_on_held_out(constraint: "Constraint") -> "Attack":
    """Return the attack for held-out accuracy, by which the checkpoint of most recipes is chosen. It has more steps and
    another loss than in training.
    """
    return _ON_HELD_OUT.get(kind_of_change(constraint), _pgd(20, 1)).build()


def suite(name: str, constraint: "Constraint", access: "Access" = "gradients") -> Suite:
    """Return the suite of attacks called `name` for a constraint, such as a ball of a norm. Raises `UsageError` if
    there is no such suite for this constraint.

    If `access` is "labels", `black-box` consists of attacks that need only labels.
    """
    if name not in SUITES:
        raise UsageError(f"there is no suite {name!r}; expected one of {', '.join(SUITES)}")
    known, kind = cast("SuiteName", name), kind_of_change(constraint)
    found = attacks_of(known, kind, access)
    if not found:
        raise _no_suite(known, kind, constraint)
    # under corruptions, `fast` and `standard` are the suite `corruptions`
    chosen: SuiteName = "corruptions" if kind == "corruptions" else known
    return Suite(chosen, _VERSIONS.get(chosen, 1), found, known == "minimum-norm")


def suite_of_task(
    name: str, surrogates: Sequence[str], constraint: "Constraint", access: "Access" = "gradients"
) -> Suite:
    """Return the suite called `name` for a model with another task than classes, which has an attack for each of the
    losses `surrogates`. Raises `UsageError` if there is no such suite for this constraint.

    In balls of norms, `quick`, `fast` and `standard` consist of APGD, with 20, 75 and 150 steps for each loss;
    `standard` adds Square. Patches on or beside objects are optimised by PatchAttack. Otherwise the attacks are those
    of the suite for classes, each with the first loss.
    """
    steps = {"quick": 20, "fast": 75, "standard": 150}.get(name)
    if steps is not None and constraint.limits.get("at") in ("on", "beside"):
        return Suite(name, 1, (_spec("PatchAttack", places=2 if name == "quick" else 5, steps=steps),))
    if steps is None or kind_of_change(constraint) not in ("linf", "l2", "l1"):
        return suite(name, constraint, access)
    specs = tuple(
        replace(_spec(f"APGD {loss}", "APGD", steps=steps, loss="margin_loss"), surrogate=loss)
        for loss in surrogates
    )
    return Suite(name, 1, specs + ((_spec("Square", queries=1000),) if name == "standard" else ()))


def kind_of_change(change: "Constraint | Change") -> Kind:
    """Return what the attacker may change under a constraint."""
    return "flow" if "flow" in change.limits else cast("Kind", _BALL_OF.get(change.name, change.name))


_BALL_OF: Final[Mapping[str, Kind]] = {"snr": "l2", "peak": "linf"}
"""Balls in which attacks search under constraints that have other coordinates."""


def _no_suite(name: SuiteName, kind: Kind, constraint: "Constraint") -> UsageError:
    """The error for a suite without attacks on what the attacker may change."""
    if kind == "corruptions":
        return UsageError(f"there is no suite {name!r} of common corruptions", Remedy("suite", "corruptions"))
    if name == "corruptions" and kind in ("linf", "l2", "l1", "l0"):
        return UsageError(
            f"the suite corruptions has no attack under {kind}", Remedy("threat", "corruptions:3")
        )
    if name == "black-box" and kind in ("l1", "l0"):
        return UsageError(
            f"the suite 'black-box' has no attack under {kind} that needs only labels; use linf or l2"
        )
    if kind in ("text", "table", "bytes"):
        others = sorted(other for other, by_kind in SUITES.items() if kind in by_kind)
        inputs = {"text": "texts", "table": "tables", "bytes": "files"}[kind]
        return UsageError(
            f"the suite {name} has no attack on {inputs}; expected one of {', '.join(others)}",
            Remedy("suite", "fast"),
        )
    if name == "trees":
        return UsageError(f"the suite 'trees' has no attack under {kind}", Remedy("threat", "linf:8/255"))
    if name == "transfer":
        return UsageError(
            f"under {constraint} whole images are transformed, and no attack uses a surrogate; give the attacker "
            "access to the model, as in access=gradients",
            Remedy("threat", "linf:8/255"),
        )
    others = sorted(other for other, by_kind in SUITES.items() if kind in by_kind)
    return UsageError(f"there is no suite {name!r} under {constraint}; expected one of {', '.join(others)}")


def variant(name: str, constraint: "Constraint") -> "Attack | None":
    """Return the attack that suites for a constraint list under `name`, with its settings, or None if no suite does.

    If several suites use the name for attacks with different settings, the first of `standard`, `quick`, `fast`,
    `rand`, `minimum-norm`, `corruptions`, `transfer`, `black-box` and `trees` decides.
    """
    kind = kind_of_change(constraint)
    found = (spec for suite_name in _FIRST for spec in SUITES[suite_name].get(kind, ()) if spec.name == name)
    first = next(found, None)
    return None if first is None else first.build()


def curve(constraint: "Constraint") -> tuple[str, "Attack"]:
    """Return the minimum-norm attack that is used to compute robust accuracy as a function of eps under a constraint,
    with its name.
    """
    spec = _CURVE.get(kind_of_change(constraint), _spec("PDPGD", steps=100))
    return spec.name, spec.build()
