"""Bounds of networks with products, norms, attention and recurrent layers: sound, and tight in small regions."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import holdfast
from holdfast import Batch, Classifier, Linf, ThreatModel
from holdfast.certifiers.bounds.crown import NO_CHOICES, Choices, relaxed, substitute
from holdfast.certifiers.bounds.graph import Graph, Region, region_of
from holdfast.certifiers.bounds.operations import Curved, Linear, Product
from holdfast.certifiers.bounds.tracing import traced
from holdfast.certifiers.branching import AlphaCrown, BranchAndBound
from holdfast.certifiers.provers import IBP, Crown, CrownIBP
from holdfast.core.errors import NoBounds
from holdfast.core.model import Bounds


class Calling(nn.Module):
    """A linear function of the values of a function."""

    def __init__(self, function: Callable[[Tensor], Tensor], values: int) -> None:
        super().__init__()
        self.function, self.last = function, nn.Linear(values, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(x).flatten(1))


class Recurrent(nn.Module):
    """The last state of a recurrent layer."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer
        self.last = nn.Linear(layer.hidden_size * (2 if layer.bidirectional else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(x)[0][:, -1])


class Encoder(nn.Module):
    """A layer of a transformer, with the batch as the first or the second dimension, and a mask."""

    def __init__(
        self, layer: nn.TransformerEncoderLayer, mask: Tensor | None = None, *, second: bool = False
    ) -> None:
        super().__init__()
        self.layer, self.mask, self.second, self.last = layer, mask, second, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1) if self.second else x
        return self.last(self.layer(x, src_mask=self.mask).mean(0 if self.second else 1))


class VisionTransformer(nn.Module):
    """Patches with a class token and position embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm, self.last = nn.Conv2d(1, 8, 4, 4), nn.LayerNorm(8), nn.Linear(8, 3)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.layer = nn.TransformerEncoderLayer(
            8, 2, 16, batch_first=True, norm_first=True, activation="gelu"
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.patches(x).flatten(2).transpose(1, 2)
        y = torch.cat((self.token.expand(len(x), -1, -1), y), 1) + self.positions
        return self.last(self.norm(self.layer(y)[:, 0]))


class JoinedHeads(nn.Module):
    """Attention as users write it, with heads that are joined with the batch and a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.last = nn.Linear(6, 18), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q, k, v = (
            part.view(n, tokens, 2, 3).transpose(1, 2).reshape(n * 2, tokens, 3)
            for part in self.all(x).chunk(3, -1)
        )
        later = torch.ones(tokens, tokens).triu(1).bool()
        weights = (torch.bmm(q, k.transpose(1, 2)) / math.sqrt(3)).masked_fill(later, -math.inf).softmax(-1)
        y = torch.bmm(weights, v).view(n, 2, tokens, 3).transpose(1, 2).reshape(n, tokens, width)
        return self.last(y.mean(1))


def padded(x: Tensor) -> Tensor:
    """Attention in which some tokens have a large negative score."""
    mask = torch.zeros(5, 5)
    mask[:, 3:], mask[0, 1] = -1e9, -math.inf
    y: Tensor = F.scaled_dot_product_attention(x, x, x, attn_mask=mask)
    return y


def encoder(**settings: object) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **settings)  # type: ignore[arg-type]


def joined(*layers: nn.Module, values: int) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(values, 3))


