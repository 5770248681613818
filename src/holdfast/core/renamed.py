"""Earlier names of attributes and functions, which are still accepted with a `DeprecationWarning`."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

_OF_CALLER = (
    3  # the warning shows the line that uses the earlier name, which is two calls above `warn_of_renaming`
)


class Earlier:
    """Descriptor for the earlier name of an attribute, as in `says = Earlier("message")`. It returns the attribute with
    the current name, and warns.
    """

    def __init__(self, current: str) -> None:
        self.current = current

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = f"{owner.__name__}.{name}"

    def __get__(self, instance: object, owner: type) -> object:
        warn_of_renaming(self.name, f"{owner.__name__}.{self.current}")
        return getattr(owner if instance is None else instance, self.current)


def earlier_functions(
    module: str, names: Mapping[str, Callable[..., Any]]
) -> Callable[[str], Callable[..., Any]]:
    """Return the function `__getattr__` of a module whose functions were renamed. `names` contains the functions by
    their earlier names.
    """

    def getattr_of_module(name: str) -> Callable[..., Any]:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_of_renaming(f"{module}.{name}", f"{module}.{names[name].__name__}")
        return names[name]

    return getattr_of_module


def warn_of_renaming(name: str, current: str) -> None:
    """Warn that a name is an earlier one. The warning shows the line that called the caller of this function."""
    message = f"{name} is now called {current}; the earlier name is still accepted"
    warnings.warn(message, DeprecationWarning, stacklevel=_OF_CALLER)
