"""The page of the operator: login, sessions, tokens of forms, what it shows, and the download of flagged inputs."""

import asyncio
import io
import re
from html.parser import HTMLParser

import httpx
import numpy as np
import pytest
import torch

import test_report_browser
from holdfast.guard.rules import Action, Mode, RequestDecision, RowDecision, Score
from holdfast.guard.stored_inputs import StoredInputs
from holdfast.runs.store.encryption import Seal
from holdfast.server.adaptations import Adaptations
from holdfast.server.admin import admin_application
from holdfast.server.keys import KeyFile, add_key, read_keys, revoke_key
from holdfast.server.requests import Refused
from holdfast.server.server_setup import FlaggedInputs, ServerSetup, WorkerSetup
from holdfast.server.supervisor import Supervisor
from holdfast.server.telemetry import MetricTotals, Telemetry
from holdfast.server.traffic import Traffic
from holdfast.server.ui import SESSION_S, Sessions

pytest.importorskip("cryptography")
browser = test_report_browser.browser

HOSTILE = (
    "<script>alert(1)</script>",
    "\" onmouseover='alert(1)' x=\"",
    "</style><img src=//x.invalid>",
    "\u202egnp\x1b[2J",
)


def opened():
    """The model, which no test of the page opens."""


class Monitor:
    """A monitor with an alarm."""

    restarts = 0

    def summary(self):
        test = {
            "name": HOSTILE[0],
            "state": HOSTILE[1],
            "alarm": {"after": 120, "signal": HOSTILE[0]},
            "guarantee": HOSTILE[2],
            "power": None,
        }
        return {"stream": {"n": 1200}, "alarmed": ["shift"], "tests": [test]}

    def restart(self):
        self.restarts += 1


class Runs:
    """A run of an adaptation that waits for an approval."""

    approved = ()

    def runs(self):
        step = {"step": "gates", "time": 1.8e9, "facts": {"clean_accuracy": HOSTILE[0]}}
        return [{"run": HOSTILE[1], "steps": [step], "approval": "pending", "by": ""}]

    def approve(self, run, approved, key, by):
        self.approved = run, approved, by


def flagged(folder, n=3, shape=(3, 8, 8), request="a"):
    clock = iter(range(1_000_000, 2_000_000))
    stored = StoredInputs(folder, Seal(b"k" * 32), clock=lambda: float(next(clock)), retention_s=1e9)
    for k in range(n):
        row = RowDecision((Score(HOSTILE[0], 1.5 + k, True, Mode.OBSERVE, Action.FLAG),))
        x = torch.rand(1, *shape, generator=torch.Generator().manual_seed(k))
        assert stored.add(RequestDecision(f"{request}{k}", HOSTILE[k % 4][:100], (row,), x=x))
    return FlaggedInputs(stored)


def supervisor(tmp_path, **settings):
    worker = WorkerSetup(opened, HOSTILE[0], (4,), set_name="file")
    server = Supervisor(ServerSetup(worker, **settings))
    server.live, server.adaptations = Monitor(), Runs()
    return server


class Visitor:
    """A browser without scripts: it keeps cookies, and does not follow redirects."""

    def __init__(self, app):
        self.app, self.cookies = app, httpx.Cookies()

    def __call__(self, method, path, **content):
        async def send():
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8081") as client:
                client.cookies = self.cookies
                response = await client.request(method, path, **content)
                self.cookies = client.cookies
                return response

        return asyncio.run(send())

    def get(self, path, **content):
        return self("GET", path, **content)

    def post(self, path, **content):
        return self("POST", path, **content)


def client(server, keys=None):
    return Visitor(admin_application(server, keys))


def token(text):
    return re.search(r'name="token" value="([0-9a-f]{64})"', text)[1]


def logged_in(server, tmp_path, scope="admin", name="alice"):
    key = add_key(tmp_path / "keys.json", name, [scope])
    visitor = client(server, KeyFile(tmp_path / "keys.json"))
    answer = visitor.post("/ui/login", data={"key": key, "token": token(visitor.get("/ui").text)})
    assert (answer.status_code, answer.headers["location"]) == (303, "/ui")
    return visitor


