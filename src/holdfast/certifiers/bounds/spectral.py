"""Proved upper bounds of the gains (Lipschitz constants in Euclidean distance) of linear layers.

Power iteration approaches the largest singular value of a matrix from below, so its result is no bound. Here it only
proposes a number, which is then proved: a number b is at least the largest singular value of A if b^2 I - A^H A has a
Cholesky decomposition in floating-point arithmetic after a small multiple of the identity is subtracted (Rump,
"Verification of positive definiteness", BIT Numerical Mathematics 46, 2006).

A convolution with zero padding is a part of the convolution on the unbounded plane, whose gain is the largest singular
value of its symbol S(w) over all frequencies w (Sedghi, Gupta & Long, "The Singular Values of Convolutional Layers",
ICLR 2019, arXiv:1805.10408, for circular padding). The symbol is computed on a grid. Between the points of the grid, a
trigonometric polynomial of degree d exceeds its largest magnitude on N points by at most the factor 1 / cos(pi d / N)
in each dimension (Ehlich & Zeller, "Schwankung von Polynomen zwischen Gitterpunkten", Mathematische Zeitschrift 86,
1964); u^H S(w) v is such a polynomial for all unit vectors u and v, with d half the kernel size minus one. A second
bound are the overlaps of filters (Prach & Lampert, ECCV 2022, arXiv:2208.03160), which is exact for the layers of that
paper. The smallest bound counts.

All computations are in float64, with bounds of their rounding errors. Numbers of torch in other data types are exact in
float64.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.certifiers.bounds.graph import gamma

UP = 1 + 1e-12
"""factor that covers the rounding errors of sums, products and roots of a few thousand nonnegative numbers"""
_STEPS = 40
"""number of steps of power iterations, which only propose a bound"""
_SLACKS = (1e-6, 1e-4, 1e-3, 1e-2, 0.1)
"""relative distances of the bounds that are tried from the square of the proposed singular value"""
_WORK = 5e10
"""largest number of multiplications for one layer, about ten seconds on one core; cheaper bounds are used beyond it"""
_DIRECT = 2e9
"""number of values, rows times squared columns, up to which eigenvalues are proposed by a direct solver"""
_BETWEEN = 0.004
"""relative error of the values between the points of a grid of frequencies that is aimed at"""


def spectral_bound(matrices: Tensor) -> float:
    """Return a proved upper bound of the largest singular value of all matrices (…, m, n), real or complex.

    The bound is at most a millionth too large in most cases. It is looser for matrices of more than about 2,500 rows
    and columns, for which the decomposition is not computed.
    """
    a = _as_double(matrices).flatten(0, -3) if matrices.dim() > 2 else _as_double(matrices)[None]
    if a.shape[1] < a.shape[2]:
        a = a.mH
    sizes = a.abs()
    squares = sizes.square().sum((1, 2))
    by_norms = (sizes.sum(1).amax(1) * sizes.sum(2).amax(1)).sqrt()
    cheap = float(torch.minimum(squares.sqrt(), by_norms).amax()) * UP
    b, m, n = a.shape
    if not cheap or not math.isfinite(cheap) or b * m * n * n > _WORK:
        return cheap
    gram = a.mH @ a
    # a complex product has at most four times the relative error of a real one
    error = 8 * gamma(m + 4, torch.float64) * squares
    bound = cheap
    proposed = _proposed(gram)
    for slack in _SLACKS:
        candidate = proposed * (1 + slack)
        if math.sqrt(candidate) * UP >= cheap:
            break
        if _dominated(gram, candidate, error):
            bound = math.sqrt(candidate) * UP
            break
    return bound


def _as_double(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _proposed(gram: Tensor) -> float:
    """An approximation of the largest eigenvalue of positive semi-definite matrices (b, n, n)."""
    if len(gram) * gram.shape[1] ** 3 <= _DIRECT:
        return max(float(torch.linalg.eigvalsh(gram).amax()), 0.0)
    first = gram.diagonal(dim1=1, dim2=2).abs().argmax(1)
    v = gram[torch.arange(len(gram)), :, first][:, :, None]
    value = torch.zeros(len(gram), dtype=torch.float64)
    for _ in range(_STEPS):
        v = v / v.flatten(1).norm(dim=1).clamp_min(1e-300)[:, None, None]
        v = gram @ v
        value = v.flatten(1).norm(dim=1)
    return float(value.amax())


def _dominated(gram: Tensor, candidate: float, error: Tensor) -> bool:
    """Whether candidate * I - A^H A is proved to be positive semi-definite for all matrices `gram` (b, n, n), which
    differ from A^H A by at most `error` (b) in the spectral norm.
    """
    n = gram.shape[1]
    trace = n * candidate * UP
    shift = error + 8 * gamma(n + 4, torch.float64) * trace + 1e-300
    shifted = -gram
    shifted.diagonal(dim1=1, dim2=2).add_((candidate - shift)[:, None])
    _, info = torch.linalg.cholesky_ex(shifted)
    return not bool(info.any())


def overlap_bound(kernel: Tensor) -> float:
    """Return a proved upper bound of the gain of a convolution with stride 1 and a kernel (out, in, *size), from the
    absolute correlations between its filters.

    For the matrix G of these correlations and any positive vector q, the largest entry of G q / q is at least the
    square of the gain. The vector is computed by power iteration, so that the entry approaches the spectral radius.
    """
    weight = kernel if kernel.shape[0] <= kernel.shape[1] else kernel.transpose(0, 1)
    correlate = _CONVOLUTIONS[weight.dim() - 2]
    pads = [size - 1 for size in weight.shape[2:]]
    terms = weight[0].numel()
    sizes = weight.abs().flatten(1).sum(1)
    # the sums of magnitudes over outputs and inputs: the cheapest bound
    columns = weight.abs().flatten(2).sum(2).sum(0).amax()
    by_sums = math.sqrt(float(sizes.amax() * columns)) * UP
    shifts = math.prod(2 * size - 1 for size in weight.shape[2:])
    if len(weight) ** 2 * terms * shifts > _WORK:
        return by_sums
    sums = correlate(weight, weight, padding=pads).abs().flatten(2).sum(2)
    sums = sums + gamma(terms + 4, torch.float64) * sizes[:, None] * sizes[None]
    q = torch.ones(len(sums), dtype=torch.float64)
    best = math.inf
    for _ in range(_STEPS):
        image = sums @ q
        best = min(best, float((image / q).amax()))
        q = image / image.amax().clamp_min(1e-300)
        q = q.clamp_min(1e-9)
    return min(by_sums, math.sqrt(best) * UP)


_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def convolution_bound(
    weight: Tensor, stride: tuple[int, ...], dilation: tuple[int, ...], groups: int
) -> float:
    """Return a proved upper bound of the gain of a convolution with a kernel (out, in / groups, *size).

    It holds for zero padding of any width and for inputs of any size.
    """
    kernels = _as_double(weight).view(groups, -1, *weight.shape[1:])
    if max(stride) > 1:
        kernels = _phases(_dilated(kernels, dilation), stride)
    # on the unbounded plane a dilated convolution with stride 1 is several copies of the one without dilation
    by_overlaps = max(overlap_bound(kernel) for kernel in kernels)
    return min(by_overlaps, _symbol_bound(kernels))


def _dilated(kernels: Tensor, dilation: tuple[int, ...]) -> Tensor:
    """Kernels with zeros between their entries."""
    if max(dilation) == 1:
        return kernels
    size = [(k - 1) * step + 1 for k, step in zip(kernels.shape[3:], dilation, strict=True)]
    spread = kernels.new_zeros(*kernels.shape[:3], *size)
    places = tuple(slice(None, None, step) for step in dilation)
    spread[(slice(None), slice(None), slice(None), *places)] = kernels
    return spread


def _phases(kernels: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Kernels (groups, out, in * phases, *size) of stride 1 with the same gain: the input is divided into one channel
    for each phase of the stride.
    """
    missing = [-size % step for size, step in zip(kernels.shape[3:], stride, strict=True)]
    kernels = F.pad(kernels, [width for least in reversed(missing) for width in (0, least)])
    dims = len(stride)
    for axis, step in enumerate(stride):
        shape = kernels.shape
        at = 3 + 2 * axis
        kernels = kernels.reshape(*shape[:at], shape[at] // step, step, *shape[at + 1 :])
    places, phases = [3 + 2 * axis for axis in range(dims)], [4 + 2 * axis for axis in range(dims)]
    return kernels.permute(0, 1, 2, *phases, *places).flatten(2, 2 + dims)


def _symbol_bound(kernels: Tensor) -> float:
    """Bound of the singular values of the symbols of kernels (groups, out, in, *size); infinity if it would take too
    long.
    """
    groups, out, inner, *size = kernels.shape
    each = groups * out * inner * min(out, inner) * 4
    points = _grid(tuple(size), each)
    if points is None:
        return math.inf
    beyond = math.prod(1 / math.cos(math.pi * (k - 1) / 2 / n) for k, n in zip(size, points, strict=True))
    # the symbol of a real kernel at -w is the conjugate of that at w
    half = [*points[:-1], points[-1] // 2 + 1]
    axes = [
        torch.arange(n)[:, None] * torch.arange(k) % full
        for n, k, full in zip(half, size, points, strict=True)
    ]
    waves = torch.ones(1, 1, dtype=torch.complex128)
    for turns, full in zip(axes, points, strict=True):
        angles = turns.double() * (2 * math.pi / full)
        wave = torch.complex(angles.cos(), -angles.sin())
        waves = (waves[:, None, :, None] * wave[None, :, None, :]).flatten(2).flatten(0, 1)
    flat = kernels.flatten(3)
    # rounding of each entry, of which the Frobenius norm bounds the effect on singular values
    terms = flat.shape[3]
    rounding = 4 * gamma(terms + 16, torch.float64) * float(flat.abs().sum(3).norm())
    largest = 0.0
    for piece in torch.split(waves, max(1, 2**21 // (groups * out * inner))):
        symbols = torch.einsum("goiq,fq->fgoi", flat.to(torch.complex128), piece)
        largest = max(largest, spectral_bound(symbols))
    return (largest + rounding) * beyond * UP


def _grid(size: tuple[int, ...], work: float) -> tuple[int, ...] | None:
    """Number of frequencies in each dimension, or None if even a coarse grid exceeds the limit of work."""
    for between, most in ((_BETWEEN, _WORK / 5), (4 * _BETWEEN, _WORK / 5), (16 * _BETWEEN, _WORK)):
        points = tuple(
            max(1, math.ceil(math.pi * (k - 1) / 2 * math.sqrt(len(size) / (2 * between)))) for k in size
        )
        if math.prod(points) / 2 * work <= most:
            return points
    return None
