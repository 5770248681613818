"""The page `/ui` at the port of the operator: login, sessions, the page itself, and its forms."""

import hmac
import math
import secrets
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from threading import Lock
from typing import Any, Protocol
from urllib.parse import parse_qsl

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from holdfast.adaptation.journal import clock, facts_text
from holdfast.core.errors import HoldfastError, UsageError
from holdfast.reports.formats.html import filled
from holdfast.reports.gallery import png, shrunk
from holdfast.reports.words import plain
from holdfast.server.asgi import page_headers, style_sheet
from holdfast.server.keys import ADMIN, ApiKey, KeyFile
from holdfast.server.requests import Refused, wait_first
from holdfast.server.server_setup import FlaggedInput, FlaggedInputs
from holdfast.server.supervisor import Supervisor
from holdfast.server.traffic import KEPT_S, REFUSED, SAMPLE_S, Interval
from holdfast.threats.domains import is_image

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


Json = dict[str, Any]

_PICTURES, _VALUES = 24, 12
"""number of flagged inputs, and of the values of an input that is no image"""
_CLIENTS = 100
"""number of clients in the table"""
_RUNS = 5
"""number of adaptation runs"""
_WIDTH, _HEIGHT = 600, 120
"""size of a chart"""


def login_page(token: str, error: str = "") -> str:
    """Return the page with the form for the key of an operator."""
    return filled("ui-login.html.j2", token=token, error=error)


def operator_page(
    supervisor: Supervisor,
    keys: KeyFile | None,
    operator: Operator,
    token: str,
    *,
    done: str = "",
    error: str = "",
) -> str:
    """Return the page for an operator, with the parts that the operator may read. `done` and `error` are the result of
    the last form.
    """
    live, adaptations, setup = supervisor.live, supervisor.adaptations, supervisor.setup
    stored, approving = operator.may("adapt"), operator.may("adapt", "approve")
    flagged, flagged_error = _pictures(setup.flagged if stored else None)
    intervals, status = supervisor.traffic.intervals(), supervisor.status()
    return filled(
        "ui.html.j2",
        token=token,
        operator=operator.name,
        may={
            "read_numbers": operator.may("metrics", "adapt"),
            "read_inputs": stored,
            "read_runs": approving,
            "approve": operator.may("approve"),
            "swap": operator.may(ADMIN),
        },
        logged_in=keys is not None,
        done=done,
        error=error,
        now=_time(datetime.now(UTC).timestamp()),
        name=setup.worker.name,
        swappable=setup.pool is not None or setup.reloadable,
        status=status,
        served=_served(status["model"]) if setup.pool is None else status.get("pool", {"set": ""}),
        recent=supervisor.traffic.recent(),
        requests_chart=_chart(intervals, ("requests_per_s", "refused_per_s")),
        latency_chart=_chart(intervals, ("p50_s", "p95_s")),
        refusals=supervisor.traffic.by_label(REFUSED),
        rules=supervisor.traffic.by_label("holdfast_rule_fired_total"),
        monitor=None if live is None else live.summary(),
        stores=setup.flagged is not None,
        flagged=flagged,
        flagged_error=flagged_error,
        clients=_clients(setup.flagged, keys) if stored else [],
        ledger=_ledger(supervisor),
        runs=[_run(each) for each in adaptations.runs()[:_RUNS]] if approving else [],
    )


@dataclass(frozen=True)
class Chart:
    """Lines of a chart over the last 15 minutes, in its coordinates, and the largest value."""

    width: int
    height: int
    paths: tuple[str, ...]
    largest: float


def _chart(intervals: Sequence[Interval], names: tuple[str, str]) -> Chart:
    """The chart of two values; an interval without a value interrupts its line."""
    series = [[getattr(interval, name) for interval in intervals] for name in names]
    largest = max((value for values in series for value in values if value is not None), default=0.0)
    step = _WIDTH / (KEPT_S / SAMPLE_S - 1)
    left = _WIDTH - step * (len(intervals) - 1)
    paths = []
    for values in series:
        path, pen = [], "M"
        for place, value in enumerate(values):
            if value is None:
                pen = "M"
                continue
            x, y = left + step * place, _HEIGHT * (1 - value / (largest or 1.0))
            path.append(f"{pen}{x:.1f},{y:.1f}" + ("h.1" if pen == "M" else ""))
            pen = "L"
        paths.append("".join(path))
    return Chart(_WIDTH, _HEIGHT, tuple(paths), largest)


def _pictures(flagged: FlaggedInputs | None) -> tuple[list[Json], str]:
    """The newest flagged inputs, and why they cannot be read."""
    if flagged is None:
        return [], ""
    try:
        return [_picture(each, flagged) for each in flagged.newest(_PICTURES)], ""
    except (HoldfastError, OSError) as error:
        return [], str(error)