class Tags(HTMLParser):
    """The tags and attributes of a page."""

    def __init__(self, text):
        super().__init__()
        self.seen = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))


def test_a_session_begins_with_the_key_and_ends_with_it(tmp_path, set_limit):
    set_limit("holdfast.server.keys._CHECK_S", 0.0)
    visitor = logged_in(supervisor(tmp_path), tmp_path)
    cookie = visitor.post("/ui/login", data={"key": "x", "token": token(visitor.get("/ui").text)})
    assert cookie.status_code == 401 and "the key is not valid" in cookie.text
    assert "alice" in visitor.get("/ui").text
    assert visitor.get("/status").status_code == 401  # the cookie is for the page alone
    revoke_key(tmp_path / "keys.json", "alice")
    assert 'name="key"' in visitor.get("/ui").text


def test_a_login_gives_a_new_strict_cookie_and_a_key_for_inference_gives_none(tmp_path):
    key = add_key(tmp_path / "keys.json", "bob", ["infer"])
    visitor = client(supervisor(tmp_path), KeyFile(tmp_path / "keys.json"))
    first = visitor.get("/ui")
    assert {"HttpOnly", "Path=/ui", "SameSite=strict"} <= set(first.headers["set-cookie"].split("; "))
    answer = visitor.post("/ui/login", data={"key": key, "token": token(first.text)})
    assert answer.status_code == 403 and 'name="key"' in visitor.get("/ui").text
    before = visitor.cookies["holdfast_ui"]
    key = add_key(tmp_path / "keys2.json", "alice", ["admin"])
    other = client(supervisor(tmp_path), KeyFile(tmp_path / "keys2.json"))
    page = other.get("/ui")
    before = other.cookies["holdfast_ui"]
    other.post("/ui/login", data={"key": key, "token": token(page.text)})
    assert other.cookies["holdfast_ui"] != before
    other.post("/ui/logout", data={"token": token(other.get("/ui").text)})
    assert 'name="key"' in other.get("/ui").text


def test_sessions_expire_are_bounded_and_failed_logins_are_limited(tmp_path):
    now = [0.0]
    key = add_key(tmp_path / "keys.json", "alice", ["admin"])
    sessions = Sessions(KeyFile(tmp_path / "keys.json"), clock=lambda: now[0])
    visitors = [sessions.login(key) for _ in range(40)]
    operators = [sessions.operator(visitor) for visitor in visitors]
    assert operators[:8] == [None] * 8 and [each.name for each in operators[8:]] == ["alice"] * 32
    now[0] = SESSION_S
    assert sessions.operator(visitors[-1]) is None
    failures = []
    for _ in range(12):
        with pytest.raises(Refused) as refused:
            sessions.login("hf_wrong")
        failures.append(refused.value.status)
    assert failures == [401] * 10 + [429] * 2
    assert sessions.operator(sessions.login(key, "192.0.2.7")).name == "alice", "of another address"
    now[0] += 61
    assert sessions.operator(sessions.login(key)).name == "alice"
    for k in range(1100):
        with pytest.raises(Refused):
            sessions.login("hf_wrong", f"address {k}")
    assert len(sessions._failures) == 1000


def test_forms_need_the_token_of_their_session_and_come_from_the_page(tmp_path):
    server = supervisor(tmp_path, reloadable=True)
    visitor = client(server)
    good = token(visitor.get("/ui").text)
    other = token(client(server).get("/ui").text)
    assert visitor.post("/ui/monitor", data={"token": good}).headers["location"] == "/ui?done=monitor"
    for data, headers, status in (
        ({}, {}, 403),
        ({"token": other}, {}, 403),
        ({"token": "\u00e9"}, {}, 403),
        ({"token": good}, {"sec-fetch-site": "cross-site"}, 403),
        ({"token": good}, {"sec-fetch-site": "same-site"}, 403),
        ({"token": good, "x": "y" * 5000}, {}, 413),
        ({"token": good}, {"host": "evil.example"}, 421),
    ):
        assert visitor.post("/ui/monitor", data=data, headers=headers).status_code == status
    assert server.live.restarts == 1
    assert visitor.post("/ui/swap", data={"token": good}).status_code == 303
    data = {"token": good, "run": HOSTILE[1], "decision": "rejected"}
    assert visitor.post("/ui/approval", data=data).headers["location"] == "/ui?done=rejected"
    assert server.adaptations.approved == (HOSTILE[1], False, "operator")
    refused = client(supervisor(tmp_path))
    answer = refused.post("/ui/swap", data={"token": token(refused.get("/ui").text)})
    assert answer.status_code == 409 and "no pool and no file" in answer.text


