"""Networks for images of 224 x 224 with 1,000 classes, with random weights and batch norm fitted to random images."""

import torch
from torch import Tensor, nn

SIDE, CLASSES = 224, 1000


class _Inverted(nn.Module):
    """Inverted residual with a depthwise convolution (Sandler et al., MobileNetV2, CVPR 2018, arXiv:1801.04381)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        widening = [] if expansion == 1 else _normed(nn.Conv2d(inputs, hidden, 1, bias=False), nn.ReLU6())
        depthwise = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.branch = nn.Sequential(
            *widening, *_normed(depthwise, nn.ReLU6()), *_normed(nn.Conv2d(hidden, outputs, 1, bias=False))
        )
        self.skips = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        branch: Tensor = self.branch(x)
        return x + branch if self.skips else branch


class _Basic(nn.Module):
    """Residual block of two convolutions (He et al., CVPR 2016, arXiv:1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            *_normed(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.ReLU()),
            *_normed(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)),
        )
        shortened = stride > 1 or inputs != outputs
        self.skip = (
            nn.Sequential(*_normed(nn.Conv2d(inputs, outputs, 1, stride, bias=False)))
            if shortened
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.branch(x) + self.skip(x))


def _normed(layer: nn.Conv2d, *after: nn.Module) -> list[nn.Module]:
    return [layer, nn.BatchNorm2d(layer.out_channels), *after]


def _mobilenet() -> nn.Sequential:
    layers, channels = _normed(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.ReLU6()), 32
    for expansion, outputs, blocks, stride in (
        *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
        *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
    ):
        for block in range(blocks):
            layers.append(_Inverted(channels, outputs, 1 if block else stride, expansion))
            channels = outputs
    layers += _normed(nn.Conv2d(channels, 1280, 1, bias=False), nn.ReLU6())
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, CLASSES))


def _resnet18() -> nn.Sequential:
    layers = [*_normed(nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.ReLU()), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [_Basic(channels, outputs, stride), _Basic(outputs, outputs, 1)]
        channels = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, CLASSES))


BUILDERS = {"MobileNetV2": _mobilenet, "ResNet-18": _resnet18}


def large(name: str, n: int) -> tuple[nn.Module, Tensor, Tensor]:
    """The network in eval mode, `n` random images, and its own classes of them as labels."""
    torch.manual_seed(0)
    net, x = BUILDERS[name](), torch.rand(n, 3, SIDE, SIDE)
    with torch.no_grad():
        net.train()(x[:8])
        return net.eval(), x, net(x).argmax(1)
