"""Models that consist of several: ensembles and mixes."""

import pickle

import pytest
import torch
from torch import nn

import holdfast
from holdfast.cli.app import run
from holdfast.cli.measure import refuse_code_of_config
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Bounds, Classifier
from holdfast.io.models.composed import Ensemble, Mixture, fitted, transformed
from holdfast.reports.words import threat_in_words
from holdfast.verbs.checked_settings import check_settings
from holdfast.verbs.settings import Assess, Certify, Doctor, Harden, Serve

X = torch.rand(40, 6, generator=torch.Generator().manual_seed(0))
FEW = {"suite": {"use": "PGD", "steps": 5}, "doubts": False, "device": "cpu"}


def net(seed, classes=3, features=6):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(features, 8), nn.ReLU(), nn.Linear(8, classes))


NETS = [net(0), net(1), net(2)]
Y = Ensemble(NETS, combine="logits")(X).argmax(1)


class Fixed(nn.Module):
    """Network with the given logits for every input."""

    def __init__(self, *logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, x):
        return self.logits.expand(len(x), -1) + 0 * x.sum()


def assessed(model="ensemble:", members=NETS, threat="linf:0.1", **more):
    return holdfast.assess(holdfast.open_model(model, members=members), (X, Y), threat, **{**FEW, **more})


def test_logits_are_averaged():
    expected = (NETS[0](X) + NETS[1](X) + NETS[2](X)) / 3
    torch.testing.assert_close(Ensemble(NETS, combine="logits")(X), expected)


def test_votes_decide_and_mean_probabilities_resolve_ties():
    votes = Ensemble([Fixed(0.0, 1.0, 0.0), Fixed(0.0, 1.0, 0.0), Fixed(9.0, 0.0, 0.0)], straight=True)
    assert votes(X[:1]).argmax() == 1
    tied = Ensemble([Fixed(0.0, 1.0, 0.0), Fixed(3.0, 0.0, 0.0)], straight=True)
    assert tied(X[:1]).argmax() == 0


def test_votes_have_the_gradient_of_the_mean_log_probabilities():
    x = X.clone().requires_grad_()
    (own,) = torch.autograd.grad(Ensemble(NETS, straight=True)(x)[:, 0].sum(), x)
    mean = torch.stack([member(x).log_softmax(1) for member in NETS]).mean(0)
    (expected,) = torch.autograd.grad(mean[:, 0].sum(), x)
    torch.testing.assert_close(own, expected)
    assert own.abs().min() > 0


def test_an_unsure_robust_network_is_overruled_and_a_sure_one_is_not():
    accurate = Fixed(9.0, 0.0, 0.0, 0.0)
    for robust, predicted in ((Fixed(0.0, 9.0, 0.0, 0.0), 1), (Fixed(0.0, 1.0, 0.95, 0.9), 0)):
        mix = Mixture(accurate, robust)
        assert mix(X[:1]).argmax() == predicted
        torch.testing.assert_close(mix(X[:2]).exp().sum(1), torch.ones(2))


def test_the_gradient_of_a_mix_reaches_both_parts_and_stays_finite():
    parts = NETS[0], NETS[1]
    x = X.clone().requires_grad_()
    Mixture(*parts, power=1.0, shift=-1.0)(x)[:, 0].sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.any(1).all()


def test_a_transformation_keeps_the_order_of_the_largest_logits():
    logits = torch.randn(50, 10, generator=torch.Generator().manual_seed(1))
    assert transformed(logits, 0.5, 3.0, 0.0).argmax(1).equal(logits.argmax(1))


def test_a_fitted_weight_keeps_the_requested_share_of_attacked_inputs():
    rng = torch.Generator().manual_seed(2)
    y = torch.randint(0, 10, (400,), generator=rng)
    clean = 2 * torch.randn(400, 10, generator=rng) + 4 * nn.functional.one_hot(y, 10)
    attacked = clean - nn.functional.one_hot(y, 10)
    found = fitted(clean, attacked, y, kept=0.9)
    won = attacked[attacked.argmax(1) == y]
    first, second = (
        transformed(won, found["scale"], found["power"], found["shift"]).softmax(1).topk(2).values.T
    )
    share = (first - second >= (1 - found["weight"]) / found["weight"]).double().mean()
    assert 0.88 < float(share) < 0.92
    with pytest.raises(UsageError, match="0 clean ones wrongly"):
        fitted(10 * nn.functional.one_hot(y, 10).double(), attacked.double(), y)
    same = torch.zeros(4, 10)
    with pytest.raises(UsageError, match="no transformation"):
        fitted(same, same, torch.tensor([0, 0, 1, 1]))


