"""Trainings with an optimiser, a scheduler, an augmentation, class weights and logs of the user."""

import contextlib
import csv
import json
import random
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau

import holdfast
from holdfast import recipes
from holdfast.core.constraints import L2
from holdfast.core.draws import Draws
from holdfast.core.errors import FunctionRaised, TargetError, UsageError
from holdfast.core.training import Checkpoint, TrainingPlan
from holdfast.recipes import (
    ATTA,
    CURE,
    HAT,
    IKL,
    LLR,
    MART,
    SABR,
    SCORE,
    TRADES,
    VAT,
    CurriculumTraining,
    Denoising,
    EnsembleTraining,
    FreeTraining,
    GaussianNoise,
    GradientRegularisation,
    Hybrid,
    IBPTraining,
    JacobianRegularisation,
    LipschitzConstraint,
    MarginTraining,
    MultiNormTraining,
    PGDTraining,
    PolicyTraining,
    SingleStep,
    Standard,
)
from holdfast.recipes.training.fit import Saving, Training
from holdfast.runs.documents.run_manifest import harden_manifest
from holdfast.runs.engine.progress import Stopped
from holdfast.runs.harden.attempt_training import AttemptTraining
from holdfast.runs.harden.candidates import Candidate
from holdfast.runs.harden.checkpoints import (
    LAST,
    CSVTracker,
    EpochLog,
    MLflowTracker,
    Point,
    save,
    save_within,
)
from holdfast.runs.harden.harden import harden
from holdfast.settings.grammar import is_remote_log
from holdfast.verbs.checked_settings import check_settings
from holdfast.verbs.opening.recipes import build_recipe, settings_of
from holdfast.verbs.settings import Harden
from runs import fakes
from runs.test_hardening import THREAT, trainable, training, wish

CALLS: list[int] = []
"""calls of `shifted`; a list, because it is not part of the digest of the function"""
DIE_AT: list[int] = []


class Killed(BaseException):
    """What ends a run here without any clean-up."""


def grouped(parameters):
    decayed = [parameter for parameter in parameters if parameter.dim() > 1]
    others = [parameter for parameter in parameters if parameter.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 5e-4}, {"params": others, "lr": 0.02}]
    return torch.optim.SGD(groups, lr=0.05, momentum=0.9)


def one_cycle(optimizer, total):
    return OneCycleLR(optimizer, max_lr=[0.1, 0.02], total_steps=total)


def shifted(x, y, generator):
    CALLS.append(len(y))
    if len(CALLS) in DIE_AT:
        raise Killed
    noise = torch.rand(x.shape, generator=generator, dtype=x.dtype)
    return (x + 0.02 * (noise - 0.5)).clamp(0, 1)


HOW = Training(
    epochs=3,
    batch=64,
    optimizer=grouped,
    schedule=one_cycle,
    augment=shifted,
    class_weights=(1.0, 2.0, 0.5, 1.0),
    clip=1.0,
)


def weights_of(recipe, after=None):
    *_, last = recipe(trainable().model, training(), THREAT, rng=Draws(0), after=after)
    return last


def own_run(folder, log, **more):
    data = training()
    spec = {"use": "pgd", "steps": 2, "training": {name: getattr(HOW, name) for name in (
        "epochs", "batch", "optimizer", "schedule", "augment", "class_weights", "clip")}}  # fmt: skip
    return holdfast.harden(
        fakes.network(1).requires_grad_(), (data.x, data.y), "linf:0.06", spec, suite="quick", doubts=False, sample=20,
        run=folder, resume=True, log=[f"csv:{log}"], checkpoint_every=3, **more,
    )  # fmt: skip


def rows(path):
    with path.open() as file:
        return [{**row, "seconds": ""} for row in csv.DictReader(file)]


