"""The headers of clients that a proxy passes on with the inputs of a batch."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Headers = tuple[tuple[str, str], ...]
_HEADERS: ContextVar[Headers] = ContextVar("forwarded_headers", default=())
_VALUE = re.compile(r"([!-~]([\t -~]*[!-~])?)?")


def is_sendable(value: str) -> bool:
    """Return whether a text can be the value of a header that is sent: printable ASCII characters."""
    return _VALUE.fullmatch(value) is not None


@contextmanager
def forwarding(headers: Headers) -> Iterator[None]:
    """Context manager in which a proxied model sends these headers with each request."""
    token = _HEADERS.set(headers)
    try:
        yield
    finally:
        _HEADERS.reset(token)


def forwarded() -> Headers:
    """Return the headers of the current context."""
    return _HEADERS.get()
