"""Text forms of attack names, threats and untrusted strings. The module does not import torch, so that messages appear
fast.
"""

import re
from collections.abc import Mapping

from holdfast.core.errors import UsageError

MOST_SCALED = 0.9
"""largest fraction by which an image may grow or shrink; with 1 it could shrink to nothing"""

_CI_COMMAND = re.compile(r"::(?=[A-Za-z][A-Za-z-]*(\s.*?)?::)")
_CI_MARK = re.compile(r"##(?=[A-Za-z]*\[)")


def slug(name: str) -> str:
    """Return a name in lower-case letters, digits and hyphens: `APGD-CE (large eps)` becomes `apgd-ce-large-eps`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def suite_name(suite: str) -> str:
    """Return the name of a suite without its version: `rand` for `rand@1`, and for `rand@1 without APGD-CE`."""
    return suite.partition("@")[0]


def threat_text(change: str, goal: int | None, access: str, queries: int | None) -> str:
    """Return the threat as a command line argument. `change` is its constraint, such as `linf:0.1`; default values are
    omitted.
    """
    aim = "" if goal is None else f",goal=targeted:{goal}"
    seen = "" if access == "gradients" else f",access={access}"
    spent = "" if queries is None else f",queries={queries}"
    return f"{change}{aim}{seen}{spent}"


def limits_text(kind: str, limits: Mapping[str, float | str]) -> str:
    """Return a constraint as text, such as `spatial:rotate=30,shift=3` or `patch:8x8,at=centre,jitter=3`."""
    words = [f"{name}={far if isinstance(far, str) else f'{far:.6g}'}" for name, far in limits.items()]
    if kind == "patch":
        words[:2] = [f"{limits['height']}x{limits['width']}"]
        words = [word for word in words if word not in ("at=anywhere", "jitter=0")]
    return f"{kind}:{','.join(words)}"


def refuse_mixed(limits: Mapping[str, float | str]) -> None:
    """Raise `UsageError` if `flow` is combined with other spatial limits."""
    if "flow" in limits and len(limits) > 1:
        raise UsageError(
            f"{limits_text('spatial', limits)} combines a flow with other transformations, which no attack "
            f"supports; use each alone, as in {limits_text('spatial', {'flow': limits['flow']})}"
        )


def printable(text: str) -> str:
    """Return the text without control characters, which affect terminals and are invalid in XML; line breaks become
    spaces.
    """
    spaced = re.sub(r"\s+", " ", text)
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in spaced)


def line(text: str) -> str:
    """Return the text on one line, without control characters and without commands of CI systems.

    GitHub interprets `::error::...` at the start of a line as a command, and `##[...]` anywhere, as Azure does.
    """
    return _CI_MARK.sub(r"#\\#", _CI_COMMAND.sub(r":\\:", printable(text)))
