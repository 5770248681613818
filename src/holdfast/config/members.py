"""Creates the list of named attacks of a run from settings or from Python arguments."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from holdfast.attacks.protocol import Attack
from holdfast.config.attacks import attack_class, build_attack, checked_attack
from holdfast.config.groups import SuiteSettings
from holdfast.config.settings import Certify
from holdfast.config.spellings import attack_listed, norms_of_suite
from holdfast.core.constraints import Constraint
from holdfast.core.errors import UsageError
from holdfast.harness import Member, members_of
from holdfast.suites import VARIANTS, variant

AttackLike = Attack | type[Attack] | str | Mapping[str, Any]
"""An attack, a class of attacks (for its default settings), a name, or a mapping such as `{"use": "pgd", "steps":
100}`."""

SuiteLike = AttackLike | Sequence[AttackLike]
"""The name of a suite, an attack, or a list of attacks."""

_EXPECTED = (
    "expected the name of a suite or of an attack, an attack such as holdfast.attacks.PGD(steps=100), or a list of "
    "attacks and their names"
)


def listed_members(settings: SuiteSettings | Certify, constraint: Constraint) -> tuple[Member, ...] | None:
    """Return the attacks that the settings list individually, or None if the settings name a whole suite or no attacks
    at all.
    """
    if settings.attacks is not None:
        return members_of(build_attack(spec, f"attacks.{k}") for k, spec in enumerate(settings.attacks))
    if isinstance(settings.suite, tuple):
        return tuple(_named(name, constraint) for name in settings.suite)
    return None


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
        norm = constraint.name
        raise UsageError(
            f"{name} is the name of {VARIANTS[name]} in suites under {', '.join(norms_of_suite(name))}, and the "
            f"threat is {norm}; choose such a threat, or name {VARIANTS[name]}"
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
