"""The proxy in front of other servers: our own one, and one of FastAPI with other inputs and outputs."""

import asyncio
import itertools
import json
import os
import signal
import socket
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import numpy as np
import pytest
import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import RedirectResponse, Response

from holdfast.core.errors import TargetError, UsageError
from holdfast.guard.rules import Incoming, NoRules
from holdfast.server.answering_requests import Answerer, Job, ServedSet
from holdfast.server.audit_folder import verify_audit
from holdfast.server.messages import bound_socket
from holdfast.server.protocol_v2 import LENGTH_HEADER
from holdfast.server.proxy import UpstreamAddress, read_upstream
from holdfast.server.requests import Refused
from holdfast.verbs.serve_opening import server_setup
from holdfast.verbs.settings import Serve
from waiting import until

from .small import FEATURES, network
from .test_app import Here, scores
from .test_server import running

X = torch.rand(3, FEATURES, generator=torch.Generator().manual_seed(1))
INFER = "/v2/models/flowers/infer"


@contextmanager
def listening(app, port=0):
    """A server of an ASGI application in a thread, and its URL."""
    listener = bound_socket("127.0.0.1", port)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)
        listener.close()


class Flowers:
    """A server of FastAPI with an input FP64 of open size, features, probabilities FP64, class numbers INT64 and one
    number FP64.

    `script` are the next responses of `infer` that are not those of the model; `seen` are the received requests.
    """

    def __init__(self, batch=-1):
        self.script, self.seen, self.batch = [], [], batch
        self.app = FastAPI()
        self.app.get("/v2/models")(lambda: {"models": ["flowers"]})
        self.app.get("/v2/models/flowers")(self.metadata)
        self.app.post(INFER)(self.infer)

    def metadata(self):
        tensor = {"name": "x", "datatype": "FP64", "shape": [self.batch, FEATURES]}
        return {"name": "flowers", "versions": ["7"], "platform": "other", "inputs": [tensor], "outputs": []}

    def scores(self, rows):
        return torch.softmax(network()(torch.tensor(rows).float()), 1).double()

    async def infer(self, request: Request):
        content = json.loads(await request.body())
        self.seen.append((content, dict(request.headers)))
        if self.script:
            answer = self.script.pop(0)
            return await answer() if answer is _late else answer
        (tensor,) = content["inputs"]
        assert (tensor["name"], tensor["datatype"]) == ("x", "FP64")
        rows = np.array(tensor["data"]).reshape(tensor["shape"])
        if rows.max() > 0.99:
            return Response('{"error": "secret of the upstream"}', 422)
        p = self.scores(rows)
        n = len(p)
        names = {each["name"] for each in content.get("outputs", [])} or {
            "embedding",
            "label",
            "probs",
            "risk",
        }
        outputs = [
            {"name": "embedding", "datatype": "BYTES", "shape": [n], "data": ["a"] * n},
            {"name": "label", "datatype": "INT64", "shape": [n], "data": p.argmax(1).tolist()},
            {"name": "probs", "datatype": "FP64", "shape": [n, 3], "data": p.flatten().tolist()},
            {"name": "risk", "datatype": "FP64", "shape": [n], "data": p[:, 0].tolist()},
        ]
        return {"model_name": "flowers", "outputs": [each for each in outputs if each["name"] in names]}


class Proxied(Here):
    """The application of a proxy in this process."""

    def __init__(self, url, model=None, *, timeout_s=5.0, forwards=(), headers=(), guard=None, **settings):
        self.upstream = read_upstream(UpstreamAddress(url, headers, timeout_s), model, max_rows=8, **settings)
        super().__init__(model=self.upstream.opened(), signature=self.upstream.signature, guard=guard)
        self.served.forwards = forwards

    def infer(self, x, datatype="FP64", **settings):
        name = self.upstream.signature.input_name
        tensor = {"name": name, "shape": [*x.shape], "datatype": datatype, "data": x.flatten().tolist()}
        path = f"/v2/models/{self.upstream.signature.name}/infer"
        return self("POST", path, json={"inputs": [tensor]}, **settings)


