"""API keys of a server, with their scopes and expiry, and their rates and budgets in the state that all workers
share.
"""

import json
import logging
import math
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, Strict
from typing_extensions import TypedDict

from holdfast.core.errors import TargetError, UsageError
from holdfast.guard.state_in_memory import Allowance, Charge, Grant, SharedState
from holdfast.io.remote.operator_port import hash_of, key_id
from holdfast.runs.store.columns import Count, Whole, required, validated
from holdfast.runs.store.files import PRIVATE, content_of, usable, write_atomically
from holdfast.runs.store.folder import document, parsed
from holdfast.runs.store.leases import locked
from holdfast.server.requests import Refused, wait_first

ADMIN = "admin"
SCOPES = ("infer", "metrics", "labels", "adapt", "approve", ADMIN)
"""what a key may permit: `infer` requests to the model, and the others requests to the port of the operator, all of
which `admin` permits"""
_PREFIX, _KEY_BYTES = "hf_", 32
_SCHEME = b"bearer "
_CHECK_S = 1.0
"""seconds between two looks at the file, after which a revoked key is refused"""
_BURST_S = 10.0
"""number of seconds of a rate that may be used at once"""
_ROUNDED = 1e-9  # so that ten seconds of 0.3/s count as 3
_RATES = 1e-12, 1e9
"""smallest and largest number of inputs per second"""
_MOST_INPUTS = 2**53
"""largest budget"""
_log = logging.getLogger("holdfast.server")
_CHALLENGE = (("www-authenticate", "Bearer"),)


def _is_name(text: str) -> bool:
    return 0 < len(text) <= 100 and text.isprintable()


def _is_moment(text: str) -> bool:
    try:
        return datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        return False


@dataclass(frozen=True)
class ApiKey:
    """What is stored about an API key. Its name is that of the principal."""

    # a further field may be a limit that only another version enforces, and a missing one may have been removed
    __pydantic_config__ = ConfigDict(extra="forbid")

    name: Annotated[str, required(_is_name, "1 to 100 printable characters")]
    hash: Annotated[str, required(re.compile(r"[0-9a-f]{64}").fullmatch, "64 hexadecimal digits")]
    """SHA-256 of the key, in hex"""
    scopes: tuple[str, ...]
    created: str
    expires: Annotated[str, required(_is_moment, "a time in ISO 8601 with a time zone")] | None
    """time in ISO 8601 from which the key is refused"""
    rate: Annotated[float, Strict(), Field(ge=_RATES[0], le=_RATES[1])] | None
    """largest number of inputs per second, averaged; None for no limit"""
    budget: Count | None
    """largest number of inputs in total; None for no limit"""
    revoked: str | None
    """time in ISO 8601 at which the key was revoked"""

    @property
    def state(self) -> str:
        """State of the key: `valid`, `expired` or `revoked`."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and _past(self.expires) else "valid"

    def charge(self, rows: int) -> Charge | None:
        """Return what a request for a number of inputs takes from the limits of the key; None without limits."""
        if self.rate is None and self.budget is None:
            return None
        burst = 1 if self.rate is None else burst_of(self.rate)
        return Charge(self.name, rows, Allowance(self.rate, burst, self.budget, math.inf))

    def permits(self, *scopes: str) -> bool:
        """Return whether the key has one of the scopes, or `admin` for those of the operator's port."""
        return any(scope in self.scopes or (scope != "infer" and ADMIN in self.scopes) for scope in scopes)

    def refuse_unpermitted(self, *scopes: str) -> None:
        """Raise `Refused` with status 401 for a key that is revoked or has expired, and 403 for one without any of the
        scopes.
        """
        if self.revoked is not None:
            raise Refused(401, "the key is not valid", _CHALLENGE, "key")
        if self.state == "expired":
            raise Refused(401, "the key has expired", _CHALLENGE, "key")
        if not self.permits(*scopes):
            raise Refused(403, f"the key does not permit {' or '.join(scopes)}", (), "key")


def _are_distinct(keys: Sequence[ApiKey]) -> bool:
    """Whether no key occurs twice, so that it is refused when the entry with its name is revoked."""
    return len({key.hash for key in keys}) == len(keys)


class _Keys(TypedDict):
    schema: Annotated[Whole, required((1).__eq__, "1")]
    keys: Annotated[tuple[ApiKey, ...], required(_are_distinct, "keys with distinct hashes")]


