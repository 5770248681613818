"""All names of attacks and suites, including short names, with the canonical name of each. The module does not import
torch.

Case, `-`, `_` and spaces are ignored: `hop-skip-jump` is HopSkipJump.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from holdfast.attacks.suites import SUITES, VARIANTS, Kind, Specs, SuiteName
from holdfast.core.catalogue import ATTACKS, names
from holdfast.core.errors import UsageError
from holdfast.core.remedies import Remedy
from holdfast.core.spelling import did_you_mean, suggestion


@dataclass(frozen=True)
class Spelling:
    """Names of an attack in addition to its canonical name, such as short names."""

    paper: str
    """name in the paper; empty if it is the same or if another attack has this name here"""
    short: tuple[str, ...] = ()
    """usual short names of the attack"""

    def __str__(self) -> str:
        return ", ".join(name for name in (self.paper, *self.short) if name)


SPELLINGS: Final[Mapping[str, Spelling]] = {
    **{
        entry.name: Spelling(entry.paper, entry.short)
        for entry in ATTACKS.values()
        if entry.paper or entry.short
    },
    "DI-FGSM": Spelling("DI2-FGSM"),
}
"""Further names of attacks, by the canonical name."""

SUITE_SPELLINGS: Final[Mapping[SuiteName, tuple[str, ...]]] = {
    "standard": ("autoattack", "aa"),
    "rand": ("autoattack-rand", "aa-rand"),
}
"""Usual names of suites in other software, by the canonical name."""

ADAPTIVE: Final = (
    "Pair", "Pair-light", "Pair-heavy", "EOT", "BPDA", "BPDA-T", "BPDA-ALMA", "BPDA-FAB", "Search",
    "AdaptiveSearch",
)  # fmt: skip
"""Names of the attacks that the setting `adaptive` adds depending on the doubts. A test compares them with `doubts`."""


def folded(name: str) -> str:
    """Return a name in the form in which names are compared: lower case, without `-`, `_` and spaces.

    >>> folded("Hop-Skip_Jump")
    'hopskipjump'
    """
    return "".join(letter for letter in name.casefold() if letter not in "-_ ")


def suite_called(name: str) -> SuiteName | None:
    """Return the canonical name of the suite that has `name` as one of its names, or None if there is no such suite."""
    return _suites().get(folded(name))


def is_suite_only(name: str) -> bool:
    """Return whether a name is the name of a suite and not that of an attack."""
    return suite_called(name) is not None and folded(name) not in _attacks()


def attack_called(name: str) -> str:
    """Return the canonical name of the attack, or of the variant of an attack in a suite, that has `name` as one of its
    names.

    Raises `UsageError` with the most similar name if there is none.
    """
    canonical = _attacks()
    known_name = canonical.get(folded(name))
    if known_name is not None:
        return known_name
    if folded(name) in map(folded, ADAPTIVE):
        raise UsageError(
            f"{name} is an attack that is added depending on the raised doubts, and it cannot be named directly",
            Remedy("adaptive", True, function="assess", reason="instead"),
        )
    similar = suggestion(name, every_name())
    raise UsageError(
        f"there is no attack {name!r}{f'; {similar}' if similar else did_you_mean(name, _canonical_names())}"
    )


def attack_class_called(name: str) -> str:
    """Return the canonical name of an attack whose settings can be changed. Raises `UsageError` for a variant of an
    attack in a suite, whose settings are fixed.
    """
    canonical = attack_called(name)
    if canonical in VARIANTS:
        of = VARIANTS[canonical]
        raise UsageError(
            f"{canonical} is the name of {of} with certain settings in suites; name {of} to give settings (see "
            f"holdfast attacks {of}), or name {canonical} without settings, as in suite: [{canonical}]"
        )
    return canonical


def suite_or_attacks(names: Iterable[str]) -> str | tuple[str, ...]:
    """Return the canonical name of the suite if `names` consists of one suite; otherwise return the canonical names of
    the attacks in `names`.

    Raises `UsageError` for an unknown name, and for a suite together with other names.
    """
    listed = [name.strip() for part in names for name in part.split(",") if name.strip()]
    if not listed:
        raise UsageError("suite is empty; expected a suite, as in fast, or attacks, as in pgd,square")
    if len(listed) == 1:
        (only_name,) = listed
        suite = suite_called(only_name)
        if (
            suite is None
            and folded(only_name) not in _attacks()
            and folded(only_name) not in map(folded, ADAPTIVE)
        ):
            similar = suggestion(only_name, (*SUITES, *_canonical_names()))
            expected = (
                f"expected one of the suites {', '.join(SUITES)}, or an attack that holdfast attacks lists"
            )
            raise UsageError(f"suite is {only_name!r}; {similar or expected}")
        return suite or (attack_called(only_name),)
    return tuple(attack_listed(name) for name in listed)


def attack_listed(name: str) -> str:
    """Return the canonical name of one attack in a list of attacks. Raises `UsageError` if the name is
    that of a suite.
    """
    if is_suite_only(name):
        raise UsageError(
            f"{name} is a suite, which cannot be combined with other names; leave them out, or list attacks, as in "
            f"pgd,square"
        )
    return attack_called(name)


def norms_of_suite(name: str) -> tuple[Kind, ...]:
    """Return the kinds of changes under which at least one suite contains the attack `name`."""
    norms = (kind for by_kind in SUITES.values() for kind, specs in by_kind.items() if name in _names(specs))
    return tuple(dict.fromkeys(norms))


def suites_of(name: str) -> tuple[str, ...]:
    """Return the names of the suites that contain the attack `name` under at least one norm."""
    return tuple(
        s for s, by_kind in SUITES.items() if any(name in _names(specs) for specs in by_kind.values())
    )


def _names(specs: Specs) -> list[str]:
    return [spec.name for spec in specs]


def every_name() -> tuple[str, ...]:
    """Return all names that the setting `suite` accepts, for shell completion: suites, attacks, variants of attacks,
    and short names.
    """
    short = (
        s
        for forms in (*SUITE_SPELLINGS.values(), *(spelling.short for spelling in SPELLINGS.values()))
        for s in forms
    )
    return tuple(dict.fromkeys((*SUITES, *_canonical_names(), *short)))


def _canonical_names() -> list[str]:
    return [*names("attacks"), *VARIANTS]


def _attacks() -> dict[str, str]:
    """Canonical names by all folded names. Holdfast's names take precedence over those of other packages."""
    bundled = {folded(name): name for name in (*ATTACKS, *VARIANTS)}
    short = {folded(form): name for name, spelling in SPELLINGS.items() for form in spelling.short}
    papers = {folded(spelling.paper): name for name, spelling in SPELLINGS.items() if spelling.paper}
    added = {folded(name): name for name in names("attacks")}
    return {**added, **papers, **short, **bundled}


def _suites() -> dict[str, SuiteName]:
    short = {folded(form): name for name, forms in SUITE_SPELLINGS.items() for form in forms}
    return {**short, **{folded(name): name for name in SUITES}}