@pytest.mark.slow
def test_a_run_with_everything_of_the_user_that_is_killed_twice_has_the_same_bytes(tmp_path):
    own_run(tmp_path / "whole", tmp_path / "whole.csv")
    n_calls = len(CALLS)
    for die_at in (8, 15):  # within the first and within the second epoch, after checkpoints within them
        CALLS.clear()
        DIE_AT[:] = [die_at]
        with pytest.raises(Killed):
            own_run(tmp_path / "killed", tmp_path / "killed.csv")
    CALLS.clear()
    DIE_AT.clear()
    own_run(tmp_path / "killed", tmp_path / "killed.csv")
    assert (n_calls, len(CALLS)) == (4 + 24, 4 + 12)  # from update 12 on; two checks call it twice
    for name in ("run.json", "card.json", "chain.jsonl", "model.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    settings = json.loads((tmp_path / "whole" / "card.json").read_text())["settings"]["training"]
    assert not {"lr", "momentum", "weight_decay"} & settings.keys()
    assert [row["epoch"] for row in rows(tmp_path / "whole.csv")] == ["1", "2", "3"]
    assert rows(tmp_path / "killed.csv") == rows(tmp_path / "whole.csv")


def test_a_training_resumes_from_a_checkpoint_within_an_epoch_also_with_a_guard_and_numbers_in_the_optimiser():
    class Counting(torch.optim.SGD):
        """An optimiser with numbers in its state and in its parameter groups, which determine its steps."""

        def step(self, closure=None):
            for group in self.param_groups:
                group["age"] = group.get("age", 0) + 1
                for parameter in group["params"]:
                    count = self.state[parameter].setdefault("count", 0) + 1
                    self.state[parameter]["count"] = count
                    parameter.grad.mul_(1 + 0.1 * ((count + group["age"]) % 3))
            return super().step(closure)

    how = replace(
        HOW,
        epochs=1,
        optimizer=lambda parameters: Counting(parameters, lr=0.05),
        schedule=lambda optimizer, total: OneCycleLR(optimizer, max_lr=0.1, total_steps=total),
        averaging="swa",
    )
    kept: list[Checkpoint] = []
    recipe = SingleStep(training=replace(how, batch=4))
    saving = replace(recipe, training=replace(recipe.training, saving=Saving(90, kept.append)))
    whole = weights_of(recipe)
    assert same(weights_of(saving), whole)
    assert [checkpoint.step for checkpoint in kept] == [100]  # the guard checks every hundred updates
    assert same(weights_of(recipe, kept[0]), whole)


def same(one, other):
    assert one.measured == other.measured
    return all(torch.equal(value, other.tensors[name]) for name, value in one.tensors.items())


PLAIN = Training(
    epochs=1,
    batch=64,
    optimizer="sgd",
    lr=0.01,
    momentum=0.0,
    weight_decay=0.0,
    schedule="flat",
    averaging="none",
    warmup=0.0,
)
WEIGHTED = [
    Standard(label_smoothing=0.1),
    PGDTraining(steps=2, clean=0.5),
    SingleStep(),
    TRADES(steps=2),
    MART(steps=2),
    ATTA(),
    HAT(steps=2),
    Hybrid(steps=2),
    IKL(steps=2),
    SCORE(steps=2),
    CurriculumTraining(steps=2),
    FreeTraining(replays=1),
    EnsembleTraining(steps=2),
    MultiNormTraining(others=(L2(0.2),), method="average", steps=2),
    GradientRegularisation(),
    CURE(),
    LLR(steps=2),
    JacobianRegularisation(projections=2),
    LipschitzConstraint(gain=1e3),
    GaussianNoise(sigma=0.1, copies=2, stability=2.0),
    MarginTraining(),
    IBPTraining(regularisation=0.0),
    SABR(regularisation=0.0),
    PolicyTraining(),
]


def test_every_recipe_weights_the_losses_of_examples_by_their_classes_or_refuses():
    """The gradient of a weighted loss is linear in the weights, so that opposite changes of weights cancel."""
    # for other threats or networks or for several of them, with weights that are rounded or pruned, or without labels
    other = {
        "DPSGD", "FTSAM", "Int8", "LeagueTraining", "MaskedPatches", "MaskedWords", "Partitions", "Prune",
        "RSLAD", "Repair"
    }  # fmt: skip
    # and those that choose images or settings by what they have learned
    other |= {"AugmentPolicy", "GeneratedData", "Tuning"}
    assert {type(recipe) for recipe in WEIGHTED} | {VAT, Denoising} == {
        getattr(recipes, name) for name in recipes.__all__ if name not in other
    }
    data = training()
    data = data.take(torch.cat([(data.y == k).nonzero()[:32, 0] for k in (0, 3)]))

    def trained(recipe, weights):
        how = replace(PLAIN, class_weights=weights)
        threat = replace(THREAT, surrogates=(trainable(2).model,))
        (end,) = replace(recipe, training=how)(trainable(0).model, data, threat, rng=Draws(0))
        return torch.cat(
            [value.flatten() for name, value in sorted(end.tensors.items()) if "weights." in name]
        )

    start = torch.cat([value.flatten() for _, value in sorted(trainable(0).model.state_dict().items())])
    for recipe in WEIGHTED:
        equal, plus, minus = (
            trained(recipe, weights) - start for weights in (None, (3.0, 1.0, 1.0, 1.0), (1.0, 1.0, 1.0, 3.0))
        )
        torch.testing.assert_close(plus + minus, 2 * equal, msg=repr(recipe))
        assert (plus - equal).norm() > 0.05 * equal.norm(), recipe
    with pytest.raises(UsageError, match="does not weight examples by their classes"):
        trained(VAT(), (1.0, 1.0, 1.0, 1.0))
    for weights, message in (
        ((1.0, 2.0), "has 2 weights, and the model has 4 classes"),
        ((1.0, 0.0, 1.0, 1.0), "has the weight 0; every weight must be positive"),
        ((1.0, -2.0, 1.0, 1.0), "has the weight -2"),
    ):
        with pytest.raises(UsageError, match=message):
            trained(Standard(), weights)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"optimizer": lambda parameters: torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1)},
            UsageError,
            "has 1 parameters that the function did not receive, and lacks 4 of the 4",
        ),
        ({"optimizer": lambda parameters: None}, UsageError, "returned None; an optimiser"),
        (
            {"optimizer": lambda parameters: 1 / 0},
            TargetError,
            "optimizer raised ZeroDivisionError: division by zero",
        ),
        ({"optimizer": torch.optim.LBFGS}, UsageError, "LBFGS need a function that computes the loss"),
        ({"schedule": lambda optimizer, total: ReduceLROnPlateau(optimizer)}, UsageError, "need a metric"),
        ({"schedule": lambda optimizer, total: None}, UsageError, "returned None; a scheduler"),
        (
            {"schedule": lambda optimizer, total: OneCycleLR(grouped([torch.zeros(2, 2)]), 0.1, total)},
            UsageError,
            "belongs to another optimiser",
        ),
        ({"augment": lambda x, y, generator: x[:, 1:]}, UsageError, r"shape \(64, 11\).*shape \(64, 12\)"),
        (
            {"augment": lambda x, y, generator: x * 2 - 0.5},
            UsageError,
            "inputs from -0.4.* to 1.4.*are 0 to 1",
        ),
        ({"augment": lambda x, y, generator: x * float("nan")}, UsageError, "from nan to nan"),
        ({"augment": lambda x, y, generator: [x]}, UsageError, "returned a list"),
        (
            {"augment": lambda x, y, generator: (x + 0.1 * random.random()).clamp(0, 1)},
            UsageError,
            "different inputs for the same batch",
        ),
    ],
    ids=range(12),
)
def test_what_does_not_fit_the_training_is_refused_before_the_first_update(change, error, message):
    recipe = Standard(training=replace(PLAIN, **change))
    with pytest.raises(error, match=message):
        recipe(trainable().model, training(), THREAT, rng=Draws(0))