@pytest.mark.slow
def test_other_inputs_and_outputs_are_passed_on_unchanged():
    flowers = Flowers()
    with listening(flowers.app) as url:
        here = Proxied(url)
        response = here.infer(X)
        (output,) = response.json()["outputs"]
        expected = flowers.scores(X.tolist())
        assert (output["name"], output["datatype"], output["shape"]) == ("probs", "FP64", [3, 3])
        assert torch.equal(torch.tensor(output["data"], dtype=torch.float64).reshape(3, 3), expected)
        described = here("GET", "/v2/models/flowers/versions/7").json()
        assert described["inputs"] == [{"name": "x", "datatype": "FP64", "shape": [-1, FEATURES]}]
        # all values of float64 arrive, and the padding of other data types does not
        assert here.infer(X.double()).status_code == 200
        assert flowers.seen[-1][0]["inputs"][0]["data"] == X.double().flatten().tolist()

        labels = Proxied(url, "flowers", output="label")
        (output,) = labels.infer(X).json()["outputs"]
        assert output == {
            "name": "label", "datatype": "INT64", "shape": [3], "data": expected.argmax(1).tolist(),
        }  # fmt: skip
        assert labels.infer(X, "FP32").status_code == 400
        with pytest.raises(UsageError, match=r"the outputs embedding \(BYTES\), label"):
            Proxied(url, output="embedding")
        with pytest.raises(UsageError, match="which leaves sizes open|was given"):
            Proxied(url, shape=(5,))


def test_our_own_server_is_an_upstream_server_in_json_and_bytes():
    own = Here()
    with listening(own.app) as url:
        here = Proxied(url, "small")
        assert here.upstream.binary
        expected = own("POST", "/v2/models/small/infer", json=_content(X)).json()["outputs"]
        assert here("POST", "/v2/models/small/infer", json=_content(X)).json()["outputs"] == expected
        head = {
            "name": "input",
            "shape": [3, FEATURES],
            "datatype": "FP32",
            "parameters": {"binary_data_size": 48},
        }
        text = json.dumps({"inputs": [head], "parameters": {"binary_data_output": True}}).encode()
        headers = {"content-type": "application/octet-stream", LENGTH_HEADER: str(len(text))}
        body = text + X.numpy().astype("<f4").tobytes()
        direct, passed = (
            each("POST", "/v2/models/small/infer", content=body, headers=headers) for each in (own, here)
        )
        assert passed.status_code == 200 and passed.content == direct.content


def _content(x):
    return {
        "inputs": [{"name": "input", "shape": [*x.shape], "datatype": "FP32", "data": x.flatten().tolist()}]
    }


def test_a_fixed_batch_is_filled_up():
    flowers = Flowers(batch=4)
    with listening(flowers.app) as url:
        here = Proxied(url)
        x = torch.cat((X, X + 0.001))
        values = here.infer(x).json()["outputs"][0]["data"]
        assert torch.equal(
            torch.tensor(values).double().reshape(6, 3).argmax(1), flowers.scores(x.tolist()).argmax(1)
        )
        assert {tuple(content["inputs"][0]["shape"]) for content, _ in flowers.seen} == {(4, FEATURES)}


async def _late():
    await asyncio.sleep(1.5)
    return Response("{}")


FAILURES = {
    "status 500": (lambda: Response("secret", 500), 502),
    "status 401": (lambda: Response("secret", 401), 502),
    "busy": (lambda: Response("secret", 429), 503),
    "a redirect": (lambda: RedirectResponse("http://127.0.0.1:9/secret", 307), 502),
    "no JSON": (lambda: Response("secret"), 502),
    "no outputs": (lambda: {"secret": 1}, 502),
    "too few rows": (
        lambda: {"outputs": [{"name": "probs", "datatype": "FP64", "shape": [1, 3], "data": [1, 2, 3]}]}, 502,
    ),
    "another output": (
        lambda: {"outputs": [{"name": "other", "datatype": "FP64", "shape": [3, 3], "data": [0] * 9}]}, 502,
    ),
    "deep JSON": (lambda: Response("[" * 100_000), 502),
    "a compressed response": (lambda: Response("secret", headers={"content-encoding": "gzip"}), 502),
    "a large response": (lambda: Response(b" " * 4_000_000), 502),
    "a late response": (lambda: _late, 503),
}  # fmt: skip


@pytest.mark.slow
def test_failures_of_the_upstream_server_give_one_reason():
    flowers = Flowers()
    with listening(flowers.app) as url:
        here = Proxied(url, timeout_s=1.0)
        for name, (answer, status) in FAILURES.items():
            flowers.script = [answer()]
            response = here.infer(X)
            assert (response.status_code, flowers.script) == (status, []), (name, response.text)
            assert list(response.json()) == ["error"] and "secret" not in response.text, name
            assert response.json()["error"].startswith("the upstream server"), name
            assert here.infer(X).status_code == 200, name
        assert (here.infer(X + 1).status_code, here.infer(X).status_code) == (400, 200)


