"""Requests and responses of the Open Inference Protocol: what is read is what was sent, and the rest is refused."""

import base64
import dataclasses
import io
import json
import math
import tracemalloc
import wave

import msgspec
import numpy as np
import pytest
import torch

from holdfast.core.model import Bounds
from holdfast.io.remote.payloads import Shaped
from holdfast.server import protocol_v2
from holdfast.server.protocol_v2 import BINARY, LENGTH_HEADER, Signature, encoded, read_request
from holdfast.server.requests import Refused

from .small import CLASSES, FEATURES, SIGNATURE, request

X = torch.rand(3, FEATURES, generator=torch.Generator().manual_seed(1))


def with_input(**changes):
    content = json.loads(request(X))
    content["inputs"][0] |= changes
    return json.dumps(content).encode()


def binary(x=X, **parameters):
    tail = x.numpy().astype("<f4").tobytes()
    tensor = {"name": "input", "shape": list(x.shape), "datatype": "FP32"}
    tensor["parameters"] = {"binary_data_size": len(tail)}
    head = json.dumps({"inputs": [tensor], "parameters": parameters}).encode()
    return head + tail, len(head)


def test_every_form_of_the_same_inputs_is_read_to_the_same_tensor():
    nested = with_input(data=X.tolist())
    body, length = binary()
    for content, header in ((request(X), None), (nested, None), (body, length)):
        assert torch.equal(read_request(content, header, SIGNATURE).x, X)
    assert torch.equal(read_request(Shaped("input").body(X), None, SIGNATURE).x, X)


def test_numbers_in_json_are_kept_as_they_were_sent():
    numbers = [0.1, 0.1 + 2**-40, 1, 0.25]
    content = read_request(with_input(shape=[1, FEATURES], data=numbers), None, SIGNATURE)
    assert content.x.dtype == torch.float32 and content.x[0, 0] == content.x[0, 1]
    assert content.sent.dtype == torch.float64 and content.sent.tolist() == [numbers]
    assert read_request(*binary(), SIGNATURE).sent is None


UNBOUNDED = Signature("small", (2, 2), CLASSES, Bounds(-math.inf, math.inf), max_rows=8)
NUMBERS = np.random.default_rng(0).normal(size=(50, 4)) * 10.0 ** np.arange(-25, 25)[:, None]


def content_of(body, signature=UNBOUNDED):
    """What a request is read to, or the reason for which it is refused."""
    try:
        read = read_request(body, None, signature)
    except Refused as refused:
        return str(refused)
    return read.x.tolist(), None if read.sent is None else read.sent.tolist(), read.id, read.outputs


def sent(data, more="", shape="[1, 2, 2]"):
    tensor = f'{{"name": "input", "shape": {shape}, "datatype": "FP32", "data": {data}}}'
    return f'{{"inputs": [{tensor}]{more}}}'.encode("utf-8", "surrogatepass")


@pytest.mark.parametrize(
    "body",
    [
        *(sent(json.dumps(row.tolist())) for row in NUMBERS),
        sent("[[[1, 2.5], [-0.0, 1e-46]]]"),
        sent("[[[1, 2], [3]], [4]]"),
        sent("[[1, 2], [3, 4]]"),
        sent("[[1, 2, 3, 4]]"),
        sent("[1, 2, 3]"),
        sent("[1, 2, 3, true]"),
        sent("[[[1, 2], [3, false]]]"),
        sent("[1, 2, 3, null]"),
        sent('[1, 2, 3, "4"]'),
        sent("[1, 2, 3, 9007199254740993]"),
        sent("[1, 2, 3, -18446744073709551617]"),
        sent("[1, 2, 3, 1e39]"),
        sent("[1, 2, 3, 1e400]"),
        sent("[1, 2, 3, NaN]"),
        sent("[1, 2, 3, 01]"),
        sent("[1, 2, 3, 4,]"),
        sent("[1, 2, 3, 4]", shape="[1.0, 2, 2]"),
        sent("[1, 2, 3, 4]", shape="[true, 2, 2]"),
        sent("[1, 2, 3, 4]", ', "id": "é"'),
        sent("[1, 2, 3, 4]", ', "id": "\\ud800"'),
        sent("[1, 2, 3, 4]", ', "id": 1'),
        sent("[1, 2, 3, 4]", ', "more": [NaN]'),
        sent("[1, 2, 3, 4]", ', "more": "\ud800"'),
        sent("[1, 2, 3, 4]", ', "inputs": []'),
        sent("[1, 2, 3, 4]", ', "more": ' + "[" * 2000 + "]" * 2000),
        sent("[1, 2, 3, 4]") + b"x",
        b"\xef\xbb\xbf" + sent("[1, 2, 3, 4]"),
    ],
)
def test_the_fast_decoder_changes_neither_what_is_read_nor_what_is_refused(body, monkeypatch):
    fast = content_of(body)

    def failing(depth):
        raise msgspec.DecodeError

    monkeypatch.setattr(protocol_v2, "_float_decoder", failing)
    assert fast == content_of(body)


