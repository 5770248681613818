"""Client of the operator's port of a server: its state, and what its operator requests."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from holdfast.core.errors import TargetError, UsageError
from holdfast.io.files import text_of_file
from holdfast.io.remote.remote import SCHEMES

Json = dict[str, Any]

_TIMEOUT_S = 30.0
_MOST_BYTES = 1 << 28
"""largest number of bytes of a response"""
_NO_KEY = frozenset({401, 403})
_SHOWN = 300
"""largest number of characters of a reason that is shown"""


class Refusal(TargetError):
    """A request that the operator's port refuses, with the status code and the reason of the server."""

    def __init__(self, message: str, status: int, reason: str) -> None:
        super().__init__(message)
        self.status, self.reason = status, reason


def read_key(path: str | Path) -> str:
    """Return the API key in a file, which contains nothing else. Raises `UsageError` for another content,
    and `TargetError` if it cannot be read.
    """
    key = text_of_file(Path(path), "key file").strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise UsageError(
            f"the key file {str(path)!r} does not contain one API key; write into it what holdfast keys add prints"
        )
    return key


@dataclass(frozen=True)
class OperatorPort:
    """Client of the operator's port at a URL without a path, such as `http://127.0.0.1:8081`. Redirects are not
    followed, and proxies are not used.

    Its methods raise `TargetError` if the server cannot be reached or does not answer as an operator's port does,
    `UsageError` if it does not accept the key, and `Refusal` for other refused requests.
    """

    url: str
    key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            usable = parts.scheme in SCHEMES and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable or parts.path.strip("/") or parts.query or parts.fragment or "@" in parts.netloc:
            raise UsageError(
                f"{self.url!r} is not the address of an operator's port; expected one as in http://127.0.0.1:8081"
            )

    def get(self, path: str) -> Json:
        """Return the answer to a GET request."""
        return self._parsed(self._answer("GET", path, None))

    def post(self, path: str, body: Mapping[str, Any]) -> Json:
        """Send a body, and return the answer."""
        return self._parsed(self._answer("POST", path, json.dumps(body).encode()))

    def delete(self, path: str) -> Json:
        """Return the answer to a DELETE request."""
        return self._parsed(self._answer("DELETE", path, None))

    def read(self, path: str) -> bytes:
        """Return the content at a path that is not JSON."""
        return self._answer("GET", path, None)

    def _answer(self, method: str, path: str, body: bytes | None) -> bytes:
        parts = urlsplit(self.url)
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        headers = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        connection = kind(parts.hostname or "", parts.port or SCHEMES[parts.scheme], timeout=_TIMEOUT_S)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            content = response.read(_MOST_BYTES + 1)
        except (HTTPException, OSError) as error:
            raise TargetError(
                f"the operator's port {self.url} cannot be reached ({str(error) or type(error).__name__}); check the "
                "address, and whether the server runs"
            ) from error
        finally:
            connection.close()
        if len(content) > _MOST_BYTES:
            raise TargetError(
                f"{self.url}{path} returned more than {_MOST_BYTES >> 20} MiB; check the address"
            )
        if not 200 <= response.status < 300:
            raise self._refusal(method, path, response.status, content)
        return content

    def _refusal(self, method: str, path: str, status: int, content: bytes) -> TargetError | UsageError:
        try:
            reason = str(json.loads(content)["error"])[:_SHOWN]
        except (ValueError, LookupError, TypeError):
            reason = ""
        if status in _NO_KEY:
            return UsageError(
                f"the operator's port {self.url} does not accept the key: {reason or status}; create one with holdfast "
                "keys add NAME --scope admin, and give the file that contains it as the key file"
            )
        return Refusal(f"{self.url} refuses {method} {path}: {reason or status}", status, reason)

    def _parsed(self, content: bytes) -> Json:
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise TargetError(
                f"{self.url} did not answer with a JSON object; give the address of an operator's port"
            )
        return answer
