"""A hardening whose card, models or measurements contradict each other is refused, although all digests are right."""

import json
import shutil

import pytest
import safetensors.torch

from holdfast.api.stored import report, verify
from holdfast.core.chain import digest
from holdfast.core.errors import TargetError
from holdfast.runs.harden.harden import harden
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


FORGED = [
    (within("before", at_chance=None), "before.at_chance None"),
    (within("before", metrics={}), "before.metrics {}"),
    (within("after", headline="100 % of 40 examples are certified"), "after.headline '100"),
    (within("after", doubts_tested=99), "after.doubts_tested 99"),
    (within("after", suite="standard@1"), "after.suite 'standard@1'"),
    (within("after", accepted_doubts={"chance": "no"}), "after.accepted_doubts"),
    (within(scope="suite only"), "scope 'suite only'"),
    (within(verdict="worse"), "verdict 'worse'"),
    (within("change", low=0.5), "change"),
    (within("advice", epochs=99), "advice"),
    (within(epochs=99), "epochs 99"),
    (within(recipe="TRADES"), "recipe 'TRADES'"),
    (within(threat="linf:0.5"), "threat 'linf:0.5'"),
    (within(evaluated_under="linf:0.5"), "evaluated_under 'linf:0.5'"),
    (within(hardware="an H100"), "hardware 'an H100'"),
    (within(data={"name": "CIFAR-10", "n": 10000}), "states data"),
    (within("chosen", robust=1.0), "values that its curve does not contain"),
    (within("held_out", n=10_000), "held_out.before"),
    (within("generalisation", "robust_error_gap", value=0.0), "generalisation"),
    (within("held_out", "after", "robust_accuracy", value=1.0), "held_out.after"),
    (within("model", name="another"), "states model"),
]


@pytest.mark.parametrize(("change", "message"), FORGED, ids=[message for _, message in FORGED])
def test_a_card_that_contradicts_its_run_is_refused(change, message, run):
    rewritten(run, "card.json", change)
    for reader in (report, verify):
        with pytest.raises(TargetError, match=message):
            reader(run)


def resealed(run, side, change):
    """Change the manifest of a measurement, and record the chain of this measurement in that of the hardening."""
    rewritten(run / side, "run.json", change)
    head = json.loads((run / side / "chain.jsonl").read_text().splitlines()[-1])["digest"]
    rewritten(run, f"{side}.json", lambda content: content.update(chain=head))


@pytest.mark.parametrize(
    ("side", "change", "message"),
    [
        ("before", within("digests", data="0" * 64), r"digests\.data"),
        ("before", within("digests", model="0" * 64), r"digests\.model"),
        ("after", within("digests", model="0" * 64), r"digests\.model"),
        ("after", within("digests", code="0" * 64), r"digests\.code"),
        ("before", within(verb="certify"), "verb 'certify'"),
        ("after", within("model", name="another"), "card.json' states model"),
    ],
)
def test_a_measurement_of_another_model_or_of_other_examples_is_refused(side, change, message, run):
    resealed(run, side, change)
    with pytest.raises(TargetError, match=message):
        report(run)


def test_a_file_with_another_model_than_the_measured_one_is_refused(run):
    file = run / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file({name: tensor + 1 for name, tensor in tensors.items()}, file)
    rewritten(run, "model.safetensors")
    rewritten(run, "training.json", within(weights=digest(file.read_bytes())))
    with pytest.raises(TargetError, match=r"after/run\.json' states digests\.model"):
        verify(run)
    file.write_bytes(b"no tensors")
    rewritten(run, "model.safetensors")
    rewritten(run, "training.json", within(weights=digest(file.read_bytes())))
    with pytest.raises(TargetError, match="inconsistent"):
        verify(run)


@pytest.mark.parametrize("verb", ["assess", "certify", "rotate"])
def test_a_verb_without_such_a_verdict_is_refused(verb, run):
    rewritten(run, "run.json", within(verb=verb))
    for reader in (report, verify):
        with pytest.raises(TargetError, match=f"states the verb '{verb}'"):
            reader(run)
