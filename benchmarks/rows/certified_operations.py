"""Bounds of random small networks that together use every operation, beside sampling, attacks, grids and a solver."""

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from functools import partial
from multiprocessing import get_context

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import Bounds as Box
from scipy.optimize import LinearConstraint, milp
from torch import Tensor, nn

from benchmarks.record import Cells, Claim, Outcome
from holdfast import Batch, Classifier, Linf, ThreatModel
from holdfast.certifiers.bounds import operations
from holdfast.certifiers.bounds.graph import Graph
from holdfast.certifiers.bounds.operators import TRANSLATIONS
from holdfast.certifiers.bounds.tracing import recording
from holdfast.certifiers.bounds.translator import operation_name
from holdfast.certifiers.branching import AlphaCrown, BranchAndBound
from holdfast.certifiers.objectives import margin_rows
from holdfast.certifiers.provers import IBP, Crown, CrownIBP, prepared_graph
from holdfast.core.errors import NoBounds
from holdfast.core.model import Bounds

WHAT = "300 random small networks with every operation that has bounds: no input below a bound"
NETWORKS, SAMPLES, SEARCH_S = 300, 4000, 2.0
STARTS, STEPS = 16, 60
"""starts and steps of the descent on the margin"""
TOLERANCE = 1e-12
"""difference by which a margin that is computed in float64 may be below a bound, relative to the largest logit"""

Function = Callable[[Tensor], Tensor]


class Custom(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """The function of x."""
        return self.function(x)


class Attention(nn.Module):
    """Scaled dot-product attention of a value (n, tokens, features) with itself."""

    def __init__(self, features: int, mask: Tensor | None = None) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(features, features) for _ in range(3))
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        """The values with the weights of attention."""
        return F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x), self.mask)


