"""`holdfast.attack`: judged as `assess` judges, returned as the inputs were given."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import holdfast
from holdfast.attacks import FMN, PGD, Square, Universal
from holdfast.core.constraints import allowed
from holdfast.core.errors import UsageError
from holdfast.core.model import Bounds, Classifier
from holdfast.io.data.data import open_data
from holdfast.io.models.models import open_model

N = 60
DIGITS = open_data("mnist-mini", n=N).read(0, N)
X, Y = DIGITS.x, DIGITS.y.clone()
Y[:3] = (Y[:3] + 1) % 10  # wrong from the start
BOX = Bounds()


@pytest.fixture(scope="module")
def net():
    return open_model("mnist-cnn").model


def predicted(net, x):
    with torch.no_grad():
        return net(torch.as_tensor(x)).argmax(1)


@pytest.mark.parametrize(
    ("attack", "threat"),
    [
        (PGD(steps=5), holdfast.Linf(0.1)),
        ({"use": "pgd", "steps": 5, "restarts": 2}, "l2:1"),
        ("square", "linf:0.1,queries=40"),
        (FMN(steps=20), "l2"),
        ([PGD(steps=2), Square(queries=30)], "linf:0.1"),
        ("fgsm", "corruptions:3"),
        ("fog", "corruptions:5"),
    ],
    ids=["attack", "settings", "query budget", "smallest change", "list", "no corruption", "corruption"],
)  # fmt: skip
def test_it_succeeds_where_assess_with_the_same_attack_does(net, attack, threat):
    if attack == "fgsm":
        with pytest.raises(UsageError, match="FGSM is not a common corruption"):
            holdfast.attack(net, X, Y, attack, threat)
        return
    found = holdfast.attack(net, X, Y, attack, threat, seed=3)
    evidence = holdfast.assess(net, (X, Y), threat, attack, seed=3, doubts=False).evidence
    assert torch.equal(found.success, evidence["success"] | ~evidence["correct"])
    assert torch.equal(found.success, predicted(net, found.x_adv) != Y)
    assert torch.equal(found.queries, evidence["queries"])
    assert not found.clean_correct[:3].any() and torch.equal(found.x_adv[:3], X[:3])
    constraint = evidence.threat.constraint
    assert allowed(constraint, found.x_adv, X, BOX).all()
    assert torch.allclose(found.distance, constraint.distance(found.x_adv, X), atol=1e-6)
    assert found.success[3:].any() and found.x_adv.dtype == X.dtype
    assert [each.name for each in found.result.attacks] == [each.name for each in evidence.attacks]


def test_what_was_not_broken_is_the_best_attempt(net):
    found = holdfast.attack(net, X, Y, [PGD(steps=2), PGD(steps=10)], "linf:0.03")
    held = ~found.success
    assert held.any() and (found.distance[held] > 0).all()

    def margin(x):
        with torch.no_grad():
            logits = net(x)
        own = logits.gather(1, Y[:, None])[:, 0]
        return own - logits.scatter(1, Y[:, None], -torch.inf).amax(1)

    assert (margin(found.x_adv)[held] < margin(X)[held]).all()


def test_a_goal_is_reached_where_it_is_predicted(net):
    found = holdfast.attack(net, X, Y, PGD(steps=10), "linf:0.15", goal=np.int64(3))
    assert found.result.evidence.threat.goal == 3
    assert torch.equal(found.success, predicted(net, found.x_adv) == 3)
    assert not torch.equal(found.success, predicted(net, X) == 3)
    same = holdfast.attack(net, X, Y, PGD(steps=10), "linf:0.15", goal="targeted:3", queries=5)
    assert same.queries.max() == 5
    for wrong, says in (
        ({"threat": "linf:0.1,goal=targeted:2", "goal": 3}, "the threat .* has one; leave one of them out"),
        ({"threat": "linf:0.1,queries=2", "queries": 3}, "has them; leave one of them out"),
        ({"goal": Y}, "goal is a Tensor; expected the number of one class for all"),
    ):
        with pytest.raises(UsageError, match=says):
            holdfast.attack(net, X, Y, "pgd", **wrong)


@pytest.mark.parametrize("kind", ["uint8 hwc", "float64", "half", "normalised", "list", "some"])
def test_inputs_come_back_as_they_were_given(net, kind):
    wanted = holdfast.attack(net, X, Y, PGD(steps=5), "linf:0.1")
    x, options, chosen, model = X.numpy(), {}, slice(None), net
    if kind == "uint8 hwc":
        x = (X * 255).round().to(torch.uint8).movedim(1, -1).numpy()
    elif kind == "float64":
        x = x.astype(np.float64)
    elif kind == "half":
        x = X.half()
    elif kind == "normalised":
        x, options = (X - 0.25) / 0.5, {"data_normalised": (0.25, 0.5)}
        model = torch.nn.Sequential(Rescaled(), net)
    elif kind == "list":
        x = x.tolist()
    else:
        options, chosen = {"sample": 20}, None
    found = holdfast.attack(model, x, Y.numpy(), PGD(steps=5), "linf:0.1", **options)
    if chosen is None:
        chosen = found.result.evidence["id"]
        x, wanted_success = x[chosen], None
    else:
        wanted_success = wanted.success
    given = x if isinstance(x, torch.Tensor) else np.asarray(x)
    assert type(found.x_adv) is type(given) and found.x_adv.shape == given.shape
    assert str(found.x_adv.dtype).split(".")[-1] == ("float64" if kind in ("float64", "list") else "float32")
    scale, shift = {"uint8 hwc": (255, 0), "normalised": (2, -0.5)}.get(kind, (1, 0))
    far = np.abs(np.asarray(found.x_adv) - np.asarray(given)).reshape(len(given), -1).max(1)
    assert np.allclose(far, scale * np.asarray(found.distance), atol=2e-6 * scale)
    same = np.asarray(found.x_adv)[:3] == np.asarray(given)[:3]
    assert kind == "some" or same.all()
    pixels = torch.as_tensor((np.asarray(found.x_adv) - shift) / scale).float()
    pixels = pixels.movedim(-1, 1) if kind == "uint8 hwc" else pixels
    assert np.array_equal(np.asarray(found.success), np.asarray(predicted(net, pixels) != Y[chosen]))
    if wanted_success is not None and kind != "half":
        assert np.array_equal(np.asarray(found.success), np.asarray(wanted_success))


class Rescaled(torch.nn.Module):
    """Takes what was normalised by 0.25/0.5 to pixels."""

    def forward(self, x):
        return x * 0.5 + 0.25


def test_loaders_addresses_and_surrounding_modes(net):
    wanted = holdfast.attack(net, X, Y, PGD(steps=3), "linf:0.1")
    loader = DataLoader(TensorDataset(X, Y), batch_size=7)
    assert torch.equal(holdfast.attack(net, loader, None, PGD(steps=3), "linf:0.1").x_adv, wanted.x_adv)
    assert torch.equal(
        holdfast.attack(net, (X, Y), attack=PGD(steps=3), threat="linf:0.1").x_adv, wanted.x_adv
    )
    address = holdfast.attack("mnist-cnn", "mnist-mini", None, PGD(steps=3), "linf:0.1", n=N)
    assert torch.equal(address.success, predicted(net, address.x_adv) != DIGITS.y) and len(address) == N
    frame = pd.DataFrame(X.flatten(1).numpy()).add_prefix("pixel")
    flat = torch.nn.Sequential(torch.nn.Unflatten(1, (1, 28, 28)), net).eval()
    table = holdfast.attack(flat, frame, Y.numpy(), PGD(steps=3), "linf:0.1")
    assert torch.equal(table.success, wanted.success) and table.x_adv.shape == (N, 28 * 28)
    with pytest.raises(UsageError, match="y is missing for inputs in a Tensor"):
        holdfast.attack(net, X)

    net.train().requires_grad_(True)
    net.net[0].weight.grad = before = torch.ones_like(net.net[0].weight)
    state = {name: values.clone() for name, values in net.state_dict().items()}
    with torch.no_grad():
        found = holdfast.attack(net, X.requires_grad_(), Y, PGD(steps=3), "linf:0.1")
    X.requires_grad_(False)
    assert torch.equal(found.x_adv, wanted.x_adv) and not found.x_adv.requires_grad
    assert net.training and net.net[0].weight.requires_grad and net.net[0].weight.grad is before
    assert all(torch.equal(values, state[name]) for name, values in net.state_dict().items())
    net.eval()
    net.net[0].weight.grad = None


def test_attacks_that_learn_transfer_and_random_models(net):
    learned = holdfast.attack(net, X, Y, Universal(steps=5, fits=1, examples=100), "linf:0.2", fit=(1 - X, Y))
    tried = learned.clean_correct & (learned.distance > 0)
    assert tried.any() and len(learned.result.attacks) == 1
    carried = holdfast.attack(net, X, Y, "mi-fgsm", "linf:0.2,access=none", surrogates=["mnist-cnn-hardened"])
    assert torch.equal(carried.success, predicted(net, carried.x_adv) != Y) and not carried.queries.any()
    assert not carried.result.evidence.transfer

    def noisy(x):
        return net(x) + 0.01 * torch.randn(len(x), 10)

    random = holdfast.attack(noisy, X, Y, PGD(steps=5), "linf:0.1")
    assert torch.equal(random.x_adv, holdfast.attack(noisy, X, Y, PGD(steps=5), "linf:0.1").x_adv)
    assert random.success.float().mean() > 0.3


def test_settings_that_cannot_work_are_refused_with_a_remedy(net):
    scores = Classifier(net.forward, access="scores")
    for attack, options, says in (
        (
            "pgd",
            {"model": scores},
            "PGD needs gradients, and the model gives scores only; give attack='black-box' \\(Square\\)$",
        ),
        ("pgdd", {}, "there is no attack 'pgdd'; did you mean 'PGD'"),
        (5, {}, r"attack is 5; expected the name"),
        ("ddn", {"threat": "linf:0.1"}, "DDN"),
        ("pdg", {}, "there is no attack 'pdg'; did you mean 'PGD'"),
        ("autoatack", {}, "did you mean 'autoattack'"),
        ("pgd", {"threat": "linf"}, "Give one, as in linf:8/255, or choose an attack .* such as FMN$"),
        (
            "transfer",
            {},
            "Transfer computes its examples on surrogates, and none is given; give surrogates=\\[MODEL\\] for a model",
        ),
    ):
        with pytest.raises(UsageError, match=says):
            holdfast.attack(options.get("model", net), X, Y, attack, options.get("threat", "linf:0.1"))


def test_a_goal_is_a_class_by_its_number_or_its_name(net):
    names = [f"digit {k}" for k in range(10)]
    by_number = holdfast.attack(net, X, Y, PGD(steps=2), "linf:0.1", goal=3)
    by_name = holdfast.attack(
        holdfast.open_model(net, class_names=names), X, Y, PGD(steps=2), "linf:0.1", goal="digit 3"
    )
    assert torch.equal(by_number.x_adv, by_name.x_adv)
    for options, says in (
        (
            {"goal": "digit", "model": holdfast.open_model(net, class_names=names)},
            r"goal is 'digit', which is not the name of a class; expected one of 0 \(digit 0\)",
        ),
        ({"goal": "digit 3"}, "this model has no names for its classes; give the number of a class"),
        ({"goal": 70}, "the target class is 70, but the model has 10 classes; give a class from 0 to 9"),
        ({"goal": -1}, "goal is -1; expected the number of a class"),
        ({"queries": 0}, "queries is 0; expected a whole number of at least 1"),
    ):
        with pytest.raises(UsageError, match=says):
            holdfast.attack(options.pop("model", net), X, Y, PGD(steps=2), "linf:0.1", **options)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_gradients_that_the_model_disables_are_reported(net, off):
    def cut(x):
        with off():
            return net(x)

    found = holdfast.attack(cut, X, Y, PGD(steps=2), "linf:0.1")
    (note,) = [note for note in found.notes if note.startswith("no gradient reaches the input")]
    assert "torch.no_grad(), torch.inference_mode()" in note and note in repr(found)
    assert repr(found).startswith("<Attacked: PGD under linf:0.1; ")
    way_out = next(each.way_out for each in holdfast.doctor(cut, (X, Y)) if each.check == "gradients")
    assert "torch.no_grad(), torch.inference_mode()" in way_out
    assert not holdfast.attack(net, X, Y, PGD(steps=2), "linf:0.1").notes
    searched = holdfast.attack(cut, X, Y, "square", "linf:0.1,access=scores,queries=5")
    assert not [note for note in searched.notes if note.startswith("no gradient reaches the input")]


@pytest.mark.parametrize("returned", [torch.from_numpy, np.asarray], ids=["a tensor", "an array"])
@pytest.mark.parametrize("suite", [None, "black-box"], ids=["default", "black-box"])
@pytest.mark.parametrize("access", ["", ",access=scores", ",access=labels"], ids=["any", "scores", "labels"])
def test_a_function_that_passes_its_inputs_to_numpy_is_attacked_by_its_scores(net, returned, suite, access):
    def other_runtime(x):
        return returned(net(torch.from_numpy(x.numpy())).numpy())

    threat = f"linf:0.1{access},queries=20"
    result = holdfast.assess(other_runtime, (X[:8], Y[:8]), suite=suite, threat=threat)
    assert any(note.startswith("attacks use only the scores of the model") for note in result.evidence.notes)
    assert float(result["robust_accuracy"]) <= float(result["clean_accuracy"])
    of_gradients = {"zero-gradient", "scale", "one-step", "black-box", "loss-spread", "shattered"}
    states = {doubt.name: doubt.state for doubt in result.evidence.doubts}
    assert {states[name] for name in of_gradients} == {"not applicable"}
    if not access:
        gradients = next(each for each in holdfast.doctor(other_runtime, (X, Y)) if each.check == "gradients")
        assert gradients.level == "warning" and "the default suite is black-box" in gradients.message
