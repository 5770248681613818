"""A model behind HTTP on this machine that counts the rows that it is sent, as a provider would bill them."""

import contextlib
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

import numpy as np

Array = np.ndarray[Any, Any]


class CountingServer:
    """Serves a function from rows (n, features) to scores (n, classes) by the Open Inference Protocol.

    `shape` is that of one row in a request; with a `batch`, a request has so many rows. `labels` answers with class
    numbers. Each answer takes `delay` seconds.
    """

    def __init__(
        self,
        model: Callable[[Array], Array],
        shape: tuple[int, ...],
        *,
        datatype: str = "FP32",
        batch: int = -1,
        labels: bool = False,
        delay: float = 0.0,
        port: int = 0,
    ) -> None:
        self.model, self.labels, self.delay = model, labels, delay
        self.sizes: list[int] = []
        self.dead = False
        kind = "INT64" if labels else datatype
        self.metadata = {
            "name": "m",
            "platform": "numpy",
            "inputs": [{"name": "x", "datatype": datatype, "shape": [batch, *shape]}],
            "outputs": [{"name": "z", "datatype": kind, "shape": [batch, -1]}],
        }
        handler = type("Handler", (_Handler,), {"owner": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    @property
    def rows(self) -> int:
        """Rows of all requests that were answered."""
        return sum(self.sizes)

    @property
    def url(self) -> str:
        """The address of the model."""
        return f"http://127.0.0.1:{self.port}/v2/models/m"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def die(self) -> None:
        """Answer nothing more, and hang up on whoever asks, as a process that was killed."""
        self.dead = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    owner: CountingServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def handle(self) -> None:
        """The requests of one connection, which the client may cut off."""
        with contextlib.suppress(ConnectionError):
            super().handle()

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """What the model takes and returns."""
        self._say(self.owner.metadata)

    def do_POST(self) -> None:
        """The answer to some rows."""
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["inputs"][0]
        rows = np.asarray(sent["data"], dtype=np.float32).reshape(sent["shape"])
        time.sleep(self.owner.delay)
        if self.owner.dead:
            self.close_connection = True
            return
        scores = self.owner.model(rows)
        found = scores.argmax(1)[:, None] if self.owner.labels else scores
        kind = "INT64" if self.owner.labels else "FP32"
        output = {"name": "z", "datatype": kind, "shape": list(found.shape), "data": found.flatten().tolist()}
        self.owner.sizes.append(len(rows))
        self._say({"model_name": "m", "outputs": [output]})

    def _say(self, content: object) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
