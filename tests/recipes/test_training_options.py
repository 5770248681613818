"""Options of the loop: averages of the weights, mixed labels, statistics under attack, replays and missing labels."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from holdfast.core.batch import UNLABELLED, Batch
from holdfast.core.constraints import L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.recipes import (
    IKL,
    MART,
    SCORE,
    TRADES,
    CurriculumTraining,
    FreeTraining,
    GradientRegularisation,
    MultiNormTraining,
    PGDTraining,
    SingleStep,
    Standard,
)
from holdfast.recipes.training.augment import cut_and_mixed
from holdfast.recipes.training.fit import Training, fit
from holdfast.recipes.training.learner import Learner, hits
from holdfast.recipes.training.weights import twin
from holdfast.testing import fakes
from holdfast.testing.recipes import SHORT, same

HOW = Training(epochs=8, batch=4, lr=0.1, schedule="flat", averaging="none", momentum=0.0, weight_decay=0.0)
THREAT = ThreatModel(Linf(0.05))


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


def of(net, seen=None):
    def loss(batch, x):
        if seen is not None:
            seen.append((batch, x))
        logits = net(x)
        return F.cross_entropy(logits, batch.y, ignore_index=UNLABELLED), hits(logits, batch.y)

    return loss


def normed():
    """Tiny images and a network with batch norm."""
    torch.manual_seed(0)
    layers = (torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten())
    return Classifier(torch.nn.Sequential(*layers, torch.nn.Linear(16, 4)).double()).eval()


def images(n=26):
    return fakes.labelled(fakes.network(), fakes.examples(n=n))


def test_swa_is_the_mean_of_the_ends_of_the_last_epochs():
    net, how = linear(), replace(HOW, averaging="swa", tail=0.5)
    found = list(fit(net, data(), clean, of(net), how, rng=Draws(0)))
    ends = torch.stack([checkpoint.tensors["weights.weight"] for checkpoint in found])
    for epoch in range(4):
        torch.testing.assert_close(found[epoch].tensors["average.weight"], ends[epoch])
        torch.testing.assert_close(
            found[4 + epoch].tensors["average.weight"], ends[4 : 5 + epoch].mean(0), rtol=1e-12, atol=0
        )


def test_swa_is_that_mean_where_fewer_epochs_are_left_than_were_planned():
    net, how = linear(), replace(HOW, averaging="swa", tail=0.5)
    first = list(fit(net, data(), clean, of(net), how, rng=Draws(0)))[:5]
    fewer = replace(how, epochs=6)
    (last,) = fit(net, data(), clean, of(net), fewer, rng=Draws(0), after=first[-1])
    ends = [first[-1].tensors["weights.weight"], last.tensors["weights.weight"]]
    torch.testing.assert_close(last.tensors["average.weight"], sum(ends) / 2, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("said", "each"),
    [
        ({"optimizer": "adamw"}, 0.1),
        ({"optimizer": "sgd"}, 5e-4),
        ({"optimizer": "adamw", "weight_decay": 0.0}, 0.0),
        ({"optimizer": "sgd", "weight_decay": 0.2}, 0.2),
    ],
    ids=str,
)
def test_a_weight_without_a_gradient_decays_by_the_default_or_given_rate(said, each):
    def level(batch, x):
        logits = 0 * net(x)
        return logits.sum(), hits(logits, batch.y)

    net = linear()
    how = replace(HOW, **{"weight_decay": None, **said})
    *_, last = fit(net, data(), clean, level, how, rng=Draws(0))
    left = torch.full_like(net.weight, 0.1 * (1 - HOW.lr * each) ** (3 * HOW.epochs))
    torch.testing.assert_close(last.tensors["weights.weight"], left, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "option",
    [
        {"averaging": "swa", "tail": 1.0},
        {"averaging": "none"},
        {"cutmix": 0.7},
        {"cutmix": 1.0, "augment": "crop-flip", "awp": 0.01},
        {"attack_statistics": "batch"},
    ],
    ids=str,
)
def test_each_option_changes_the_weights_and_resumes_exactly(option):
    recipe = PGDTraining(steps=2, training=replace(SHORT, **option))
    model, some = normed(), images()
    whole = list(recipe(model, some, THREAT, rng=Draws(0)))
    for stopped in whole[:-1]:
        rest = list(recipe(model, some, THREAT, rng=Draws(0), after=stopped))
        assert all(same(one, other) for one, other in zip(rest, whole[stopped.epoch :], strict=True))
    usual = list(replace(recipe, training=SHORT)(model, some, THREAT, rng=Draws(0)))[-1]
    assert not same(usual, whole[-1])


def test_a_mixed_image_contains_a_box_of_another_and_its_label_the_share_of_the_area():
    n = 40
    x = torch.arange(n, dtype=torch.float64)[:, None, None, None].expand(n, 1, 9, 8).clone()
    batch, shares = Batch(x, torch.arange(n), torch.arange(n)), []
    for place in range(50):
        mixed, other, share = cut_and_mixed(batch, 1.0, Draws(0).at(place))
        assert torch.equal(mixed.x, other.x)
        own, strange = (mixed.x == side.y[:, None, None, None] for side in (mixed, other))
        assert (own | strange).all()
        alone = mixed.y != other.y
        assert own[alone].double().mean() == pytest.approx(share)
        shares.append(share)
    assert min(shares) >= 0.5
    assert len(set(shares)) > 10
    kept = [cut_and_mixed(batch, 0.3, Draws(0).at(place))[2] == 1 for place in range(200)]
    assert 0.6 < sum(kept) / 200 < 0.9
    assert cut_and_mixed(batch, 0.0, Draws(0))[0] is batch
    with pytest.raises(UsageError, match="cutmix is for images"):
        cut_and_mixed(data(), 1.0, Draws(0))


def test_the_loss_of_a_mixed_batch_is_that_of_soft_labels():
    net, seen, some = normed(), [], images(8)
    how = replace(HOW, epochs=1, batch=8, cutmix=1.0)
    (found,) = fit(net, some, clean, of(net, seen), how, rng=Draws(3))
    (batch, x), (other, _) = seen
    share = cut_and_mixed(
        some.take(Draws(3).at("order", 0).bits(some.ids).argsort()), 1.0, Draws(3).at(0, 0)
    )[2]
    assert 0.5 <= share < 1
    soft = torch.lerp(F.one_hot(other.y, 4).double(), F.one_hot(batch.y, 4).double(), share)
    fresh = normed()
    assert found.measured["loss"] == pytest.approx(F.cross_entropy(fresh(x), soft).item())


@pytest.mark.parametrize(
    "recipe",
    [
        Standard(label_smoothing=0.1),
        TRADES(steps=2, label_smoothing=0.1),
        SCORE(steps=2),
        SingleStep(),
        CurriculumTraining(steps=2),
        FreeTraining(replays=2),
        MultiNormTraining(others=(L2(0.1),), method="average", steps=2),
    ],
    ids=repr,
)
def test_losses_that_mix_labels_do_so_and_learn(recipe):
    model, some = fakes.network(1).requires_grad_(), images()
    how = replace(SHORT, epochs=20, cutmix=0.5)
    begun, *_, ended = replace(recipe, training=how)(model, some, THREAT, rng=Draws(0))
    assert ended.measured["loss"] < begun.measured["loss"]
    plain = list(replace(recipe, training=replace(how, cutmix=0.0))(model, some, THREAT, rng=Draws(0)))[-1]
    assert not same(ended, plain)


@pytest.mark.parametrize("recipe", [MART(), IKL(), GradientRegularisation()], ids=repr)
def test_losses_that_cannot_mix_labels_refuse_them(recipe):
    mixing = replace(recipe, training=replace(SHORT, cutmix=0.5))
    with pytest.raises(UsageError, match=r"cutmix is 0\.5, .* not linear in the label"):
        mixing(normed(), images(), THREAT, rng=Draws(0))


@pytest.mark.parametrize("how", [{"augment": "shift"}, {"augment": "crop-flip"}, {"cutmix": 0.5}])
def test_what_changes_images_is_refused_of_other_inputs_before_the_first_update(how):
    recipe = PGDTraining(training=replace(SHORT, **how))
    with pytest.raises(UsageError, match=r"is for images, and inputs have shape \(3,\)"):
        recipe(normed(), data(), THREAT, rng=Draws(0))


def test_attacks_go_by_statistics_of_their_own_batch_and_leave_none():
    net, some = normed().train(), images()
    with torch.no_grad():
        net(some.x * 3)
        before = {name: value.clone() for name, value in net.state_dict().items()}
        found = twin(net, "batch")(some.x)
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        torch.testing.assert_close(found, net(some.x))
        assert (twin(net)(some.x) - found).abs().max() > 0.01


def test_another_pass_of_the_network_that_learns_is_the_same_function_and_leaves_nothing():
    torch.manual_seed(0)
    first = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(3, 5))
    norm, drop = torch.nn.BatchNorm1d(5), torch.nn.Dropout(0.5)
    net = Classifier(torch.nn.Sequential(first, norm, drop, torch.nn.Linear(5, 2)).double()).train()
    held, x = Learner(net, net, THREAT), data().x
    again = held.repeated_forward()
    one = net(x)
    after = {name: value.clone() for name, value in net.state_dict().items()}
    torch.testing.assert_close(again(x), one, rtol=0, atol=0)
    assert all(torch.equal(value, after[name]) for name, value in net.state_dict().items())
    assert int(norm.num_batches_tracked) == 1


def test_a_replayed_batch_is_the_same_batch_in_updates_of_their_own():
    net, seen, updates = normed(), [], []

    def inner(batch, update):
        updates.append((update.rng.key, update.done))
        return batch.x

    how = replace(HOW, epochs=2, batch=8, augment="shift")
    *_, last = fit(net, images(), inner, of(net, seen), how, rng=Draws(0), replays=3)
    assert len(updates) == len(set(updates)) == 2 * 3 * 3
    assert updates[-1][1] == 17 / 18
    assert len({tuple(x.flatten().tolist()) for _, x in seen}) == 2 * 3
    assert all(torch.equal(seen[k][1], seen[k - k % 3][1]) for k in range(18))
    assert 0 <= last.measured["accuracy"] <= 1


def test_examples_without_a_label_are_refused_and_never_right():
    some = images()
    y = torch.where(torch.arange(len(some)) % 2 == 0, some.y, UNLABELLED)
    with pytest.raises(UsageError, match="13 of 26 training examples have no label"):
        Standard()(normed(), some.labelled(y), THREAT, rng=Draws(0))
    net = linear()
    half = data().labelled(torch.where(torch.arange(12) < 6, 1, UNLABELLED))
    with torch.no_grad():
        net.bias.copy_(torch.tensor([-50.0, 50.0]))
    (found,) = fit(net, half, clean, of(net), replace(HOW, epochs=1, batch=12), rng=Draws(0))
    assert found.measured["accuracy"] == 1.0
