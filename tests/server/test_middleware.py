"""The ASGI middleware guards routes of an application, and discloses nothing but reasons."""

import asyncio
import json
import re
import time
import warnings

import pytest
import torch

from holdfast.core.errors import UsageError
from holdfast.guard.detectors.outputs import Energy
from holdfast.guard.guard import UNAVAILABLE_TEXT, GuardPipeline, QueryResult
from holdfast.guard.rules import Action, InputDefence, InputSchema, Mode, Rule
from holdfast.server.middleware import GuardMiddleware

fastapi = pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")
starlette_requests = pytest.importorskip("starlette.requests")
responses = pytest.importorskip("starlette.responses")
routing = pytest.importorskip("starlette.routing")
starlette_app = pytest.importorskip("starlette.applications").Starlette


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


# --- which requests are guarded


METHODS = ("GET", "POST", "PUT")
BAD, GOOD = [[0.5, 2.0]], [[0.5, 0.25]]  # outside of the range, and within
EVASIONS = (
    "/predict%0A", "/predict%0D%0A", "/predict/", "//predict", "/./predict", "/x/../predict", "/%70redict",
    "/predict%00", "/predict%20", "/predict%09", "/PREDICT", "/predict;x=1", "/predict%2F", "/%2Fpredict",
    "/predict%3Fx", "/predict%23x", "/%5Cpredict", "/predict%E2%80%8B", "/predict%252F", "/%2E/predict",
    "/api/predict", "/api//predict", "/predict?x=1",
)  # fmt: skip


def scores(body):
    return [[10 * value for value in row] for row in json.loads(body or b'{"x": [[1, 1]]}')["x"]]


def model(calls):
    """An endpoint of Starlette, which records the decisions of the guard."""

    async def predict(request):
        body = await request.body()
        calls.append(getattr(request.state, "guard", None))
        return responses.JSONResponse({"logits": scores(body)})

    return predict


async def elsewhere(request):
    return responses.JSONResponse({"other": True})


def starlette(routes, paths, *, between=(), outside=False, **settings):
    """A Starlette application with the guard, and with middlewares between the guard and the routes."""
    app = starlette_app(routes=routes, **settings)
    for middleware in between:
        app.add_middleware(middleware)
    if outside:
        return guarded(app, paths)
    app.add_middleware(guarded, paths=paths)
    return app


def guarded(app, paths):
    return GuardMiddleware(
        app,
        guard(),
        lambda body: torch.tensor(json.loads(body)["x"]),
        lambda body: torch.tensor(json.loads(body)["logits"]),
        paths=paths,
    )


def hidden(app):
    """An ASGI application whose routes cannot be found."""

    async def called(scope, receive, send):
        await app(scope, receive, send)

    return called


def status(app, method, path, content, root_path=""):
    client = Client(app)
    client.transport = httpx.ASGITransport(app=app, root_path=root_path, raise_app_exceptions=False)
    return client.request(method, f"http://test{path}", json=content).status_code


class Lowering:
    """A middleware that changes paths, and whose application has no attribute of the usual name."""

    def __init__(self, app):
        self._inner = app

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http":
            scope["path"] = scope["path"].strip().lower()
        await self._inner(scope, receive, send)


class KnownLowering(Lowering):
    """The same with the attribute `app`."""

    def __init__(self, app):
        super().__init__(app)
        self.app = app


def opaque(calls, *, every=False):
    """An ASGI application without routes, which accepts what resembles its path."""

    async def app(scope, receive, send):
        path = scope["path"].removeprefix(scope["root_path"])
        content = {"other": True}
        if every or re.sub(r"[^a-z]", "", path.lower()) in ("predict", "predictx", "xpredict"):
            request = starlette_requests.Request(scope, receive)
            content = {"logits": scores(await request.body())}
            calls.append(getattr(request.state, "guard", None))
        await responses.JSONResponse(content)(scope, receive, send)

    return app


def fastapi_app(calls, *, prefix="", **settings):
    with warnings.catch_warnings(action="ignore"):  # about root_path
        app, router = fastapi.FastAPI(**settings), fastapi.APIRouter()

    @router.post("/predict")
    @router.post("/v1/{name}/predict")
    async def predict(request: fastapi.Request):
        body = await request.body()
        calls.append(getattr(request.state, "guard", None))
        return {"logits": scores(body)}

    @router.post("/other")
    async def other():
        return {}

    app.include_router(router, prefix=prefix)
    app.mount("/mounted", starlette_app(routes=[routing.Route("/predict", model(calls), methods=["POST"])]))
    app.add_middleware(guarded, paths=[f"{prefix}/predict", "/mounted/predict"])
    return app


