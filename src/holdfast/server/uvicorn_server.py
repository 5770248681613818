"""A server of uvicorn as all ports of Holdfast use it: signals, logs and websockets are left out."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

import uvicorn


class UvicornServer(uvicorn.Server):
    """A server of uvicorn, which leaves signals to its process unless `ends_by_signals`."""

    ends_by_signals = False

    @classmethod
    def of(cls, app: Any, protocol: Any = "auto", *, drain_s: float = 1.0, **settings: Any) -> Self:
        """Return a server of an ASGI application, which gets `drain_s` seconds for the requests in progress at the
        end.
        """
        return cls(
            uvicorn.Config(
                app,
                http=protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=max(1, round(drain_s)),
                **settings,
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Let Ctrl-C and SIGTERM end the server without an error while it runs, if they do."""
        if not self.ends_by_signals or threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: FrameType | None) -> None:
            self.should_exit = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
