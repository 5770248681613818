"""Routes of the operator's port for `holdfast adapt`: the steps of a run, the canary, and the approval."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from holdfast.server.canary import Candidate
from holdfast.server.http_refusals import Refused
from holdfast.server.protocol_v2 import JSON, compact
from holdfast.server.supervisor import Supervisor

Permitted = Callable[[Request], str]
"""function that returns the principal of a request, or raises `Refused` if it is not permitted"""
MOST_BODY = 1 << 20
"""largest number of bytes of a request to the operator's port"""


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
    adaptations, canary = supervisor.adaptations, supervisor.canary

    async def runs(request: Request) -> Response:
        reading(request)
        return answer({"runs": adaptations.runs()})

    async def step(request: Request) -> Response:
        changing(request)
        body = await body_of(request)
        adaptations.took(body.get("run"), body.get("step"), body.get("facts", {}))
        if body.get("ended") is True:
            adaptations.release(body.get("run"))
        return answer({"run": body.get("run")})

    async def begin(request: Request) -> Response:
        changing(request)
        body = await body_of(request)
        run = adaptations.refuse_other(body.get("run"))
        model, digest = body.get("model"), body.get("digest")
        if not isinstance(model, str) or not isinstance(digest, str):
            raise Refused(400, "model (the path of a file) or digest (that of the model in it) is missing")
        canary.request(Candidate(run, model, digest))
        return answer({"requested": True}, 202)

    async def end(request: Request) -> Response:
        changing(request)
        canary.end("requested by the operator")
        return answer({"requested": True}, 202)

    async def approve(request: Request) -> Response:
        principal = changing(request)
        body = await body_of(request)
        adaptations.approve(body.get("run"), body.get("approved"), principal)
        return answer({"run": body.get("run"), "approved": body.get("approved")})

    return [
        Route("/adaptation", runs, methods=["GET"]),
        Route("/adaptation", step, methods=["POST"]),
        Route("/canary", begin, methods=["POST"]),
        Route("/canary", end, methods=["DELETE"]),
        Route("/approval", approve, methods=["POST"]),
    ]