CAUSAL = nn.Transformer.generate_square_subsequent_mask(5)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "products": (
        lambda: Calling(lambda x: torch.cat((x[:, :3] * x[:, 3:], x * x[:, :1], x * x), 1), 15),
        (6,),
    ),
    "divisions": (lambda: Calling(lambda x: x[:, :3] / (x[:, 3:] + 1) - 1 / (x[:, :3] + 0.5), 3), (6,)),
    "powers": (
        lambda: Calling(lambda x: (x - 0.5) ** 2 + (x - 0.3) ** 3 + (x + 1) ** 0.5 + (x + 1) ** -2, 6),
        (6,),
    ),
    "functions": (
        lambda: Calling(lambda x: x.exp() + (x + 0.5).log() + (x + 0.2).sqrt() + (x + 0.4).rsqrt(), 6),
        (6,),
    ),
    "matrix products": (lambda: Calling(lambda x: (x @ x.transpose(1, 2)) @ torch.ones(5, 2), 10), (5, 4)),
    "constant on the left": (lambda: Calling(lambda x: torch.arange(15.0).view(3, 5) @ x, 12), (5, 4)),
    "one row": (lambda: Calling(lambda x: x[:, :1] @ x.transpose(1, 2), 5), (5, 4)),
    "einsum": (
        lambda: Calling(
            lambda x: torch.einsum("bthd,bshd->bhts", x.view(-1, 5, 2, 2), x.flip(1).view(-1, 5, 2, 2)), 50
        ),
        (5, 4),
    ),
    "tokens": (lambda: joined(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4), values=20), (5, 4)),
    "softmax": (lambda: joined(nn.Linear(6, 8), nn.Softmax(1), values=8), (6,)),
    "softmax of tokens": (lambda: Calling(lambda x: x.softmax(1) - x.log_softmax(2), 20), (5, 4)),
    "layer norm": (lambda: joined(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), values=8), (6,)),
    "layer norm of all": (lambda: joined(nn.LayerNorm((5, 4)), values=20), (5, 4)),
    "group norm": (lambda: joined(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), values=64), (2, 6, 6)),
    "instance norm": (
        lambda: joined(nn.Conv2d(2, 3, 3), nn.InstanceNorm2d(3, affine=True), values=48),
        (2, 6, 6),
    ),
    "rms norm": (lambda: joined(nn.Linear(6, 8), nn.RMSNorm(8), nn.ReLU(), values=8), (6,)),
    "lstm": (lambda: Recurrent(nn.LSTM(4, 5, batch_first=True)), (3, 4)),
    "gru": (lambda: Recurrent(nn.GRU(4, 5, batch_first=True, bidirectional=True)), (2, 4)),
    "encoder": (lambda: Encoder(encoder()), (5, 8)),
    "causal encoder": (lambda: Encoder(encoder(norm_first=True, activation="gelu"), CAUSAL), (5, 8)),
    "tokens first": (lambda: Encoder(nn.TransformerEncoderLayer(8, 2, 16), second=True), (5, 8)),
    "vision transformer": (VisionTransformer, (1, 8, 8)),
    "joined heads": (JoinedHeads, (4, 6)),
    "masked attention": (lambda: Calling(padded, 40), (5, 8)),
    "images of one example": (
        lambda: Calling(
            lambda x: F.max_pool2d(F.conv2d(x.view(-1, 1, 6, 6), torch.ones(2, 1, 3, 3)), 2).view(len(x), -1),
            24,
        ),
        (3, 6, 6),
    ),
    "squeezed": (lambda: Calling(lambda x: F.adaptive_avg_pool2d(x, 1).squeeze() ** 2, 2), (2, 6, 6)),
    "factors of channels": (
        lambda: Calling(lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(), 72),
        (2, 6, 6),
    ),
}
"""factory and input shape of a network with each kind of operation"""
LOOSE = {"causal encoder": 1.1, "masked attention": 1.6, "constant on the left": 1.0001}
"""largest ratio of the widths of the bounds and of the outputs in a small region, if it is not 1.05. With scores of
-1e9, descent finds no better inputs than random ones, because exponentials overflow in the graph.
"""


def network(name: str, n: int = 2) -> tuple[Classifier, Tensor, Graph]:
    """A network with random weights, inputs, and its graph in float64."""
    make, shape = NETWORKS[name]
    torch.manual_seed(1)
    model = Classifier(make()).eval().requires_grad_(False)
    x = torch.rand(n, *shape)
    return model, x, traced(model, x).to(torch.float64)


def searched(graph: Graph, region: Region) -> Tensor:
    """Inputs of the region of the first example: random ones, corners, and those at which gradient descent ends for
    each output and its negative.
    """
    low, high = region.low[:1], region.high[:1]
    share = torch.rand(1000, *low.shape[1:], dtype=low.dtype)
    share[:500] = share[:500].round()
    x = low + share * (high - low)
    signs = torch.cat((torch.eye(3), -torch.eye(3))).to(low).repeat_interleave(8, 0)
    point = x[480:528].clone()
    for _ in range(12):
        with torch.enable_grad():
            point.requires_grad_()
            (slope,) = torch.autograd.grad((graph(point) * signs).sum(), point)
        point = torch.maximum(torch.minimum(point.detach() - slope.sign() * (high - low) / 4, high), low)
    return torch.cat((x, point))