def _picture(flagged: FlaggedInput, range_of: FlaggedInputs) -> Json:
    x, picture, values = flagged.x.float(), "", ""
    if is_image(x.shape):
        width = range_of.high - range_of.low
        width = width if math.isfinite(width) and width > 0 else 1.0
        picture = png(shrunk((x - range_of.low) / width))
    else:
        numbers = x.flatten()
        values = ", ".join(plain(value) for value in numbers[:_VALUES].tolist())
        values += f" and {len(numbers) - _VALUES} more" if len(numbers) > _VALUES else ""
    return {
        "request": flagged.request,
        "row": flagged.row,
        "time": _time(flagged.time_s),
        "scores": {rule: plain(score) for rule, score in flagged.scores.items()},
        "picture": picture,
        "values": values,
    }


def _clients(flagged: FlaggedInputs | None, keys: KeyFile | None) -> list[Json]:
    """The clients that have a key or stored inputs, those with most flagged requests first."""
    counts = Counter[str]() if flagged is None else flagged.by_principal()
    rows: list[Json] = []
    for key in () if keys is None else keys.entries:
        pseudonym = "" if flagged is None else flagged.stored.pseudonym(key.name)
        rows.append(
            {
                "name": key.name,
                "pseudonym": pseudonym,
                "scopes": ", ".join(key.scopes),
                "state": key.state,
                "flagged": counts.pop(pseudonym, 0),
            }
        )
    unnamed = "" if flagged is None else flagged.stored.pseudonym("")
    for pseudonym, n in counts.items():
        name = "clients without a key" if pseudonym == unnamed else "unknown"
        rows.append({"name": name, "pseudonym": pseudonym, "scopes": "", "state": "", "flagged": n})
    return sorted(rows, key=lambda row: (-row["flagged"], row["name"]))[:_CLIENTS]


