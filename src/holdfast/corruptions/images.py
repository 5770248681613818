"""Blur, noise, weather and digital corruptions of images in [0, 1], and the filters, zooms and warps
that they share.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.core.draws import Draws
from holdfast.core.types import Ids, Inputs, PerExample
from holdfast.corruptions.constants import Constants

Edge = Literal["edge", "mirror", "symmetric"]
"""continuation of an image beyond its border: `aaa|abc`, `cb|abc` or `cba|abc`"""


def wrapped_positions(index: Tensor, size: int, edge: Edge) -> Tensor:
    """Map pixel positions that may lie outside an image to positions inside it, from 0 to `size` - 1, according to the
    padding mode `edge`.
    """
    if edge == "edge":
        return index.clamp(0, size - 1)
    last = 2 * size - 1 if edge == "symmetric" else 2 * size - 2
    index = index % max(last + (edge == "symmetric"), 1)
    return torch.minimum(index, last - index).clamp_min(0)


def along(x: Inputs, rows: Tensor, columns: Tensor) -> Tensor:
    """Apply the matrix `rows` along the height of each image and the matrix `columns` along its width, as separable
    filters require.
    """
    mapped: Tensor = rows @ x @ columns.T
    return mapped


def gaussian_kernel(x: Inputs, sigma: float, *, edge: Edge = "edge", reach: float = 4.0) -> Inputs:
    """Blur the images with a Gaussian of standard deviation `sigma`, whose kernel ends at `reach` times `sigma`."""
    radius = int(reach * sigma + 0.5)
    if radius == 0:
        return x
    offsets = torch.arange(-radius, radius + 1, device=x.device)
    taps = torch.exp(-0.5 * (offsets.to(x) / sigma) ** 2)
    taps = taps / taps.sum()

    def blurs(size: int) -> Tensor:
        """Return the matrix that blurs a line of `size` pixels."""
        ends = wrapped_positions(torch.arange(size, device=x.device)[:, None] + offsets, size, edge)
        return x.new_zeros(size, size).scatter_add_(1, ends, taps.expand(size, -1))

    return along(x, blurs(x.shape[2]), blurs(x.shape[3]))


def filtered(x: Inputs, kernel: Tensor, edge: Edge = "mirror") -> Inputs:
    """Return the images filtered with a kernel: the correlation of every channel with `kernel`, whose sides are odd."""
    n, channels, height, width = x.shape
    above, left = kernel.shape[0] // 2, kernel.shape[1] // 2
    rows = wrapped_positions(torch.arange(-above, height + above, device=x.device), height, edge)
    columns = wrapped_positions(torch.arange(-left, width + left, device=x.device), width, edge)
    padded = x[:, :, rows][:, :, :, columns].reshape(n * channels, 1, len(rows), len(columns))
    return F.conv2d(padded, kernel.to(x)[None, None]).view(x.shape)


def disk(radius: float, alias: float) -> Tensor:
    """Return a filter kernel in the form of a disk, with sum one. Its edge is smoothed by a Gaussian with standard
    deviation `alias` over 3 or 5 pixels.
    """
    half, soft = (8, 1) if radius <= 8 else (math.floor(radius), 2)
    line = torch.arange(-half, half + 1, dtype=torch.float64)
    inside = (line[:, None] ** 2 + line**2 <= radius**2).double()
    taps = torch.exp(-0.5 * (torch.arange(-soft, soft + 1).double() / alias) ** 2)
    taps = taps / taps.sum()
    return filtered((inside / inside.sum())[None, None], taps[:, None] * taps)[0, 0]


def zoomed(x: Inputs, factor: float) -> Inputs:
    """Return the centre of each image, enlarged by `factor` to the size of the whole image with bilinear
    interpolation.
    """
    size = x.shape[2:]
    cut = [math.ceil(side / factor) for side in size]
    top, left = ((side - short) // 2 for side, short in zip(size, cut, strict=True))
    middle = x[:, :, top : top + cut[0], left : left + cut[1]]
    enlarged_size = [round(short * factor) for short in cut]
    middle = F.interpolate(middle, size=enlarged_size, mode="bilinear", align_corners=True)
    top, left = ((side - short) // 2 for side, short in zip(enlarged_size, size, strict=True))
    return middle[:, :, top : top + size[0], left : left + size[1]]


def motion_blurred(x: Inputs, radius: float, sigma: float, *, degrees: PerExample) -> Inputs:
    """Apply motion blur along an angle in degrees for each image. The kernel is half a Gaussian with standard deviation
    `sigma`, over 2 `radius` + 1 pixels.
    """
    width, angle = 2 * math.ceil(radius) + 1, torch.deg2rad(degrees.double())
    taps = torch.exp(-0.5 * (torch.arange(width).double() / sigma) ** 2)
    rows, columns = (torch.arange(side, device=x.device) for side in x.shape[2:])
    image = torch.arange(len(x), device=x.device)[:, None, None]
    total = torch.zeros_like(x)
    for step, share in enumerate((taps / taps.sum()).tolist()):
        down, right = (
            torch.ceil(step * component - 0.5).long()[:, None] for component in (angle.sin(), angle.cos())
        )
        row, column = (
            wrapped_positions(rows + down, len(rows), "edge"),
            wrapped_positions(columns + right, len(columns), "edge"),
        )
        total += share * x[image, :, row[:, :, None], column[:, None, :]].movedim(3, 1)
    return total


def sampled(x: Inputs, row: Tensor, column: Tensor, edge: Edge) -> Inputs:
    """Return images whose pixels are read from `x` at the fractional positions `row` and `column` (n, height, width),
    with bilinear interpolation.
    """
    height, width = x.shape[2:]
    image = torch.arange(len(x), device=x.device)[:, None, None]
    top, left = row.floor(), column.floor()
    down, right = (row - top)[:, None].to(x), (column - left)[:, None].to(x)

    def at(below: int, beside: int) -> Inputs:
        i, j = (
            wrapped_positions(top.long() + below, height, edge),
            wrapped_positions(left.long() + beside, width, edge),
        )
        return x[image, :, i, j].movedim(3, 1)

    upper = (1 - right) * at(0, 0) + right * at(0, 1)
    return (1 - down) * upper + down * ((1 - right) * at(1, 0) + right * at(1, 1))


def clamped(x: Inputs) -> Inputs:
    """Return the images with all values clipped to [0, 1]."""
    return x.clamp(0, 1)


def gaussian_blur(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """Apply the corruption Gaussian blur, with a Gaussian whose standard deviation is `c[0]` pixels."""
    return clamped(gaussian_kernel(x, c[0]))


def defocus_blur(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """Blur the images like a lens out of focus: each value becomes the mean over a disk with radius `c[0]` in pixels,
    whose edge is smoothed by a Gaussian with standard deviation `c[1]`.
    """
    return clamped(filtered(x, disk(*c)))


def motion_blur(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """Blur the images along a random line within 45 degrees of the horizontal, as from a moving camera. The kernel is
    half a Gaussian with radius `c[0]` and standard deviation `c[1]`, in pixels.
    """
    radius, sigma = c
    return clamped(
        motion_blurred(x, radius, sigma, degrees=90 * rng.at("angle").uniform(ids, dtype=torch.float64) - 45)
    )


def zoom_blur(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """Blur the images as by zooming: return the mean of each image and its enlargements by the factors 1 + `c[1]`, 1 +
    2 `c[1]` and so on, below `c[0]`.
    """
    last, step = c
    # the spacing of `numpy.arange` in the published code, with its rounding
    n_zooms, spacing = math.ceil((last - 1) / step), (1 + step) - 1
    total = x.clone()
    for k in range(n_zooms):
        total += zoomed(x, 1 + k * spacing)
    return clamped(total / (n_zooms + 1))


def glass_blur(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """Blur the images as through frosted glass: after a Gaussian blur, each pixel gets the value of a random nearby
    pixel in several rounds, and the result is blurred again.

    `c` contains the standard deviation, the largest distance in pixels and the number of rounds. Pixels are processed
    one after the other from the last one; each copies the value of another pixel, which does not change. The published
    code intends a swap, but overwrites the first pixel before it is read.
    """
    sigma, reach, rounds = c[0], int(c[1]), int(c[2])
    flat = gaussian_kernel(x, sigma).flatten(2)
    for turn in range(rounds):
        source = _scattered(x, reach, ids, rng.at("round", turn))
        flat = flat.gather(2, source[:, None].expand_as(flat))
    return clamped(gaussian_kernel(flat.view_as(x), sigma))


def _scattered(x: Inputs, reach: int, ids: Ids, rng: Draws) -> Tensor:
    """For each pixel (n, height * width), the index of the pixel whose value it gets in a round.

    If that pixel was processed before, its own source counts; such chains are resolved by pointer doubling.
    """
    height, width = x.shape[2:]
    pixel = torch.arange(height * width, device=x.device)
    row, column = pixel // width, pixel % width
    moves = (row > reach) & (row <= height - reach) & (column > reach) & (column <= width - reach)
    shift = rng.integers(ids, 2 * reach, 2, height * width) - reach
    source = (row + shift[:, 1]) * width + column + shift[:, 0]
    source = torch.where(moves, source, pixel)
    resolved = (source > pixel) & moves[source]
    # the second half of the indices stands for the pixels before the round
    ends = (pixel + len(pixel)).expand_as(source)
    follow = torch.cat((torch.where(resolved, source, source + len(pixel)), ends), dim=1)
    while True:
        further = follow.gather(1, follow)
        if torch.equal(further, follow):
            return follow[:, : len(pixel)] - len(pixel)
        follow = further


def gaussian_noise(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """Add normal noise with standard deviation `c[0]` to every value of the images."""
    return clamped(x + c[0] * rng.normal(ids, *x.shape[1:], dtype=x.dtype))


def speckle_noise(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """Add normal noise to every value of the images, with a standard deviation of `c[0]` times the value."""
    return clamped(x + c[0] * x * rng.normal(ids, *x.shape[1:], dtype=x.dtype))


def impulse_noise(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """Replace each value of the images with probability `c[0]` by 0 or 1, which are equally likely."""
    hit = rng.at("hit").uniform(ids, *x.shape[1:], dtype=x.dtype) <= c[0]
    salt = (rng.at("salt").signs(ids, *x.shape[1:], dtype=x.dtype) + 1) / 2
    return torch.where(hit, salt, x)


def shot_noise(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """Replace each value of the images by a Poisson random number with mean `c[0]` times the value, divided by `c[0]`,
    as when photons are counted.

    The count is the quantile of a uniform random number: that of the normal distribution with a correction for
    skewness, then moved to the exact count.
    """
    mean = c[0] * x.double()
    # the normal quantile is infinite at 0 and 1
    u = rng.uniform(ids, *x.shape[1:], dtype=torch.float64).clamp(1e-16, 1 - 1e-16)
    z = torch.special.ndtri(u)
    count = (mean + mean.sqrt() * z + (z**2 - 1) / 6).floor().clamp_min(0)
    while (too_low := torch.special.gammaincc(count + 1, mean) < u).any():
        count += too_low
    while (too_high := (count > 0) & (torch.special.gammaincc(count.clamp_min(1), mean) >= u)).any():
        count -= too_high.double()
    return clamped((count / c[0]).to(x))


_GREY = (0.299, 0.587, 0.114)  # weights of red, green and blue in luma (ITU-R BT.601)


def grey(x: Inputs) -> Tensor:
    """Return the luminance of each pixel of an image, as (n, 1, height, width), with the weights of ITU-R BT.601."""
    if x.shape[1] == 1:
        return x
    return (x * x.new_tensor(_GREY)[:, None, None]).sum(1, keepdim=True)


def paint(red: float, green: float, blue: float, x: Inputs) -> Tensor:
    """Return a colour as a tensor that broadcasts with the images `x`. For grey images it is the luminance of the
    colour.
    """
    colour = x.new_tensor((red, green, blue))[:, None, None]
    return colour if x.shape[1] == 3 else grey(colour[None])[0]


def brightness(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """Brighten the images: add `c[0]` to the value of each pixel in the colour space HSV (hue, saturation, value)."""
    value = x.amax(1, keepdim=True)
    brighter = (value + c[0]).clamp_max(1)
    return torch.where(value > 0, x * (brighter / value.clamp_min(torch.finfo(x.dtype).tiny)), brighter)


def saturate(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """Change the saturation of the images: multiply it by `c[0]` and add `c[1]`. Pixels without a hue are treated as
    red, and grey images do not change.
    """
    if x.shape[1] == 1:
        return x
    value, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    tiny = torch.finfo(x.dtype).tiny
    strength = ((value - low) / value.clamp_min(tiny) * c[0] + c[1]).clamp(0, 1)
    depth = torch.where(value > low, (value - x) / (value - low).clamp_min(tiny), 1 - paint(1, 0, 0, x))
    return clamped(value * (1 - strength * depth))


def contrast(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """Change the contrast of the images: multiply the difference between each value and the mean of its channel by
    `c[0]`.
    """
    mean = x.mean((2, 3), keepdim=True)
    return clamped((x - mean) * c[0] + mean)


def cosines(side: int, like: Tensor) -> Tensor:
    """Return the basis (side, side) of the orthonormal DCT-II, one cosine in each row, lowest frequency first."""
    k = torch.arange(side, dtype=torch.float64)
    waves = torch.cos(math.pi / side * k[:, None] * (k + 0.5)) * math.sqrt(2 / side)
    waves[0] /= math.sqrt(2)
    return waves.to(like.device, like.dtype)


_LIGHT = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_COLOUR = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
_ROUNDING = 1e-4
"""Largest float error at a tie, which the library rounds away from zero."""
_TO_YCC = ((0.299, 0.587, 0.114), (-0.168735892, -0.331264108, 0.5), (0.5, -0.418687589, -0.081312411))
_FROM_YCC = ((1.0, 0.0, 1.402), (1.0, -0.344136286, -0.714136286), (1.0, 1.772, 0.0))


def jpeg_compression(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """Encode the images as JPEG at the quality `c[0]` and decode them. They are rounded to 256 levels before."""
    levels = (255 * x).round()
    if x.shape[1] == 1:
        return _coded(levels, _LIGHT, c[0]) / 255
    height, width = x.shape[2:]
    planes = _mixed(levels, _TO_YCC).round()
    light, colour = planes[:, :1], (planes[:, 1:] + 128).clamp(0, 255)
    odd = torch.arange(width + width % 2, device=x.device) % 2
    mean = F.avg_pool2d(_filled(colour, 2), 2)
    # ties are rounded down in even columns and up in odd ones, and vice versa when colours are enlarged
    half = _coded((mean + 0.25 + 0.25 * odd[: mean.shape[3]]).floor(), _COLOUR, c[0])
    # each value is at the centre of its four pixels: weights 9/16 of the nearest, 3/16, 3/16 and 1/16 of the next
    full = F.interpolate(half, scale_factor=2, mode="bilinear", align_corners=False)
    full = (full + (8 - odd) / 16).floor()
    decoded = torch.cat((_coded(light, _LIGHT, c[0]), full[:, :, :height, :width] - 128), dim=1)
    return _mixed(decoded, _FROM_YCC).round().clamp(0, 255) / 255


def _mixed(x: Inputs, matrix: tuple[tuple[float, ...], ...]) -> Inputs:
    return torch.einsum("ij,njhw->nihw", x.new_tensor(matrix), x)


def _filled(x: Inputs, block: int) -> Inputs:
    """The images with their last row and column repeated up to whole blocks."""
    rows, columns = (
        wrapped_positions(torch.arange(-(-side // block) * block, device=x.device), side, "edge")
        for side in x.shape[2:]
    )
    return x[:, :, rows][:, :, :, columns]


def _coded(levels: Inputs, table: tuple[tuple[int, ...], ...], quality: float) -> Inputs:
    """Levels 0 to 255 after cosine transform, quantisation and inverse transform of each block."""
    height, width = levels.shape[2:]
    padded = _filled(levels, 8)
    n, channels, tall, broad = padded.shape
    blocks = (padded - 128).view(n, channels, tall // 8, 8, broad // 8, 8).transpose(3, 4)
    waves, steps = cosines(8, levels), _steps(table, quality, levels)
    coefficients = waves @ blocks @ waves.T / steps
    quantised = (coefficients.abs() + 0.5 + _ROUNDING).floor() * coefficients.sign() * steps
    decoded = (waves.T @ quantised @ waves).transpose(3, 4).reshape(n, channels, tall, broad)
    return (decoded + 128).round().clamp(0, 255)[:, :, :height, :width]


def _steps(table: tuple[tuple[int, ...], ...], quality: float, like: Tensor) -> Tensor:
    percent = int(5000 / quality) if quality < 50 else int(200 - 2 * quality)
    return ((like.new_tensor(table) * percent + 50) / 100).floor().clamp(1, 255)


def pixelate(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """Pixelate the images: shrink each side to the fraction `c[0]` of its length and enlarge it again, with box
    filters.
    """
    down = [_boxes(side, max(1, int(side * c[0])), x) for side in x.shape[2:]]
    up = [_boxes(len(matrix), side, x) for matrix, side in zip(down, x.shape[2:], strict=True)]
    return clamped(along(along(x, *down), *up))


def _boxes(size: int, new_size: int, like: Tensor) -> Tensor:
    """Matrix that resizes a line from `size` to `new_size` pixels: means of the pixels whose centres a box covers."""
    scale = size / new_size
    middle = (torch.arange(new_size, dtype=torch.float64) + 0.5) * scale
    offset = (torch.arange(size) + 0.5 - middle[:, None]) / max(scale, 1.0)
    covered = ((offset > -0.5) & (offset <= 0.5)).double()
    return (covered / covered.sum(1, keepdim=True)).to(like)


def elastic_transform(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """Distort the images by a random affine map near the identity, and then by a smooth random displacement of every
    pixel.

    The constants are fractions of the shorter side: of the displacement, of its smoothness and of the affine map.
    """
    height, width = x.shape[2:]
    shift, smooth, corner_shift = (min(height, width) * share for share in c)
    rows, columns = (torch.arange(side, device=x.device, dtype=torch.float64) for side in (height, width))
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    inverse_map = _affine(x, corner_shift, ids, rng.at("corners"))
    positions = torch.stack((column, row, torch.ones_like(row)), dim=-1)
    from_column, from_row = torch.einsum("npk,hwk->pnhw", inverse_map, positions)
    warped = sampled(x, from_row, from_column, "mirror")
    dtype = torch.float64
    right, down = (
        shift
        * gaussian_kernel(
            2 * rng.at(name).uniform(ids, 1, height, width, dtype=dtype) - 1,
            smooth,
            edge="symmetric",
            reach=3.0,
        )[:, 0]
        for name in ("right", "down")
    )
    return clamped(sampled(warped, row + down, column + right, "symmetric"))


def _affine(x: Inputs, corner_shift: float, ids: Ids, rng: Draws) -> Tensor:
    """The maps (n, 2, 3) from positions (column, row, 1) of the result to those of the image.

    Three corners of a square in the centre are moved by up to `corner_shift` pixels along each axis.
    """
    height, width = x.shape[2:]
    column, row, side = width // 2, height // 2, math.floor(min(height, width) / 3)
    before = torch.tensor(
        [[column + side, row + side], [column + side, row - side], [column - side, row - side]],
        dtype=torch.float64,
        device=x.device,
    )
    after = before + corner_shift * (2 * rng.uniform(ids, 3, 2, dtype=torch.float64) - 1)
    after = torch.cat((after, torch.ones_like(after[..., :1])), dim=-1)
    inverse_map: Tensor = torch.linalg.solve(after, before.expand(len(x), 3, 2))
    return inverse_map.mT


_WATER = (175 / 255, 238 / 255, 238 / 255)  # pale turquoise, as in the published code
_MUD = (63 / 255, 42 / 255, 20 / 255)  # brown, as in the published code
_FAR = 20.0
"""distance in pixels from the edge of a drop at which it has its full depth"""
_RELIEF = ((-2, -1, 0), (-1, 1, 1), (0, 1, 2))  # emboss filter, as in the published code
_LOW, _HIGH = 50, 150
"""thresholds of the gradient that continues an edge and of the one that starts it"""
_KNIGHT = 2.1969
"""length of the step (1, 2) in Borgefors' distance for neighbourhoods of 5 x 5; (1, 1) is 1.4"""


