"""The ASGI middleware guards routes of an application, and discloses nothing but reasons."""

import asyncio
import json
import time

import pytest
import torch

from holdfast.core.errors import UsageError
from holdfast.detectors.energy import Energy
from holdfast.serving.decisions import Action, Mode
from holdfast.serving.guard import UNAVAILABLE_TEXT, GuardPipeline, QueryResult
from holdfast.serving.middleware import GuardMiddleware
from holdfast.serving.rules import InputDefence, InputSchema, Rule

fastapi = pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")


class Client:
    """Sends requests to an ASGI application in this process."""

    def __init__(self, app):
        self.transport = httpx.ASGITransport(app=app)

    def request(self, method, path, **content):
        async def answered():
            async with httpx.AsyncClient(transport=self.transport, base_url="http://test") as client:
                return await client.request(method, path, **content)

        return asyncio.run(answered())

    def post(self, path, **content):
        return self.request("POST", path, **content)


def guard(action=Action.ABSTAIN, **parts):
    """A guard that fires on inputs whose two logits are small."""
    rules = [
        Rule("schema", Mode.ENFORCE, Action.BLOCK, 0.0),
        Rule("range", Mode.ENFORCE, Action.BLOCK, 0.0),
        Rule("energy", Mode.ENFORCE, action, -1.5),
    ]
    return GuardPipeline(
        InputSchema((2,)), {rule.name: rule for rule in rules}, {"energy": Energy()}, **parts
    )


def application(guard, calls, **settings):
    """A FastAPI application whose model returns ten times its inputs."""
    app = fastapi.FastAPI()

    @app.post("/predict")
    async def predict(request: fastapi.Request):
        calls.append(request)
        rows = torch.tensor((await request.json())["x"])
        if rows.sum() == 2.0:
            raise fastapi.HTTPException(418)
        x = rows if request.state.guard is None else request.state.guard.x
        return {"logits": (10 * x).tolist()}

    @app.post("/other")
    async def other(request: fastapi.Request):
        return json.loads(await request.body())

    app.add_middleware(
        GuardMiddleware,
        guard=guard,
        inputs=lambda body: torch.tensor(json.loads(body)["x"]),
        outputs=lambda body: torch.tensor(json.loads(body)["logits"]),
        **settings,
    )
    return Client(app)


def test_requests_are_answered_refused_and_abstained_from():
    calls = []
    client = application(guard(), calls)
    answer = client.post("/predict", json={"x": [[0.5, 0.25]]})
    assert answer.status_code == 200 and answer.json() == {"logits": [[5.0, 2.5]]} and len(calls) == 1
    for body, status, reason in (
        ({"x": [[0.5]]}, 422, "the inputs have the shape (1, 1); expected (n, 2)"),
        ({"x": [[0.5, 2.0]]}, 422, "the inputs contain values outside the range; expected from 0 to 1"),
        ({"y": 1}, 400, "the inputs cannot be read from the body of the request"),
    ):
        refused = client.post("/predict", json=body)
        assert (refused.status_code, refused.json()) == (status, {"error": reason})
    assert len(calls) == 1
    abstained = client.post("/predict", json={"x": [[0.5, 0.25], [0.0, 0.0]]})
    assert (abstained.status_code, abstained.json()) == (
        422,
        {"error": "no prediction is returned for the inputs 1"},
    )
    assert client.post("/predict", json={"x": [[1.0, 1.0]]}).status_code == 418  # an error of the application
    assert client.post("/other", json={"x": 7}).json() == {"x": 7}
    assert client.request("GET", "/predict").status_code == 405


def test_bodies_that_are_compressed_or_too_large_do_not_reach_the_guard():
    calls = []
    client = application(guard(), calls, max_body_bytes=64)
    assert client.post("/predict", content=b" " * 65).status_code == 413
    assert client.post("/predict", content=b"x", headers={"content-encoding": "gzip"}).status_code == 415
    assert not calls


def test_label_only_is_left_to_the_application_and_refused_without_it():
    def labels(body, actions):
        logits = json.loads(body)["logits"]
        return json.dumps(
            [
                row.index(max(row)) if act is Action.LABEL_ONLY else row
                for row, act in zip(logits, actions, strict=True)
            ]
        ).encode()

    client = application(guard(Action.LABEL_ONLY), [], label_only=labels)
    answer = client.post("/predict", json={"x": [[0.0, 0.05], [0.5, 0.25]]})
    assert answer.status_code == 200 and answer.json() == [1, [5.0, 2.5]]
    with pytest.raises(UsageError, match="action label_only"):
        GuardMiddleware(None, guard(Action.LABEL_ONLY), None, None)


def test_a_delay_is_waited_for():
    client = application(guard(Action.DELAY, delay_s=0.2), [])
    began = time.monotonic()
    assert client.post("/predict", json={"x": [[0.0, 0.0]]}).status_code == 200
    assert time.monotonic() - began >= 0.2


def test_the_application_finds_the_defended_inputs_in_the_state():
    client = application(guard(defence=InputDefence(bits=1)), [])
    assert client.post("/predict", json={"x": [[0.9, 0.4]]}).json() == {"logits": [[10.0, 0.0]]}


def test_a_request_that_cannot_be_checked_may_be_sent_again():
    class Lost:
        def score(self, x, principals, sent=None):
            return QueryResult(torch.zeros(len(x)), "closed")

    rules, calls = {"queries": Rule("queries", Mode.ENFORCE, Action.BLOCK, 1.0)}, []
    answer = application(GuardPipeline(InputSchema((2,)), rules, queries=Lost()), calls).post(
        "/predict", json={"x": [[0.5, 0.25]]}
    )
    assert (answer.status_code, answer.json()) == (503, {"error": UNAVAILABLE_TEXT}) and not calls
    assert int(answer.headers["retry-after"]) >= 1


@pytest.mark.parametrize("fails_open", [False, True])
def test_an_error_of_the_guard_refuses_or_answers_as_configured(fails_open):
    class Faulty(GuardPipeline):
        def before(self, x, *, principal=""):
            if principal == "before":
                raise OSError
            return super().before(x, principal=principal)

        def after(self, *parts, **names):
            raise OSError

    faulty = Faulty(guard().schema, guard().rules, guard().detectors)
    for principal in ("before", "after"):
        client = application(faulty, [], fails_open=fails_open, principal=lambda scope, name=principal: name)
        answer = client.post("/predict", json={"x": [[0.5, 0.25]]})
        if fails_open:
            assert answer.json() == {"logits": [[5.0, 2.5]]}
        else:
            assert (answer.status_code, answer.json()) == (503, {"error": "the guard failed"})


def test_a_request_whose_client_disconnects_is_not_given_to_the_guard():
    async def receive():
        return {"type": "http.disconnect"}

    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": "/predict", "method": "POST", "headers": []}
    asyncio.run(GuardMiddleware(None, guard(), None, None)(scope, receive, send))
    assert sent[0]["status"] == 413
