"""Models behind HTTP: what is sent and read, what is refused, what is tried again, and what is never sent at all."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import servers
from holdfast.core.errors import TargetError, TargetLost, TargetRefused, UsageError
from holdfast.io.models.models import Declared, open_model
from holdfast.io.remote.http_client import LONGEST_WAIT_S, Client
from holdfast.io.remote.remote import Remote, allowed_address, header_variable
from holdfast.runs.assess.served_runs import in_words
from servers import CLASSES, FEATURES, NAMES, Server, examples, network

X, Y = examples()


@pytest.fixture
def server():
    with Server() as started:
        yield started


def opened(server, path="/v2/models/small", *, classes=None, names=None, output=None, **changes):
    """The model and the waits that it made, none of which was slept."""
    waits = []
    remote = Remote(hosts=("127.0.0.1",), timeout_s=2.0, sleep=waits.append)
    return open_model(
        server.url(path),
        declared=Declared(classes=classes, class_names=names, output=output),
        remote=replace(remote, **changes),
    ), waits


def asked(found, x=X):
    return found.model(torch.from_numpy(x)).numpy()


def remarks(found):
    """What is said of the requests beside their number."""
    return in_words(found.model.net.sent.totals)[1:]


TEMPLATE = {"request": '{"instances": $x}', "response": "predictions.*.scores"}
LABELS = {"request": '{"instances": $x}', "response": "classes", "labels": True}


def test_the_protocol_brings_the_scores_of_the_network(server):
    found, waits = opened(server)
    np.testing.assert_allclose(asked(found), network(X), rtol=1e-6)
    assert (found.access, found.how, found.model.classes) == ("scores", "http", CLASSES)
    assert server.bodies[0]["inputs"][0]["datatype"] == "FP32"
    assert server.bodies[0]["outputs"] == [{"name": "scores"}]
    assert np.array_equal(np.asarray(server.rows, dtype=np.float32), X)  # to the last bit
    assert "may change" in found.notes[0]
    assert (waits, remarks(found)) == ([], ())


@pytest.mark.parametrize(
    "path", ["/v2/models/small/", "/v2/models/small/infer", "/v2/models/small/versions/3"]
)
def test_an_address_may_name_a_version_or_the_verb(server, path):
    np.testing.assert_allclose(asked(opened(server, path)[0]), network(X), rtol=1e-6)


def test_a_template_brings_scores_and_labels(server):
    np.testing.assert_allclose(asked(opened(server, "/predict", **TEMPLATE)[0]), network(X), rtol=1e-6)
    found, _ = opened(server, "/classify", classes=CLASSES, **LABELS)
    assert np.array_equal(asked(found), np.eye(CLASSES)[network(X).argmax(1)])
    assert found.access == "labels"
    assert "returns only labels" in found.model.hides


def test_labels_that_are_text_are_looked_up_in_the_class_names(server):
    found, _ = opened(server, "/name", names=NAMES, **LABELS)
    assert (found.access, found.model.classes) == ("labels", CLASSES)
    assert np.array_equal(asked(found), np.eye(CLASSES)[network(X).argmax(1)])
    turned, _ = opened(server, "/name", names=NAMES[::-1], **LABELS)
    assert np.array_equal(asked(turned), asked(found)[:, ::-1])
    assert turned.digest != found.digest
    for options, said in (
        ({"names": ("cat", "dog", "fox")}, r"'emu'.*cat, dog, fox.*class_names="),
        ({"classes": CLASSES}, r"'(cat|dog|emu)'.*not declared.*class_names="),
        ({"labels": False}, r"scores were expected.*http_labels=True"),
    ):
        with pytest.raises(TargetLost, match=said):
            asked(opened(server, "/name", **LABELS | options)[0])


def test_the_protocol_names_classes_in_text():
    with Server(metadata=("FP32", [-1, FEATURES], "BYTES", [-1])) as server:
        found, _ = opened(server, names=NAMES)
        assert found.access == "labels"
        with pytest.raises(UsageError, match="class_names="):
            opened(server)


def test_whole_numbers_from_the_protocol_are_labels():
    with Server(metadata=("FP32", [-1, FEATURES], "INT64", [-1])) as server:
        found, _ = opened(server, classes=CLASSES)
        assert found.access == "labels"
        assert np.array_equal(asked(found).argmax(1), network(X).argmax(1))
        with pytest.raises(UsageError, match="classes=N"):
            opened(server)


def test_scores_that_are_classes_are_named(server):
    with pytest.raises(TargetLost, match="http_labels=True"):
        asked(opened(server, "/classify", **{**LABELS, "labels": False})[0])
    with pytest.raises(TargetError, match="contains the class 2; integers from 0 to 1"):
        asked(opened(server, "/classify", classes=2, **LABELS)[0])


@pytest.mark.parametrize("number", [int, float])
def test_one_whole_number_a_row_is_no_logit(monkeypatch, number):
    monkeypatch.setattr(servers, "network", lambda x: 3 * np.arange(len(x), dtype=number)[:, None])
    with Server() as server:
        with pytest.raises(TargetLost, match=r"integer per row, such as 0, .*http_labels=True, classes=N"):
            asked(opened(server, "/predict", **TEMPLATE)[0])
        declared, _ = opened(server, "/predict", **TEMPLATE, output="logit")
        assert asked(declared).argmax(1).tolist() == [0] + [1] * (len(X) - 1)


def test_rows_are_shared_out_over_requests_on_one_connection(server):
    asked(opened(server, max_rows=10)[0])
    assert server.sizes == [10, 10, 4]
    assert server.connections == 1


def test_a_limit_of_rows_is_found_and_kept():
    with Server(most=5) as server:
        found, _ = opened(server, max_rows=24)
        np.testing.assert_allclose(asked(found), network(X), rtol=1e-6)
        np.testing.assert_allclose(asked(found), network(X), rtol=1e-6)
        assert server.sizes == [3] * 16
        counted, remark = remarks(found)
        assert counted == "of the rows above, 42 were in requests that the server rejected"
        assert (
            "rejected a request of 6 rows and accepted one of 3" in remark and "--http-max-rows 3" in remark
        )
    with Server(most=0) as server, pytest.raises(TargetRefused, match="400 Bad Request: .*too many rows"):
        asked(opened(server)[0])


def test_channels_go_last_where_the_server_wants_them():
    images = np.random.default_rng(0).random((2, 1, 2, 3), dtype=np.float32)
    last = np.moveaxis(images, 1, -1).tolist()
    with Server(metadata=("FP32", [-1, 2, 3, 1], "FP32", [-1, CLASSES])) as server:
        found, _ = opened(server)
        asked(found, images)
        assert server.bodies[0]["inputs"][0]["shape"] == [2, 2, 3, 1]
        assert "transposed" in found.notes[1]
        asked(opened(server, "/predict", **{**TEMPLATE, "request": '{"instances": $x_last}'})[0], images)
        assert server.bodies[1]["instances"] == last
        with pytest.raises(TargetError, match=r"has shape \(6,\); the model expects \(2, 3, 1\)"):
            asked(found)


def test_a_fixed_batch_is_filled_up():
    with Server(metadata=("FP32", [5, FEATURES], "FP32", [5, CLASSES])) as server:
        found, _ = opened(server, max_rows=3)
        np.testing.assert_allclose(asked(found, X[:7]), network(X[:7]), rtol=1e-6)
        assert server.sizes == [5, 5]


@pytest.mark.parametrize(
    ("takes", "returns", "says"),
    [
        (
            [10**9, FEATURES],
            [-1, CLASSES],
            r"has shape \(1000000000, .*; at most 16,777,216 values are sent",
        ),
        ([-1, FEATURES], [-1, 10**30], r"returns 1000000000.* scores; at most 1,000,000 were expected"),
    ],
)
def test_a_server_cannot_ask_for_more_than_any_request_holds(takes, returns, says):
    with Server(metadata=("FP32", takes, "FP32", returns)) as server, pytest.raises(TargetError, match=says):
        opened(server)


IN_PASSING = {
    "rate": ([(429, {"Retry-After": "7"})], [7.0], "429 Too Many Requests 1"),
    "down": ([503, 503], [0.5, 1.0], "503 Service Unavailable 2"),
    "internal": ([500], [0.5], "500 Internal Server Error 1"),
    "cut": (["cut"], [0.5], "the connection failed"),
    "garbage": (["garbage"], [0.5], "the response is not JSON 1"),
    "nested": (["nested"], [0.5], "the response is not JSON"),
    "slow": (["slow"], [0.5], "no answer within 0.05 s 1"),
}


@pytest.mark.parametrize("script, waits, said", IN_PASSING.values(), ids=IN_PASSING)
def test_temporary_failures_are_retried_and_noted(script, waits, said):
    with Server(script) as server:
        timeout_s = 0.05 if script == ["slow"] else 2.0
        found, waited = opened(server, "/predict", **TEMPLATE, timeout_s=timeout_s)
        np.testing.assert_allclose(asked(found), network(X), rtol=1e-6)
        assert waited == waits
        (remark,) = remarks(found)
        assert said in remark
        assert remark.startswith(f"{len(script)} request") and f"with {24 * len(script)} rows" in remark


def test_a_first_request_that_is_not_understood_is_sent_twice_only():
    with Server([500] * 10) as server:
        found, waits = opened(server, "/predict", **TEMPLATE)
        with pytest.raises(TargetLost, match=r"\(sent twice\); .*so compare the format of the requests"):
            asked(found)
        assert waits == [0.5]
    with Server([None, *[500] * 3]) as server:
        found, waits = opened(server, "/predict", **TEMPLATE)
        asked(found), asked(found)
        assert waits == [0.5, 1.0, 2.0]


def test_a_connection_that_was_closed_while_idle_is_opened_at_once():
    with Server([None, "hang_up"]) as server:
        found, waits = opened(server, max_rows=12)
        np.testing.assert_allclose(asked(found), network(X), rtol=1e-6)
        assert waits == [0.0]


def test_an_answer_that_was_cut_is_no_idle_connection():
    with Server([None, "cut"]) as server:
        found, waits = opened(server, max_rows=12)
        np.testing.assert_allclose(asked(found), network(X), rtol=1e-6)
        assert waits == [0.5]


def test_waits_grow_to_a_bound_and_the_last_failure_is_reported():
    with Server([503] * 20) as server:
        found, waits = opened(server, retries=8)
        with pytest.raises(TargetLost, match=r"503 Service Unavailable: .* \(sent 9 times\)"):
            asked(found)
        assert waits == [0.5, 1, 2, 4, 8, 16, 30, 30]


LOST = {
    "patience": ((429, {"Retry-After": "3600"}), r"requests a pause of 3,600 s"),
    "key": (401, r"headers=\('Authorization: env:MODEL_TOKEN',\)"),
    "elsewhere": (
        (307, {"Location": "http://elsewhere/x"}),
        "to 'http://elsewhere/x'; redirects are not followed",
    ),
    "gone": (404, "check the model's name"),
}


@pytest.mark.parametrize("trouble, said", LOST.values(), ids=LOST)
def test_permanent_failures_are_not_retried(trouble, said):
    with Server([trouble, trouble]) as server:
        found, waits = opened(server)
        with pytest.raises(TargetLost, match=said):
            asked(found)
        assert (waits, len(server.script)) == ([], 1)


def test_what_is_no_json_is_shown_in_the_end():
    with Server(["garbage"] * 2) as server, pytest.raises(TargetLost, match="not JSON: '<html>the proxy"):
        asked(opened(server, retries=1)[0])


def test_a_date_in_retry_after_is_converted_to_seconds():
    past = {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}
    with Server([(503, past), (503, {"Retry-After": "soon"})]) as server:
        found, waits = opened(server)
        asked(found)
        assert waits == [0.5, 1.0]
    with Server([(503, {"Retry-After": "Wed, 21 Oct 2215 07:28:00 GMT"})]) as server:
        found, waits = opened(server)
        with pytest.raises(TargetLost, match="requests a pause"):
            asked(found)
    assert LONGEST_WAIT_S == 60


BAD = {
    "fewer": "the response to 24 rows has shape (23, 3)",
    "too_large": "an infinite score, or one too large for float32",
    "booleans": "but numbers or text were expected",
    "more_classes": "has 4 scores per row, but earlier ones had 3",
}


@pytest.mark.parametrize("trouble, said", BAD.items(), ids=BAD)
def test_answers_that_do_not_fit_the_rows_are_refused(trouble, said):
    with Server([None, trouble]) as server:
        found, waits = opened(server)
        asked(found)
        with pytest.raises(TargetError) as refused:
            asked(found)
        assert said in str(refused.value)
        assert waits == []


def test_what_is_no_number_is_broken_as_of_any_other_model():
    with Server([None, "not_a_number"]) as server:
        found, _ = opened(server)
        asked(found)
        scores = asked(found)
    assert np.isnan(scores).any()
    assert not np.isnan(scores).all()


def test_a_refusal_before_the_end_of_a_large_request_is_received():
    with Server(["refuse_unread"]) as server:
        remote = Remote(hosts=("127.0.0.1",), retries=0)
        client = Client(allowed_address(server.url(), remote.hosts), remote)
        with pytest.raises(TargetError, match="413 .*too long"):
            client.request("/predict", b"1" * 10**7)


def test_an_unreachable_server_is_reported_at_once(server):
    server.stop()
    waits = []
    with pytest.raises(TargetLost, match=r"cannot be reached \(ConnectionRefusedError"):
        open_model(server.url(), remote=Remote(hosts=("127.0.0.1",), sleep=waits.append))
    assert waits == []


def test_an_answer_that_drips_is_cut_off(server):
    clock = iter(range(0, 10_000, 3))
    with pytest.raises(TargetLost, match="no answer within 2 s"):
        opened(server, now=lambda: next(clock), retries=0)


@pytest.mark.parametrize("trouble", ["patience", "trailers"])
def test_an_answer_that_never_ends_around_its_body_is_cut_off(trouble):
    clock = iter(range(10_000))
    with Server([trouble]) as server:
        found, _ = opened(server, "/predict", **TEMPLATE, timeout_s=20.0, now=lambda: next(clock), retries=0)
        with pytest.raises(TargetLost, match="no answer within 20 s"):
            asked(found)


@pytest.mark.parametrize(
    "address, hosts",
    [
        ("http://localhost:8000/x", ("localhost",)),
        ("http://LOCALHOST:8000/x", ("localhost:8000",)),
        ("https://host/x", ("other", "host:443")),
        ("http://[::1]:8000/x", ("[::1]:8000",)),
    ],
)
def test_hosts_that_are_allowed(address, hosts):
    assert allowed_address(address, hosts).path == "/x"


@pytest.mark.parametrize("address", ["http://[::1]/x", "http://[::1:1]/x"])
def test_an_ipv6_address_is_no_port(address, monkeypatch):
    asked = []
    monkeypatch.setattr("socket.create_connection", lambda where, *_: asked.append(where) or 1 / 0)
    parts = allowed_address(address, (address[7:-2],))
    with pytest.raises(ZeroDivisionError):
        Client(parts, Remote(retries=0)).request("/x")
    assert asked == [(parts.hostname, 80)]


@pytest.mark.parametrize(
    "address, hosts, said",
    [
        ("http://host/x", (), "give allow_hosts=('host',)"),
        ("http://host:81/x", ("host:80",), "only host:80 is allowed"),
        ("http://host.evil/x", ("host", "evil"), "only host, evil are allowed"),
        ("http://host:x/", ("host",), "not a valid URL"),
        ("http://a..b/x", ("a..b",), "not a valid URL"),
        (f"http://{'a' * 64}/x", ("a" * 64,), "not a valid URL"),
        ("ftp://host/x", ("host",), "not the address of a server"),
        ("http:///x", ("host",), "not the address of a server"),
        ("http://host/a b", ("host",), "not the address of a server"),
        ("http://host/ä", ("host",), "not the address of a server"),
        ("http://host/a", ("http://host",), "HOST or HOST:PORT was expected"),
    ],
)
def test_hosts_that_are_refused(address, hosts, said):
    with pytest.raises(UsageError) as refused:
        allowed_address(address, hosts)
    assert said in str(refused.value)


def test_a_password_in_an_address_is_refused_and_not_repeated():
    with pytest.raises(UsageError) as refused:
        allowed_address("http://me:hunter2@host/x", ("host",))
    assert "hunter2" not in str(refused.value)
    with pytest.raises(UsageError) as refused:
        header_variable("Authorization: Bearer hunter2")
    assert "hunter2" not in str(refused.value)
    assert "environment variable" in str(refused.value)


@pytest.mark.parametrize(
    "text", ["", "Authorization", "Bad Name: env:X", "Host: env:X", "A: env:", "A: env:1"]
)
def test_headers_that_are_refused(text):
    with pytest.raises(UsageError):
        header_variable(text)


def test_a_header_is_sent_from_the_environment_and_never_repeated(monkeypatch):
    header = "Authorization: env:HOLDFAST_TEST_TOKEN"
    with Server([401]) as server:
        with pytest.raises(UsageError, match="HOLDFAST_TEST_TOKEN, which is not set"):
            opened(server, headers=(header,))
        assert server.headers == []
        monkeypatch.setenv("HOLDFAST_TEST_TOKEN", "Bearer hunter2hunter2")
        found, _ = opened(server, headers=(header,))
        with pytest.raises(TargetLost) as refused:
            asked(found)
        assert "refused …" in str(refused.value)
        assert "hunter2" not in str(refused.value)
        asked(found)
        assert {sent["Authorization"] for sent in server.headers} == {"Bearer hunter2hunter2"}
        monkeypatch.setenv("HOLDFAST_TEST_TOKEN", "one\r\nX: two")
        with pytest.raises(UsageError, match="printable ASCII"):
            opened(server, headers=(header,))


@pytest.mark.parametrize("trouble", ["repeats", "repeats_quoted", "repeats_at_the_end", "repeats_at_once"])
def test_a_header_is_repeated_in_no_message(trouble, monkeypatch):
    monkeypatch.setenv("HOLDFAST_TEST_TOKEN", 'Bearer hun"ter/2/hunter2')
    with Server([trouble]) as server:
        headers = ("Authorization: env:HOLDFAST_TEST_TOKEN",)
        found, _ = opened(server, "/predict", request='{"instances": $x}', headers=headers, retries=0)
        with pytest.raises(TargetLost, match="…") as refused:
            asked(found)
    assert "hun" not in str(refused.value)


def test_nothing_is_sent_that_was_not_given(server):
    asked(opened(server)[0])
    usual = {"Host", "Accept", "Accept-Encoding", "Content-Type", "Content-Length"}
    assert {name for sent in server.headers for name in sent} == usual


@pytest.mark.parametrize(
    "request_, said",
    [
        ('{"instances": []}', "with $x for the rows"),
        ('{"instances": "$x"}', "outside of quotes"),
        ('{"instances": "no $x"}', "Expecting"),
        ('{"a": $x, "b": $x}', "once"),
        ('{"a": $x', "Expecting"),
    ],
)
def test_templates_that_are_refused(server, request_, said):
    with pytest.raises(UsageError) as refused:
        opened(server, "/predict", request=request_)
    assert said in str(refused.value)


def test_an_unknown_path_is_refused_with_the_existing_ones(server):
    with pytest.raises(TargetLost, match="has no 'scores', but the keys predictions"):
        asked(opened(server, "/predict", request='{"instances": $x}', response="scores")[0])
    with pytest.raises(TargetLost, match="but numbers or text were expected"):
        asked(opened(server, "/predict", request='{"instances": $x}', response="predictions")[0])


def test_other_addresses_and_models_are_refused(server):
    with pytest.raises(UsageError, match="http_request="):
        opened(server, "/predict")
    with pytest.raises(TargetLost, match="responds 404 Not Found: .*unknown model"):
        opened(server, "/v2/models/other")
    with pytest.raises(UsageError, match="did you mean 'scores'"):
        opened(server, response="score")
    for tensors, said in (
        (("UINT8", [-1, 6], "FP32", [-1, 3]), "UINT8"),
        (("FP32", [-1], "BOOL", [-1]), "BOOL"),
    ):
        with Server(metadata=tensors) as other, pytest.raises(TargetError, match=said):
            opened(other)
    server.metadata["inputs"] *= 2
    with pytest.raises(TargetError, match="has the inputs x, x"):
        opened(server)
    server.metadata["inputs"] = [{"name": "x"}]
    with pytest.raises(TargetLost, match="an unknown format"):
        opened(server)


def test_a_server_without_a_description_is_queried(server):
    server.metadata.update(inputs=[], outputs=None)
    found, _ = opened(server)
    np.testing.assert_allclose(asked(found), network(X), rtol=1e-6)
    assert "input-0" in found.notes[1]


def test_the_digest_is_of_what_decides_the_answers(server, monkeypatch):
    monkeypatch.setenv("HOLDFAST_TEST_TOKEN", "x" * 9)
    first = opened(server)[0].digest
    assert opened(server, headers=("A: env:HOLDFAST_TEST_TOKEN",), max_rows=3)[0].digest == first
    template = opened(server, "/predict", **TEMPLATE)[0].digest
    server.metadata["versions"] = ["2"]
    assert len({first, template, opened(server)[0].digest}) == 3
