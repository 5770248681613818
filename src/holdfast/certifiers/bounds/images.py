"""Translations of operations on images and sequences: convolutions, pooling, padding and resizing."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.certifiers.bounds import operations
from holdfast.certifiers.bounds.translator import (
    TracedValue,
    Translation,
    Translator,
    applied,
    constant_of,
    featured,
    leads,
    scalar,
    shape_of_example,
)

# default arguments of the operations
_ABSENT, _ZERO, _NO = (TracedValue(None, each) for each in (None, 0.0, False))


def _convolution(
    to: Translator, x: TracedValue, weight: TracedValue, bias: TracedValue, *settings: TracedValue
) -> TracedValue:
    stride, padding, dilation, transposed, _, groups = (each.constant for each in settings)
    if x.node is None or weight.node is not None:
        raise to.refused("a convolution with a kernel that depends on the input")
    kernel, offset = weight.constant, bias.constant
    if transposed:
        return _transposed_convolution(to, x, kernel, offset, [each.constant for each in settings])
    if x.shape[0] == 1:
        settings_of = tuple(stride), tuple(padding), tuple(dilation), int(groups)
        return to.add(operations.Convolution(kernel, offset, *settings_of), x)
    if len(stride) == 3:
        raise to.refused("a convolution of several values with three dimensions of one example")
    # several images of one example are one volume, with a kernel of depth 1
    exchange = operations.Nonnegative(partial(torch.transpose, dim0=1, dim1=2))
    volume = to.add(exchange, x, shape=(1, x.shape[1], x.shape[0], *x.shape[2:]))
    filters = operations.Convolution(
        kernel.unsqueeze(2), offset, (1, *stride), (0, *padding), (1, *dilation), int(groups)
    )
    shape = (1, to.out[1], to.out[0], *to.out[2:])
    return to.add(exchange, to.add(filters, volume, shape=shape))


def _transposed_convolution(
    to: Translator, x: TracedValue, kernel: Tensor, offset: Tensor | None, settings: list[Any]
) -> TracedValue:
    stride, padding, dilation, _, output_padding, groups = settings
    if x.shape[0] != 1:
        raise to.refused("a transposed convolution of several values of one example")
    geometry = tuple(stride), tuple(padding), tuple(dilation), tuple(output_padding), int(groups)
    return to.add(operations.TransposedConvolution(kernel, offset, *geometry), x)


def _of_images(
    to: Translator,
    x: TracedValue,
    args: tuple[TracedValue, ...],
    kwargs: Mapping[str, TracedValue],
    terms: int,
    dims: int = 2,
    *,
    in_double: bool = False,
) -> TracedValue:
    """An operation on images (channels, height, width), or on values with another number of dimensions `dims` beside
    the channels, whose weights are not negative. With `in_double`, it is computed in double precision.
    """
    assert to.current is not None
    given = tuple(constant_of(arg) for arg in args)
    settings = {name: constant_of(arg) for name, arg in kwargs.items()}
    function = partial(applied, function=to.current.target, args=given, kwargs=settings)
    if in_double:
        function = partial(_in_double, function=function)
    if not (x.rank == dims + 2 and leads(x.shape)):
        channels = (1,) * (dims + 1 - x.rank)
        before, after = (*channels, *x.shape[-dims - 1 :]), tuple(shape_of_example(to.out))
        function = partial(_on_images, function=function, before=before, after=after)
    return to.add(operations.Nonnegative(function, terms), x)


def _on_images(
    x: Tensor, function: Callable[[Tensor], Tensor], before: tuple[int, ...], after: tuple[int, ...]
) -> Tensor:
    return function(x.reshape(-1, *before)).reshape(len(x), *after)


def _shuffled(to: Translator, x: TracedValue, *args: TracedValue, **kwargs: TracedValue) -> TracedValue:
    return _of_images(to, x, args, kwargs, 0)


def _average_pool(to: Translator, x: TracedValue, *args: TracedValue, **kwargs: TracedValue) -> TracedValue:
    window = args[0].constant
    if len(args) > 5 and (args[5].constant or 1) < 0:
        raise to.refused("average pooling with a negative divisor")
    return _of_images(to, x, args, kwargs, math.prod(window) + 2, len(window))


def _adaptive_pool(to: Translator, x: TracedValue, *args: TracedValue, **kwargs: TracedValue) -> TracedValue:
    dims = len(args[0].constant)
    return _of_images(to, x, args, kwargs, math.prod(x.shape[-dims:]) + 2, dims)


def _in_double(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    return function(x.double()).to(x.dtype)


def _resized(to: Translator, x: TracedValue, *args: TracedValue, **kwargs: TracedValue) -> TracedValue:
    """Images in another size by nearest or bilinear interpolation, whose weights are not negative."""
    sizes = zip(x.shape[-2:], to.out[-2:], strict=True)
    # each value is part of so many results at most
    terms = math.prod(2 * math.ceil(after / before) for before, after in sizes)
    # weights are differences of places, whose rounding errors in float32 may be as large as the weights
    return _of_images(to, x, args, kwargs, terms + 2, in_double=True)


def _pad(to: Translator, x: TracedValue, widths: TracedValue, value: TracedValue = _ZERO) -> TracedValue:
    pad = list(widths.constant)
    padded = featured(to, x, lambda _: partial(F.pad, pad=pad), keeps_first=len(pad) // 2 < x.rank)
    if not value.constant:
        return padded
    filled = F.pad(torch.zeros(x.shape), pad, value=float(value.constant))
    return to.add(operations.Scaled(None, filled.reshape(shape_of_example(to.out))), padded)


def _copying_pad(dims: int) -> Translation:
    """Translation of a padding with copies of values: reflected ones, or those of the border."""

    def translate(to: Translator, x: TracedValue, widths: TracedValue) -> TracedValue:
        sides = zip(x.shape[-dims:], to.out[-dims:], strict=True)
        # a value has at most as many copies in each direction as values are added, and itself
        copies = math.prod(1 + after - before for before, after in sides)
        return _of_images(to, x, (widths,), {}, copies, dims)

    return translate


def _max_pool(
    to: Translator,
    x: TracedValue,
    kernel: TracedValue,
    stride: TracedValue = _ABSENT,
    padding: TracedValue = _ABSENT,
    dilation: TracedValue = _ABSENT,
    ceil_mode: TracedValue = _NO,
) -> TracedValue:
    size = tuple(kernel.constant)
    step, pad, spread = (
        tuple(each.constant or default)
        for each, default in ((stride, size), (padding, (0,) * len(size)), (dilation, (1,) * len(size)))
    )
    if len(size) == 2 and not ceil_mode.constant:
        settings = {"kernel_size": size, "stride": step, "padding": pad, "dilation": spread}
        return _of_windows(
            to,
            x,
            partial(
                operations.pooling_windows,
                side=(x.shape[-2], x.shape[-1]),
                out=tuple(shape_of_example(to.out)),
                settings=settings,
            ),
        )
    places = [
        [[i * down - before + k * apart for k in range(length)] for i in range(count)]
        for count, length, down, before, apart in zip(
            to.out[-len(size) :], size, step, pad, spread, strict=True
        )
    ]
    return _of_places(to, x, places)


def _adaptive_max_pool(to: Translator, x: TracedValue, size: TracedValue) -> TracedValue:
    dims = len(size.constant)
    places = [
        [list(range(i * before // after, -(-(i + 1) * before // after))) for i in range(after)]
        for before, after in zip(x.shape[-dims:], to.out[-dims:], strict=True)
    ]
    return _of_places(to, x, places)


def _of_places(to: Translator, x: TracedValue, places: list[list[list[int]]]) -> TracedValue:
    """The maxima of windows, given for each dimension by the places of each window along it. Places outside of the
    value are padding.
    """
    dims = len(places)
    side = x.shape[-dims:]
    windows = []
    for window in product(*places):
        inside = [
            [place for place in line if 0 <= place < length]
            for line, length in zip(window, side, strict=True)
        ]
        entries = [0] * math.prod(map(len, inside))
        for k, place in enumerate(product(*inside)):
            for at, length in zip(place, side, strict=True):
                entries[k] = entries[k] * length + at
        windows.append(entries)
    longest = max(map(len, windows))
    index = torch.tensor([window + [-1] * (longest - len(window)) for window in windows])
    gathered = partial(
        operations.gathered_windows, index=index, dims=dims, out=tuple(shape_of_example(to.out))
    )
    return _of_windows(to, x, gathered)


def _of_windows(to: Translator, x: TracedValue, windows: Callable[[Tensor], Tensor]) -> TracedValue:
    value = to.add(operations.MaxPool(windows, windows(torch.ones(1, *to.shape_of(x)))[0] == 0), x)
    return TracedValue(None, (value, None))


def _largest(
    to: Translator, x: TracedValue, dims: TracedValue = _ABSENT, keep: TracedValue = _NO
) -> TracedValue:
    """The largest value along dimensions."""
    given = dims.constant if isinstance(dims.constant, list | tuple) else [dims.constant]
    chosen = [dim % x.rank for dim in given if dim is not None] or [*range(x.rank)]
    windows = partial(
        operations.reduced_windows, shape=tuple(x.shape), dims=chosen, out=tuple(shape_of_example(to.out))
    )
    return _of_windows(to, x, windows)


def _smallest(
    to: Translator, x: TracedValue, dims: TracedValue = _ABSENT, keep: TracedValue = _NO
) -> TracedValue:
    minus = operations.Scaled(scalar(to, -1.0), None)
    (value, _) = _largest(to, to.add(minus, x, shape=x.shape), dims, keep).constant
    return TracedValue(None, (to.add(minus, value), None))


def _as_recorded(translate: Translation) -> Translation:
    """Translation of an operation that returns either the values of another one, or the first of them alone."""

    def values(to: Translator, *args: TracedValue, **kwargs: TracedValue) -> TracedValue:
        assert to.current is not None
        every = translate(to, *args, **kwargs)
        first: TracedValue = every.constant[0]
        return first if isinstance(to.current.meta["val"], Tensor) else every

    return values


IMAGES: dict[str, Translation] = {
    "aten.convolution": _convolution,
    "aten.pixel_shuffle": _shuffled,
    "aten.pixel_unshuffle": _shuffled,
    "aten.avg_pool2d": _average_pool,
    "aten.avg_pool3d": _average_pool,
    "aten._adaptive_avg_pool2d": _adaptive_pool,
    "aten._adaptive_avg_pool3d": _adaptive_pool,
    "aten.max_pool2d_with_indices": _max_pool,
    "aten.max_pool3d_with_indices": _max_pool,
    "aten.adaptive_max_pool2d": _adaptive_max_pool,
    "aten.adaptive_max_pool3d": _adaptive_max_pool,
    **dict.fromkeys(("aten.max", "aten.amax"), _as_recorded(_largest)),
    **dict.fromkeys(("aten.min", "aten.amin"), _as_recorded(_smallest)),
    "aten.upsample_nearest2d": _resized,
    "aten.upsample_bilinear2d": _resized,
    "aten.constant_pad_nd": _pad,
    **{
        f"aten.{kind}_pad{dims}d": _copying_pad(dims)
        for kind in ("reflection", "replication")
        for dims in (1, 2, 3)
    },
}
"""Translation of each operation on images with sound bounds, by its name."""
