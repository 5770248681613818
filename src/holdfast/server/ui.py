"""The page `/ui` at the port of the operator: login, the page itself, and its forms."""

from collections.abc import Callable
from typing import Protocol
from urllib.parse import parse_qsl

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from holdfast.core.errors import UsageError
from holdfast.server.asgi import page_headers, style_sheet
from holdfast.server.keys import ADMIN, KeyFile
from holdfast.server.requests import Refused
from holdfast.server.supervisor import Supervisor
from holdfast.server.ui_page import login_page, operator_page
from holdfast.server.ui_sessions import SESSION_S, Operator, Sessions

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