def test_scores_that_are_not_finite_are_never_written_as_json():
    plain = read_request(request(X), None, SIGNATURE)
    with pytest.raises(ValueError, match="JSON"):
        encoded(torch.tensor([[1.0, math.inf, -math.inf]]), plain, SIGNATURE)


def test_scores_are_returned_exactly_in_json_and_as_bytes():
    scores = torch.randn(3, CLASSES)
    plain = read_request(request(X, id="a\ud800"), None, SIGNATURE)
    content = json.loads(encoded(scores, plain, SIGNATURE).body)
    assert content["id"] == "a\ud800" and content["model_version"] == "1"
    assert torch.equal(torch.tensor(content["outputs"][0]["data"]).reshape(3, CLASSES), scores)
    body, length = binary(binary_data_output=True)
    answer = encoded(scores, read_request(body, length, SIGNATURE), SIGNATURE)
    header = int(dict(answer.headers)[LENGTH_HEADER])
    (output,) = json.loads(answer.body[:header])["outputs"]
    tail = answer.body[header:]
    assert answer.media_type == BINARY and output["parameters"] == {"binary_data_size": len(tail)}
    assert np.array_equal(np.frombuffer(tail, "<f4").reshape(3, CLASSES), scores.numpy())


def test_only_the_requested_outputs_are_returned_each_in_its_form():
    vote = dataclasses.replace(SIGNATURE, certified_patch="patch:2x2")
    scores, certified = torch.randn(3, CLASSES), torch.tensor([True, False, True])
    read = read_request(request(X, outputs=[{"name": "certified"}]), None, vote)
    (output,) = json.loads(encoded(scores, read, vote, certified).body)["outputs"]
    assert (output["name"], output["data"]) == ("certified", [True, False, True])
    outputs = [
        {"name": "scores", "parameters": {"binary_data": True}},
        {"name": "certified", "parameters": {"binary_data": False}},
    ]
    answer = encoded(scores, read_request(request(X, outputs=outputs), None, vote), vote, certified)
    header = int(dict(answer.headers)[LENGTH_HEADER])
    assert json.loads(answer.body[:header])["outputs"][1]["data"] == [True, False, True]
    assert answer.body[header:] == scores.numpy().tobytes()
    with pytest.raises(Refused, match="requested twice"):
        read_request(request(X, outputs=[{"name": "scores"}] * 2), None, vote)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b"{}", "inputs must be a list with one object"),
        (with_input(name="x"), "'x'; 'input' was expected"),
        (with_input(datatype="FP64"), "'FP64'; FP32 was expected"),
        (with_input(shape=[3, 5]), r"\[n, 4\] was expected"),
        (with_input(shape=[]), r"\[n, 4\] was expected"),
        (with_input(shape=[True, 4]), "list of integers"),
        (with_input(shape=[0, 4], data=[]), "1 to 8 were expected"),
        (with_input(shape=[9, 4], data=[0.5] * 36), "1 to 8 were expected"),
        (with_input(shape=[10**30, 4]), "1 to 8 were expected"),
        (with_input(data=[0.5]), "1 values in 1 dimensions; 12 were expected"),
        (with_input(data=X.T.tolist()), "12 values in 2 dimensions"),
        (with_input(data=[[0.5], [0.5, 0.5]]), "neither a flat list"),
        (with_input(data=["0.5"] * 12), "numbers only"),
        (with_input(data=[0.5] * 11 + [True]), "numbers only"),
        (with_input(data=[None] * 12), "numbers only"),
        (with_input(data=[10**400] * 12), "numbers only"),
        (with_input(data={"a": 1}), "list of numbers"),
        (with_input(data=[0.5] * 11 + [1.5]), "outside of 0 to 1"),
        (with_input(data=[0.5] * 11 + [1e39]), "outside of 0 to 1"),
        (with_input(data=[float("nan")] * 12), "not valid JSON"),
        (request(X, id=7), "must be text"),
        (request(X, id=None), "must be text"),
        (request(X, outputs=None), "must be a list"),
        (request(X, outputs=[{"name": "label"}]), "'label' does not exist"),
        (request(X, outputs=[{"name": "scores", "parameters": {"classification": 2}}]), "classification"),
        (request(X, parameters=[]), "must be an object"),
        (request(X, parameters={"binary_data_output": 1}), "true or false"),
        (with_input(parameters={"binary_data_size": 48}), "one of them was expected"),
    ],
)
def test_an_invalid_body_is_refused_with_the_first_mistake(body, reason):
    with pytest.raises(Refused, match=reason) as refused:
        read_request(body, None, SIGNATURE)
    assert refused.value.status == 400 and len(str(refused.value)) < 200


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda body, n: (body, len(body) + 1), "the header states"),
        (lambda body, n: (body[:-4], n), "44 bytes follow the JSON; 48 were expected"),
        (lambda body, n: (body + b"x", n), "49 bytes follow"),
        (lambda body, n: (body.replace(b": 48", b": 44"), n), "binary_data_size is 44; 48"),
        (lambda body, n: (request(X) + b"xyz", len(request(X))), "no input has the parameter"),
        (lambda body, n: (body[:-4] + np.float32("nan").tobytes(), n), "not a number"),
    ],
)
def test_invalid_bytes_after_the_json_are_refused(change, reason):
    with pytest.raises(Refused, match=reason):
        read_request(*change(*binary()), SIGNATURE)


