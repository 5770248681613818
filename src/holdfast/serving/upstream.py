"""Requests to an upstream server, whose redirects are not followed and whose responses are limited in size and time."""

import json
import os
import ssl
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from holdfast.core.errors import UsageError
from holdfast.serving.protocol_v2 import JSON, LENGTH_HEADER
from holdfast.serving.refusals import Refused, wait_first
from holdfast.sources.remote import header_variable

METADATA_BYTES = 1 << 22
"""largest number of bytes of metadata"""
_REFUSED = frozenset({400, 413, 415, 422})
"""status codes with which a server refuses the content of a request"""
_BUSY = frozenset({429, 503})


def _lost(reason: str) -> Refused:
    return wait_first(f"the upstream server {reason}", 0.0, cause="upstream")


def unusable(reason: str) -> Refused:
    """Return the refusal of a request whose response cannot be used, with status 502."""
    return Refused(502, f"the upstream server {reason}", (), "upstream")


@dataclass(frozen=True)
class UpstreamAddress:
    """Where requests are sent: the address of the server, further headers, and the time for one response."""

    url: str
    """address of the server, without a path of a model"""
    headers: tuple[str, ...] = ()
    """headers of each request, each `NAME: env:VARIABLE`"""
    timeout_s: float = 10.0

    def connect(self) -> "Connection":
        """Return a connection with the headers, whose values are read from the environment.

        Raises `UsageError` for a variable that is not set.
        """
        headers = {}
        for name, variable in map(header_variable, self.headers):
            if variable not in os.environ:
                raise UsageError(f"the variable {variable} of the header {name} is not set; set it")
            headers[name] = os.environ[variable]
        return Connection(self, headers)


class Connection:
    """A connection to an upstream server that is kept open. It is used by one thread at a time."""

    def __init__(self, address: UpstreamAddress, headers: Mapping[str, str]) -> None:
        self._url, self._timeout_s = address.url, address.timeout_s
        self._client = httpx.Client(
            headers={"accept-encoding": "identity", **headers},
            timeout=address.timeout_s,
            follow_redirects=False,
            trust_env=False,
            verify=ssl.create_default_context(),
        )

    def __del__(self) -> None:
        self._client.close()

    def request(
        self,
        path: str,
        body: bytes | None = None,
        *,
        headers: Iterable[tuple[str, str]] = (),
        most: int = METADATA_BYTES,
    ) -> tuple[bytes, int | None]:
        """Return the body of the response to a GET, or to a POST of `body`, and the number of bytes of its JSON if
        tensors follow as bytes.

        A request whose connection was closed before the response is sent once more. Raises `Refused` with status 400
        if the server refuses the content, 502 for an unusable response and 503 if there is none.
        """
        method, end = "GET" if body is None else "POST", time.monotonic() + self._timeout_s
        for attempt in range(2):
            try:
                with self._client.stream(
                    method, self._url + path, content=body, headers=list(headers)
                ) as response:
                    content = self._content(response, most, end)
                    break
            except httpx.TimeoutException as error:
                raise _lost("did not answer in time") from error
            except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError) as error:
                if attempt:
                    raise _lost("closed the connection") from error
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise _lost("cannot be reached") from error
        _refuse_status(response.status_code)
        length = response.headers.get(LENGTH_HEADER)
        if length is not None and not (length.isascii() and length.isdigit()):
            raise unusable("returned an invalid header")
        return content, None if length is None else int(length)

    def json(self, path: str, body: bytes | None = None) -> Any:
        """Return the content of a response in JSON; see `request`."""
        try:
            return json.loads(self.request(path, body, headers=(("content-type", JSON),))[0])
        except (ValueError, RecursionError) as error:
            raise unusable("returned invalid JSON") from error

    @staticmethod
    def _content(response: httpx.Response, most: int, end: float) -> bytes:
        if response.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
            raise unusable("returned a compressed response")
        parts, size = [], 0
        for part in response.iter_raw():
            size += len(part)
            if size > most:
                raise unusable("returned a response that is too large")
            if time.monotonic() > end:
                raise _lost("did not answer in time")
            parts.append(part)
        return b"".join(parts)


def _refuse_status(status: int) -> None:
    if 200 <= status < 300:
        return
    if status in _REFUSED:
        raise Refused(400, "the upstream server refuses the request", (), "upstream")
    if status in _BUSY:
        raise _lost("is overloaded or not ready")
    if 300 <= status < 400:
        raise unusable("redirects the request, which is not followed")
    raise unusable(f"answered with status {status}")
