"""Random search: directions, windows of images, and random choices of examples."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.attacks.parts.losses import Best, margin
from holdfast.attacks.parts.sounds import Tones
from holdfast.core.batch import Batch, pick, spread
from holdfast.core.constraints import L1, L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.evidence import Columns
from holdfast.core.model import Bounds, Model
from holdfast.core.types import Ids, Inputs, Mask, Rows
from holdfast.threats.domains import SIGNAL


def distinct_positions(draws: Tensor, m: int) -> Tensor:
    """Convert each row of `k + 1` uniform random numbers to `k` distinct random positions from 0 to `m` - 1.

    The last number of a row is a cyclic shift. All positions are equally likely; sets with neighbouring positions are
    slightly rarer than in a uniform choice.
    """
    k = draws.shape[1] - 1
    positions = (draws[:, :-1] * (m - k + 1)).long().sort(1).values + torch.arange(k, device=draws.device)
    return (positions + (draws[:, -1:] * m).long()) % m


def sample_rows(columns: Columns, among: Mask, rng: Draws, n: int) -> Rows:
    """Return the positions of at most `n` random examples among those of the mask `among`, in ascending order."""
    rows = among.nonzero()[:, 0]
    order = rng.at("sample").uniform(columns["id"][rows], 1, dtype=torch.float64)[:, 0].argsort(stable=True)
    return rows[order[:n]].sort().values


def directions(rng: Draws, ids: Ids, k: int, shape: torch.Size, share: float, dtype: torch.dtype) -> Tensor:
    """Return `k` random search directions of length about one for each example, as (n, k, *shape).

    For images, half of the energy is in the lowest fraction `share` of the frequencies along height and width, and half
    is white noise.
    """
    noise = signs(rng.at("noise"), ids, k, *shape, dtype=dtype)
    if len(shape) != 3 or share >= 1:
        return noise.div_(math.sqrt(shape.numel()))
    return _mixed(noise, rng.at("waves"), ids, share, math.sqrt(0.5))


def waves(rng: Draws, ids: Ids, k: int, shape: torch.Size, share: float, dtype: torch.dtype) -> Tensor:
    """Return `k` random search directions of length one for each example, as (n, k, *shape), which contain only low
    frequencies of an image.

    `share` is the fraction of the frequencies that are used. The directions are sums of orthonormal DCT-II cosines with
    random signs. For inputs that are not images they consist of signs only.
    """
    if len(shape) != 3:
        return signs(rng, ids, k, *shape, dtype=dtype).div_(math.sqrt(shape.numel()))
    nothing = torch.zeros(len(ids), k, *shape, dtype=dtype, device=ids.device)
    return _mixed(nothing, rng, ids, share, 1.0)


def _mixed(noise: Tensor, rng: Draws, ids: Ids, share: float, weight: float) -> Tensor:
    """Signs (n, k, *shape), overwritten in place, plus low-frequency waves, both of length `weight`."""
    _, k, channels, height, width = noise.shape
    rows, columns = (_waves(size, share, ids.device, noise.dtype) for size in (height, width))
    amplitudes = signs(rng, ids, k, channels, len(rows), len(columns), dtype=noise.dtype)
    noise_scale, wave_scale = (weight / math.sqrt(values[0, 0].numel()) for values in (noise, amplitudes))
    flat, half_product = noise.flatten(0, 2), (amplitudes @ columns).flatten(0, 2)
    return flat.baddbmm_(
        rows.T.expand(len(flat), -1, -1), half_product, beta=noise_scale, alpha=wave_scale
    ).view_as(noise)


def ray_and_orthogonal(
    batch: Batch, x: Inputs, bounds: Bounds, rng: Draws, *, share: float
) -> tuple[Inputs, Inputs]:
    """Return for each example the direction from its clean input to `x`, and a random direction orthogonal to it, both
    of length one.
    """
    ray = L2().steepest(x - batch.x, x, bounds)
    random = directions(rng, batch.ids, 1, x.shape[1:], share, x.dtype)[:, 0]
    beside = random - spread((random * ray).flatten(1).sum(1), x) * ray
    return ray, L2().steepest(beside, x, bounds)


def signs(rng: Draws, ids: Ids, *shape: int, dtype: torch.dtype) -> Tensor:
    """Return random signs of shape (n, *shape), -1 or +1 with equal probability, each made from one random bit.

    It is many times faster than `Draws.signs`.
    """
    size = math.prod(shape)
    random_bytes = rng.bits(ids, -(-size // 64)).view(torch.uint8)
    positions = torch.arange(8, device=ids.device)
    # one lookup for each byte gives eight signs
    table = ((torch.arange(256, device=ids.device)[:, None] >> positions & 1) * 2 - 1).to(dtype)
    return F.embedding(random_bytes.int(), table).flatten(1)[:, :size].reshape(len(ids), *shape)


def _waves(size: int, share: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Lowest-frequency cosines of the orthonormal DCT-II, one in each row."""
    frequency = torch.arange(max(1, round(share * size)), device=device, dtype=dtype)[:, None]
    position = torch.arange(size, device=device, dtype=dtype) + 0.5
    waves = torch.cos(math.pi / size * frequency * position) * math.sqrt(2 / size)
    waves[0] /= math.sqrt(2)
    return waves