class FailingSGD(torch.optim.SGD):
    def step(self, closure=None):
        if self.state:
            raise ZeroDivisionError("no more")
        return super().step(closure)


def fails_on_fewer(x, y, generator):
    if not torch.equal(y, training().y[: len(y)]):  # not the batch that is checked before the training
        raise KeyError("unseen")
    return x


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"schedule": lambda optimizer, total: OneCycleLR(optimizer, max_lr=0.1, total_steps=3)},
            "schedule raised ValueError in update 5 of 9: Tried to step 4 times.*total number of updates",
        ),
        (
            {"optimizer": lambda parameters: FailingSGD(parameters, lr=0.1, momentum=0.9)},
            "function optimizer raised ZeroDivisionError in update 2 of 9: no more",
        ),
        ({"augment": fails_on_fewer}, "augment raised KeyError in update 1 of 9: 'unseen'"),
    ],
    ids=["schedule", "optimizer", "augment"],
)
def test_a_function_that_raises_an_exception_in_an_update_is_reported_with_its_setting_and_the_update(
    change, message
):
    recipe = Standard(training=replace(PLAIN, **change))
    with pytest.raises(FunctionRaised, match=message) as caught:
        list(recipe(trainable().model, training(), THREAT, rng=Draws(0)))
    assert caught.value.__cause__ is not None


