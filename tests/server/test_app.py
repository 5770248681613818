"""The application of a worker without sockets: answers, refusals, and what a guard decides."""

import asyncio
import errno
import json
import re
import time
from collections import Counter
from dataclasses import replace

import httpx
import jsonschema
import pytest
import torch
from torch import nn

from holdfast.core.model import Classifier
from holdfast.guard.guard import LOST, UNAVAILABLE_TEXT, GuardPipeline, QueryResult
from holdfast.guard.rules import Action, InputSchema, Mode, NoRules, RowDecision, Rule, Score, release_of
from holdfast.server.answering_requests import Answerer, ChainAudit, ServedSet
from holdfast.server.app import ServedModel, application, openapi_document
from holdfast.server.audit_chain import AuditKey, ChainFile
from holdfast.server.keys import KeyFile, add_key
from holdfast.server.requests import Batcher, ErrorLog, shown
from holdfast.server.telemetry import MetricTotals, Telemetry
from holdfast.server.traffic import OTHER, PARTS, PROFILED, WALL, Profile, profile_text
from holdfast.settings.serve_settings import RequestLimits

from .small import CLASSES, FEATURES, SIGNATURE, network, request

X = torch.rand(2, FEATURES, generator=torch.Generator().manual_seed(1))
INFER = "/v2/models/small/infer"
JSON = {"content-type": "application/json"}


class Rules(NoRules):
    """A guard that takes an action for each input whose first value is above 0.9, before or after the model."""

    def __init__(self, action, *, before=True):
        self.action, self.early = action, before

    def _decided(self, decision):
        rows = [
            RowDecision((Score("first", float(v), bool(v > 0.9), Mode.ENFORCE, self.action),))
            for v in decision.x[:, 0]
        ]
        return replace(decision, rows=tuple(rows), delay_s=0.001)

    def before_many(self, requests):
        decisions = super().before_many(requests)
        return [self._decided(d) for d in decisions] if self.early else decisions

    def after_many(self, decisions, outputs, features=None, *, network=None):
        return list(decisions) if self.early else [self._decided(d) for d in decisions]


class Broken(NoRules):
    """A guard that raises an error."""

    def before_many(self, requests):
        raise ZeroDivisionError


class Here:
    """A client of the application in this process. `signature` and `limits` are those of the model."""

    def __init__(self, *, guard=None, keys=None, limits=None, model=None, signature=SIGNATURE, **settings):
        self.answering = Answerer(ServedSet(model or network(), "s", 1), guard or NoRules(), **settings)
        self.served = ServedModel(
            signature,
            Batcher(self.answering, max_rows=8, max_latency_s=5.0),
            keys,
            None,
            limits or RequestLimits(),
        )
        self.app = application(self.served)

    def __call__(self, method, path, **settings):
        async def send():
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
                return await client.request(method, path, **settings)

        return asyncio.run(send())

    def infer(self, x=X, headers=None, **more):
        return self("POST", INFER, content=request(x, **more), headers={**JSON, **(headers or {})})


def scores(response):
    (output,) = response.json()["outputs"]
    return torch.tensor(output["data"]).reshape(output["shape"])


def error(response):
    """The only content of an error, which contains no path and no trace."""
    assert response.headers["content-type"] == "application/json"
    (key,) = response.json()
    text = response.json()[key]
    assert key == "error" and not re.search(r"Traceback|File|holdfast|0x|/home|\.py", text)
    return response.status_code, text


class Totals(Counter):
    """Counters, as processes count and as the supervisor reads them."""

    def count(self, *key, n=1.0):
        self[key] += n

    def value(self, *key):
        return self[key]


def test_a_profile_measures_each_part_of_each_request():
    here, profile, totals = Here(), Profile(), Totals()
    here.served.timing = here.answering.timing = profile
    assert profile_text(totals) == "profile: no request was answered"
    for _ in range(3):
        here.infer()
    profile.report(totals)
    measured = {part for name, part in (key for key in totals if len(key) == 2) if totals[name, part] > 0}
    assert totals[PROFILED,] == 3 and measured == {*PARTS, OTHER}
    assert re.fullmatch(
        r"profile: 3 requests; .*parsing \d.*, other \d+\.\d{3}; total \d+\.\d{3}", profile_text(totals)
    )


