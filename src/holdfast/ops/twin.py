"""The network as the attack inside training meets it: the weights of the moment, and nothing that learns."""

from copy import deepcopy

from torch import Tensor

from holdfast.core.model import Classifier
from holdfast.ops.stem import quicken_stems


def twin(model: Classifier) -> Classifier:
    """A frozen copy in eval mode whose weights and running statistics are those of `model`, in the same memory.

    Updates in place, as optimisers and batch norm make them, show in both. Attacks on it build no graph of the weights,
    leave batch norm alone, and are quick in the gradient of the image.
    """
    copied = deepcopy(model).eval().requires_grad_(False)
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, value in (*copied.named_parameters(), *copied.named_buffers()):
        _share(value, own[name])
    quicken_stems(copied)
    return copied


def _share(copied: Tensor, own: Tensor) -> None:
    copied.data = own.data