def route(calls, path="/predict", methods=("POST",)):
    return routing.Route(path, model(calls), methods=methods)


OTHER = routing.Route("/other", elsewhere, methods=["POST"])
ONE = ["/predict"]


def mounted(c, path="/sub"):
    return routing.Mount(path, routes=[route(c), OTHER])


APPLICATIONS = {
    "route": (lambda c: starlette([route(c), OTHER], ONE), "/predict", "/other"),
    "outside": (lambda c: starlette([route(c), OTHER], ONE, outside=True), "/predict", "/other"),
    "methods": (lambda c: starlette([route(c, methods=METHODS), OTHER], ONE), "/predict", "/other"),
    "parameter": (lambda c: starlette([route(c, "/m/{name}"), OTHER], ["/m/{name}"]), "/m/b", "/other"),
    "value of a parameter": (
        lambda c: starlette([route(c, "/m/{n:int}"), OTHER], ["/m/1"]),
        "/m/01",
        "/other",
    ),
    "typed parameter": (
        lambda c: starlette([route(c, "/m/{n:int}"), OTHER], ["/m/{n:int}"]),
        "/m/7",
        "/other",
    ),
    "mount": (lambda c: starlette([mounted(c)], ["/sub/predict"]), "/sub/predict", "/sub/other"),
    "parameter of a mount": (
        lambda c: starlette([mounted(c, "/{v}")], ["/1/predict"]),
        "/2/predict",
        "/1/other",
    ),
    "within a mount": (
        lambda c: starlette_app(routes=[routing.Mount("/sub", app=starlette([route(c), OTHER], ONE))]),
        "/sub/predict",
        "/sub/other",
    ),
    "mounted application": (
        lambda c: starlette([routing.Mount("/sub", app=opaque(c))], ["/sub/predict"]),
        "/sub/predict",
        "/sub/other",
    ),
    "whole mounted application": (
        lambda c: starlette([routing.Mount("/predict", app=opaque(c, every=True)), OTHER], ["/predict/"]),
        "/predict/x",
        "/other",
    ),
    "host": (
        lambda c: starlette([routing.Host("test", app=routing.Router([route(c), OTHER]))], ONE),
        "/predict",
        "/other",
    ),
    "known middleware": (
        lambda c: starlette([route(c), OTHER], ONE, between=[KnownLowering]),
        "/predict",
        "/other",
    ),
    "unknown middleware": (
        lambda c: starlette([route(c), OTHER], ONE, between=[Lowering]),
        "/predict",
        "/other",
    ),
    "no router": (lambda c: guarded(opaque(c), ONE), "/predict", "/other"),
    "fastapi": (fastapi_app, "/predict", "/other"),
    "fastapi, another path of the function": (fastapi_app, "/v1/a/predict", "/other"),
    "fastapi with a prefix": (lambda c: fastapi_app(c, prefix="/p"), "/p/predict", "/p/other"),
    "fastapi with a mount": (fastapi_app, "/mounted/predict", "/other"),
    "fastapi with a root path": (lambda c: fastapi_app(c, root_path="/api"), "/api/predict", "/api/other"),
}


@pytest.mark.parametrize("name", APPLICATIONS)
def test_no_path_reaches_a_guarded_route_without_the_guard(name):
    create, path, other = APPLICATIONS[name]
    calls = []
    app = create(calls)
    assert status(app, "POST", path, {"x": GOOD}) == 200 and len(calls) == 1
    assert status(app, "POST", path, {"x": BAD}) == 422
    assert status(app, "POST", other, {"y": 1}) == 200
    for evasion in EVASIONS:
        base = path.removeprefix("/api").strip("/")
        changed = evasion.replace("predict", base).replace("PREDICT", base.upper())
        for method, root_path in (("POST", ""), ("POST", "/api"), ("GET", "")):
            status(app, method, changed, {"x": BAD}, root_path)
            assert len(calls) == 1, (method, changed, root_path)


