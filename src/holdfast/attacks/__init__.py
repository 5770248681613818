"""The attacks of Holdfast. The module of an attack is imported when the attack is first used; `holdfast.core.catalogue`
lists all attacks.
"""

from typing import Any

from holdfast.core.catalogue import ATTACKS, load_class

__all__ = sorted(ATTACKS)  # noqa: PLE0605

_MODULES = {name: entry.module for name, entry in ATTACKS.items()}


def __getattr__(name: str) -> type[Any]:
    return load_class(__name__, _MODULES, name)


def __dir__() -> list[str]:
    return __all__
