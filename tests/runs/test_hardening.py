"""What a hardening refuses, what it goes on after, and how it chooses."""

import copy
import json
import math
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

import holdfast
from holdfast.core.batch import Batch
from holdfast.core.constraints import L1, L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.errors import Interrupted, LostLoss, TargetError, UsageError
from holdfast.core.evidence import Doubt
from holdfast.core.model import IN_PLACE, Classifier
from holdfast.core.threat import ThreatModel
from holdfast.io.data.loaders import as_data
from holdfast.recipes import (
    DPSGD,
    RSLAD,
    TRADES,
    EnsembleTraining,
    GradientRegularisation,
    PGDTraining,
    PolicyTraining,
    SingleStep,
    Standard,
)
from holdfast.recipes.training.fit import Training, fit
from holdfast.recipes.training.follow_up import RAISED, OverfittingGuard
from holdfast.reports.formats.md import escaped
from holdfast.runs.assess.expected_time import StageTimes, StepTime, StepTimes
from holdfast.runs.assess.request import HardenRequest
from holdfast.runs.documents.stored_runs import open_run, runs_in
from holdfast.runs.engine.identity import code_digest
from holdfast.runs.harden import candidates
from holdfast.runs.harden import harden as hardening
from holdfast.runs.harden.attempt_training import copy_of
from holdfast.runs.harden.candidates import Candidate, Evaluation, attempts, standard_error
from holdfast.runs.harden.harden import AssessmentTimes, harden
from holdfast.runs.harden.hardened import Hardened
from holdfast.runs.harden.pace import Pace, pace
from holdfast.verbs.harden import _usual_epochs
from holdfast.verbs.opening.recipes import settings_of
from holdfast.verbs.reports import verify
from runs import fakes

HOW = Training(epochs=3, batch=64, lr=0.01)
RECIPE = PGDTraining(steps=2, training=HOW)
THREAT = ThreatModel(Linf(0.06))
JUDGE = fakes.order(fakes.FAST, gates=(), shard_size=fakes.N)
"""One attack on one shard: how a model is assessed is tested elsewhere."""


@pytest.fixture(autouse=True)
def _enough_held_out(set_limit):
    """The data of the tests leave fewer held-out examples than a warning asks for."""
    set_limit("holdfast.runs.harden.candidates._FEW", 0)


def training(n=600, seed=5):
    x = torch.rand(n, fakes.FEATURES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    y = fakes.network()(x).argmax(1)
    y[:12] = torch.arange(12) % fakes.CLASSES  # of each class a few
    return Batch(x, y, torch.arange(n))


def trainable(seed=1):
    return fakes.subject(fakes.network(seed).requires_grad_(), digest=f"{seed}" * 64)


def wish(recipe=RECIPE, *more, **changes):
    candidates = tuple(Candidate(type(one).__name__, one, {}) for one in (recipe, *more))
    assessment = changes.pop("assessment", JUDGE)
    return HardenRequest("pgd", candidates, THREAT, assessment, **changes)


@pytest.mark.slow
def test_the_new_model_is_measured_and_the_given_one_stays(tmp_path):
    subject = trainable()
    before = copy.deepcopy(subject.model.state_dict())
    found = harden(subject, training(), fakes.data(), wish(), run=tmp_path / "r")
    assert all(torch.equal(value, before[name]) for name, value in subject.model.state_dict().items())
    robust = [side.metrics["robust_accuracy"].value for side in (found.before, found.after)]
    assert robust[1] > robust[0]
    assert [point.epoch for point in found.curve] == [1, 2, 3]
    assert open_run(tmp_path / "r").metrics["robust_accuracy"].value == robust[1]
    assert verify(tmp_path / "r").complete
    (entry,) = runs_in(tmp_path)
    assert (entry.verb, entry.finished, entry.robust) == ("harden", True, robust[1])
    place = found.write(tmp_path / "made")
    assert json.loads((place / "card.json").read_text())["chosen"]["epoch"] == found.card["chosen"]["epoch"]
    assert (place / "curve.svg").read_text().startswith("<svg")


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "at_chance"), [(0, False), (1, True)])
def test_a_given_model_at_chance_is_stated_instead_of_an_improvement(tmp_path, seed, at_chance):
    found = harden(trainable(seed), training(), fakes.data(), wish())
    assert ("; the given model was at chance (clean_accuracy " in str(found)) == at_chance
    assert (" → " in str(found)) != at_chance
    card = (found.write(tmp_path / "made") / "card.md").read_text()
    assert ("no better than one that always predicts the majority class" in card) == at_chance