@pytest.mark.parametrize(
    ("scope", "sections", "forms"),
    [
        ("metrics", {"traffic", "alarms", "rotation"}, set()),
        ("adapt", {"traffic", "alarms", "rotation", "flagged", "clients", "adaptation"}, {"monitor"}),
        ("approve", {"adaptation"}, {"approval"}),
        (
            "admin",
            {"traffic", "alarms", "rotation", "flagged", "clients", "adaptation"},
            {"approval", "monitor", "swap"},
        ),
    ],
)
def test_the_page_shows_what_the_scopes_of_a_key_permit(scope, sections, forms, tmp_path):
    server = supervisor(tmp_path, flagged=flagged(tmp_path / "inputs", 2), reloadable=True)
    visitor = logged_in(server, tmp_path, scope)
    text = visitor.get("/ui").text
    assert {
        attributes["aria-labelledby"] for tag, attributes in Tags(text).seen if tag == "section"
    } == sections
    actions = {attributes["action"][4:] for tag, attributes in Tags(text).seen if tag == "form"}
    assert actions == {*forms, "logout"} and text.count("<img") == (2 if "flagged" in sections else 0)
    good, form = token(text), {"run": HOSTILE[1], "decision": "approved"}
    statuses = {
        action: visitor.post(f"/ui/{action}", data={**form, "token": good}).status_code
        for action in ("approval", "monitor", "swap")
    }
    assert statuses == {action: 303 if action in forms else 403 for action in statuses}


def test_a_run_is_not_approved_on_the_page_with_the_key_that_posted_it(tmp_path):
    server = supervisor(tmp_path)
    server.adaptations = Adaptations(lambda kind, **facts: None)
    visitor = logged_in(server, tmp_path)
    (key,) = read_keys(tmp_path / "keys.json")
    server.adaptations.took("r", "approval", {}, key)
    form = {"run": "r", "decision": "approved", "token": token(visitor.get("/ui").text)}
    refused = visitor.post("/ui/approval", data=form)
    assert refused.status_code == 409 and "holdfast keys add NAME --scope approve" in refused.text
    assert server.adaptations.runs()[0]["approval"] == "pending"
    other = logged_in(server, tmp_path, "approve", "bob")
    form["token"] = token(other.get("/ui").text)
    assert other.post("/ui/approval", data=form).headers["location"] == "/ui?done=approved"


def test_a_link_of_another_site_does_not_end_the_session(tmp_path):
    visitor = logged_in(supervisor(tmp_path), tmp_path)
    bare = client(supervisor(tmp_path)).get("/ui", headers={"sec-fetch-site": "cross-site"})
    assert "set-cookie" not in bare.headers and 'http-equiv="refresh"' in bare.text
    assert "alice" in visitor.get("/ui", headers={"sec-fetch-site": "cross-site"}).text


@pytest.mark.parametrize("with_keys", [True, False])
def test_names_of_others_are_text_and_nothing_else(tmp_path, with_keys):
    server = supervisor(tmp_path, flagged=flagged(tmp_path / "inputs", 4), reloadable=True)
    if with_keys:
        for name in HOSTILE[:3]:
            add_key(tmp_path / "keys.json", name, ["infer"])
    visitor = logged_in(server, tmp_path) if with_keys else client(server)
    answer = visitor.get("/ui")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["cache-control"] == "no-store"
    text = answer.text
    assert HOSTILE[0] not in text and "\u202e" not in text and "\x1b" not in text
    for tag, attributes in Tags(text).seen:
        assert tag not in {"script", "style", "iframe"}
        assert not any(name.startswith("on") or name == "style" for name in attributes)
        assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
        assert attributes.get("href", "/ui").startswith("/ui")
    assert text.count("<img") == 4
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert visitor.get("/ui/style.css").headers["content-type"].startswith("text/css")


