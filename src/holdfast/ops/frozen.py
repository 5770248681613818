"""The network as the attack inside training meets it: the weights of the moment, and nothing that learns.

Whose statistics batch norm should go by then is open: Xie et al., "Adversarial Examples Improve Image Recognition",
CVPR 2020, arXiv:1911.09665, find those of clean and attacked inputs apart enough to keep both. Here an attack goes by
the running ones, which are what the model will be attacked with, or by those of its own batch.
"""

from copy import deepcopy
from typing import Literal

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from holdfast.core.model import Classifier
from holdfast.ops.stem import quicken_stems

Statistics = Literal["running", "batch"]
"""What batch norm goes by: the mean and variance that it has gathered, or those of the batch in hand."""


def twin(model: Classifier, statistics: Statistics = "running") -> Classifier:
    """A frozen copy in eval mode whose weights and running statistics are those of `model`, in the same memory.

    Updates in place, as optimisers and batch norm make them, show in both. Attacks on it build no graph of the weights,
    leave batch norm alone, and are quick in the gradient of the image. With `statistics` of the batch, batch norm goes
    by those of what the copy is given, and gathers none.
    """
    copied = deepcopy(model).eval().requires_grad_(False)
    if statistics == "batch":
        for layer in copied.modules():
            if isinstance(layer, _BatchNorm):
                layer.running_mean = layer.running_var = (
                    None  # torch then takes the batch's, in eval mode too
                )
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, value in (*copied.named_parameters(), *copied.named_buffers()):
        _share(value, own[name])
    if next(copied.parameters()).device.type == "cpu":
        quicken_stems(copied)
    return copied


def _share(copied: Tensor, own: Tensor) -> None:
    copied.data = own.data
