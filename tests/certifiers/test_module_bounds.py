"""Bounds of modules and of their layers in Python."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import holdfast
from holdfast.core.errors import UsageError


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.Tanh())
        self.head, self.unused = nn.Linear(8, 3), nn.Linear(2, 2)
        self.several = Pair()

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.several(self.encoder(x).flatten(1))
        return self.head(first - second)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, 0.5 * x


def inside(x: Tensor, eps: float, norm: str) -> Tensor:
    """Points (200, n, *shape) of the balls, most of them on the boundary."""
    step = torch.randn(200, *x.shape, dtype=x.dtype)
    flat = step.flatten(2)
    if norm == "linf":
        return x + eps * step.sign()
    if norm == "l1":
        flat = flat * (flat.abs() == flat.abs().amax(2, keepdim=True))
    return x + eps * (flat / flat.norm(dim=2, p=2 if norm == "l2" else 1, keepdim=True)).view_as(step)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("method", ["ibp", "crown", "alpha-crown"])
def test_values_of_every_layer_are_inside_intervals_and_linear_bounds(norm: Any, method: Any) -> None:
    torch.manual_seed(0)
    net, x, eps = Encoder().double().eval(), torch.rand(3, 1, 4, 4, dtype=torch.float64), 0.2
    result = holdfast.bounds(net, x, eps, norm=norm, method=method)
    points = inside(x, eps, norm)
    values: dict[str, Tensor] = {}
    hooks = [
        net.get_submodule(name).register_forward_hook(lambda _, __, y, name=name: values.update({name: y}))
        for name in ("encoder.0", "encoder.1", "encoder")
    ]
    values[""] = net(points.flatten(0, 1))
    for hook in hooks:
        hook.remove()
    for name, value in values.items():
        layer = result[name] if name else result
        y = value.detach().unflatten(0, (200, 3))
        assert (y >= layer.lower).all()
        assert (y <= layer.upper).all()
        lines, dims = layer.linear, tuple(range(y.dim(), y.dim() + 3))
        rows = points.view(200, 3, *(1,) * (y.dim() - 2), 1, 4, 4)
        low, high = ((a * rows).sum(dims) for a in (lines.lower_coefficients, lines.upper_coefficients))
        assert (low + lines.lower_constants <= y + 1e-12).all()
        assert (high + lines.upper_constants >= y - 1e-12).all()
        if name == "encoder.0":  # a linear function is bounded exactly
            assert (high + lines.upper_constants - low - lines.lower_constants).abs().max() < 1e-9
    if norm == "linf":
        exact = holdfast.bounds(net.encoder[0], x, eps, norm=norm, method=method)
        assert torch.allclose(exact.lower, result["encoder.0"].lower)


def test_optimised_bounds_are_tighter_and_an_eps_for_each_feature_is_used() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2), nn.Softmax(1)
    ).eval()
    x = torch.rand(5, 4)
    widths = []
    for method in ("ibp", "crown", "alpha-crown"):
        found = holdfast.bounds(net[:5], x, 0.3, method=method)
        widths.append(float((found.upper - found.lower).mean()))
    assert widths[0] > 1.1 * widths[1]
    assert widths[1] > 1.01 * widths[2]
    fixed = holdfast.bounds(net[:5], x, torch.tensor([0.3, 0.0, 0.0, 0.3]))
    assert float((fixed.upper - fixed.lower).mean()) < 0.9 * widths[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"eps": torch.ones(3)},
            r"eps has the shape \(3,\); expected a number or a tensor that broadcasts to \(4,\)",
        ),
        ({"eps": torch.ones(4), "norm": "l2"}, r"eps has the shape \(4,\); expected a number, as x has"),
        ({"eps": -0.1}, "eps is -0.1; it must be 0 or more"),
        ({"norm": "l0"}, "norm is 'l0'; expected one of linf, l2, l1"),
        ({"method": "beta"}, "method is 'beta'; expected one of ibp, crown, alpha-crown"),
        ({"x": torch.rand(4)}, r"x has the shape \(4,\)"),
        ({"module": nn.Linear(4, 2)}, r"the module is in training mode, .*module.eval"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"module": nn.Linear(4, 2).eval(), "x": torch.rand(2, 4), "eps": 0.1}
    with pytest.raises(UsageError, match=message):
        holdfast.bounds(**{**given, **change})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("encodr.0", "no submodule 'encodr.0'; did you mean 'encoder.0'"),
        ("unused", "'unused' is not called in a forward pass"),
        ("several", "'several' returns tuple; bounds are those of a tensor"),
    ],
)
def test_a_layer_without_a_tensor_is_refused(name: str, message: str) -> None:
    result = holdfast.bounds(Encoder().eval(), torch.rand(2, 1, 4, 4), 0.1)
    with pytest.raises(UsageError, match=message):
        result[name]
