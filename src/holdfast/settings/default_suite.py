"""The default suite, and a check of the names in `--only` and `--skip`.

The module does not import torch, so that a misspelt name is reported immediately.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.attacks.suites import VARIANTS, SuiteName, attacks_of, is_possible, kind_of_change
from holdfast.core.catalogue import ATTACKS
from holdfast.core.errors import UsageError
from holdfast.core.names import slug
from holdfast.core.remedies import Remedy
from holdfast.core.threat import ThreatModel
from holdfast.settings.naming import chosen
from holdfast.threats.parsing import FORMS, Sees

DEFAULT_SUITE: SuiteName = "fast"


def usual_suite(threat: ThreatModel, *, trees: bool = False) -> SuiteName:
    """Return the suite that is used under a threat model if the user gives neither a suite nor attacks.

    It is `trees` for a model with readable `trees`. Otherwise it depends on the access of the attacker: `transfer` for
    no access, `black-box` for scores or labels, and otherwise `fast`.
    """
    if threat.access == "gradients" or is_possible(DEFAULT_SUITE, threat.change, "none"):
        return DEFAULT_SUITE
    if trees and names_in_suite("trees", threat):
        return "trees"
    if threat.access == "none":
        return "transfer"
    return "black-box" if names_in_suite("black-box", threat) else DEFAULT_SUITE


def names_in_suite(suite: SuiteName, threat: ThreatModel) -> tuple[str, ...]:
    """Return the names of the attacks of a suite under a threat model, or an empty tuple if it has none."""
    return tuple(spec.name for spec in attacks_of(suite, kind_of_change(threat.change), threat.access))


def refuse_unknown(
    suite: SuiteName | tuple[str, ...] | None,
    attacks: Sequence[Mapping[str, Any]] | None,
    threat: ThreatModel,
    only: Sequence[str],
    skip: Sequence[str],
) -> None:
    """Raise `UsageError` if the options `only` and `skip` contain names that are not attacks of the suite.

    Names that are known only after an import of torch are not checked.
    """
    if isinstance(suite, tuple):
        names = suite
    elif attacks is not None:
        names = tuple(str(attack.get("use")) for attack in attacks)
    else:
        names = names_in_suite(suite or usual_suite(threat), threat)
    if not names or not set(names) <= {*ATTACKS, *VARIANTS}:
        return
    try:
        chosen(names, only, skip)
    except UsageError:
        usual = suite is None and attacks is None
        if not usual or not _of_black_box(threat, (*only, *skip)):
            raise


def refuse_uncertifiable(threat: ThreatModel) -> None:
    """Raise `UsageError` for a threat model under which robustness is not proved: without a norm and a positive eps or
    rules of a table, or with a target class.
    """
    name = threat.name
    if "inserts" in threat.change.limits:
        raise UsageError(
            f"the threat {threat} appends words, and robustness is proved for changes of the words of a text, whose "
            "number stays the same; give edits and words, or synonyms and a file"
        )
    if not FORMS[name].provable:
        *provable, last = (name for name, form in FORMS.items() if form.provable)
        raise UsageError(
            f"the threat is {threat}, and robustness is proved under {', '.join(provable)} and {last} only",
            Remedy("threat", threat.with_change("linf:0.1")),
        )
    if threat.eps == float("inf"):
        raise UsageError(
            f"the threat {threat} has no eps, which is to be proved",
            Remedy("threat", threat.with_change(f"{name}:0.1")),
        )
    if threat.eps == 0:
        raise UsageError(
            f"the threat is {threat}, and under eps 0 there is nothing to prove",
            Remedy("threat", threat.with_change(f"{name}:0.1")),
        )
    if threat.goal is not None or threat.goal_name:
        goal = threat.goal_name or threat.goal
        raise UsageError(
            f"the threat is {threat}, and a proof is about every wrong class; leave goal=targeted:{goal} out"
        )


def _of_black_box(threat: ThreatModel, names: Sequence[str]) -> bool:
    """Whether all names are attacks of `black-box` or `trees`, the default suites for models without gradients."""
    accesses: tuple[Sees, ...] = ("scores", "labels")
    accepted = {
        slug(name)
        for access in accesses
        for name in names_in_suite("black-box", ThreatModel(threat.change, access=access))
    }
    return {slug(name) for name in names} <= accepted | set(map(slug, names_in_suite("trees", threat)))