def test_a_transformation_that_changes_the_order_of_classes_is_not_fitted():
    rng = torch.Generator().manual_seed(0)
    y = torch.randint(0, 10, (1000,), generator=rng)
    signal = 0.5 * nn.functional.one_hot(y, 10)
    clean = torch.randn(1000, 10, generator=rng) + signal
    attacked = clean - 0.3 * signal + 0.1 * torch.randn(1000, 10, generator=rng)
    found = fitted(clean, attacked, y)
    moved = transformed(attacked, found["scale"], found["power"], found["shift"])
    right = attacked.argmax(1) == y
    assert (moved.argmax(1) == y)[right].double().mean() >= 0.98


def test_a_mix_needs_three_classes():
    mix = Mixture(nn.Flatten(), nn.Flatten())
    with pytest.raises(TargetError, match="expected at least 3"):
        mix(torch.rand(5, 2))
    assert mix(torch.rand(5, 3)).shape == (5, 3)


def test_each_member_is_attacked_and_has_its_accuracy():
    result = assessed()
    summary = result.summary()
    assert [entry.get("member") for entry in summary["surrogates"]] == [True] * 3
    own = [(member(X).argmax(1) == Y).double().mean().item() for member in NETS]
    assert [share["value"] for share in summary["transfer"]["accuracy"]] == pytest.approx([1.0, *own])
    assert summary["transfer"]["rows"][-1]["computed_on"] == "all surrogates"
    words = threat_in_words(summary["threat"], summary["surrogates"])
    assert any(sentence.startswith("Examples are also computed on each member") for sentence in words)
    assert result.evidence["success"].sum() >= result.evidence["suite_success"].sum()


def test_members_are_in_the_digest_and_their_order_in_that_of_a_mix():
    def identity(*arguments, **more):
        return Assess(model=arguments[0], data=(X, Y), members=arguments[1], **more).open()[0].digest

    kinds = {identity(f"ensemble:{combine}", NETS) for combine in ("logits", "mean", "votes")}
    assert len(kinds | {identity("ensemble:", [*NETS[:2], net(3)])}) == 4
    assert identity("ensemble:", NETS) in kinds
    assert identity("mixed:", NETS[:2]) != identity("mixed:", NETS[1::-1])


def test_an_attacker_with_scores_does_not_have_the_members():
    result = assessed(threat="linf:0.1,access=scores", suite="Square", n=4)
    assert result.summary()["surrogates"] == []


def test_an_ensemble_of_votes_is_attacked_by_gradients():
    result = assessed("ensemble:votes", threat="linf:0.5")
    assert result.evidence.model["access"] == "gradients"
    assert result.metrics["robust_accuracy"].value < 0.5


def test_members_are_found_behind_random_transformations():
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    members = [nn.Sequential(nn.Flatten(), net(seed, features=64)) for seed in (0, 1)]
    opened = Assess(
        model="ensemble:", data=(images, torch.arange(4) % 3), members=members, transform="brightness=0.1"
    ).open()
    assert len(opened[2]) == 2


def test_a_mix_with_other_parameters_is_another_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call = [
        "assess",
        "mixed:",
        "mnist-mini",
        "-n",
        "4",
        "-s",
        "pgd",
        "--no-doubts",
        "--run",
        "r",
    ]
    members = ["--member", "mnist-cnn", "--member", "mnist-cnn-hardened"]
    assert run([*call, *members, "--model-args", "weight=0.7"]) == 0
    assert run([*call, *members, "--model-args", "weight=0.6", "--resume"]) != 0


def test_bounds_are_proved_of_mean_logits():
    ensemble = holdfast.open_model("ensemble:", members=NETS)
    result = holdfast.certify(ensemble, (X[:4], Y[:4]), "linf:0.001", "crown")
    assert result.metrics["certified_accuracy"].value == 1.0


