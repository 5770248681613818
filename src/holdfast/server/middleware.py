"""ASGI middleware that puts a guard in front of the routes of an application, such as one of FastAPI or Starlette."""

import asyncio
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from holdfast.core.errors import UsageError
from holdfast.guard.rules import Action, RequestDecision, RequestGuard
from holdfast.server.asgi import (
    ASGIApplication,
    Endpoints,
    GuardedRoutes,
    Message,
    Receive,
    Scope,
    Send,
    WholeResponse,
    replayed,
    whole_body,
)
from holdfast.server.requests import ErrorLog

_FAILED = "the guard failed"
_ACCEPTED = range(200, 300)
_WITHOUT_BODY = ("GET", "HEAD", "OPTIONS")
"""methods of requests that need no body, such as that for a form, or before a request of a page of another site"""
_RETRY_S = b"1"
"""seconds after which a client may send a request again that the guard could not decide about"""


def _nobody(scope: Scope) -> str:
    return ""


@dataclass(eq=False)
class GuardMiddleware:
    """ASGI middleware with a guard, as in `app.add_middleware(holdfast.GuardMiddleware, guard=guard,
    inputs=inputs_of, outputs=outputs_of, paths=["/predict"])`.

    Requests that the router sends to the routes of `paths`, or whose path one of `paths` describes, are guarded. If the
    routes are not known, these are all requests whose path ends with one of `paths`. Others are passed on, and so are
    websockets, and requests of the methods GET, HEAD and OPTIONS without a body. The decision is in the state of the
    request under the name `guard` (`request.state.guard.x` are the inputs after the defence of the guard). A refused
    request gets the status 422 with the reason, or 503 if the state of the query detector could not be reached; scores
    are never returned. Run the middleware inside of those that compress responses or change paths.
    """

    app: ASGIApplication
    guard: RequestGuard
    """guard such as `holdfast.Guard`"""
    inputs: Callable[[bytes], Tensor]
    """function from the body of a request to the inputs (n, *shape). A body for which it raises an error gets the
    status 400"""
    outputs: Callable[[bytes], Tensor]
    """function from the body of a successful response to the outputs (n, classes) of the model"""
    paths: Collection[str] = field(default=("/predict",), kw_only=True)
    """paths of the routes that are guarded, without the query, such as `/predict` or `/models/{name}/predict`"""
    principal: Callable[[Scope], str] = field(default=_nobody, kw_only=True)
    """function from the ASGI scope to the name of the client, such as its verified API key"""
    label_only: Callable[[bytes, Sequence[Action]], bytes] | None = field(default=None, kw_only=True)
    """function that removes the scores from the body of a response where the action is `label_only`, given the action
    of each input; needed for rules with this action"""
    network: Callable[[Tensor], Tensor] | None = field(default=None, kw_only=True)
    """function from inputs to outputs, for detectors that need further forward passes"""
    max_body_bytes: int = field(default=64 * 2**20, kw_only=True)
    """size above which a body is refused with the status 413"""
    fails_open: bool = field(default=False, kw_only=True)
    """whether requests are answered although the guard raised an error; otherwise they get the status 503"""
    errors: ErrorLog = field(default_factory=ErrorLog, kw_only=True)
    """log of the errors of the guard, the logger `holdfast.serve` at a limited rate"""

    _routes: GuardedRoutes = field(init=False)

    def __post_init__(self) -> None:
        if isinstance(self.paths, str) or not self.paths or not all(path[:1] == "/" for path in self.paths):
            raise UsageError(
                f"paths is {self.paths!r}; a list of paths that begin with / was expected, as in ['/predict']"
            )
        self._routes = GuardedRoutes(self.app, self.paths)
        if Action.LABEL_ONLY in self.guard.actions and self.label_only is None:
            raise UsageError(
                "a rule of the guard has the action label_only, and only the application can remove scores from its "
                "responses; give label_only=FUNCTION, or choose another action"
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection of the ASGI server."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        endpoints = self._routes.endpoints(scope)
        if endpoints.router is not None and endpoints.others:
            self.errors("a path of GuardMiddleware is that of no route of the application")
        answer = self._guarded if endpoints.include(scope) else partial(self._passed_on, endpoints)
        refusal = await answer(scope, receive, send)
        if refusal is not None:
            await _respond(send, *refusal)

    async def _passed_on(
        self, endpoints: Endpoints, scope: Scope, receive: Receive, send: Send
    ) -> tuple[int, str] | None:
        """Answer a request that is not guarded, or refuse it if it reaches a guarded route nevertheless, because a
        middleware in between changed its path.
        """
        if not endpoints.calls:
            await self.app(scope, receive, send)
            return None

        async def received() -> Message:
            return {"type": "http.disconnect"} if endpoints.were_reached(scope) else await receive()

        async def sent(message: Message) -> None:
            if not endpoints.were_reached(scope):
                await send(message)

        try:
            await self.app(scope, received, sent)
        except Exception:
            if not endpoints.were_reached(scope):
                raise
        if not endpoints.were_reached(scope):
            return None
        self.errors(
            "a request reached a guarded route by a path that a middleware between it and the guard changes",
            advice="add this middleware outside of GuardMiddleware",
        )
        return 404, "there is nothing at this path"

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> tuple[int, str] | None:
        """Answer a request, or return the status and the reason of a refusal."""
        codings = [value for name, value in scope["headers"] if name.lower() == b"content-encoding"]
        if any(coding.strip().lower() not in (b"", b"identity") for coding in codings):
            return 415, "the body of the request is compressed; send it without compression"
        body = await whole_body(receive, self.max_body_bytes)
        if body is None:
            return 413, f"the body of the request has more than {self.max_body_bytes:,} bytes"
        if not body and scope["method"] in _WITHOUT_BODY:
            await self.app(scope, replayed(body, receive), send)
            return None
        try:
            principal = await asyncio.to_thread(self.principal, scope)
        except Exception:  # noqa: BLE001 - any error of the application's function means an invalid request
            return 400, "the client cannot be determined from the request"
        try:
            x = await asyncio.to_thread(self.inputs, body)
        except Exception:  # noqa: BLE001 - any error of the application's parser means an invalid body
            return 400, "the inputs cannot be read from the body of the request"
        decision = await self._decided(lambda: self.guard.before(x, principal=principal))
        if decision is None and not self.fails_open:
            return 503, _FAILED
        if decision is not None and not decision.answered:
            return 503 if decision.unavailable else 422, decision.refusal
        scope.setdefault("state", {})["guard"] = decision
        response = WholeResponse()
        await self.app(scope, replayed(body, receive), response)
        if decision is None or response.status not in _ACCEPTED:
            await response.send_to(send)
            return None
        return await self._released(decision, response, send)

    async def _released(
        self, decision: RequestDecision, response: WholeResponse, send: Send
    ) -> tuple[int, str] | None:
        """Send the response of the application as far as the final decision allows."""
        final = await self._decided(
            lambda: self.guard.after(decision, self.outputs(response.body), network=self.network)
        )
        if final is None:
            if not self.fails_open:
                return 503, _FAILED
            await response.send_to(send)
            return None
        if final.action is Action.BLOCK:
            return 422, final.refusal
        if final.delay_s:
            await asyncio.sleep(final.delay_s)
        refused = [row for row, action in enumerate(final.actions) if action is Action.ABSTAIN]
        if refused:
            return 422, f"no prediction is returned for the inputs {', '.join(map(str, refused))}"
        if Action.LABEL_ONLY in final.actions and self.label_only is not None:
            response.replace_body(self.label_only(response.body, final.actions))
        await response.send_to(send)
        return None

    async def _decided(self, decide: Callable[[], RequestDecision]) -> RequestDecision | None:
        """The decision, computed outside of the event loop; None if the guard raised an error."""
        try:
            return await asyncio.to_thread(decide)
        except Exception as error:  # noqa: BLE001 - any error of the guard fails open or closed as configured
            self.errors("the guard failed", error)
            return None


async def _respond(send: Send, status: int, reason: str) -> None:
    body = json.dumps({"error": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 503:
        headers.append((b"retry-after", _RETRY_S))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
