"""Reads and writes the files of runs and pools: columns, hash chains, leases and encrypted parameter sets. This package
computes no metrics.

`Ledger` and `Pool` are imported on first use, so that the other modules do not import torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdfast.rotation.ledger import Ledger
    from holdfast.rotation.pool import Pool

__all__ = ["Ledger", "Pool"]

_HOMES = {"Ledger": "holdfast.rotation.ledger", "Pool": "holdfast.rotation.pool"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
