"""Train a sibling of the bundled hardened network, for the choice of `fast`: another budget, seed and length.

Networks of this recipe hide much under L2 from attacks that start inside the ball, as adversarially trained ones of
`controls.py` do not; the bundled network itself is one of those that `fast` is judged on.

    python -m benchmarks.sibling        # two CPU minutes; writes benchmarks/cache/
"""

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.absent import Absent
from benchmarks.bundled import N_VALIDATION, Training, normalised, train
from benchmarks.networks import CACHE, images
from holdfast.sources.architectures import ARCHITECTURES

HOW = Training(
    name="hardened-sibling", eps=0.25, steps=2, step_size=0.08, epochs=8, warmup=3, refresh=4, lr=3e-3,
    weight_decay=1e-4, shift=0, clean_weight=0.25, seed=1,
)  # fmt: skip
SEEN = 55_000
"""training images that it was trained and validated on; the others may be used to choose"""
FILE = CACHE / f"{HOW.name}.safetensors"


class Normalised(nn.Module):
    """The network for images in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ARCHITECTURES[HOW.architecture]()

    def forward(self, x: Tensor) -> Tensor:
        return normalised(self.net, x)


def sibling() -> nn.Module:
    """The trained network in eval mode; `Absent` where it was not trained."""
    if not FILE.is_file():
        raise Absent(f"{FILE.name} is not there: python -m benchmarks.sibling")
    net = Normalised()
    net.net.load_state_dict(load_file(FILE))
    return net.eval().requires_grad_(False)


def main() -> None:
    torch.set_num_threads(1)
    x, y = images("mnist", SEEN, split="train")
    net = train(HOW, x, y)
    CACHE.mkdir(parents=True, exist_ok=True)
    save_file(net.state_dict(), FILE)
    print(f"trained on {SEEN - N_VALIDATION:,} images, chosen by {N_VALIDATION:,} others")


if __name__ == "__main__":
    main()