def burst_of(rate: float) -> int:
    """Return the largest number of inputs that a key with a rate may send at once, after a pause: those of ten seconds,
    and at least one. It is also the largest number of inputs of a request.

    >>> burst_of(2.0), burst_of(1 / 60)
    (20, 1)
    """
    return max(1, math.floor(_BURST_S * rate + _ROUNDED))


def _past(moment: str) -> bool:
    return datetime.fromisoformat(moment) <= datetime.now(UTC)


def add_key(
    path: Path,
    name: str,
    scopes: Sequence[str],
    *,
    expires: str | None = None,
    rate: float | None = None,
    budget: int | None = None,
) -> str:
    """Add a key to the file, which is created if it does not exist, and return the key. It cannot be read again.

    `expires` is a time in ISO 8601. Raises `UsageError` if another key that is not revoked has the name, or if a limit
    is outside of its range.
    """
    if not _is_name(name):
        raise UsageError(
            f"the name of a key is {name!r}; expected 1 to 100 printable characters, as in alice"
        )
    if rate is not None and not _RATES[0] <= rate <= _RATES[1]:
        raise UsageError(f"the rate is {rate:g} inputs per second; expected {_RATES[0]} to {_RATES[1]}")
    if budget is not None and not 1 <= budget <= _MOST_INPUTS:
        raise UsageError(f"the budget is {budget}; expected 1 to {_MOST_INPUTS} inputs")
    unknown = [scope for scope in scopes if scope not in SCOPES]
    if unknown or not scopes:
        raise UsageError(f"the scopes are {list(scopes)}; expected one or more of {', '.join(SCOPES)}")
    key = f"{_PREFIX}{secrets.token_urlsafe(_KEY_BYTES)}"
    with locked(_lock(path)):
        keys = list(read_keys(path)) if path.exists() else []
        if any(each.name == name and each.revoked is None for each in keys):
            raise UsageError(
                f"{str(path)!r} contains a key with the name {name!r}; revoke it first with holdfast keys revoke "
                f"{name}, or choose another name"
            )
        created = datetime.now(UTC).isoformat(timespec="seconds")
        keys.append(
            ApiKey(name, hash_of(key.encode()).hex(), tuple(scopes), created, expires, rate, budget, None)
        )
        _write(path, keys)
    return key


def revoke_key(path: Path, name: str) -> ApiKey:
    """Revoke the key with a name, and return it. Raises `UsageError` if there is no such key."""
    with locked(_lock(path)):
        keys = list(read_keys(path))
        for place, key in enumerate(keys):
            if key.name == name and key.revoked is None:
                keys[place] = replace(key, revoked=datetime.now(UTC).isoformat(timespec="seconds"))
                _write(path, keys)
                return keys[place]
    names = ", ".join(key.name for key in keys if key.revoked is None) or "no key that is not revoked"
    raise UsageError(f"{str(path)!r} contains no key {name!r} that is not revoked; it contains {names}")


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """Return the keys of a file. Raises `TargetError` if there is no such file, if others may read it, or if its
    content is invalid.
    """
    if not path.exists():
        raise TargetError(f"there is no file {str(path)!r}; holdfast keys add NAME --file {path} writes it")
    content = parsed(path, content_of(path))
    with usable(path):
        mode = stat.S_IMODE(path.stat().st_mode)
    if os.name != "nt" and mode & 0o077:
        raise TargetError(
            f"{str(path)!r} has the mode {mode:04o}, so that others may read or change it; expected 0600: chmod 600 "
            f"{path}"
        )
    keys: tuple[ApiKey, ...] = validated(path, content, _Keys)["keys"]
    return keys


def _write(path: Path, keys: Sequence[ApiKey]) -> None:
    content: dict[str, Any] = {"schema": 1, "keys": [vars(key) for key in keys]}
    with usable(path):
        write_atomically(path, document(json.loads(json.dumps(content))), PRIVATE)


