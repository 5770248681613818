"""What runs and pools of weights leave on disk: columns, hash chains, leases, sealed sets. Nothing here computes.

`Ledger` and `Pool` are imported when they are asked for, so that the lighter modules bring no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdfast.store.ledger import Ledger
    from holdfast.store.pool import Pool

__all__ = ["Ledger", "Pool"]

_HOMES = {"Ledger": "holdfast.store.ledger", "Pool": "holdfast.store.pool"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