def test_an_input_that_the_upstream_refuses_does_not_fail_other_requests():
    flowers = Flowers()
    with listening(flowers.app) as url:
        upstream = read_upstream(UpstreamAddress(url), None)
        answerer = Answerer(ServedSet(upstream.opened(), "s"), NoRules())
        first, wrong, last = answerer([Job(Incoming(x.double())) for x in (X, X + 1, X[:1])])
        assert isinstance(wrong, Refused) and wrong.status == 400
        assert len(first.scores) == 3 and len(last.scores) == 1
        flowers.script = [Response("", 500)]
        before = len(flowers.seen)
        assert all(r.status == 502 for r in answerer([Job(Incoming(X.double()))] * 3))
        assert len(flowers.seen) == before + 1  # a failure of the server is not repeated for each request


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("model", [None, "flowers"])
def test_an_upstream_that_requires_a_key_is_answered_with_the_header_of_the_key(status, model):
    with (
        listening(Response("", status)) as url,
        pytest.raises(TargetError, match=f"status {status}") as refused,
    ):
        read_upstream(UpstreamAddress(url), model)
    assert "give --upstream-header 'Authorization: env:VARIABLE'" in refused.value.on_command_line()


def test_only_allowed_headers_are_passed_on_with_the_inputs_of_their_client(monkeypatch):
    flowers = Flowers()
    monkeypatch.setenv("UPSTREAM", "Bearer token")
    with listening(flowers.app) as url:
        here = Proxied(url, forwards=("traceparent",), headers=("Authorization: env:UPSTREAM",))
        client = {"traceparent": "00-1", "authorization": "Bearer mine", "cookie": "mine", "x-other": "mine"}
        assert here.infer(X, headers=client).status_code == 200
        received = flowers.seen[-1][1]
        assert (received["traceparent"], received["authorization"]) == ("00-1", "Bearer token")
        assert "mine" not in str(received)
        answers = here.answering([Job(Incoming(x[None].double()), forwarded=(("traceparent", t),))
                                  for x, t in zip(X, "aba", strict=True)])  # fmt: skip
        assert [(h["traceparent"], c["inputs"][0]["shape"][0]) for c, h in flowers.seen[-2:]] == [
            ("a", 2),
            ("b", 1),
        ]
        expected = flowers.scores(X.double().tolist())
        assert torch.allclose(torch.cat([answer.scores for answer in answers]), expected)
        monkeypatch.delenv("UPSTREAM")
        with pytest.raises(UsageError, match="the variable UPSTREAM of the header Authorization is not set"):
            Proxied(url, headers=("Authorization: env:UPSTREAM",))


def test_an_upstream_server_that_restarts_is_used_again():
    own = Here()
    with listening(own.app) as url:
        here = Proxied(url, "small")
        assert here("POST", "/v2/models/small/infer", json=_content(X)).status_code == 200
    lost = here("POST", "/v2/models/small/infer", json=_content(X))
    assert (lost.status_code, lost.json()) == (503, {"error": "the upstream server cannot be reached"})
    assert lost.headers["retry-after"]
    with pytest.raises(TargetError, match=r"cannot be reached; check that the server runs"):
        Proxied(url, "small")
    with listening(own.app, int(url.rpartition(":")[2])):
        assert here("POST", "/v2/models/small/infer", json=_content(X)).status_code == 200


OK = b"HTTP/1.1 200 OK\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
LATE, LARGE = (503, "did not answer in time"), (502, "returned a response that is too large")
SLOW = {
    "nothing": ([], LATE),
    "informational responses": (itertools.repeat(CONTINUE), LATE),
    "early hints": (itertools.repeat(b"HTTP/1.1 103 Early Hints\r\nx: y\r\n\r\n"), LATE),
    "headers": (itertools.chain([OK], itertools.repeat(b"x: y\r\n")), LATE),
    "a header": (itertools.chain([OK, b"x: "], itertools.repeat(b"y")), LATE),
    "a body": (itertools.chain([OK + b"content-length: 9999\r\n\r\n"], itertools.repeat(b"x")), LATE),
    "chunks": (itertools.chain([OK + b"transfer-encoding: chunked\r\n\r\n"], itertools.repeat(b"1\r\nx\r\n")), LATE),
    "trailers": (
        itertools.chain([OK + b"transfer-encoding: chunked\r\n\r\n0\r\n"], itertools.repeat(b"x: y\r\n")), LATE,
    ),
    "many informational responses": ([CONTINUE * 100_000], LARGE),
    "many headers": ([OK + b"x: y\r\n" * 100_000], LARGE),
    "a large body": ([OK + b"content-length: 9999999\r\n\r\n" + b"x" * 9_999_999], LARGE),
}  # fmt: skip


