"""The operator's port and its client prove to each other that they have a key, and its hash."""

import json
import socket
import threading
import time
from contextlib import contextmanager, suppress
from http.client import HTTPConnection

import pytest

from holdfast.core.errors import UsageError
from holdfast.io.remote import operator_port
from holdfast.io.remote.operator_port import OperatorPort, Refusal, Unanswered
from holdfast.server.admin import AdminServer, OperatorSessions
from holdfast.server.keys import KeyFile, add_key, revoke_key
from holdfast.server.messages import bound_socket
from holdfast.server.server_setup import ServerSettings, ServerSetup, WorkerSetup
from holdfast.server.supervisor import Supervisor


def opened():
    """The model, which no test here opens."""


class Server:
    """The operator's port of a server whose workers are not started."""

    def __init__(self, folder, *, keys=True, port=0, **settings):
        file = folder / "keys.json"
        chosen = ServerSettings(keys=str(file) if keys else None, **settings)
        worker = WorkerSetup(opened, "model", (4,), chosen, set_name="file")
        self.supervisor = Supervisor(ServerSetup(worker, opening={"model": "m"}))
        listener = bound_socket("127.0.0.1", port)
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.admin = AdminServer(self.supervisor, listener, KeyFile(file) if keys else None)
        self.admin.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.admin.stop()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server, and keys with the name of their scope."""
    folder = tmp_path_factory.mktemp("served")
    keys = {
        scope: add_key(folder / "keys.json", scope, [scope])
        for scope in ("infer", "metrics", "labels", "adapt", "approve", "admin")
    }
    keys["second"] = add_key(folder / "keys.json", "second", ["admin"])
    keys["old"] = add_key(folder / "keys.json", "old", ["admin"], expires="2020-01-01T00:00:00+00:00")
    with Server(folder) as server:
        yield server, keys, folder


@contextmanager
def relaying(upstream, change=lambda request: request, changed=lambda answer: answer):
    """An address that passes on what it receives, and the list of what it received and returned."""
    listener, seen, ended = socket.create_server(("127.0.0.1", 0)), [], threading.Event()

    def whole(connection):
        data = b""
        while b"\r\n\r\n" not in data:
            data += connection.recv(1 << 16)
        head, _, body = data.partition(b"\r\n\r\n")
        length = next(
            (int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0
        )
        while len(body) < length:
            body += connection.recv(1 << 16)
        return head + b"\r\n\r\n" + body

    def answer():
        while not ended.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, suppress(OSError):
                request = whole(connection)
                with socket.create_connection(("127.0.0.1", upstream), timeout=10) as other:
                    other.sendall(change(request))
                    given = whole(other)
                seen.append((request, given))
                connection.sendall(changed(given))

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", seen
    finally:
        ended.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def refused():
    return pytest.raises(Unanswered, match="did not prove that it is the server of this key")


def exchanged(port, request):
    """The status and the content of the answer to bytes."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    return int(answer.split(b" ")[1]), answer.partition(b"\r\n\r\n")[2]


def test_a_request_with_a_proof_is_answered_and_the_key_is_not_in_it(served):
    server, keys, _ = served
    with relaying(server.port) as (url, seen):
        port = OperatorPort(url, keys["admin"])
        assert port.get("/status")["model"]["set"] == "file"
        assert port.post("/adaptation", {"run": "a", "step": None}) == {"run": "a"}
        with pytest.raises(Refusal, match="does not serve a file that could be reloaded"):
            port.post("/reload", {"run": "a"})
        assert port.get("/status?x=1&y=%2F")["model"]["set"] == "file"
        assert port.post("/adaptation", {"run": "a", "step": None, "ended": True})
        with pytest.raises(Refusal, match="does not hold the server"):
            port.post("/reload", {"run": "a"})
        with pytest.raises(Refusal, match="there is nothing at this path"):
            port.get("/absent")
    sent = b"".join(request for request, _ in seen)
    assert sent.count(b"POST /session") == 1 and sent.count(b"Holdfast ") == 7
    assert keys["admin"].encode() not in sent and b"earer" not in sent
    stored = operator_port.hash_of(keys["admin"].encode())
    assert stored.hex().encode() not in sent and stored.hex()[:16].encode() not in sent


