"""A server of a model of files or of texts: requests as BYTES, their limits, and the rules of a guard for them."""

import base64
import json
import random
import struct
import zipfile

import httpx
import pytest

from holdfast.core.errors import UsageError
from holdfast.io.models.byte_models import FileFunction, ReadFiles, Reading, shortest_file
from holdfast.server.app import openapi_document
from holdfast.server.protocol_v2 import BINARY, LENGTH_HEADER, Signature, read_request
from holdfast.server.requests import Refused
from holdfast.verbs.calibrate import calibrate_file
from holdfast.verbs.serve_opening import server_setup
from holdfast.verbs.settings import Calibrate, Serve

from .test_server import JSON, running, scores

CODE = """
def make():
    return lambda inputs: [[float(len(each)), float(each.count(each[:1]))] for each in inputs]
"""
LONGEST = 400
SIGNATURES = {
    kind: Signature("m", (), 2, max_rows=2, input_type="BYTES", kind=kind, lengths=(1, 5))
    for kind in ("files", "texts")
}


def tensor(n, **more):
    return json.dumps({"inputs": [{"name": "input", "shape": [n], "datatype": "BYTES", **more}]}).encode()


def as_json(*elements, **more):
    data = [base64.b64encode(e).decode() if isinstance(e, bytes) else e for e in elements]
    return tensor(len(elements), **{"data": data, **more}), None


def as_bytes(*elements, tail=b"", stated=0):
    data = b"".join(struct.pack("<I", len(each)) + each for each in elements) + tail
    head = tensor(len(elements), parameters={"binary_data_size": len(data) + stated})
    return head + data, len(head)