NAMES = (
    "b",
    "%0A",
    "%2E%2E",
    "%2E",
    ";x",
    "b%3Fc",
    "b%23c",
    "%20",
    "%00",
    "b%252Fc",
    "b%5Cc",
    "%E2%80%8B",
    "%253F",
)
VALUES = {
    "unknown router": (
        lambda c: guarded(hidden(starlette_app(routes=[route(c, "/m/{v}/predict")])), ["/m/{v}/predict"]),
        "/m/{}/predict",
    ),
    "unknown router, part of a segment": (
        lambda c: guarded(hidden(starlette_app(routes=[route(c, "/m/{v}:predict")])), ["/m/{v}:predict"]),
        "/m/{}:predict",
    ),
    "unknown router that merges slashes": (
        lambda c: guarded(opaque(c, every=True), ["/m/{v}/predict"]),
        "//m//{}//predict",
    ),
    "mounted application": (
        lambda c: starlette([routing.Mount("/sub", app=opaque(c, every=True))], ["/sub/m/{v}/predict"]),
        "/sub/m/{}/predict",
    ),
    "mounted application, typed parameters": (
        lambda c: starlette([routing.Mount("/{n:int}", app=opaque(c, every=True))], ["/{n:int}/m/{k:int}"]),
        "/7/m/{}",
    ),
}


@pytest.mark.parametrize("name", VALUES)
def test_no_value_of_a_parameter_evades_the_guard(name):
    create, path = VALUES[name]
    calls = []
    app = create(calls)
    assert status(app, "POST", path.format("b"), {"x": GOOD}) == 200 and len(calls) == 1
    for value in NAMES:
        status(app, "POST", path.format(value), {"x": BAD})
        assert len(calls) == 1, value


def with_root_path(calls):
    with warnings.catch_warnings(action="ignore"):
        app = fastapi.FastAPI(root_path="/api")
    app.router.routes.append(route(calls))
    return app


def mounted_twice(c):
    app = opaque(c)
    return [routing.Mount("/m", app=app), routing.Mount("/n", app=app)]


def two_routes(c, pattern):
    return starlette([route(c, "/m/b/predict"), route(c, "/m/predict"), route(c, pattern)], [pattern])


@pytest.mark.parametrize(
    ("create", "path", "expected"),
    [
        (lambda c: guarded(hidden(with_root_path(c)), ONE), "/api/predict", 422),
        (lambda c: guarded(hidden(with_root_path(c)), ONE), "/predict", 422),
        (lambda c: starlette(mounted_twice(c), ["/m/predict"]), "/n/predict", 422),
        (lambda c: two_routes(c, "/m/{name}/predict"), "/m/b/predict", 422),
        (lambda c: two_routes(c, "/m/{name}/predict"), "/m/b/predict%0A", 422),
        (lambda c: two_routes(c, "/m/{name}/predict"), "/m/predict", 200),
        (lambda c: two_routes(c, "/m/{n:int}/predict"), "/m/b/predict", 200),
        (lambda c: starlette([route(c), routing.Mount("/n", app=opaque(c))], ONE), "/n/predict", 200),
        (lambda c: guarded(opaque(c, every=True), ["/m/{name}/predict"]), "/mb/predict", 200),
        (lambda c: guarded(opaque(c), ONE), "/a" * 3000, 422),
    ],
)
def test_the_path_and_the_function_decide_together(create, path, expected):
    calls = []
    assert status(create(calls), "POST", path, {"x": BAD}) == expected
    assert len(calls) == (expected == 200)


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "QUERY", "POST"])
def test_every_method_with_a_body_is_guarded(method):
    calls = []
    app = starlette([route(calls, methods=[method])], ["/predict"])
    assert status(app, method, "/predict", {"x": BAD}) == 422 and calls == []
    client = Client(app)
    empty = client.request(method, "/predict").status_code
    assert empty == (200 if method in ("GET", "HEAD", "OPTIONS") else 400)


def test_paths_that_would_guard_nothing_are_refused_or_logged(caplog):
    for paths in ("/predict", [], ["predict"]):
        with pytest.raises(UsageError, match="a list of paths that begin with /"):
            GuardMiddleware(None, guard(), None, None, paths=paths)
    app = starlette([OTHER], ["/predct"])
    assert status(app, "POST", "/other", {}) == 200
    assert "a path of GuardMiddleware is that of no route" in caplog.text


def test_a_client_that_cannot_be_determined_is_refused():
    def nobody(scope):
        raise KeyError

    calls = []
    client = application(guard(), calls, fails_open=True, principal=nobody)
    assert client.post("/predict", json={"x": GOOD}).status_code == 400 and not calls


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
