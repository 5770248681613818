"""The default suite, and a check of the names in `--only` and `--skip`.

The module does not import torch, so that a misspelt name is reported immediately.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from holdfast.attacks.suites import VARIANTS, SuiteName, attacks_of, kind_of_change
from holdfast.core.catalogue import ATTACKS
from holdfast.core.errors import UsageError
from holdfast.core.names import slug
from holdfast.core.remedies import Remedy
from holdfast.settings.grammar import Sees, ThreatSpec, parse_threat
from holdfast.settings.naming import chosen

DEFAULT_SUITE: SuiteName = "fast"


def usual_suite(threat: ThreatSpec, *, trees: bool = False) -> SuiteName:
    """Return the suite that is used under a threat model if the user gives neither a suite nor attacks.

    It is `trees` for a model with readable `trees`. Otherwise it depends on the access of the attacker: `transfer` for
    no access, `black-box` for scores or labels, and otherwise `fast`.
    """
    if threat.norm in ("corruptions", "trigger") or threat.access == "gradients":
        return DEFAULT_SUITE
    if trees and names_in_suite("trees", threat):
        return "trees"
    if threat.access == "none":
        return "transfer"
    return "black-box" if names_in_suite("black-box", threat) else DEFAULT_SUITE


def names_in_suite(suite: SuiteName, threat: ThreatSpec) -> tuple[str, ...]:
    """Return the names of the attacks of a suite under a threat model, or an empty tuple if it has none."""
    return tuple(
        spec.name for spec in attacks_of(suite, kind_of_change(threat.norm, threat.arguments), threat.access)
    )


def refuse_unknown(
    suite: SuiteName | tuple[str, ...] | None,
    attacks: Sequence[Mapping[str, Any]] | None,
    threat: str,
    only: Sequence[str],
    skip: Sequence[str],
) -> None:
    """Raise `UsageError` if the options `only` and `skip` contain names that are not attacks of the suite.

    Names that are known only after an import of torch are not checked.
    """
    spec: ThreatSpec | None = None
    if isinstance(suite, tuple):
        names = suite
    elif attacks is not None:
        names = tuple(str(attack.get("use")) for attack in attacks)
    else:
        spec = parse_threat(threat)
        names = names_in_suite(suite or usual_suite(spec), spec)
    if not names or not set(names) <= {*ATTACKS, *VARIANTS}:
        return
    try:
        chosen(names, only, skip)
    except UsageError:
        if suite is not None or spec is None or not _of_black_box(spec, (*only, *skip)):
            raise


def refuse_uncertifiable(threat: str) -> None:
    """Raise `UsageError` for a threat model under which robustness is not proved: without a norm and a positive eps or
    rules of a table, or with a target class.
    """
    spec = parse_threat(threat)
    if spec.norm == "text" and "inserts" in spec.arguments:
        raise UsageError(
            f"the threat {threat} appends words, and robustness is proved for changes of the words of a text, whose "
            "number stays the same; give edits and words, or synonyms and a file"
        )
    if spec.norm not in ("linf", "l2", "l1", "table", "text", "training-set"):
        raise UsageError(
            f"the threat is {threat}, and robustness is proved under linf, l2, l1, table, text and training-set only",
            Remedy("threat", spec.with_change("linf:0.1")),
        )
    if spec.eps == float("inf"):
        raise UsageError(
            f"the threat {threat} has no eps, which is to be proved",
            Remedy("threat", spec.with_change(f"{spec.norm}:0.1")),
        )
    if spec.eps == 0:
        raise UsageError(
            f"the threat is {threat}, and under eps 0 there is nothing to prove",
            Remedy("threat", spec.with_change(f"{spec.norm}:0.1")),
        )
    if spec.goal is not None or spec.goal_name:
        goal = spec.goal_name or spec.goal
        raise UsageError(
            f"the threat is {threat}, and a proof is about every wrong class; leave goal=targeted:{goal} out"
        )


def _of_black_box(threat: ThreatSpec, names: Sequence[str]) -> bool:
    """Whether all names are attacks of `black-box` or `trees`, the default suites for models without gradients."""
    accesses: tuple[Sees, ...] = ("scores", "labels")
    accepted = {
        slug(name)
        for access in accesses
        for name in names_in_suite("black-box", replace(threat, access=access))
    }
    return {slug(name) for name in names} <= accepted | set(map(slug, names_in_suite("trees", threat)))