def _lock(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


class KeyFile:
    """The keys of a running server. The file is read again when it has changed, so that a revoked key is soon refused.

    If it cannot be read then, the earlier keys remain, and `failure` has the reason.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = path, clock
        self._lock = threading.Lock()
        self.failure = ""
        self._take(read_keys(path))
        self._seen, self._looked_s = self._stamp(), self._clock()

    def _take(self, keys: Sequence[ApiKey]) -> None:
        self._keys = {key.hash: key for key in keys}
        self._by_id = {key_id(bytes.fromhex(key.hash)): key for key in keys}

    def _stamp(self) -> tuple[int, int, int]:
        status = self._path.stat()
        return status.st_mtime_ns, status.st_size, status.st_ino

    @property
    def all_limited(self) -> bool:
        """Whether every valid key for inference has a rate or a budget."""
        keys = [key for key in self._keys.values() if "infer" in key.scopes and key.state == "valid"]
        return bool(keys) and all(key.rate is not None or key.budget is not None for key in keys)

    @property
    def entries(self) -> tuple[ApiKey, ...]:
        """All keys of the file, also those that are no longer valid."""
        self._look()
        return tuple(self._keys.values())

    def current(self, key: ApiKey) -> ApiKey | None:
        """Return a key that was authenticated before as it is in the file now; None if it is no longer valid."""
        self._look()
        found = self._keys.get(key.hash)
        return found if found is not None and found.state == "valid" else None

    def named(self, name: str) -> ApiKey | None:
        """Return the key with a name of `operator_proofs.key_id`, whatever its state is; None if there is none."""
        self._look()
        return self._by_id.get(name)

    def authenticated(self, authorization: bytes | None, *scopes: str) -> ApiKey:
        """Return the key in the header `Authorization: Bearer KEY`.

        Raises `Refused` with status 401 for a missing or invalid key, and 403 for one without any of the scopes.
        """
        self._look()
        if authorization is None:
            raise Refused(
                401, "the header Authorization is missing; Bearer KEY was expected", _CHALLENGE, "key"
            )
        given = authorization.strip()
        if given[: len(_SCHEME)].lower() != _SCHEME:
            raise Refused(401, "the header Authorization must be Bearer KEY", _CHALLENGE, "key")
        # The lookup compares hashes of the keys, so its duration does not depend on how much of a key is right.
        key = self._keys.get(hash_of(given[len(_SCHEME) :].strip()).hex())
        if key is None:
            raise Refused(401, "the key is not valid", _CHALLENGE, "key")
        key.refuse_unpermitted(*scopes)
        return key

    def _look(self) -> None:
        if self._clock() - self._looked_s < _CHECK_S:
            return
        with self._lock:
            self._looked_s = self._clock()
            try:
                stamp = self._stamp()
                if stamp != self._seen:
                    self._take(read_keys(self._path))
                    self._seen = stamp
                self._report("")
            except (OSError, TargetError) as error:
                self._report(str(error))

    def _report(self, failure: str) -> None:
        if failure and failure != self.failure:
            _log.warning(
                "The file of keys cannot be read; the keys that it contained before are used: %s", failure
            )
        elif self.failure and not failure:
            _log.info("The file of keys can be read again")
        self.failure = failure


@dataclass(frozen=True)
class Quotas:
    """Rates and budgets in a shared state."""

    state: SharedState
    clock: Callable[[], float] = time.time

    def take(self, charges: Sequence[Charge | None]) -> list[Refused | None]:
        """Count the inputs of requests in one transaction, and return a refusal for each that exceeds a limit.

        A request without limits is None. Refused requests are not counted. If the state cannot be reached, all are
        refused with status 503.
        """
        limited = [each for each in charges if each is not None]
        grants = iter(self.state.spend(limited, self.clock()) if limited else ())
        return [None if each is None else _refusal(each, next(grants)) for each in charges]


def _refusal(charge: Charge, grant: Grant) -> Refused | None:
    if grant.granted:
        return None
    if grant.lost:
        return wait_first("the limits of the key cannot be checked", 1.0, cause="quota")
    if grant.reason == "rate":
        return wait_first("the rate of the key is exceeded", grant.retry_after_s, status=429, cause="rate")
    if grant.reason == "budget":
        return Refused(429, "the budget of the key is used up", (), "budget")
    # no waiting makes the request acceptable, so the answer states the number of rows that is
    allowed = charge.allowance
    limits = {"rate": None if allowed.rate_per_s is None else allowed.burst, "budget": allowed.budget}
    most, name = min((most, name) for name, most in limits.items() if most is not None)
    return Refused(
        413,
        f"the request has {charge.n} rows, and the {name} of the key allows at most {most} at once; send fewer rows in "
        "each request",
        cause=name,
    )
