"""`fast` and `quick` against `standard` on few images, where the first waves of `fast` are most of its work."""

from torch import Tensor, nn

from benchmarks.networks import images, network
from benchmarks.record import Outcome
from benchmarks.rows.fast import Setting, compared

WHAT = "`fast` and `quick` against `standard` on 60 images"
N, MOST = 60, 0.5
SETTINGS = tuple(
    Setting(name, "Linf", eps, N, MOST, seeds=(0,), quick=True)
    for name, eps in (("mnist-cnn-hardened", 0.2), ("mnist_cnn_a_adv", 0.3), ("cifar_cnn_a_adv", 2 / 255))
)


def measured() -> Outcome:
    return compared("fast-small", SETTINGS, _opened)


def _opened(setting: Setting) -> tuple[nn.Module, Tensor, Tensor]:
    net = network(setting.network)
    return net.module, *images(net.data, setting.n)
