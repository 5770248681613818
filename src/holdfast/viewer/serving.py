"""The server of the pages of runs, and their export as static files."""

import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from holdfast.core.errors import UsageError
from holdfast.runs.store.files import usable
from holdfast.server.asgi import UvicornServer, page_headers
from holdfast.server.requests import HostNames, Refused
from holdfast.viewer.pages import NoPage, Site


def export(site: Site, folder: Path) -> int:
    """Write all pages of a site to a new or empty folder, and return their number. Raises `UsageError` if the folder
    contains files.
    """
    refuse_used(folder)
    site.shelf.check()
    n = 0
    for path in site.paths():
        file = folder / path if path.endswith((".css", ".csv")) else folder / path / "index.html"
        with usable(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(site.page(path).text, encoding="utf-8")
        n += 1
    return n


def refuse_used(folder: Path) -> None:
    """Raise `UsageError` if the folder of an export contains files, or is a file."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            f"export is {str(folder)!r}, which contains files; a new or empty folder was expected"
        )


HOST = "127.0.0.1"
"""the only address of the server, because the pages have no login"""
_PAUSE_S = 5.0
"""pause between two searches for new runs"""
_HEADERS = page_headers()
_REPORT_HEADERS = page_headers("'unsafe-inline'")
"""headers of a report, which contains its style sheet, and a policy with its hash that is stricter than this one"""


def site_application(site: Site) -> Starlette:
    """Return the ASGI application that answers GET requests with the pages of a site."""

    async def answer(request: Request) -> Response:
        try:
            HostNames().refuse_other(request.scope["headers"])
        except Refused as error:
            raise HTTPException(
                error.status, "the name in the header Host is not that of this computer"
            ) from error
        path = request.path_params["path"]
        # a page of another site could otherwise keep the processor busy
        if path.endswith("/why") and request.headers.get("sec-fetch-site") == "cross-site":
            raise HTTPException(403, "explanations are not computed for links of other sites")
        try:
            page = await run_in_threadpool(site.page, path, request.query_params)
        except NoPage as error:
            raise HTTPException(404, "there is nothing at this path") from error
        return Response(
            page.text, media_type=page.media, headers=_REPORT_HEADERS if page.complete else _HEADERS
        )

    async def refused(request: Request, error: Exception) -> Response:
        known = isinstance(error, HTTPException)
        status, detail = (error.status_code, error.detail) if known else (500, "internal error")  # type: ignore[attr-defined]
        return PlainTextResponse(f"{detail}\n", status, _HEADERS)

    handlers: dict[Any, Any] = {HTTPException: refused, Exception: refused}
    return Starlette(routes=[Route("/{path:path}", answer, methods=["GET"])], exception_handlers=handlers)


def serve_site(site: Site, listener: socket.socket, started: Callable[[], None] = lambda: None) -> None:
    """Answer requests until Ctrl-C or SIGTERM. `started` is called when the port is open.

    Another thread computes the verdicts of the runs from their columns meanwhile.
    """
    server = UvicornServer.of(site_application(site))
    server.ends_by_signals = True
    stop = threading.Event()
    checking = threading.Thread(target=_check, args=(site, stop), name="check", daemon=True)
    checking.start()
    started()
    try:
        server.run(sockets=[listener])
    finally:
        stop.set()
        listener.close()
        checking.join()


def _check(site: Site, stop: threading.Event) -> None:
    """Compute the verdicts of new runs every few seconds."""
    while not stop.is_set():
        site.shelf.check(stop)
        stop.wait(_PAUSE_S)
