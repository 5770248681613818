"""The host names under which a server answers, which the header `Host` of a request must name.

A page of another site can send requests to a server on loopback if the name of that site resolves to loopback (DNS
rebinding). The browser states the name of the site in `Host`.
"""

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from holdfast.server.http_refusals import Refused

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
