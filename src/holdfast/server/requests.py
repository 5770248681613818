"""Headers and refusals of requests: host names, headers that a proxy passes on, and the error that ends a request."""

import ipaddress
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache


@dataclass(eq=False)
class Refused(Exception):
    """A request that is not answered: status code, one reason, and further headers of the response."""

    status: int
    reason: str
    headers: tuple[tuple[str, str], ...] = ()
    cause: str = "request"
    """cause for the metrics: `request`, `key`, `rate`, `state`, `guard`, `overload`, `audit`, `model`, `upstream`;
    `state` if the state of the query detector could not be reached"""

    def __str__(self) -> str:
        return self.reason


def wait_first(reason: str, wait_s: float, *, status: int = 503, cause: str = "overload") -> Refused:
    """Return the refusal of a request that may be sent again after `wait_s` seconds."""
    return Refused(status, reason, (("retry-after", str(max(1, round(wait_s + 0.5)))),), cause)


_HOST = re.compile(rb"(\[[0-9a-f:.]+\]|[a-z0-9_.-]*)(:[0-9]*)?")
_LOCAL = ".localhost"


@dataclass(frozen=True)
class HostNames:
    """Host names that are accepted.

    IP addresses, `localhost` and names without a dot are always accepted, because they cannot be names of a public
    site. So is a request without the header, which no browser sends.
    """

    names: frozenset[str] = frozenset()
    """further names, in lower case"""
    everything: bool = False
    """whether all names are accepted"""

    def refuse_other(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Raise `Refused` with the status 421 for a request with these headers that names another host."""
        hosts = [value for name, value in headers if name == b"host"]
        if not self.everything and not (len(hosts) < 2 and all(map(self._accepts, hosts))):
            raise Refused(
                421,
                "the name in the header Host is not accepted; the operator can allow it with --accept-host",
            )

    def _accepts(self, host: bytes) -> bool:
        name = _name(host)
        if name is None:
            return False
        return "." not in name.strip("[]") or name in self.names or name.endswith(_LOCAL) or _is_address(name)


@lru_cache(maxsize=64)
def _name(host: bytes) -> str | None:
    """Return the name in a header Host in lower case and without the port; None if it is not valid."""
    matched = _HOST.fullmatch(host.strip().lower())
    return None if matched is None else matched[1].decode().removesuffix(".")


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text.strip("[]"))
    except ValueError:
        return False
    return True


Headers = tuple[tuple[str, str], ...]
FORWARDED: ContextVar[Headers] = ContextVar("forwarded_headers", default=())
"""headers of clients that a proxied model sends with the requests of this context"""
_VALUE = re.compile(r"([!-~]([\t -~]*[!-~])?)?")


def is_sendable(value: str) -> bool:
    """Return whether a text can be the value of a header that is sent: printable ASCII characters."""
    return _VALUE.fullmatch(value) is not None


@contextmanager
def forwarding(headers: Headers) -> Iterator[None]:
    """Context manager in which a proxied model sends these headers with each request."""
    token = FORWARDED.set(headers)
    try:
        yield
    finally:
        FORWARDED.reset(token)
