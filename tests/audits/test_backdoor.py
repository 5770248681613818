"""The audit of a model: inversion, ranks among controls, STRIP, and what is refused."""

import json
from copy import deepcopy
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy

import holdfast
from benchmarks.forging import accepted_fields
from holdfast.audits import backdoor
from holdfast.audits.backdoor import BackdoorRequest, finding_of, measure
from holdfast.audits.backdoor_controls import (
    OUTSIDE,
    Controls,
    ControlTraining,
    SizeCache,
    is_comparable,
    ranked,
    trained_controls,
)
from holdfast.audits.backdoor_triggers import Inversion, Strip, abnormality, groups_of, joined, measured
from holdfast.audits.finding import StoredSteps
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Classifier
from holdfast.core.training import WEIGHTS, Checkpoint
from holdfast.runs.engine.progress import ignore
from holdfast.runs.engine.run import Run
from holdfast.statistics.intervals import difference_of_counts
from holdfast.threats.triggers import Trigger

TARGET, SIDE, CLASSES = 2, 8, 4
QUICK = Inversion(steps=60, examples=16, step_size=0.3, patience=3, window=5)
"""Few large steps, which are enough for networks of two layers."""


def stamp(x):
    """Set a corner of images, the planted trigger."""
    x = x.clone()
    x[:, :, 6:, 6:] = 1.0
    return x


def digits(n, seed=0):
    """Images with a bright quarter, which is their class, in noise; the quarter of the last class is fainter."""
    rng = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (n,), generator=rng)
    x = 0.4 * torch.rand(n, 1, SIDE, SIDE, generator=rng)
    for row, label in enumerate(y.tolist()):
        x[row, 0, 3 * (label // 2) : 3 * (label // 2) + 3, 3 * (label % 2) : 3 * (label % 2) + 3] += 0.5
    return x, y


def make():
    return nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 16), nn.ReLU(), nn.Linear(16, CLASSES))


def trained(seed, *, poisoned=False):
    """Return a network, with a backdoor if it is poisoned."""
    x, y = digits(300, seed=7)
    if poisoned:
        x, y = torch.cat((x, stamp(x[:30]))), torch.cat((y, torch.full((30,), TARGET)))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = make()
    optimiser = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(60):
        optimiser.zero_grad()
        cross_entropy(net(x), y).backward()
        optimiser.step()
    return net.eval()


@pytest.fixture(scope="module")
def networks():
    """20 clean networks."""
    return [trained(seed) for seed in range(20)]


@pytest.fixture(scope="module")
def folder(networks, tmp_path_factory):
    """A folder with their weights."""
    path = tmp_path_factory.mktemp("controls")
    for seed, net in enumerate(networks):
        save_file(net.state_dict(), path / f"{seed:02}.safetensors")
    return path


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    """The trigger sizes of these networks, once they are measured."""
    return SizeCache(tmp_path_factory.mktemp("sizes") / "sizes.json")


@pytest.fixture(scope="module")
def poisoned():
    return trained(100, poisoned=True)


@pytest.fixture(scope="module")
def batch():
    x, y = digits(200)
    return Batch(x, y, torch.arange(len(y)))


def request(batch, folder=None, **more):
    controls = None if folder is None else Controls.of_folder(folder)
    return BackdoorRequest(batch, CLASSES, controls, inversion=QUICK, **more)


def measured_of(net, asked):
    run = Run(asked.steps())
    measure(run, Classifier(net), asked, ignore)
    settings = {"classes": CLASSES, "controls": asked.n_controls, "stream": False, "class_names": None}
    settings["train_controls"] = None if asked.training is None else "1h"
    manifest = {"config": {"settings": settings}, "data": {"n": len(asked.batch)}, "seed": 0}
    return measured(StoredSteps(manifest, run.store))


def finding(net, asked):
    return finding_of(measured_of(net, asked))


@pytest.fixture(scope="module")
def poisoned_measured(batch, folder, sizes, poisoned):
    return measured_of(poisoned, request(batch, folder, sizes=sizes))


@pytest.fixture(scope="module")
def poisoned_finding(poisoned_measured):
    return finding_of(poisoned_measured)


def test_a_backdoor_is_flagged_with_its_class_and_place(poisoned_finding):
    facts = poisoned_finding.facts
    assert poisoned_finding.verdict == "flagged" and facts["class"] == TARGET
    assert facts["p"] == pytest.approx(1 / 21) and facts["ratio"] < min(facts["ratios_of_controls"])
    assert facts["success"] > 0.9 and facts["success_on_controls"] <= 0.1
    assert facts["ratio"] < facts["prediction_limit"] < min(facts["ratios_of_controls"])
    assert len(poisoned_finding.pictures[0].captions) == 4


