"""A proxy in front of one server, which counts the rows and the requests that pass.

    python -m benchmarks.servers.counting SERVER_PORT [PORT]

prints both counts after each pause of a second, and needs the standard library alone.
"""

import json
import sys
import threading
import time
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

_OF_ONE_CONNECTION = frozenset(
    {"connection", "keep-alive", "transfer-encoding", "content-length", "host", "date", "server"}
)


class CountingProxy:
    """Passes requests on to a port of this machine; `rows` and `requests` count what was asked by POST."""

    def __init__(self, to: int, port: int = 0) -> None:
        self.to, self.rows, self.requests = to, 0, 0
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def count(self, body: bytes) -> None:
        """Add the rows of one request."""
        with self._lock:
            self.requests += 1
            self.rows += rows_of(json.loads(body))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def rows_of(request: dict) -> int:
    """Rows of a request: by the Open Inference Protocol, or the length of its first list of lists; else one."""
    inputs = request.get("inputs")
    if isinstance(inputs, list) and isinstance(inputs[0], dict):
        return inputs[0]["shape"][0]
    inner = [value for given in request.values() if isinstance(given, dict) for value in given.values()]
    lists = (value for value in (*request.values(), *inner) if isinstance(value, list) and value)
    return next((len(rows) for rows in lists if isinstance(rows[0], list)), 1)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    proxy: CountingProxy

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._pass_on(None)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.proxy.count(body)
        self._pass_on(body)

    def _pass_on(self, body: bytes | None) -> None:
        headers = {
            name: value for name, value in self.headers.items() if name.lower() not in _OF_ONE_CONNECTION
        }
        connection = HTTPConnection("127.0.0.1", self.proxy.to, timeout=60)
        try:
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in _OF_ONE_CONNECTION:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def main() -> None:
    """Count until the process is stopped."""
    with CountingProxy(*map(int, sys.argv[1:])) as proxy:
        print(f"port {proxy.port} passes requests on to {proxy.to}")
        said = 0
        while True:
            before = proxy.requests
            time.sleep(1)
            if said != proxy.requests == before:
                said = proxy.requests
                print(f"{proxy.rows:,} rows in {said:,} requests", flush=True)


if __name__ == "__main__":
    main()
