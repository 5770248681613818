"""Options for a model behind HTTP: allowed hosts, headers, and the format of requests.

The module uses only the standard library, so that an address is refused before torch is imported.
"""

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal
from urllib.parse import SplitResult, urlsplit

from holdfast.core.errors import UsageError

SCHEMES = {"http": 80, "https": 443}
"""Supported schemes, with the default port of each."""
_EXAMPLE = "http://localhost:8000/v2/models/NAME"
_FRAMING = frozenset({"host", "connection", "content-length", "transfer-encoding"})
_HEADER = re.compile(r"\s*([!#$%&'*+.^_`|~0-9A-Za-z-]+)\s*:\s*(.*?)\s*")
_VARIABLE = re.compile(r"env:([A-Za-z_][A-Za-z0-9_]*)")


@dataclass(frozen=True)
class Remote:
    """Options for requests to a model behind HTTP."""

    hosts: tuple[str, ...] = ()
    """hosts to which requests are allowed, each `HOST` or `HOST:PORT`"""
    headers: tuple[str, ...] = ()
    """headers of every request, each `NAME: env:VARIABLE`"""
    request: str | None = None
    """JSON of a request with `$x` for its rows, or with `$x_one` for one example without a batch axis, in which case
    each request has one example; None uses the Open Inference Protocol
    """
    response: str | None = None
    """place of the scores or classes in the answer: a path such as `predictions`, or the name of an output"""
    labels: bool = False
    """whether the answer has one class for each row, by number or name, instead of scores"""
    max_rows: int = 64
    """maximum number of rows of one request"""
    timeout_s: float = 30.0
    """longest pause in an answer, and longest duration of a whole answer, of one request"""
    retries: int = 5
    """how often a request that failed temporarily is repeated"""
    concurrency: int = 1
    """maximum number of requests at the same time"""
    rate: float | None = None
    """maximum number of requests a second; None means no limit"""
    max_queries: int | None = None
    """maximum number of rows that a run may send, including earlier attempts; None means no limit"""
    on_refused: Literal["reject", "stop"] = "reject"
    """whether an attacked input that the server refuses counts as rejected, or ends the run"""
    sleep: Callable[[float], object] | None = None
    """function that waits for so many seconds; None waits for that time or until the run is stopped"""
    now: Callable[[], float] = time.monotonic


def header_variable(text: str) -> tuple[str, str]:
    """Return the names of a header and of the environment variable with its value. A literal value is refused."""
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
    """Return the parts of an address with an allowed host. Raises `UsageError`, with advice, for other addresses."""
    try:
        parts = urlsplit(address)
        port = parts.port or SCHEMES.get(parts.scheme)
        (parts.hostname or "").encode("idna")  # the encoding that the connection uses
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