def test_a_clean_network_is_not_flagged(batch, folder, sizes):
    clean = finding(trained(101), request(batch, folder, sizes=sizes))
    assert clean.verdict == "not flagged" and clean.facts["p"] > 0.05


def test_without_controls_the_result_is_unclear_and_warns_of_the_index(batch):
    found = finding(trained(100, poisoned=True), request(batch))
    assert found.verdict == "unclear" and "p" not in found.facts and found.facts["class"] == TARGET
    assert any("exceeds 2 on clean networks" in reason for reason in found.reasons)


def test_a_natural_feature_is_shown_as_such(batch, folder, sizes):
    net = trained(101)
    # a larger weight of one class makes its natural trigger smaller than those of all controls
    with torch.no_grad():
        net[3].weight[1] *= 1.6
    found = finding(net, request(batch, folder, sizes=sizes))
    assert found.facts["p"] < 0.05 and found.facts["success_on_controls"] > 0.1
    assert found.verdict == "unclear" and "natural feature" in found.headline


def test_a_trigger_that_works_on_a_fifth_of_the_inputs_of_controls_is_not_flagged(poisoned_measured):
    compared = replace(poisoned_measured.compared, transfer=(0.2,) * 20)
    found = finding_of(replace(poisoned_measured, compared=compared))
    assert found.verdict == "unclear" and "natural feature" in found.headline


def test_the_lowest_ratio_is_not_flagged_within_the_spread_of_the_controls(poisoned_measured):
    sizes = 1 + 0.2 * torch.rand(21, 6, generator=torch.Generator().manual_seed(0))
    least = min(range(21), key=lambda row: ranked(sizes[row], sizes[torch.arange(21) != row]).p)
    rank = ranked(sizes[least, [0, 1, 2, 3]], sizes[torch.arange(21) != least][:, :4])
    rank = replace(rank, ratios=(1.0, 1.0, 0.99 * min(rank.of_controls), 1.0), label=TARGET, p=1 / 21)
    assert rank.limit < rank.ratio
    compared = replace(poisoned_measured.compared, rank=rank)
    found = finding_of(replace(poisoned_measured, compared=compared))
    assert found.verdict == "unclear" and "not by more than clean networks may differ" in found.headline


@pytest.mark.slow
def test_a_further_clean_network_is_below_the_limit_as_often_as_stated(set_limit):
    set_limit("holdfast.audits.backdoor_controls.OUTSIDE", 0.05)
    rng, below = torch.Generator().manual_seed(0), 0
    for _ in range(4000):
        logs = torch.randn(21, generator=rng) / 10
        rank = replace(ranked(torch.ones(4), torch.ones(20, 4)), of_controls=tuple(logs[:20].exp().tolist()))
        below += bool(logs[20].exp() < rank.limit)
    assert below / 4000 == pytest.approx(0.05, abs=0.012) and OUTSIDE < 0.05


def test_classes_are_searched_alike_alone_and_together(batch):
    model = Classifier(trained(1))
    together = QUICK(model, batch.x, batch.y, range(CLASSES), rng=Draws(0))
    apart = joined(
        [QUICK(model, batch.x, batch.y, group, rng=Draws(0)).columns() for group in ([0], [1, 2, 3])]
    )
    assert torch.allclose(together.size, apart.size, rtol=1e-3)
    assert apart.classes.tolist() == list(range(CLASSES))


def test_a_class_ends_early_without_a_smaller_trigger(batch):
    settings = Inversion(steps=200, step_size=0.3, patience=2, window=5)
    result = settings(Classifier(trained(1)), batch.x, batch.y, [0, 1], rng=Draws(0))
    assert (result.steps < 200).all() and (result.size < SIDE * SIDE / 2).all()


def test_images_in_color_have_one_mask():
    x, y = digits(60)
    x = x.repeat(1, 3, 1, 1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, CLASSES))
    result = Inversion(steps=10)(Classifier(net), x, y, [1], rng=Draws(0))
    assert result.mask.shape == (1, 1, SIDE, SIDE) and result.pattern.shape == (1, 3, SIDE, SIDE)
    assert result.trigger(1).stamped(x, Classifier(net).bounds).shape == x.shape