def _served(model: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of the served model: no settings, and only facts with a value."""
    return {key: value for key, value in model.items() if key != "settings" and value not in ("", None)}


def _run(run: Mapping[str, Any]) -> dict[str, Any]:
    """A run of an adaptation with its times and facts as text."""
    steps = [
        {"step": each["step"], "time": clock(each["time"]), "facts": facts_text(each["step"], each["facts"])}
        for each in run["steps"]
    ]
    return {**run, "steps": steps}


def _ledger(supervisor: Supervisor) -> Json | None:
    """The number of sets of a pool by state, and of its epochs and stolen sets; None without a pool."""
    if supervisor.setup.pool is None:
        return None
    ledger = supervisor.setup.pool.pool.ledger
    try:
        states = Counter(str(state) for state in ledger.states.values())
        return {
            **states,
            "entries": ledger.entries,
            "epochs": len(ledger.terms),
            "stolen": len(ledger.exposed()),
        }
    except (HoldfastError, OSError) as error:
        return {"error": str(error)}


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


COOKIE, _PATH = "holdfast_ui", "/ui"
_MOST_BYTES, _MOST_FIELDS = 4096, 8
"""largest size and number of fields of a form"""
_HEADERS = page_headers()
_AGAIN = (
    '<!doctype html><html lang="en"><title>Holdfast</title><meta http-equiv="refresh" content="0; url=/ui">'
)
"""page that loads the page again: after a link of another site, the browser did not send the cookie of the session"""
_DONE = {
    "swap": "The swap or reload was requested.",
    "monitor": "The tests of the monitor were restarted.",
    "approved": "The run was approved.",
    "rejected": "The run was rejected.",
}
"""what the page states after a form, by the parameter `done` of its address"""


def ui_routes(
    supervisor: Supervisor, refuse_other_host: Callable[[Request], None], keys: KeyFile | None
) -> list[Route]:
    """Return the routes of the page. With `keys`, it needs a login, and shows what the key may request."""
    page = _Page(supervisor, refuse_other_host, keys)
    forms = {"/swap": page.swap, "/monitor": page.restart_monitor, "/approval": page.approve}
    return [
        Route(_PATH, page.show, methods=["GET"]),
        Route(f"{_PATH}/style.css", page.style, methods=["GET"]),
        Route(f"{_PATH}/login", page.login, methods=["POST"]),
        Route(f"{_PATH}/logout", page.logout, methods=["POST"]),
        *(Route(f"{_PATH}{path}", page.form(act), methods=["POST"]) for path, act in forms.items()),
    ]


Fields = dict[str, str]


class _Act(Protocol):
    def __call__(self, fields: Fields, operator: Operator) -> str:
        """Carry out a form of an operator, and return the name of its result."""


class _Page:
    """The page of one server."""

    def __init__(
        self, supervisor: Supervisor, refuse_other_host: Callable[[Request], None], keys: KeyFile | None
    ) -> None:
        self.supervisor, self.keys, self.sessions = supervisor, keys, Sessions(keys)
        self._refuse_other_host = refuse_other_host

    # --- pages

    async def show(self, request: Request) -> Response:
        """Return the page, or the form for the key."""
        self._refuse_other_host(request)
        visitor = request.cookies.get(COOKIE, "")
        if not visitor and request.headers.get("sec-fetch-site") in {"cross-site", "same-site"}:
            return HTMLResponse(_AGAIN, headers=_HEADERS)
        operator = self.sessions.operator(visitor)
        known = visitor or self.sessions.new_visitor()
        if operator is None:
            text = login_page(self.sessions.token(known))
        else:
            done = _DONE.get(request.query_params.get("done", ""), "")
            text = await self._text(operator, known, done=done)
        response = HTMLResponse(text, headers=_HEADERS)
        return response if visitor else _with_cookie(response, known)

    async def style(self, request: Request) -> Response:
        """Return the style sheet."""
        self._refuse_other_host(request)
        return Response(style_sheet(), media_type="text/css", headers=_HEADERS)

    async def _text(self, operator: Operator, visitor: str, *, done: str = "", error: str = "") -> str:
        token = self.sessions.token(visitor)
        return await run_in_threadpool(  # it reads files
            operator_page, self.supervisor, self.keys, operator, token, done=done, error=error
        )

    # --- login

    async def login(self, request: Request) -> Response:
        """Begin a session with the key of the form."""
        fields, visitor = await self._fields(request)
        try:
            if self.keys is None:
                raise Refused(409, "the server has no keys, so that its page needs no login; load /ui")
            address = "" if request.client is None else request.client.host
            session = self.sessions.login(fields.get("key", ""), address)
        except Refused as error:
            text = login_page(self.sessions.token(visitor), error.reason)
            return HTMLResponse(text, error.status, {**_HEADERS, **dict(error.headers)})
        return _with_cookie(_back(""), session)

    async def logout(self, request: Request) -> Response:
        """End the session."""
        _, visitor = await self._fields(request)
        self.sessions.logout(visitor)
        return _with_cookie(_back(""), self.sessions.new_visitor())

    # --- forms

    def form(self, act: _Act) -> Callable[..., object]:
        """Return the endpoint of a form, which tests its token and its session, and shows the page again."""

        async def endpoint(request: Request) -> Response:
            fields, visitor = await self._fields(request)
            operator = self.sessions.operator(visitor)
            if operator is None:
                return _back("")  # where the form for the key is
            try:
                done = await run_in_threadpool(act, fields, operator)
            except (UsageError, Refused) as error:
                status = error.status if isinstance(error, Refused) else 409
                text = await self._text(operator, visitor, error=str(error))
                return HTMLResponse(text, status, _HEADERS)
            return _back(done)

        return endpoint

    def swap(self, fields: Fields, operator: Operator) -> str:
        """Swap the parameter set, or reload the model."""
        operator.refuse_other(ADMIN)
        self.supervisor.request_swap("requested by the operator on the page")
        return "swap"

    def restart_monitor(self, fields: Fields, operator: Operator) -> str:
        """Restart the tests of the monitor."""
        operator.refuse_other("adapt")
        if self.supervisor.live is None:
            raise Refused(409, "the server has no monitor; start it with --monitor")
        self.supervisor.live.restart()
        return "monitor"

    def approve(self, fields: Fields, operator: Operator) -> str:
        """Approve or reject an adaptation run."""
        operator.refuse_other("approve")
        decision, adaptations = fields.get("decision", ""), self.supervisor.adaptations
        if decision not in {"approved", "rejected"}:
            raise Refused(409, "no adaptation run waits for an approval")
        adaptations.approve(fields.get("run", ""), decision == "approved", operator.key, operator.name)
        return decision

    async def _fields(self, request: Request) -> tuple[Fields, str]:
        """The fields of a form of this page, and its visitor."""
        self._refuse_other_host(request)
        if request.headers.get("sec-fetch-site", "same-origin") != "same-origin":
            raise Refused(403, "forms of other pages are not accepted")
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > _MOST_BYTES:
                raise Refused(413, f"the form has more than {_MOST_BYTES} bytes")
        try:
            pairs = parse_qsl(body.decode("ascii"), keep_blank_values=True, max_num_fields=_MOST_FIELDS)
        except ValueError as error:
            raise Refused(400, "the form is not encoded as application/x-www-form-urlencoded") from error
        fields, visitor = dict(pairs), request.cookies.get(COOKIE, "")
        self.sessions.refuse_forged(visitor, fields.get("token", ""))
        return fields, visitor


def _back(done: str) -> Response:
    return RedirectResponse(f"{_PATH}?done={done}" if done else _PATH, 303, headers=_HEADERS)


def _with_cookie(response: Response, visitor: str) -> Response:
    # The server speaks HTTP, and would be unreachable with `Secure`; a reverse proxy with TLS adds it.
    response.set_cookie(COOKIE, visitor, max_age=int(SESSION_S), path=_PATH, httponly=True, samesite="strict")
    return response
