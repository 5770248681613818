"""How arrays are read: as declared, else as the network takes them, else refused with the candidates."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import holdfast
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Classifier
from holdfast.runs.assess.result import Result


def seeded(*layers: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(*layers).eval()
    for weight in net.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) / weight.shape[-1] ** 0.5
    return net


def flat(features: int) -> nn.Module:
    return seeded(nn.Flatten(), nn.Linear(features, 4))


class Permuted(nn.Module):
    """Gives a network its input with the axes in another order."""

    def __init__(self, net: nn.Module, *axes: int) -> None:
        super().__init__()
        self.net, self.axes = net, axes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(x.permute(*self.axes))
        return out


class Viewed(nn.Module):
    """Flattens features in a way that takes an example without its batch, too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1, 4 * 14)


class Recurrent(nn.Module):
    """The last state of a recurrent network over sequences (n, steps, features)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.last = nn.GRU(5, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 3:
            raise ValueError(f"a sequence has 3 axes, not {x.dim()}")
        out: torch.Tensor = self.last(self.inner(x)[0][:, -1])
        return out


conv = seeded(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 4))
grey = seeded(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 4))
signal = seeded(nn.Conv1d(2, 4, 3), nn.Flatten(), nn.Linear(4 * 14, 4))
volume = seeded(nn.Conv3d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 64, 4))
flat_layers = seeded(nn.Conv3d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 16, 4))
single = seeded(nn.Conv1d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 14, 4))
viewed = seeded(nn.Conv1d(1, 4, 3), Viewed(), nn.Linear(4 * 14, 4))
last = Permuted(conv, 0, 3, 1, 2)
many = seeded(nn.Conv2d(13, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 4))

TAKEN = {
    "images, channels first": (conv, (3, 8, 8), (3, 8, 8)),
    "images, channels last": (conv, (8, 8, 3), (3, 8, 8)),
    "thirteen bands, channels last": (many, (8, 8, 13), (13, 8, 8)),
    "a network that takes them last": (last, (8, 8, 3), (3, 8, 8)),
    "a network that takes them last, data first": (last, (3, 8, 8), (3, 8, 8)),
    "grey images": (grey, (8, 8), (1, 8, 8)),
    "grey images with an axis": (grey, (8, 8, 1), (1, 8, 8)),
    "grey images, flattened": (flat(64), (8, 8), (1, 8, 8)),
    "signals": (signal, (2, 16), (2, 16)),
    "sequences": (Recurrent(), (7, 5), (7, 5)),
    "volumes": (volume, (1, 6, 6, 6), (1, 6, 6, 6)),
    "volumes, channels last": (volume, (6, 6, 6, 1), (1, 6, 6, 6)),
    "volumes without an axis of channels": (volume, (6, 6, 6), (1, 6, 6, 6)),
    "volumes of three layers": (flat_layers, (3, 6, 6), (1, 3, 6, 6)),
    "signals without an axis of channels": (single, (16,), (1, 16)),
    "signals that alone pass for one without its batch": (viewed, (16,), (1, 16)),
    "rows": (flat(20), (20,), (20,)),
}


def assessed(net: object, x: object, y: object, layout: str | None = None, **declared: object) -> Result:
    data = holdfast.open_data((x, y), layout=layout)
    return holdfast.assess(net, data, "linf:0.02", "quick", doubts=False, **declared)


@pytest.mark.slow
@pytest.mark.parametrize("case", TAKEN)
def test_the_network_decides_the_layout(case: str, tmp_path: Path) -> None:
    net, stored, inner = TAKEN[case]
    x = np.random.default_rng(0).random((20, *stored), np.float32)
    tensor = torch.from_numpy(x)
    if stored != inner and len(stored) == len(inner):
        tensor = tensor.movedim(-1, 1)
    elif stored != inner:
        tensor = tensor[:, None]
    feed = tensor.movedim(1, -1) if net is last else tensor
    with torch.no_grad():
        y = net(feed).argmax(1).numpy()
    np.savez(tmp_path / "d.npz", x=x, y=y)
    found = holdfast.assess(net, tmp_path / "d.npz", "linf:0.02", "quick", doubts=False)
    assert found.metrics["clean_accuracy"].value == 1
    assert tuple(found.evidence.data["shape"]) == inner


@pytest.mark.parametrize("shape", [(8, 8, 3), (6, 6, 6, 3), (3, 8, 3)])
def test_layouts_with_different_outputs_are_refused_and_declared(shape: tuple[int, ...]) -> None:
    net = flat(int(np.prod(shape)))
    x = np.random.default_rng(0).random((20, *shape), np.float32)
    with torch.no_grad():
        kept, moved = (net(torch.from_numpy(v)).argmax(1).numpy() for v in (x, np.moveaxis(x, -1, 1).copy()))
    with pytest.raises(TargetError, match=r"layout='(asis|hwc)' .*, or give layout='(asis|hwc)' ") as refused:
        assessed(net, x, kept)
    assert "layout='asis'" in str(refused.value) and "100% of 20 examples right" in str(refused.value)
    for layout, y in (("asis", kept), ("chw", kept), ("hwc", moved)):
        assert assessed(net, x, y, layout=layout).metrics["clean_accuracy"].value == 1


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.uint8])
def test_a_tensor_keeps_its_layout_whatever_its_type(kind: torch.dtype) -> None:
    x = torch.rand(20, 8, 8, 3, generator=torch.Generator().manual_seed(0))
    x = (x * 255).to(kind) if kind == torch.uint8 else x.to(kind)
    net = flat(192).to(torch.float64 if kind == torch.float64 else torch.float32)
    with torch.no_grad():
        y = net(x.float() / 255 if kind == torch.uint8 else x).argmax(1)
    assert assessed(net, x, y).metrics["clean_accuracy"].value == 1


@pytest.mark.parametrize("net, shape", [(volume, (6, 6, 6)), (grey, (8, 8)), (single, (16,))])
def test_a_tensor_that_lacks_an_axis_of_channels_is_refused_with_it(
    net: nn.Module, shape: tuple[int, ...]
) -> None:
    with pytest.raises(TargetError, match=r"accepts one of shape \(1, .*as in x\[:, None\]"):
        assessed(net, torch.rand(20, *shape), torch.zeros(20, dtype=torch.int64))


def test_outputs_of_a_random_network_count_as_equal_for_equal_inputs() -> None:
    net = nn.Sequential(flat(64), nn.Threshold(-1e9, 0))
    noisy = lambda x: net(x) + 0.01 * torch.randn(len(x), 4)  # noqa: E731
    x = np.random.default_rng(0).random((20, 8, 8), np.float32)
    assert tuple(assessed(noisy, x, np.zeros(20, np.int64)).evidence.data["shape"]) == (1, 8, 8)


def test_the_model_keeps_its_mode_and_its_statistics() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), conv).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    holdfast.doctor(net, (np.random.default_rng(0).random((20, 8, 8, 3), np.float32), np.zeros(20, np.int64)))
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_patches_are_placed_on_images_with_the_channels_last() -> None:
    x = np.random.default_rng(0).random((20, 8, 8, 3), np.float32)
    with torch.no_grad():
        y = last(torch.from_numpy(x)).argmax(1).numpy()
    own = holdfast.assess(conv, (np.moveaxis(x, -1, 1), y), "patch:3x3", "quick", doubts=False)
    other = holdfast.assess(last, (x, y), "patch:3x3", "quick", doubts=False)
    assert own.metrics["robust_accuracy"].value == other.metrics["robust_accuracy"].value


def test_surrogates_take_the_layout_that_they_can() -> None:
    x = np.random.default_rng(0).random((20, 3, 8, 8), np.float32)
    with torch.no_grad():
        y = conv(torch.from_numpy(x)).argmax(1).numpy()
    found = holdfast.assess(
        conv, (x, y), "linf:0.1,access=none", surrogates=[Permuted(conv, 0, 3, 1, 2)], doubts=False
    )
    assert found.metrics["robust_accuracy"].value < 1


@pytest.mark.slow
def test_a_channel_mean_applies_whatever_the_layout() -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    x = np.random.default_rng(0).random((20, 8, 8, 3), np.float32)
    first = torch.from_numpy(x).movedim(-1, 1)
    with torch.no_grad():
        y = Classifier(conv, mean=mean, std=std)(first).argmax(1).numpy()
    z = ((x - mean) / std).astype(np.float32)
    for net, options in ((conv, {}), (last, {}), (last, {"layout": "asis"})):
        for data, declared in ((x, {"mean": mean, "std": std}), (z, {"data_normalised": (mean, std)})):
            found = assessed(net, data, y, **declared, **options)
            assert found.metrics["clean_accuracy"].value == 1


def test_what_no_layout_fits_is_refused_with_what_was_tried() -> None:
    x = np.random.default_rng(0).random((20, 9, 9), np.float32)
    with pytest.raises(TargetError, match=r"none of the shapes \(1, 9, 9\), \(9, 9\).*layout="):
        assessed(grey, x, np.zeros(20, np.int64))
    with pytest.raises(UsageError, match="the layout hwc is for images"):
        assessed(flat(20), x.reshape(20, -1)[:, :20], np.zeros(20, np.int64), layout="hwc")