def test_a_part_within_another_one_is_measured_once():
    profile, totals = Profile(), Totals()
    with profile("guard after"), profile("model"):
        time.sleep(0.02)
    profile.report(totals)
    assert totals[WALL, "model"] >= 0.02 > 0.01 > totals[WALL, "guard after"]


def test_scores_are_those_of_the_model():
    here = Here()
    assert torch.equal(scores(here.infer()), network()(X))
    version = here("POST", "/v2/models/small/versions/1/infer", content=request(X), headers=JSON)
    assert torch.equal(scores(version), network()(X))


def test_metadata_and_health():
    here = Here()
    assert here("GET", "/v2/health/live").json() == {"live": True}
    assert here("GET", "/v2/health/ready").json() == {"ready": True}
    assert here("GET", "/v2/models/small").json()["inputs"][0]["shape"] == [-1, FEATURES]
    assert here("GET", "/v2/models/small/versions/1/ready").json() == {"name": "small", "ready": True}
    here.served.readiness.draining = True
    for path in ("/v2/health/ready", "/v2/models/small/ready"):
        assert error(here("GET", path)) == (503, "the server is draining")
    assert here("GET", "/v2/health/live").status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "headers", "body", "expected"),
    [
        ("GET", "/", {}, b"", (404, "there is nothing at this path")),
        ("GET", "/v2/models/other", {}, b"", (404, "there is no model of this name")),
        ("GET", "/v2/models/small/versions/2", {}, b"", (404, "there is no such version of the model")),
        ("GET", INFER, {}, b"", (405, "this method is not supported at this path")),
        (
            "POST",
            INFER,
            {"content-type": "text/plain"},
            b"{}",
            (415, "the content type must be application/json"),
        ),
        (
            "POST",
            INFER,
            {"origin": "http://other"},
            b"{}",
            (415, "the content type must be application/json"),
        ),
        ("POST", INFER, {}, b"{}", (400, "inputs must be a list")),
        ("POST", INFER, {"content-type": ""}, b"{}", (400, "inputs must be a list")),
        (
            "POST",
            INFER,
            {**JSON, "content-encoding": "gzip"},
            b"x",
            (415, "compressed bodies are not accepted"),
        ),
        (
            "POST",
            INFER,
            {**JSON, "content-length": "999999"},
            b"{}",
            (413, "the body is too large; at most "),
        ),
        (
            "POST",
            INFER,
            {**JSON, "inference-header-content-length": "x"},
            b"{}",
            (400, "the header inference"),
        ),
        ("POST", INFER, {"content-type": "text/csv"}, b"1,2", (415, "the content type must be")),
        ("POST", INFER, JSON, b"{", (400, "the body is not valid JSON")),
    ],
)
def test_a_refusal_states_one_reason(method, path, headers, body, expected):
    status, text = error(Here()(method, path, headers=headers, content=body))
    assert status == expected[0] and text.startswith(expected[1])


def test_a_body_without_a_length_is_limited_while_it_arrives():
    here, sent = Here(), []

    async def endless():
        while True:
            sent.append(1)
            yield b" " * 10_000

    assert error(here("POST", INFER, headers=JSON, content=endless()))[0] == 413
    assert len(sent) <= 5 * here.served.max_body // 10_000 + 2  # what is beyond the limit is dropped


def test_a_slow_body_is_refused_and_the_connection_closed():
    async def slow():
        yield b"{"
        await asyncio.sleep(10)

    response = Here(limits=RequestLimits(body_timeout="0.02s"))("POST", INFER, headers=JSON, content=slow())
    assert error(response) == (408, "the body did not arrive in time")
    assert response.headers["connection"] == "close"


def test_keys_are_needed_for_everything_but_health(tmp_path):
    key, admin = (add_key(tmp_path / "keys", name, [name]) for name in ("infer", "admin"))
    here = Here(keys=KeyFile(tmp_path / "keys"))
    for path in ("/v2", "/v2/models/small", "/v2/models/small/ready", "/openapi.json"):
        assert error(here("GET", path))[0] == 401
    assert here("GET", "/v2/health/ready").status_code == 200
    assert error(here.infer())[0] == 401
    assert here.infer(headers={"authorization": f"Bearer {key}"}).status_code == 200
    assert error(here.infer(headers={"authorization": f"Bearer {admin}"}))[0] == 403


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    ("action", "expected"),
    [
        (Action.FLAG, None),
        (Action.DELAY, None),
        (Action.LABEL_ONLY, None),
        (Action.ABSTAIN, (422, "no prediction is returned for input 1")),
        (Action.BLOCK, (422, "the request is refused")),
    ],
)
def test_what_the_guard_decides_is_done(action, expected, before):
    here, x = Here(guard=Rules(action, before=before)), X.clone()
    x[:, 0] = torch.tensor([0.5, 0.95])
    response, logits = here.infer(x), network()(x)
    if expected is not None:
        assert error(response) == expected
        return
    assert "0.95" not in response.text
    if action is Action.LABEL_ONLY:
        logits[1] = nn.functional.one_hot(logits[1].argmax(), CLASSES)
    assert torch.equal(scores(response), logits)