def test_files_and_texts_are_read_from_json_and_from_bytes():
    files, texts = (b"\0a\xff", b"b"), ("aé", "\U0001f600")
    for body in (as_json(*files), as_bytes(*files)):
        x = read_request(*body, SIGNATURES["files"]).x
        assert x.tolist() == [[1.0, 98.0, 256.0, 0.0, 0.0], [99.0, 0.0, 0.0, 0.0, 0.0]]
    for body in (as_json(*texts), as_bytes(*(text.encode() for text in texts))):
        x = read_request(*body, SIGNATURES["texts"]).x
        assert x.tolist() == [[97.0, 233.0, 0.0, 0.0, 0.0], [128512.0, 0.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("kind", "body", "reason"),
    [
        ("files", as_json(b"abcdef"), "row 0 of data has 6 bytes; 1 to 5 were expected"),
        ("files", as_json(b"a", b""), "row 1 of data has 0 bytes"),
        ("files", as_bytes(b""), "row 0 of data has 0 bytes"),
        ("files", as_json("%%"), "row 0 of data is no file in base64"),
        ("files", as_json("é"), "row 0 of data is no file in base64"),
        ("files", as_json(3), "data must be a list of 1 texts, files in base64"),
        ("files", as_json(b"a", shape=[1, 1]), r"shape is \[1, 1\]; \[n\] was expected"),
        ("files", as_json(b"a", datatype="UINT8"), "datatype of the input is 'UINT8'; BYTES was expected"),
        ("files", as_bytes(b"a", tail=b"\5\0\0\0a"), "are not 1 elements"),
        ("files", as_bytes(b"a", tail=b"\0"), "are not 1 elements"),
        ("files", as_bytes(b"a", tail=b"\0\0\0\0"), "are not 1 elements"),
        ("files", as_bytes(b"a", stated=1), "5 bytes follow the JSON; 6 were expected"),
        ("files", (as_json(b"a")[0] + b"b", len(as_json(b"a")[0])), "1 bytes follow the JSON; no input"),
        ("texts", as_json("abcdef"), "row 0 of data has 6 characters; 1 to 5 were expected"),
        ("texts", as_json(" \n"), r"row 0 of data has 2 characters, all of them whitespace"),
        ("texts", as_json("a\0"), "no valid text without the character 0"),
        ("texts", as_json("\ud800"), "no valid text"),
        ("texts", as_bytes(b"\xff"), "no valid text"),
    ],
)
def test_files_and_texts_that_do_not_suit_the_model_are_refused(kind, body, reason):
    with pytest.raises(Refused, match=reason) as refusal:
        read_request(*body, SIGNATURES[kind])
    assert refusal.value.status == 400


def test_the_largest_valid_requests_are_accepted_as_bodies():
    longest = {
        "files": as_json(b"\xff" * 5, b"\xff" * 5),
        "texts": as_json("\U0001f600" * 5, "\U0001f600" * 5),
    }
    for kind, (body, _) in longest.items():
        assert len(body) <= SIGNATURES[kind].most_bytes
    document = json.dumps(openapi_document(SIGNATURES["files"], keys=False, max_body=9))
    assert '"contentEncoding": "base64"' in document and '"const": "BYTES"' in document


def test_a_model_of_a_fixed_length_states_the_shortest_file_that_it_reads():
    assert shortest_file(FileFunction(ReadFiles(None, Reading(4, 2)), "")) == 6
    assert shortest_file(FileFunction(ReadFiles(None, Reading(4, 2, padding=256)), "")) == 1
    assert shortest_file(FileFunction(len, "")) == 1


@pytest.fixture
def served(tmp_path):
    """Function that returns the setup of a server; `rules` are those of a guard."""

    def prepared(kind, *, rules=None, **settings):
        (tmp_path / "net.py").write_text(CODE)
        values = {"port": 0, "name": "small", "model": f"{tmp_path / 'net.py'}:make", "inputs": kind}
        if rules is None:
            return server_setup(Serve(**{**values, "input_shape": (LONGEST,), **settings}))
        guard = tmp_path / "guard.yaml"
        (tmp_path / "guard.key").write_text("5a" * 32)
        (tmp_path / "guard.key").chmod(0o600)
        guard.write_text(
            f"mode: enforce\ninputs: {{kind: {kind}, shape: [{LONGEST}]}}\nstate: {{at: memory}}\n"
            f"false_positives: 0.1\nrules: {{{rules}}}\n"
        )
        return server_setup(Serve(**{**values, "inputs": None, "guard": str(guard), **settings}))

    return prepared


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["files", "texts"])
def test_a_server_answers_files_and_texts_and_its_guard_refuses_near_duplicates(served, kind):
    rng = random.Random(0)
    words = [" ".join("".join(rng.choices("abcdefghij", k=6)) for _ in range(40)) for _ in range(30)]
    inputs = [word.encode() for word in words] if kind == "files" else words
    setup = served(kind, rules="schema: {}, queries: {radius: 0.4}, energy: {}")
    with running(setup) as (_, url, _), httpx.Client(timeout=60) as client:
        metadata = client.get(url.removesuffix("/infer")).json()
        assert metadata["inputs"] == [{"name": "input", "datatype": "BYTES", "shape": [-1]}]

        def sent(each):
            return client.post(url, content=as_json(each)[0], headers=JSON)

        for each in inputs:  # different inputs are not refused
            assert scores(sent(each)).tolist() == [len(each), each.count(each[:1])]
        body, length = as_bytes(*(word.encode() for word in words[:2]))
        binary = {"content-type": BINARY, LENGTH_HEADER: str(length)}
        assert scores(client.post(url, content=body, headers=binary)).tolist()[::2] == [279.0, 279.0]
        # an insertion moves everything behind it, which position by position would be another input
        versions = [words[0][:k] + rng.choice("xyz") + words[0][k:] for k in range(0, 200, 4)]
        statuses = [sent(v.encode() if kind == "files" else v).status_code for v in versions]
        assert statuses[:5] == [200] * 5 and statuses[-20:].count(422) > 15  # hashes miss a few
        assert sent(inputs[1]).status_code == 200
        assert sent(inputs[0] + inputs[0]).status_code == 400
        assert client.post(url, content=b" " * 2**20, headers=JSON).status_code == 413


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        ("range: {}", "rules.range"),
        ("squeezing: {median: 0}", "rules.squeezing"),
        ("stability: {}", "rules.stability"),
        ("mahalanobis: {on: inputs}", "rules.mahalanobis"),
        ("queries: {cameras: true}", "rules.queries.cameras"),
    ],
)
def test_a_rule_on_numbers_is_refused_for_files_with_the_rules_that_remain(served, rules, named):
    with pytest.raises(
        UsageError, match=rf"{named} needs inputs of numbers, and inputs.kind is files.*energy"
    ):
        served("files", rules=rules)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"input_shape": None}, "largest number of bytes of a file, .* is not known"),
        ({"input_shape": (3, 32)}, r"largest number of bytes of a file, .* is \[3, 32\]"),
        ({"sampling_rate": 8000}, "sampling_rate: only for inputs of numbers, and the inputs are files"),
        ({"bounds": (0, 2)}, "bounds is for inputs that are numbers, and the inputs are files"),
        (
            {"rules": "energy: {}", "inputs": "texts"},
            "inputs.kind is files, and the inputs of the model are texts",
        ),
        ({"rules": "energy: {}", "input_shape": (5,)}, r"inputs.shape is \[400\], and the model takes \[5\]"),
    ],
)
def test_settings_that_do_not_suit_files_are_refused(served, settings, reason):
    with pytest.raises(UsageError, match=reason):
        served("files", **settings)


def test_a_guard_of_files_is_calibrated_on_a_folder_of_files(served, tmp_path):
    served("files", rules="queries: {eps: 0.1}, energy: {}")
    rng = random.Random(0)
    for number in range(40):
        path = tmp_path / "files" / f"{number % 2}" / str(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.randbytes(rng.randrange(100, LONGEST)))
    settings = {"model": f"{tmp_path / 'net.py'}:make", "guard": str(tmp_path / "guard.yaml")}
    result = calibrate_file(Calibrate(data=str(tmp_path / "files"), trust_code=True, **settings))
    assert set(result.calibration.fired_by) == {"queries", "energy"} and result.calibration.n == 32
    assert result.coverage.eps == pytest.approx(0.1) and "runs of three bytes" in result.coverage.text
    notes = served("files", rules="queries: {eps: 0.1}, energy: {}").notes
    assert notes and not any("only reports" in note for note in notes)
    with zipfile.ZipFile(tmp_path / "files" / "0" / "long", "w") as archive:
        archive.writestr("a", "b" * LONGEST)
    with pytest.raises(UsageError, match=r"shape \(33, .*\); expected \(n, at most 400\)"):
        calibrate_file(Calibrate(data=str(tmp_path / "files"), trust_code=True, **settings))