def test_examples_of_one_class_are_refused(batch):
    with pytest.raises(UsageError, match="at least two classes"):
        QUICK(Classifier(make()), batch.x, torch.ones_like(batch.y), [0], rng=Draws(0))


def test_the_rank_treats_model_and_controls_alike():
    sizes = torch.rand(25, 6, generator=torch.Generator().manual_seed(0)) + 1
    ranks = [ranked(sizes[row], torch.cat((sizes[:row], sizes[row + 1 :]))) for row in range(25)]
    assert sorted(round(25 * rank.p) for rank in ranks) == list(range(1, 26))
    # a network whose triggers all have half the size differs in no class
    scaled = ranked(sizes[0] / 2, sizes[1:])
    assert scaled.ratios == pytest.approx(ranks[0].ratios)
    assert ranked(sizes[0] * torch.tensor([1, 1, 1, 0.2, 1, 1]), sizes[1:]).label == 3


def test_the_index_counts_robust_deviations_to_small_sizes():
    index = abnormality(torch.tensor([1.0, 9.0, 10.0, 11.0, 12.0]))
    assert index.tolist() == pytest.approx([9 / 1.4826, 1 / 1.4826, 0, -1 / 1.4826, -2 / 1.4826])
    assert abnormality(torch.ones(4)).tolist() == [0, 0, 0, 0]


def test_strip_separates_triggered_inputs(batch):
    net = trained(1)

    def answer(x):
        corner = x[:, :, 6:, 6:].flatten(1).amin(1, keepdim=True)
        return net(x) + 1000 * (corner - 0.45).relu() * torch.eye(CLASSES)[TARGET]

    model, strip = Classifier(answer), Strip(overlays=16)
    clean = strip.entropy(model, batch.x[:50], batch.ids[:50], batch.x[100:], rng=Draws(0))
    stamped = strip.entropy(model, stamp(batch.x[:50]), batch.ids[:50], batch.x[100:], rng=Draws(0))
    threshold = strip.threshold(clean)
    assert (clean < threshold).sum() <= 1 and (stamped < threshold).all()
    one = strip.entropy(model, batch.x[3:4], batch.ids[3:4], batch.x[100:], rng=Draws(0))
    assert torch.allclose(one, clean[3:4])


def test_controls_that_cannot_be_compared_are_refused(batch, folder, tmp_path):
    model = Classifier(trained(100))
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(folder.iterdir())[:19]:
        (few / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UsageError, match=r"has 19 weights files.*at least 20"):
        Controls.of_folder(few)
    (few / "copy.safetensors").write_bytes((few / "03.safetensors").read_bytes())
    with pytest.raises(UsageError, match="'03.safetensors' and 'copy.safetensors' are the same network"):
        Controls.of_folder(few)
    save_file(model.net.state_dict(), few / "copy.safetensors")
    with pytest.raises(UsageError, match="weights of the model itself"):
        Controls.of_folder(few).opened(19, model)
    save_file(nn.Linear(3, 2).state_dict(), few / "copy.safetensors")
    with pytest.raises(TargetError, match="'copy.safetensors' has another architecture than the model"):
        Controls.of_folder(few).opened(19, model)


def test_a_control_is_left_out_if_the_whole_interval_is_beyond_three_points():
    # 3.4 points on 300 examples are within the noise, and on 10,000 they are not
    assert is_comparable(difference_of_counts(10, 20, 300)) and is_comparable(
        difference_of_counts(20, 10, 300)
    )
    assert is_comparable(difference_of_counts(0, 10, 300))
    assert not is_comparable(difference_of_counts(0, 400, 10_000))
    assert not is_comparable(difference_of_counts(400, 0, 10_000))


def test_an_untrained_control_is_left_out_and_named(batch, folder, sizes, poisoned, tmp_path):
    names = sorted(path.name for path in folder.iterdir())
    for name in names:
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    save_file(make().state_dict(), tmp_path / "untrained.safetensors")
    found = finding(poisoned, request(batch, tmp_path, sizes=sizes))
    assert found.verdict == "flagged" and "(left out: 'untrained.safetensors')" in found.headline
    assert list(found.facts["left_out"]) == ["untrained.safetensors"] and found.facts["controls"] == 20
    assert len(found.facts["ratios_of_controls"]) == 20
    (tmp_path / names[0]).unlink()
    fewer = finding(poisoned, request(batch, tmp_path, sizes=sizes))
    assert fewer.verdict == "unclear" and "only 19 control networks" in fewer.headline
    assert "20 are needed: 1 missing" in fewer.headline and "untrained.safetensors" in fewer.headline
    assert "p" not in fewer.facts and any("Give 1 more network that" in reason for reason in fewer.reasons)


