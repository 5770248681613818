"""Routes of the operator's port for the monitor: its state, labels, and a new beginning; and for the sampled inputs."""

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from holdfast.server.adaptation_routes import Permitted, answer, body_of
from holdfast.server.http_refusals import Refused
from holdfast.server.live_monitor import LiveMonitor
from holdfast.server.supervisor import Supervisor


def monitor_routes(supervisor: Supervisor, reading: Permitted, changing: Permitted) -> list[Route]:
    """Return the routes. `reading` and `changing` decide whether a request is permitted."""

    def live() -> LiveMonitor:
        if supervisor.live is None:
            raise Refused(409, "the server has no monitor; start it with --monitor DATA")
        return supervisor.live

    async def state(request: Request) -> Response:
        reading(request, "metrics", "adapt")
        return answer(await run_in_threadpool(live().summary))

    async def labels(request: Request) -> Response:
        changing(request, "labels")
        given = (await body_of(request)).get("labels")
        if not isinstance(given, dict):
            raise Refused(400, 'labels is no object, as in {"labels": {"REQUEST": [3]}}')
        return answer(live().label(given))

    async def samples(request: Request) -> Response:
        reading(request, "adapt")
        content = await run_in_threadpool(supervisor.samples)
        return Response(content, media_type="application/octet-stream")

    async def restart(request: Request) -> Response:
        changing(request, "adapt")
        live().restart()
        return answer({"restarted": True})

    return [
        Route("/monitor", state, methods=["GET"]),
        Route("/labels", labels, methods=["POST"]),
        Route("/samples", samples, methods=["GET"]),
        Route("/monitor/restart", restart, methods=["POST"]),
    ]
