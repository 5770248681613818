"""A network of transformers for images behind the image processor of its folder: images with values from 0 to 1 get the
processor's size, and its scale, mean and std.

The values are those of the processor itself, which is applied to small images: a colour matrix and an offset contain
the scale, mean and std, and an order of the channels other than red, green, blue.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from holdfast.core.errors import TargetError

_LARGEST_SIDE = 4096
"""Largest number in the settings of a processor. An image of it has 200 MB, and known models take smaller ones."""
_MODES = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}
"""Interpolations of torch by the number of the one of Pillow."""
_TRIED = (20, 24)
"""Height and width of the images to which the processor is applied."""
_ROUNDING = 2.5 / 255
"""Largest difference of a resized value: Pillow rounds after each of two directions, and torch does not."""


class ProcessedImages(nn.Module):
    """A network of transformers that is called with images (n, channels, height, width) with values from 0 to 1."""

    colours: Tensor
    offset: Tensor

    def __init__(
        self,
        model: nn.Module,
        colours: Tensor,
        offset: Tensor,
        size: tuple[int, int] | None,
        mode: str | None,
    ) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("colours", colours)
        self.register_buffer("offset", offset)
        self.size = size
        """height and width of the inputs of the network; None if the processor does not change the size"""
        self.mode = mode
        """interpolation with which images of another size are resized; None if they are refused"""

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the images."""
        logits: Tensor = self.model(pixel_values=self.processed(x)).logits
        return logits

    def processed(self, x: Tensor) -> Tensor:
        """Return the images as the network expects them. Raises `TargetError` for images of another size if the
        processor crops such images.
        """
        if self.size is not None and tuple(x.shape[2:]) != self.size:
            if self.mode is None:
                expected = " x ".join(map(str, self.size))
                raise TargetError(
                    f"an image has the shape {tuple(x.shape[1:])}, and the network takes {expected}; resize or crop "
                    f"the images to {expected} before, because the processor of the folder crops images of other sizes"
                )
            smooth = {} if self.mode == "nearest-exact" else {"antialias": True, "align_corners": False}
            x = F.interpolate(x, self.size, mode=self.mode, **smooth).clamp(0, 1)
        return F.conv2d(x, self.colours[:, :, None, None], self.offset)


def refuse_large_sizes(settings: Mapping[str, Any], path: str) -> None:
    """Raise `TargetError` for a number in the settings of a processor that is no size of an image: applying the
    processor could use any amount of memory.
    """
    for value in _numbers(settings):
        if not abs(value) <= _LARGEST_SIDE:
            raise TargetError(
                f"{path!r} contains the number {value:g}; sizes of images of at most {_LARGEST_SIDE:,} were expected: "
                "save the processor again"
            )


def _numbers(value: Any) -> list[float]:
    if isinstance(value, Mapping):
        return [number for inner in value.values() for number in _numbers(inner)]
    if isinstance(value, list):
        return [number for inner in value for number in _numbers(inner)]
    return [value] if isinstance(value, int | float) else []


def processed_images(net: nn.Module, processor: Any, source: str) -> tuple[ProcessedImages, tuple[str, ...]]:
    """Return a network behind the image processor of its folder, and notes. `source` names the folder in errors.

    Raises `TargetError` for a processor that changes images in another way than by size, scale, mean and std.
    """
    channels = int(getattr(net.config, "num_channels", 3))
    colours, offset = _colours(processor, channels, source)
    size, resizes = _size(processor)
    mode = _MODES.get(int(processor.resample)) if resizes and processor.resample is not None else None
    images = ProcessedImages(net, colours, offset, size, mode)
    if mode is not None and not _alike(images, processor, channels):
        images.mode = None
    return images, () if size is None else (_note(images),)


def _note(images: ProcessedImages) -> str:
    height, width = images.size or (0, 0)
    other = "others are refused" if images.mode is None else "others are resized to it inside the model"
    return f"the network takes images of {height} x {width}, with the values of the processor of the folder; {other}"


def _size(processor: Any) -> tuple[tuple[int, int] | None, bool]:
    """Return height and width of a processed square image, or None if the processor does not change the size, and
    whether other images are resized to it as a whole.
    """
    crops, resizes = (bool(getattr(processor, name, False)) for name in ("do_center_crop", "do_resize"))
    named = processor.crop_size if crops else processor.size if resizes else None
    sides = {} if named is None else dict(named)
    if sides.get("height") and sides.get("width"):
        return (int(sides["height"]), int(sides["width"])), resizes and not crops
    if sides.get("shortest_edge"):
        return (int(sides["shortest_edge"]), int(sides["shortest_edge"])), False
    return None, False


def _colours(processor: Any, channels: int, source: str) -> tuple[Tensor, Tensor]:
    """Return the colour matrix (channels, channels) and the offset (channels,) by which a processor changes values from
    0 to 1.
    """
    images = np.zeros((channels + 2, channels, *_TRIED), np.uint8)
    images[np.arange(channels), np.arange(channels)] = 255
    images[-1] = np.random.default_rng(0).integers(0, 256, images.shape[1:])
    outputs = _applied(processor, images, do_resize=False, do_center_crop=False)
    if outputs is not None and outputs.shape == images.shape:
        offset = outputs[channels, :, 0, 0]
        colours = (outputs[:channels, :, 0, 0] - offset).T.contiguous()
        x = torch.from_numpy(images).double() / 255
        computed = F.conv2d(x, colours[:, :, None, None], offset)
        if bool((computed - outputs).abs().max() <= 1e-4 * colours.abs().max()):
            return colours.float(), offset.float()
    raise TargetError(
        f"the image processor of {source}, {type(processor).__name__}, changes images in another way than by size, "
        "scale, mean and std; build the model with this step in a file of yours, and give file.py:factory"
    )


def _alike(images: ProcessedImages, processor: Any, channels: int) -> bool:
    """Return whether the resized images are those of the processor, up to rounding."""
    # Pillow clamps after each of two directions, which nothing does to moderate values
    pixels = np.random.default_rng(1).integers(64, 192, (1, channels, *_TRIED)).astype(np.uint8)
    outputs = _applied(processor, pixels)
    if outputs is None:
        return False
    processed = images.processed(torch.from_numpy(pixels).float() / 255)
    allowed = _ROUNDING * float(images.colours.abs().sum(1).max())
    return processed.shape == outputs.shape and bool((processed - outputs).abs().max() <= allowed)


def _applied(processor: Any, images: NDArray[np.uint8], **steps: bool) -> Tensor | None:
    """Return the outputs of a processor for images (n, channels, height, width), or None if it returns another form."""
    try:
        outputs = processor([*images], return_tensors="pt", input_data_format="channels_first", **steps)[
            "pixel_values"
        ]
    except (TypeError, ValueError, KeyError, RuntimeError, IndexError):
        return None
    return outputs.double() if isinstance(outputs, Tensor) and outputs.dim() == 4 else None
