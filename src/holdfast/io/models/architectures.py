"""Network architectures that a weights file may refer to by name, and their special layers."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.attacks.parts.losses import leeway
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.gradients import instead
from holdfast.core.model import Classifier
from holdfast.core.training import exactly
from holdfast.core.types import Inputs, Logits, PerExample
from holdfast.io.models.dense_prediction import Detector, UNet

_GUARD = 1e-6  # added to divisors, so that a row of zeros stays zero and has a finite gradient
_REACH = 8.0  # limit of the logarithms of SLL's weights, so that their ratios stay within float32
_SLACK = 1e-4  # relative reduction of a radius: a hundred layers with gains of up to 1 + 1e-6


def overlaps(kernel: Tensor) -> Tensor:
    """Return for each pair of output channels of a convolution kernel (out, in, k, k) the sum of the absolute
    correlations between their filters, over all shifts.

    `k` must be odd. The diagonal matrix of the row sums is an upper bound of the convolution times its transpose, for
    every image size. The same holds for the matrix with its columns multiplied by positive numbers and its rows divided
    by them.
    """
    with exactly(kernel):
        sums: Tensor = F.conv2d(kernel, kernel, padding=kernel.shape[2] - 1).abs().sum((2, 3))
    return sums


def almost_orthogonal(kernel: Tensor) -> Tensor:
    """Return a convolution kernel, rescaled by input or output channel so that the Lipschitz constant of its
    convolution is at most one.
    """
    if kernel.shape[0] <= kernel.shape[1]:
        return kernel * torch.rsqrt(overlaps(kernel).sum(1) + _GUARD).view(-1, 1, 1, 1)
    return kernel * torch.rsqrt(overlaps(kernel.transpose(0, 1)).sum(1) + _GUARD).view(1, -1, 1, 1)


class AOLConv2d(nn.Module):
    """Convolution with an odd kernel size that is rescaled to a Lipschitz constant of at most one (AOL,
    almost-orthogonal layer).
    """

    def __init__(self, channels: int, width: int, kernel: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, channels, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.dirac_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the feature maps (n, width, h, w) for inputs (n, channels, h, w)."""
        return F.conv2d(x, almost_orthogonal(self.weight), self.bias, padding=self.weight.shape[2] // 2)


class AOLLinear(nn.Module):
    """Linear layer that is rescaled to a Lipschitz constant of at most one (AOL, almost-orthogonal layer)."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, features))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.orthogonal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (n, width) for inputs (n, features)."""
        kernel = almost_orthogonal(self.weight[:, :, None, None])
        return F.linear(x, kernel[:, :, 0, 0], self.bias)


class SLLConv2d(nn.Module):
    """Residual convolution with a Lipschitz constant of at most one (SLL, SDP-based Lipschitz layer): the input minus
    the output of a hidden layer whose two matrices share weights.
    """

    def __init__(self, channels: int, width: int, kernel: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, channels, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.zeros(width))
        nn.init.xavier_normal_(self.weight)

    @property
    def ratios(self) -> Tensor:
        """Weights (width) of the hidden units, of which only the ratios matter."""
        return self.scale.clamp(-_REACH, _REACH).exp()

    def heights(self) -> Tensor:
        """Return the divisors (width) of the hidden units, with which the Lipschitz constant is at most one."""
        q = self.ratios
        with exactly(self.weight):
            return overlaps(self.weight) @ q / q + _GUARD

    def forward(self, x: Tensor) -> Tensor:
        """Return the feature maps for inputs (n, channels, h, w), in the same shape."""
        kernel, half = self.weight, self.weight.shape[2] // 2
        heights = self.heights()
        hidden = F.relu(F.conv2d(x, kernel, self.bias, padding=half))
        output = F.conv_transpose2d(hidden / heights.view(1, -1, 1, 1), kernel, padding=half)
        return x - 2 * output


class MaxMin(nn.Module):
    """Activation that replaces each pair of channels by their maximum and minimum, which preserves the norm of
    gradients.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the maximum and the minimum of each pair of channels, in the shape of the input. A channel without a
        partner is unchanged.
        """
        half = x.shape[1] // 2
        first, second, unpaired = x[:, :half], x[:, half : 2 * half], x[:, 2 * half :]
        return torch.cat((torch.maximum(first, second), torch.minimum(first, second), unpaired), 1)


class Widened(nn.Module):
    """Layer that adds channels of zeros up to a given number of channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        """Return the input with channels of zeros added, in shape (n, width, …)."""
        return F.pad(x, (0, 0, 0, 0, 0, self.width - x.shape[1]))


def input_constant(model: Classifier) -> float:
    """Return the Lipschitz constant of the input normalisation of a classifier, which is one divided by its smallest
    standard deviation.
    """
    return 1.0 if model.std is None else 1.0 / float(model.std.min())


def certified_radius(logits: Logits, *, constant: float = 1.0) -> PerExample:
    """Return for each input the certified Euclidean radius within which the prediction cannot change, rounded down. It
    is 0 for a tie between classes.

    `constant` is a Lipschitz constant of the logits: one for a network of these layers, times the `input_constant` of
    its classifier. The difference of two logits then has the Lipschitz constant `sqrt(2) * constant`.
    """
    first, second = logits.double().topk(2, dim=1).values.unbind(1)
    lead = first - second - 2 * leeway(logits).double()  # rounding of the logits themselves
    radius = (lead * (1 - _SLACK) / (math.sqrt(2) * constant)).clamp_min(0)
    rounded = radius.to(logits.dtype)
    too_large = rounded.double() > radius
    return torch.where(too_large, torch.nextafter(rounded, torch.zeros_like(rounded)), rounded)


def orthogonal(matrix: Tensor) -> Tensor:
    """Convert matrices (…, m, n) to matrices of the same shape with orthonormal columns, or rows if m < n. A zero
    matrix gives the identity.

    The inverse always exists and its norm is at most one: the matrix is the sum of the identity, a skew-symmetric and a
    positive semi-definite matrix.
    """
    m, n = matrix.shape[-2:]
    if m < n:
        return orthogonal(matrix.mH).mH
    precise = matrix.to(torch.promote_types(matrix.dtype, torch.float64))
    square, below = precise[..., :n, :], precise[..., n:, :]
    unit = torch.eye(n, dtype=precise.dtype, device=precise.device)
    skew = square - square.mH + below.mH @ below
    inverse = torch.linalg.inv(unit + skew)
    return torch.cat(((unit - skew) @ inverse, -2 * below @ inverse), -2).to(matrix.dtype)


class CayleyLinear(nn.Module):
    """Linear layer with a Lipschitz constant of one: its matrix has orthonormal rows or columns, and is orthogonal if
    the numbers of inputs and outputs are equal.
    """

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, features))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.xavier_normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (n, width) for inputs (n, features)."""
        return F.linear(x, orthogonal(self.weight), self.bias)


class CayleyConv2d(nn.Module):
    """Convolution with circular padding and a Lipschitz constant of one: its matrix at each frequency has orthonormal
    rows or columns.
    """

    def __init__(self, channels: int, width: int, kernel: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, channels, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.xavier_normal_(self.weight)

    def matrices(self, size: torch.Size) -> Tensor:
        """Return the matrices (h, w // 2 + 1, width, channels) at the frequencies of images of a size (h, w) that is at
        least that of the kernel. Their rows or columns are orthonormal.
        """
        half = self.weight.shape[2] // 2
        placed = F.pad(self.weight.to(torch.float64), (0, size[1] - 2 * half - 1, 0, size[0] - 2 * half - 1))
        kernels = torch.fft.rfft2(torch.roll(placed, (-half, -half), (2, 3))).conj()
        return orthogonal(kernels.permute(2, 3, 0, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the feature maps (n, width, h, w) for inputs (n, channels, h, w)."""
        size = x.shape[2:]
        half = self.weight.shape[2] // 2
        if min(size) <= 2 * half:
            x = F.pad(x, (half, half, half, half))  # smaller than the kernel
        padded_size = x.shape[2:]
        waves = torch.fft.rfft2(x.to(torch.promote_types(x.dtype, torch.float32)))
        unitary = self.matrices(padded_size).to(waves.dtype)
        products = torch.einsum("hwoi,nihw->nohw", unitary, waves)
        maps: Tensor = torch.fft.irfft2(products, s=padded_size).to(x.dtype) + self.bias.view(1, -1, 1, 1)
        first = half if padded_size != size else 0
        return maps[:, :, first : first + size[0], first : first + size[1]]


def mlp(features: int = 784, classes: int = 10, width: int = 128, depth: int = 2) -> nn.Module:
    """Fully connected network with ReLUs: `depth` hidden layers of `width` units. Inputs are flattened."""
    layers: list[nn.Module] = [nn.Flatten()]
    for i in range(depth):
        layers += [nn.Linear(width if i else features, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width if depth else features, classes))


def cnn(
    channels: int = 1, side: int = 28, classes: int = 10, width: int = 16, depth: int = 3, hidden: int = 100
) -> nn.Module:
    """Convolutional network with stride 2 and two final linear layers. Each convolution has twice the channels of the
    previous one.

    Strides replace pooling: a forward pass costs a quarter, and every layer has exact linear bounds.
    """
    layers: list[nn.Module] = []
    for i in range(depth):
        channels_out = width << i
        layers += [
            nn.Conv2d(
                channels_out // 2 if i else channels, channels_out, 5 if i == 0 else 3, 2, 2 if i == 0 else 1
            )
        ]
        layers += [nn.ReLU()]
        side = (side + 1) // 2
    features = (width << (depth - 1)) * side * side
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, classes)
    )


def mnist_cnn() -> nn.Module:
    """Network of the bundled MNIST models: three convolutions and two linear layers with 127,062 parameters."""
    return cnn()


class ResidualBlock(nn.Module):
    """Residual block: two 3 x 3 convolutions with batch norm, whose output is added to the input. The input is
    projected if the shape changes.
    """

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        same = stride == 1 and channels == width
        self.shortcut: nn.Module = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the residual block for the input `x`."""
        y: Tensor = self.relu(self.body(x) + self.shortcut(x))
        return y


def resnet(
    channels: int = 3, classes: int = 10, width: int = 16, blocks: int = 1, stages: int = 3
) -> nn.Module:
    """Residual network for images of about 32 x 32 pixels. It has `stages` stages of `blocks` residual blocks, and each
    stage doubles the number of channels.

    He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv:1512.03385. Differs from the paper:
    shortcuts that change the shape are projections. A width of 64, two blocks and four stages give the network that is
    called ResNet-18 on CIFAR-10.
    """
    if blocks < 1:  # stages without blocks would have no parameters
        raise ValueError(f"blocks is {blocks}; at least one a stage was expected")
    layers: list[nn.Module] = [
        nn.Conv2d(channels, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    channels_in = width
    for stage in range(stages):
        channels_out = width << stage
        for block in range(blocks):
            layers.append(ResidualBlock(channels_in, channels_out, 2 if stage and not block else 1))
            channels_in = channels_out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels_in, classes))


def lipschitz_aol(
    channels: int = 1, side: int = 28, classes: int = 10, width: int = 32, depth: int = 2, hidden: int = 256
) -> nn.Module:
    """Network of almost-orthogonal 1-Lipschitz layers, which has a certified radius. Each stage has two convolutions.

    Each stage halves the height and width of the image.
    """
    return _lipschitz(AOLConv2d, AOLLinear, channels, side, classes, width, depth, hidden)


def lipschitz_cayley(
    channels: int = 1, side: int = 28, classes: int = 10, width: int = 16, depth: int = 2, hidden: int = 128
) -> nn.Module:
    """Network of orthogonal layers, which has a certified radius. It has the structure of `lipschitz-aol`, but is
    several times slower.
    """
    return _lipschitz(CayleyConv2d, CayleyLinear, channels, side, classes, width, depth, hidden)


def lipschitz_sll(
    channels: int = 1, side: int = 28, classes: int = 10, width: int = 32, depth: int = 2, hidden: int = 256
) -> nn.Module:
    """Network of 1-Lipschitz residual layers, which has a certified radius. Each stage has two layers.

    Each stage halves the height and width of the image.
    """
    layers: list[nn.Module] = [Widened(max(width // 4, channels))]
    n_channels = max(width // 4, channels)
    for _ in range(depth):
        n_channels, side = 4 * n_channels, _halved(side)
        layers += [nn.PixelUnshuffle(2), SLLConv2d(n_channels, n_channels), SLLConv2d(n_channels, n_channels)]
    return nn.Sequential(*layers, nn.Flatten(), *_head(AOLLinear, n_channels * side * side, hidden, classes))


def _lipschitz(
    conv: Callable[[int, int], nn.Module],
    linear: Callable[[int, int], nn.Module],
    channels: int,
    side: int,
    classes: int,
    width: int,
    depth: int,
    hidden: int,
) -> nn.Module:
    layers: list[nn.Module] = []
    for stage in range(depth):
        channels_out, side = width << stage, _halved(side)
        layers += [
            nn.PixelUnshuffle(2),
            conv(4 * channels, channels_out),
            MaxMin(),
            conv(channels_out, channels_out),
            MaxMin(),
        ]
        channels = channels_out
    return nn.Sequential(*layers, nn.Flatten(), *_head(linear, channels * side * side, hidden, classes))


def _head(
    linear: Callable[[int, int], nn.Module], features: int, hidden: int, classes: int
) -> tuple[nn.Module, ...]:
    return linear(features, hidden), MaxMin(), linear(hidden, hidden), MaxMin(), linear(hidden, classes)


def _halved(side: int) -> int:
    if side % 2:
        raise ValueError(f"a side of {side} cannot be halved; give a side that can, or a smaller depth")
    return side // 2


ARCHITECTURES: Mapping[str, Callable[..., nn.Module]] = MappingProxyType(
    {
        "cnn": cnn,
        "detector": Detector,
        "lipschitz-aol": lipschitz_aol,
        "lipschitz-cayley": lipschitz_cayley,
        "lipschitz-sll": lipschitz_sll,
        "mlp": mlp,
        "mnist-cnn": mnist_cnn,
        "resnet": resnet,
        "unet": UNet,
    }
)
"""Functions that build the networks, by the names that a file with weights may contain."""


LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LARGEST = 127  # of a weight, whose range is symmetric
_STEPS = 255  # between the lowest and the highest input


class Int8Layer(nn.Module):
    """Linear or convolutional layer whose weights and inputs are rounded to 8 bits.

    With `trained`, `weight` is a parameter in floating point, which is rounded in each pass; otherwise it has 8-bit
    integers, and `scale` (out, 1, …) has the size of one of their steps. Inputs are rounded to whole multiples of
    `step`, from `lowest` to `lowest` + 255 times `step`.
    """

    weight: Tensor
    scale: Tensor
    step: Tensor
    lowest: Tensor

    def __init__(self, layer: nn.Module, *, trained: bool = False) -> None:
        super().__init__()
        assert isinstance(layer, LAYERS)
        weight, self.bias = layer.weight.detach(), layer.bias
        self.is_trained, self.straight_through = trained, True
        if trained:
            self.weight = nn.Parameter(weight.clone(), requires_grad=layer.weight.requires_grad)
        else:
            self.weight = nn.Parameter(torch.zeros_like(weight, dtype=torch.int8), requires_grad=False)
            self.register_buffer("scale", weight.new_ones(len(weight), *[1] * (weight.dim() - 1)))
        self.register_buffer("step", weight.new_ones(()))
        self.register_buffer("lowest", weight.new_zeros(()))
        shape = deepcopy(layer)
        shape.weight = shape.bias = None  # type: ignore[assignment]
        self._shape = (
            shape,
        )  # in a tuple, so that it is no module of the network: only its settings are used

    def extra_repr(self) -> str:
        """Return the settings of the original layer."""
        return repr(self._shape[0])

    def forward(self, x: Inputs) -> Tensor:
        """Return the output of the layer for its rounded inputs."""
        values = (x / self.step).round().clamp(self.lowest, self.lowest + _STEPS) * self.step
        # without gradients, the rounding is recorded for bounds, which refuse it
        x = instead(values, x) if self.straight_through and torch.is_grad_enabled() else values
        if self.is_trained:
            weight = instead(torch.mul(*rounded(self.weight)), self.weight)
        else:
            weight = self.weight.to(x.dtype) * self.scale
        (layer,) = self._shape
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, self.bias)
        output: Tensor = layer._conv_forward(x, weight, self.bias)
        return output


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights of a layer as whole numbers from -127 to 127, in floating point, and the scale (out, 1, …) of
    each output channel.
    """
    scale = weight.detach().abs().amax(tuple(range(1, weight.dim())), keepdim=True) / _LARGEST
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (weight.detach() / scale).round(), scale


def layers_of(net: nn.Module) -> tuple[str, ...]:
    """Return the names of the layers of a network that can be rounded. Subclasses and layers whose weights are computed
    from others are left out.

    Raises `UsageError` if there are none.
    """
    names = tuple(
        name
        for name, layer in net.named_modules(remove_duplicate=False)
        if type(layer) in LAYERS and layer._parameters.get("weight") is not None
    )
    if not names:
        raise UsageError(
            f"int8 rounds layers of torch.nn ({', '.join(kind.__name__ for kind in LAYERS)}), and "
            f"{type(net).__name__} has none; give a network that is built of them, as in net.py:make"
        )
    return names


def with_int8(net: nn.Module, names: Sequence[str], *, trained: bool = False) -> nn.Module:
    """Return a network whose layers with these names are rounded to 8 bits. Other layers are those of `net`, which is
    changed in place. Raises `TargetError` for a name of another module.
    """
    modules, replaced = dict(net.named_modules(remove_duplicate=False)), dict[nn.Module, Int8Layer]()
    for name in names:
        layer = modules.get(name)
        if type(layer) not in LAYERS:
            raise TargetError(
                f"{name!r} is rounded to 8 bits in the file of the model, and it is no linear or convolutional layer "
                "of its architecture; give the architecture with which it was trained"
            )
        assert layer is not None
        new = replaced.setdefault(layer, Int8Layer(layer, trained=trained))
        if not name:
            return new
        parent, _, own = name.rpartition(".")
        setattr(modules[parent], own, new)
    return net


def int8_layers(net: object) -> dict[str, Int8Layer]:
    """Return the layers of a network that are rounded to 8 bits, by name; none for other models."""
    modules = net.named_modules(remove_duplicate=False) if isinstance(net, nn.Module) else ()
    return {name: module for name, module in modules if isinstance(module, Int8Layer)}


def note_of(net: nn.Module) -> str:
    """Return a note for the report on the layers of a network that are rounded to 8 bits."""
    return (
        f"{len(int8_layers(net))} layers have weights and inputs of 8 bits; attacks pass their gradient through the "
        "rounding (straight-through estimator)"
    )


@torch.no_grad()
def set_ranges(layers: Mapping[str, Int8Layer], model: Classifier, inputs: Sequence[Inputs]) -> None:
    """Set the ranges of the inputs of `layers` to those that the layers of the same names in the network of `model`,
    which is not rounded, receive when it is called with each of `inputs`.
    """
    assert isinstance(model.net, nn.Module)
    ranges: dict[str, list[float]] = {}

    def observe(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, received: tuple[Tensor, ...]) -> None:
            low, high = received[0].aminmax()
            ranges[name] = [*ranges.get(name, [0.0]), float(low), float(high)]

        return hook

    hooks = [model.net.get_submodule(name).register_forward_pre_hook(observe(name)) for name in layers]
    try:
        for x in inputs:
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    for name, layer in layers.items():
        low, high = min(ranges.get(name, [0.0])), max(ranges.get(name, [0.0]))
        step = (high - low) / _STEPS or 1.0  # 1 for a layer that is not called, or only with zeros
        layer.step.fill_(step)
        layer.lowest.fill_(round(low / step))


@contextmanager
def naive_gradients(net: nn.Module) -> Iterator[None]:
    """Context manager inside which the layers of a network have their true gradient, which is zero: attacks by gradient
    then find nothing, and the robust accuracy is an overestimate.
    """
    layers = int8_layers(net).values()
    for layer in layers:
        layer.straight_through = False
    try:
        yield
    finally:
        for layer in layers:
            layer.straight_through = True


def packed(tensors: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Return the tensors of a network with 8-bit integers from those of the same network in training. `names` are the
    layers, as in the names of the tensors.
    """
    result = dict(tensors)
    for name in names:
        whole, result[f"{name}.scale"] = rounded(tensors[f"{name}.weight"])
        result[f"{name}.weight"] = whole.to(torch.int8)
    return result