def test_the_newest_flagged_inputs_can_be_read_as_arrays(tmp_path):
    visitor = client(supervisor(tmp_path, flagged=flagged(tmp_path / "inputs")))
    arrays = np.load(io.BytesIO(visitor.get("/flagged?n=2").content), allow_pickle=False)
    assert arrays["x"].shape == (2, 3, 8, 8) and arrays["request"].tolist() == ["a2", "a1"]
    assert arrays["row"].tolist() == [0, 0] and arrays["time"][0] > arrays["time"][1]
    for n in ("0", "1001", "-1", "x", "\u0661"):
        assert visitor.get("/flagged", params={"n": n}).status_code == 400
    empty = np.load(
        io.BytesIO(client(supervisor(tmp_path, flagged=flagged(tmp_path / "no", 0))).get("/flagged").content)
    )
    assert len(empty["x"]) == 0
    assert client(supervisor(tmp_path)).get("/flagged").status_code == 409


def test_changed_stored_inputs_are_reported_on_the_page(tmp_path):
    inputs = flagged(tmp_path / "inputs", 2)
    file = next(iter((tmp_path / "inputs").iterdir()))
    file.rename(file.with_name(file.name.replace("-a0", "-b0").replace("-a1", "-b1")))
    answer = client(supervisor(tmp_path, flagged=inputs)).get("/ui")
    assert answer.status_code == 200 and "cannot be read" in answer.text
    assert client(supervisor(tmp_path, flagged=inputs)).get("/flagged").status_code == 409


def test_traffic_is_the_difference_of_samples(tmp_path):
    now, totals, telemetry = [0.0], MetricTotals(), Telemetry()
    totals.follow("worker", telemetry.memory)
    traffic = Traffic(totals, clock=lambda: now[0])
    for second in range(2000):
        now[0] = float(second)
        telemetry.count("holdfast_requests_total", "200", n=2)
        if second >= 1000:
            telemetry.observe("holdfast_request_seconds", 0.004)
        traffic.sample()
    telemetry.count("holdfast_refused_total", "key", n=float("nan"))
    now[0] = 2005.0
    traffic.sample()
    intervals = traffic.intervals()
    assert len(intervals) == 180
    assert intervals[0].requests_per_s == 2
    assert 0.0025 < intervals[-2].p50_s < intervals[-2].p95_s <= 0.005
    assert traffic.recent().refused_per_s == 0


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.long
def test_the_page_in_a_browser(browser, tmp_path):
    server = supervisor(tmp_path, flagged=flagged(tmp_path / "inputs", 6), reloadable=True)
    add_key(tmp_path / "keys.json", HOSTILE[0], ["infer"])
    visitor = logged_in(server, tmp_path)
    style = visitor.get("/ui/style.css").text
    for name, answer in (("page", visitor.get("/ui")), ("login", Visitor(visitor.app).get("/ui"))):
        policy = answer.headers["content-security-policy"].replace("'self'", "'unsafe-inline'")
        head = (
            f'<meta http-equiv="Content-Security-Policy" content="{policy.partition(" frame-ancestors")[0]}">'
        )
        text = answer.text.replace(
            '<link rel="stylesheet" href="/ui/style.css">', f"{head}<style>{style}</style>"
        )
        path = tmp_path / f"{name}.html"
        path.write_text(text, encoding="utf-8")
        for visit in browser(path):
            assert visit["styled"]
            assert (visit["requests"], visit["messages"], visit["violations"]) == ([], [], [])
            assert visit["broken"] == 0 and visit["sideways"] <= 0
