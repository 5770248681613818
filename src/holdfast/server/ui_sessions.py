"""Sessions of operators at the page `/ui`: login with a key, expiry, and tokens of forms.

A visitor has a random identifier in a cookie. The token of its forms is an HMAC of the identifier, so that another
page, which can make a browser send the cookie but cannot read it, cannot send a form.
"""

import hmac
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock

from holdfast.server.keys import ApiKey, KeyFile
from holdfast.server.requests import Refused, wait_first

SESSION_S = 8 * 3600.0
"""seconds after which an operator must log in again"""
_MOST_SESSIONS = 32
"""number of sessions above which the oldest one ends"""
_FAILURES, _FAILURES_S = 10, 60.0
"""number of failed logins of an address in so many seconds after which none of it is tried: it limits load, as keys
cannot be guessed"""
_MOST_ADDRESSES = 1000
"""number of addresses with failed logins that are remembered"""
_ID_BYTES = 32
_WITHOUT_KEYS = "operator"
"""name of the operator of a server without keys"""
PAGE_SCOPES = ("metrics", "adapt", "approve")
"""scopes with each of which a part of the page is shown"""


@dataclass(frozen=True)
class Operator:
    """A visitor who may use the page."""

    key: ApiKey | None
    """key of the login; None on a server without keys"""

    @property
    def name(self) -> str:
        """Name of the key."""
        return _WITHOUT_KEYS if self.key is None else self.key.name

    def may(self, *scopes: str) -> bool:
        """Return whether the operator may use what needs one of the scopes."""
        return self.key is None or self.key.permits(*scopes)

    def refuse_other(self, *scopes: str) -> None:
        """Raise `Refused` with status 403 unless the operator has one of the scopes."""
        if self.key is not None:
            self.key.refuse_unpermitted(*scopes)


@dataclass(frozen=True)
class Session:
    """A session of an operator."""

    key: ApiKey
    ends_s: float


@dataclass(eq=False)
class Sessions:
    """The sessions of a server, in memory. Without `keys`, every visitor is the operator."""

    keys: KeyFile | None
    clock: Callable[[], float] = time.monotonic
    _secret: bytes = field(default_factory=lambda: secrets.token_bytes(_ID_BYTES), repr=False)
    _sessions: OrderedDict[str, Session] = field(default_factory=OrderedDict, repr=False)
    _failures: OrderedDict[str, deque[float]] = field(default_factory=OrderedDict, repr=False)
    """times of the newest failed logins of each address"""
    _lock: Lock = field(default_factory=Lock, repr=False)

    @staticmethod
    def new_visitor() -> str:
        """Return a random identifier for a cookie."""
        return secrets.token_urlsafe(_ID_BYTES)

    def token(self, visitor: str) -> str:
        """Return the token of the forms of a visitor."""
        return hmac.new(self._secret, visitor.encode("utf-8", "surrogatepass"), "sha256").hexdigest()

    def refuse_forged(self, visitor: str, token: str) -> None:
        """Raise `Refused` with status 403 for a form without the token of its visitor."""
        given = token.encode("utf-8", "surrogatepass")
        if not visitor or not hmac.compare_digest(given, self.token(visitor).encode()):
            raise Refused(403, "the form is not from this page, or its session has ended; load /ui again")

    def operator(self, visitor: str) -> Operator | None:
        """Return the operator with this session; None for a visitor who must log in.

        A session ends with its key, and has the scopes that the key has now.
        """
        if self.keys is None:
            return Operator(None)
        with self._lock:
            session = self._sessions.get(visitor)
            if session is None:
                return None
            key = self.keys.current(session.key)
            if self.clock() >= session.ends_s or key is None or not key.permits(*PAGE_SCOPES):
                del self._sessions[visitor]
                return None
            return Operator(key)

    def login(self, key: str, address: str = "") -> str:
        """Begin a session, and return its identifier, which no visitor had before.

        Raises `Refused` with status 401 or 403 for another key than one with a scope of the page, and with status
        429 after too many failures of the same address.
        """
        assert self.keys is not None, "a server without keys has no login"
        now = self.clock()
        with self._lock:
            failures = self._failures.get(address, deque(maxlen=_FAILURES))
            if len(failures) == _FAILURES and now - failures[0] < _FAILURES_S:
                wait_s = _FAILURES_S - (now - failures[0])
                raise wait_first(
                    "too many logins have failed; wait a minute", wait_s, status=429, cause="key"
                )
            try:
                bearer = b"Bearer " + key.strip().encode("utf-8", "replace")
                found = self.keys.authenticated(bearer, *PAGE_SCOPES)
            except Refused:
                failures.append(now)
                self._failures[address] = failures
                while len(self._failures) > _MOST_ADDRESSES:
                    self._failures.popitem(last=False)
                raise
            visitor = self.new_visitor()
            self._sessions[visitor] = Session(found, now + SESSION_S)
            while len(self._sessions) > _MOST_SESSIONS:
                self._sessions.popitem(last=False)
            return visitor

    def logout(self, visitor: str) -> None:
        """End a session."""
        with self._lock:
            self._sessions.pop(visitor, None)