class Recurrent(nn.Module):
    """The last state of a recurrent layer over a value (n, steps, features)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """The outputs of all steps."""
        out: Tensor = self.layer(x)[0]
        return out


def _assigned(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] = 0.3
    y[:, :, 1:2] = x[:, :, :1]
    return y


def _of_vectors() -> dict[str, Callable[[], nn.Module]]:
    """Layers on values (n, 6)."""
    half = torch.tensor([True, False, True, True, False, True])
    named = [
        "ReLU",
        "LeakyReLU",
        "RReLU",
        "ELU",
        "SELU",
        "CELU",
        "Mish",
        "Hardswish",
        "Hardsigmoid",
        "Softsign",
        "LogSigmoid",
        "Softplus",
        "GELU",
        "SiLU",
        "Tanh",
        "Sigmoid",
        "Softshrink",
        "Tanhshrink",
        "ReLU6",
        "Hardtanh",
        "PReLU",
        "Softmin",
    ]
    functions: dict[str, Function] = {
        "abs": torch.abs,
        "clamp": lambda x: x.clamp(-0.5, 1),
        "clamp below": lambda x: x.clamp(min=0.1),
        "clamp above": lambda x: torch.clamp_max(x, 0.3),
        "clamp by tensors": lambda x: x.clamp(-half.to(x), half.to(x)),
        "threshold": lambda x: F.threshold(x, 0.0, 0.0),
        "sine": torch.sin,
        "cosine": torch.cos,
        "atan": torch.atan,
        "erf": torch.erf,
        "exp": torch.exp,
        "exp less 1": torch.expm1,
        "log": lambda x: (x * x + 0.3).log(),
        "log of 1 more": lambda x: (x * x).log1p(),
        "root": lambda x: (x.abs() + 0.2).sqrt(),
        "inverse root": lambda x: (x.square() + 0.5).rsqrt(),
        "reciprocal": lambda x: torch.reciprocal(2 + x.tanh()),
        "quotient": lambda x: x / (1.5 + x.sin()),
        "cube": lambda x: x**3,
        "power": lambda x: (x.abs() + 0.1) ** 1.5,
        "minimum": lambda x: torch.minimum(x, x.flip(1)),
        "maximum": lambda x: torch.maximum(x, -0.5 * x),
        "maximum with a constant": lambda x: torch.maximum(x, half.to(x)),
        "where": lambda x: torch.where(half, x, 2 * x),
        "masked": lambda x: x.masked_fill(half, 0.7),
        "product": lambda x: x * torch.sigmoid(1.7 * x),
        "softmax": lambda x: F.softmax(x, 1),
        "log softmax": lambda x: F.log_softmax(x, 1),
        "norm": lambda x: F.normalize(x + 2, dim=1),
        "deviation": lambda x: x / (0.3 + x.std(1, keepdim=True)),
        "variance": lambda x: x * x.var(1, keepdim=True),
        "difference": lambda x: 1 - x,
        "negative": lambda x: -x - 0.2 * x,
        "quotient by a constant": lambda x: x / 3,
        "sum": lambda x: x + x.sum(1, keepdim=True),
        "gated": lambda x: F.glu(x, 1),
        "mean": lambda x: x - x.mean(1, keepdim=True),
        "cumulated": lambda x: x.cumsum(1),
        "stacked": lambda x: torch.stack((x, x.relu()), 1),
        "joined": lambda x: torch.cat((x, x.new_zeros(len(x), 2), -x), 1),
        "rolled": lambda x: x.roll(2, 1),
        "repeated": lambda x: x.repeat(1, 2),
        "chosen": lambda x: x[:, [3, 0, 0, 5]],
        "split": lambda x: x[:, :2] * x.split(2, 1)[1],
        "uneven split": lambda x: x.split([2, 4], 1)[1],
        "unbound": lambda x: x.unbind(1)[0][:, None] * x,
        "gathered": lambda x: x.gather(1, torch.zeros(len(x), 2, dtype=torch.long)),
        "selected": lambda x: x.index_select(1, torch.tensor([1, 4])),
        "part": lambda x: x[:, 1:4] * x[:, 3:],
        "expanded": lambda x: x[:, :1].expand(-1, 4),
        "squares": torch.square,
        "with a vector": lambda x: (x @ half.to(x))[:, None],
        "outer": lambda x: torch.einsum("ni,nj->nij", x, x),
    }
    made = {name: getattr(nn, name) if name != "Softmin" else partial(nn.Softmin, 1) for name in named}
    smooth = {
        "sharp softplus": partial(nn.Softplus, 3.0),
        "GELU of tanh": partial(nn.GELU, "tanh"),
        "steep ELU": partial(nn.ELU, 1.7),
        "RMS norm": partial(nn.RMSNorm, 6),
        "layer norm": partial(nn.LayerNorm, 6),
        "batch norm": partial(nn.BatchNorm1d, 6),
        "no offset": partial(nn.Linear, 6, 4, bias=False),
    }
    return {**made, **smooth, **{name: partial(Custom, f) for name, f in functions.items()}}


def _of_tokens() -> dict[str, Callable[[], nn.Module]]:
    """Layers on values (n, 3, 4)."""
    causal = torch.ones(3, 3, dtype=torch.bool).tril()
    return {
        "linear on tokens": partial(nn.Linear, 4, 4),
        "layer norm of tokens": partial(nn.LayerNorm, 4),
        "attention": partial(Attention, 4),
        "masked attention": partial(Attention, 4, causal),
        "several heads": partial(nn.TransformerEncoderLayer, 4, 2, 6, dropout=0.0, batch_first=True),
        "norm first": partial(
            nn.TransformerEncoderLayer, 4, 1, 6, 0.0, F.gelu, batch_first=True, norm_first=True
        ),
        "LSTM": lambda: Recurrent(nn.LSTM(4, 3, batch_first=True)),
        "GRU": lambda: Recurrent(nn.GRU(4, 3, batch_first=True)),
        "RNN": lambda: Recurrent(nn.RNN(4, 3, batch_first=True)),
        "product of matrices": lambda: Custom(lambda x: x @ x.transpose(1, 2)),
        "einsum": lambda: Custom(lambda x: torch.einsum("nij,nkj->nik", x, x.tanh())),
        "matrix on the left": lambda: Custom(lambda x: torch.ones(2, 3).to(x) @ x.relu()),
        "instance norm of sequences": partial(nn.InstanceNorm1d, 3),
        "sequence": lambda: nn.Sequential(nn.Conv1d(3, 2, 3, padding=1), nn.ReLU(), nn.MaxPool1d(2)),
        "transposed sequence": partial(nn.ConvTranspose1d, 3, 2, 3, 2),
        "replicated sequence": partial(nn.ReplicationPad1d, 2),
        "average of sequences": partial(nn.AvgPool1d, 2),
        "largest of sequences": partial(nn.AdaptiveMaxPool1d, 3),
        "reflected sequence": partial(nn.ReflectionPad1d, 2),
    }


def _of_images() -> dict[str, Callable[[], nn.Module]]:
    """Layers on values (n, 2, 4, 4)."""
    functions: dict[str, Function] = {
        "largest of channels": lambda x: x.amax(1),
        "largest of rows": lambda x: x.max(2).values,
        "smallest": lambda x: x.amin((2, 3)),
        "smallest of columns": lambda x: x.min(3).values,
        "largest of all": lambda x: x.flatten(1).amax(1, keepdim=True),
        "assigned": _assigned,
        "volume": lambda x: F.max_pool3d(x[:, None], (1, 2, 2)),
        "average volume": lambda x: F.avg_pool3d(x[:, None], (2, 2, 1)),
        "windows": lambda x: F.unfold(x, 2),
        "adaptive volume": lambda x: F.adaptive_avg_pool3d(x[:, None], (1, 2, 3)),
        "shuffled": lambda x: F.pixel_shuffle(x.repeat(1, 2, 1, 1), 2),
        "reflected volume": lambda x: F.pad(x[:, None], (1, 1, 1, 0, 1, 0), mode="reflect"),
        "replicated volume": lambda x: F.pad(x[:, None], (1, 0, 0, 2, 1, 1), mode="replicate"),
        "unshuffled": lambda x: F.pixel_unshuffle(x, 2),
        "constant border": lambda x: F.pad(x, (1, 1, 0, 2), value=0.4),
        "adaptive maxima of volumes": lambda x: F.adaptive_max_pool3d(x[:, None], (2, 3, 2)),
        "square": lambda x: x.square(),
        "moved": lambda x: x.permute(0, 3, 1, 2).transpose(1, 2),
    }
    return {
        "convolution": partial(nn.Conv2d, 2, 3, 3, stride=2, padding=1),
        "groups": partial(nn.Conv2d, 2, 4, 2, groups=2, dilation=2),
        "circular convolution": partial(nn.Conv2d, 2, 2, 3, padding=1, padding_mode="circular"),
        "transposed convolution": partial(nn.ConvTranspose2d, 2, 3, 3, stride=2, padding=1, output_padding=1),
        "max pool": partial(nn.MaxPool2d, 2),
        "max pool with ceil": partial(nn.MaxPool2d, 3, 2, ceil_mode=True),
        "average pool with ceil": partial(nn.AvgPool2d, 3, 2, 1, ceil_mode=True),
        "adaptive average": partial(nn.AdaptiveAvgPool2d, 3),
        "adaptive maxima": partial(nn.AdaptiveMaxPool2d, 3),
        "reflection": partial(nn.ReflectionPad2d, (1, 2, 3, 0)),
        "replication": partial(nn.ReplicationPad2d, (2, 1, 0, 3)),
        "zeros": partial(nn.ZeroPad2d, 1),
        "nearest": partial(nn.Upsample, scale_factor=2),
        "bilinear": partial(nn.UpsamplingBilinear2d, scale_factor=2),
        "group norm": partial(nn.GroupNorm, 1, 2),
        "instance norm": partial(nn.InstanceNorm2d, 2, affine=True),
        "batch norm of images": partial(nn.BatchNorm2d, 2),
        **{name: partial(Custom, f) for name, f in functions.items()},
    }


LAYERS: tuple[tuple[tuple[int, ...], dict[str, Callable[[], nn.Module]]], ...] = (
    ((6,), _of_vectors()),
    ((3, 4), _of_tokens()),
    ((2, 4, 4), _of_images()),
)
"""shapes of values, and the layers on them by name"""
NAMES = [(shape, name) for shape, layers in LAYERS for name in layers]


class Network(nn.Module):
    """Linear layers, with one layer of the list and another function between them."""

    def __init__(self, shape: tuple[int, ...], layer: nn.Module, features: int, after: nn.Module) -> None:
        super().__init__()
        self.first, self.layer, self.after, self.shape = (
            nn.Linear(features, int(np.prod(shape))),
            layer,
            after,
            shape,
        )
        with torch.no_grad():
            out = self.after(layer(torch.zeros(2, *shape)).flatten(1)).shape[1]
        self.last = nn.Linear(out, 3)

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        value = self.first(x).unflatten(1, self.shape)
        return self.last(self.after(self.layer(value).flatten(1)))


def case(seed: int) -> tuple[str, Classifier, Tensor, float]:
    """A network in float64 by its number, with the name of its layer, an input and eps. The layers take turns."""
    shape, name = NAMES[seed % len(NAMES)]
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        layer = dict(LAYERS)[shape][name]().eval()
        after = (nn.Identity(), nn.ReLU(), nn.Tanh())[int(torch.randint(3, ()))]
        features = int(torch.randint(1, 6, ()))
        net = Network(shape, layer, features, after).double().eval()
        net.first.weight.data.mul_(3.0)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_mean.uniform_(-1, 1), module.running_var.uniform_(0.5, 2)
        x = torch.rand(1, features, dtype=torch.float64)
        eps = 10 ** float(-3 + 2.5 * torch.rand(()))
    return name, Classifier(net).eval().requires_grad_(False), x, eps


def measured() -> Outcome:
    return outcome(NETWORKS, SAMPLES)


def outcome(n: int, samples: int) -> Outcome:
    """The row, with so many networks and sampled inputs for each."""
    totals: Counter[str] = Counter()
    used: set[str] = set()
    wrong: list[Cells] = []
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), torch.set_num_threads, (1,)) as processes:
        for judged in processes.map(partial(_judged, samples=samples), range(n), chunksize=5):
            used.update(judged["operations"])
            totals.update(judged["checks"])
            wrong += judged["wrong"]
    unused = sorted(set(TRANSLATIONS) - used - ALIASES)
    table = [{"check": name, "bounds": count} for name, count in totals.items()]
    claims = [
        Claim("bounds that an input is below <= 0", len(wrong), 0),
        Claim("operations with bounds that no network uses <= 0", len(unused), 0),
    ]
    config: Cells = {"networks": n, "samples": samples, "seeds": "0 to n - 1"}
    return Outcome(table, claims, config, {"wrong": wrong, "operations": sorted(used), "unused": unused})


ALIASES = {
    f"aten.{name}"
    for name in (
        "_native_batch_norm_legit_no_training",
        "_safe_softmax",
        "_unsafe_view",
        "adaptive_max_pool3d",
        "alias",
        "baddbmm",
        "copy",
        "cudnn_batch_norm",
        "detach",
        "fill",
        "native_batch_norm",
        "reshape",
        "square",
        "unsafe_split",
        "zeros_like",
    )
}
"""other names of operations, which torch records on other devices or in other versions"""


def _judged(seed: int, samples: int) -> Cells:
    """What was checked about one network, and bounds that an input is below."""
    name, model, x, eps = case(seed)
    y = model(x).argmax(1)
    batch, threat = Batch(x, y, torch.tensor([seed])), ThreatModel(Linf(eps))
    graph = prepared_graph(model, batch)
    lowest = {"samples and descent": _attacked(model, x, y, eps, samples)}
    if x.shape[1] <= 2:
        lowest["grid"] = _on_grid(model, x, y, eps)
    if (solved := _solved(graph, x, y, eps)) is not None:
        lowest["solver"] = solved
    checks: Counter[str] = Counter()
    wrong = []
    allowed = TOLERANCE * max(1.0, float(model(x).abs().max()))
    for prover in (IBP(), CrownIBP(), Crown(), AlphaCrown(SEARCH_S, 8), BranchAndBound(SEARCH_S, 8)):
        proofs = prover.on(graph, model, threat)(batch)
        for check, value in lowest.items():
            checks[f"{check}, {prover.name}"] += 1
            if float(proofs.bound) > value + allowed or (bool(proofs.certified) and value < -allowed):
                wrong.append(
                    {
                        "seed": seed,
                        "layer": name,
                        "method": prover.name,
                        "check": check,
                        "bound": float(proofs.bound),
                        "lowest": value,
                    }
                )
    if (found := _float32(model, x, eps, samples)) is not None:
        checks["samples and descent in float32, crown"] += 1
        bound, value = found
        if bound > value:
            wrong.append(
                {
                    "seed": seed,
                    "layer": name,
                    "method": "crown",
                    "check": "float32",
                    "bound": bound,
                    "lowest": value,
                }
            )
    else:
        checks["refused in float32"] += 1
    recorded = recording(model, x).module.graph.nodes
    names = [operation_name(node.target) for node in recorded if node.op == "call_function"]
    return {"checks": checks, "wrong": wrong, "operations": names}


def _float32(model: Classifier, x: Tensor, eps: float, samples: int) -> tuple[float, float] | None:
    """The bound of the network as it is computed in float32, and the smallest margin that it computes; None if the
    errors of an operation are not known.
    """
    net, single = deepcopy(model).float(), x.float()
    y = net(single).argmax(1)
    batch = Batch(single, y, torch.zeros(1, dtype=torch.long))
    try:
        proofs = Crown(arithmetic="float32").ready(net, batch, ThreatModel(Linf(eps)))(batch)
    except NoBounds:
        return None
    return float(proofs.bound), _attacked(net, single, y, eps, samples)


def _margins(model: Classifier, x: Tensor, y: Tensor) -> Tensor:
    logits = model(x)
    others = logits.index_fill(1, y, -torch.inf)
    return logits[:, y[0]] - others.amax(1)


def _box(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    bounds = Bounds()
    return (x - eps).clamp(min=bounds.low), (x + eps).clamp(max=bounds.high)


def _attacked(model: Classifier, x: Tensor, y: Tensor, eps: float, samples: int) -> float:
    """The smallest margin of random inputs, half of which are corners, and of a descent from the best of them."""
    low, high = _box(x, eps)
    rng = torch.Generator().manual_seed(0)
    share = torch.rand(samples, x.shape[1], generator=rng, dtype=x.dtype)
    share[::2] = share[::2].round()
    points = low + (high - low) * share
    margins = _margins(model, points, y)
    at = points[margins.topk(min(STARTS, samples), largest=False).indices]
    least = float(margins.min())
    for step in range(STEPS):
        at = at.detach().requires_grad_()
        value = _margins(model, at, y)
        (slope,) = torch.autograd.grad(value.sum(), at)
        least = min(least, float(value.detach().min()))
        size = (high - low) * 0.3 * (1 - step / STEPS)
        at = torch.minimum(torch.maximum(at.detach() - size * slope.sign(), low), high)
    return min(least, float(_margins(model, at, y).min()))


def _on_grid(model: Classifier, x: Tensor, y: Tensor, eps: float) -> float:
    low, high = _box(x, eps)
    size = 20_001 if x.shape[1] == 1 else 201
    lines = [
        torch.linspace(float(a), float(b), size, dtype=torch.float64)
        for a, b in zip(low[0], high[0], strict=True)
    ]
    return float(_margins(model, torch.cartesian_prod(*lines).view(-1, x.shape[1]), y).min())


def _solved(graph: Graph, x: Tensor, y: Tensor, eps: float) -> float | None:
    """The smallest margin by mixed-integer programs; None for a network that is not linear between kinks or too large.

    It reads the operations of the graph, but none of their bounds.
    """
    pieces = operations.Linear | operations.ReLU | operations.MaxPool
    if not all(isinstance(node.operation, pieces) for node in graph.nodes):
        return None
    program = _Program(graph, *_box(x, eps))
    if program.binaries > 40:
        return None
    rows = margin_rows(y, 3, torch.float64)[0]
    return min(program.minimum(row.numpy()) for row in rows)


class _Program:
    """A network of linear operations, ReLUs and maxima as the constraints of a mixed-integer program."""

    def __init__(self, graph: Graph, low: Tensor, high: Tensor) -> None:
        self.low, self.high = list(low.flatten().numpy()), list(high.flatten().numpy())
        self.whole = [0] * len(self.low)
        self.rows: list[tuple[dict[int, float], float, float]] = []
        places = [np.arange(len(self.low))]
        for node in graph.nodes:
            shapes = [graph.shape_of(i) for i in node.inputs]
            inputs = [places[i] for i in node.inputs]
            if isinstance(node.operation, operations.ReLU):
                places.append(np.array([self._maximum([int(k)], zero=True) for k in inputs[0]]))
            elif isinstance(node.operation, operations.MaxPool):
                numbered = torch.arange(1.0, len(inputs[0]) + 1, dtype=torch.float64).view(1, *shapes[0])
                windows = node.operation.windows(numbered)[0].flatten(0, -2).long() - 1
                padding = node.operation.padding.expand(*node.shape, windows.shape[1]).reshape(windows.shape)
                places.append(
                    np.array(
                        [
                            self._maximum([int(inputs[0][k]) for k in window[~mask]])
                            for window, mask in zip(windows, padding, strict=True)
                        ]
                    )
                )
            else:
                places.append(self._linear(node.operation, shapes, inputs, node.shape))
        self.outputs = places[-1]

    @property
    def binaries(self) -> int:
        """Number of binary variables."""
        return sum(self.whole)

    def _variable(self, low: float, high: float, whole: int = 0) -> int:
        self.low.append(low), self.high.append(high), self.whole.append(whole)
        return len(self.low) - 1

    def _linear(
        self,
        operation: operations.Linear,
        shapes: list[torch.Size],
        inputs: list[np.ndarray],
        shape: torch.Size,
    ) -> np.ndarray:
        zeros = [torch.zeros(1, *each, dtype=torch.float64) for each in shapes]
        offset = operation(*zeros).flatten().numpy()
        columns, sources = [], []
        for k, (each, places) in enumerate(zip(shapes, inputs, strict=True)):
            for j, place in enumerate(places):
                unit = torch.zeros(1, each.numel(), dtype=torch.float64)
                unit[0, j] = 1.0
                given = [unit.view(1, *each) if i == k else zero for i, zero in enumerate(zeros)]
                columns.append(operation(*given).flatten().numpy() - offset)
                sources.append(int(place))
        matrix, made = np.stack(columns, 1), []
        for row, constant in zip(matrix, offset, strict=True):
            terms = [(place, float(weight)) for place, weight in zip(sources, row, strict=True) if weight]
            ends = [sorted((w * self.low[p], w * self.high[p])) for p, w in terms]
            spread = 1e-6 + sum(abs(a) + abs(b) for a, b in ends) * 1e-9
            least = constant + sum(a for a, _ in ends) - spread
            variable = self._variable(least, constant + sum(b for _, b in ends) + spread)
            total: Counter[int] = Counter()
            for place, weight in terms:
                total[place] += weight  # type: ignore[assignment]
            self.rows.append(({**total, variable: -1.0}, -constant, -constant))
            made.append(variable)
        return np.array(made)

    def _maximum(self, places: list[int], *, zero: bool = False) -> int:
        """The largest of variables and, if asked for, of zero: one binary variable chooses which it is."""
        lows, highs = [self.low[p] for p in places], [self.high[p] for p in places]
        least, most = max(lows + [0.0] * zero), max(highs + [0.0] * zero)
        value = self._variable(least, most)
        chosen = []
        for place, low in zip([*places, None] if zero else places, lows + [0.0] * zero, strict=True):
            is_it = self._variable(0, 1, 1)
            chosen.append(is_it)
            of = {} if place is None else {place: -1.0}
            self.rows.append(({value: 1.0, **of}, 0.0, np.inf))
            self.rows.append(({value: 1.0, **of, is_it: most - low}, -np.inf, most - low))
        self.rows.append((dict.fromkeys(chosen, 1.0), 1.0, 1.0))
        return value

    def minimum(self, row: np.ndarray) -> float:
        """The smallest value of a linear function of the outputs, as the solver has proved it, less its tolerance."""
        cost = np.zeros(len(self.low))
        np.add.at(cost, self.outputs, row)
        matrix = np.zeros((len(self.rows), len(self.low)))
        for k, (terms, _, _) in enumerate(self.rows):
            for place, weight in terms.items():
                matrix[k, place] += weight
        limits = LinearConstraint(matrix, [r[1] for r in self.rows], [r[2] for r in self.rows])
        solved = milp(cost, integrality=self.whole, bounds=Box(self.low, self.high), constraints=limits)
        if solved.status != 0:
            return np.inf
        # the solver allows violations of 1e-6, which a network multiplies
        return float(solved.fun) + 1e-4 * max(1.0, float(np.abs(row).sum()), float(np.abs(solved.fun)))
