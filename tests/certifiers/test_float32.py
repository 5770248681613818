"""Certificates for networks as they are computed in float32, in any order of summation."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import holdfast
from holdfast import Batch, Classifier, Linf, ThreatModel
from holdfast.certifiers import register
from holdfast.certifiers.bounds import operators
from holdfast.certifiers.branching import AlphaCrown, BranchAndBound
from holdfast.certifiers.protocol import Proofs
from holdfast.certifiers.provers import IBP, Crown, CrownIBP, GraphProver, prepared_graph
from holdfast.core.catalogue import Arithmetic
from holdfast.core.errors import NoBounds, UsageError
from holdfast.reports.certification import section

PROVERS: list[Callable[[Arithmetic], GraphProver]] = [
    IBP,
    CrownIBP,
    lambda kind: Crown(arithmetic=kind),
    lambda kind: AlphaCrown(arithmetic=kind),
    lambda kind: BranchAndBound(timeout_s=1, arithmetic=kind),
]
KINDS: tuple[Arithmetic, Arithmetic] = ("exact", "float32")


class InSomeOrder(nn.Linear):
    """A linear layer in evaluation mode; in training mode its products are summed one after another, in a random order
    for each row.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        terms = torch.cat((x[:, None] * self.weight, self.bias[None, :, None].expand(len(x), -1, -1)), 2)
        terms = terms.gather(2, torch.rand_like(terms).argsort(2))
        total = torch.zeros_like(terms[..., 0])
        for k in range(terms.shape[2]):
            total = total + terms[..., k]
        return total


def cancelling(activation: nn.Module, last: nn.Module, size: float) -> nn.Sequential:
    """A network whose logits are small sums of large products, and depend little on the input."""
    first, second = InSomeOrder(1, 24), InSomeOrder(24, 2)
    with torch.no_grad():
        first.weight.mul_(1e-3)
        first.bias.normal_()
        second.weight.normal_().mul_(size)
        first.weight[0], first.bias[0] = 0.5, 0.25  # the lead of class 0 is the input times the size
        second.weight[:, 0] = torch.tensor([2 * size, 0.0])
        exact = deepcopy(nn.Sequential(first, activation, second)).double()(torch.zeros(1, 1).double())
        second.bias[0] -= float(exact[0, 0] - exact[0, 1])
    return nn.Sequential(first, activation, second, last).eval()


def proofs(net: nn.Module, x: Tensor, prover: GraphProver, eps: float = 1e-9) -> Proofs:
    model = Classifier(net).eval()
    batch = Batch(x, torch.zeros(len(x), dtype=torch.long), torch.arange(len(x)))
    return prover.on(prepared_graph(model, batch), model, ThreatModel(Linf(eps)))(batch)


@pytest.mark.parametrize(
    ("activation", "last"),
    [
        (nn.ReLU(), nn.Identity()),
        (nn.Tanh(), nn.Softmax(1)),
        (nn.GELU(), nn.LogSoftmax(1)),
        (nn.Hardtanh(), nn.Identity()),
    ],
)
def test_no_order_of_summation_changes_the_class_of_a_certified_network(
    activation: nn.Module, last: nn.Module
) -> None:
    torch.manual_seed(0)
    x, threat = torch.logspace(-7, -2.5, 14)[:, None], ThreatModel(Linf(1e-9))
    changed = torch.zeros(2, dtype=torch.long)
    for size in (1.0, 1e3):
        net = cancelling(activation, last, size)
        model = Classifier(net).eval()
        batch = Batch(x, torch.zeros(len(x), dtype=torch.long), torch.arange(len(x)))
        batch = batch.take(net(x).argmax(1) == 0)
        graph = prepared_graph(model, batch)
        net.train()
        logits = torch.stack([net(one.expand(400, -1)) for one in batch.x])
        net.eval()
        wrong = (logits.argmax(2) != 0).any(1)
        for prover in PROVERS:
            exact, single = (prover(kind).on(graph, model, threat)(batch).certified for kind in KINDS)
            assert not (wrong & single).any()
            assert single.any()
            changed[0] += (wrong & exact).sum()
            changed[1] += wrong.sum()
    assert changed[0] > 0, changed


def test_a_network_is_certified_in_exact_arithmetic_whose_class_depends_on_the_order() -> None:
    first, last = InSomeOrder(1, 2), InSomeOrder(2, 2)
    with torch.no_grad():
        first.weight.zero_()
        first.bias.copy_(torch.tensor([2.0**24, 1.0]))
        # 2^24 + 1 - 2^24 is 0 or 1 in float32
        last.weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
        last.bias.copy_(torch.tensor([-(2.0**24), 0.5]))
    net, x = nn.Sequential(first, nn.ReLU(), last).double().eval(), torch.rand(1, 1, dtype=torch.float64)
    assert bool(proofs(net, x, Crown()).certified)
    single = net.float()
    assert not bool(proofs(single, x.float(), BranchAndBound(arithmetic="float32")).certified)
    torch.manual_seed(0)
    assert sorted(set(single.train()(x.float().expand(100, -1)).argmax(1).tolist())) == [0, 1]


