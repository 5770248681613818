"""`holdfast.rotate`: the steps of a rotation in Python do what those of the command line do."""

import inspect
import json

import numpy as np
import pytest
import torch

import holdfast
from holdfast.cli.app import run as command
from holdfast.core.errors import Inconclusive, TargetError, UsageError
from holdfast.rotation import AnswersPerPrincipal
from holdfast.rotation.pool import Pool
from rotation.problem import examples, network

NET = "from rotation.problem import network\n\n\ndef make():\n    return network()\n"
RECIPE = {"use": "standard", "training": {"epochs": 5, "batch": 32, "lr": 0.01, "averaging": "none"}}
SOURCE = {"use": "basins", "seeds": 2, "sets": 3, "every": 2, "lr": 1e-3}
CODEC, GENERATOR = {"dims": 8, "hidden": 64, "steps": 400}, {"width": 64, "depth": 2, "steps": 200}
TRUSTED = {"trust_code": True, "device": "cpu"}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """The current folder, with a model and data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    train, test = examples(0, 2_000), examples(1, 64)
    np.savez(
        "blobs.npz",
        x_train=train.x.numpy(),
        y_train=train.y.numpy(),
        x_test=test.x.numpy(),
        y_test=test.y.numpy(),
    )
    return tmp_path


def collect(folder, **changes):
    return holdfast.rotate.collect(
        "net.py:make",
        "blobs.npz",
        "linf:0.05",
        SOURCE,
        RECIPE,
        initialisation="own",
        device="cpu",
        run=folder,
        **changes,
    )


def flags(name, values):
    return [
        word for key, value in values.items() if key != "use" for word in ("--set", f"{name}.{key}={value}")
    ]


@pytest.mark.slow
def test_the_steps_in_python_and_on_the_command_line_give_the_same(place, capsys):
    heard = []
    collected = collect("pool", notify=heard.append)
    assert (collected.runs, collected.sets, collected.epochs) == (2, 6, 5)
    assert any("the pool is encrypted" in text for text in heard)
    words = ["--threat", "linf:0.05", "--recipe", "standard", *flags("recipe.training", RECIPE["training"])]
    words += ["--set", "initialisation=own", "--device", "cpu", "--run", "other"]
    assert command(["rotate", "collect", "net.py:make", "blobs.npz", *words, *flags("source", SOURCE)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("6 sets of 2 trainings of 5 epochs; accuracy of the bases: ")
    other = Pool.open(place / "other")
    names = [[member.name for member in pool.ledger.members] for pool in (collected.pool, other)]
    assert names[0] == names[1], "the names are digests of the sets"
    for name in ("plan", "own_0", "own_3"):
        pair = [pool.kept(name) for pool in (collected.pool, other)]
        assert pair[0].about == pair[1].about
        assert all(torch.equal(value, pair[1].columns[key]) for key, value in pair[0].columns.items())
    assert collect("pool", resume=True) == collected

    trained = holdfast.rotate.train(collected.pool, codec=CODEC, generator=GENERATOR, **TRUSTED)
    assert trained.sets == 6 and trained.accuracy_lost <= 0.003
    drawn = holdfast.rotate.draw("pool", sets=2, by="retraining", **TRUSTED)
    assert drawn.by == "retraining" and len(drawn.names) == 2
    again = holdfast.rotate.draw("pool", by="retraining", resume=True, notify=heard.append, **TRUSTED)
    assert again == drawn
    admission = holdfast.rotate.admit("pool", n_judged=200, gates=["clean_accuracy >= 0.5"], **TRUSTED)
    assert admission.admitted and {one.name for one in admission.judged} == {*drawn.names}
    swapped = holdfast.rotate.swap("pool", why="the first")
    assert swapped.epoch == 1 and swapped.name in admission.admitted and not swapped.unjudged
    exposed = holdfast.rotate.expose("pool", swapped.name, why="laptop stolen")
    assert exposed.serving and exposed.unjudged == len(admission.admitted) - 1

    status, head = holdfast.rotate.status("pool"), holdfast.rotate.head("pool")
    assert status["serving"]["name"] == swapped.name and status["head"] == head.digest
    assert status["generator"] == vars(trained)
    capsys.readouterr()
    assert command(["rotate", "status", "pool", "-o", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == status
    assert command(["rotate", "head", "pool"]) == 0
    assert capsys.readouterr().out.strip() == head.digest
    assert head.entries == status["entries"]
    with pytest.raises(TargetError, match="the folder is an older copy, or another pool"):
        holdfast.rotate.status("other", expect_head=head.digest)


@pytest.mark.slow
def test_run_finishes_the_collection_and_ends_when_enough_sets_wait(replace_step):
    seen = []
    collect("pool")

    def fill(self):
        seen.append((self.settings, self.common.seed))
        for name in holdfast.rotate.draw("pool", sets=2, by="retraining", **TRUSTED).names:
            self.pool.admit(name)
        self._serve_first()

    replace_step("RotationLoop.fill", fill)
    rotated = holdfast.rotate.run(
        "pool",
        every=["50q/principal"],
        by="retraining",
        min_waiting=1,
        immunise={"share": 0.25},
        once=True,
        **TRUSTED,
    )
    assert rotated.serving.epoch == 1 and rotated.waiting == 1
    settings = seen[0][0]
    assert settings.keep == 1 and settings.by == "retraining" and settings.immunise.share == 0.25
    assert settings.triggers == (AnswersPerPrincipal(50),)


def test_what_a_pool_cannot_open_again_or_does_not_know_is_refused(place):
    with pytest.raises(UsageError, match=r"model is a Classifier, and a pool stores .*, as in net\.py:make"):
        holdfast.rotate.collect(network(), "blobs.npz", run="pool")
    with pytest.raises(UsageError, match=r"data is a tuple, and a pool stores .*numpy\.savez"):
        holdfast.rotate.collect("net.py:make", (torch.zeros(1), torch.zeros(1)), run="pool")
    with pytest.raises(UsageError, match="there is no source 'basin'"):
        holdfast.rotate.collect("net.py:make", "blobs.npz", source="basin", run="pool")
    with pytest.raises(UsageError, match="resume=True continues a run; give its folder"):
        holdfast.rotate.collect("net.py:make", "blobs.npz", resume=True)
    assert not (place / "pool").exists()
    with pytest.raises(TargetError, match="'nowhere' is not a pool"):
        holdfast.rotate.swap("nowhere")
    with pytest.raises(UsageError, match="pool is an int; give the path of its folder"):
        holdfast.rotate.status(3)
    pool = Pool.create(place / "pool", {})
    with pytest.raises(UsageError, match="contains no address of its model"):
        holdfast.rotate.train(pool)
    with pytest.raises(UsageError, match="sets is 0; expected a number of candidates of at least 1"):
        holdfast.rotate.draw("pool", sets=0)
    with pytest.raises(UsageError, match="by is 'old'; expected generator or retraining"):
        holdfast.rotate.draw("pool", by="old")
    with pytest.raises(UsageError, match="judged"):
        holdfast.rotate.admit("pool", n_judged=0)
    with pytest.raises(UsageError, match="no condition for swaps is given"):
        holdfast.rotate.run("pool")
    with pytest.raises(UsageError, match="the exposure has no reason"):
        holdfast.rotate.expose("pool", "0000", why=" ")
    with pytest.raises(Inconclusive, match="contains no waiting admitted set"):
        holdfast.rotate.swap("pool")


def test_each_step_has_an_explicit_signature():
    for name in holdfast.rotate.__all__:
        parameters = inspect.signature(getattr(holdfast.rotate, name)).parameters.values()
        kinds = {parameter.kind for parameter in parameters}
        assert not kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
