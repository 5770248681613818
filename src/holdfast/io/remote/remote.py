"""Options for a model behind HTTP: allowed hosts, headers, and the format of requests.

The module imports neither torch nor HTTP clients, so that help texts and refused addresses are fast.
"""

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal
from urllib.parse import SplitResult, urlsplit

from holdfast.core.errors import UsageError, model_argument

SCHEMES = {"http": 80, "https": 443}
"""Supported schemes, with the default port of each."""
_EXAMPLE = "http://localhost:8000/v2/models/NAME"
_FRAMING = frozenset({"host", "connection", "content-length", "transfer-encoding"})
_HEADER = re.compile(r"\s*([!#$%&'*+.^_`|~0-9A-Za-z-]+)\s*:\s*(.*?)\s*")
_VARIABLE = re.compile(r"env:([A-Za-z_][A-Za-z0-9_]*)")


@dataclass(frozen=True)
class Remote:
    """Options of the HTTP requests to a model behind a server, such as allowed hosts, headers and timeouts."""

    hosts: tuple[str, ...] = ()
    """hosts to which requests may be sent, each `HOST` or `HOST:PORT`"""
    headers: tuple[str, ...] = ()
    """headers of every request, each `NAME: env:VARIABLE`"""
    request: str | None = None
    """JSON of a request with `$x` in place of its rows, or `$x_one` in place of one example without a batch axis

    With `$x_one` each request has one example. None means the Open Inference Protocol.
    """
    response: str | None = None
    """location of the scores or labels in the response: a path such as `predictions`, or the name of an output"""
    labels: bool = False
    """whether the response contains one label for each row, by number or name, instead of scores"""
    max_rows: int = 64
    """largest number of rows of one request"""
    timeout_s: float = 30.0
    """largest duration in seconds of a pause within a response, and of a whole response"""
    retries: int = 5
    """how often a request that failed temporarily is repeated"""
    concurrency: int = 1
    """largest number of requests at the same time"""
    rate: float | None = None
    """largest number of requests per second; None means no limit"""
    max_queries: int | None = None
    """largest number of rows that a run may send, including earlier attempts; None means no limit"""
    on_refused: Literal["reject", "stop"] = "reject"
    """what happens with an attacked input that the server rejects: it is recorded as rejected, or the run stops"""
    sleep: Callable[[float], object] | None = None
    """function that waits for a number of seconds; None means to wait for that time or until the run is stopped"""
    now: Callable[[], float] = time.monotonic


KEY = model_argument("headers", ("Authorization: env:MODEL_TOKEN",), "--header", repeated=True)
"""header with a key of the server that is in an environment variable"""


def header_variable(text: str) -> tuple[str, str]:
    """Return the name of an HTTP header, and the name of the environment variable that contains its value.

    Raises `UsageError` for a literal value, because it would be stored in the evidence.
    """
    header = _HEADER.fullmatch(text)
    if header is None:
        raise UsageError("a header has no name; 'NAME: env:VARIABLE' was expected", KEY)
    variable = _VARIABLE.fullmatch(header[2])
    if variable is None:
        raise UsageError(
            f"the value of the header {header[1]} is given literally, so it would be stored in the evidence; set an "
            "environment variable to it, and give the name of the variable",
            model_argument("headers", (f"{header[1]}: env:MODEL_TOKEN",), "--header", repeated=True),
        )
    if header[1].lower() in _FRAMING:
        raise UsageError(f"the header {header[1]} is set automatically by the connection; omit it")
    return header[1], variable[1]


def allowed_address(address: str, hosts: Iterable[str]) -> SplitResult:
    """Return the parts of the URL of a model if its host is one of `hosts`. Raises `UsageError`, with advice, for other
    addresses.
    """
    try:
        parts = urlsplit(address)
        port = parts.port or SCHEMES.get(parts.scheme)
        (parts.hostname or "").encode("idna")  # the encoding that the connection uses
    except ValueError as error:
        raise UsageError(f"{address!r} is not a valid URL ({error}); give one such as {_EXAMPLE}") from error
    # The message does not contain the address, because that would show the password.
    if "@" in parts.netloc:
        raise UsageError(
            "the address contains a user name or a password, which would be stored in the evidence; leave them out of "
            "it",
            KEY,
        )
    # Spaces, control characters and characters outside ASCII are not allowed in a URL.
    if parts.scheme not in SCHEMES or not parts.hostname or re.search(r"[^\x21-\x7e]", address):
        raise UsageError(f"{address!r} is not the address of a server; give one such as {_EXAMPLE}")
    if not any(_same_host(host, parts.hostname, port) for host in hosts):
        allowed = ", ".join(hosts)
        other_hosts = f"; only {allowed} {'is' if ',' not in allowed else 'are'} allowed" if allowed else ""
        raise UsageError(
            f"{address!r} is a server, and requests are sent only to allowed hosts{other_hosts}",
            model_argument(
                "allow_hosts", (parts.netloc,), "--allow-host", repeated=True, reason="if you may attack it"
            ),
        )
    return parts


def _same_host(host: str, hostname: str, port: int | None) -> bool:
    try:
        allowed = urlsplit(f"//{host}")
        allowed_port = allowed.port
    except ValueError:
        allowed, allowed_port = None, None
    if allowed is None or not allowed.hostname or allowed.netloc != host:
        raise UsageError(f"an allowed host is {host}; HOST or HOST:PORT was expected, as in localhost:8000")
    return allowed.hostname == hostname.lower() and allowed_port in (None, port)