_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000 steps; the share halves after each
_SCHEDULED = 10_000  # number of steps for which the schedule of the paper is given
_BLOCK = 64  # steps whose windows are drawn at once, which is faster for small batches


def window_share(p_init: float, step: int, steps: int | None) -> float:
    """Return the fraction of an image that the random window of Square Attack covers at a step of its schedule, which
    has 10,000 steps or is scaled to `steps`.
    """
    at = step if steps is None else step * _SCHEDULED // steps
    return p_init * 0.5 ** bisect_left(_HALVINGS, at)


def as_image(shape: torch.Size) -> tuple[int, int, int]:
    """Return channels, height and width of the images to which Square Attack reshapes inputs of this shape."""
    if len(shape) < 3:
        height, width = (1, *shape)[-2:] if shape else (1, 1)
        return 1, height, width
    return shape[0], math.prod(shape[1:-1]), shape[-1]


def window(p: float, height: int, width: int, *, odd: bool) -> tuple[int, int]:
    """Return height and width of a window of Square Attack that covers the fraction `p` of an image. It is a square if
    a square fits.

    With `odd`, which patterns need, the side of the square is odd and at least 3.
    """
    pixels = p * height * width
    side = max(round(math.sqrt(pixels)), 3 if odd else 1)
    side += odd and side % 2 == 0
    rows = min(side, height)
    columns = side if rows == side else max(round(pixels / rows), 1)
    return rows, min(columns, width)


def with_windows(delta: Tensor, eps: float, draws: Tensor, rows: int, columns: int) -> Tensor:
    """Return a perturbation (channels, height, width) with k windows of a size, in each of which every channel is set
    to `eps` or `-eps`. `draws` (k, 2 + channels) are uniform random numbers for the positions and the signs.
    """
    changed = delta.clone()
    room = torch.tensor((delta.shape[1] - rows + 1, delta.shape[2] - columns + 1))
    corners = (draws[:, :2] * room).long().tolist()
    for (top, left), side in zip(corners, eps * ((draws[:, 2:] < 0.5) * 2 - 1), strict=True):
        changed[:, top : top + rows, left : left + columns] = side[:, None, None]
    return changed