def test_a_scheduler_follows_the_completed_fraction_and_a_named_schedule_scales_each_group():
    rates = []

    def seen(parameters):
        optimizer = grouped(parameters)
        optimizer.register_step_pre_hook(
            lambda it, *_: rates.append([group["lr"] for group in it.param_groups])
        )
        return optimizer

    def ends(**changes):
        rates.clear()
        list(
            Standard(training=replace(PLAIN, epochs=2, batch=300, **changes))(
                trainable().model, training(), THREAT, rng=Draws(0)
            )
        )
        return torch.tensor(rates)

    optimizer = grouped([torch.zeros(2, 2), torch.zeros(2)])
    scheduler, expected = one_cycle(optimizer, 4), []
    for _ in range(4):
        expected.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    torch.testing.assert_close(ends(optimizer=seen, schedule=one_cycle), torch.tensor(expected))
    # the first plan has four updates; after two of them, eight are planned
    plans = {0: TrainingPlan(0, 0.0, 4, 2), 2: TrainingPlan(2, 0.5, 8, 8)}
    paced = ends(optimizer=seen, schedule=one_cycle, pacing=lambda done, *_: plans.get(done, plans[2]))
    torch.testing.assert_close(paced, torch.tensor(expected)[[0, 1, 2, 2, 2, 3, 3, 3]])
    flat = ends(optimizer=seen, schedule="cosine")
    torch.testing.assert_close(flat[:, 0] / flat[:, 1], torch.full((4,), 2.5))


@pytest.mark.parametrize(("given", "example"), [("1,2", "[1, 2]"), (3, "[3]")])
def test_a_list_of_numbers_without_brackets_is_refused_with_an_example(given, example):
    with pytest.raises(UsageError, match=re.escape(f"is {given!r}; expected a list, as in {example}") + "$"):
        build_recipe({"use": "pgd", "training": {"class_weights": given}})


def test_a_resumed_training_states_where_it_continues_and_what_is_left_of_the_budget(tmp_path):
    candidate = Candidate("pgd", Standard(training=PLAIN), {})
    attempt, budget_s = {"recipe": "pgd", "epochs": 4.0}, 60.0
    trainer = SimpleNamespace(start=lambda recipe: None)
    training_of_attempt = AttemptTraining(
        trainable(), trainer, candidate, attempt, budget_s, 8.0, tmp_path, {}, None
    )

    def message(its_budget_s=budget_s):
        return replace(training_of_attempt, budget_s=its_budget_s).resumed

    plan = TrainingPlan(0, 0.0, 36, 9)
    end = Checkpoint(1, 4, {}, {}, 1.0, 9, (plan,))
    point = Point(1, 0.5, 0.8, 0.1, 64, 0.9, 0.4, 3.0, 20.0)
    assert message() == ""
    save_within(tmp_path, replace(end, epoch=0, updates=1, step=1), (), 64, (1.0, 5.0))
    assert message(None) == "training by pgd continues after 1 update of epoch 1"
    save(tmp_path, LAST, end, (point,))
    assert message() == "training by pgd continues after epoch 1; 32 s of the budget are left"
    save_within(tmp_path, replace(end, updates=14, step=5), (point,), 64, (1.0, 10.0))
    assert message() == (
        "training by pgd continues after epoch 1 and 5 updates of epoch 2; 22 s of the budget are left"
    )
    save(tmp_path, LAST, replace(end, epoch=4, updates=36), (point,))
    assert message() == "training by pgd is complete"


