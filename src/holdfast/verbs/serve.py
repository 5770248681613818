"""The function `holdfast.serve`, which answers requests to a model over HTTP until it is stopped."""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from holdfast.core.errors import Install, UsageError
from holdfast.runs.engine.progress import Notify, ignore
from holdfast.verbs.configuration import given
from holdfast.verbs.opening.arguments import ModelLike, verb_with
from holdfast.verbs.settings import Serve

if TYPE_CHECKING:
    from holdfast.server.server_setup import ServerSetup

_NEEDED = ("httpcore", "msgspec", "prometheus_client", "starlette", "uvicorn")


@verb_with(Serve)
def serve(model: ModelLike | None = None, *, notify: Notify = ignore, **settings: Any) -> None:
    """Serve a model over the Open Inference Protocol v2 until SIGTERM or Ctrl-C, and then drain.

    `model` is an address, such as that of a pool, `"rotating:pool/"`, or an object that can be pickled; options for
    opening it are given with `holdfast.open_model`. With `proxy`, the URL of a server of the same protocol, there is no
    model, and requests are passed on to that server. `guard` is the file of the guard that decides about each request,
    and `input_shape` the shape of one input; both may also be given with `holdfast.open_model`. The other arguments are
    those of `holdfast serve`. `notify` is called with messages, such as the address when requests are answered. Raises
    `UsageError` and `TargetError`.
    """
    Serve(**given(model=model, **settings)).run(notify=notify)


def refuse_missing_extra() -> None:
    """Raise `UsageError` if a package of the extra `serve` is not installed."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"serve needs packages that are not installed: {', '.join(missing)}", Install("serve")
        )


def open_for_serving(settings: Serve) -> "ServerSetup":
    """Open the model that is served, its guard and its keys, and return the setup of the server."""
    if settings.model is None and settings.proxy is None:
        raise UsageError("neither model (what is served) nor proxy (the URL of a server to guard) was given")
    refuse_missing_extra()
    from holdfast.verbs.serve_opening import server_setup

    return server_setup(settings)


def serve_until_stopped(settings: Serve, *, notify: Notify = ignore) -> None:
    """Open what is served, start the workers of a server, and answer requests until SIGTERM or Ctrl-C."""
    setup = open_for_serving(settings)
    from holdfast.server.admin import AdminServer
    from holdfast.server.keys import KeyFile
    from holdfast.server.messages import bound_socket
    from holdfast.server.requests import json_line, log_to_stderr
    from holdfast.server.supervisor import Supervisor
    from holdfast.server.traffic import profile_text

    said, warn, options = notify, notify, setup.settings
    if options.log_format == "json":
        log_to_stderr("json")
        notify = lambda text: said(json_line("info", text))  # noqa: E731
        warn = lambda text: said(json_line("warning", text))  # noqa: E731
    for note in setup.notes:
        notify(f"note: {note}")
    listener = bound_socket(options.admin_host, options.admin_port)
    keys = None if setup.worker.keys is None else KeyFile(setup.worker.keys)
    supervisor = Supervisor(setup, notify, warn)
    admin = AdminServer(supervisor, listener, keys)
    with supervisor.hang_ups():
        try:
            admin.start()
            supervisor.start()
            served = f"http://{_shown(supervisor.address)}/v2/models/{setup.worker.name}"
            notify(f"serving {served} with {options.workers} worker{'s' if options.workers > 1 else ''}")
            notify(f"metrics: http://{_shown(listener.getsockname())}/metrics")
            supervisor.run()
            if options.profile:
                notify(profile_text(supervisor.totals))
            if lost := supervisor.totals.value("holdfast_audit_lost_total"):
                warn(f"note: {lost:,.0f} audit records could not be written")
            notify(f"{'all requests in progress were answered; ' * supervisor.drained}the server has ended")
        finally:
            admin.stop()


def _shown(address: tuple[str, int]) -> str:
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