def pattern(rows: int, columns: int, norm: L2 | L1, like: Tensor) -> Tensor:
    """Return the pattern (rows, columns) with which Square Attack fills a window under L2 and L1: two peaks of opposite
    sign, of length one in the norm.
    """
    upper = _heap(rows // 2, columns, norm)
    peaks = torch.cat((upper, -_heap(rows - rows // 2, columns, norm))).to(like.device, like.dtype)
    return peaks / norm.distance(peaks[None], torch.zeros_like(peaks)[None])


def _heap(rows: int, columns: int, norm: L2 | L1) -> Tensor:
    """A peak: the sum over k from the distance to the centre of 1 / (k + 1)^2 (L1: ^4), scaled to length one."""
    if not rows:
        return torch.zeros(0, columns)
    n_terms = max(rows, columns) // 2 + 1
    terms = torch.arange(1, n_terms + 1, dtype=torch.float64) ** (-4 if isinstance(norm, L1) else -2)
    heights = terms.flip(0).cumsum(0).flip(0)
    down, across = torch.arange(rows) - rows // 2, torch.arange(columns) - columns // 2
    heap = heights[torch.maximum(down.abs()[:, None], across.abs()[None])]
    return heap / norm.distance(heap[None], torch.zeros_like(heap)[None])


class Proposals(Protocol):
    """Protocol of a random search that proposes changed points for each example and stores the best points so far.

    The first points are complete starts; afterwards one window is changed in each step.
    """

    per_step: int
    """number of uniform random numbers that a step needs for each example"""
    x: Inputs
    """best points so far"""

    def start(self, rng: Draws) -> Inputs:
        """Return the starting points of a random search, (n, *features)."""

    def plan(self, draws: Tensor, shares: Sequence[float]) -> None:
        """Prepare a block of steps of a random search from the random numbers `draws` (n, steps, per_step) and the
        fractions of the image that the window covers in each step.
        """

    def propose(self, step: int) -> Inputs:
        """Return the points that the random search tries in a step of the current block, (n, *features)."""

    def keep(self, better: Mask) -> None:
        """Make the last tried point the best point of each example for which `better` is true."""

    def take(self, rows: Mask) -> None:
        """Restrict the state of the random search to the examples of the mask `rows`, because the others are no longer
        attacked.
        """


class _Windows:
    """Pixel positions of the windows of a block of steps, in flattened images."""

    def __init__(self, draws: Tensor, sizes: Sequence[tuple[int, int]], height: int, width: int) -> None:
        room = torch.tensor([(height - a + 1, width - b + 1) for a, b in sizes], device=draws.device)
        corner = (draws * room).long()
        self._first = (corner[..., 0] * width + corner[..., 1]).t().contiguous()
        self._sizes = sizes
        # positions of the pixels of a window relative to its corner
        self._offsets = {
            (rows, columns): (torch.arange(rows)[:, None] * width + torch.arange(columns))
            .flatten()
            .to(draws.device)
            for rows, columns in set(sizes)
        }

    def positions(self, step: int) -> Tensor:
        """Return the pixel positions (n, 1, pixels) of the windows of Square Attack in a step, one window for each
        example.
        """
        return (self._first[step][:, None] + self._offsets[self._sizes[step]])[:, None]

    def take(self, rows: Mask) -> None:
        """Restrict the windows of Square Attack to the examples of the mask `rows`, because the others are no longer
        attacked.
        """
        self._first = self._first[:, rows]


class Corners:
    """Random search of Square Attack under Linf. In each step, all pixels of a window change by plus or minus eps, with
    one random sign for each channel.

    Windows are read and written by pixel positions, because most have few pixels.
    """

    def __init__(self, batch: Batch, norm: Linf, bounds: Bounds) -> None:
        self._ids = batch.ids
        self._channels, self._height, self._width = as_image(batch.x.shape[1:])
        self.per_step = 2 + self._channels
        low, high = (norm.project(batch.x + side * norm.eps, batch.x, bounds) for side in (-1, 1))
        self._corners = torch.cat(
            [side.reshape(len(batch), self._channels, -1) for side in (low, high)], dim=2
        )
        self.x = low

    def start(self, rng: Draws) -> Inputs:
        """Return the starting points of Square Attack under Linf: vertical stripes of plus or minus eps, with a random
        sign for each column of each channel.
        """
        up = rng.uniform(self._ids, self._channels, 1, self._width) < 0.5
        low, high = self._corners.view(*self._corners.shape[:2], 2, self._height, self._width).unbind(2)
        self.x = torch.where(up, high, low).view_as(self.x)
        return self.x.clone()  # a copy, because `keep` changes `x` in place

    def plan(self, draws: Tensor, shares: Sequence[float]) -> None:
        """Prepare a block of steps of Square Attack under Linf: the positions of the windows and the signs of their
        changes.
        """
        sizes = [window(p, self._height, self._width, odd=False) for p in shares]
        self._windows = _Windows(draws[..., :2], sizes, self._height, self._width)
        up = (draws[..., 2:] < 0.5).transpose(0, 1)[..., None]
        self._side = up * (self._height * self._width)  # the high corners are stored after the low ones

    def propose(self, step: int) -> Inputs:
        """Return the best points so far with the window of this step changed by plus or minus eps."""
        positions = self._windows.positions(step)
        self._new = self._corners.gather(2, positions + self._side[step])
        self._at = positions.expand_as(self._new)
        return self._pixels.scatter(2, self._at, self._new).view_as(self.x)

    @property
    def _pixels(self) -> Tensor:
        return self.x.view(len(self.x), self._channels, -1)

    def keep(self, better: Mask) -> None:
        """Copy the last tried window into the best point of each example for which `better` is true."""
        old = self._pixels.gather(2, self._at)
        self._pixels.scatter_(2, self._at, torch.where(spread(better, old), self._new, old))

    def take(self, rows: Mask) -> None:
        """Restrict the state of Square Attack to the examples of the mask `rows`, because the others are no longer
        attacked.
        """
        self._ids, self._corners, self.x = self._ids[rows], self._corners[rows], self.x[rows]
        self._windows.take(rows)
        self._side = self._side[:, rows]


class Heaps:
    """Random search of Square Attack under L2 and L1. In each step, the changes in two windows are removed, and a
    pattern with their norm is added in one of them.
    """

    def __init__(self, batch: Batch, norm: L2 | L1, bounds: Bounds) -> None:
        self._ids, self._clean, self._norm, self._bounds = batch.ids, batch.x, norm, bounds
        self._image = self._channels, self._height, self._width = as_image(batch.x.shape[1:])
        self._ball = norm.resized(norm.eps * (1 - 1e-6))  # room for rounding
        self.per_step = 5 + self._channels
        self._patterns: dict[tuple[int, int], Tensor] = {}
        self.x = batch.x

    def start(self, rng: Draws) -> Inputs:
        """Return the starting points of Square Attack under L2 and L1: a grid of at least five by five patterns, each
        with a random sign and orientation.
        """
        down, across = _tiles(self._height), _tiles(self._width)
        columns = int(across.max()) + 1
        tile = (down[:, None] * columns + across).to(self._clean.device)
        n_tiles = (int(down.max()) + 1) * columns
        sides = max(self._height // 5, 1), max(self._width // 5, 1)
        upright = _tiled(pattern(*sides, self._norm, self._clean), down, across)
        lying = _tiled(pattern(*sides[::-1], self._norm, self._clean).t(), down, across)
        turned = rng.at("turn").uniform(self._ids, 1, n_tiles)[..., tile] < 0.5
        signs = rng.at("sign").signs(self._ids, self._channels, n_tiles, dtype=self._clean.dtype)[..., tile]
        delta = torch.where(turned, lying, upright) * signs
        if isinstance(self._norm, L2):
            delta = delta * spread(
                self._ball.eps / self._norm.distance(delta, torch.zeros_like(delta)), delta
            )
        self.x = self._ball.project(self._clean + delta.view_as(self._clean), self._clean, self._bounds)
        return self.x

    def plan(self, draws: Tensor, shares: Sequence[float]) -> None:
        """Prepare a block of steps of Square Attack under L2 and L1: the positions of two windows in each step, and the
        sign and orientation of the pattern.
        """
        self._sizes = [window(p, self._height, self._width, odd=True) for p in shares]
        self._first, self._second = (
            _Windows(draws[..., k : k + 2], self._sizes, self._height, self._width) for k in (0, 2)
        )
        self._turned = (draws[..., 4] < 0.5).t().contiguous()
        self._signs = (1 - 2 * (draws[..., 5:] < 0.5).to(self._clean.dtype)).transpose(0, 1).contiguous()

    def propose(self, step: int) -> Inputs:
        """Return the best points so far with the changes in two windows removed and a pattern with their norm in the
        first window.
        """
        self._candidate = self._changed(step, self.x)
        return self._candidate

    def keep(self, better: Mask) -> None:
        """Make the last tried point the best point of each example for which `better` is true."""
        self.x = pick(better, self._candidate, self.x)

    def _changed(self, step: int, x: Inputs) -> Inputs:
        n, fill = len(x), self._pattern(self._sizes[step])
        delta = (x - self._clean).reshape(n, self._channels, -1)
        first, second = (
            windows.positions(step).expand(n, self._channels, -1) for windows in (self._first, self._second)
        )
        old = delta.gather(2, first)
        heap = (
            torch.where(self._turned[step][:, None], fill[1], fill[0])[:, None] * self._signs[step][..., None]
        )
        heap = heap + old / self._size(old).clamp_min(1e-12)
        used = self._size(delta)
        delta = delta.scatter(2, first, 0).scatter_(2, second, 0)
        length = self._length(used, self._size(delta))
        delta = delta.scatter_(2, first, heap * (length / self._size(heap).clamp_min(1e-12)))
        if isinstance(self._norm, L1):
            return self._ball.project(self._clean + delta.view_as(x), self._clean, self._bounds)
        delta = delta * (self._ball.eps / delta.flatten(1).norm(dim=1).clamp_min(1e-12))[:, None, None]
        return self._bounds.clamp(self._clean + delta.view_as(x))

    def _size(self, delta: Tensor) -> Tensor:
        """Norm of each channel (n, channels, 1)."""
        if isinstance(self._norm, L1):
            return delta.abs().sum(2, keepdim=True)
        return (delta**2).sum(2, keepdim=True).sqrt()

    def _length(self, used: Tensor, kept: Tensor) -> Tensor:
        """Norm of a channel's peak: that of its windows, and its part of the remaining norm of the image up to eps."""
        if isinstance(self._norm, L1):
            return (self._norm.eps - used.sum(1, keepdim=True)).clamp_min(0) + self._channels * (used - kept)
        unused = (self._norm.eps**2 - (used**2).sum(1, keepdim=True)).clamp_min(0) / self._channels
        return (unused + (used**2 - kept**2).clamp_min(0)).sqrt()

    def _pattern(self, size: tuple[int, int]) -> Tensor:
        """Both orientations (2, pixels) of the pattern of a window."""
        if size not in self._patterns:
            upright = pattern(*size, self._norm, self._clean)
            lying = pattern(*size[::-1], self._norm, self._clean).t()
            self._patterns[size] = torch.stack((upright, lying)).flatten(1)
        return self._patterns[size]

    def take(self, rows: Mask) -> None:
        """Restrict the state of Square Attack to the examples of the mask `rows`, because the others are no longer
        attacked.
        """
        self._ids, self._clean, self.x = self._ids[rows], self._clean[rows], self.x[rows]
        self._first.take(rows)
        self._second.take(rows)
        self._turned, self._signs = self._turned[:, rows], self._signs[:, rows]


def _tiles(extent: int) -> Tensor:
    """Index of the tile that each position belongs to, in a row of at least five tiles; -1 at the edges."""
    side = max(extent // 5, 1)
    first = max((extent - 5 * side) // 2, 0)
    tile = (torch.arange(extent) - first).div(side, rounding_mode="floor")
    return tile.masked_fill((tile < 0) | (tile >= (extent - first) // side), -1)


def _tiled(heap: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """The pattern in every tile, zero at the edges."""
    rows, columns = heap.shape
    first_row, first_column = int((down == 0).nonzero()[0]), int((across == 0).nonzero()[0])
    i = (torch.arange(len(down)) - first_row) % rows
    j = (torch.arange(len(across)) - first_column) % columns
    inside = (down >= 0)[:, None] & (across >= 0)
    return torch.where(inside.to(heap.device), heap[i[:, None], j], 0)


def search(
    model: Model, remaining: Batch, proposals: Proposals, best: Best, shares: Sequence[float], rng: Draws
) -> None:
    """Run the random search of Square Attack: each query tries one changed window, and changes that lower the margin
    are accepted.

    `shares` are the fractions of the pixels that the windows cover, one for each query; the last is not used, since the
    first query evaluates the start. The final point of each example is offered to `best`; broken examples are dropped.
    Cost: a forward for each element of `shares`.
    """
    lowest = margin(
        model(proposals.x.clone(), remaining.ids), remaining
    )  # a copy, because `keep` changes `x` in place
    for step in range(len(shares)):
        at = step % _BLOCK
        if at == 0:
            block = shares[step : step + _BLOCK]
            draws = rng.at("block", step // _BLOCK).uniform(remaining.ids, _BLOCK, proposals.per_step)
            proposals.plan(draws[:, : len(block)], block)
        if not float(lowest.min()) > 0:  # also true if one of them is NaN
            best.offer(remaining, proposals.x, lowest)
            surviving = lowest > 0
            remaining, lowest = remaining.take(surviving), lowest[surviving]
            if not len(remaining):
                return
            proposals.take(surviving)
        if step == len(shares) - 1:
            break
        margins = margin(model(proposals.propose(at), remaining.ids), remaining)
        lower = ~(margins >= lowest)
        proposals.keep(lower)
        lowest = torch.where(lower, margins, lowest)
    best.offer(remaining, proposals.x, lowest)


def proposals_for(batch: Batch, norm: Linf | L2 | L1, bounds: Bounds) -> Proposals:
    """Return the random search of Square Attack for a norm: one kind for Linf, another for L2 and L1, and a search with
    tones for clips.
    """
    if norm.domain is SIGNAL and not isinstance(norm, L1):
        return Tones(batch, norm, bounds)
    return Corners(batch, norm, bounds) if isinstance(norm, Linf) else Heaps(batch, norm, bounds)
