"""The steps of a rotation over a pool, on a problem that a small network learns in a second."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from holdfast.core.draws import Draws
from holdfast.core.errors import Inconclusive, TargetError, UsageError
from holdfast.io.data.loaders import as_data
from holdfast.rotation import Basins, Codec, Seeds, Subset
from holdfast.rotation.collecting import last_of
from holdfast.rotation.pool import Pool
from holdfast.rotation.steps import collect, draw, rotation_request
from holdfast.rotation.steps.rotation_request import split_examples, trained_generator
from holdfast.rotation.steps.serving_set import status
from rotation.problem import THREAT, accuracy, examples, network
from runs import steps
from runs.collected_pool import CODEC, DIFFUSION, IMMUNISE, terms

# --- collect


@pytest.mark.slow
def test_collects_every_run_and_the_surrogates(collected):
    path, found, _ = collected
    held = Pool.open(path)
    assert (found.runs, found.sets, found.epochs, len(found.surrogate_accuracy)) == (
        2,
        8,
        8,
        rotation_request.OWN,
    )
    assert min(found.accuracy + found.surrogate_accuracy) > 0.9
    sets = rotation_request.collected_members(held)
    assert sets.basins.tolist() == [0] * 4 + [1] * 4
    assert len(rotation_request.bases(held)) == 2
    assert {member.state for member in held.ledger.members} == {"base"}, "bases never serve"
    models = rotation_request.surrogates(held, terms())
    weights = [model.net[0].weight for model in models]
    assert all(not torch.equal(one, weights[0]) for one in weights[1:])
    assert accuracy(terms().of_weights(sets.one(5)), terms().held_out) > 0.9
    assert not (path / "begun.sealed").exists(), "the checkpoint of the last training is of no use any more"


@pytest.mark.slow
def test_the_seed_does_not_determine_the_collection(collected, tmp_path, another_secret):
    assert rotation_request.secret(Pool.open(collected[0])).key == 7, (
        "what the operating system gave, in these tests"
    )
    other = steps.create(tmp_path / "pool", terms())
    steps.collect(other, terms())
    one = Pool.open(collected[0])
    assert not set(rotation_request.bases(one)) & set(rotation_request.bases(other))
    same = (
        torch.equal(one.kept("own_0").columns[name], value)
        for name, value in other.kept("own_0").columns.items()
    )
    assert all(same), "surrogates are what anybody may train"


def test_nothing_that_judges_is_trained_on():
    of = terms()
    assert len(of.held_out) == 128 and not set(of.held_out.ids.tolist()) & set(of.train.ids.tolist())
    assert torch.equal(of.held_out.ids, terms().held_out.ids)
    assert not torch.equal(of.held_out.ids, terms(seed=1).held_out.ids)


def test_a_pool_that_starts_from_the_given_model_notes_that_it_may_have_been_trained_on_held_out_examples():
    assert not terms().notes
    assert "may have been trained on the held-out examples" in terms(Subset(("0.",), sets=2)).notes[-1]


def test_a_test_example_is_never_trained_on():
    data, twin = examples(n=640), examples(n=640).take(torch.arange(3))
    parts = split_examples(data, as_data(twin.x, twin.y), "blobs", 4, 0)
    assert not {0, 1, 2} & {*parts.train.ids.tolist(), *parts.held_out.ids.tolist()}
    assert "training examples are also test examples" in parts.notes[0]


def test_no_pool_is_begun_among_other_files(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir(mode=0o755)
    (folder / "x.txt").write_text("hi")
    with pytest.raises(UsageError, match=r"contains 'x\.txt' and is not a pool.*; give run=DIR"):
        steps.create(folder, terms())
    assert folder.stat().st_mode & 0o777 == 0o755 and len(list(folder.iterdir())) == 1


def test_a_pool_is_begun_once(pool):
    with pytest.raises(UsageError, match="contains a pool already; give resume=True"):
        steps.create(pool.path, terms())


@pytest.mark.parametrize(
    "other",
    [terms(seed=1), terms(Basins(seeds=3, sets=4, every=2)), replace(terms(), threat_text="linf:0.2")],
)
def test_a_pool_of_other_terms_does_not_go_on(pool, other):
    with pytest.raises(UsageError, match="was created with another .*( → ).*; use that again"):
        steps.create(pool.path, other, resume=True)


def test_another_model_is_named_with_a_short_digest():
    told = {}
    for name, mean, figure in (("net", None, "1"), ("other", [0.5], "2")):
        known = {
            "name": name,
            "architecture": name,
            "arguments": {},
            "classes": 4,
            "digest": figure,
            "mean": mean,
        }
        told[name] = replace(terms(), subject=replace(terms().subject, digest=64 * figure, card=known))
    pool = SimpleNamespace(path="pool", manifest={"about": told["net"].about()})
    with pytest.raises(UsageError) as error:
        told["other"].refuse_other(pool)
    assert str(error.value) == (
        "'pool' was created with another model (other weights or preprocessing) (111111111111 → 222222222222; "
        "model.mean: none → [0.5]; model.name: net → other); use that again, or create another pool"
    )


def test_a_finished_collection_is_reported_again(pool, collected):
    assert steps.collect(pool, terms()) == collected[1]


def test_a_run_that_diverged_is_refused(tmp_path):
    lost = terms(lr=1e6, epochs=1)
    with pytest.raises(TargetError, match="the loss is not finite"):
        steps.collect(steps.create(tmp_path / "pool", lost), lost)


@pytest.fixture
def set_pace(monkeypatch):
    """A function that sets the seconds of an update and the updates of an epoch, in place of measured ones."""

    def set_pace(update_s, per_epoch):
        monkeypatch.setattr(collect, "pace", lambda *given: collect.Pace(update_s, per_epoch))

    return set_pace


@pytest.mark.slow
def test_a_budget_decides_the_number_of_epochs(tmp_path, set_pace):
    short = terms(Seeds(2))
    heard = []
    pool = steps.create(tmp_path / "pool", short)
    set_pace(0.01, 100)
    found = steps.collect(pool, short, budget_s=50.0, notify=heard.append)
    assert found.epochs == 7  # 6 trainings in 47.5 of the 50 seconds
    assert "the gates need" in heard[0] and "for a budget of 50 s" in heard[1]
    with pytest.raises(
        UsageError, match=r"planned with a budget of 50 s \(7 epochs for each run\), but 60 s were given"
    ):
        steps.collect(pool, short, budget_s=60.0)
    assert steps.collect(pool, short, budget_s=50.0) == found == steps.collect(pool, short)


def test_a_budget_below_one_epoch_is_refused_with_one_that_suffices(tmp_path, set_pace):
    pool = steps.create(tmp_path / "pool", terms())
    set_pace(0.01, 3000)
    with pytest.raises(UsageError, match="6 models must be trained, 4 of them surrogates.*budget='4min'"):
        steps.collect(pool, terms(), budget_s=20.0)


@pytest.mark.slow
def test_of_a_subset_the_rest_stays(tmp_path):
    begun = terms()
    given = last_of(begun.candidate.recipe, network(3), begun.train, THREAT, Draws(0))
    of = terms(Subset(("7.",), sets=3, updates=2), given=given)
    held = steps.create(tmp_path / "pool", of)
    steps.collect(held, of)
    sets = rotation_request.collected_members(held)
    assert sorted(sets.tensors) == ["7.bias", "7.weight"]
    assert len(rotation_request.bases(held)) == 1, "all of them begin at the given model"
    assert torch.equal(of.of_weights(sets.one(0)).net[0].weight, of.model.net[0].weight)


# --- train


def test_learns_a_generator_whose_draws_work(pool, collected):
    learned = collected[2]
    assert learned.sets == 8 and learned.accuracy_lost <= 0.003
    generator = rotation_request.generator_of(pool, terms())
    drawn = generator.drawn(4, Draws(3))
    assert max(accuracy(terms().of_weights(drawn.one(k)), terms().held_out) for k in range(4)) > 0.9
    assert trained_generator(pool) == learned


def test_a_codec_that_loses_too_much_learns_nothing(pool):
    before = pool.kept("generator").digest
    with pytest.raises(
        Inconclusive, match=r"sets lose .* points of accuracy by encoding and decoding.* give dims="
    ):
        steps.train(pool, terms(), Codec(dims=1, hidden=1, steps=1), DIFFUSION)
    assert pool.kept("generator").digest == before


@pytest.mark.slow
def test_a_pool_with_one_member_has_nothing_to_learn(tmp_path):
    alone = terms(Seeds(1))
    held = steps.create(tmp_path / "pool", alone)
    steps.collect(held, alone)
    with pytest.raises(UsageError, match="contains 1 parameter set; at least two are needed"):
        steps.train(held, alone, CODEC, DIFFUSION)


def test_nothing_is_learned_before_all_is_collected(tmp_path):
    held = steps.create(tmp_path / "pool", terms())
    with pytest.raises(UsageError, match="contains 0 of 1 runs; finish the collection first"):
        steps.train(held, terms(), CODEC, DIFFUSION)


# --- draw


def test_draws_candidates_that_name_their_bases(pool):
    found = steps.draw(pool, terms(), 3)
    assert found.by == "generator" and len(set(found.names)) == 3 and found.against == ()
    for name in found.names:
        member = pool.ledger.member(name)
        assert member.state == "candidate" and member.bases == rotation_request.bases(pool)
    assert len({pool.about(name)["drawing"] for name in found.names}) == 1
    assert set(pool.ledger.unlisted) == set(rotation_request.bases(pool))
    assert "neither listed as stolen nor deleted" in status(pool)["notes"][0]


def test_the_place_of_a_draw_comes_from_the_operating_system(pool):
    one, other = (steps.draw(pool, terms(), 1).names for _ in range(2))
    assert one != other


@pytest.mark.slow
def test_immunises_against_what_is_exposed_else_what_serves_else_the_bases(pool):
    def against():
        return steps.draw(pool, terms(), 1, immunise=IMMUNISE).against

    assert against() == rotation_request.bases(pool)
    served = steps.draw(pool, terms(), 1).names[0]
    pool.admit(served)
    pool.swap()
    assert against() == (served,)
    leaked = rotation_request.bases(pool)[1]
    pool.expose(leaked, "laptop stolen")
    assert against() == (leaked,)


def test_sets_are_trained_anew_on_request_or_without_a_generator(pool):
    found = steps.draw(pool, terms(), 1, by="retraining")
    assert found.by == "retraining" and pool.ledger.member(found.names[0]).bases == ()
    assert accuracy(terms().of_set(pool, found.names[0]), terms().held_out) > 0.9
    pool.drop("generator")
    assert steps.draw(pool, terms(), 1).by == "retraining"
    with pytest.raises(UsageError, match="has no generator yet; train one with holdfast rotate train"):
        steps.draw(pool, terms(), 1, by="generator")


@pytest.mark.slow
def test_a_generator_without_accurate_sets_is_inconclusive(pool, set_limit):
    set_limit("holdfast.rotation.steps.draw._POINT", -1.0)
    with pytest.raises(
        Inconclusive, match="none of 64 generated sets reaches an accuracy of .* by='retraining'"
    ):
        steps.draw(pool, terms(), 1)


@pytest.mark.slow
def test_an_interrupted_draw_resumes(pool, monkeypatch):
    whole = draw._Drawing._store
    monkeypatch.setattr(
        draw._Drawing,
        "_store",
        lambda self, *given: 1 / 0 if len(self.about["names"]) == 1 else whole(self, *given),
    )
    with pytest.raises(ZeroDivisionError):
        steps.draw(pool, terms(), 3, immunise=IMMUNISE)
    begun = pool.candidates
    monkeypatch.undo()
    with pytest.raises(UsageError, match="the draw to be resumed immunises its sets; give immunise=True"):
        steps.draw(pool, terms(), 3, resume=True)
    with pytest.raises(
        UsageError, match=r"has other settings .*\(by: generator → retraining\); give the same"
    ):
        steps.draw(pool, terms(), 3, by="retraining", immunise=IMMUNISE, resume=True)
    with pytest.raises(
        UsageError, match=r"\(immunise.share: 0.5 → 0.25\); give the same settings; leave out resume"
    ):
        steps.draw(pool, terms(), immunise=replace(IMMUNISE, share=0.25), resume=True)
    with pytest.raises(UsageError, match=r"\(sets: 3 → 4\)"):
        steps.draw(pool, terms(), 4, immunise=IMMUNISE, resume=True)
    found = steps.draw(pool, terms(), immunise=IMMUNISE, resume=True)
    assert begun == found.names[:1] and len(found.names) == 3
    assert pool.candidates == found.names


def test_a_finished_draw_is_reported_again_and_not_repeated(pool):
    found, entries = steps.draw(pool, terms(), 2), pool.ledger.entries
    heard = []
    assert steps.draw(pool, terms(), resume=True, notify=heard.append) == found
    assert pool.ledger.entries == entries
    assert "so there is nothing to resume; omit --resume to draw more sets" in heard[0]
    with pytest.raises(UsageError, match=r"\(sets: 2 → 3\)"):
        steps.draw(pool, terms(), 3, resume=True)


def test_a_draw_is_resumed_with_its_method(pool):
    steps.draw(pool, terms(), 1, by="retraining")
    stored = pool.kept("drawing")
    asked = {**stored.about["asked"], "sets": 2}
    pool.keep("drawing", stored.columns, {**stored.about, "asked": asked})
    found = steps.draw(pool, terms(), resume=True)
    assert found.by == "retraining" and len(found.names) == 2
    assert pool.ledger.member(found.names[1]).why == "drawn by retraining"
    with pytest.raises(UsageError, match=r"\(by: retraining → generator\)"):
        steps.draw(pool, terms(), by="generator", resume=True)


def test_a_second_process_draws_nothing_and_leaves_what_the_first_has_sealed(pool):
    steps.draw(pool, terms(), 1)
    before = pool.kept("drawing").digest
    with pool.alone_at("draw"), pytest.raises(UsageError, match="another process runs draw in"):
        steps.draw(Pool.open(pool.path), terms(), 2)
    assert pool.kept("drawing").digest == before
    with pool.alone_at("collect"), pytest.raises(UsageError, match="another process runs collect in"):
        steps.collect(Pool.open(pool.path), terms())
    with pool.alone_at("train"), pytest.raises(UsageError, match="another process runs train in"):
        steps.train(Pool.open(pool.path), terms(), CODEC, DIFFUSION)


@pytest.mark.slow
def test_a_generator_of_another_architecture_is_refused(pool):
    kept = pool.kept("generator")
    columns = {
        name: value[:, :4]
        if name.endswith("directions.0.weight")
        else value[:4]
        if name.endswith("mean.0.weight")
        else value
        for name, value in kept.columns.items()
    }
    pool.keep("generator", columns, kept.about)
    with pytest.raises(UsageError, match="the generator is for another architecture; train it again"):
        steps.draw(pool, terms(), 1)


@pytest.mark.slow
def test_a_generator_that_diverged_does_not_replace_an_earlier_one(pool):
    before = pool.kept("generator").digest
    far = replace(DIFFUSION, regulariser="away", weight=1e6, steps=50)
    with pytest.raises(
        Inconclusive,
        match=r"the best of 16 generated sets has an accuracy of .*regulariser is away, weight 1e\+06",
    ):
        steps.train(pool, terms(), CODEC, far)
    assert pool.kept("generator").digest == before


# --- status


def test_status_is_plain_json_without_secrets(pool):
    name = steps.draw(pool, terms(), 1).names[0]
    pool.admit(name)
    now = pool.swap(why="first")
    pool.answered(now.epoch, {"alice": 3, "bob": 5}, 2)
    pool.expose(name, "laptop stolen")
    said = status(pool)
    assert said["serving"] == {"name": name, "epoch": 1, "since": now.since}
    (served,) = [one for one in said["sets"] if one["epochs"]]
    assert served["answers"] == 10 and served["exposed"] == "laptop stolen"
    assert said["terms"][0]["most_to_one"] == 5 and said["terms"][0]["principals"] == 2
    assert "serves and is listed as stolen; swap to another set" in said["notes"][0]
    text = json.dumps(said)
    assert "alice" not in text, "who asked is nobody else's business"


# --- kills


def _collect(path):
    steps.collect(steps.create(path, terms(), resume=path.exists()), terms())


def _learn(path):
    steps.train(Pool.open(path), terms(), CODEC, DIFFUSION)


def _draw(path):
    held = Pool.open(path)
    resume = held.kept("drawing").about["asked"]["sets"] == 6
    steps.draw(held, terms(), 6, immunise=IMMUNISE, resume=resume)


def killed(step, path, after_s):
    """Run a step in a process of its own, and kill it after so long; whether it was still at it."""
    process = multiprocessing.get_context("fork").Process(target=step, args=(path,))
    process.start()
    process.join(after_s)
    alive = process.is_alive()
    os.kill(process.pid, signal.SIGKILL) if alive else None
    process.join()
    return alive


def took_s(step, path):
    begin = time.perf_counter()
    assert not killed(step, path, 600)
    return time.perf_counter() - begin


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be killed")
def test_ten_kills_in_collect_lose_nothing(tmp_path):
    whole_s = (
        took_s(_collect, tmp_path / "undisturbed" / "pool")
        if (tmp_path / "undisturbed").mkdir() is None
        else 0
    )
    path = tmp_path / "pool"
    kills = 0
    for _ in range(10):
        kills += killed(_collect, path, whole_s * 0.12)
    _collect(path)
    assert kills >= 3
    one, other = Pool.open(path), Pool.open(tmp_path / "undisturbed" / "pool")
    assert rotation_request.bases(one) == rotation_request.bases(other), "the same sets, kills or none"
    for name in ("run_0", "run_1", "own_0", "own_3"):
        assert one.kept(name).columns.keys() == other.kept(name).columns.keys()
        for key, value in one.kept(name).columns.items():
            assert torch.equal(value, other.kept(name).columns[key]), (name, key)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be killed")
@pytest.mark.parametrize("step", [_learn, _draw], ids=["train", "draw"])
def test_eight_kills_leave_what_serves_and_go_on(pool, step, tmp_path):
    served = steps.draw(pool, terms(), 1).names[0]
    pool.admit(served)
    now = pool.swap()
    shutil.copytree(pool.path, tmp_path / "undisturbed" / "pool")
    shutil.copy(tmp_path / "pool.key", tmp_path / "undisturbed")
    kills, whole_s = 0, took_s(step, tmp_path / "undisturbed" / "pool")
    for k in range(8):
        kills += killed(step, pool.path, whole_s * k / 8)
        assert Pool.open(pool.path).serving == now
    step(pool.path)
    assert kills >= 3
    again = Pool.open(pool.path)
    assert again.serving == now and rotation_request.generator_of(again, terms()) is not None
    if step is _draw:
        assert len(again.candidates) >= 6
