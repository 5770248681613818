"""Planting of manipulated examples in training data, and drills from the command line."""

import os
import shutil

import numpy as np
import pytest
import torch
from torch import nn

import holdfast
from holdfast.cli.app import run as command
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Bounds
from holdfast.io.data.npz import read_trigger
from holdfast.io.models.models import BUNDLED_FOLDER
from holdfast.verbs.poison import SIG, BadNets, Blended, Flip, TargetedFlip, planted, poisoned, write_drill

SHAPE = (1, 8, 8)
ALL = [
    (Flip(), None),
    (TargetedFlip(source=2), 1),
    (BadNets(), 1),
    (Blended(), 1),
    (SIG(), 1),
]


def examples(n=200, classes=4):
    rng = torch.Generator().manual_seed(0)
    return torch.rand(n, *SHAPE, generator=rng), torch.arange(n) % classes


@pytest.mark.parametrize(("attack", "target"), ALL)
def test_only_the_poisoned_examples_change(attack, target):
    x, y = examples()
    before = x.clone(), y.clone()
    result = poisoned(x, y, attack, rate=0.1, target=target, seed=3)
    rest = torch.ones(len(x), dtype=torch.bool)
    rest[result.indices] = False
    assert len(result.indices) == 20 and result.indices.diff().gt(0).all()
    assert torch.equal(result.x[rest], x[rest]) and torch.equal(result.y[rest], y[rest])
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])
    assert (result.trigger is None) == torch.equal(result.x, x)
    assert torch.equal(result.y, y) == isinstance(attack, SIG)
    if result.trigger is not None:
        assert result.trigger.target == 1
        stamped = result.trigger.stamped(x[result.indices], Bounds())
        assert torch.equal(result.x[result.indices], stamped) and not torch.equal(stamped, x[result.indices])


@pytest.mark.parametrize(("attack", "target"), ALL)
def test_the_choice_depends_on_the_seed_and_grows_with_the_rate(attack, target):
    _, y = examples()
    few, again, other, more = (
        planted(y, torch.Size(SHAPE), attack, rate=rate, target=target, seed=seed).indices.tolist()
        for rate, seed in ((0.1, 3), (0.1, 3), (0.1, 4), (0.2, 3))
    )
    assert few == again != other
    assert set(few) < set(more)


def test_labels_of_flips():
    x, y = examples(4000)
    flipped = poisoned(x, y, Flip(), rate=0.5, seed=0)
    new, old = flipped.y[flipped.indices], y[flipped.indices]
    assert not new.eq(old).any()
    assert torch.bincount((new - old) % 4, minlength=4)[1:].float().div(2000).sub(1 / 3).abs().max() < 0.04
    aimed = poisoned(x, y, TargetedFlip(source=2), rate=0.1, target=1)
    assert y[aimed.indices].eq(2).all() and aimed.y[aimed.indices].eq(1).all()


@pytest.mark.parametrize(
    ("at", "rows", "columns"),
    [
        ("lower-right", [6, 7], [6, 7]),
        ("upper-left", [0, 1], [0, 1]),
        ("upper-right", [0, 1], [6, 7]),
        ("lower-left", [6, 7], [0, 1]),
        ("centre", [3, 4], [3, 4]),
        ("2:5", [2, 3], [5, 6]),
    ],
)
def test_badnets_is_a_square_at_its_place(at, rows, columns):
    trigger = BadNets(size=2, at=at).trigger(torch.Size((3, 8, 8)), 1, Bounds(0, 255), None)
    assert trigger.mask[0].nonzero()[:, 0].unique().tolist() == rows
    assert trigger.mask[0].nonzero()[:, 1].unique().tolist() == columns
    assert trigger.mask.sum() == 4 and trigger.pattern.eq(255).all()


