"""The tensor in what a network returned."""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from holdfast.core.errors import TargetError
from holdfast.core.names import with_article


@runtime_checkable
class _HasLogits(Protocol):
    """Protocol of outputs with several tensors in one object, such as those of transformers."""

    logits: object


def tensor_of(returned: object, task: str, *names: str) -> Tensor:
    """Return the tensor of floats in the outputs of a network: the outputs themselves, their attribute `logits`, their
    entry with one of the `names` or `logits`, or the first of several.

    Raises `TargetError` if there is none.
    """
    found = returned
    if isinstance(found, _HasLogits):
        found = found.logits
    if isinstance(found, Mapping):
        found = next((found[name] for name in (*names, "logits") if name in found), found)
    if isinstance(found, Sequence) and not isinstance(found, str) and len(found):
        found = found[0]
    if isinstance(found, np.ndarray):
        found = torch.as_tensor(found)
    if isinstance(found, Tensor) and found.dim():
        return found if found.is_floating_point() else found.float()
    kind = type(returned)
    name = f"{'' if kind.__module__ == 'builtins' else f'{kind.__module__}.'}{kind.__qualname__}"
    raise TargetError(
        f"the model returned {with_article(name)}, and a model for {task} returns one tensor; declare "
        "another task (--task)"
    )