def spatter(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """Add drops of water or mud to the images. The drops are where smooth normal noise exceeds a threshold; water has
    bright edges.
    """
    mean, spread, smooth, threshold, strength, mud = c
    liquid = mean + spread * rng.normal(ids, 1, *x.shape[2:], dtype=x.dtype)
    liquid = gaussian_kernel(liquid, smooth)
    if mud:
        cover = gaussian_kernel((liquid > threshold).to(x), strength)
        cover = torch.where(cover < 0.8, 0, cover)
        return clamped(x * (1 - cover) + paint(*_MUD, x) * cover)
    drops = torch.where(liquid < threshold, 0, (255 * liquid).floor().clamp(0, 255))
    shine = drops * _relief(drops)
    shine = shine / shine.amax((1, 2, 3), keepdim=True).clamp_min(1)
    return clamped(x + strength * shine * paint(*_WATER, x))


def _relief(drops: Inputs) -> Inputs:
    """Highlights of the drops: their depth after histogram equalisation, lit from one corner."""
    mean = drops.new_full((3, 3), 1.0)
    depth = (filtered(_distance(_rims(drops)), mean) / 9 + 1e-4).floor()
    lit = filtered(_equalised(depth), drops.new_tensor(_RELIEF)).clamp(0, 255)
    return (filtered(lit, mean) / 9).round()


def _shifted(x: Tensor, down: int, right: int, beyond: float) -> Tensor:
    """The value `down` rows and `right` columns from each pixel, `beyond` outside the image."""
    rows, columns = (torch.arange(side, device=x.device) for side in x.shape[2:])
    row, column = rows + down, columns + right
    inside = ((row == wrapped_positions(row, len(rows), "edge"))[:, None]) & (
        column == wrapped_positions(column, len(columns), "edge")
    )
    values = x[:, :, wrapped_positions(row, len(rows), "edge")][
        :, :, :, wrapped_positions(column, len(columns), "edge")
    ]
    return torch.where(inside, values, beyond)


def _rims(drops: Inputs) -> Tensor:
    """Canny's edges as a mask: ridges of the gradient that exceed the upper threshold somewhere."""
    sobel = drops.new_tensor(((-1, 0, 1), (-2, 0, 2), (-1, 0, 1)))
    right, down = filtered(drops, sobel, "edge"), filtered(drops, sobel.T, "edge")
    steep = right.abs() + down.abs()

    def exceeds(below: int, beside: int, *, ties: bool) -> Tensor:
        neighbour = _shifted(steep, below, beside, 0.0)
        return steep >= neighbour if ties else steep > neighbour

    # the tangent of 22.5 degrees, as OpenCV's Canny rounds it
    flat = down.abs() < right.abs() * (13573 / 32768)
    upright = down.abs() > right.abs() * (2 + 13573 / 32768)
    rising = torch.where(
        right * down < 0,
        exceeds(-1, 1, ties=False) & exceeds(1, -1, ties=False),
        exceeds(-1, -1, ties=False) & exceeds(1, 1, ties=False),
    )
    ridge = torch.where(upright, exceeds(-1, 0, ties=False) & exceeds(1, 0, ties=True), rising)
    ridge = torch.where(flat, exceeds(0, -1, ties=False) & exceeds(0, 1, ties=True), ridge)
    weak, strong = ridge & (steep > _LOW), ridge & (steep > _HIGH)
    while True:
        grown = weak & (torch.max_pool2d(strong.to(drops), 3, stride=1, padding=1) > 0)
        if torch.equal(grown, strong):
            return strong
        strong = grown


def _distance(rims: Tensor) -> Inputs:
    """Distance to the nearest edge in steps of 1, 1.4 and knight's moves, at most `_FAR`."""
    away = torch.where(rims, 0.0, _FAR)
    steps = [
        (i, j) for i in range(-2, 3) for j in range(-2, 3) if abs(i) + abs(j) in (1, 3) or abs(i * j) == 1
    ]
    lengths = {1: 1.0, 2: 1.4, 3: _KNIGHT}
    while True:
        nearer = away
        for i, j in steps:
            nearer = torch.minimum(nearer, _shifted(nearer, i, j, _FAR) + lengths[abs(i) + abs(j)])
        if torch.equal(nearer, away):
            return away
        away = nearer


def _equalised(levels: Inputs) -> Inputs:
    """Histogram equalisation of levels 0 to 255; an image of a single level is unchanged."""
    flat = levels.flatten(1).long()
    counts = torch.zeros(len(flat), 256, dtype=torch.float64, device=flat.device)
    counts.scatter_add_(1, flat, torch.ones_like(flat, dtype=torch.float64))
    darkest = counts.gather(1, flat.amin(1, keepdim=True))
    share = (counts.cumsum(1) - darkest) / (flat.shape[1] - darkest).clamp_min(1)
    spread_out = (255 * share).round().gather(1, flat)
    return torch.where(darkest == flat.shape[1], flat.double(), spread_out).to(levels).view_as(levels)


_ICE = (0.57, 0.66, 0.70)  # approximate mean colour of the published photographs
_ICE_SPREAD = 0.11  # approximate standard deviation of their pixels


def snow(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """Add snow to the images: they are whitened, and flakes are added, made from normal noise that is enlarged, cut off
    below a threshold and blurred along a direction.
    """
    mean, spread, factor, threshold, radius, sigma, image_weight = c
    flakes = mean + spread * rng.at("flakes").normal(ids, 1, *x.shape[2:], dtype=x.dtype)
    flakes = zoomed(flakes, factor)
    flakes = clamped(torch.where(flakes < threshold, 0, flakes))
    flakes = motion_blurred(
        flakes, radius, sigma, degrees=90 * rng.at("angle").uniform(ids, dtype=torch.float64) - 135
    )
    white = torch.maximum(x, 1.5 * grey(x) + 0.5)
    return clamped(image_weight * x + (1 - image_weight) * white + flakes + flakes.flip(2, 3))


def fog(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """Add fog to the images: a fractal cloud pattern is added, and the result is scaled back to the brightest value of
    each image.
    """
    amount, decay = c
    brightest = x.amax((1, 2, 3), keepdim=True)
    thick = x + amount * plasma(x, decay, ids, rng)
    return clamped(thick * brightest / (brightest + amount))


def frost(x: Inputs, c: Constants, ids: Ids, rng: Draws) -> Inputs:
    """Add frost to the images: return a weighted sum of each image and a picture of ice crystals.

    The published code crops photographs of frost; these crystals are the ridges of two plasma fractals and needles in
    three directions, with approximately the colour and contrast of those photographs.
    """
    image_weight, ice_weight = c
    coarse, fine = (
        1 - (2 * plasma(x, decay, ids, rng.at("ridges", i)) - 1).abs() for i, decay in enumerate((2.0, 1.5))
    )
    seeds = (rng.at("seeds").uniform(ids, 1, *x.shape[2:], dtype=x.dtype) > 0.97).to(x)
    first = 180 * rng.at("angle").uniform(ids, dtype=torch.float64)
    needles = sum(
        motion_blurred(seeds, min(x.shape[2:]) / 8, min(x.shape[2:]) / 12, degrees=first + rotation)
        for rotation in (0, 60, 120)
    )
    ice = coarse**2 + fine**2 + 4 * needles
    ice = (ice - ice.mean((2, 3), keepdim=True)) / ice.std((2, 3), correction=0, keepdim=True).clamp_min(1e-6)
    return clamped(image_weight * x + ice_weight * clamped(paint(*_ICE, x) + _ICE_SPREAD * ice))


def plasma(x: Inputs, decay: float, ids: Ids, rng: Draws) -> Tensor:
    """Return random cloud patterns (n, 1, height, width) with values from 0 to 1, made by the diamond-square
    algorithm.
    """
    side = max(2, 1 << (max(x.shape[2:]) - 1).bit_length())
    field, step, size = x.new_zeros(len(x), side, side), side, 100.0
    while step >= 2:
        half, k = step // 2, side // step

        def displaced(total: Tensor, place: str, k: int = k, size: float = size, step: int = step) -> Tensor:
            u = rng.at(place, step).uniform(ids, k, k, dtype=x.dtype)
            return total / 4 + size**2 * (2 * u - 1)

        corners = field[:, ::step, ::step].clone()
        squares = corners + corners.roll(-1, 1)
        middles = displaced(squares + squares.roll(-1, 2), "middle")
        across = middles + middles.roll(1, 1) + corners + corners.roll(-1, 2)
        down = middles + middles.roll(1, 2) + corners + corners.roll(-1, 1)
        field[:, half::step, half::step] = middles
        field[:, ::step, half::step] = displaced(across, "across")
        field[:, half::step, ::step] = displaced(down, "down")
        step, size = half, size / decay
    field = field - field.amin((1, 2), keepdim=True)
    field = field / field.amax((1, 2), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    return field[:, None, : x.shape[2], : x.shape[3]]