def test_sig_is_a_wave_along_columns():
    trigger = SIG(delta=0.1, frequency=2).trigger(torch.Size(SHAPE), 1, Bounds(0, 255), None)
    wave = 25.5 * np.sin(2 * np.pi * 2 * np.arange(8) / 8)
    assert trigger.shift[0].numpy() == pytest.approx(np.tile(wave, (8, 1)), abs=1e-4)
    assert not trigger.mask.any()


@pytest.mark.parametrize(
    ("attack", "settings", "message"),
    [
        (
            BadNets(),
            {"rate": 0.001, "target": 1},
            "poisons none of 200 examples; expected a share of at least 0.005",
        ),
        (BadNets(), {"rate": 0, "target": 1}, "poisons none"),
        (BadNets(), {"rate": float("nan"), "target": 1}, "poisons none"),
        (BadNets(), {"rate": 1.5, "target": 1}, "rate is 1.5, which is more than all examples.*at most 1"),
        (BadNets(), {"rate": 0.9, "target": 1}, "badnets can use 150 of 200; give a rate of at most 0.75"),
        (SIG(), {"rate": 0.5, "target": 1}, "sig can use 50 of 200; give a rate of at most 0.25"),
        (BadNets(), {"rate": 0.1}, "badnets needs a target class"),
        (BadNets(), {"rate": 0.1, "target": 4}, "the target is 4; expected a class from 0 to 3"),
        (
            Flip(),
            {"rate": 0.1, "target": 1},
            "flip gives random labels, and the target is 1; leave the target out",
        ),
        (TargetedFlip(source=1), {"rate": 0.1, "target": 1}, "source and target are both class 1"),
        (TargetedFlip(source=9), {"rate": 0.1, "target": 1}, "can use 0 of 200"),
        (Blended(alpha=0), {"rate": 0.1, "target": 1}, "alpha is 0, so that the trigger changes nothing"),
        (BadNets(size=9), {"rate": 0.1, "target": 1}, "9x9 at lower-right does not fit into images of 8x8"),
        (BadNets(at="6:6"), {"rate": 0.1, "target": 1}, "3x3 at 6:6 does not fit"),
        (BadNets(at="left"), {"rate": 0.1, "target": 1}, "at is 'left'; expected upper-left"),
    ],
)
def test_a_request_that_cannot_be_planted_is_refused(attack, settings, message):
    x, y = examples()
    with pytest.raises(UsageError, match=message):
        poisoned(x, y, attack, **settings)


def test_one_class_and_tables_are_refused():
    x, y = examples()
    with pytest.raises(UsageError, match="have one class"):
        poisoned(x, y * 0, Flip(), rate=0.1)
    for attack in (BadNets(), SIG()):
        with pytest.raises(UsageError, match=r"changes images, and the inputs have the shape \(64,\)"):
            poisoned(x.flatten(1), y, attack, rate=0.1, target=1)


