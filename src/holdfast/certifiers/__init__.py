"""Certifiers, which prove that no input of a threat model changes the prediction of a model.

A class is imported when it is first used; `holdfast.core.catalogue` lists all provers. `register` adds the bounds of an
operation.
"""

from typing import Any

from holdfast.core.catalogue import PROVERS, load_class

_MODULES = {
    path.split(":")[1]: path.split(":")[0] for path in (*PROVERS.values(), "bounds.operators:register")
}
__all__ = sorted(_MODULES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    return load_class(__name__, _MODULES, name)


def __dir__() -> list[str]:
    return __all__
