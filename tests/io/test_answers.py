"""The forms that answers and requests of a server have, and what is refused of one answer."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import holdfast
from holdfast.cli.app import run
from holdfast.core.errors import TargetError, TargetLost, TargetRefused, UnclearOutput, UsageError
from holdfast.io.models.models import Declared, open_model
from holdfast.io.remote.payloads import ServerAnswers, Shaped, Template, first_characters
from holdfast.io.remote.remote import Remote
from holdfast.verbs.functions import assess
from servers import CLASSES, FEATURES, NAMES, Server, examples, network

X, Y = examples()
THREAT = "linf:0.05,queries=25"


def as_given(text):
    return text


def reader(*, labels=None, names=None, form=None, **more):
    form = form or Template.of('{"rows": $x}', None)
    options = {"declared": False, "masked": as_given, **more}
    return ServerAnswers(form, labels=labels, names=names, **options)


def rows(n):
    return torch.zeros(n, FEATURES)


def read(answer, n=2, **more):
    return reader(**more).read(answer, rows(n)).tolist()


def named(scores):
    return [dict(zip(NAMES, row, strict=True)) for row in scores]


SCORES = [[0.5, 1.5, -2.0], [0.25, 3.0, 1.0]]
BY_NAME = {
    "objects": named(SCORES),
    "in another order": [dict(reversed(each.items())) for each in named(SCORES)],
    "columns": dict(zip(NAMES, map(list, zip(*SCORES, strict=True)), strict=True)),
    "pairs": [[{"label": k, "score": v} for k, v in each.items()] for each in named(SCORES)],
    "sorted pairs": [
        sorted(({"label": k, "score": v} for k, v in each.items()), key=lambda pair: -pair["score"])
        for each in named(SCORES)
    ],
}


@pytest.mark.parametrize("answer", BY_NAME.values(), ids=BY_NAME)
def test_scores_by_class_name_are_read_in_the_order_of_the_names(answer):
    assert read(answer, names=NAMES) == SCORES
    assert read(answer, names=NAMES[::-1]) == [row[::-1] for row in SCORES]
    with pytest.raises(TargetLost, match=r"with the keys .*class_names=.* in the order"):
        read(answer)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda row: row.pop("emu"), r"no score of 'emu', but the classes are cat, dog, emu.*class_names="),
        (lambda row: row.update(fox=1.0), r"a score of 'fox', but the classes are"),
        (lambda row: row.update(cat="high"), r"contains a list of 2, but numbers or text"),
        (lambda row: row.update(cat=True), r"contains a list of 2, but"),
        (lambda row: row.update(cat=[1.0]), r"contains a list of 2, but"),
    ],
)
def test_names_that_do_not_fit_the_classes_are_refused(change, said):
    answer = named(SCORES)
    change(answer[1])
    with pytest.raises(TargetLost, match=said):
        read(answer, names=NAMES)


ONE = {
    "with the batch axis": SCORES[:1],
    "flat": SCORES[0],
    "an object": named(SCORES)[0],
    "an object in a list": named(SCORES)[:1],
    "columns": {name: [score] for name, score in named(SCORES)[0].items()},
    "pairs": BY_NAME["pairs"][0],
    "pairs in a list": BY_NAME["pairs"][:1],
}


@pytest.mark.parametrize("answer", ONE.values(), ids=ONE)
def test_the_answer_to_one_row_may_have_no_batch_axis(answer):
    assert read(answer, 1, names=NAMES) == SCORES[:1]


@pytest.mark.parametrize("answer", ["dog", ["dog"], [["dog"]], 1, [1], [[1]], 1.0], ids=str)
def test_the_class_of_one_row_may_have_no_batch_axis(answer):
    assert read(answer, 1, labels=CLASSES, names=NAMES) == [[0, 1, 0]]


def test_one_number_is_the_single_score_of_one_row():
    assert read(0.3, 1) == read([0.3], 1) == read([[0.3]], 1) == [[0.3]]
    assert read(2, 1, declared=True) == [[2.0]]
    with pytest.raises(TargetLost, match="one integer per row, such as 2"):
        read(2, 1)


@pytest.mark.parametrize(
    "answer", [["cat", "emu"], [["cat"], ["emu"]], [0, 2], [[0], [2]], [0.0, 2.0]], ids=str
)
def test_classes_are_read_whatever_their_shape(answer):
    assert read(answer, labels=CLASSES, names=NAMES) == [[1, 0, 0], [0, 0, 1]]


def test_whole_numbers_are_names_where_all_names_are_whole_numbers():
    assert read([7, 3], labels=3, names=("3", "5", "7")) == [[0, 0, 1], [1, 0, 0]]
    assert read(["7", "3"], labels=3, names=("3", "5", "7")) == [[0, 0, 1], [1, 0, 0]]
    with pytest.raises(TargetLost, match="'4'; the names of the classes are 3, 5, 7"):
        read([4, 3], labels=3, names=("3", "5", "7"))
    with pytest.raises(TargetRefused, match="class 7; integers from 0 to 2 .*class_names="):
        read([7, 1], labels=3)


def tensor(data, shape, datatype):
    return {"outputs": [{"name": "y", "datatype": datatype, "shape": shape, "data": data}]}


OIP = Shaped("x")


def test_the_protocol_states_whether_numbers_are_integers():
    assert read(tensor([1, 0], [2, 1], []), form=OIP, expected=2, declared=True) == [[1.0], [0.0]]
    assert read(tensor([1, 0], [2, 1], "FP32"), form=OIP, expected=2) == [[1.0], [0.0]]
    with pytest.raises(TargetLost, match="one integer per row"):
        read(tensor([1.0, 0.0], [2, 1], "INT64"), form=OIP)
    assert read(tensor([1.0, 0.0], [2, 1], "INT64"), form=OIP, labels=2) == [[0, 1], [1, 0]]
    assert read(tensor(["dog", "cat"], [2, 1], "BYTES"), form=OIP, labels=3, names=NAMES)[0] == [0, 1, 0]


def test_of_several_outputs_the_first_of_the_wanted_kind_is_read():
    scores, classes = (tensor([0.5, 1.5], [1, 2], "FP32"), tensor([1], [1], "INT64"))
    answer = {"outputs": classes["outputs"] + scores["outputs"]}
    assert read(answer, 1, form=OIP) == [[0.5, 1.5]]
    answer["outputs"].reverse()
    assert read(answer, 1, form=Shaped("x", labels=True), labels=2) == [[0, 1]]


def test_more_classes_than_scores_are_refused_with_the_option_for_classes():
    for width, answer in ((1, [0.1, 0.2]), (3, SCORES)):
        with pytest.raises(
            TargetLost, match=f"{width} scores? per row, but 10 classes .*http_labels=True, classes=10"
        ):
            read(answer, expected=10)
    assert read(SCORES, expected=3) == SCORES
    assert read([0.1, 0.2], expected=2) == [[0.1], [0.2]]


LIST_OF_OTHERS = r", but numbers or text were expected.*http_response="
BAD = {
    "null": (None, f"contains null{LIST_OF_OTHERS}"),
    "nulls": ([None, None], f"a list of 2{LIST_OF_OTHERS}"),
    "an empty list": ([], r"the response to 2 rows has shape \(0,\); .*http_max_rows=1"),
    "an empty object": ({}, f"an empty object{LIST_OF_OTHERS}"),
    "empty lists": ([[], []], r"shape \(2, 0\); one row of scores"),
    "booleans": ([True, False], f"true or false{LIST_OF_OTHERS}"),
    "a boolean among numbers": ([[True, None], [0.5, 1]], f"true or false{LIST_OF_OTHERS}"),
    "true among numbers": ([[True, 0.5], [0.5, 2.5]], f"true or false{LIST_OF_OTHERS}"),
    "text among numbers": (["cat", 3], f"a list of 2{LIST_OF_OTHERS}"),
    "text among nulls": (["0.5", None], f"a list of 2{LIST_OF_OTHERS}"),
    "other lengths": ([[1.0, 2.0], [3.0]], f"a list of 2{LIST_OF_OTHERS}"),
    "too few rows": ([[1.0, 2.0]], r"the response to 2 rows has shape \(1, 2\)"),
    "too few objects": (named(SCORES)[:1], r"the response to 2 rows has shape \(1, 3\)"),
    "too many rows": ([[1.0, 2.0]] * 3, r"the response to 2 rows has shape \(3, 2\)"),
    "one value": (0.5, "the response to 2 rows has one value"),
    "an axis too many": ([[[1.0, 2.0]]] * 2, r"shape \(2, 1, 2\); one row of scores"),
    "one object for two rows": (named(SCORES)[0], f"an object{LIST_OF_OTHERS}"),
    "deep": (json.loads("[" * 400 + "]" * 400), f"a list of 1{LIST_OF_OTHERS}"),
    "infinity": ([[1.0, float("inf")]] * 2, "an infinite score"),
    "text": (["cat", "dog"], "'cat'; scores were expected.*http_labels=True"),
}


@pytest.mark.parametrize("answer, said", BAD.values(), ids=BAD)
def test_an_answer_that_is_not_understood_is_shown_with_the_way_out(answer, said):
    with pytest.raises(TargetError, match=said) as refused:
        read(answer, names=NAMES)
    _, _, shown = refused.value.message.partition(". The response begins: ")
    assert shown.removesuffix(" …") == json.dumps(answer)[:100]


BAD_CLASSES = {
    "scores": (SCORES, r"shape \(2, 3\); one class .*leave out http_labels"),
    "objects": (named(SCORES), "a list of 2, but numbers or text"),
    "another name": (["cat", "fox"], "'fox'; the names of the classes are cat, dog, emu"),
    "no whole number": ([0.5, 1], "the class 0.5; integers from 0 to 2"),
    "nan": ([float("nan"), 1], "the class nan; integers"),
    "booleans": ([True, False], "true or false"),
}


@pytest.mark.parametrize("answer, said", BAD_CLASSES.values(), ids=BAD_CLASSES)
def test_what_is_no_class_is_refused(answer, said):
    with pytest.raises(TargetError, match=said):
        read(answer, labels=CLASSES, names=NAMES)


@pytest.mark.parametrize(
    "first, then, said",
    [
        (SCORES, named(SCORES), "contains objects by class name, but earlier ones contained numbers"),
        (named(SCORES), SCORES, "contains numbers, but earlier ones contained objects"),
        (SCORES, [row[:2] for row in SCORES], "has 2 scores per row, but earlier ones had 3"),
        (SCORES, [1, 2], "one integer per row"),
        (SCORES, ["cat", "dog"], "the text 'cat'"),
        ([0.5, 0.1], SCORES, "has 3 scores per row, but earlier ones had 1"),
    ],
)
def test_a_form_that_changes_is_refused(first, then, said):
    answers = reader(names=NAMES)
    answers.read(first, rows(2))
    with pytest.raises(TargetLost, match=said):
        answers.read(then, rows(2))


def test_classes_that_change_from_text_to_numbers_are_refused():
    answers = reader(labels=CLASSES, names=NAMES)
    answers.read(["cat", "dog"], rows(2))
    with pytest.raises(TargetLost, match="contains numbers, but earlier ones contained text"):
        answers.read([0, 1], rows(2))


def test_the_beginning_of_an_answer_is_cut_after_its_secrets_are_masked():
    answer = {"error": "x" * 84 + "secret-token"}
    assert first_characters(answer, as_given).endswith("secre …")
    assert first_characters(answer, lambda text: text.replace("secret-token", "…")).endswith('x…"}')
    assert first_characters([0.5] * 10**6, as_given).startswith("[0.5, 0.5")
    with pytest.raises(TargetLost) as refused:
        read({"error": "secret-token"}, masked=lambda text: text.replace("secret-token", "…"))
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "request_, one, last",
    [
        ('{"a": [$x]}', False, False),
        ("$x_last", False, True),
        ("$x_one", True, False),
        ("$x_one_last", True, True),
    ],
)
def test_a_template_decides_how_rows_are_written(request_, one, last):
    form = Template.of(request_, None)
    assert (form.one, form.channels_last) == (one, last)
    x = torch.rand(1, 3, 2, 1)
    rows = x.movedim(1, -1) if last else x
    content = json.loads(form.body(x))
    content = content["a"][0] if isinstance(content, dict) else content
    assert content == (rows[0] if one else rows).tolist()


@pytest.mark.parametrize(
    "request_", ['{"x": $x_first}', '{"x": $x_on}', '{"x": "$x_one"}', '{"a": $x, "b": $x_one}']
)
def test_other_places_in_a_template_are_refused(request_):
    with pytest.raises(UsageError, match=r"http_request is .* \$x_one for one example without a batch axis"):
        Template.of(request_, None)


def opened(server, path="/any", *, classes=None, names=None, output=None, **remote):
    return open_model(
        server.url(path),
        declared=Declared(classes=classes, class_names=names, output=output),
        remote=Remote(hosts=("127.0.0.1",), timeout_s=2.0, **remote),
    )


def test_an_endpoint_of_one_example_gets_one_a_request():
    with Server(form=lambda scores: {"scores": scores[0].tolist()}) as server:
        found = opened(server, request='{"one": $x_one}', response="scores", max_rows=64)
        np.testing.assert_allclose(found.model(torch.from_numpy(X)).numpy(), network(X), rtol=1e-6)
        assert server.sizes == [1] * len(X)
        assert np.shape(server.bodies[0]["one"]) == (FEATURES,)
        batched = opened(server, request='{"instances": $x}', response="scores", max_rows=1)
        np.testing.assert_allclose(batched.model(torch.from_numpy(X)).numpy(), network(X), rtol=1e-6)
        with pytest.raises(TargetLost, match=r"24 rows has shape \(3,\).*http_max_rows=1"):
            opened(server, request='{"instances": $x}', response="scores").model(torch.from_numpy(X))


def test_the_order_of_names_decides_the_digest_where_they_may_be_looked_up():
    with Server() as server:
        template = {"request": '{"instances": $x}'}
        digests = {opened(server, names=names, **template).digest for names in (NAMES, NAMES[::-1], None)}
        assert len(digests) == 3
        own = {opened(server, "/v2/models/small", names=names).digest for names in (NAMES, None)}
        assert len(own) == 1


def test_declared_classes_that_the_server_does_not_have_are_refused_before_anything_is_sent():
    with Server() as server:
        for options in ({"classes": 10}, {"names": tuple("abcdefghij")}):
            with pytest.raises(
                TargetLost, match="describes has 3 scores per row, but 10 classes .*http_labels=True"
            ):
                opened(server, "/v2/models/small", **options)
        with pytest.raises(UsageError, match="classes is 3, but class_names has 2 names"):
            opened(server, classes=3, names=("a", "b"), request="$x")
        assert server.rows == []


@pytest.mark.parametrize("metadata", [["a list"], {"inputs": [{"name": "x"}]}], ids=["list", "no shape"])
def test_a_description_that_is_not_understood_is_shown(metadata):
    with Server() as server:
        server.metadata = metadata
        with pytest.raises(TargetLost, match=r"The response begins: .*http_request=") as refused:
            opened(server, "/v2/models/small")
    assert refused.value.message.endswith(json.dumps(metadata))


def test_whole_scores_of_several_classes_are_no_classes():
    with Server(metadata=("FP32", [-1, FEATURES], "INT8", [-1, CLASSES])) as server:
        assert opened(server, "/v2/models/small").access == "scores"
    with Server(metadata=("FP32", [-1, FEATURES], "INT8", [-1, 1])) as server:
        assert opened(server, "/v2/models/small", classes=CLASSES).access == "labels"
        assert opened(server, "/v2/models/small", output="logit").access == "scores"


def net(x):
    return torch.from_numpy(network(x.numpy())).to(x.dtype)


def net_last(x):
    return net(x.movedim(1, -1))


def sigmoid(scores):
    return 1 / (1 + np.exp(-scores[:, :1]))


def verdicts(model, data, access="scores", layout=None, **options):
    """What a run decides and asks: the columns that are the same whether scores or labels are judged."""
    threat = f"{THREAT},access={access}"
    model, data = holdfast.open_model(model, **options), holdfast.open_data(data, layout=layout)
    found = assess(model, data, threat, "black-box", doubts=False, n=6)
    columns = found.evidence.columns
    kept = (
        "correct",
        "prediction",
        "success",
        "adversarial_prediction",
        "queries",
        "first_success",
        "distance_linf",
    )
    return {name: columns[name].tolist() for name in kept}


TEMPLATE = {"http_request": '{"instances": $x}', "http_response": "r"}
ONE_EACH = {"http_request": '{"one": $x_one}', "http_response": "r"}
LABELS = {"http_labels": True, "classes": CLASSES}
SERVED = {
    "scores": ({}, "/v2/models/small", {}),
    "FP64": ({"metadata": ("FP64", [-1, FEATURES], "FP64", [-1, CLASSES])}, "/v2/models/small", {}),
    "a fixed batch": ({"metadata": ("FP32", [5, FEATURES], "FP32", [5, CLASSES])}, "/v2/models/small", {}),
    "one row": ({}, "/v2/models/small", {"http_max_rows": 1}),
    "one example": ({"form": lambda z: {"r": z[0].tolist()}}, "/one", ONE_EACH),
    "by name": ({"form": lambda z: {"r": named(z.tolist())}}, "/named", TEMPLATE | {"class_names": NAMES}),
}


@pytest.fixture(scope="module")
def in_process():
    return {access: verdicts(net, (X, Y), access, classes=CLASSES) for access in ("scores", "labels")}


@pytest.mark.parametrize("how, path, options", SERVED.values(), ids=SERVED)
def test_verdicts_and_queries_equal_those_in_the_process(how, path, options, in_process):
    with Server(**how) as server:
        assert (
            verdicts(server.url(path), (X, Y), allow_hosts=[server.host], **options) == in_process["scores"]
        )


SERVED_LABELS = {
    "INT64": (
        {"metadata": ("FP32", [-1, FEATURES], "INT64", [-1, 1])},
        "/v2/models/small",
        {"classes": CLASSES},
    ),
    "text": (
        {"form": lambda z: {"r": [NAMES[k] for k in z.argmax(1)]}},
        "/n",
        TEMPLATE | {"class_names": NAMES},
    ),
    "one text": ({"form": lambda z: {"r": NAMES[z[0].argmax()]}}, "/n", ONE_EACH | {"class_names": NAMES}),
    "one number": ({"form": lambda z: {"r": int(z[0].argmax())}}, "/n", ONE_EACH | LABELS),
}


@pytest.mark.parametrize("how, path, options", SERVED_LABELS.values(), ids=SERVED_LABELS)
def test_verdicts_and_queries_of_labels_equal_those_in_the_process(how, path, options, in_process):
    options = {"http_labels": "http_request" in options, **options}
    with Server(**how) as server:
        found = verdicts(server.url(path), (X, Y), "labels", allow_hosts=[server.host], **options)
    assert found == in_process["labels"]


def test_verdicts_and_queries_of_images_with_channels_last_equal_those_in_the_process():
    images = X.reshape(-1, 3, 2, 1)
    given = {"layout": "chw"}
    own = verdicts(net_last, (images, Y), classes=CLASSES, **given)
    with Server(metadata=("FP32", [-1, 2, 1, 3], "FP32", [-1, CLASSES])) as server:
        assert verdicts(server.url(), (images, Y), allow_hosts=[server.host], **given) == own
    with Server(form=lambda z: {"r": z[0].tolist()}) as server:
        one = {**ONE_EACH, "http_request": '{"one": $x_one_last}'}
        assert verdicts(server.url("/one"), (images, Y), allow_hosts=[server.host], **given, **one) == own


def test_one_probability_a_row_follows_the_rule_for_single_outputs():
    two = (X, (network(X)[:, 0] > 0).astype(int))
    own = verdicts(
        lambda x: torch.from_numpy(sigmoid(network(x.numpy()))).to(x.dtype), two, model_output="probability"
    )
    for form in (lambda z: {"r": sigmoid(z).tolist()}, lambda z: {"r": sigmoid(z)[:, 0].tolist()}):
        with Server(form=form) as server:
            asked = {"allow_hosts": [server.host], **TEMPLATE}
            with pytest.raises(UnclearOutput, match="model_output='probability' .*model_output='logit'"):
                verdicts(server.url("/p"), two, **asked)
            assert len(server.rows) <= 16
            assert verdicts(server.url("/p"), two, model_output="probability", **asked) == own


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("data.npz", x=X, y=Y)


@pytest.mark.usefixtures("elsewhere")
def test_assess_and_the_doctor_read_an_answer_alike(capsys):
    """As scikit-learn behind MLServer answers: metadata without tensors, and classes as INT64 of shape [n, 1]."""
    form = lambda z: tensor(z.argmax(1).tolist(), [len(z), 1], "INT64")  # noqa: E731
    with Server(form=form) as server:
        server.metadata.update(inputs=[], outputs=[])
        model, said = [server.url(), "data.npz", "--allow-host", server.host], []
        for verb in ("assess", "doctor"):
            assert run([verb, *model]) == 3
            said.append(capsys.readouterr().err)
        assert said[0].partition("The response begins")[0] == said[1].partition("The response begins")[0]
        assert "one integer per row" in said[0] and "--http-labels --classes N" in said[0]
        assert '{"outputs": [{"name": "y", "datatype": "INT64"' in said[0]
        assert len(server.rows) == 1 + 20
        declared = [*model, "--http-labels", "--classes", "3"]
        assert run(["doctor", *declared]) == 0
        out = capsys.readouterr().out
        assert "accuracy is 90.0% on 20" in out and "probabilities" not in out
        assert run(["assess", *declared, "-t", THREAT, "--no-doubts", "-q", "-o", "r.json"]) == 0
        clean = json.loads(Path("r.json").read_text())["metrics"]["clean_accuracy"]["value"]
        assert clean == pytest.approx(22 / 24)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("verb", ["assess", "doctor"])
def test_labels_beyond_the_scores_name_the_option_for_classes(verb, capsys):
    np.savez("data.npz", x=X, y=Y + 5)
    with Server() as server:
        assert run([verb, server.url(), "data.npz", "--allow-host", server.host]) == 3
        said = " ".join("".join(capsys.readouterr()).split())
        assert "range from 6 to 7" in said and "--http-labels --classes 8" in said


CHANGED = {
    "labels": (lambda z: {"r": z.argmax(1).tolist()}, "one integer per row"),
    "names": (lambda z: {"r": [NAMES[k] for k in z.argmax(1)]}, "scores were expected"),
    "columns": (lambda z: {"r": z[:, :2].tolist()}, "2 scores per row, but earlier ones had 3"),
    "objects": (
        lambda z: {"r": named(z.tolist())},
        "objects by class name, but earlier ones contained numbers",
    ),
    "more rows": (lambda z: {"r": [*z.tolist(), [0.0, 0.0, 0.0]]}, "one entry for each row"),
    "fewer rows": (lambda z: {"r": z[1:].tolist()}, "one entry for each row"),
    "null": (lambda z: None, "the response has no 'r', but null"),
    "nothing": (lambda z: {}, "the response has no 'r', but an empty object"),
    "nulls": (lambda z: {"r": None}, "contains null, but"),
    "booleans": (lambda z: {"r": (z > 0).tolist()}, "true or false"),
    "huge": (lambda z: {"r": json.loads("[" * 500 + "0" + "]" * 500)}, "a list of 1, but"),
}


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("changed, said", CHANGED.values(), ids=CHANGED)
def test_an_answer_that_changes_within_a_run_ends_it_with_one_line(changed, said, capsys):
    def form(scores):
        return {"r": scores.tolist()} if len(server.sizes) < 6 else changed(scores)

    with Server(form=form) as server:
        words = [
            "assess",
            server.url("/p"),
            "data.npz",
            "--allow-host",
            server.host,
            "-t",
            THREAT,
            "--no-doubts",
            "-q",
        ]
        words += [
            "--http-request",
            '{"instances": $x}',
            "--http-response",
            "r",
            "--class-names",
            ",".join(NAMES),
        ]
        assert run([*words, "--suite", "black-box", "-n", "6"]) == 3
    error = capsys.readouterr().err
    assert said in error and "The response begins: " in error and "Traceback" not in error
    assert len(server.sizes) == 6