def test_a_range_for_each_value_is_checked():
    bounds = Bounds(torch.zeros(FEATURES), torch.tensor([1.0, 1.0, 1.0, 2.0]))
    signature = Signature("small", (FEATURES,), CLASSES, bounds)
    read_request(request(torch.tensor([[0.5, 0.5, 0.5, 1.5]])), None, signature)
    with pytest.raises(Refused, match="the range that the model declares"):
        read_request(request(torch.tensor([[1.5, 0.5, 0.5, 1.5]])), None, signature)


def test_the_largest_valid_request_is_within_the_limit_of_bytes():
    longest = torch.full((SIGNATURE.max_rows, FEATURES), 1.1754942e-38)
    assert len(request(longest)) <= SIGNATURE.most_bytes


def test_text_among_many_numbers_needs_little_memory():
    signature = Signature("m", (10_000,), CLASSES)
    data = ["a" * 10_000, *[0] * 9_999]  # as an array of numpy, 400 MB
    body = json.dumps({"inputs": [{"name": "input", "shape": [1, 10_000], "datatype": "FP32", "data": data}]})
    tracemalloc.start()
    try:
        with pytest.raises(Refused, match="numbers only"):
            read_request(body.encode(), None, signature)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


CLIPS = Signature("clips", (6,), CLASSES, Bounds(-1, 1), max_rows=2, sampling_rate=8000)


def clips(*samples, rate=8000, width=2, **changes):
    texts = []
    for each in samples:
        file = io.BytesIO()
        with wave.open(file, "wb") as output:
            output.setparams((1, width, rate, 0, "NONE", ""))
            output.writeframes(np.array(each, f"<i{width}").tobytes())
        texts.append(base64.b64encode(file.getvalue()).decode())
    tensor = {"name": "input", "shape": [len(samples)], "datatype": "BYTES", "data": texts, **changes}
    return json.dumps({"inputs": [tensor]}).encode()


def test_clips_are_read_from_wav_files_in_base64_and_padded():
    x = read_request(clips([16384, -32768, 0, 8192], [1]), None, CLIPS).x
    assert x.dtype == torch.float32 and x.shape == (2, 6)
    assert x[0].tolist() == [0.5, -1, 0, 0.25, 0, 0] and x[1].tolist() == [2**-15, 0, 0, 0, 0, 0]


SHORTENED = base64.b64encode(
    base64.b64decode(json.loads(clips([1, 2]))["inputs"][0]["data"][0])[:-2]
).decode()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (clips([1] * 7), "more than 6 samples; 1 to 6"),
        (clips([]), "no samples; 1 to 6"),
        (clips([1], rate=16_000), "16 bits, 1 channels and 16000 Hz; 16 bits, 1 channels and 8000 Hz"),
        (clips([1], width=4), "32 bits, 1 channels"),
        (clips([1], data=[SHORTENED]), "has 1 samples, and its header states 2"),
        (clips([1], data=["no base64"]), "no .wav file of 16 bits in base64"),
        (clips([1], data=[base64.b64encode(b"RIFF....WAVE").decode()]), "no .wav file"),
        (clips([1], data=[3]), "a list of 1 texts"),
        (clips([1], shape=[1, 6]), r"shape is \[1, 6\]; \[n\] was expected"),
    ],
)
def test_wav_files_that_do_not_suit_the_model_are_refused(body, reason):
    with pytest.raises(Refused, match=reason):
        read_request(body, None, CLIPS)