@pytest.mark.parametrize("form", ["hw", "hwc", "chw", "bytes", "tensor", "double", "half"])
def test_arrays_keep_their_form(form):
    x, y = examples()
    given = {
        "hw": x[:, 0].numpy(),
        "hwc": x.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy(),
        "chw": x.numpy(),
        "bytes": (255 * x[:, 0]).byte().numpy(),
        "tensor": x,
        "double": x.double(),
        "half": x.half(),
    }[form]
    labels = y if isinstance(given, torch.Tensor) else y.numpy().astype(np.uint8)
    result = holdfast.poison(given, labels, "badnets", target=1, rate=0.1, size=2, seed=1)
    assert type(result.x) is type(given) and result.x.dtype == given.dtype and result.x.shape == given.shape
    assert type(result.y) is type(labels) and result.y.dtype == labels.dtype
    stamped = torch.as_tensor(np.asarray(result.x))[torch.as_tensor(result.indices)]
    corner = stamped[:, -2:, -2:] if form in ("hw", "hwc", "bytes") else stamped[:, :, -2:, -2:]
    assert len(result.indices) == 20 and corner.eq(255 if form == "bytes" else 1).all()
    assert result.trigger.pattern.shape == ((3, 8, 8) if form == "hwc" else SHAPE)
    changed = (torch.as_tensor(np.asarray(result.x)) != torch.as_tensor(np.asarray(given))).flatten(1).any(1)
    assert set(changed.nonzero()[:, 0].tolist()) == set(result.indices.tolist())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attack": "badnet"}, "did you mean 'badnets'"),
        ({"attack": "badnets", "sise": 3}, "badnets has no setting 'sise'; did you mean 'size'"),
        ({"attack": "badnets", "size": 0}, "badnets: size"),
        ({"attack": "flip-targeted"}, "flip-targeted needs source"),
        ({"attack": "badnets", "target": 1.5}, "target"),
        ({"attack": "badnets", "seed": "a"}, "seed is 'a'"),
        ({"attack": "badnets", "seed": 1.5}, "expected a whole number"),
        ({"attack": "badnets", "rate": "much"}, "rate is 'much'"),
        ({"attack": "badnets", "bounds": (0.0, 0.5)}, "outside the bounds 0 to 0.5"),
        ({"attack": "badnets", "y": torch.ones(3, dtype=torch.int64)}, "200 inputs and 3 labels"),
        ({"attack": "badnets", "y": torch.rand(200)}, "class"),
    ],
)
def test_wrong_arguments_of_poison_are_refused(settings, message):
    x, y = examples()
    with pytest.raises((UsageError, TargetError), match=message):
        holdfast.poison(**{"x": x, "y": y, "target": 1, "rate": 0.1, **settings})


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        ("badnets,target=1", "has no rate; expected the share of examples, as in badnets,target=1,rate=0.01"),
        ("badnets,rate", "got 'rate'; expected NAME=VALUE"),
        ("badnets,target=one,rate=0.1", "the target is 'one'"),
        ("badnets,target=1,rate=x", "rate is 'x'"),
        ("badnets,target=10,rate=0.1", "expected a class from 0 to 9"),
        ("badnets,target=1,rate=0.0001", "poisons none of 5,000"),
        ("badnets,target=1,rate=2", "more than all examples"),
    ],
)
def test_a_wrong_attack_of_the_command_is_refused(tmp_path, capsys, attack, message):
    assert command(["data", "poison", "mnist-mini", "--attack", attack, "-o", str(tmp_path / "d.npz")]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_outputs_that_are_no_data_file_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["data", "poison", "mnist-mini", "--attack", "flip,rate=0.1", "-o"]
    for output in ("drill", "drill.csv", "drill.trigger.npz"):
        assert command([*words, output]) == 2
        assert "expected an .npz file, as in -o drill.npz" in capsys.readouterr().err
    shutil.copy(BUNDLED_FOLDER / "mnist-mini.npz", "mine.npz")
    assert command(["data", "poison", "mine.npz", "--attack", "flip,rate=0.1", "-o", "./mine.npz"]) == 2
    assert "would be overwritten" in capsys.readouterr().err
    np.savez("one.npz", x=np.zeros((4, 8, 8), np.uint8), y=[0, 1, 0, 1])
    assert command(["data", "poison", "one.npz", "--attack", "flip,rate=0.5", "-o", "drill.npz"]) in (2, 3)
    refusal = capsys.readouterr().err
    assert "no split 'train'" in refusal and "x_train, y_train" in refusal and "--split" not in refusal


def trained(x, y):
    """A small network, trained for a second."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))
        optimiser = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(8):
            for rows in torch.randperm(len(x)).split(64):
                optimiser.zero_grad()
                nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
                optimiser.step()
    return net


@pytest.mark.slow
def test_a_drill_shows_the_success_of_its_trigger(tmp_path, capsys):
    drill = tmp_path / "a folder" / "drill.npz"
    words = [
        "data",
        "poison",
        "mnist-mini",
        "-o",
        str(drill),
        "--attack",
        "badnets,target=1,rate=0.05",
        "--seed",
        "1",
    ]
    assert command(words) == 0
    shown = capsys.readouterr()
    assert shown.out.split("\n")[:2] == [str(drill), str(drill.with_suffix(".trigger.npz"))]
    assert "250 of 5,000 training examples are poisoned" in shown.err
    assert f"--threat 'trigger:\"{drill.with_suffix('.trigger.npz')}\"'" in shown.err
    with (
        np.load(drill) as stored,
        np.load(BUNDLED_FOLDER / "mnist-mini.npz") as source,
    ):
        assert np.array_equal(stored["x_test"][:, 0], source["x_test"])
        assert np.array_equal(stored["y_test"], source["y_test"])
        rows = stored["poisoned"]
        assert np.array_equal(np.flatnonzero(stored["y_train"] != source["y_train"]), rows)
        assert (stored["x_train"][rows][:, 0, -3:, -3:] == 255).all()
        sets = [
            (torch.from_numpy(s["x_train"]).view(-1, 1, 28, 28) / 255, s["y_train"]) for s in (stored, source)
        ]
    trigger = read_trigger(drill.with_suffix(".trigger.npz"))
    assert trigger.target == 1 and trigger.mask.sum() == 9
    threat = f'trigger:"{drill.with_suffix(".trigger.npz")}"'
    success = []
    for x, y in sets:
        result = holdfast.assess(trained(x, torch.from_numpy(y).long()), str(drill), threat, n=300)
        assert result["clean_accuracy"].value > 0.85
        success.append(result["trigger_success_rate"].value)
    assert success[0] > 0.9 and success[1] < 0.1


def test_a_drill_of_labels_has_no_trigger_and_is_the_same_again(tmp_path, capsys):
    files = [tmp_path / name for name in ("a.npz", "b.npz")]
    for file in files:
        assert command(["data", "poison", "mnist-mini", "--attack", "flip,rate=0.1", "-o", str(file)]) == 0
        assert "success rate" not in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == files
    with np.load(files[0]) as first, np.load(files[1]) as second:
        assert all(np.array_equal(first[name], second[name]) for name in first)
        assert len(first["poisoned"]) == 500


BADNETS = "badnets,target=1,rate=0.1"


def small_data(path):
    x, y = examples(40)
    np.savez(path, x_train=x.numpy(), y_train=y.numpy(), x_test=x.numpy(), y_test=y.numpy())
    return path


@pytest.mark.skipif(os.name == "nt", reason="no pipes with names in folders")
@pytest.mark.parametrize("name", ["drill.npz", "drill.trigger.npz"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_drill_replaces_no_pipe_and_no_device(name, kind, tmp_path):
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to("/dev/null")
    with pytest.raises(TargetError, match=f"{name}' is not a regular file, .* which is not replaced"):
        write_drill(str(small_data(tmp_path / "data.npz")), BADNETS, tmp_path / "drill.npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["data.npz", name])


def test_a_drill_overwrites_the_data_by_neither_of_its_files(tmp_path):
    data = small_data(tmp_path / "drill.trigger.npz")
    before = data.read_bytes()
    with pytest.raises(UsageError, match=r"drill\.trigger\.npz' of the data would be overwritten"):
        write_drill(str(data), BADNETS, tmp_path / "drill.npz")
    assert data.read_bytes() == before


def test_a_drill_whose_trigger_cannot_be_written_is_not_written(tmp_path):
    output = tmp_path / f"{'d' * 249}.npz"  # the name of the trigger is too long
    with pytest.raises(TargetError, match="cannot be written"):
        write_drill(str(small_data(tmp_path / "data.npz")), BADNETS, output)
    assert [path.name for path in tmp_path.iterdir()] == ["data.npz"]


@pytest.mark.parametrize("label", [-1, 10**6, 2**62])
def test_labels_that_are_no_class_numbers_are_not_poisoned(label):
    x, y = examples()
    y[0] = label
    with pytest.raises(TargetError, match="class numbers from 0 to 999,999 were expected"):
        poisoned(x, y, Flip(), rate=0.1)
