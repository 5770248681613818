"""Streams of benign queries, and models behind a stateful defence, for the row `query-detector`."""

import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import process_time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from benchmarks.networks import images
from holdfast.core.model import Bounds
from holdfast.core.outputs import REFUSED

POPULAR, REPEATS, ENCODINGS = 200, 40, 10
"""Images that many clients send, how often each is sent unchanged, and in how many other encodings."""
CLIPS, FRAMES, NOISE = 300, 30, 1 / 255
"""Videos, frames of each, and the standard deviation of the noise of their sensors."""
QUALITIES = (95, 90, 85, 80, 75, 70, 65, 60, 55, 50)
"""Of JPEG, with colours at full and half resolution in turn."""


def benign(data: str, n: int, rng: np.random.Generator) -> Iterator[tuple[Tensor, str]]:
    """Yield `n` queries and their clients: all images of a data set once, retries, popular images unchanged and encoded
    again, and videos whose neighbouring frames are shifted, zoomed, brighter or darker, and noisy.
    """
    x = torch.cat([images(data, 60_000, "train")[0], images(data, 10_000, "test")[0]])
    order = rng.permutation(len(x))
    popular, filmed, single = np.split(order, [POPULAR, POPULAR + CLIPS])
    sent = [(int(row), "") for row in single]
    sent += [(int(row), "again") for row in np.repeat(popular, REPEATS)]
    sent += [(int(row), f"encoded {k}") for row in popular for k in range(ENCODINGS)]
    n_retries = n - len(sent) - CLIPS * FRAMES
    assert n_retries >= 0
    sent += [(int(row), "again") for row in rng.choice(single, n_retries)]
    sent = [sent[k] for k in rng.permutation(len(sent))]
    clips = [film(x[row], rng) for row in filmed]
    # a clip begins somewhere in the stream, and its frames follow with other queries between them
    begins = sorted(rng.integers(0, max(1, len(sent) - 40 * FRAMES), CLIPS))
    due = sorted(
        (int(begin + 20 * frame), clip, frame) for clip, begin in enumerate(begins) for frame in range(FRAMES)
    )
    for at, (row, how) in enumerate(sent):
        while due and due[0][0] <= at:
            _, clip, frame = due.pop(0)
            yield clips[clip][frame], f"camera {clip}"
        encoding = how.removeprefix("encoded ") if how.startswith("encoded") else ""
        yield encoded(x[row], int(encoding)) if encoding else x[row], f"client {rng.integers(500)}"
    for _, clip, frame in due:
        yield clips[clip][frame], f"camera {clip}"


def encoded(x: Tensor, k: int) -> Tensor:
    """An image after JPEG with the quality number `k`."""
    pixels = (x.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels if x.shape[0] == 3 else pixels[:, :, 0]).save(
        file, "JPEG", quality=QUALITIES[k], subsampling=2 * (k % 2)
    )
    decoded = torch.from_numpy(np.asarray(Image.open(file)).copy()).float() / 255
    return decoded.permute(2, 0, 1) if x.shape[0] == 3 else decoded[None]


def film(x: Tensor, rng: np.random.Generator, *, still: bool = False) -> Tensor:
    """The frames of a camera that pans over an image by up to half a pixel for each frame, and zooms; or, with `still`,
    does not move.
    """
    frames, angle = torch.arange(FRAMES), rng.uniform(0, 2 * math.pi)
    speed, zoom = (0.0, 0.0) if still else (rng.uniform(0.1, 0.5), rng.normal() * 0.005)
    side = x.shape[-1]
    scale = 1 + zoom * frames
    grid = torch.zeros(FRAMES, 2, 3)
    grid[:, 0, 0] = grid[:, 1, 1] = 1 / scale
    grid[:, 0, 2], grid[:, 1, 2] = (2 * speed * frames * f(angle) / side for f in (math.cos, math.sin))
    places = F.affine_grid(grid, [FRAMES, *x.shape], align_corners=False)
    moved = F.grid_sample(
        x.expand(FRAMES, -1, -1, -1), places, mode="bicubic", padding_mode="reflection", align_corners=False
    )
    light = 1 if still else torch.from_numpy(1 + 0.02 * np.sin(rng.uniform(0, 1) * frames.numpy())).float()
    light = light if still else light[:, None, None, None]
    noise = NOISE * torch.from_numpy(rng.normal(size=moved.shape)).float()
    return ((light * moved + noise).clamp(0, 1) * 255).round() / 255


@dataclass
class Defended:
    """A network behind a stateful defence, which rejects queries; attacks query it like any model."""

    net: nn.Module
    rejects: Callable[[Tensor], np.ndarray]
    """which inputs of a batch are rejected"""
    bounds: Bounds = field(default_factory=Bounds)
    n_queries: int = 0
    n_rejected: int = 0
    cpu_s: float = 0.0
    """of the defence"""

    def __call__(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        began = process_time()
        rejected = torch.from_numpy(np.asarray(self.rejects(x)))
        self.cpu_s += process_time() - began
        self.n_queries, self.n_rejected = self.n_queries + len(x), self.n_rejected + int(rejected.sum())
        with torch.no_grad():
            logits: Tensor = self.net(x)
        return logits.masked_fill(rejected[:, None], REFUSED)
