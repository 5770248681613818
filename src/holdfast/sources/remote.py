"""What a user says of a model behind HTTP: which hosts may be asked, with which headers, and how.

Stands on the standard library alone, so that an address is refused before torch is imported.
"""

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal
from urllib.parse import SplitResult, urlsplit

from holdfast.core.errors import UsageError

SCHEMES = {"http": 80, "https": 443}
"""What a server is asked by, with the port where an address has none."""
_EXAMPLE = "http://localhost:8000/v2/models/NAME"
_FRAMING = frozenset({"host", "connection", "content-length", "transfer-encoding"})
_HEADER = re.compile(r"\s*([!#$%&'*+.^_`|~0-9A-Za-z-]+)\s*:\s*(.*?)\s*")
_VARIABLE = re.compile(r"env:([A-Za-z_][A-Za-z0-9_]*)")


@dataclass(frozen=True)
class Remote:
    """How a model behind HTTP is asked."""

    hosts: tuple[str, ...] = ()
    """hosts that may be asked, each `HOST` or `HOST:PORT`"""
    headers: tuple[str, ...] = ()
    """sent with every request, each `NAME: env:VARIABLE`"""
    request: str | None = None
    """JSON of a request with `$x` for its rows, or with `$x_one` for one example without a batch axis, of which each
    request then has one; None asks by the Open Inference Protocol"""
    response: str | None = None
    """where the answer holds the scores or classes: a path such as `predictions`, or the name of an output"""
    labels: bool = False
    """the answer holds one class a row, its number or its name, and no scores"""
    max_rows: int = 64
    """rows of one request at most"""
    timeout_s: float = 30.0
    """longest silence, and longest whole answer, of one request"""
    retries: int = 5
    """how often a request that failed temporarily is sent again"""
    concurrency: int = 1
    """requests that are under way at once, at most"""
    rate: float | None = None
    """requests a second, at most; None has no limit"""
    max_queries: int | None = None
    """rows that a run may send, over all attempts at it; None has no limit"""
    on_refused: Literal["reject", "stop"] = "reject"
    """whether an attacked input that the server refuses counts as rejected, or ends the run"""
    sleep: Callable[[float], object] | None = None
    """waits for so many seconds; None waits until then or until the run is stopped"""
    now: Callable[[], float] = time.monotonic


def header_variable(text: str) -> tuple[str, str]:
    """Name of a header and of the environment variable that holds its value; a value written out is refused."""
    form = "give 'NAME: env:VARIABLE', as in --header 'Authorization: env:MODEL_TOKEN'"
    found = _HEADER.fullmatch(text)
    if found is None:
        raise UsageError(f"a header has no name; {form}")
    variable = _VARIABLE.fullmatch(found[2])
    if variable is None:
        raise UsageError(
            f"header {found[1]} has its value written out, which would end up in the evidence; put it into an "
            f"environment variable and {form}"
        )
    if found[1].lower() in _FRAMING:
        raise UsageError(f"header {found[1]} is set by the connection itself; leave it out")
    return found[1], variable[1]


def allowed_address(address: str, hosts: Iterable[str]) -> SplitResult:
    """The parts of an address whose host is among those allowed; `UsageError` with the way out for all others."""
    try:
        parts = urlsplit(address)
        port = parts.port or SCHEMES.get(parts.scheme)
        (parts.hostname or "").encode("idna")  # as the connection will
    except ValueError as error:
        raise UsageError(f"{address!r} is no URL ({error}); give one such as {_EXAMPLE}") from error
    if "@" in parts.netloc:
        raise UsageError(
            "the address holds a user name or a password, which would end up in the evidence; leave it out, and give "
            "--header 'Authorization: env:VARIABLE'"
        )
    if parts.scheme not in SCHEMES or not parts.hostname or re.search(r"[^\x21-\x7e]", address):
        raise UsageError(f"{address!r} is no address of a server; give one such as {_EXAMPLE}")
    if not any(_same_host(host, parts.hostname, port) for host in hosts):
        named = ", ".join(hosts)
        but = f"; only {named} {'is' if ',' not in named else 'are'} allowed" if named else ""
        raise UsageError(
            f"{address!r} is a server, which nothing is sent to unless its host is allowed{but}; if you may attack it, "
            f"add --allow-host {parts.netloc}"
        )
    return parts


def _same_host(host: str, hostname: str, port: int | None) -> bool:
    try:
        allowed = urlsplit(f"//{host}")
        wanted = allowed.port
    except ValueError:
        allowed, wanted = None, None
    if allowed is None or not allowed.hostname or allowed.netloc != host:
        raise UsageError(f"--allow-host {host} is no host; give HOST or HOST:PORT, as in localhost:8000")
    return allowed.hostname == hostname.lower() and wanted in (None, port)