@pytest.mark.parametrize("kind", ["silent", "echo", "without keys", "other keys", "absent key"])
def test_the_key_is_not_used_at_a_server_that_does_not_prove_its_hash(kind, served, tmp_path):
    server, keys, _folder = served
    if kind in ("silent", "echo"):
        proof = "0" * 128 if kind == "silent" else None

        def false(given):
            head, _, body = given.partition(b"\r\n\r\n")
            content = json.loads(body)
            content["proof"] = proof or content["nonce"] * 4
            return head + b"\r\n\r\n" + json.dumps(content, separators=(",", ":")).encode()

        with relaying(server.port, changed=false) as (url, seen), refused():
            OperatorPort(url, keys["admin"]).post("/adaptation", {"run": "a"})
        assert len(seen) == 1, "only the session was begun"
        return
    if kind == "other keys":
        add_key(tmp_path / "keys.json", "other", ["admin"])
    if kind == "absent key":
        with refused():
            OperatorPort(server.url, "hf_absent").get("/status")
        return
    with Server(tmp_path, keys=kind == "other keys") as other, refused():
        OperatorPort(other.url, keys["admin"]).get("/status")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"step": null', b'"step": "ab"'),
        (b"POST /adaptation", b"POST /approval  "[:16]),
        (b"application/json", b"application/jsonp"[:16].replace(b"j", b"J")),
        (b"Host: 127.0.0.1", b"Host: 127.0.0.2"),
    ],
)
def test_a_changed_request_is_refused_and_its_answer_has_no_proof(old, new, served):
    server, keys, _ = served
    before = len(server.supervisor.adaptations.runs())

    def change(request):
        return request.replace(old, new) if b"/adaptation" in request else request

    with relaying(server.port, change) as (url, seen), refused():
        OperatorPort(url, keys["admin"]).post("/adaptation", {"run": "changed", "step": None})
    assert b" 401 " in seen[-1][1] or b" 404 " in seen[-1][1]
    assert len(server.supervisor.adaptations.runs()) == before


@pytest.mark.parametrize(
    ("old", "new"),
    [(b"200 OK", b"201 OK"), (b'"ready":false', b'"ready":true '), (b"holdfast-proof", b"holdfast-prooF2")],
)
def test_a_changed_answer_is_not_used(old, new, served):
    server, keys, _ = served

    def changed(answer):
        return answer if b'"proof"' in answer else answer.replace(old, new)

    with relaying(server.port, changed=changed) as (url, _), refused():
        OperatorPort(url, keys["admin"]).get("/status")


def test_the_answer_to_another_request_is_not_used(served):
    server, keys, _ = served
    answers = []

    def changed(answer):
        answers.append(answer)
        return answer if len(answers) < 3 else answers[1]

    with relaying(server.port, changed=changed) as (url, _):
        port = OperatorPort(url, keys["admin"])
        port.get("/status")
        with refused():
            port.get("/status")


def test_a_request_is_executed_once_and_neither_hashes_nor_messages_suffice_for_another(served):
    server, keys, folder = served
    with relaying(server.port) as (url, seen):
        OperatorPort(url, keys["adapt"]).post("/adaptation", {"run": "once", "step": "one"})
    request = seen[-1][0]
    status, content = exchanged(server.port, request)
    assert status == 409 and b"received before" in content
    (run,) = [run for run in server.supervisor.adaptations.runs() if run["run"] == "once"]
    assert [step["step"] for step in run["steps"]] == ["one"]
    server.supervisor.adaptations.release("once")

    # the client of someone who has read the file of keys
    stored = bytes.fromhex(
        next(
            key["hash"]
            for key in json.loads((folder / "keys.json").read_text())["keys"]
            if key["name"] == "adapt"
        )
    )
    assert stored == operator_port.hash_of(keys["adapt"].encode())
    port = HTTPConnection("127.0.0.1", server.port, timeout=10)
    name, nonce = operator_port.key_id(stored), operator_port.new_nonce()
    port.request(
        "POST", "/session", json.dumps({"key": name, "nonce": nonce}), {"Content-Type": "application/json"}
    )
    begun = json.loads(port.getresponse().read())
    session = operator_port.OperatorSession(name, nonce, begun["nonce"], f"127.0.0.1:{server.port}")
    assert begun["proof"] == session.server_proof(stored)
    veiled = session.request(1, "GET", "/status", b"", "").veiled(stored, stored).hex()
    port.request(
        "GET", "/status", headers={"Authorization": f"Holdfast {name} {nonce} {begun['nonce']} 1 {veiled}"}
    )
    answer = port.getresponse()
    assert answer.status == 401 and b"not right" in answer.read()
    port.close()


