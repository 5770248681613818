"""Frozen copies of a network that is being trained, for the attacks on it. A copy shares the current weights and is not
trained itself.

Which statistics batch norm should use in such attacks is open: Xie et al., "Adversarial Examples Improve Image
Recognition", CVPR 2020, arXiv:1911.09665, find those of clean and attacked inputs different enough to use both. Here an
attack uses the running ones, with which the model will be attacked later, or those of its own batch.
"""

from copy import deepcopy
from typing import Literal

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from holdfast.attacks.parts.stem import quicken_stems
from holdfast.core.model import Classifier

Statistics = Literal["running", "batch"]
"""statistics that batch norm uses: the running mean and variance, or those of the current batch"""


def twin(model: Classifier, statistics: Statistics = "running") -> Classifier:
    """Return a frozen copy of a network in eval mode, which shares the memory of the weights and running statistics
    with `model`.

    Updates in place, such as those of optimisers and batch norm, affect both. Attacks on the copy build no graph of the
    weights, do not change batch norm, and compute the gradient of images fast. With `statistics="batch"`, batch norm
    uses the statistics of the copy's own inputs and stores none.
    """
    copied = deepcopy(model).eval().requires_grad_(False)
    if statistics == "batch":
        for layer in copied.modules():
            if isinstance(layer, _BatchNorm):
                layer.running_mean = layer.running_var = (
                    None  # torch then uses the statistics of the batch, also in eval mode
                )
    shared = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, value in (*copied.named_parameters(), *copied.named_buffers()):
        _share(value, shared[name])
    # the matrix product is faster than the kernels of torch on a CPU only
    if next(copied.parameters()).device.type == "cpu":
        quicken_stems(copied)
    return copied


def _share(copied: Tensor, original: Tensor) -> None:
    copied.data = original.data
