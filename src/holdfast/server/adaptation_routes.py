"""Routes of the operator's port for `holdfast adapt`: the steps of a run, the canary, and the approval."""

import json
from collections.abc import Mapping
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from holdfast.server.generation import Candidate
from holdfast.server.http_refusals import Refused
from holdfast.server.keys import ApiKey
from holdfast.server.protocol_v2 import JSON, compact
from holdfast.server.supervisor import Supervisor

MOST_BODY = 1 << 20
"""largest number of bytes of a request to the operator's port"""


class Permitted(Protocol):
    """Decides whether a request is permitted."""

    def __call__(self, request: Request, *scopes: str) -> ApiKey | None:
        """Return the key of a request, None on a server without keys. Raises `Refused` for a key without any of the
        scopes.
        """


async def body_of(request: Request) -> Mapping[str, Any]:
    """Return the JSON object in the body of a request. Raises `Refused` if there is none."""
    content = b""
    async for piece in request.stream():
        content += piece
        if len(content) > MOST_BODY:
            raise Refused(413, f"the body has more than {MOST_BODY} bytes")
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise Refused(400, "the body is no JSON object")
    return body


def answer(content: Mapping[str, Any], status: int = 200) -> Response:
    """Return a response with a JSON object."""
    return Response(compact(content), status, media_type=JSON)


def adaptation_routes(supervisor: Supervisor, reading: Permitted, changing: Permitted) -> list[Route]:
    """Return the routes. `reading` and `changing` decide whether a request is permitted."""
    adaptations, weights = supervisor.adaptations, supervisor.weights

    async def runs(request: Request) -> Response:
        reading(request, "adapt", "approve")
        return answer({"runs": adaptations.runs()})

    async def step(request: Request) -> Response:
        key = changing(request, "adapt")
        body = await body_of(request)
        adaptations.took(body.get("run"), body.get("step"), body.get("facts", {}), key)
        if body.get("ended") is True:
            adaptations.release(body.get("run"))
        return answer({"run": body.get("run")})

    async def begin(request: Request) -> Response:
        key = changing(request, "adapt")
        body = await body_of(request)
        run = adaptations.note_request(body.get("run"), key)
        model, digest = body.get("model"), body.get("digest")
        if not isinstance(model, str) or not isinstance(digest, str):
            raise Refused(400, "model (the path of a file) or digest (that of the model in it) is missing")
        weights.request_canary(Candidate(run, model, digest))
        return answer({"requested": True}, 202)

    async def end(request: Request) -> Response:
        changing(request, "adapt")
        weights.end_canary("requested by the operator")
        return answer({"requested": True}, 202)

    async def reload(request: Request) -> Response:
        key = changing(request, "adapt")
        run = adaptations.note_request((await body_of(request)).get("run"), key)
        if not supervisor.setup.reloadable:
            raise Refused(409, "the server does not serve a file that could be reloaded")
        supervisor.request_swap(f"requested by the run {run}")
        return answer({"requested": True}, 202)

    async def approve(request: Request) -> Response:
        key = changing(request, "approve")
        body = await body_of(request)
        adaptations.approve(body.get("run"), body.get("approved"), key)
        return answer({"run": body.get("run"), "approved": body.get("approved")})

    return [
        Route("/adaptation", runs, methods=["GET"]),
        Route("/adaptation", step, methods=["POST"]),
        Route("/canary", begin, methods=["POST"]),
        Route("/canary", end, methods=["DELETE"]),
        Route("/reload", reload, methods=["POST"]),
        Route("/approval", approve, methods=["POST"]),
    ]