def test_within_a_budget_a_scheduler_is_refused_for_the_planned_updates_before_anything_is_stored(tmp_path):
    def long(optimizer, total):
        if total < 10**9:
            raise ValueError("too few")
        return one_cycle(optimizer, total)

    recipe = Standard(training=replace(HOW, augment="none", schedule=long))
    request = replace(wish(recipe), budget_s=2.0, anyway=True)
    with pytest.raises(TargetError, match=r"schedule raised ValueError for [\d,]+ updates: too few"):
        harden(trainable(), training(), fakes.data(), request, run=tmp_path / "r")
    assert not (tmp_path / "r").exists()


class Broken:
    """A tracker whose server is down."""

    def start(self):
        raise ConnectionError("no server")


class Failing(Broken):
    def __init__(self):
        self.steps = []

    def start(self):
        return

    def log(self, values, step):
        self.steps.append(step)
        raise ConnectionError("no server")


def test_a_tracker_that_fails_is_reported_once_and_does_not_end_the_training(tmp_path):
    said, failing = [], Failing()
    log = EpochLog(trackers={"mlflow:http://a": Broken(), "wandb:b": failing}, notify=said.append)
    found = harden(
        trainable(), training(), fakes.data(), wish(), run=tmp_path / "r", log=log, notify=said.append
    )
    assert len(found.curve) == 3 and failing.steps == [1]
    assert [text for text in said if "failed" in text] == [
        f"warning: the log {name} failed (ConnectionError: no server); the training goes on without it"
        for name in ("mlflow:http://a", "wandb:b")
    ]


@pytest.mark.parametrize(
    ("raised", "status"), [(None, "FINISHED"), (Stopped(15), "KILLED"), (ValueError(), "FAILED")]
)
def test_the_status_of_a_run_in_mlflow_is_how_it_ended(raised, status):
    client = SimpleNamespace(ended=[], set_terminated=lambda *values: client.ended.append(values))
    tracker = object.__new__(MLflowTracker)  # the package may be missing
    tracker._run, tracker._client = "id", client
    with contextlib.suppress(Stopped, ValueError), EpochLog(trackers={"mlflow:m": tracker}).closing():
        if raised is not None:
            raise raised
    assert client.ended == [("id", status)]


@pytest.mark.parametrize(
    ("target", "is_remote"),
    [
        ("csv:a", False),
        ("tensorboard:a/b", False),
        ("tensorboard:gs://a", True),
        ("wandb:a", True),
        ("mlflow:a/b", False),
        ("mlflow:file:///a", False),
        ("mlflow:file://host/a", True),
        ("mlflow:sqlite:///a.db", False),
        ("mlflow:http://127.0.0.1:5000", True),
        ("mlflow:postgresql://a@b/c", True),
        ("mlflow:databricks", True),
    ],
)
def test_logs_that_are_sent_over_the_network(target, is_remote):
    assert is_remote_log(target) == is_remote


@pytest.mark.parametrize(
    ("target", "remedy"),
    [
        ("mlflow:http://user:secretpw@host/", "mlflow:http://host/ and set MLFLOW_TRACKING_USERNAME and"),
        ("mlflow:https://a:secretpw/x@y@host/", "mlflow:https://host/ and set MLFLOW_TRACKING_USERNAME and"),
        ("mlflow:postgresql://a:secretpw@host/db", "mlflow:postgresql://USER@host/db and give it in the env"),
    ],
)
def test_an_address_of_a_log_with_a_password_is_refused_without_printing_it(target, remedy):
    with pytest.raises(UsageError, match=re.escape(remedy)) as raised:
        check_settings({"log": [target]}, "", kind=Harden)
    assert "secretpw" not in str(raised.value)
    with pytest.raises(UsageError, match="log contains csv:a.csv and csv:./a.csv, which are the same file"):
        check_settings({"log": ["csv:a.csv", "csv:./a.csv"]}, "", kind=Harden)


