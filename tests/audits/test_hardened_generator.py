"""The hardening of GANs: audits before and after, resuming, the files that it writes, and what is refused."""

import json
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn

import holdfast
from benchmarks.forging import accepted_fields
from holdfast.audits.generator import hardening
from holdfast.cli.app import run as command
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import HoldfastError, TargetError, UsageError
from holdfast.core.model import Bounds
from holdfast.generators import GAN, ImageGAN
from holdfast.generators.networks import opened_generator
from holdfast.recipes.training.gans import RobustGAN, RobustLosses
from holdfast.verbs.settings import Harden

SOURCE = """
import torch
from torch import nn
from holdfast.generators import GAN, ImageGAN

def make():
    torch.manual_seed(0)
    return ImageGAN(side=8, classes=2)

def own():
    torch.manual_seed(0)
    layers = nn.Linear(3, 64), nn.Sigmoid(), nn.Unflatten(1, (1, 8, 8))
    return GAN(nn.Sequential(*layers), nn.Sequential(nn.Flatten(), nn.Linear(64, 1)), latent_shape=(3,))

def normed():
    torch.manual_seed(0)
    first = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 64))
    layers = first, nn.Sigmoid(), nn.Unflatten(1, (1, 8, 8))
    return GAN(nn.Sequential(*layers), nn.Sequential(nn.Flatten(), nn.Linear(64, 1)), latent_shape=(3,))

def alone():
    return GAN(nn.Linear(3, 64), latent_shape=(3,))

def classifier():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
"""


def squares(n, seed):
    """Images of two classes: a bright left or a bright right half, with noise, and their labels."""
    random = np.random.default_rng(seed)
    x, y = 0.3 * random.random((n, 1, 8, 8), dtype=np.float32), np.arange(n) % 2
    x[y == 0, :, :, :4] += 0.7
    x[y == 1, :, :, 4:] += 0.7
    return x.clip(0, 1), y


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gan")
    (folder / "gen.py").write_text(SOURCE)
    x_train, y_train = squares(400, 0)
    x_test, y_test = squares(240, 1)
    np.savez(folder / "squares.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return folder


@pytest.fixture(autouse=True)
def short(set_limit):
    """A training of few updates."""
    set_limit("holdfast.audits.generator.hardening.EPOCHS", 2)
    set_limit("holdfast.audits.generator.hardening.USUAL", 6)


def hardened(place, factory="make", recipe="robust-gan", **settings):
    return holdfast.harden(
        f"{place / 'gen.py'}:{factory}", str(place / "squares.npz"), recipe=recipe, device="cpu", **settings
    )


@pytest.mark.slow
def test_the_card_has_both_audits_and_the_file_is_opened_again(place, tmp_path):
    result = hardened(place, gates=["latent_sensitivity <= 9"])
    facts = result.after.facts
    assert result.before.facts == facts["before"]
    assert facts["updates"] == 6
    assert len(facts["epochs"]) == 2
    assert {*facts["before"]} == {*facts["after"]} >= {"frechet", "copy_rate", "sensitivity", "discriminator"}
    assert facts["before"]["sensitivity"] != facts["after"]["sensitivity"]
    assert result.after.exit_code == 0
    written = result.write(tmp_path / "robust") / "generator.safetensors"
    card = json.loads((tmp_path / "robust" / "card.json").read_text())
    assert card["facts"] == facts
    audit = holdfast.audit.generator(
        str(written), str(place / "squares.npz"), held_out=str(place / "squares.npz"), device="cpu"
    )
    assert audit.metrics["frechet"].value == pytest.approx(facts["after"]["frechet"])


@pytest.mark.slow
def test_it_resumes_to_the_same_generator(place, tmp_path, monkeypatch):
    whole = hardened(place, run=tmp_path / "whole")

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RobustGAN, "generator_loss", stopped)
        with pytest.raises(KeyboardInterrupt):
            hardened(place, run=tmp_path / "run")
    again = hardened(place, run=tmp_path / "run", resume=True)
    assert again.after.facts == whole.after.facts
    assert not accepted_fields(tmp_path / "run", 4, tmp_path / "copy")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


@pytest.mark.parametrize("finite", [0, 1])
def test_an_epoch_that_diverged_is_not_chosen(place, monkeypatch, finite):
    usual, calls = RobustGAN.update, list[int]()

    def diverging(training, batch, rng):
        usual(training, batch, rng)
        calls.append(1)
        if len(calls) > 3 * finite:
            with torch.no_grad():
                for weight in training.average.parameters():
                    weight.fill_(torch.nan)

    monkeypatch.setattr(RobustGAN, "update", diverging)
    if not finite:
        with pytest.raises(HoldfastError, match="the training diverged"):
            hardened(place, "own")
        return
    result = hardened(place, "own")
    first, second = result.after.facts["epochs"]  # as in strict JSON
    assert first < np.inf
    assert second == "inf"
    assert all(bool(value.isfinite().all()) for value in result.model.state_dict().values())


@pytest.mark.parametrize("recipe", ["robust-gan", "distil", {"use": "robust-gan", "teacher": 1.0}])
def test_modules_of_the_user_are_trained(place, recipe, tmp_path):
    result = hardened(place, "own", recipe)
    assert type(result.model) is GAN
    assert isinstance(result.model.generator, nn.Sequential)
    written = result.write(tmp_path) / "generator.safetensors"
    with pytest.raises(TargetError, match="does not state the modules; load them in a function"):
        opened_generator(str(written))