@pytest.mark.parametrize("name", NETWORKS)
def test_bounds_contain_all_values_and_are_tight_in_a_small_region(name: str) -> None:
    _, x, graph = network(name)
    rows = torch.cat((torch.eye(3), -torch.eye(3)))[None].double()
    for eps in (0.1, 0.001):
        region = region_of(x.double(), Linf(eps), Bounds())
        values = graph.values(searched(graph, region))
        relaxation = relaxed(graph, region)
        for index, (low, high) in enumerate(graph.intervals(region.box)):
            for least, most in ((low, high), relaxation.bound(index)):
                assert (values[index] >= least[:1]).all(), (eps, graph.node(index).operation)
                assert (values[index] <= most[:1]).all(), (eps, graph.node(index).operation)
        reached = (values[-1] @ rows[0].t()).amin(0)
        for each in (relaxation, relaxed(graph, region, substituted=False)):
            assert (substitute(each, graph.output, rows).lower[0] <= reached).all()
    lower = substitute(relaxation, graph.output, rows).lower[0]
    width, exact = -(lower[:3] + lower[3:]).sum(), -(reached[:3] + reached[3:]).sum()
    assert width <= LOOSE.get(name, 1.05) * exact


@pytest.mark.parametrize("name", ["encoder", "vision transformer", "lstm", "softmax", "products"])
def test_single_precision_bounds_are_below_those_of_double_precision(name: str) -> None:
    model, x, graph = network(name)
    single = traced(model, x)
    region, rows = region_of(x, Linf(0.01), Bounds()), torch.eye(3)[None]
    lower = substitute(relaxed(single, region), single.output, rows).lower
    wide = region.to(torch.float64)
    exact = substitute(relaxed(graph, wide), graph.output, rows.double(), rounded=False).lower
    assert (lower <= exact + 1e-9).all()
    assert (lower >= exact - 2e-2).all()


def test_any_planes_of_products_are_sound() -> None:
    _, x, graph = network("joined heads")
    region = region_of(x.double(), Linf(0.1), Bounds())
    relaxation, rows = relaxed(graph, region), torch.eye(3)[None].double()
    reached = graph(searched(graph, region)).amin(0)
    shapes, usual = {}, {}
    for i in graph.nonlinear:
        operation = graph.node(i).operation
        if isinstance(operation, Product):
            joint = operation.joint_shape([graph.shape_of(j) for j in graph.node(i).inputs])
            shapes[i] = (2, 2, *joint)
            numbers = torch.tensor(operation.usual).double().view(1, 2, *[1] * len(joint))
            usual[i] = numbers.expand(shapes[i])
    plain = substitute(relaxation, graph.output, rows, NO_CHOICES).lower
    same = substitute(relaxation, graph.output, rows, Choices(planes=usual)).lower
    torch.testing.assert_close(plain, same, atol=1e-9, rtol=1e-9)
    for _ in range(5):
        chosen = {i: 2 * torch.rand(shape).double() - 1 for i, shape in shapes.items()}
        lower = substitute(relaxation, graph.output, rows, Choices(planes=chosen)).lower
        assert (lower[0] <= reached).all()