def test_a_client_begins_a_new_session_after_a_restart_of_the_server(served, tmp_path):
    key = add_key(tmp_path / "keys.json", "op", ["admin"])
    with Server(tmp_path) as first:
        port = OperatorPort(first.url, key)
        assert port.get("/status")
    restarted = []
    later = threading.Timer(0.7, lambda: restarted.append(Server(tmp_path, port=first.port)))
    later.start()
    try:
        assert port.get("/status") and port.get("/status"), "the client waits for the server"
    finally:
        later.join()
        restarted[0].admin.stop()
    port.answer_s = 0.1
    with pytest.raises(Unanswered, match="cannot be reached"):
        port.get("/status")


def test_revoked_and_expired_keys_get_an_answer_that_states_so(served, tmp_path, set_limit):
    server, keys, _ = served
    with pytest.raises(UsageError, match="does not accept the key: the key has expired"):
        OperatorPort(server.url, keys["old"]).get("/status")
    with pytest.raises(UsageError, match="does not accept the key: the key does not permit metrics or adapt"):
        OperatorPort(server.url, keys["infer"]).get("/status")
    with pytest.raises(UsageError, match="needs a key: the header Authorization is missing"):
        OperatorPort(server.url).get("/status")
    set_limit("holdfast.server.keys._CHECK_S", 0.0)
    key = add_key(tmp_path / "keys.json", "op", ["admin"])
    with Server(tmp_path) as other:
        port = OperatorPort(other.url, key)
        assert port.get("/status")
        revoke_key(tmp_path / "keys.json", "op")
        with pytest.raises(UsageError, match="the key is not valid"):
            port.get("/status")


def test_sessions_are_limited_in_number_and_in_time(tmp_path):
    key, now = add_key(tmp_path / "keys.json", "op", ["admin"]), [0.0]
    sessions = OperatorSessions(KeyFile(tmp_path / "keys.json"), clock=lambda: now[0])
    stored = operator_port.hash_of(key.encode())

    def begun(name=None):
        nonce = operator_port.new_nonce()
        name = name or operator_port.key_id(stored)
        answer = sessions.begin(name, nonce, "h")
        return operator_port.OperatorSession(name, nonce, answer["nonce"], "h")

    def ended(session, number=1):
        try:
            sessions.take(session, number)
        except Exception as error:  # noqa: BLE001
            return error.status
        return None

    first = begun()
    used = begun()
    assert ended(used) is None and ended(used) == 409 and ended(used, 3) is None and ended(used, 2) == 409
    for _ in range(300):
        begun()
        begun("0" * 16)
    assert (len(sessions._unproven), len(sessions._proven)) == (256, 1)
    assert ended(first) == operator_port.NO_SESSION and ended(used, 4) is None
    late = begun()
    now[0] = 31.0
    assert ended(late) == operator_port.NO_SESSION and ended(used, 5) is None
    assert [ended(begun()) for _ in range(64)] == [None] * 64 and len(sessions._proven) == 64
    assert ended(used, 6) == operator_port.NO_SESSION
    last = begun()
    assert ended(last) is None
    now[0] = 4000.0
    assert ended(last, 2) == operator_port.NO_SESSION


SCOPES = {
    ("GET", "/metrics"): {"metrics"},
    ("GET", "/status"): {"metrics", "adapt"},
    ("GET", "/monitor"): {"metrics", "adapt"},
    ("POST", "/labels"): {"labels"},
    ("GET", "/adaptation"): {"adapt", "approve"},
    ("POST", "/adaptation"): {"adapt"},
    ("POST", "/canary"): {"adapt"},
    ("DELETE", "/canary"): {"adapt"},
    ("POST", "/reload"): {"adapt"},
    ("GET", "/samples"): {"adapt"},
    ("GET", "/flagged"): {"adapt"},
    ("POST", "/monitor/restart"): {"adapt"},
    ("POST", "/approval"): {"approve"},
    ("POST", "/swap"): set(),
}