def test_clients_receive_the_digits_of_the_scores_that_are_released():
    logits = network()(X)
    rounded, labels = (Here(release=release_of(detail)).infer() for detail in ("2", "labels"))
    assert torch.equal(scores(rounded), torch.round(logits, decimals=2)) and not torch.equal(
        scores(rounded), logits
    )
    assert torch.equal(scores(labels), nn.functional.one_hot(logits.argmax(1), CLASSES).float())


def test_scores_without_decimal_digits_are_released_unchanged():
    """They are the class numbers of a proxy, and numbers whose product with a power of ten overflows."""
    classes, large = torch.tensor([[3], [1]]), torch.tensor([[-3e38, 0.126]])
    assert torch.equal(release_of("2")(classes), classes)
    assert torch.equal(release_of("2")(large), torch.tensor([[-3e38, 0.13]]))


def test_a_guard_that_fails_refuses_or_answers_as_configured():
    assert error(Here(guard=Broken()).infer()) == (500, "the guard failed")
    assert torch.equal(scores(Here(guard=Broken(), guard_fails_open=True).infer()), network()(X))


class Lost:
    """A query detector whose state cannot be reached."""

    def score(self, x, principals, sent=None):
        return QueryResult(torch.full((len(x),), torch.inf), "closed")


def test_a_request_that_cannot_be_checked_is_no_detection(tmp_path):
    rules = {"queries": Rule("queries", Mode.ENFORCE, Action.BLOCK, 1.0)}
    guard = GuardPipeline(InputSchema((FEATURES,)), rules, queries=Lost())
    chain, telemetry, totals = ChainFile(tmp_path / "chain.jsonl"), Telemetry(), MetricTotals()
    here = Here(guard=guard, audit=ChainAudit(chain, AuditKey(bytes(32))), telemetry=telemetry)
    here.served.telemetry = telemetry
    response = here.infer()
    assert error(response) == (503, UNAVAILABLE_TEXT) and int(response.headers["retry-after"]) >= 1
    totals.follow("worker-1", telemetry.memory)
    assert totals.value("holdfast_refused_total", "state") == 1
    assert totals.value("holdfast_guard_unchecked_total") == len(X)
    for counter in (
        ("holdfast_decisions_total", "allow"),
        ("holdfast_rule_fired_total", "queries", "enforce"),
    ):
        assert totals.value(*counter) == 0
    last = json.loads(chain.path.read_text().splitlines()[-1])["content"]
    assert (last["kind"], last["status"], last["notes"]) == ("failed", 503, {"queries": LOST})


class Infinite(NoRules):
    """A guard with an infinite score, such as that of a detector that overflows."""

    def before_many(self, requests):
        row = RowDecision((Score("first", float("inf"), True, Mode.OBSERVE, Action.FLAG),))
        return [replace(d, rows=(row,) * len(d.x)) for d in super().before_many(requests)]


def test_an_infinite_score_is_recorded(tmp_path):
    chain = ChainFile(tmp_path / "chain.jsonl")
    here = Here(guard=Infinite(), audit=ChainAudit(chain, AuditKey(bytes(32))))
    assert here.infer().status_code == 200
    assert '"first":["inf",true' in chain.path.read_text()


class Brittle(nn.Module):
    """A network that fails for inputs above 0.9, and returns NaN for inputs below 0.1."""

    def forward(self, x):
        if bool((x > 0.9).any()):
            raise RuntimeError("secret path /home/x")
        return torch.where(x[:, :1] < 0.1, torch.nan, x[:, :CLASSES])