def test_logits_with_the_same_probability_are_not_certified() -> None:
    net = nn.Sequential(nn.Linear(1, 2), nn.Softmax(1))
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.copy_(torch.tensor([1e-8, 0.0]))
    x = torch.rand(1, 1)
    assert net(x)[0, 0] == net(x)[0, 1]
    assert bool(proofs(net, x, Crown()).certified)
    assert not bool(proofs(net, x, Crown(arithmetic="float32")).certified)
    assert not bool(proofs(net, x, IBP("float32")).certified)


def test_a_sum_that_overflows_in_float32_is_not_certified_in_double_precision() -> None:
    net = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 2))
    with torch.no_grad():
        net[0].weight.fill_(1e30)
        net[0].bias.fill_(1e30)
        net[1].weight.copy_(torch.tensor([[1e20, 0.0], [0.0, 1e19]]))
    net, x = net.double().requires_grad_(requires_grad=False), torch.ones(1, 1, dtype=torch.float64)
    graph = prepared_graph(Classifier(net).eval(), Batch(x, *[torch.zeros(1, dtype=torch.long)] * 2))
    assert bool((graph.intervals((x, x))[-1][0] > 1e48).all())
    assert bool((graph.in_float32().intervals((x, x))[-1][0] == -torch.inf).all())


def test_batch_norm_may_be_joined_with_the_layer_before() -> None:
    torch.manual_seed(1)
    layer, norm, last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
    with torch.no_grad():
        norm.running_mean.normal_().mul_(100)
        norm.running_var.uniform_(1e-4, 1e-2)
    x = torch.rand(200, 6)
    graph = prepared_graph(
        Classifier(nn.Sequential(layer, norm, last).eval()), Batch(x, *[torch.arange(200)] * 2)
    )
    low, high = graph.in_float32().intervals((x, x))[-1]
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    joined = F.linear(x, layer.weight * scale[:, None], (layer.bias - norm.running_mean) * scale + norm.bias)
    outputs = last(joined)
    assert bool(((low <= outputs) & (outputs <= high)).all())


def test_what_has_no_known_error_in_float32_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(2, 1, 4, 4)
    net = nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Flatten(), nn.Linear(64, 2))
    with pytest.raises(
        NoBounds, match="rounding error in float32 is not known for the operation aten.upsample_bilin"
    ):
        proofs(net, x, Crown(arithmetic="float32"))
    monkeypatch.setitem(operators.TRANSLATIONS, "aten.asinh", None)  # restored after the test
    with pytest.raises(
        NoBounds, match=r"0.weight of the model is torch.float64; convert the network with net.float"
    ):
        proofs(
            nn.Sequential(nn.Linear(3, 2)).double(), torch.rand(2, 3).double(), Crown(arithmetic="float32")
        )
    normed = nn.Sequential(nn.Unflatten(1, (1, 3)), nn.InstanceNorm1d(1), nn.Flatten(), nn.Linear(3, 2))
    with pytest.raises(
        NoBounds, match="error in float32 is not known for the operation aten.native_batch_norm"
    ):
        proofs(normed, torch.rand(2, 3), Crown(arithmetic="float32"))
    register("aten.asinh", torch.asinh, 1.0)
    of_user = nn.Sequential(nn.Linear(3, 4), Asinh(), nn.Linear(4, 2))
    with pytest.raises(NoBounds, match=r"not known for the operation aten.asinh"):
        proofs(of_user, torch.rand(2, 3), Crown(arithmetic="float32"))


class Asinh(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.asinh(x)


def test_a_run_states_the_arithmetic_of_its_certificates() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.rand(4, 3)
    given: dict[str, Any] = {"threat": "linf:0.0001", "examples": False}
    for arithmetic, text in (("exact", "in exact arithmetic"), ("float32", "as it is computed in float32")):
        result = holdfast.certify(net, (x, net(x).argmax(1)), arithmetic=arithmetic, **given)
        assert {record.arithmetic for record in result.evidence.proofs} == {arithmetic}
        assert text in str(section(result.summary()).blocks)
    with pytest.raises(UsageError, match="method is lipschitz, which bounds no operations of a network"):
        holdfast.certify(
            net, (x, net(x).argmax(1)), arithmetic="float32", method="lipschitz", threat="l2:0.1"
        )
