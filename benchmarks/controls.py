"""Train the networks that the doubts are measured on: honest controls, and masked ones that must be found.

    python -m benchmarks.controls [--only NAME] [--again]     # seconds each; writes benchmarks/cache/controls/

Each is trained on the first 10,000 training images of its data set. The honest ones are what people really train:
standard, PGD-trained, TRADES, interval-bound and noise-trained networks with and without batch norm, small variations.
A network trained by single-step attacks is no control: it masks by accident.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.networks import CACHE, images, two_conv_two_fc

FOLDER = CACHE / "controls"
IMAGES, BATCH = 10_000, 100
Loss = Callable[[nn.Module, Tensor, Tensor, float], Tensor]
"""(network, x, y, progress from 0 to 1) -> the loss to descend"""


def plain(net: nn.Module, x: Tensor, y: Tensor, progress: float, *, smooth: float = 0.0) -> Tensor:
    """Cross-entropy on clean images."""
    return F.cross_entropy(net(x), y, label_smoothing=smooth)


def noisy(net: nn.Module, x: Tensor, y: Tensor, progress: float, *, sigma: float) -> Tensor:
    """Cross-entropy on images with Gaussian noise."""
    return F.cross_entropy(net((x + sigma * torch.randn_like(x)).clamp(0, 1)), y)


def pgd(net: nn.Module, x: Tensor, y: Tensor, progress: float, *, eps: float, steps: int = 7) -> Tensor:
    """Cross-entropy on PGD examples (Madry et al. 2018), eps rising over the first half."""
    return F.cross_entropy(
        net(_climb(net, x, lambda z: F.cross_entropy(net(z), y), _rising(eps, progress), steps)), y
    )


def trades(net: nn.Module, x: Tensor, y: Tensor, progress: float, *, eps: float, beta: float = 6.0) -> Tensor:
    """Zhang et al. 2019: clean cross-entropy and the worst divergence around it."""
    with torch.no_grad():
        target = net.eval()(x).softmax(1)
    x_adv = _climb(net, x, lambda z: _divergence(net(z), target), _rising(eps, progress), 7)
    clean = net(x)
    return F.cross_entropy(clean, y) + beta * _divergence(net(x_adv), clean.softmax(1))


def bounds(net: nn.Module, x: Tensor, y: Tensor, progress: float, *, eps: float) -> Tensor:
    """Gowal et al. 2019: half cross-entropy, half that of the worst logits that interval bounds allow."""
    reach = _rising(eps, progress)
    middle, radius = x, torch.full_like(x, reach)
    for layer in cast("nn.Sequential", net):
        middle, radius = _interval(layer, middle, radius)
    own = F.one_hot(y, middle.shape[1]).bool()
    worst = torch.where(own, middle - radius, middle + radius)
    share = min(0.5, progress)
    return (1 - share) * F.cross_entropy(net(x), y) + share * F.cross_entropy(worst, y)


def distilled(net: nn.Module, x: Tensor, y: Tensor, progress: float, *, temperature: float) -> Tensor:
    """Papernot et al. 2016, without the teacher: the softmax has a temperature in training that is then left out."""
    return F.cross_entropy(net(x) / temperature, y)


def _rising(eps: float, progress: float) -> float:
    return eps * min(1.0, 2 * progress)


def _divergence(logits: Tensor, target: Tensor) -> Tensor:
    return F.kl_div(logits.log_softmax(1), target, reduction="batchmean")


def _climb(net: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], eps: float, steps: int) -> Tensor:
    net.eval()
    z = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
    for _ in range(steps):
        z = z.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(z), z)
        z = z.detach() + 2.5 * eps / steps * gradient.sign()
        z = torch.min(torch.max(z, x - eps), x + eps).clamp(0, 1)
    net.train()
    return z


def _interval(layer: nn.Module, middle: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(layer, nn.Conv2d):
        return layer(middle), F.conv2d(radius, layer.weight.abs(), None, layer.stride, layer.padding)
    if isinstance(layer, nn.Linear):
        return layer(middle), F.linear(radius, layer.weight.abs())
    if isinstance(layer, nn.ReLU):
        low, high = layer(middle - radius), layer(middle + radius)
        return (low + high) / 2, (high - low) / 2
    return layer(middle), layer(radius)


def conv(
    channels: int = 1, side: int = 28, width: int = 8, *, norm: bool = False, act: type[nn.Module] = nn.ReLU,
    pool: bool = False, dropout: float = 0.0,
) -> nn.Sequential:  # fmt: skip
    """Two convolutions and two linear layers, in the variants that people use."""

    def block(i: int, o: int) -> list[nn.Module]:
        stride = [nn.Conv2d(i, o, 3, 1, 1)] if pool else [nn.Conv2d(i, o, 4, 2, 1)]
        return [*stride, *([nn.BatchNorm2d(o)] if norm else []), act(), *([nn.MaxPool2d(2)] if pool else [])]

    features = 2 * width * (side // 4) ** 2
    head: list[nn.Module] = [
        nn.Flatten(),
        nn.Linear(features, 64),
        act(),
        nn.Dropout(dropout),
        nn.Linear(64, 10),
    ]
    return nn.Sequential(*block(channels, width), *block(width, 2 * width), *head)


def mlp(inputs: int = 784, hidden: int = 128) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def linear(inputs: int = 784) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 10))


@dataclass(frozen=True)
class Control:
    """A network to train, and the Linf radius it is measured at."""

    name: str
    build: Callable[[], nn.Sequential]
    loss: Loss
    eps: float
    data: str = "mnist"
    epochs: int = 3
    lr: float = 2e-3
    decay: float = 0.0


RGB = partial(conv, 3, 32, 16)
SMALL = 2 / 255
HONEST = (
    Control("mnist-standard", conv, plain, 0.1),
    Control("mnist-standard-long", conv, plain, 0.1, epochs=8),
    Control("mnist-wong-net", two_conv_two_fc, plain, 0.1),
    Control("mnist-batch-norm", partial(conv, norm=True), plain, 0.1),
    Control("mnist-max-pool", partial(conv, pool=True), plain, 0.1),
    Control("mnist-gelu", partial(conv, act=nn.GELU), plain, 0.1),
    Control("mnist-tanh", partial(conv, act=nn.Tanh), plain, 0.1),
    Control("mnist-mlp", mlp, plain, 0.05),
    Control("mnist-linear", linear, plain, 0.05),
    Control("mnist-label-smoothing", conv, partial(plain, smooth=0.1), 0.1),
    Control("mnist-weight-decay", conv, plain, 0.1, decay=0.1),
    Control("mnist-noise", conv, partial(noisy, sigma=0.25), 0.15),
    Control("mnist-pgd-0.1", conv, partial(pgd, eps=0.1), 0.1, epochs=4),
    Control("mnist-pgd-0.2-batch-norm", partial(conv, norm=True), partial(pgd, eps=0.2), 0.2, epochs=4),
    Control("mnist-pgd-0.3", two_conv_two_fc, partial(pgd, eps=0.3), 0.3, epochs=6),
    Control("mnist-trades-0.2", conv, partial(trades, eps=0.2), 0.2, epochs=4),
    Control("mnist-bounds-0.1", conv, partial(bounds, eps=0.1), 0.1, epochs=8),
    Control("fashion-standard", conv, plain, 0.05, data="fashion_mnist"),
    Control("fashion-batch-norm", partial(conv, norm=True), plain, 0.05, data="fashion_mnist"),
    Control("fashion-mlp", mlp, plain, 0.05, data="fashion_mnist"),
    Control("fashion-pgd-0.05", conv, partial(pgd, eps=0.05), 0.05, data="fashion_mnist", epochs=4),
    Control("fashion-trades-0.05", conv, partial(trades, eps=0.05), 0.05, data="fashion_mnist", epochs=4),
    Control("cifar-standard", RGB, plain, SMALL, data="cifar10", epochs=4),
    Control(
        "cifar-batch-norm-dropout",
        partial(RGB, norm=True, dropout=0.3),
        plain,
        SMALL,
        data="cifar10",
        epochs=4,
    ),
    Control("cifar-pgd", RGB, partial(pgd, eps=SMALL, steps=5), SMALL, data="cifar10", epochs=4),
)
BN = partial(RGB, norm=True)
WEAK = (
    Control("mnist-short", conv, plain, 0.1, epochs=1),
    Control("mnist-pgd-0.3-batch-norm-short", partial(conv, norm=True), partial(pgd, eps=0.3), 0.3, epochs=1),
    Control("fashion-short", conv, plain, 0.05, data="fashion_mnist", epochs=1),
    Control(
        "fashion-pgd-0.1-batch-norm-short",
        partial(conv, norm=True),
        partial(pgd, eps=0.1, steps=3),
        0.1,
        data="fashion_mnist",
        epochs=1,
    ),
    Control("cifar-short", RGB, plain, SMALL, data="cifar10", epochs=1),
    Control("cifar-batch-norm-short", BN, plain, SMALL, data="cifar10", epochs=1),
    *(
        Control(
            f"cifar-pgd-{eps}-batch-norm-{epochs}-epochs",
            BN,
            partial(pgd, eps=eps / 255, steps=3),
            8 / 255,
            data="cifar10",
            epochs=epochs,
        )
        for eps, epochs in ((2, 2), (4, 2), (8, 1), (8, 3))
    ),
    Control("cifar-pgd-4-short", RGB, partial(pgd, eps=4 / 255, steps=3), 4 / 255, data="cifar10", epochs=2),
    Control(
        "cifar-trades-4-batch-norm-short", BN, partial(trades, eps=4 / 255), 8 / 255, data="cifar10", epochs=1
    ),
)
"""Networks of short and weak trainings: honest, and broken by one loss noticeably more often than by another."""
DISTILLED = Control(
    "mnist-distilled-100", conv, partial(distilled, temperature=100.0), 0.1, epochs=8, lr=5e-3
)


class Quantised(nn.Module):
    """Rounds its input to a few levels: the gradient is zero everywhere."""

    def __init__(self, inner: nn.Module, levels: int = 8) -> None:
        super().__init__()
        self.inner, self.levels = inner, levels

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner((x * self.levels).round() / self.levels)
        return out


class Saturated(nn.Module):
    """Logits so large that the softmax is flat in float32, as if trained without end."""

    def __init__(self, inner: nn.Module, factor: float = 1e3) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.factor * self.inner(x)
        return out


class Randomised(nn.Module):
    """Adds noise to its input at every call."""

    def __init__(self, inner: nn.Module, sigma: float = 0.2) -> None:
        super().__init__()
        self.inner, self.sigma = inner, sigma

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x + self.sigma * torch.randn_like(x))
        return out


def train(control: Control, seed: int = 0) -> nn.Sequential:
    """The trained network in eval mode; Adam with a one-cycle learning rate."""
    torch.manual_seed(seed)
    x, y = images(control.data, IMAGES, split="train")
    net = control.build().train()
    steps = control.epochs * (IMAGES // BATCH)
    adam = torch.optim.AdamW(net.parameters(), control.lr, weight_decay=control.decay)
    cycle = torch.optim.lr_scheduler.OneCycleLR(adam, 2 * control.lr, steps)
    order = torch.cat([torch.randperm(IMAGES) for _ in range(control.epochs)])
    for step, pick in enumerate(order.split(BATCH)):
        loss = control.loss(net, x[pick], y[pick], step / steps)
        adam.zero_grad()
        loss.backward()
        adam.step()
        cycle.step()
    return net.eval()


def trained(control: Control, *, again: bool = False) -> nn.Sequential:
    """The control from the cache, trained first where it is not there."""
    path = FOLDER / f"{control.name}.safetensors"
    if not path.is_file() or again:
        FOLDER.mkdir(parents=True, exist_ok=True)
        save_file(train(control).state_dict(), path)
    net = control.build()
    net.load_state_dict(load_file(path))
    return net.eval()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="names that start so")
    parser.add_argument("--again", action="store_true", help="train even those in the cache")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    for control in (*HONEST, *WEAK, DISTILLED):
        if chosen.only and not control.name.startswith(chosen.only):
            continue
        net = trained(control, again=chosen.again)
        x, y = images(control.data, 1000)
        with torch.no_grad():
            print(
                f"{control.name:28} clean accuracy {(net(x).argmax(1) == y).float().mean():.3f}", flush=True
            )


if __name__ == "__main__":
    main()