@pytest.mark.slow
def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = harden(trainable(), training(), fakes.data(), wish())
    assert found.folder is None and found.after.folder is None
    assert found.after.metrics["robust_accuracy"].n == fakes.N
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_run_resumes_to_the_same_weights(tmp_path, monkeypatch):
    whole = harden(trainable(), training(), fakes.data(), wish(), run=tmp_path / "whole")
    steps = []

    def stop(step):
        steps.append(step)
        if step.stage.startswith("training") and step.done == 2:
            raise Interrupted("stopped", signal_number=2)

    with pytest.raises(Interrupted):
        harden(trainable(), training(), fakes.data(), wish(), run=tmp_path / "r", progress=stop)
    with pytest.raises(UsageError, match="not finished|contains a run already"):
        harden(trainable(), training(), fakes.data(), wish(), run=tmp_path / "r")
    again = harden(trainable(), training(), fakes.data(), wish(), run=tmp_path / "r", resume=True)
    assert again.weights == whole.weights
    for name in ("run.json", "card.json", "chain.jsonl", "model.safetensors"):
        assert (tmp_path / "r" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert any(step.stage == "training PGDTraining" for step in steps)


@pytest.mark.slow
def test_patience_ends_a_training_that_gets_no_better_and_going_on_ends_it_at_once(tmp_path):
    patient = PGDTraining(steps=1, training=replace(HOW, epochs=9, lr=1e-9, patience=2, warmup=0))
    found = harden(trainable(), training(), fakes.data(), wish(patient), run=tmp_path / "r")
    assert [point.epoch for point in found.curve] == [1, 2, 3]
    again = harden(trainable(), training(), fakes.data(), wish(patient), run=tmp_path / "r", resume=True)
    assert again.curve == found.curve
    grows = replace(patient, training=replace(patient.training, warmup=0.5))
    assert len(harden(trainable(), training(), fakes.data(), wish(grows)).curve) == 7


@pytest.mark.slow
def test_an_added_step_of_the_guard_is_on_the_card(set_guard_accuracy):
    def right(guard, steps):
        return 0.1 if steps > 1 and not int(guard.learner.state[RAISED]) else 0.9

    set_guard_accuracy(right)
    found = harden(trainable(), training(n=1200), fakes.data(), wish(SingleStep(training=HOW)))
    assert found.curve[-1].dearer == 1.5
    assert any(note.endswith("so the guard asked for another one once") for note in found.notes)


@pytest.mark.slow
def test_another_recipe_seed_or_threat_is_another_run_and_the_only_difference_that_is_named(tmp_path):
    def asked(name, recipe, eps=0.06, seed=0):
        one = Candidate(name, recipe, settings_of(recipe))
        threat = ThreatModel(Linf(eps))
        return replace(wish(), name=name, candidates=(one,), threat=threat, seed=seed)

    harden(trainable(), training(), fakes.data(), asked("pgd", RECIPE), run=tmp_path / "r")
    for other, said in (
        (asked("pgd", RECIPE, seed=1), "(seed: 0 → 1)"),
        (asked("standard", Standard(training=HOW)), "(recipe: pgd → standard)"),
        (asked("pgd", replace(RECIPE, steps=3)), "(settings.pgd.steps: 2 → 3)"),
        (asked("pgd", RECIPE, eps=0.05), "(threat: linf:0.06 → linf:0.05)"),
    ):
        with pytest.raises(UsageError, match=re.escape(f"another configuration {said}")):
            harden(trainable(), training(), fakes.data(), other, run=tmp_path / "r", resume=True)


@pytest.fixture
def set_hardware(monkeypatch):
    """A function that sets the description of the machine."""

    def set_hardware(text):
        monkeypatch.setattr(hardening, "hardware", lambda *on: text)

    return set_hardware


@pytest.mark.slow
def test_a_run_that_resumes_on_another_machine_states_the_machine_of_each_part(tmp_path, set_hardware):
    def stop(step):
        if step.stage.startswith("training") and step.done == 2:
            raise Interrupted("stopped", signal_number=2)

    with pytest.raises(Interrupted):
        harden(trainable(), training(), fakes.data(), wish(), run=tmp_path / "r", progress=stop)
    here = json.loads((tmp_path / "r/run.json").read_text())["hardware"]
    set_hardware("another machine")
    found = harden(trainable(), training(), fakes.data(), wish(), run=tmp_path / "r", resume=True)
    assert found.card["hardware"] == f"{here}, then another machine"
    assert [point.hardware for point in found.curve] == [here, here, "another machine"]
    chain = (tmp_path / "r/chain.jsonl").read_bytes()
    set_hardware("a third one")
    again = harden(trainable(), training(), fakes.data(), wish(), run=tmp_path / "r", resume=True)
    assert again.card == found.card
    assert (tmp_path / "r/chain.jsonl").read_bytes() == chain


@pytest.mark.slow
def test_code_that_decides_what_is_learned_is_part_of_what_makes_two_runs_the_same(tmp_path, monkeypatch):
    package = shutil.copytree(Path(holdfast.__file__).parent, tmp_path / "holdfast")
    monkeypatch.setattr(holdfast, "__file__", str(package / "__init__.py"))
    digests = {code_digest.__wrapped__()}
    for name in ("recipes/trades.py", "runs/harden/pace.py", "recipes/training/fit.py"):
        with (package / name).open("a") as file:
            file.write("# another one\n")
        digests.add(code_digest.__wrapped__())
    assert len(digests) == 4


@pytest.mark.slow
def test_a_missing_nested_run_is_refused(tmp_path):
    harden(trainable(), training(), fakes.data(), wish(), run=tmp_path / "r")
    (tmp_path / "r/after").rename(tmp_path / "elsewhere")
    with pytest.raises(TargetError, match=r"after' is missing, but 'after\.json' contains its chain"):
        verify(tmp_path / "r")


@pytest.mark.slow
def test_going_on_with_a_finished_run_by_another_command_changes_nothing(tmp_path):
    harden(trainable(), training(), fakes.data(), wish(), run=tmp_path / "r")
    chain = (tmp_path / "r/chain.jsonl").read_bytes()
    other = wish(command="holdfast harden net.py:make data -o elsewhere/")
    harden(trainable(), training(), fakes.data(), other, run=tmp_path / "r", resume=True)
    assert (tmp_path / "r/chain.jsonl").read_bytes() == chain


@pytest.mark.slow
def test_a_file_of_the_nested_run_that_was_changed_is_found(tmp_path):
    harden(trainable(), training(), fakes.data(), wish(), run=tmp_path / "r")
    (tmp_path / "r/after/verdict.json").write_text("{}")
    with pytest.raises(TargetError, match=r"verdict\.json"):
        verify(tmp_path / "r")


@pytest.mark.slow
def test_another_run_in_the_place_of_the_nested_one_is_found(tmp_path):
    harden(trainable(), training(), fakes.data(), wish(), run=tmp_path / "r")
    shutil.rmtree(tmp_path / "r/after")
    shutil.copytree(tmp_path / "r/before", tmp_path / "r/after")
    with pytest.raises(TargetError, match=r"not the run whose chain is recorded in 'after\.json'"):
        verify(tmp_path / "r")


class Untouchable(torch.nn.Linear):
    def __deepcopy__(self, memo):
        raise TypeError("no copies")


class Sharing(torch.nn.Linear):
    def __deepcopy__(self, memo):
        return self


@pytest.mark.parametrize(
    "layer, said", [(Untouchable, "cannot be copied.*no copies"), (Sharing, "shares its weights")]
)
def test_layers_that_do_not_copy_are_refused(layer, said):
    net = torch.nn.Sequential(layer(fakes.FEATURES, fakes.CLASSES).double())
    with pytest.raises(TargetError, match=said):
        harden(fakes.subject(net), training(), fakes.data(), wish())


class Hollow(torch.nn.Linear):
    """With a parameter of no elements, as a layer of width 0 has it."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.none = torch.nn.Parameter(torch.zeros(0, 3))


def test_parameters_without_elements_share_nothing():
    net = torch.nn.Sequential(Hollow(fakes.FEATURES, fakes.CLASSES).double())
    assert copy_of(Classifier(net)).net[0].none.shape == (0, 3)


def test_a_recipe_that_lacks_a_setting_is_refused_before_anything_is_measured():
    told = []
    with pytest.raises(UsageError, match="none is given"):
        harden(trainable(), training(), fakes.data(), wish(RSLAD(training=HOW)), notify=told.append)
    assert told == []


def test_settings_that_cannot_be_trained_are_refused():
    frozen = fakes.subject(fakes.network().requires_grad_(False))
    with pytest.raises(UsageError, match="all 4 parameters are frozen"):
        harden(frozen, training(), fakes.data(), wish())
    with pytest.raises(TargetError, match="no parameters to train"):
        harden(fakes.subject(torch.nn.Flatten()), training(), fakes.data(), wish())


class Noting(torch.nn.Linear):
    def get_extra_state(self):
        return {"seen": 3}

    def set_extra_state(self, state):
        pass


def test_extra_state_that_is_no_tensor_and_lazy_layers_are_refused():
    net = torch.nn.Sequential(Noting(fakes.FEATURES, fakes.CLASSES).double())
    with pytest.raises(TargetError, match=r"net\.0\.\w*extra_state of the model is a dict.* register_buffer"):
        harden(fakes.subject(net), training(), fakes.data(), wish())
    lazy = torch.nn.Sequential(torch.nn.LazyLinear(fakes.CLASSES).double())
    with pytest.raises(TargetError, match=r"net\.0\.weight is UninitializedParameter"):
        harden(fakes.subject(lazy), training(), fakes.data(), wish())


@pytest.mark.slow
def test_what_is_frozen_stays_and_is_named():
    subject = trainable()
    subject.model.net[1].weight.requires_grad_(False)
    before = subject.model.net[1].weight.clone()
    found = harden(subject, training(), fakes.data(), wish())
    assert found.notes == ("1 of 4 parameters are frozen and are not trained: net.1.weight",)
    assert torch.equal(found.model.net[1].weight, before)
    assert not torch.equal(found.model.net[1].bias, subject.model.net[1].bias)


class Halving(torch.nn.Sequential):
    """Halves its input, if only in train mode, and if in place the one that it is given."""

    def __init__(self, *layers, inplace, always):
        super().__init__(*layers)
        self.inplace, self.always = inplace, always

    def forward(self, x):
        if self.always or self.training:
            x = x.mul_(0.5) if self.inplace else x * 0.5
        return super().forward(x)


@pytest.mark.slow
@pytest.mark.parametrize("always", [True, False])
@pytest.mark.parametrize(
    "recipe", [RECIPE, GradientRegularisation(training=HOW)], ids=lambda one: type(one).__name__
)
def test_a_model_that_changes_its_input_learns_from_copies(recipe, always, tmp_path):
    data, found = training(), {}
    before = data.x.clone()
    for inplace in (True, False):
        net = Halving(*fakes.network(1), inplace=inplace, always=always).requires_grad_()
        found[inplace] = harden(fakes.subject(net), data, fakes.data(), wish(recipe))
    assert torch.equal(data.x, before)
    assert found[True].weights == found[False].weights
    assert IN_PLACE in found[True].notes and IN_PLACE not in found[False].notes
    assert (found[True].write(tmp_path) / "card.md").read_text().count(IN_PLACE[1:]) == 1


class Rounding(torch.nn.Module):
    def forward(self, x):
        return (4 * x).round() / 4


@pytest.mark.slow
def test_a_model_without_an_input_gradient_is_noted_on_the_card():
    said = "no gradient reaches any of the first 8 held-out examples"
    for first, notes in ((Rounding(), 1), (torch.nn.Identity(), 0)):
        net = torch.nn.Sequential(first, *fakes.network(1)).requires_grad_()
        found = harden(fakes.subject(net), training(), fakes.data(), wish())
        assert [note.startswith(said) for note in found.notes] == [True] * notes


@pytest.mark.slow
def test_surrogates_that_change_their_input_are_given_copies():
    recipe, found = EnsembleTraining(steps=2, training=HOW), {}
    for inplace in (True, False):
        near = Classifier(Halving(*fakes.network(2), inplace=inplace, always=True))
        asked = replace(wish(recipe), threat=ThreatModel(Linf(0.06), surrogates=(near,)))
        found[inplace] = harden(trainable(), training(), fakes.data(), asked)
    assert found[True].weights == found[False].weights


class Greedy(torch.nn.Sequential):
    """Runs out of memory for more examples than this."""

    def forward(self, x):
        if self.training and len(x) > 20:
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(x)


@pytest.mark.slow
def test_batches_of_a_training_are_halved_if_memory_runs_out():
    net = Greedy(*fakes.network(1)).requires_grad_()
    found = harden(fakes.subject(net), training(), fakes.data(), wish())
    assert {point.batch for point in found.curve} == {16}
    (said,) = found.notes
    assert said.startswith("memory ran out in epoch 1: batches of 16 in place of 64")
    settings = found.card["settings"]["training"]
    assert (settings["batch"], settings["lr"]) == (16, pytest.approx(0.01 / 4))
    assert found.curve[0].lr == pytest.approx(hardening_rate(found))


@pytest.mark.slow
def test_batches_that_were_halved_stay_so_when_the_run_is_stopped_in_the_same_epoch(tmp_path):
    """As where another process has left by then, and there would be room again."""

    class Crowded(torch.nn.Sequential):
        most, seen = 64, 0

        def forward(self, x):
            type(self).seen += self.training
            if self.training and len(x) > self.most and self.seen > 20:
                raise torch.OutOfMemoryError("out of memory")
            if self.stop and self.seen == self.stop:
                raise Interrupted("stopped", signal_number=2)
            return super().forward(x)

    def asked(most, stop=0, **more):
        Crowded.most, Crowded.seen, Crowded.stop = most, 0, stop
        net = Crowded(*fakes.network(1)).requires_grad_()
        return harden(fakes.subject(net), training(), fakes.data(), wish(), **more)

    whole = asked(16)
    with pytest.raises(Interrupted):
        asked(16, stop=40, run=tmp_path / "r")
    assert asked(64, run=tmp_path / "r", resume=True).weights == whole.weights
    assert [point.batch for point in whole.curve] == [64, 64, 16]


@pytest.mark.parametrize("budget_s", [1e-6, 1e6])
@pytest.mark.usefixtures("noise_multiplier_of_one")
def test_a_budget_that_a_recipe_cannot_use_is_refused_whatever_its_size(budget_s):
    for recipe in (DPSGD(delta=1e-4, training=HOW), PolicyTraining(passes=1.0, training=HOW)):
        with pytest.raises(UsageError, match="budget of time"):
            harden(trainable(), training(), fakes.data(), wish(recipe, budget_s=budget_s))


@pytest.mark.slow
@pytest.mark.usefixtures("noise_multiplier_of_one")
def test_the_card_of_a_private_training_states_what_its_budget_means_for_equal_rows(tmp_path):
    batch, heard = training(), []
    x = batch.x.clone()
    x[20:29] = x[20]
    repeated = Batch(x, batch.y, batch.ids)
    recipe = DPSGD(epsilon=0.5, delta=1e-4, training=replace(HOW, epochs=1))
    found = harden(trainable(), repeated, fakes.data(), wish(recipe), run=tmp_path / "r", notify=heard.append)
    budget = found.card["privacy"]
    assert (budget["epsilon"], budget["delta"], budget["equal_rows"]) == (0.5, 1e-4, 9)
    assert budget["group_epsilon"] == 4.5
    assert budget["group_delta"] == pytest.approx(1e-4 * math.expm1(4.5) / math.expm1(0.5))
    stated = (
        "for each row of the training data, and not for each person. The largest number of equal rows is 9"
    )
    card = (found.write(tmp_path / "made") / "card.md").read_text()
    assert stated in card and any(stated in text for text in heard) and any(stated in n for n in found.notes)
    assert verify(tmp_path / "r").complete


def test_a_training_without_memory_for_one_example_is_refused():
    class Full(Greedy):
        def forward(self, x):
            if self.training:
                raise torch.OutOfMemoryError("out of memory")
            return super().forward(x)

    net = Full(*fakes.network(1)).requires_grad_()
    for budget_s in (None, 2.0):
        with pytest.raises(TargetError, match="memory ran out with one example at a time"):
            harden(fakes.subject(net), training(), fakes.data(), wish(budget_s=budget_s))


def hardening_rate(found: Hardened) -> float:
    """The last rate of the first epoch of three of a cycle, for batches of a quarter of the size."""
    done = 540 // 16 / (3 * (540 // 16) + 1)
    return 0.01 / 4 * (1 - done) / 0.7


def exploding(most):
    """A network whose outputs, and those of its copies, are NaN after `most` forward passes in training mode."""
    seen = []

    class Exploding(torch.nn.Sequential):
        def forward(self, x):
            if self.training:
                seen.append(len(x))
            return super().forward(x) * (float("nan") if self.training and len(seen) > most else 1.0)

    return Exploding(*fakes.network(1)).requires_grad_()


@pytest.mark.parametrize(
    "most, said", [(12, "the best of the 1 epochs before is in"), (3, "no epoch had been")]
)
def test_the_best_model_is_kept_if_the_loss_is_not_finite(tmp_path, most, said):
    net = exploding(most)
    with pytest.raises(LostLoss, match=f"update [0-9]+ of epoch {1 + (most > 8)} on.*{said}"):
        harden(fakes.subject(net), training(), fakes.data(), wish(), run=tmp_path / "r")
    made = tmp_path / "r/checkpoints/model.safetensors"
    assert made.exists() == (most > 8)
    if made.exists():
        assert safetensors.torch.load_file(made).keys() == net.state_dict().keys()


def test_a_training_with_a_non_finite_loss_keeps_its_best_model_without_a_named_folder(temporary_files):
    net = exploding(12)
    with pytest.raises(LostLoss, match="the best of the 1 epochs before is in") as caught:
        harden(fakes.subject(net), training(), fakes.data(), wish())
    (made,) = temporary_files.glob("holdfast-*/run/checkpoints/model.safetensors")
    assert repr(str(made)) in str(caught.value)


@pytest.mark.slow
def test_a_run_without_a_named_folder_is_kept_until_it_finishes(temporary_files, tmp_path):
    def fail(step):
        if step.stage.startswith("training") and step.done == 2:
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="^the disk is gone") as caught:
        harden(trainable(), training(), fakes.data(), wish(), progress=fail)
    (run,) = tmp_path.glob("holdfast-*/run")
    assert caught.value.__notes__ == [
        f"finished steps are stored; resume with: run={str(run)!r}, resume=True"
    ]
    found = harden(trainable(), training(), fakes.data(), wish(), run=run, resume=True)
    shutil.rmtree(run.parent)
    assert harden(trainable(), training(), fakes.data(), wish()).weights == found.weights
    with pytest.raises(UsageError):
        harden(trainable(), training(n=100), fakes.data(), wish())
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def objecting(monkeypatch):
    """Two recipes to try, and doubts that are raised against held-out examples, by the folder of the assessment."""
    plan = [
        {"recipe": name, "epochs": 2, "reason": "tried", "epoch_s": 0.01, "evaluation_s": 0.001}
        for name in ("SingleStep", "PGDTraining")
    ]
    assessed, doubted, looked_at = hardening.assess, {}, []

    def objecting(subject, data, *rest, run, **more):
        found = assessed(subject, data, *rest, run=run, **more)
        if not run.name.startswith("checked"):
            return found
        looked_at.append(len(data))
        robust = found.metrics["robust_accuracy"]
        name, value = doubted.get(run.name, (None, robust.value))
        doubts = () if name is None else (Doubt(name, "raised", message="a single step beats twenty"),)
        return SimpleNamespace(
            metrics={"robust_accuracy": replace(robust, value=value)},
            doubts=doubts,
            about=found.about,
            accepted_doubts=found.accepted_doubts,
        )

    monkeypatch.setattr(hardening, "attempts", lambda *rest, **more: (plan, 0.0))
    monkeypatch.setattr(hardening, "assess", objecting)
    return doubted, looked_at, plan


BOTH = wish(SingleStep(training=HOW), RECIPE, budget_s=0.5)


@pytest.mark.slow
def test_a_stronger_recipe_follows_where_doubts_object(objecting, tmp_path):
    doubted, looked_at, _ = objecting
    doubted["checked"] = ("one-step", 0.9)
    told, run = [], tmp_path / "r"
    found = harden(trainable(), training(), fakes.data(), BOTH, run=run, notify=told.append)
    assert found.card["recipe"] == "PGDTraining"
    assert told[0].startswith("expected total time: 0.5 s of training, about ")
    assert told[0].endswith("; 0.5 s more of training if doubts are raised")
    assert told[1].startswith("timing updates of SingleStep, PGDTraining")
    assert [line.split(" (")[0] for line in told[2:]] == ["training by SingleStep", "training by PGDTraining"]
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == [
        "after",
        "before",
        "checked",
        "checked-2",
        "checkpoints",
        "checkpoints-2",
    ]
    assert verify(run).complete
    assert looked_at == [60, 60]  # of the training data, and not those that judge
    assert found.card["recipes_tried"] == ["SingleStep", "PGDTraining"]
    assert found.notes[-1].endswith(
        "several recipes were tried: SingleStep, PGDTraining; the result is that of PGDTraining"
    )
    cost = found.card["cost"]
    assert cost["wall_s"] > sum(point.wall_s for point in found.curve)
    assert (cost["budget_s"], cost["announced_s"]) == (0.5, 1.0)
    assert cost["budget_used"] == cost["planning_s"] + cost["wall_s"] < 1.1
    assert open_run(run).about["folder"] == str(run / "after")
    again = harden(trainable(), training(), fakes.data(), BOTH, run=run, resume=True)
    assert again.weights == found.weights


@pytest.mark.slow
@pytest.mark.parametrize(("values", "stands"), [((0.9, 0.4), "SingleStep"), ((0.4, 0.9), "PGDTraining")])
def test_the_most_robust_of_the_doubted_recipes_is_chosen(objecting, values, stands):
    objecting[0].update(zip(("checked", "checked-2"), (("one-step", value) for value in values), strict=True))
    assert harden(trainable(), training(), fakes.data(), BOTH).card["recipe"] == stands


@pytest.mark.slow
def test_an_accepted_doubt_remains_accepted_after_a_resume(objecting, tmp_path):
    objecting[0]["checked"] = ("one-step", 0.4)
    accepting = replace(
        BOTH, assessment=replace(BOTH.assessment, accepted={"one-step": "as it is known to be"})
    )
    found = harden(trainable(), training(), fakes.data(), accepting, run=tmp_path / "r")
    assert found.card["recipes_tried"] == ["SingleStep"]
    again = harden(trainable(), training(), fakes.data(), BOTH, run=tmp_path / "r", resume=True)
    assert again.card["recipes_tried"] == ["SingleStep"] and again.weights == found.weights


def test_a_recipe_of_which_no_epoch_fits_into_what_is_left_is_not_trained(objecting):
    objecting[0]["checked"] = ("one-step", 0.9)
    objecting[2][1]["epoch_s"] = 0.9
    found = harden(trainable(), training(), fakes.data(), BOTH)
    assert found.card["recipes_tried"] == ["SingleStep"] and found.card["cost"]["announced_s"] == 0.5
    assert found.notes[-1].startswith(
        "doubts were raised, but PGDTraining was not trained: one epoch takes about 0.9"
    )


def test_assessments_use_fewer_examples_where_they_would_take_longer_than_they_may(set_limit, tmp_path):
    set_limit("holdfast.runs.harden.harden._LEAST", 10)
    set_limit("holdfast.runs.harden.candidates._FEW", 100)
    heard, run = [], tmp_path / "r"
    found = harden(
        trainable(), training(), fakes.data(), wish(assess_budget_s=1e-6), run=run, notify=heard.append
    )
    assert len(found.before.evidence) == len(found.after.evidence) == 10
    assert torch.equal(found.before.evidence["id"], found.after.evidence["id"])
    assert "on 10 of 40 test examples" in heard[0]
    few, sample = found.notes[-2:]
    assert few.startswith("only 60 held-out examples choose the checkpoint")
    assert sample.startswith("both assessments use a random sample of 10 of the 40 test examples")
    assert f"note: {few}" in heard and f"note: {sample}" in heard
    assert found.card["held_out"]["standard_error"] == standard_error(found.card["chosen"]["robust"], 60)
    assert verify(run).complete
    second = StepTimes(StepTime(0.0, 1.0), StepTime(0.0, 1.0))
    times = AssessmentTimes(StageTimes(second, (), (), probed=False, gradients=True, size=256, share=0), 0)
    assert [times.fitting(1000, limit) for limit in (None, 1.0, 90.0, 1e6)] == [1000, 10, 45, 1000]


@pytest.mark.slow
def test_a_suite_that_is_too_weak_is_no_objection(objecting):
    objecting[0]["checked"] = ("not-exhausted", 0.4)
    assert harden(trainable(), training(), fakes.data(), BOTH).card["recipes_tried"] == ["SingleStep"]


def test_the_strongest_that_has_its_epochs_is_tried_first_and_stronger_ones_after_it(monkeypatch):
    seconds, timed = {"Standard": 1.0, "SingleStep": 3.0, "PGDTraining": 8.0}, []

    def timing(recipe, *rest):
        timed.append(type(recipe).__name__)
        clock[0] += late
        return Pace(seconds[timed[-1]] / 10, 10)

    clock, late = [0.0], 0.0
    monkeypatch.setattr(candidates, "pace", timing)
    ladder = tuple(
        Candidate(type(one).__name__, replace(one, training=replace(HOW, batch=10)), {}, least)
        for one, least in ((Standard(), 1), (SingleStep(), 10), (RECIPE, 12))
    )
    data = training(n=100)  # ten updates an epoch

    def planned(budget_s, look_s=0.0):
        def look(n):
            clock[0] += look_s * n / 64

        return attempts(ladder, budget_s, None, data, None, Evaluation(64, look), lambda: clock[0])

    def tried(budget_s):
        return [(one["recipe"], round(one["epochs"], 1)) for one in planned(budget_s)[0]]

    assert tried(200.0) == [("PGDTraining", 24.2)]
    ladder = tuple(replace(one, short_lr=0.05) for one in ladder)
    assert [planned(budget_s)[0][0]["lr"] for budget_s in (200.0, 1000.0)] == [0.05, None]
    assert tried(60.0) == [("SingleStep", 19.4), ("PGDTraining", 7.2)]
    assert tried(10.0) == [("Standard", 9.7), ("SingleStep", 3.2), ("PGDTraining", 1.2)]
    (chosen, *_), _ = planned(5.0)
    assert chosen["fitting_epochs"] == {"Standard": 4.8, "SingleStep": 1.6, "PGDTraining": 0.6}
    (chosen, *_), spent_s = planned(60.0, look_s=2.0)
    assert (chosen["epoch_s"], chosen["evaluation_s"], chosen["held_out"]) == (3.0 + 2.0, 2.0, 64)
    assert spent_s == 2.0 * (2 + 8 + 8 + 16 + 32) / 64  # one for all recipes, timed on a few examples first
    (chosen, *_), _ = planned(60.0, look_s=12.0)
    assert (chosen["evaluation_s"], chosen["held_out"]) == (
        3.0,
        16,
    )  # a twentieth of the budget, and not all examples
    timed.clear()
    with pytest.raises(
        UsageError,
        match=r"one update takes about 0\.1 s .*, and measuring these times took 0 s; .*budget='2s'",
    ):
        tried(0.05)
    assert timed == ["Standard"]  # what is stronger takes longer
    late = 2.0
    assert tried(90.0) == [("SingleStep", 27.1), ("PGDTraining", 10.1)]  # six seconds are spent on timing
    late = 10.0
    (chosen, *_), spent_s = planned(90.0)
    assert (chosen["recipe"], spent_s) == (
        "SingleStep",
        30.0,
    )  # more than a tenth, but each could have been chosen
    assert "the strongest recipe whose smallest number of epochs fits" in chosen["reason"]
    timed.clear()
    ladder = ladder[:1] + tuple(replace(one, least=100) for one in ladder[1:])
    assert tried(90.0) == [("Standard", 77.6)] and timed == ["Standard"]  # no other can reach its epochs
    ladder = tuple(replace(one, least=100) for one in ladder)
    (chosen,), _ = planned(90.0)
    assert chosen["reason"].startswith(
        "no recipe reaches its smallest number of epochs within the budget, and this is the fastest: 77.6 epochs fit "
        "and 100 are needed; SingleStep, which is slower, needs 100"
    )


@pytest.mark.slow
def test_the_twin_takes_data_in_hand_and_keeps_a_tenth_aside():
    data = training(1_000)
    net = fakes.network(1).requires_grad_()
    found = holdfast.harden(
        net, (data.x, data.y), threat="linf:0.06", recipe=RECIPE, suite="quick", doubts=False
    )
    assert found.after.metrics["robust_accuracy"].n == 100
    assert found.card["recipe"] == "pgd"
    assert found.card["settings"]["steps"] == 2
    test = fakes.data().read(0, fakes.N)
    found = holdfast.harden(
        net,
        (test.x, test.y),
        threat="linf:0.06",
        recipe={"use": "pgd", "steps": 1, "training": {"epochs": 1}},
        fit=(data.x, data.y),
        suite="quick",
        doubts=False,
    )
    assert found.after.metrics["robust_accuracy"].n == fakes.N
    assert "epoch 1 of 1" in str(found)


class Widening(torch.nn.Sequential):
    def forward(self, x):
        return super().forward(x.to(torch.float64))


@pytest.mark.slow
def test_what_is_advised_to_weights_of_another_type_can_be_hardened():
    data = training(1_000)
    net = fakes.network(1).requires_grad_()

    def hardened(given):
        recipe = {"use": "pgd", "steps": 1, "training": {"epochs": 1}}
        return holdfast.harden(
            given, (data.x.float(), data.y), "linf:0.06", recipe, suite="quick", doubts=False
        )

    with pytest.raises(TargetError) as error:
        hardened(net)
    said = "give net.to(torch.float32), or a network whose forward begins with x = x.to(torch.float64)"
    assert said in str(error.value)
    for given in (Widening(*net), copy.deepcopy(net).to(torch.float32)):
        assert hardened(given).model.net[1].weight.dtype == given[1].weight.dtype


@pytest.mark.slow
def test_a_factory_of_the_twin_draws_the_weights_of_the_seed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = f"torch.nn.Linear({fakes.FEATURES}, {fakes.CLASSES}).double()"
    Path("net.py").write_text(f"import torch\n\ndef make():\n    return {net}\n")
    data = training(1_000)
    one, other = (
        holdfast.harden(
            holdfast.open_model("net.py:make", trust_code=True), (data.x, data.y), threat="linf:0.06",
            suite="quick", doubts=False, recipe={"use": "fgsm-rs", "training": {"epochs": 1}},
        )
        for _ in range(2)
    )  # fmt: skip
    assert one.weights == other.weights
    settings = one.card["settings"]["training"]
    assert (settings["epochs"], settings["weight_decay"]) == (1, 0.1)


@pytest.mark.parametrize(
    "recipe, said",
    [(PGDTraining, "give an instance: PGDTraining()"), (3, "recipe is 3; expected a name")],
)
def test_what_is_no_recipe_is_refused(recipe, said):
    data = training()
    with pytest.raises(UsageError) as error:
        holdfast.harden(fakes.network(), (data.x, data.y), threat="linf:0.06", recipe=recipe)
    assert said in str(error.value)


@pytest.mark.parametrize(
    "recipe, said",
    [
        (PGDTraining(steps=0), "PGDTraining: steps is 0"),
        (PGDTraining(training=Training(averaging="EMA")), "PGDTraining: training: averaging is 'EMA'"),
        (PGDTraining(training=Training(optimizer="SGD")), "PGDTraining: training: optimizer is 'SGD'"),
        (PGDTraining(training=Training(batch=2.5)), "PGDTraining: training: batch is 2.5"),
        (PGDTraining(training={"epochs": 3}), "training is {'epochs': 3}; expected a Training"),
        (PGDTraining(training=None), "training is None; expected a Training"),
    ],
)
def test_a_recipe_in_hand_has_settings_that_a_file_might_have(recipe, said):
    data = training()
    with pytest.raises(UsageError) as error:
        holdfast.harden(fakes.network(), (data.x, data.y), threat="linf:0.06", recipe=recipe)
    assert said in str(error.value)


@dataclass(frozen=True)
class Bare:
    """A recipe of somebody's own around the loop, which counts no passes."""

    training: Training = HOW

    def __call__(self, model, data, threat, *, rng, after=None):
        net = copy.deepcopy(model).train()

        def loss(batch, x_adv):
            logits = net(x_adv)
            return torch.nn.functional.cross_entropy(logits, batch.y), (logits.argmax(1) == batch.y).sum()

        return fit(net, data, lambda batch, _: batch.x, loss, self.training, rng=rng, after=after)


def test_a_recipe_of_ones_own_needs_to_count_nothing(tmp_path):
    found = harden(trainable(), training(), fakes.data(), wish(Bare()))
    assert [point.forwards for point in found.curve] == [0.0, 0.0, 0.0]
    assert "through the network" not in (found.write(tmp_path / "made") / "card.md").read_text()


@pytest.mark.slow
def test_surrogates_are_in_eval_mode_and_frozen_whatever_they_were():
    seen = []

    class Looking(Standard):
        def __call__(self, model, data, threat, **rest):
            seen.extend(threat.surrogates)
            return super().__call__(model, data, threat, **rest)

    other = Classifier(fakes.network(3)).train()
    asked = wish(Looking(training=HOW))
    harden(
        trainable(),
        training(),
        fakes.data(),
        replace(asked, threat=ThreatModel(Linf(0.06), surrogates=(other,))),
    )
    assert seen and not any(held.training for held in seen)
    assert not any(weight.requires_grad for held in seen for weight in held.parameters())
    assert other.training and all(weight.requires_grad for weight in other.parameters())


@pytest.mark.slow
def test_a_pace_is_that_of_a_training_whose_guard_has_no_objection(monkeypatch, set_guard_accuracy):
    """Ten steps break all as soon as much may be changed, as they do of a network that is not hardened yet."""
    recipe, threat = SingleStep(training=replace(HOW, epochs=1, batch=8)), ThreatModel(Linf(0.3))
    model, data = trainable().model, training(n=1200)

    def right(guard, steps):
        return 0.1 if steps > 1 and guard.learner.with_current_eps.threat.constraint.eps > 0.01 else 0.9

    set_guard_accuracy(right)
    (whole,) = recipe(model, data, threat, rng=Draws(0))
    assert whole.measured["dearer"] > 1
    held, holds = [], OverfittingGuard.passes
    monkeypatch.setattr(OverfittingGuard, "passes", lambda guard: held.append(holds(guard)) or held[-1])
    found = pace(recipe, model, data, threat, budget_s=1000.0)
    assert held and all(held)
    assert found.epoch == 150 * found.update


@pytest.mark.parametrize("norm", [Linf, L2, L1])
def test_timed_updates_project_as_those_of_the_training_do(norm):
    """Within a ball of nothing a projection has less to do."""
    seen: list[float] = []

    class Looking(Standard):
        def __call__(self, model, data, threat, **rest):
            seen.append(threat.constraint.eps)
            return super().__call__(model, data, threat, **rest)

    pace(Looking(training=HOW), trainable().model, training(), ThreatModel(norm(0.06)), budget_s=10.0)
    assert seen and all(0 < eps < 0.01 * 0.06 for eps in seen)


def test_a_budget_that_is_out_of_the_question_is_refused_after_two_updates():
    """The first takes long, as it does where kernels are chosen, and says nothing."""

    class Slow(torch.nn.Sequential):
        passes, now = 0, 0.0

        def forward(self, x):
            Slow.passes += self.training
            Slow.now += (0.02 if Slow.passes > 2 else 0.5) * self.training
            return super().forward(x)

    net = Slow(*fakes.network(1)).requires_grad_()
    subject, how = fakes.subject(net), replace(HOW, batch=8)

    def asked(budget_s):
        Slow.passes = 0
        asked = wish(Standard(training=how), budget_s=budget_s)
        harden(subject, training(), fakes.data(), asked, clock=lambda: Slow.now)

    with pytest.raises(UsageError, match=r"one update takes about \d.* give budget='\d+s' or more"):
        asked(0.02)
    assert Slow.passes <= 4  # others see whether it changes its input, and which weights it uses


def test_threats_that_no_recipe_is_for_are_refused():
    data = training()
    with pytest.raises(UsageError, match="recipes train for the threats linf, l2 and l1"):
        holdfast.harden(fakes.network(), as_data(data.x, data.y), threat="l0:3")
    for recipe in ("pgd", RECIPE):
        with pytest.raises(UsageError, match="and the threat is l0; give threat="):
            holdfast.harden(fakes.network(), as_data(data.x, data.y), threat="l0:3", recipe=recipe)
    with pytest.raises(UsageError, match="the goal is class 1; leave goal= out"):
        holdfast.harden(fakes.network(), (data.x, data.y), threat="linf:0.06,goal=targeted:1")
    with pytest.raises(
        UsageError, match="recipe auto selects one of several recipes, so it has no setting 'beta'"
    ):
        holdfast.harden(
            fakes.network(), (data.x, data.y), threat="linf:0.06", recipe={"use": "auto", "beta": 2}
        )


def test_a_folder_that_is_used_is_refused_before_anything_is_timed(tmp_path, monkeypatch):
    (tmp_path / "r").mkdir()
    (tmp_path / "r/notes.txt").write_text("mine")
    monkeypatch.setattr(hardening, "attempts", lambda *rest, **more: pytest.fail("it was timed"))
    with pytest.raises(UsageError, match="is not a run folder"):
        harden(trainable(), training(), fakes.data(), wish(budget_s=60.0), run=tmp_path / "r")


@pytest.mark.slow
def test_other_surrogates_are_another_run(tmp_path):
    def asked(digest):
        near = fakes.subject(fakes.network(2), digest=digest * 64)
        asked = wish()
        return replace(asked, assessment=replace(asked.assessment, surrogates=(near,)))

    harden(trainable(), training(), fakes.data(), asked("b"), run=tmp_path / "r")
    with pytest.raises(UsageError, match="another configuration .surrogates"):
        harden(trainable(), training(), fakes.data(), asked("c"), run=tmp_path / "r", resume=True)


@pytest.mark.slow
def test_notes_of_the_assessment_are_on_the_card(tmp_path):
    asked = wish()
    judged = replace(asked, assessment=replace(asked.assessment, time_budget_s=1e-9))
    found = harden(trainable(), training(), fakes.data(), judged)
    said = [note for side in ("before", "after") for note in found.card[side]["notes"]]
    assert [note for note in said if note.startswith("time ran out")]
    text = (found.write(tmp_path / "made") / "card.md").read_text()
    assert all(text.count(escaped(note)) == 1 for note in said)


class Counting(torch.nn.Sequential):
    """Counts its passes in a buffer that no state dict holds."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.register_buffer("passes", torch.zeros(()), persistent=False)

    def forward(self, x):
        if self.training:
            self.passes += 1
        return super().forward(x)


def test_a_buffer_that_moves_and_that_no_state_dict_holds_is_named():
    net = Counting(*fakes.network(1)).requires_grad_()
    with pytest.raises(TargetError, match="buffer net.passes changes while the network is trained"):
        harden(fakes.subject(net), training(), fakes.data(), wish())


def test_epochs_of_a_recipe_in_hand_and_a_budget_exclude_each_other():
    data = training()
    asked = {"threat": "linf:0.06", "budget": "1min"}
    with pytest.raises(UsageError, match="recipe.training.epochs is 3, and the budget is 1min"):
        holdfast.harden(fakes.network(), (data.x, data.y), recipe=RECIPE, **asked)
    with pytest.raises(UsageError, match="recipe.training.epochs is 7"):
        holdfast.harden(fakes.network(), (data.x, data.y), recipe=Bare(replace(HOW, epochs=7)), **asked)
    assert _usual_epochs(TRADES(beta=3.0)) == 30
    assert _usual_epochs(Bare()) == HOW.epochs
