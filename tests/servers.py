"""A small network behind a real server on this machine, that counts what it is asked and fails as it is told."""

import contextlib
import gzip
import json
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

FEATURES, CLASSES = 6, 3
NAMES = ("cat", "dog", "emu")
FLOATS = ("FP32", [-1, FEATURES], "FP32", [-1, CLASSES])


def network(x):
    """Scores of rows (n, features), with a kink so that no attack is trivial."""
    g = np.random.default_rng(5)
    first, last = g.normal(size=(FEATURES, 8)), g.normal(size=(8, CLASSES))
    return np.maximum((np.asarray(x, dtype=np.float64).reshape(len(x), -1) - 0.5) @ first, 0) @ last


def examples(n=24, seed=0):
    """Inputs and the labels that the network gives them, two of them wrong."""
    x = np.random.default_rng(seed).uniform(0.1, 0.9, size=(n, FEATURES)).astype(np.float32)
    y = network(x).argmax(1)
    y[:2] = (y[:2] + 1) % CLASSES
    return x, y


class Server:
    """Serves the network as `/v2/models/small`, as `/predict` and as `/classify`; `script` holds what goes wrong next.

    Each entry of the script is spent on one POST: a status, a status with headers, or the name of a method of
    `_Handler`. `form` makes the answer of every path from the scores. A request holds its rows as `instances`, one
    example as `one`, or a tensor as `inputs`.
    """

    def __init__(
        self,
        script=(),
        *,
        metadata=None,
        port=0,
        dies_after=None,
        most=None,
        refuses=None,
        delay=0.0,
        key=None,
        form=None,
    ):
        self.script, self.dies_after, self.most = list(script), dies_after, most
        self.form = form
        self.refuses, self.delay, self.key = refuses, delay, key
        self.refused, self.under_way, self.most_under_way, self.counting = 0, 0, 0, threading.Lock()
        tensors = metadata or FLOATS
        self.metadata = {
            "name": "small",
            "platform": "numpy",
            "inputs": [{"name": "x", "datatype": tensors[0], "shape": tensors[1]}],
            "outputs": [{"name": "scores", "datatype": tensors[2], "shape": tensors[3]}],
        }
        self.whole = tensors[2] == "INT64"
        self.rows, self.sizes, self.bodies, self.headers, self.connections = [], [], [], [], 0
        self.release = threading.Event()
        handler = type("Handler", (_Handler,), {"served": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # a client that hung up
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.005,), daemon=True)
        self._thread.start()

    @property
    def host(self):
        return f"127.0.0.1:{self.port}"

    @contextlib.contextmanager
    def counted(self):
        """While a request is under way."""
        with self.counting:
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            time.sleep(self.delay)
            yield
        finally:
            with self.counting:
                self.under_way -= 1

    def url(self, path="/v2/models/small"):
        return f"http://{self.host}{path}"

    def asked(self, x, radius):
        """How often each example of `x` was asked for, by the clean input that a row is near; the rest under None."""
        seen = Counter()
        for row in self.rows:
            far = np.abs(x - np.asarray(row)).max(1)
            seen[int(far.argmin()) if far.min() <= radius * 1.001 else None] += 1
        return seen

    def stop(self):
        self.release.set()
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def setup(self):
        super().setup()
        self.served.connections += 1

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.served.headers.append(dict(self.headers))
        if "/v2/models/small" not in self.path:
            return self.say(404, {"error": "unknown model"})
        return self.say(200, self.served.metadata)

    def do_POST(self):
        served = self.served
        if served.script == ["refuse_unread"]:
            self.say(413, {"error": "too long"})
            self.connection.shutdown(socket.SHUT_WR)
            self.close_connection = True
            return None
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with served.counted():
            return self.respond(body)

    def respond(self, body):
        served = self.served
        served.headers.append(dict(self.headers))
        if served.key is not None and self.headers.get("Authorization") != served.key():
            return self.say(401, {"error": "the token has expired"})
        if served.dies_after is not None and len(served.sizes) >= served.dies_after:
            self.close_connection = True
            return None
        if served.most is not None and len(body["inputs"][0]["data"]) > served.most * FEATURES:
            return self.say(400, {"error": "too many rows"})
        if served.refuses is not None:
            rows = np.asarray(self.flat(body["inputs"][0]))
            if served.refuses(rows).any():
                served.refused += len(rows)
                return self.say(422, {"error": "the content filter refuses a row"})
        trouble = served.script.pop(0) if served.script else None
        if trouble is None:
            return self.say(200, self.answer(body))
        if isinstance(trouble, int):
            return self.say(trouble, {"error": f"refused {self.headers.get('Authorization')}"})
        if isinstance(trouble, tuple):
            return self.say(trouble[0], {"error": "busy"}, trouble[1])
        return getattr(self, trouble)(body)

    def answer(self, body):
        rows = self.given(body)
        with self.served.counting:
            self.served.rows += np.asarray(rows).reshape(len(rows), -1).tolist()
            self.served.sizes.append(len(rows))
            self.served.bodies.append(body)
        scores = network(rows)
        if self.served.form is not None:
            return self.served.form(scores)
        if self.path == "/predict":
            return {"predictions": [{"scores": row} for row in scores.tolist()]}
        if self.path == "/name":
            return {"classes": [NAMES[number] for number in scores.argmax(1)]}
        if self.path == "/classify":
            return {"classes": scores.argmax(1).tolist()}
        found = scores.argmax(1) if self.served.whole else scores
        tensor = {"name": "scores", "shape": list(found.shape), "data": found.flatten().tolist()}
        return {"model_name": "small", "outputs": [tensor]}

    def given(self, body):
        if "one" in body:
            return [body["one"]]
        return body["instances"] if "instances" in body else self.flat(body["inputs"][0])

    @staticmethod
    def flat(tensor):
        return np.reshape(tensor["data"], tensor["shape"])

    def say(self, status, content, headers=None):
        self.send(status, json.dumps(content).encode(), headers or {})

    def send(self, status, data, headers=None, *, length=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(data)
            self.wfile.flush()

    def cut(self, body):
        self.send(200, b'{"outputs": [', length=1000)
        self.close_connection = True

    def hang_up(self, body):
        self.close_connection = True

    def slow(self, body):
        self.served.release.wait(60)
        self.close_connection = True

    def patience(self, body):
        self.pour(b"", b"HTTP/1.1 100 Continue\r\n\r\n")

    def trailers(self, body):
        self.pour(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"A: b\r\n")

    def orders(self, body):
        self.say(200, {"\x1b]0;owned\x07" + "long" * 1000: 1})

    def repeats(self, body):
        self.say(200, {"error": f"who is {self.headers['Authorization']}?"})

    def repeats_quoted(self, body):
        self.send(500, json.dumps(self.headers["Authorization"]).replace("/", r"\/").encode())

    def repeats_at_the_end(self, body):
        self.say(200, {"error": "x" * 48 + self.headers["Authorization"]})

    def repeats_at_once(self, body):
        self.wfile.write(f"{self.headers['Authorization']}\r\n\r\n".encode())
        self.close_connection = True

    def pour(self, first, again):
        """A megabyte and more of what never comes to an end."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.write(first + again * (2**20 // len(again)))
            self.wfile.flush()

    def packed(self, body):
        self.send(200, gzip.compress(b" " * 10_000_000), {"Content-Encoding": "gzip"})

    def garbage(self, body):
        self.send(200, b"<html>the proxy says hello</html>")

    def nested(self, body):
        self.send(200, b"[" * 100_000)

    def fewer(self, body):
        self.changed(body, lambda found: found[:-1])

    def more_classes(self, body):
        self.changed(body, lambda found: np.concatenate((found, found[:, :1]), 1))

    def not_a_number(self, body):
        self.changed(body, lambda found: np.where(found == found.max(), np.nan, found))

    def too_large(self, body):
        self.changed(body, lambda found: np.where(found == found.max(), 1e300, found))

    def booleans(self, body):
        self.changed(body, lambda found: found > 0)

    def changed(self, body, change):
        found = change(network(self.flat(body["inputs"][0])))
        tensor = {"name": "scores", "shape": list(found.shape), "data": found.flatten().tolist()}
        self.say(200, {"outputs": [tensor]})
