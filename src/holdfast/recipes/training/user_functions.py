"""Exceptions of functions of the user, such as an optimiser or an augmentation."""

from collections.abc import Iterator
from contextlib import contextmanager

from holdfast.core.errors import FunctionRaised, HoldfastError, TargetError
from holdfast.core.model import out_of_memory


@contextmanager
def raising(
    function: str, when: str = "", advice: str = "", kind: type[TargetError] = FunctionRaised
) -> Iterator[None]:
    """Context manager that raises `kind` for an exception of a function of the user. `function` and `when` describe the
    call in the message, as in "the function augment" and "in the first update".

    Errors of Holdfast and those of memory are raised unchanged.
    """
    try:
        yield
    except Exception as error:  # the user's code may raise anything
        if isinstance(error, HoldfastError) or out_of_memory(error):
            raise
        place = when and f" {when}"
        raise kind(
            f"{function} raised {type(error).__name__}{place}: {error}{advice and f'; {advice}'}"
        ) from error
