"""Data that were normalised beforehand: eps stays in pixels, and the verdict is that of the pixels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import holdfast
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Normalisation
from holdfast.core.types import Inputs
from holdfast.io.data.layouts import DeclaredData
from holdfast.io.data.loaders import as_data
from holdfast.recipes import PGDTraining
from holdfast.recipes.training.fit import Training

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))


@pytest.fixture
def pixels() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x[0, :, 0, 0], x[0, :, 0, 1] = 0.0, 1.0
    model = net()
    with torch.no_grad():
        return x, model(normalised(x)).argmax(1)


def normalised(x: Inputs) -> Inputs:
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tensor", "array", "half"])
def test_the_verdict_on_normalised_data_is_that_on_the_pixels(pixels, kind):
    x, y = pixels
    z = normalised(x)
    data = (z, y) if kind == "tensor" else (z.numpy(), y.numpy()) if kind == "array" else (z.half(), y)
    declared = holdfast.assess(net(), (x, y), "linf:0.02", "quick", mean=MEAN, std=STD, doubts=False)
    undone = holdfast.assess(net(), data, "linf:0.02", "quick", data_normalised=(MEAN, STD), doubts=False)
    assert 0 < declared.metrics["robust_accuracy"].value < 1
    assert undone.metrics["robust_accuracy"].value == declared.metrics["robust_accuracy"].value
    assert undone.evidence.model["bounds"] == [0.0, 1.0]
    sentence = undone.summary()["threat"]["description"][0]
    assert "units before the normalisation" in sentence


def test_the_gradient_goes_through_the_normalisation(pixels):
    from holdfast.verbs.opening.resolve import open_subject

    x, y = pixels
    settings = holdfast.Assess(model=net(), data=pixels, data_normalised="0.49,0.48,0.45/0.25,0.24,0.26")
    model = open_subject(settings).model
    expected = DeclaredData(normalised=Normalisation(MEAN, STD))
    restored = as_data((normalised(x), y), expected=expected).read(0, len(x)).x.requires_grad_()
    raw = x.clone().requires_grad_()
    (own,) = torch.autograd.grad(model(restored)[:, 0].sum(), restored)
    (plain,) = torch.autograd.grad(net()(normalised(raw))[:, 0].sum(), raw)
    torch.testing.assert_close(restored.detach(), x, rtol=0, atol=1e-6)
    torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-6)


def test_rounding_is_moved_to_the_bounds_and_nothing_else():
    expected = DeclaredData(normalised=Normalisation((0.1307,), (0.3081,)))

    def read(pixels: list[float], dtype: torch.dtype = torch.float32) -> list[float]:
        z = ((torch.tensor(pixels, dtype=torch.float64) - 0.1307) / 0.3081).to(dtype)[:, None, None, None]
        return (
            as_data((z, torch.zeros(len(pixels), dtype=torch.int64)), expected=expected)
            .read(0, 9)
            .x.flatten()
            .tolist()
        )

    assert read([-1e-8, 1 + 1e-7, 0.0, 1.0]) == [0.0, 1.0, 0.0, 1.0]
    assert read([0.0, 1.0], torch.float16) == [0.0, 1.0]
    for wrong in (-1e-4, 1.0001, -0.3):
        with pytest.raises(TargetError, match=r"undone, range from .*correct data_normalised"):
            read([wrong, 0.5])


@pytest.mark.slow
def test_a_model_with_its_own_normalisation_keeps_it(pixels):
    x, y = pixels
    own = holdfast.Classifier(net(), mean=MEAN, std=STD)
    plain = holdfast.assess(own, (x, y), "linf:0.02", "quick", doubts=False)
    other = (x - 0.5) / 0.5
    found = holdfast.assess(own, (other, y), "linf:0.02", "quick", data_normalised="0.5/0.5", doubts=False)
    assert found.metrics["robust_accuracy"].value == plain.metrics["robust_accuracy"].value


@pytest.mark.parametrize(
    "options, message",
    [
        ({"data_normalised": "0.5/0.5", "mean": (0.5,), "std": (0.5,)}, "not both"),
        ({"data_normalised": "0.5"}, "expected MEAN/STD"),
        ({"data_normalised": ((0.5,), (0.0,))}, "expected MEAN/STD"),
        ({"data_normalised": "0.5,0.5/0.1,0.1,0.1"}, "2 means and 3 deviations"),
    ],
)
def test_what_cannot_be_declared_is_refused(pixels, options, message):
    with pytest.raises(UsageError, match=message):
        holdfast.assess(net(), pixels, "linf:0.02", "quick", **options)


def test_values_that_cannot_have_been_normalised_so_are_refused(pixels):
    x, y = pixels
    with pytest.raises(TargetError, match="these seem not to be normalised; .* leave out data_normalised"):
        as_data((x, y), expected=DeclaredData(normalised=Normalisation(MEAN, STD)))
    scale = Normalisation(*(tuple(255 * side for side in sides) for sides in (MEAN, STD)))
    with pytest.raises(TargetError, match="on the scale of 0 to 255: divide them by 255"):
        as_data((normalised(x), y), expected=DeclaredData(normalised=scale))


def test_bytes_are_no_normalised_values(pixels, tmp_path: Path):
    x, y = pixels
    np.savez(tmp_path / "bytes.npz", x=(x * 255).byte().numpy(), y=y.numpy())
    with pytest.raises(TargetError, match="normalised values are floats; .* leave out data_normalised"):
        holdfast.assess(net(), tmp_path / "bytes.npz", "linf:0.02", "quick", data_normalised=(MEAN, STD))


@pytest.mark.slow
def test_a_hardened_model_opens_with_the_preprocessing_it_was_trained_with(pixels, tmp_path: Path):
    x, y = pixels
    z, fit = normalised(x), torch.rand(510, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    made = holdfast.harden(
        net(), (z, y), "linf:0.02", PGDTraining(steps=1, training=Training(epochs=1)), fit=(normalised(fit),
        torch.arange(510) % 3), data_normalised=(MEAN, STD), suite="quick", doubts=False,
    )  # fmt: skip
    place = made.write(tmp_path / "new")
    code = tmp_path / "code.py"
    code.write_text(
        "from torch import nn\n\n\ndef net():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))\n"
    )
    weights = next(Path(place).glob("*.safetensors")) if Path(place).is_dir() else place
    again = holdfast.assess(
        holdfast.open_model(str(weights), arch=f"{code}:net"), (x, y), "linf:0.02", "quick", doubts=False
    )
    assert again.metrics["robust_accuracy"].value == made.after.metrics["robust_accuracy"].value
    torch.testing.assert_close(torch.tensor(again.evidence.model["mean"]), torch.tensor(MEAN))
