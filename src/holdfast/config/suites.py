"""The names of the suites, the default one, and whether the attacks that `--only` and `--skip` name are in a suite.

Torch-free, so that a misspelt name is answered at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from holdfast.config.grammar import Sees, ThreatSpec, parse_threat
from holdfast.config.naming import ATTACKS, VARIANTS, chosen, members
from holdfast.core.errors import UsageError
from holdfast.core.names import slug

SuiteName = Literal[
    "quick", "fast", "standard", "rand", "black-box", "minimum-norm", "corruptions", "transfer"
]
SUITES: tuple[SuiteName, ...] = get_args(SuiteName)
"""What `--suite` takes; `holdfast.suites` composes them, and a test keeps the two in step."""
DEFAULT_SUITE: SuiteName = "fast"


def usual_suite(threat: ThreatSpec) -> SuiteName:
    """What is run where neither a suite nor attacks are named, by what the attacker sees of the model.

    That is `transfer` where the attacker sees nothing, `black-box` where scores or labels, and else `fast`.
    """
    if threat.norm == "corruptions" or threat.access == "gradients":
        return DEFAULT_SUITE
    if threat.access == "none":
        return "transfer"
    return "black-box" if members("black-box", threat) else DEFAULT_SUITE


def refuse_unknown(
    suite: SuiteName | tuple[str, ...] | None,
    attacks: Sequence[Mapping[str, Any]] | None,
    threat: str,
    only: Sequence[str],
    skip: Sequence[str],
) -> None:
    """Refuse what `only` and `skip` name as the run would, where the names are known without torch."""
    listed = suite if isinstance(suite, tuple) else None
    spec = parse_threat(threat) if attacks is None and listed is None else None
    if listed is not None:
        names = listed
    elif spec is None:
        names = tuple(str(attack.get("use")) for attack in attacks or ())
    else:
        names = members(str(suite or usual_suite(spec)), spec)
    if not names or not set(names) <= {*ATTACKS, *VARIANTS}:
        return
    try:
        chosen(names, only, skip)
    except UsageError:
        if suite is not None or spec is None or not _of_black_box(spec, (*only, *skip)):
            raise


def _of_black_box(threat: ThreatSpec, names: Sequence[str]) -> bool:
    """Whether all names are of attacks of `black-box`, the default suite where the model gives no gradients."""
    seen: tuple[Sees, ...] = ("scores", "labels")
    known = {slug(name) for each in seen for name in members("black-box", replace(threat, access=each))}
    return {slug(name) for name in names} <= known
