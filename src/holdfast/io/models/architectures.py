"""Small network architectures that a weights file may refer to by name. They are built from integer settings, so a file
needs no code.

A safetensors file of Holdfast has one metadata key, `holdfast`, with sorted JSON: `architecture` (one of these names),
`arguments` (its settings), `denoiser` (the sizes of a denoiser in front of it, if there is one), `int8` (the names of
layers of 8-bit integers, if there are any), `bounds`, `mean`, `std`, `classes` (their number) and `training` (the
digest of the training that produced the weights). Inputs are normalised by `mean` and `std` before they reach these
networks.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import Tensor, nn

from holdfast.io.models.lipschitz_layers import (
    AOLConv2d,
    AOLLinear,
    CayleyConv2d,
    CayleyLinear,
    MaxMin,
    SLLConv2d,
    Widened,
)


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
        "lipschitz-aol": lipschitz_aol,
        "lipschitz-cayley": lipschitz_cayley,
        "lipschitz-sll": lipschitz_sll,
        "mlp": mlp,
        "mnist-cnn": mnist_cnn,
        "resnet": resnet,
    }
)
"""Functions that build the networks, by the names that a file with weights may contain."""