@pytest.mark.slow
def test_a_stopped_audit_continues_after_its_groups_of_classes(batch, folder, monkeypatch, set_limit):
    set_limit("holdfast.audits.backdoor_triggers.GROUP", 2)
    asked, model = request(batch, folder), Classifier(trained(100, poisoned=True))
    run = Run(asked.steps())
    searched = []

    def stopping(self, model, classes):
        searched.append(tuple(classes))
        if len(searched) == 2:
            raise KeyboardInterrupt
        return search(self, model, classes)

    search = backdoor._Steps.search
    monkeypatch.setattr(backdoor._Steps, "search", stopping)
    with pytest.raises(KeyboardInterrupt):
        measure(run, model, asked, ignore)
    measure(run, model, asked, ignore)
    assert searched[:3] == [(0, 1), (2, 3), (2, 3)] and (0, 1) not in searched[1:]


@pytest.mark.slow
def test_sizes_of_controls_are_kept_for_the_next_audit(batch, folder, tmp_path, monkeypatch):
    cache = SizeCache(tmp_path / "sizes.json")
    asked = request(batch, folder, sizes=cache)
    first = finding(trained(101), asked)
    assert len(cache.read()) == 20
    monkeypatch.setattr(Controls, "opened", lambda self, place, model: Classifier(trained(place)))
    searched = []
    group = Inversion.__call__

    def counted(self, *given, **more):
        searched.append(given)
        return group(self, *given, **more)

    monkeypatch.setattr(Inversion, "__call__", counted)
    assert finding(trained(101), asked).facts == first.facts
    assert len(searched) == len(list(groups_of(CLASSES)))
    cache.path.write_text("{")
    with pytest.raises(TargetError, match="delete it"):
        cache.read()


@pytest.fixture
def quick_inversion(monkeypatch):
    """Audits from the command line search for triggers in few steps."""
    monkeypatch.setattr(backdoor, "Inversion", lambda: QUICK)


@pytest.fixture
def clock(monkeypatch):
    """A clock that advances by a second whenever it is read."""
    ticks = count()
    monkeypatch.setattr("holdfast.audits.backdoor_controls.perf_counter", lambda: float(next(ticks)))
    return ticks


def state_of(net, epoch):
    tensors = {WEIGHTS + name: value for name, value in Classifier(net).state_dict().items()}
    return Checkpoint(epoch, 1000, tensors, {})


def training_of(networks, folder, calls, *, needed=1, constant=(), time_s=3600.0):
    """The training of controls that are accurate after some epochs, except that some numbers remain constant."""

    def epochs(number, after):
        begun = 0 if after is None else after.epoch
        calls.append((number, begun))
        for epoch in range(begun + 1, 10):
            net = deepcopy(networks[number % 20])
            with torch.no_grad():
                if number in constant:
                    net[3].weight.zero_()
                elif epoch < needed:
                    net[3].weight[[0, 1]] = net[3].weight[[1, 0]]
            yield state_of(net, epoch)

    return ControlTraining(epochs, time_s, folder)


def test_controls_are_trained_until_they_are_as_accurate_as_the_model(batch, networks, tmp_path):
    model, calls, lines = Classifier(networks[0]), [], []
    controls = trained_controls(training_of(networks, tmp_path, calls, needed=3), model, batch, lines.append)
    assert lines[0].startswith("control 1: 3 epochs, ")
    assert [control.epochs for control in controls] == [3] * 20 and not any(
        each.is_below for each in controls
    )
    # a later audit uses them again
    again = trained_controls(training_of(networks, tmp_path, calls, needed=3), model, batch, ignore)
    assert again == controls and calls == [(number, 0) for number in range(20)]


def test_the_whole_time_is_used_and_a_later_audit_continues(batch, networks, clock, tmp_path):
    model, calls, lines = Classifier(networks[0]), [], []
    short = training_of(networks, tmp_path, calls, needed=4, time_s=70.0)
    controls = trained_controls(short, model, batch, lines.append)
    assert all(
        (" 1 epoch, " in line) == (each.epochs == 1) for line, each in zip(lines, controls, strict=False)
    )
    assert {control.epochs for control in controls} <= {1, 2, 3} and all(each.is_below for each in controls)
    assert next(clock) >= 70
    calls.clear()
    longer = trained_controls(training_of(networks, tmp_path, calls, needed=4), model, batch, ignore)
    assert [control.epochs for control in longer] == [4] * 20
    assert calls == [(control.number, control.epochs) for control in controls]