@pytest.mark.parametrize("value", [0.95, 0.05])
def test_an_input_on_which_the_model_fails_does_not_affect_others(value):
    here = Here(model=Classifier(Brittle()))
    bad, good = torch.full((1, FEATURES), value), torch.full((1, FEATURES), 0.5)

    async def both():
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(here.app), base_url="http://here"
        ) as client:
            posts = [client.post(INFER, content=request(x), headers=JSON) for x in (good, bad, good)]
            return await asyncio.gather(*posts)

    first, failed, last = asyncio.run(both())
    assert error(failed) == (500, "the model failed")
    assert torch.equal(scores(first), good[:, :CLASSES]) and torch.equal(scores(last), good[:, :CLASSES])


@pytest.mark.parametrize("fail_open", [False, True])
def test_a_full_disk_refuses_or_answers_as_configured(tmp_path, monkeypatch, caplog, fail_open):
    chain = ChainFile(tmp_path / "chain.jsonl", fail_open=fail_open)
    here = Here(audit=ChainAudit(chain, AuditKey(bytes(32))))
    assert here.infer().status_code == 200

    def full(data):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(chain, "_write", full)
        response = here.infer()
        assert response.status_code == (200 if fail_open else 503)
        if not fail_open:
            assert "audit log cannot be written" in error(response)[1]
            assert caplog.messages[-1].endswith("written: No space left on device; free some space")
    assert here.infer().status_code == 200
    kinds = [json.loads(line)["content"]["kind"] for line in chain.path.read_text().splitlines()]
    first = ["started", "answered"]
    assert kinds == ([*first, "lost", *first] if fail_open else [*first, *first])


def test_the_document_describes_what_is_returned():
    here = Here()
    content = here("GET", "/openapi.json").json()
    assert content == json.loads(
        json.dumps(openapi_document(SIGNATURE, keys=False, max_body=here.served.max_body))
    )
    for path, operations in content["paths"].items():
        for method, operation in operations.items():
            body = {"content": request(X, id="7"), "headers": JSON} if method == "post" else {}
            response = here(method.upper(), path, **body)
            described = operation["responses"]["200"]["content"][response.headers["content-type"]]
            jsonschema.validate(response.json(), described["schema"])
            if method == "post":
                accepted = operation["requestBody"]["content"]["application/json"]["schema"]
                jsonschema.validate(json.loads(body["content"]), accepted)
                refused = here("POST", path, content=b"[]", headers=JSON)
                assert str(refused.status_code) in operation["responses"]
    assert content["components"]["schemas"]["Error"]["required"] == ["error"]


class Talkative(nn.Module):
    """A network whose errors contain its inputs."""

    def forward(self, x):
        raise ValueError(f"bad input {x} {x.tolist()} of [2, 4] with key hf_secret\nat 0.123456")


def test_errors_of_model_and_guard_are_logged_without_inputs_and_at_a_limited_rate(caplog):
    clock = [0.0]
    model, x = Classifier(Talkative()), torch.full((2, FEATURES), 0.123456)
    here = Here(model=model, errors=ErrorLog(lambda: clock[0]))
    for _ in range(3):
        assert error(here.infer(x)) == (500, "the model failed")
    clock[0] = 61.0
    here.infer(x)
    first, second = (record.getMessage() for record in caplog.records)
    assert caplog.records[0].name == "holdfast.serve"
    assert re.match(
        r"the model failed: TargetError: .*ValueError .* input tensor\(…\) .* \(test_app\.py:\d+ in forward\)\n",
        first,
    )
    assert (
        "[2, 4]" in first and "Traceback" not in second and second.endswith("; 2 more since the last record")
    )
    assert not re.search(r"123456|hf_secret", first.split("\n")[0] + second)
    caplog.clear()
    Here(guard=Broken()).infer()
    assert "the guard failed, and requests are refused: ZeroDivisionError" in caplog.text


def test_whole_numbers_of_inputs_are_removed_from_messages_also_after_the_cut():
    assert not re.search(r"\d", shown(f"bad row {list(range(900))}"))
    assert shown(f"bad row {tuple(range(20))}, expected [3, 32, 32]") == "bad row (…), expected [3, 32, 32]"


def test_the_number_of_kinds_in_the_log_is_limited(caplog):
    log = ErrorLog(lambda: 0.0)
    for number in range(200):
        log(f"event {number}")
    assert len(caplog.records) == 65