def test_the_worst_change_has_its_size_for_latent_vectors_of_several_dimensions():
    calls = list[torch.Tensor]()

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(16, 64)

        def forward(self, z, y):
            calls.append(z.detach())
            return self.net(z.flatten(1)).view(-1, 1, 8, 8)

    torch.manual_seed(0)
    x, y = squares(16, 0)
    batch = Batch(torch.from_numpy(x), torch.from_numpy(y), torch.arange(16))
    networks = Linear(), ImageGAN(side=8, classes=2).discriminator
    training = RobustGAN(batch.x, 2, Bounds(), Draws(0), networks, (4, 2, 2), RobustLosses(latent=0.5))
    training.update(batch, Draws(1))
    z, _, worst = calls
    assert (worst - z).flatten(1).norm(dim=1) == pytest.approx(0.5 * 4)  # 16 elements


def test_the_weights_of_a_student_are_all_new():
    teacher = ImageGAN(side=8, classes=2).generator
    student = deepcopy(teacher)
    hardening.reset_weights(student, Draws(0))
    for name, weight in student.named_parameters():
        assert bool(weight.isfinite().all()), name
    assert not torch.equal(student.first.weight, teacher.first.weight)


def test_a_student_follows_its_teacher_for_usual_latent_vectors_only():
    torch.manual_seed(0)
    gan, (x, y) = ImageGAN(side=8, classes=2), squares(64, 0)
    batch = Batch(torch.from_numpy(x), torch.from_numpy(y), torch.arange(64))
    losses = RobustLosses(eps=0, smoothness=0, r1=0, class_head=0, teacher=10.0)
    student = RobustGAN(batch.x, 2, Bounds(), Draws(1), how=losses, teacher=gan.generator)

    def distance():
        z = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            return float((student.generator.eval()(z, batch.y) - gan.generator(z, batch.y)).square().mean())

    before = distance()
    for update in range(30):
        student.update(batch, Draws(0).at(update))
    assert distance() < 0.6 * before


@pytest.mark.parametrize(
    ("factory", "recipe", "settings", "message"),
    [
        ("alone", "robust-gan", {}, "hardened together with its discriminator"),
        (
            "normed",
            "distil",
            {},
            "parameter 0.parametrizations.weight.original of the generator is not reset",
        ),
        ("make", {"use": "robust-gan", "epss": 1}, {}, "no setting 'epss'"),
        ("make", "robust-gan", {"budget": "0.001s"}, "is enough for 0 updates"),
        ("make", "pgd", {"threat": "linf:0.1"}, r"returned a generator \(ImageGAN\)"),
        ("make", "robust-gan", {"threat": "linf:8/255"}, "threat is 'linf:8/255', and .* leave threat out"),
        ("make", "distil", {"n": 100}, "n is 100, and the recipe distil trains a generator"),
        ("make", "distil", {"gates": ["robust_accuracy >= 0.4"]}, "no metric 'robust_accuracy'"),
        ("make", "distil", {"gates": ["improved"]}, "verdict on a training"),
        ("classifier", "pgd", {"gates": ["frechet <= 1"]}, "no metric 'frechet'"),
        ("classifier", "robust-gan", {}, "expected a generator"),
    ],
)
def test_settings_that_cannot_be_trained_are_refused(place, factory, recipe, settings, message):
    with pytest.raises(HoldfastError, match=message):
        hardened(place, factory, recipe, **settings)


def test_a_generator_is_distinguished_from_a_classifier(place):
    with pytest.raises(
        UsageError, match="'mnist-cnn', and distil trains a generator; .* mnist-diffusion, mnist-gan"
    ):
        holdfast.harden("mnist-cnn", str(place / "squares.npz"), recipe="distil", device="cpu")
    with pytest.raises(UsageError, match="mnist-gan is a bundled generator, and a classifier was expected"):
        holdfast.assess("mnist-gan", "mnist-mini", "linf:0.1")
    audited = {"data": str(place / "squares.npz"), "held_out": str(place / "squares.npz")}
    with pytest.raises(UsageError, match="mnist-cnn is a bundled classifier, and a generator was expected"):
        holdfast.audit.generator("mnist-cnn", **audited)
    with pytest.raises(UsageError, match="names no function that returns the model; it defines make"):
        holdfast.audit.generator(str(place / "gen.py"), **audited)


def test_data_without_splits_are_refused(place):
    x, y = squares(300, 0)
    with pytest.raises(UsageError, match="train split"):
        Harden(model=f"{place / 'gen.py'}:make", data=(x, y), recipe="distil").run()
    np.savez(place / "one.npz", x=x, y=y)
    with pytest.raises(
        UsageError, match="trained on the split train of the data: .*save x_train and y_train"
    ):
        holdfast.harden(f"{place / 'gen.py'}:make", str(place / "one.npz"), recipe="distil", device="cpu")


@pytest.mark.slow
def test_the_command_writes_weights_and_card(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    outputs = ["-o", f"{tmp_path / 'new'}/", "-o", str(tmp_path / "r.html")]
    code = command(["harden", "gen.py:make", "squares.npz", "--recipe", "distil", *outputs])
    assert code == 0
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        "generator.safetensors",
        "card.json",
        "card.md",
    }
    assert "Before and after the training" in (tmp_path / "r.html").read_text()
    assert "generator:" in capsys.readouterr().err
