"""A hardening whose card, models or measurements contradict each other is refused, although all digests are right."""

import json
import shutil

import pytest
import safetensors.torch

from holdfast.core.errors import TargetError
from holdfast.runs.harden.harden import harden
from holdfast.verbs.reports import report, verify
from runs import fakes
from runs.test_hardening import trainable, training, wish
from store.test_foreign import rewritten


@pytest.fixture(scope="module")
def genuine(tmp_path_factory):
    run = tmp_path_factory.mktemp("genuine") / "run"
    harden(trainable(), training(), fakes.data(), wish(), run=run)
    return run


@pytest.fixture
def run(genuine, tmp_path):
    return shutil.copytree(genuine, tmp_path / "run")


def within(*path, **changes):
    """Return a function that changes the fields of the object at a path of a document."""

    def change(content):
        for key in path:
            content = content[key]
        content.update(changes)

    return change


@pytest.mark.parametrize(
    ("change", "judged", "message"),
    [
        (within("before", at_chance=None), False, "card.json' is not the file"),
        (within("held_out", n=10_000), False, "card.json' is not the file"),
        (within("model", name="another"), False, "card.json' is not the file"),
        (within(verdict="worse"), True, "the verdict on the training"),
        (within("change", low=0.5), True, "the verdict on the training"),
    ],
)
def test_a_card_that_was_edited_is_refused(change, judged, message, run):
    rewritten(run, "card.json", change, judged=judged)
    for reader in (report, verify):
        with pytest.raises(TargetError, match=message):
            reader(run)


def resealed(run, side, change):
    """Change the manifest of a measurement, and record the chain of this measurement in that of the hardening."""
    rewritten(run / side, "run.json", change)
    head = json.loads((run / side / "chain.jsonl").read_text().splitlines()[-1])["digest"]
    rewritten(run, f"{side}.json", lambda content: content.update(chain=head), judged=False)


@pytest.mark.parametrize(
    ("side", "change"),
    [
        ("before", within("digests", data="0" * 64)),
        ("after", within("digests", model="0" * 64)),
        ("before", within(verb="certify")),
    ],
)
def test_a_measurement_that_was_exchanged_is_refused(side, change, run):
    resealed(run, side, change)
    with pytest.raises(TargetError, match=f"{side}.json' is not the file"):
        report(run)


def test_an_exchanged_model_is_refused(run):
    file = run / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file({name: tensor + 1 for name, tensor in tensors.items()}, file)
    rewritten(run, "model.safetensors", judged=False)
    with pytest.raises(TargetError, match="model.safetensors' is not the file"):
        verify(run)


@pytest.mark.parametrize("verb", ["assess", "certify", "rotate"])
def test_a_verb_without_such_a_verdict_is_refused(verb, run):
    rewritten(run, "run.json", within(verb=verb))
    for reader in (report, verify):
        with pytest.raises(TargetError, match=f"states the verb '{verb}'"):
            reader(run)
