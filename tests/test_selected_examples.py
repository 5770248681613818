"""`n` and `sample` select examples of the data of every command, and of no other data; the first examples of a file
that is sorted by class are named.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import holdfast
from holdfast.audits.audit import AuditRequest, AuditStart
from holdfast.core.batch import Batch
from holdfast.core.errors import Remedy, UsageError
from holdfast.io.data.data import open_data
from holdfast.runs.engine.progress import ignore
from holdfast.verbs import settings as verbs
from holdfast.verbs.harden import open_for_hardening
from holdfast.verbs.monitor import opened_streams
from holdfast.verbs.opening.declared import notes_of
from holdfast.verbs.settings import AuditVerb

FILES = """
import torch
def make():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
class Generator:
    def sample(self, n, seed):
        return torch.rand(n, 2, generator=torch.Generator().manual_seed(seed))
def generator():
    return Generator()
def fit(x, y, seed):
    return make()
"""
GUARD = """
schema_version: 1
mode: observe
inputs: {shape: [2], low: 0, high: 1}
outputs: logit
false_positives: 0.1
rules:
  mahalanobis: {on: inputs, shrinkage: 0.1}
"""
ROWS, OTHERS = 300, 210
NOTE = (
    "the first 150 examples have 2 of the 3 classes of the data; sample=150 (--sample 150) takes random ones"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sorted")
    (folder / "net.py").write_text(FILES)
    (folder / "guard.yaml").write_text(GUARD)
    rng = np.random.default_rng(0)
    for name, n in (("sorted", ROWS), ("others", OTHERS)):
        y = np.sort(np.arange(n) % 3)
        x = ((y[:, None] + rng.random((n, 2))) / 3).round(6)
        np.savez(folder / f"{name}.npz", x=x.astype(np.float32), y=y)
        np.savetxt(folder / f"{name}.csv", np.c_[x, y], "%g", ",", header="a,b,y", comments="")
    return folder


Outcome = tuple[int, int | None, tuple[str, ...]]
"""the numbers of the examples and of the other data, and the notes that a user sees"""


def settings(kind: Any, folder: Path, **own: Any) -> Any:
    return kind(**{"model": f"{folder / 'net.py'}:make", "data": str(folder / "sorted.npz"), **own})


def of_audit(audit: AuditVerb) -> AuditRequest:
    with audit.prepared(AuditStart(None, resume=False, notify=ignore)) as prepared:
        return prepared.request


def assess(folder: Path, **own: Any) -> Outcome:
    _, data, _ = settings(verbs.Assess, folder, **own).open()
    return len(data), None, notes_of(data)


def certify(folder: Path, **own: Any) -> Outcome:
    _, data, _ = settings(verbs.Certify, folder, **own).open()
    return len(data), None, notes_of(data)


def harden(folder: Path, **own: Any) -> Outcome:
    _, training, judged, *_ = open_for_hardening(
        settings(verbs.Harden, folder, fit=str(folder / "others.npz"), **own)
    )
    assert isinstance(training, Batch)
    return len(judged), len(training), notes_of(judged)


def doctor(folder: Path, **own: Any) -> Outcome:
    command = settings(verbs.Doctor, folder, **own)
    return len(command.open()[1]), None, tuple(finding.message for finding in command.run())


def explain(folder: Path, **own: Any) -> Outcome:
    explained = settings(verbs.Explain, folder, threat="linf:0.1", **own).run()
    return sum(int(row[1]) for row in explained["classes"].rows), None, explained.notes


def calibrate(folder: Path, **own: Any) -> Outcome:
    command = settings(
        verbs.Calibrate, folder, guard=str(folder / "guard.yaml"), fit=str(folder / "others.npz"), **own
    )
    calibrated = command.run()
    return calibrated.calibration.n, None, calibrated.notes


def monitor(folder: Path, **own: Any) -> Outcome:
    command = settings(verbs.Monitor, folder, reference=str(folder / "others.npz"), **own)
    _, reference, stream = opened_streams(command)
    return len(stream), len(reference), notes_of(stream)


def backdoor(folder: Path, **own: Any) -> Outcome:
    request = of_audit(settings(holdfast.AuditBackdoor, folder, stream=str(folder / "others.npz"), **own))
    return request.data["n"], request.data["stream"]["n"], tuple(request.notes)


def poison(folder: Path, **own: Any) -> Outcome:
    clean = {} if "n" in own else {"clean": str(folder / "others.npz")}  # the classes of both are compared
    request = of_audit(settings(holdfast.AuditPoison, folder, **clean, **own))
    return request.data["n"], request.data.get("clean", {}).get("n"), tuple(request.notes)


def extraction(folder: Path, **own: Any) -> Outcome:
    others = {"pool": str(folder / "others.npz"), "queries": "10,50"}
    request = of_audit(settings(holdfast.AuditExtraction, folder, **others, **own))
    return request.data["n"], request.data["pool"]["n"], tuple(request.notes)


def membership(folder: Path, **own: Any) -> Outcome:
    request = of_audit(
        settings(holdfast.AuditMembership, folder, non_members=str(folder / "others.npz"), fpr=0.1, **own)
    )
    return request.data["n"], request.data["non_members"]["n"], tuple(request.notes)


def privacy(folder: Path, **own: Any) -> Outcome:
    train = f"{folder / 'net.py'}:fit"
    request = of_audit(settings(holdfast.AuditPrivacy, folder, train=train, epsilon=0.1, canaries=8, **own))
    return request.data["n"], None, tuple(request.notes)


def reconstruct(folder: Path, **own: Any) -> Outcome:
    request = of_audit(settings(holdfast.AuditReconstruct, folder, batch_size=(1,), **own))
    return request.data["n"], None, tuple(request.notes)


def generator(folder: Path, **own: Any) -> Outcome:
    given = {"model": f"{folder / 'net.py'}:generator", "held_out": str(folder / "others.npz")}
    request = of_audit(settings(holdfast.AuditGenerator, folder, **given, samples=100, latent=0, **own))
    return request.data["n"], request.data["held_out"]["n"], tuple(request.notes)


PLACES = [
    assess, certify, harden, doctor, explain, calibrate, monitor, backdoor, extraction, poison, membership, privacy,
    generator, reconstruct,
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_the_first_examples_of_a_sorted_file_are_named_and_random_ones_are_not(
    folder: Path, place: Callable[..., Outcome]
) -> None:
    n, others, notes = place(folder, n=150)
    assert n == 150 and others in (None, OTHERS)
    assert NOTE in {note[0].lower() + note[1:].rstrip(".") for note in notes}
    n, others, notes = place(folder, sample=150, seed=1)
    assert n == 150 and others in (None, OTHERS)
    assert not any("classes of the data" in note for note in notes)


@pytest.mark.parametrize("kind", [holdfast.AuditBackdoor, holdfast.AuditPoison])
def test_a_single_class_among_the_first_examples_is_refused_with_random_ones(folder: Path, kind: Any) -> None:
    with pytest.raises(UsageError, match="all 50 ") as caught:
        of_audit(settings(kind, folder, n=50))
    assert caught.value.remedies == (Remedy("sample", 50, also=(Remedy("n", option="-n"),)),)
    of_audit(settings(kind, folder, sample=50))
    with pytest.raises(UsageError, match="all 1 ") as caught:
        of_audit(settings(kind, folder, sample=1))
    assert not caught.value.remedies


def test_trusted_examples_of_further_classes_are_refused_with_random_ones(folder: Path) -> None:
    with pytest.raises(UsageError, match="the same classes") as caught:
        of_audit(settings(holdfast.AuditPoison, folder, clean=str(folder / "others.npz"), n=150))
    assert caught.value.remedies[0] == Remedy("sample", 150, also=(Remedy("n", option="-n"),))


@pytest.mark.slow
def test_some_training_rows_of_a_synthetic_table_are_selected(folder: Path) -> None:
    files = {"model": str(folder / "others.csv"), "data": str(folder / "sorted.csv")}
    given = {**files, "held_out": str(folder / "others.csv"), "samples": 100, "latent": 0}
    request = of_audit(holdfast.AuditGenerator(**given, n=50))
    assert request.data["n"] == 50 and request.data["held_out"]["n"] == OTHERS
    assert any("copies of the other ones are not found" in note for note in request.notes)


def test_the_first_pictures_of_a_folder_are_named_if_classes_are_absent(tmp_path: Path) -> None:
    from PIL import Image

    for name in "abc":
        (tmp_path / name).mkdir()
        Image.new("L", (4, 4)).save(tmp_path / name / "0.png")
    assert any("have 2 of the 3 classes" in note for note in open_data(str(tmp_path), n=2).notes)
    assert not open_data(str(tmp_path), sample=2).notes


def test_the_examples_of_an_explanation_are_no_head_of_a_sorted_file(folder: Path) -> None:
    y = torch.arange(1200) // 400
    x = torch.rand(1200, 2, generator=torch.Generator().manual_seed(0))
    for own, n in (({}, 100), ({"n": 1200}, 500)):
        command = settings(verbs.Explain, folder, threat="linf:0.01", **own)
        explained = command.model_copy(update={"data": (x, y)}).run()
        counts = [row[1] for row in explained["classes"].rows]
        assert len(counts) == 3 and sum(counts) == n