@pytest.mark.parametrize("combine", ["votes", "mean"])
def test_no_bounds_are_known_for_votes_and_probabilities(combine):
    ensemble = holdfast.open_model(f"ensemble:{combine}", members=NETS)
    with pytest.raises(UsageError, match=f"combined by {combine}, for which no bounds are known"):
        holdfast.certify(ensemble, (X, Y), "linf:0.0001", device="cpu")


def test_an_ensemble_is_examined_and_served():
    checkup = Doctor(model="ensemble:", members=NETS, data=(X, Y)).run()
    assert "the same inputs get the same outputs" in str(checkup)
    setup = Serve(model="ensemble:votes", members=NETS, input_shape=(6,)).open()
    loaded = pickle.loads(pickle.dumps(setup.worker.opening))()
    assert loaded.model(X).argmax(1).shape == Y.shape


@pytest.mark.parametrize(
    ("model", "members", "message"),
    [
        ("ensemble:", [], "has 0 members; at least two"),
        ("ensemble:", NETS[:1], "has 1 member; at least two"),
        ("mixed:", NETS, "has 3 members; two members"),
        ("ensemble:most", NETS, "ensemble:votes"),
        ("mixed:votes", NETS[:2], "expected ensemble:, mixed:"),
        (NETS[0], NETS[:2], "the model is another one"),
        ("ensemble:", ["mnist-cnn", "mnist-cnn,skip=a"], "a member has skip"),
        ("ensemble:", ["mnist-cnn", "mnist-cnn,skip=a,skip=b"], "the member .* contains skip twice"),
        ("ensemble:", NETS[0], "give a list of models, as in members="),
    ],
)
def test_settings_that_contradict_the_members_are_refused(model, members, message):
    with pytest.raises(UsageError, match=message):
        Assess(model=model, members=members, data=(X, Y))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([NETS[0], net(0, classes=4)], "the member 2 .* has 4 classes, and the first one has 3"),
        ([NETS[0], net(0, features=5)], "the member 2 .* on inputs of shape"),
        ([NETS[0], Classifier(NETS[1], bounds=Bounds(-1.0, 1.0))], "takes inputs from -1 to 1"),
        ([Classifier(NETS[0], classes=3), Classifier(NETS[1], classes=4)], "has classes 4, and the first one 3"),
        (["rotating:pool", "mnist-cnn"], "rotating pool"),
        ([holdfast.with_detector(NETS[0], lambda x: x.sum(1), 9.0), NETS[1]], "has a detector"),
        (["http://localhost:1/v2/models/a", "mnist-cnn"], "the member .* is behind a server"),
    ],
)  # fmt: skip
def test_members_that_do_not_fit_are_refused(members, message):
    with pytest.raises((UsageError, TargetError), match=message):
        assessed(members=members)


def test_a_mix_outside_its_ranges_is_refused():
    for name, value in (("weight", "1"), ("scale", "0"), ("power", "0.5"), ("shift", "inf")):
        reference = holdfast.open_model("mixed:", members=NETS[:2], model_args={name: value})
        with pytest.raises(UsageError, match=f"{name} of the mix is"):
            holdfast.assess(reference, (X, Y), **FEW)


def test_texts_have_no_members():
    ensemble = holdfast.open_model("ensemble:", members=NETS)
    with pytest.raises(UsageError, match="threat is on texts"):
        holdfast.assess(ensemble, (["a", "b"], [0, 1]), "text:edits=1,words=1")


def test_harden_refuses_an_ensemble():
    with pytest.raises(UsageError, match="has no weights of its own, and harden needs one network"):
        Harden(model="ensemble:", data=(X, Y))


def test_code_of_members_in_a_configuration_needs_consent():
    settings = check_settings(
        {"model": "ensemble:", "members": ["mnist-cnn", "net.py:make,width=8"]}, "", kind=Certify
    )
    with pytest.raises(UsageError, match=r"members\.1: net\.py:make") as refused:
        refuse_code_of_config(settings, {"config": "holdfast.yaml"})
    assert "--member mnist-cnn --member net.py:make,width=8" in refused.value.on_command_line()
    refuse_code_of_config(settings, {"config": "holdfast.yaml", "members": ("mnist-cnn",)})