@contextmanager
def sending(parts, pause_s=0.02):
    """A server that answers each request with these bytes, and its URL. `requests` are those that it received."""
    stopped, requests = threading.Event(), []

    def answer(connection):
        with connection, suppress(OSError):
            while received := connection.recv(65_536):
                requests.append(received)
                for part in parts:
                    connection.sendall(part)
                    if stopped.wait(pause_s):
                        return

    def accept():
        with suppress(OSError):
            while True:
                threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", requests
        finally:
            stopped.set()
            listener.shutdown(socket.SHUT_RDWR)


class Doubled(BaseHTTPRequestHandler):
    """A server that answers every request for scores with two responses on one connection."""

    protocol_version = "HTTP/1.1"
    shape = (1, 3)

    def written(self, content):
        body = json.dumps(content).encode()
        self.wfile.write(OK + f"content-length: {len(body)}\r\n\r\n".encode() + body)

    def do_GET(self):
        tensors = [{"name": "x", "datatype": "FP64", "shape": [-1, FEATURES]}]
        self.written({"name": "m", "versions": ["1"], "inputs": tensors, "outputs": []})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        rows = len(request["inputs"][0]["data"]) // FEATURES
        for row in ([0.2, 0.3, 0.5], [0.9, 0.05, 0.05]):
            output = {"name": "y", "datatype": "FP64", "shape": self.shape, "data": row * rows}
            self.written({"id": request["id"], "outputs": [output]})

    def log_message(self, *arguments):
        pass


@contextmanager
def answering(handler):
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join(60)
        server.server_close()


def test_no_request_receives_the_second_response_to_another_one():
    with answering(Doubled) as url:
        model = read_upstream(UpstreamAddress(url), "m", max_rows=8).opened()
        results = []
        for _ in range(4):
            with suppress(Refused):
                results.append(model(X[:1]).tolist())
        assert results and all(each == [[0.2, 0.3, 0.5]] for each in results)


def test_a_size_that_an_output_leaves_open_is_refused():
    class Open(Doubled):
        shape = (-1, 3)

    with answering(Open) as url, pytest.raises(TargetError, match="returned an invalid response"):
        read_upstream(UpstreamAddress(url), "m", max_rows=8)


@pytest.mark.parametrize("name", SLOW)
def test_one_deadline_and_one_size_apply_to_the_whole_response(name):
    parts, (status, reason) = SLOW[name]
    timeout_s = 0.2 if reason == LATE[1] else 60.0
    with sending(parts) as (url, _):
        connection = UpstreamAddress(url, timeout_s=timeout_s).connect()
        begin = time.monotonic()
        with pytest.raises(Refused, match=reason) as refused:
            connection.request("/v2", b"{}", most=1_000_000)
        assert refused.value.status == status and time.monotonic() - begin < timeout_s + 60
        with pytest.raises(TargetError, match=reason):  # also at the start
            read_upstream(UpstreamAddress(url, timeout_s=timeout_s), "m")


def test_the_deadline_applies_to_a_server_that_reads_slowly_and_to_the_name_server(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(Refused, match=LATE[1]):
            UpstreamAddress(url, timeout_s=0.1).connect().request("/v2", bytes(50_000_000))
    ended = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **settings: ended.wait(60) and [])
    with pytest.raises(Refused, match=LATE[1]):
        UpstreamAddress("http://somewhere", timeout_s=0.1).connect().request("/v2")
    ended.set()


def test_no_cookie_is_stored():
    body = OK + b"set-cookie: s=1; path=/\r\ncontent-length: 2\r\n\r\n{}"
    with sending([body]) as (url, requests):
        connection = UpstreamAddress(url).connect()
        for _ in range(2):
            assert connection.json("/v2") == {}
    assert len(requests) == 2 and not any(b"cookie" in request.lower() for request in requests)


@pytest.mark.parametrize("value", [b"\xe9", b"a\x80", b"a\x01b", b"\x7f"])
def test_a_header_that_cannot_be_sent_is_refused(monkeypatch, value):
    flowers = Flowers()
    with listening(flowers.app) as url:
        here = Proxied(url, forwards=("traceparent",))
        response = here.infer(X, headers=[(b"traceparent", value)])
        assert (response.status_code, response.json()) == (
            400, {"error": "the header traceparent contains other characters than printable ASCII"},
        )  # fmt: skip
        assert here.infer(X, headers=[(b"other", value)]).status_code == 200
        monkeypatch.setenv("TOKEN", os.fsdecode(value))
        with pytest.raises(UsageError, match="TOKEN of the header Authorization contains other characters"):
            UpstreamAddress(url, ("Authorization: env:TOKEN",)).connect()


