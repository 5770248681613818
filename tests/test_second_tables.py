"""A further table of a run is matched by the names of its columns, wherever a run reads one."""

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast.audits.audit import AuditStart
from holdfast.core.batch import Batch, Data
from holdfast.core.errors import TargetError
from holdfast.io.data.arrays import Arrays
from holdfast.io.data.data import open_data
from holdfast.io.data.layouts import DeclaredData
from holdfast.runs.engine.progress import ignore
from holdfast.verbs import settings as verbs
from holdfast.verbs.audit.opening_models import prepared_poison
from holdfast.verbs.audit.opening_trainings import _opened
from holdfast.verbs.harden import open_for_hardening
from holdfast.verbs.monitor import live_reference, opened_streams
from holdfast.verbs.opening.declared import first_table, notes_of
from holdfast.verbs.opening.resolve import open_examples, open_others, open_subject

pandas = pytest.importorskip("pandas")

NET = """
import torch
def make():
    net = torch.nn.Linear(2, 2)
    net.weight.data[:] = torch.tensor([[0.0, 0.0], [0.05, 0.0]])
    net.bias.data[:] = torch.tensor([0.0, -2.5])
    return net
"""
NAMES = ["amount", "share", "kind"]
ROWS = 400
TABLES = {
    "first": NAMES,
    "same": NAMES,
    "permuted": NAMES[::-1],
    "further": ["city", *NAMES[::-1]],
    "renamed": ["amount", "Share", "kind"],
    "missing": ["amount", "kind"],
    "repeated": ["amount", "share", "share", "kind"],
}
GUARD = """
schema_version: 1
mode: observe
inputs: {shape: [2], low: 0, high: 100}
outputs: logit
false_positives: 0.1
rules:
  mahalanobis: {on: inputs, shrinkage: 0.1}
"""


def write(path: Path, columns: list[str], seed: int = 1) -> Path:
    """A table whose classes follow from the amount, with its columns in an order and under names of choice."""
    rng = np.random.default_rng(seed)
    amount = rng.random(ROWS) * 100
    known = {
        "amount": amount.round(3),
        "share": rng.random(ROWS).round(5),
        "kind": np.where(amount > 50, "big", "small"),
        "city": np.full(ROWS, "Graz"),
    }
    cells = [known.get(name, known["share"]) for name in columns]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *zip(*cells, strict=True)])
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    (folder / "net.py").write_text(NET)
    (folder / "guard.yaml").write_text(GUARD)
    for name, columns in TABLES.items():
        write(folder / f"{name}.csv", columns, seed=int(name != "first"))
    return folder


def read(folder: Path, name: str) -> Any:
    """The table as a data frame, which is opened in a millisecond, with repeated names as they are in the file."""
    frame = pandas.read_csv(folder / f"{name}.csv")
    frame.columns = TABLES[name]
    return holdfast.open_data(frame, label="kind")


Outcome = tuple[Any, tuple[str, ...]]
"""a value that depends on each cell of the second table, and the notes that a user sees"""


def options(folder: Path, **own: Any) -> Mapping[str, Any]:
    opening = {"model": f"{folder / 'net.py'}:make", "data": read(folder, "first")}
    return {**opening, "class_names": ["small", "big"], "bounds": (0.0, 100.0), **own}


def monitor(folder: Path, table: Any) -> Outcome:
    settings = verbs.Monitor(**options(folder, data=table, reference=read(folder, "first")))
    _, reference, stream = opened_streams(settings)
    return stream.digest, notes_of(reference, stream)


def membership(folder: Path, table: Any) -> Outcome:
    opened = _opened(holdfast.AuditMembership(**options(folder, non_members=table)))
    return opened.examples.x.tolist(), opened.notes


def poison(folder: Path, table: Any) -> Outcome:
    settings = holdfast.AuditPoison(**options(folder, clean=table))
    with prepared_poison(settings, AuditStart(None, resume=False, notify=ignore)) as audit:
        request = audit.request
    return request.data["clean"]["digest"], tuple(request.notes)


def harden(folder: Path, table: Any) -> Outcome:
    _, training, _, _, notes = open_for_hardening(verbs.Harden(**options(folder, fit=table)))
    assert isinstance(training, Batch)
    return training.x.tolist(), notes


def across(folder: Path, table: Any) -> Outcome:
    settings = verbs.Assess(**options(folder, across=[table], threat="linf:1"))
    model = open_subject(settings).model
    (others,) = open_others(settings, model, open_examples(settings, model))
    return others.digest, notes_of(others)


def calibrate(folder: Path, table: Any) -> Outcome:
    own = {"guard": str(folder / "guard.yaml"), "fit": table}
    found = verbs.Calibrate(**options(folder, **own)).run()
    return found.calibration.thresholds, found.notes


