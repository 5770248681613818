"""Generated images from a file of the user, which are drawn by class."""

from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.core.batch import UNLABELLED, Batch, TrainingData
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.types import Inputs
from holdfast.io.data.ranges import Ranges

_COMPARED = 1000  # training examples whose range of values is compared


@dataclass(frozen=True)
class FileSamples:
    """Generated images from a file, of which one of the class of each example is drawn at random."""

    images: Batch
    order: Tensor
    """rows of the images, sorted by class"""
    ends: Tensor
    """number of images of all classes up to each class"""

    @classmethod
    def of(cls, images: Batch, data: TrainingData) -> "FileSamples":
        """Return the images on the device of the training data. Raises `UsageError` for images of another shape or
        range of values, or if a class of the data has none.
        """
        if images.example_shape != data.example_shape:
            raise UsageError(
                f"the generated images have shape {images.example_shape}, and the training examples "
                f"{data.example_shape}; give images of the same shape"
            )
        ranges = Ranges.of(images.x, data.first(_COMPARED).x)
        ranges.refuse("the generated images have", "the training examples have")
        missing = sorted(set(data.y[data.y != UNLABELLED].tolist()) - set(images.y.tolist()))
        if missing:
            raise UsageError(
                f"no generated image is of class {', '.join(map(str, missing))}, which the training examples have; "
                "give images of all classes"
            )
        images = images.to(data.ids.device)
        return cls(
            images,
            images.y.argsort(stable=True),
            images.y.bincount(minlength=int(data.y.max()) + 1).cumsum(0),
        )

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that change in training, which are none."""
        return {}

    def accepted(self, batch: Batch, rng: Draws, least: float) -> tuple[Inputs, Tensor]:
        """Return an image of the class of each example, which are all accepted."""
        last = self.ends[batch.y]
        first = torch.where(batch.y > 0, self.ends[(batch.y - 1).clamp(min=0)], 0)
        place = first + (rng.uniform(batch.ids, dtype=torch.float64) * (last - first)).long()
        return self.images.x[self.order[place]], torch.ones_like(batch.y, dtype=torch.bool)