class Leaving(nn.Module):
    """Functions whose domain some regions leave."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu().sqrt() + (x.sum(1, keepdim=True) - 2).reciprocal()
        return self.last(y + (x[:, :1] - 0.3).log())


def test_an_example_whose_region_leaves_the_domain_is_unknown_and_others_are_certified() -> None:
    torch.manual_seed(0)
    model = Classifier(Leaving()).eval().requires_grad_(False)
    x = torch.rand(3, 6) * 0.2 + 0.6
    x[1, 0] = 0.302  # the logarithm is defined at the input, and not everywhere around it
    batch = Batch(x, model(x).argmax(1), torch.arange(3))
    for prover in (IBP(), CrownIBP(), Crown(), AlphaCrown(steps=2), BranchAndBound(timeout_s=2, steps=2)):
        proofs = prover.ready(model, batch, ThreatModel(Linf(0.003)))(batch)
        assert proofs.certified.tolist() == [True, False, True], prover
        assert set(proofs.undefined) == {1}
        assert proofs.undefined[1].startswith("aten.log, at "), prover


def test_a_normalisation_over_the_batch_is_found_with_one_sample() -> None:
    """Without running statistics, batch norm and instance norm are the same operation on one example."""
    traced(Classifier(joined(nn.InstanceNorm1d(5), values=30)).eval(), torch.rand(1, 5, 6))
    with pytest.raises(NoBounds, match="other examples of a batch"):
        traced(
            Classifier(joined(nn.BatchNorm1d(5, track_running_stats=False), values=30)).eval(),
            torch.rand(1, 5, 6),
        )


def test_constants_are_those_of_a_network_in_double_precision() -> None:
    x = torch.rand(2, 6, dtype=torch.float64)
    for function in (
        lambda x: F.leaky_relu(0.1 * x - 0.7, 0.3),
        lambda x: x.masked_fill(torch.arange(6) > 2, 0.7) / 0.9,
        lambda x: torch.rsub(x, 0.3, alpha=0.7) * x.var(1, keepdim=True),
    ):
        result = holdfast.bounds(function, x, 0.0)
        assert float((result.upper - result.lower).max()) < 1e-12
        assert bool(((result.lower <= function(x)) & (function(x) <= result.upper)).all())


@pytest.mark.parametrize("start", [0.0, 1e-5])
def test_examples_that_depend_on_each_other_are_refused_near_zero(start: float) -> None:
    for function in (lambda x: x.roll(1, 0) + 0.5, lambda x: 2 * x - x.mean(0), lambda x: x + x.max()):
        with pytest.raises(NoBounds, match="on the other examples of a batch"):
            holdfast.bounds(function, torch.full((1, 4), start), 0.1)


def test_random_numbers_are_refused() -> None:
    def drawn(x: Tensor) -> Tensor:
        return x * torch.rand(4, generator=torch.Generator().manual_seed(0))

    with pytest.raises(NoBounds, match=r"the random operation aten\.rand"):
        holdfast.bounds(drawn, torch.rand(2, 4), 0.1)


def test_a_bound_is_known_at_the_end_of_a_domain_and_infinite_beyond() -> None:
    x = torch.tensor([[0.05, -0.3]])
    result = holdfast.bounds(lambda x: x.abs().sqrt(), x, 0.1)
    assert bool((result.upper < 0.7).all())
    result = holdfast.bounds(lambda x: 2 * (x - 0.02).log(), x.abs(), 0.1)
    assert result.lower[0].tolist()[0] == -torch.inf
    assert bool(result.lower[0, 1] > -4)


def test_the_bounds_of_a_logarithm_hold_in_a_region_of_one_rounding() -> None:
    low = torch.ones(1, 1)
    high = low.nextafter(torch.full_like(low, 2.0))
    logarithm = Curved(torch.log, torch.reciprocal, below=0, above=-1, at_zero=False)
    smallest, largest = logarithm.rounded_offsets(torch.zeros(1, 1), (low, high))
    assert float(smallest) <= 0.0
    assert float(largest) >= float(high.double().log())


LINEAR = {
    "dense": (nn.Linear(7, 3), (7,)),
    "stride": (nn.Conv2d(2, 4, 3, stride=2, padding=1), (2, 7, 7)),
    "long stride": (nn.Conv2d(1, 3, (2, 5), stride=(3, 2)), (1, 8, 9)),
    "dilation": (nn.Conv2d(2, 2, 3, stride=2, dilation=2, padding=2), (2, 9, 9)),
    "coprime dilation": (nn.Conv1d(1, 2, 4, stride=2, dilation=3), (1, 20)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 5, 5)),
    "transposed": (nn.ConvTranspose2d(3, 2, 3, stride=2, output_padding=1, padding=1), (3, 4, 4)),
    "transposed groups": (nn.ConvTranspose1d(4, 6, 4, stride=3, dilation=2, groups=2), (4, 5)),
}


@pytest.mark.parametrize("name", LINEAR)
def test_terms_are_at_least_the_products_in_one_sum(name: str) -> None:
    net, shape = LINEAR[name]
    graph = traced(Classifier(nn.Sequential(net, nn.Flatten())).eval(), torch.rand(1, *shape))
    operation = graph.node(1).operation
    assert isinstance(operation, Linear)
    one = torch.eye(graph.shape.numel()).view(-1, *shape)
    used = (operation(one) - operation(torch.zeros_like(one)))[:, None].flatten(1).abs() > 1e-7
    assert used.sum(0).max() <= operation.terms - (operation.bias is not None)
    assert used.sum(1).max() == operation.back_terms
