"""How the name of an attack is written where only small letters, digits and hyphens may stand."""

import re


def slug(name: str) -> str:
    """`APGD-CE (large eps)` as `apgd-ce-large-eps`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