def test_an_exception_of_on_epoch_stops_the_run_which_resumes_after_the_epoch(tmp_path):
    seen = []

    def stop(record):
        seen.append(record.epoch)
        if record.epoch == 2 and len(seen) == 2:
            raise ArithmeticError("enough")

    def run():
        log = EpochLog(on_epoch=stop)
        return harden(trainable(), training(), fakes.data(), wish(), run=tmp_path / "r", resume=True, log=log)

    with pytest.raises(ArithmeticError, match="enough") as raised:
        run()
    (note,) = raised.value.__notes__
    assert note.startswith("on_epoch raised this after epoch 2 of") and "resume=True" in note
    assert len(run().curve) == 3 and seen == [1, 2, 3]


def test_a_csv_log_is_continued_by_its_run_only_and_a_torn_row_is_written_again(tmp_path):
    path, columns, whole = tmp_path / "curve.csv", ("epoch", "certified"), "epoch,certified\n1,\n2,\n"
    for left in ("", "epo", whole[:-2], whole[:-3], whole):  # what a kill leaves
        path.write_text(left)
        tracker = CSVTracker(path, columns, resume=True)
        assert path.read_text() == left  # unchanged until the run starts
        tracker.start()
        for step in (1, 2):
            tracker.log({"epoch": step, "certified": None}, step)
        assert path.read_text() == whole
    with pytest.raises(UsageError, match="has rows of another run"):
        CSVTracker(path, columns, resume=False)


@pytest.mark.parametrize("resume", [True, False])
def test_a_file_that_is_not_a_log_is_refused_and_unchanged(tmp_path, resume):
    path = tmp_path / "sales.csv"
    for content in ("year,sum\n2024,7\n2025,8", "notes", "\nepoch", "epoch,certified,sum\n"):
        path.write_text(content)
        with pytest.raises(
            UsageError, match="not a log of a training, whose first line is epoch,cert.*sales-2.csv"
        ):
            CSVTracker(path, ("epoch", "certified"), resume=resume)
        assert path.read_text() == content


def test_only_parameters_that_match_are_trained(tmp_path):
    subject = trainable()
    before = {name: value.clone() for name, value in subject.model.net.state_dict().items()}
    changed = harden(subject, training(), fakes.data(), wish(train_only=("3.*",))).model
    after = dict(changed.named_parameters())
    for name, value in before.items():
        (new,) = (parameter for key, parameter in after.items() if key.endswith(name))
        assert torch.equal(new, value) == (not name.startswith("3."))
    with pytest.raises(
        UsageError, match="train_only is 'fc.*', which matches no parameter; the parameters are 1.weight"
    ):
        harden(subject, training(), fakes.data(), wish(train_only=("fc.*",)))


def test_a_changed_function_in_a_file_is_another_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "import torch\ndef make(parameters):\n    return torch.optim.SGD(parameters, lr={})\n"
    spec = {"use": "standard", "training": {"epochs": 1, "optimizer": "optim.py:make"}}
    digests, configs = [], []
    addresses = ("optim.py:make", f"{tmp_path}/optim.py:make", "optim.py:make")
    for lr, address in zip((0.1, 0.1, 0.2), addresses, strict=True):
        (tmp_path / "optim.py").write_text(code.format(lr))
        spec["training"]["optimizer"] = address
        recipe = build_recipe(spec)
        settings = settings_of(recipe)["training"]
        assert settings["optimizer"] == "optim.py:make"
        assert not {"lr", "momentum", "weight_decay"} & settings.keys()
        request = replace(wish(recipe), name="standard")
        manifest = harden_manifest(trainable(), [], fakes.data(), request, {}, "")
        configs.append(manifest["config"])
        digests.append(manifest["config"]["functions"])
    assert configs[0] == configs[1]  # the same file at another path
    assert digests[0] != digests[2]
    with pytest.raises(UsageError, match="has no function 'mak' .did you mean 'make'"):
        build_recipe({"use": "standard", "training": {"optimizer": "optim.py:mak"}})
    with pytest.raises(UsageError, match="recipe.training.lr is 0.1, and the optimiser is a function"):
        build_recipe({"use": "standard", "training": {"optimizer": "optim.py:make", "lr": 0.1}})
    with pytest.raises(UsageError, match="optimizer is 'adam'; expected one of adamw, sgd, or a function"):
        build_recipe({"use": "standard", "training": {"optimizer": "adam"}})
