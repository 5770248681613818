"""The loop under the recipes: rates, averages, augmentation, and what it refuses."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import HoldfastError, UsageError
from holdfast.recipes.training.augment import Moves, augmented, moves, windows
from holdfast.recipes.training.fit import Training, fit, updates
from holdfast.recipes.training.optimisation import rate
from holdfast.recipes.training.weights import perturbed

HOW = Training(
    epochs=2,
    batch=4,
    optimizer="sgd",
    lr=0.1,
    schedule="flat",
    averaging="none",
    momentum=0.0,
    weight_decay=0.0,
)


def linear():
    net = torch.nn.Linear(3, 2).double()
    with torch.no_grad():
        net.weight.fill_(0.1)
        net.bias.zero_()
    return net


def data(n=12):
    x = torch.rand(n, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Batch(x, (x[:, 0] > x[:, 1]).long(), torch.arange(n))


def clean(batch, update):
    return batch.x


def of(net):
    def loss(batch, x):
        logits = net(x)
        return F.cross_entropy(logits, batch.y), (logits.argmax(1) == batch.y).sum()

    return loss


def test_one_update_of_everything_is_gradient_descent():
    net, other, all_of_it = linear(), linear(), data()
    list(fit(net, all_of_it, clean, of(net), replace(HOW, epochs=1, batch=12), rng=Draws(0)))
    F.cross_entropy(other(all_of_it.x), all_of_it.y).backward()
    torch.testing.assert_close(net.weight, other.weight - 0.1 * other.weight.grad)


def test_every_example_is_seen_once_an_epoch_in_an_order_of_its_own():
    seen = []
    net = linear()

    def loss(batch, x):
        seen.append(batch.ids)
        return of(net)(batch, x)

    list(fit(net, data(), clean, loss, HOW, rng=Draws(0)))
    first, second = torch.cat(seen[:3]), torch.cat(seen[3:])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(12))
    assert first.tolist() != second.tolist()


def test_what_does_not_fill_a_batch_waits_and_few_examples_are_one_batch():
    assert [updates(n, 4) for n in (1, 3, 4, 7, 8)] == [1, 1, 1, 1, 2]
    net = linear()
    some, right = data(3), 0
    for row in range(3):
        right += int(net(some.x[row : row + 1]).argmax() == some.y[row])
    (last,) = fit(net, some, clean, of(net), replace(HOW, epochs=1), rng=Draws(0))
    assert last.measured["accuracy"] == right / 3  # before the only update


@pytest.mark.parametrize("schedule", ["cycle", "cosine", "steps", "flat"])
def test_rates_stay_within_their_height(schedule):
    heights = [rate(schedule, done / 100) for done in range(101)]
    assert max(heights) == pytest.approx(1.0, abs=0.03)
    assert min(heights) >= 0
    assert (heights[-1] < 0.02) == (schedule != "flat")


def test_the_average_lies_between_the_weights_on_the_way():
    net = linear()
    *_, last = fit(
        net, data(), clean, of(net), replace(HOW, epochs=20, averaging="ema", average=0.9), rng=Draws(0)
    )
    begun, ended = linear().weight, last.tensors["weights.weight"]
    mean = last.tensors["average.weight"]
    assert last.averaged
    assert ((mean - begun) * (ended - begun) >= 0).all()
    assert (mean - ended).norm() < (begun - ended).norm()


def test_a_loss_that_is_not_finite_is_reported_with_its_update():
    net = linear()

    def loss(batch, x):
        value, right = of(net)(batch, x)
        return value * (float("nan") if 7 in batch.ids else 1), right

    with pytest.raises(HoldfastError, match=r"not finite from update [123] of epoch 1"):
        list(fit(net, data(), clean, loss, HOW, rng=Draws(0)))


def test_windows_are_the_images_moved():
    x = torch.rand(3, 2, 5, 4)
    down, right = torch.tensor([2, 0, 3]), torch.tensor([2, 4, 1])
    found = windows(x, 2, down, right)
    padded = F.pad(x, (2, 2, 2, 2))
    for row in range(3):
        d, r = int(down[row]), int(right[row])
        assert torch.equal(found[row], padded[row, :, d : d + 5, r : r + 4])


def test_augmentation_is_for_images_and_depends_on_the_place_of_the_draw():
    images = Batch(torch.rand(6, 3, 8, 8), torch.zeros(6, dtype=torch.int64), torch.arange(6))
    one, other = (augmented(images, "crop-flip", Draws(seed)).x for seed in (0, 1))
    assert one.shape == images.x.shape
    assert not torch.equal(one, other)
    assert torch.equal(augmented(images.take(torch.tensor([4])), "crop-flip", Draws(0)).x, one[4:5])
    assert augmented(images, "none", Draws(0)) is images
    with pytest.raises(UsageError, match="is for images"):
        augmented(data(), "shift", Draws(0))


def test_a_shift_is_undone_except_for_pixels_outside_of_the_image():
    x, unseen = torch.rand(3, 2, 5, 4), torch.rand(3, 2, 5, 4)
    moved = Moves(2, torch.tensor([2, 0, 3]), torch.tensor([2, 4, 1]), torch.tensor([True, False, True]))
    found = moved.back(moved.of(x), unseen)
    assert torch.equal(found[0], x[0])
    assert torch.equal(
        found[1, :, :3, 2:], x[1, :, :3, 2:]
    )  # two rows below and two columns to the left are gone
    assert torch.equal(found[1, :, 3:], unseen[1, :, 3:]) and torch.equal(
        found[1, :, :, :2], unseen[1, :, :, :2]
    )
    assert torch.equal(found[2, :, 1:, :3], x[2, :, 1:, :3])
    assert torch.equal(found[2, :, :1], unseen[2, :, :1]) and torch.equal(
        found[2, :, :, 3:], unseen[2, :, :, 3:]
    )


@pytest.mark.parametrize("replays", [1, 2])
def test_how_images_were_moved_is_drawn_at_the_place_of_the_first_update(replays):
    images = Batch(torch.rand(6, 1, 8, 8), torch.arange(6) % 2, torch.arange(6))
    net, places = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2)), []

    def inner(batch, update):
        places.append(update.rng)
        drawn = moves(images.take(batch.ids), "crop-flip", places[-1 - (len(places) - 1) % replays])
        assert torch.equal(batch.x, drawn.of(images.x[batch.ids]))
        return batch.x

    how = replace(HOW, epochs=2, batch=3, augment="crop-flip")
    list(fit(net, images, inner, of(net), how, rng=Draws(0), replays=replays))
    assert len(places) == 4 * replays


def test_a_step_is_taken_at_weights_that_were_moved_up_the_loss_and_come_back():
    net, other, all_of_it = linear(), linear(), data()
    how = replace(HOW, epochs=1, batch=12, awp=0.3)
    list(fit(net, all_of_it, clean, of(net), how, rng=Draws(0)))
    grad = torch.autograd.grad(F.cross_entropy(other(all_of_it.x), all_of_it.y), other.weight)[0]
    moved = linear()
    with torch.no_grad():
        moved.weight += 0.3 * other.weight.norm() / grad.norm() * grad
    F.cross_entropy(moved(all_of_it.x), all_of_it.y).backward()
    torch.testing.assert_close(net.weight, other.weight - 0.1 * moved.weight.grad)
    torch.testing.assert_close(net.bias, other.bias - 0.1 * moved.bias.grad)


def test_weight_perturbation_leaves_running_statistics_to_the_real_pass():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).double()
    with perturbed(net, lambda: net(data().x).square().sum(), 0.1):
        assert int(net[1].num_batches_tracked) == 0
        assert (net[1].running_mean == 0).all()