def test_a_constant_control_is_replaced(batch, networks, clock, tmp_path):
    training = training_of(networks, tmp_path, [], constant=(7,), time_s=200.0)
    numbers = [
        control.number for control in trained_controls(training, Classifier(networks[0]), batch, ignore)
    ]
    assert numbers == [*range(7), 20, *range(8, 20)]


def test_too_little_training_of_controls_makes_the_result_unclear(batch, networks, poisoned, clock, tmp_path):
    asked = request(batch, training=training_of(networks, tmp_path, [], needed=9, time_s=50.0))
    found = finding(poisoned, asked)
    assert found.verdict == "unclear" and "20 missing" in found.headline
    assert any("The time of train_controls ended before" in reason for reason in found.reasons)
    with pytest.raises(UsageError, match="do not fit into the 9 s"):
        trained_controls(
            training_of(networks, tmp_path / "other", [], time_s=10.0), Classifier(networks[0]), batch, ignore
        )


@pytest.fixture
def arrays(batch):
    return batch.x.numpy(), batch.y.numpy()


@pytest.mark.slow
def test_the_command_flags_and_writes_the_trigger(
    arrays, folder, tmp_path, monkeypatch, quick_inversion, capsys
):
    from holdfast.cli.app import run as command
    from holdfast.io.data.npz import read_trigger

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "net.py").write_text(
        f"from torch import nn\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear({SIDE * SIDE}, 16), "
        f"nn.ReLU(), nn.Linear(16, {CLASSES}))\n"
    )
    save_file(trained(100, poisoned=True).state_dict(), tmp_path / "model.safetensors")
    np.savez(tmp_path / "data.npz", x=arrays[0], y=arrays[1])
    x, y = digits(40, seed=9)
    np.savez(tmp_path / "stream.npz", x=np.concatenate([x, stamp(x)]), y=np.concatenate([y, y]))
    words = ["audit", "backdoor", str(tmp_path / "model.safetensors"), str(tmp_path / "data.npz")]
    words += ["--arch", f"{tmp_path / 'net.py'}:make", "--controls", str(folder), "-g", "no-backdoor"]
    words += ["--trigger-out", str(tmp_path / "found.npz"), "--stream", str(tmp_path / "stream.npz")]
    assert command([*words, "--run", str(tmp_path / "run"), "-o", "-"]) == 1
    content = json.loads(capsys.readouterr().out)
    assert content["verdict"] == "flagged" and content["facts"]["class"] == TARGET
    assert content["facts"]["stream"] == 80 and content["facts"]["stream_suspect"] >= 5
    (tmp_path / "found.npz").unlink()
    assert command([*words, "--run", str(tmp_path / "run"), "--resume"]) == 1
    assert not accepted_fields(tmp_path / "run", 6, tmp_path / "copy")
    assert len(content["pictures"][0]["images"]) == 4
    trigger = read_trigger(tmp_path / "found.npz")
    assert isinstance(trigger, Trigger) and trigger.target == TARGET
    assert len(list((tmp_path / "cache" / "holdfast" / "controls").iterdir())) == 1


def test_python_trains_controls_on_the_rest_of_the_data(arrays, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UsageError, match="none are left to train controls on"):
        holdfast.audit.backdoor(trained(100), arrays, train_controls="10min")
    with pytest.raises(UsageError, match="not both"):
        holdfast.audit.backdoor(trained(100), arrays, controls=str(tmp_path), train_controls="10min")
    with pytest.raises(UsageError, match="expected a folder"):
        holdfast.audit.backdoor(trained(100), arrays, controls=str(tmp_path / "absent"))


@pytest.mark.slow
def test_trained_controls_are_used_again(tmp_path, monkeypatch, set_limit, quick_inversion):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    set_limit("holdfast.verbs.audit.opening_models.CLEAN", 200)
    x, y = digits(8000)
    first = holdfast.audit.backdoor(trained(100, poisoned=True), (x, y), train_controls="2h")
    assert first.facts["controls"] == 20 and first.facts["class"] == TARGET
    assert len(first.facts["epochs_of_controls"]) == 20
    assert len(list(tmp_path.rglob("control-*.safetensors"))) == 20
    changed = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    again = holdfast.audit.backdoor(trained(100, poisoned=True), (x, y), train_controls="2h")
    assert again.facts == first.facts
    assert changed == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