def test_each_request_needs_its_scope_and_admin_contains_them(served):
    server, keys, _ = served
    connection = HTTPConnection("127.0.0.1", server.port, timeout=10)
    for (method, path), scopes in SCOPES.items():
        for name in ("infer", "metrics", "labels", "adapt", "approve", "admin"):
            headers = {"Authorization": f"Bearer {keys[name]}", "Content-Type": "application/json"}
            connection.request(method, path, "{}" if method == "POST" else None, headers)
            answer = connection.getresponse()
            answer.read()
            assert (answer.status not in (401, 403)) is (name in {*scopes, "admin"}), (method, path, name)
    connection.close()
    assert "settings" in OperatorPort(server.url, keys["adapt"]).get("/status")["model"]
    assert "settings" not in OperatorPort(server.url, keys["metrics"]).get("/status")["model"]


def test_a_run_is_not_approved_with_a_key_that_posted_it(served, tmp_path):
    server, keys, _ = served
    first, second, third = (OperatorPort(server.url, keys[name]) for name in ("adapt", "admin", "second"))
    approve = OperatorPort(server.url, keys["approve"])

    def posted(port, run):
        port.post("/adaptation", {"run": run, "step": "approval", "ended": True})
        return {"run": run, "approved": True}

    body = posted(second, "own")
    with pytest.raises(
        Refusal, match="another key must approve it: .*holdfast keys add NAME --scope approve --file"
    ):
        second.post("/approval", body)
    assert third.post("/approval", body)["approved"] is True
    body = posted(third, "both")
    posted(second, "both")
    for port in (second, third):
        with pytest.raises(Refusal, match="another key must approve it"):
            port.post("/approval", body)
    assert second.post("/approval", {**body, "approved": False})["approved"] is False, "it may be rejected"
    body = posted(first, "other")
    assert approve.post("/approval", body)["approved"] is True
    assert approve.get("/adaptation")["runs"][0]["by"] == "approve"

    for path in ("/canary", "/reload"):
        first.post("/adaptation", {"run": path, "step": "approval"})
        with pytest.raises(Refusal, match="file"):
            second.post(path, {"run": path, "model": "model", "digest": "d"})
        with pytest.raises(Refusal, match="another key must approve it"):
            second.post("/approval", {"run": path, "approved": True})
        first.post("/adaptation", {"run": path, "step": None, "ended": True})

    records, key = [], add_key(tmp_path / "keys.json", "op", ["admin"])
    with Server(tmp_path, single_operator=True) as single:
        port, adaptations = OperatorPort(single.url, key), single.supervisor.adaptations
        adaptations._record = lambda kind, **facts: records.append((kind, facts))
        assert port.post("/approval", posted(port, "own"))["approved"] is True
    assert records[-1] == ("approval", {"run": "own", "approved": True, "principal": "op", "own": True})


@pytest.mark.parametrize(
    ("first", "then", "status"),
    [
        (b"GET /status HTTP/1.1\r\nX: ", b"a", 408),
        (b"POST /adaptation HTTP/1.1\r\nHost: a\r\nContent-Length: 900\r\n\r\n", b"{", 408),
        (b"POST /ui/login HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n", 408),
        (b"GET /metrics HTTP/1.1\r\nHost: a\r\nContent-Length: 900\r\n\r\n", b"a", 408),
        (b"GET /status HTTP/1.1\r\nX: " + b"a" * 200_000, b"", 431),
        (
            b"POST /adaptation HTTP/1.1\r\nHost: a\r\nContent-Length: 2000000\r\n\r\n" + b"a" * 1_500_000,
            b"",
            413,
        ),
    ],
)
def test_slow_and_large_requests_do_not_hold_a_connection(first, then, status, tmp_path, set_limit):
    set_limit("holdfast.server.admin._BODY_S", 0.2)
    set_limit("holdfast.server.admin._HEADER_S", 0.2)
    with Server(tmp_path, keys=False) as server:
        begun = time.monotonic()
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
            answer = b""
            connection.sendall(first)
            connection.settimeout(0.02)
            with suppress(ConnectionError):
                while b"\r\n\r\n" not in answer:
                    with suppress(TimeoutError):
                        answer += connection.recv(1 << 16) or b"\r\n\r\n"
                    connection.sendall(then)
        assert answer.split(b" ")[1] == str(status).encode() and time.monotonic() - begun < 3
