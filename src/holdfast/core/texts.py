"""Texts as rows of a tensor: the Unicode code points of each text as floats, followed by zeros.

All code points are below 2**24, up to which float32 represents whole numbers exactly.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

LARGEST = 0x10FFFF
"""Largest Unicode code point."""


def encoded(texts: Sequence[str], width: int) -> Tensor:
    """Return the code points of texts as floats (n, width), padded with zeros.

    No text may be longer than `width`. The end of a text is its last code point that is not 0.

    >>> encoded(["ab", ""], 3).tolist()
    [[97.0, 98.0, 0.0], [0.0, 0.0, 0.0]]
    """
    longest = max(map(len, texts), default=0)
    if longest > width or width < 1:
        raise ValueError(f"width is {width}, and the longest text has {longest} characters")
    array = np.array(list(texts), dtype=f"<U{width}")
    return torch.from_numpy(array.view("<u4").reshape(len(texts), width).astype(np.float32))


def decoded(x: Tensor) -> list[str]:
    """Return the texts of rows of code points (n, width). It is the inverse of `encoded`.

    Values are rounded to whole numbers, and limited to the valid code points.

    >>> decoded(encoded(["ab", ""], 3))
    ['ab', '']
    """
    if not len(x):
        return []
    numbers = x.detach().cpu().double().round().clamp(0, LARGEST).numpy().astype("<u4")
    texts: list[str] = np.ascontiguousarray(numbers).view(f"<U{numbers.shape[1]}")[:, 0].tolist()
    return texts
