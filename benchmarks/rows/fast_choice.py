"""The networks and images that `fast` was chosen on: by `controls.py` and `by_hand.py`, and images not seen by them."""

from torch import Tensor, nn

from benchmarks import by_hand
from benchmarks.by_hand import SEEN, SIBLING
from benchmarks.controls import HONEST, IMAGES, trained
from benchmarks.networks import images
from benchmarks.record import Outcome
from benchmarks.rows.fast import CIFAR, MNIST, Setting, compared

WHAT = "`fast` against `standard` on the networks that it was chosen on"
N, SEEDS = 200, (0,)
SETTINGS = (
    Setting("mnist-pgd-0.3", "Linf", 0.3, N, MNIST, SEEDS),
    Setting("mnist-trades-0.2", "Linf", 0.2, N, MNIST, SEEDS),
    Setting("mnist-pgd-0.2-batch-norm", "Linf", 0.2, N, MNIST, SEEDS),
    Setting("mnist-pgd-0.1", "Linf", 0.1, N, MNIST, SEEDS),
    Setting("fashion-pgd-0.05", "Linf", 0.05, N, MNIST, SEEDS),
    Setting("cifar-pgd", "Linf", 2 / 255, N, CIFAR, SEEDS),
    Setting(SIBLING.name, "Linf", 0.2, N, MNIST, SEEDS),
    Setting(SIBLING.name, "L2", 1.5, N, MNIST, SEEDS),
    Setting(SIBLING.name, "L2", 2.0, N, MNIST, SEEDS),
    Setting("mnist-pgd-0.3", "L2", 1.5, N, MNIST, SEEDS),
    Setting("mnist-trades-0.2", "L2", 1.5, N, MNIST, SEEDS),
    Setting("cifar-pgd", "L2", 0.25, N, CIFAR, SEEDS),
    Setting("mnist-pgd-0.3", "L1", 8.0, N, MNIST, SEEDS),
    Setting("cifar-pgd", "L1", 5.0, N, CIFAR, SEEDS),
)


def measured() -> Outcome:
    return compared("fast-choice", SETTINGS, _opened)


def _opened(setting: Setting) -> tuple[nn.Module, Tensor, Tensor]:
    if setting.network == SIBLING.name:
        return by_hand.trained(SIBLING), *images("mnist", setting.n, "train", SEEN[SIBLING.name])
    control = next(control for control in HONEST if control.name == setting.network)
    return trained(control).requires_grad_(False), *images(control.data, setting.n, "train", 2 * IMAGES)