@pytest.mark.parametrize(
    "metadata",
    [[], 7, {"inputs": 5}, {"inputs": "x"}, {"inputs": [[]]}, {"inputs": [{"name": "x", "datatype": "FP32"}]},
     {"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 1e999]}]},
     {"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 10**12]}]},
     {"inputs": [{"name": "x", "datatype": "FP32", "shape": [10**12, 2]}]},
     {"inputs": [{"name": "x", "datatype": "FP32", "shape": "12"}]},
     {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1.5, 2]}]},
     {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1] * 65}]}],
)  # fmt: skip
def test_metadata_of_another_form_are_refused_as_such(metadata):
    body = json.dumps(metadata).encode()
    with (
        sending([OK + b"content-length: %d\r\n\r\n" % len(body) + body]) as (url, _),
        pytest.raises((TargetError, UsageError), match=r"in an unknown form|at most 16,777,216 values"),
    ):
        read_upstream(UpstreamAddress(url), "m")


GUARD = """
inputs: {{shape: [{features}], dtype: {dtype}}}
outputs: {outputs}
rules: {rules}
state: {{at: memory}}
"""


def setup(tmp_path, url, *, rules="{range: {}}", dtype="float64", outputs="probability", **settings):
    guard = tmp_path / "guard.yaml"
    guard.write_text(GUARD.format(features=FEATURES, dtype=dtype, outputs=outputs, rules=rules))
    values = {"proxy": url, "guard": str(guard), "port": 0, "admin_port": 0, **settings}
    return server_setup(Serve(**values))


def test_the_guard_is_compared_with_the_upstream_model(tmp_path):
    flowers = Flowers()
    with listening(flowers.app) as url:
        worker = setup(tmp_path, f"{url}/v2/models/flowers", rules="{energy: {threshold: 0}}").worker
        assert (worker.name, worker.signature.version, worker.signature.classes) == ("flowers", "7", 3)
        named = setup(tmp_path, f"{url}/v2/models/flowers/", name="plants", model_version="2").worker
        assert (named.name, named.signature.version) == ("plants", "2")
        wrong = {
            "inputs.dtype is float32, and the upstream model takes float64": {"dtype": "float32"},
            "set outputs to probability": {"outputs": "logit", "rules": "{energy: {threshold: 0}}"},
            "need scores, and the upstream model returns class numbers": {
                "upstream_output": "label", "rules": "{energy: {threshold: 0}}",
            },
            "scores is labels, which needs a score for each class": {
                "upstream_output": "risk", "scores": "labels",
            },
            "every, mean belong to a model of this server": {"every": ["1h"], "mean": [0.5]},
            "which contains the keys of this server": {"keys": "keys.json", "forward_headers": ["Authorization"]},
            "Host, which each connection sets": {"forward_headers": ["Host"]},
        }  # fmt: skip
        for message, settings in wrong.items():
            with pytest.raises(UsageError, match=message):
                setup(tmp_path, url, **settings)
    for address in ("ftp://here", "http://", "http://user:word@here", "http://here?x=1", "here:80"):
        with pytest.raises(UsageError, match="proxy"):
            setup(tmp_path, address)


@pytest.mark.slow
def test_workers_are_replaced_although_the_upstream_server_has_ended(tmp_path):
    own = Here()
    with listening(own.app) as url:
        prepared = setup(tmp_path, url, dtype="float32", outputs="logit", audit=str(tmp_path / "audit"))
        expected = scores(own.infer(X))
        port = int(url.rpartition(":")[2])
    with running(prepared) as (server, proxy, _):
        assert httpx.post(proxy, json=_content(X)).status_code == 503
        os.kill(server.status()["workers"][0]["pid"], signal.SIGKILL)
        until(lambda: server.totals.value("holdfast_worker_restarts_total") == 1)
        until(lambda: server.status()["ready"])
        with listening(own.app, port):
            response = httpx.post(proxy, json=_content(X))
            assert torch.equal(scores(response).reshape(expected.shape), expected)
    verified = verify_audit(tmp_path / "audit")
    assert (verified.open, verified.answered) == (0, 1)
