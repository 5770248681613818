"""A sheet to print the patch of a run in its true size: the patch, its mask, crop marks and a scale, as a PDF."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from holdfast.core.errors import UsageError
from holdfast.io.files import replacing
from holdfast.reports.write import explained
from holdfast.threats.transformations import Patch

_A4_CM = (21.0, 29.7)
_MARGIN_CM, _MARK_CM, _TEXT_CM = 2.5, 0.8, 0.4
_DOTS_PER_CM, _MOST_DOTS = 300 / 2.54, 8000
"""resolution of a sheet, and largest number of dots along a side, above which the resolution is lower"""
_SCALES_CM = (1, 2, 5, 10, 20, 50, 100)
_LEAST_CM, _MOST_CM = 0.1, 1000.0


@dataclass(frozen=True)
class PrintedPatch:
    """A learned patch in printable colours, and the images for which it was learned."""

    patch: Patch
    values: Tensor
    """the learned values (1, channels, height, width) in the units of the model"""
    image: tuple[int, int]
    """height and width of the images in pixels"""


def write_sheet(printed: PrintedPatch, path: Path, width_cm: float) -> Path:
    """Write a PDF of two pages, the patch and its mask, for images that show `width_cm` centimetres from left to right,
    and return the path.

    Raises `UsageError` if the patch would be larger than 10 m or smaller than 1 mm, and `TargetError` if the file
    cannot be written.
    """
    patch, pixel_cm = printed.patch, width_cm / printed.image[1]
    size_cm = (patch.width * pixel_cm, patch.height * pixel_cm)
    if max(size_cm) > _MOST_CM or min(size_cm) < _LEAST_CM:
        raise UsageError(
            f"the patch would be {size_cm[0]:,.4g} x {size_cm[1]:,.4g} cm, if images show {width_cm:,.4g} cm; "
            f"{_LEAST_CM:g} to {_MOST_CM:,g} cm are printed: give --print-size as the width of what the whole image "
            "shows"
        )
    inside = patch.pixels.numpy()
    colours = np.where(inside[..., None], _levels(printed), 255).astype(np.uint8)
    mask = np.where(inside[..., None], 0, 255).astype(np.uint8).repeat(3, 2)
    where = "" if patch.at == "anywhere" else f", {_place(printed)}"
    size = f"{size_cm[0]:.4g} x {size_cm[1]:.4g} cm, for images that show {width_cm:g} cm"
    pages = [
        _page(colours, size_cm, f"patch {patch.width} x {patch.height} pixels: {size}{where}"),
        _page(mask, size_cm, f"mask: cut along the black area, {size}"),
    ]
    dots = pages[0].info["dots"] * 2.54
    with explained(path), replacing(path) as file:
        pages[0].save(file, "PDF", resolution=dots, save_all=True, append_images=pages[1:])
    return path


def _place(printed: PrintedPatch) -> str:
    """Where the patch belongs, as fractions of the image."""
    rows, columns = printed.patch.places(torch.Size((1, *printed.image)))
    row, column = rows[len(rows) // 2] / printed.image[0], columns[len(columns) // 2] / printed.image[1]
    return f"upper left corner at {100 * column:.3g} % from the left and {100 * row:.3g} % from the top"


def _levels(printed: PrintedPatch) -> NDArray[np.float64]:
    """The patch as levels of red, green and blue (height, width, 3) from 0 to 255."""
    content = json.loads(printed.patch.content)
    low, high = (np.array(content[end]) for end in ("low", "high"))
    values = printed.values[0].double().movedim(0, -1).numpy()
    levels: NDArray[np.float64] = ((values - low) / (high - low) * 255).round().clip(0, 255)
    return levels.repeat(3 // levels.shape[2], 2)


def _page(pixels: NDArray[np.uint8], size_cm: tuple[float, float], text: str) -> Image.Image:
    """A page with a picture of a size, crop marks, a scale and a line of text."""
    width_cm, height_cm = (
        max(least, size + 2 * _MARGIN_CM) for least, size in zip(_A4_CM, size_cm, strict=True)
    )
    dots = min(_DOTS_PER_CM, _MOST_DOTS / max(width_cm, height_cm))
    page = Image.new("RGB", (round(width_cm * dots), round(height_cm * dots)), "white")
    page.info["dots"] = dots
    left, top = round((width_cm - size_cm[0]) / 2 * dots), round(_MARGIN_CM * dots)
    right, bottom = left + round(size_cm[0] * dots), top + round(size_cm[1] * dots)
    picture = Image.fromarray(pixels).resize((right - left, bottom - top), Image.Resampling.NEAREST)
    page.paste(picture, (left, top))
    draw, line, mark = ImageDraw.Draw(page), max(1, round(0.02 * dots)), round(_MARK_CM * dots)
    gap = round(0.2 * dots)
    for x in (left, right):
        for start, end in ((top - gap - mark, top - gap), (bottom + gap, bottom + gap + mark)):
            draw.line((x, start, x, end), "black", line)
    for y in (top, bottom):
        for start, end in ((left - gap - mark, left - gap), (right + gap, right + gap + mark)):
            draw.line((start, y, end, y), "black", line)
    length = max(scale for scale in _SCALES_CM if scale <= width_cm - 2 * _MARGIN_CM)
    x, y = round(_MARGIN_CM * dots), bottom + round((_MARK_CM + 0.5) * dots)
    draw.line((x, y, x + round(length * dots), y), "black", 2 * line)
    for tick in (x, x + round(length * dots)):
        draw.line((tick, y - gap, tick, y + gap), "black", line)
    font = ImageFont.load_default(_TEXT_CM * dots)
    draw.text((x, y + gap), f"{length} cm: measure this line on the printed sheet", "black", font)
    lines, words = [""], text.split()
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and draw.textlength(longer, font) > page.width - 2 * x:
            lines.append(word)
        else:
            lines[-1] = longer
    draw.multiline_text((x, round(0.5 * dots)), "\n".join(lines), "black", font)
    return page