def explain(folder: Path, table: Any) -> Outcome:
    settings = verbs.Explain(**options(folder, train=table, index=3, threat="linf:20"))
    found = settings.run()
    return found["neighbours"].rows, found.notes


PLACES = [monitor, membership, poison, harden, across, calibrate, explain]


@pytest.mark.parametrize("place", PLACES)
def test_columns_of_a_second_table_are_matched_by_name(
    folder: Path, place: Callable[[Path, Any], Outcome]
) -> None:
    same, _ = place(folder, read(folder, "same"))
    assert same
    permuted, _ = place(folder, read(folder, "permuted"))
    assert permuted == same
    further, notes = place(folder, read(folder, "further"))
    assert further == same
    assert any("city" in note and "left out" in note for note in notes), notes


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("name", "own"), [("renamed", "Share"), ("missing", "amount"), ("repeated", "share")]
)
def test_a_column_that_is_missing_or_repeated_is_an_error_with_both_sets(
    folder: Path, place: Callable[[Path, Any], Outcome], name: str, own: str
) -> None:
    with pytest.raises(TargetError) as caught:
        place(folder, read(folder, name))
    both = "the first table, the data frame, has amount, share"
    assert both in caught.value.message and own in caught.value.message, caught.value.message


def opened(path: Path, first: Data | None = None, **given: Any) -> Arrays:
    """The rows of a file, with the columns of the data that were opened first."""
    expected = DeclaredData(lenient=True, first=None if first is None else first_table(first))
    data = open_data(str(path), expected=expected, **given)
    assert isinstance(data, Arrays)
    return data


def test_a_file_without_names_is_read_in_the_order_of_the_first_with_a_note(
    folder: Path, tmp_path: Path
) -> None:
    first, same = (opened(folder / f"{name}.csv", label="kind") for name in ("first", "same"))
    with pytest.raises(
        TargetError, match=r"columns named 'share'.* are amount, share, share, kind, and .* has amount"
    ):
        opened(folder / "repeated.csv", first, label="kind")
    (tmp_path / "bare.csv").write_text(
        "".join((folder / "same.csv").read_text().splitlines(keepends=True)[1:])
    )
    bare = opened(tmp_path / "bare.csv", first, label="2", header=False)
    np.savez(tmp_path / "array.npz", x=same.x, y=same.y)
    array = opened(tmp_path / "array.npz", first)
    for data in (bare, array):
        assert np.array_equal(data.x, same.x)
        assert any("order" in note and "amount" in note for note in data.notes), data.notes
    named = opened(folder / "permuted.csv", opened(tmp_path / "array.npz"), label="kind")
    assert any("order" in note and "share, amount" in note for note in named.notes), named.notes
    np.savez(tmp_path / "narrow.npz", x=same.x[:, :1], y=same.y)
    with pytest.raises(TargetError, match=r"has 2 columns \(amount, share\), and .* has 1"):
        opened(tmp_path / "narrow.npz", first)


def test_the_monitor_of_a_server_states_the_order_in_which_requests_are_read(folder: Path) -> None:
    reference = live_reference(verbs.Monitor(**options(folder, data=None, reference=read(folder, "first"))))
    assert any("request" in note and "amount, share" in note for note in reference.notes), reference.notes


@pytest.mark.parametrize("verb", ["doctor", "monitor"])
def test_doctor_and_monitor_match_the_first_table_with_the_model(folder: Path, verb: str) -> None:
    """Both accept data that do not fit the model, and read them in the order of the model's inputs nevertheless."""
    linear = pytest.importorskip("sklearn.linear_model")
    rows = pandas.read_csv(folder / "first.csv")
    kinds = rows.pop("kind")
    model = linear.LogisticRegression().fit(rows, kinds)
    given = {"model": model, "bounds": (0.0, 100.0)}

    def outcome(name: str) -> Any:
        table = read(folder, name)
        if verb == "doctor":
            found = {finding.check: finding for finding in holdfast.doctor(model, table, bounds=(0, 100))}
            return found["accuracy"].message
        _, reference, *_ = opened_streams(verbs.Monitor(**given, data=read(folder, "first"), reference=table))
        return reference.read(0, ROWS).x.sum(0).tolist()

    assert outcome("permuted") == outcome("same")
    with pytest.raises(
        TargetError, match="fitted on 2 named columns, and the data frame lacks 'share' and has 'Share'"
    ):
        outcome("renamed")
    with pytest.raises(TargetError, match="has 'city' beside them"):
        outcome("further")


def test_bounds_that_a_second_table_calls_for_contain_the_first(folder: Path) -> None:
    """Bounds of the second table alone would exclude the first, whose message would lead back to the second."""
    beyond = pandas.read_csv(folder / "same.csv").assign(amount=-1.0)
    with pytest.raises(TargetError) as caught:
        membership(folder, holdfast.open_data(beyond, label="kind"))
    (remedy,) = caught.value.remedies
    assert remedy.value == (-1, 100)
