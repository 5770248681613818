"""The ATen operations that have sound bounds: a table of their translations into operations of a graph."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from string import ascii_lowercase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.certifiers.bounds import operations
from holdfast.certifiers.bounds.functions import FUNCTIONS, smooth
from holdfast.certifiers.bounds.images import IMAGES
from holdfast.certifiers.bounds.translator import (
    TracedValue,
    Translation,
    Translator,
    applied,
    constant,
    constant_of,
    featured,
    in_recorded_shape,
    leads,
    operation_name,
    scalar,
    scaled,
    shape_of_example,
    shifted,
)
from holdfast.core.errors import UsageError

# default arguments of the operations
_ABSENT, _NO, _FIRST, _LAST, _ONE, _TWO = (TracedValue(None, each) for each in (None, False, 0, -1, 1, 2))


def _add(to: Translator, a: TracedValue, b: TracedValue, *, alpha: TracedValue = _ONE) -> TracedValue:
    return _added(to, a, b, float(alpha.constant))


def _sub(to: Translator, a: TracedValue, b: TracedValue, *, alpha: TracedValue = _ONE) -> TracedValue:
    return _added(to, a, b, -float(alpha.constant))


def _added(to: Translator, a: TracedValue, b: TracedValue, factor: float) -> TracedValue:
    """A + factor * b, of which one may be a constant."""
    if a.node is not None and b.node is not None:
        return to.add(operations.Sum(factor), to.aligned(a, to.out), to.aligned(b, to.out))
    if a.node is not None:
        return shifted(to, a, factor * constant(to, b))
    scale = None if factor == 1 else scalar(to, factor)
    return scaled(to, b, scale, constant(to, a))


def _mul(to: Translator, a: TracedValue, b: TracedValue) -> TracedValue:
    if a.node is not None and b.node is not None:
        if a == b:
            return to.add(_power(2.0), a)
        return _product(to, a, b)
    varying, factor = (a, b) if a.node is not None else (b, a)
    return scaled(to, varying, constant(to, factor), None)


def _product(to: Translator, a: TracedValue, b: TracedValue) -> TracedValue:
    """The products of single values, with broadcasting."""
    out, first = to.out, 1 if leads(to.out) else 0
    names = ascii_lowercase[: len(out)]
    factors, own = [], []
    for value in (a, b):
        padded = (*(1,) * (len(out) - value.rank), *value.shape)
        kept = [i for i in range(first, len(out)) if padded[i] == out[i]]
        factor = to.exactly(value, [padded[i] for i in kept])
        if not kept:  # one number
            kept = [len(out) - 1]
            copies = operations.Nonnegative(partial(_copied, shape=(out[-1],)), out[-1])
            factor = to.add(copies, factor, shape=(1, out[-1]))
        factors.append(factor)
        own.append("".join(names[i] for i in kept))
    return _multiplied(to, f"{own[0]},{own[1]}->{names[first:]}", factors)


def _multiplied(to: Translator, equation: str, factors: Sequence[TracedValue]) -> TracedValue:
    known = [i for i, each in enumerate(factors) if _nonnegative(to, each.node)]
    return to.add(operations.Product(equation, known[0] if len(known) == 1 else None), *factors)


def _nonnegative(to: Translator, index: int | None) -> bool:
    """Whether a value of the graph has no negative numbers, as the output of a sigmoid or a softmax."""
    while index:
        node = to.nodes[index - 1]
        operation = node.operation
        if isinstance(operation, operations.Smooth):
            return operation.function is torch.sigmoid
        if isinstance(operation, operations.ReLU | operations.ExponentialSum):
            return True
        if isinstance(operation, operations.Curved) and operation is not _RECIPROCAL:
            return operation.turns or operation in (operations.EXPONENTIAL, _ROOT, _RECIPROCAL_ROOT)
        moves = operation is _RECIPROCAL or isinstance(operation, operations.Nonnegative)
        if isinstance(operation, operations.Scaled) and operation.offset is None:
            moves = operation.scale is None or bool((operation.scale >= 0).all())
        if not moves or len(node.inputs) > 1:
            return False
        index = node.inputs[0]
    return False


def _div(to: Translator, a: TracedValue, b: TracedValue, **kwargs: TracedValue) -> TracedValue:
    if kwargs:
        raise to.refused("a division with rounding")
    if b.node is None:
        return scaled(to, a, 1 / constant(to, b), None)
    if a.node is not None and _is_one_plus_magnitude(to, b.node, a.node):
        return to.add(operations.Smooth(F.softsign, 2.0), a)  # as torch computes softsign
    return _mul(to, a, to.add(_RECIPROCAL, b, shape=b.shape))


def _is_one_plus_magnitude(to: Translator, index: int, of: int) -> bool:
    """Whether a node is 1 + |x| for the node x."""
    node = to.nodes[index - 1] if index else None
    if node is None or not isinstance(node.operation, operations.Scaled):
        return False
    scale, offset = node.operation.scale, node.operation.offset
    return scale is None and bool((offset == 1).all()) and to.magnitudes.get(node.inputs[0]) == of  # type: ignore[union-attr]


def _power(exponent: float) -> operations.Curved:
    """A power with a constant exponent."""
    whole, even = exponent == round(exponent), exponent % 2 == 0
    positive = exponent > 1 or exponent < 0
    return operations.Curved(
        partial(torch.pow, exponent=exponent),
        partial(_slope_of_power, exponent=exponent),
        below=0 if not whole else 1 if even else -1 if positive else 0,
        above=1 if positive else -1,
        at_zero=exponent > 0,
        turns=even and exponent > 0,
    )


def _slope_of_power(x: Tensor, exponent: float) -> Tensor:
    return exponent * x.pow(exponent - 1)


_RECIPROCAL = operations.Curved(torch.reciprocal, lambda x: -x.pow(-2), below=-1, above=1, at_zero=False)


_LOGARITHM = operations.Curved(torch.log, torch.reciprocal, below=0, above=-1, at_zero=False)


_ROOT = operations.Curved(torch.sqrt, lambda x: 0.5 * x.rsqrt(), below=0, above=-1, at_zero=True)


_RECIPROCAL_ROOT = operations.Curved(
    torch.rsqrt, lambda x: -0.5 * x.pow(-1.5), below=0, above=1, at_zero=False
)


def _curved(operation: operations.Curved) -> Translation:
    def translate(to: Translator, x: TracedValue) -> TracedValue:
        return to.add(operation, x)

    return translate


def _expm1(to: Translator, x: TracedValue) -> TracedValue:
    return scaled(to, to.add(operations.EXPONENTIAL, x), None, scalar(to, -1.0))


def _log1p(to: Translator, x: TracedValue) -> TracedValue:
    return to.add(_LOGARITHM, scaled(to, x, None, scalar(to, 1.0)))


def _pow(to: Translator, x: TracedValue, exponent: TracedValue) -> TracedValue:
    if x.node is None or exponent.node is not None or torch.as_tensor(exponent.constant).numel() != 1:
        raise to.refused("a power with an exponent that is no constant number")
    number = float(exponent.constant)
    if number == 0:
        raise to.refused("a power with the exponent 0")
    return to.reshaped(x, to.out) if number == 1 else to.add(_power(number), x)


def _neg(to: Translator, x: TracedValue) -> TracedValue:
    return to.add(operations.Scaled(scalar(to, -1.0), None), x)


def _addmm(
    to: Translator,
    bias: TracedValue,
    x: TracedValue,
    weight: TracedValue,
    *,
    beta: TracedValue = _ONE,
    alpha: TracedValue = _ONE,
) -> TracedValue:
    if beta.constant != 1 or alpha.constant != 1:
        raise to.refused("a matrix product with factors")
    if weight.node is None and bias.node is None and bias.constant.dim() == 1:
        offset = bias.constant.expand(weight.constant.shape[1]).contiguous()
        return to.add(operations.Dense(weight.constant.t().contiguous(), offset), x)
    if x.node is None and weight.node is None:
        product: Tensor = x.constant @ weight.constant
        return _add(to, bias, TracedValue(None, product))
    return _add(to, _mm(to, x, weight), bias)


def _mm(to: Translator, x: TracedValue, weight: TracedValue) -> TracedValue:
    """A product of two matrices, or of two stacks of matrices."""
    if x.node is not None and weight.node is None and x.rank == 2:
        return to.add(operations.Dense(weight.constant.t().contiguous(), None), x)
    # without a first dimension of 1 of the result
    left, right, out = ("ik", "kj", "ij") if len(to.out) == 2 else ("bik", "bkj", "bij")
    dropped = out[0] if leads(to.out) else ""
    factors, names = [], []
    for value, own in ((x, left), (weight, right)):
        shape = [size for size, name in zip(_recorded_shape(value), own, strict=True) if name != dropped]
        constant = value.node is None
        factors.append(
            TracedValue(None, value.constant.reshape(shape)) if constant else to.exactly(value, shape)
        )
        names.append(own.replace(dropped, "") if dropped else own)
    result = out.replace(dropped, "") if dropped else out
    if x.node is not None and weight.node is not None:
        return _multiplied(to, f"{names[0]},{names[1]}->{result}", factors)
    varying = 0 if x.node is not None else 1
    equation = f"{names[varying]},{names[1 - varying]}->{result}"
    return to.add(operations.Contracted(equation, factors[1 - varying].constant), factors[varying])


def _mv(to: Translator, x: TracedValue, vector: TracedValue) -> TracedValue:
    if x.node is None or vector.node is not None:
        raise to.refused("a product of a matrix with a vector that depends on the input")
    row = operations.Dense(vector.constant[None].contiguous(), None)
    return to.reshaped(to.add(row, x, shape=(*x.shape[:-1], 1)), to.out)


def _baddbmm(
    to: Translator,
    bias: TracedValue,
    x: TracedValue,
    weight: TracedValue,
    *,
    beta: TracedValue = _ONE,
    alpha: TracedValue = _ONE,
) -> TracedValue:
    if alpha.constant != 1:
        raise to.refused("a matrix product with factors")
    product = _mm(to, x, weight)
    if not beta.constant:
        return product
    return _add(to, product, bias, alpha=beta)


def _sum_of_exponentials(to: Translator, x: TracedValue) -> TracedValue:
    """The sums of exp(x_j - x_i) over the values j along the last dimension, for each value i."""
    shape, size = to.shape_of(x), x.shape[-1]
    pairs = (1, *shape, size)
    differences = to.add(operations.Differences(size), x, shape=pairs)
    absent = None if x.absent is None else x.absent.reshape(shape)[..., None, :]
    return to.add(operations.ExponentialSum(absent), differences, shape=(1, *shape))


def _along_last(
    to: Translator, x: TracedValue, dim: int, function: Callable[[TracedValue], TracedValue]
) -> TracedValue:
    """A function of values along the last dimension, applied to another one."""
    place = dim % x.rank
    if place == x.rank - 1:
        return to.reshaped(function(x), to.out)
    moved = _exchanged(to, x, place)
    return _exchanged(to, replace(function(moved), shape=moved.shape), place)


def _exchanged(to: Translator, x: TracedValue, place: int) -> TracedValue:
    """A value with one dimension and the last one exchanged."""
    shape = [*x.shape]
    shape[place], shape[-1] = shape[-1], shape[place]
    absent = None if x.absent is None else x.absent.transpose(place, -1)

    def function(before: int) -> Callable[[Tensor], Tensor]:
        return partial(torch.transpose, dim0=place + before, dim1=-1)

    return replace(featured(to, x, function, keeps_first=place > 0, out=shape), absent=absent)


def _softmax(to: Translator, x: TracedValue, dim: TracedValue, *_: TracedValue) -> TracedValue:
    """The softmax as 1 / sum_j exp(x_j - x_i)."""

    def of_last(x: TracedValue) -> TracedValue:
        recorded = (1, *to.shape_of(x))
        value = to.add(_RECIPROCAL, _sum_of_exponentials(to, x), shape=recorded)
        if x.absent is not None:
            kept = (~x.absent).reshape(to.shape_of(x)).to(torch.get_default_dtype())
            value = to.add(operations.Scaled(kept, None), value, shape=recorded)
        return value

    return _along_last(to, x, dim.constant, of_last)


def _log_softmax(to: Translator, x: TracedValue, dim: TracedValue, *_: TracedValue) -> TracedValue:
    """The logarithm of the softmax as -log sum_j exp(x_j - x_i)."""
    if x.absent is not None:
        raise to.refused("log_softmax on values of minus infinity")

    def of_last(x: TracedValue) -> TracedValue:
        recorded = (1, *to.shape_of(x))
        value = to.add(_LOGARITHM, _sum_of_exponentials(to, x), shape=recorded)
        return to.add(operations.Scaled(scalar(to, -1.0), None), value, shape=recorded)

    return _along_last(to, x, dim.constant, of_last)


def _batch_norm(
    to: Translator,
    x: TracedValue,
    weight: TracedValue,
    bias: TracedValue,
    mean: TracedValue,
    var: TracedValue,
    *settings: TracedValue,
) -> TracedValue:
    *training, _, eps = settings
    shape = (-1, *(1,) * (x.rank - 2))
    if any(bool(each.constant) for each in training):  # of one example, such as instance norm
        if x.shape[0] != 1:
            raise to.refused("a batch norm that computes its statistics from the batch")
        return _normalised(to, x, x.shape[1], eps, weight, bias, shape)
    scale = torch.rsqrt(var.constant + eps.constant)
    if weight.constant is not None:
        scale = scale * weight.constant
    # in two steps, because the offset bias - mean * scale would have a rounding error that is not bounded
    centred = to.add(operations.Scaled(None, -mean.constant.reshape(shape)), x)
    offset = None if bias.constant is None else bias.constant.reshape(shape)
    value = to.add(operations.Scaled(scale.reshape(shape), offset), centred)
    return TracedValue(None, (value, None, None))


def _normalised(
    to: Translator,
    x: TracedValue,
    rows: int,
    eps: TracedValue,
    weight: TracedValue,
    bias: TracedValue,
    shape: Sequence[int],
) -> TracedValue:
    """The normalisation of each of some rows of values by their mean and their variance. `shape` is the one of weight
    and bias.
    """
    size, first = x.shape.numel() // rows, len(to.nodes)
    whole, one = (1, rows, size), (1, rows)
    centred = to.add(operations.Centred(size), to.exactly(x, whole[1:]), shape=whole)
    squares = to.add(_power(2.0), centred, shape=whole)
    mean = _reduction(whole[1:], [2], one[1:], mean=True)
    shifted = operations.Scaled(None, torch.tensor(float(eps.constant), dtype=torch.float64))
    variance = to.add(shifted, to.add(mean, squares, shape=one), shape=one)
    inverse = to.add(_RECIPROCAL_ROOT, variance, shape=one)
    # no centred value exceeds the root of size - 1 times the standard deviation
    product = operations.Product("ab,a->ab", 1, math.sqrt(size - 1) * (1 + 1e-6))
    value = to.reshaped(to.add(product, centred, inverse, shape=whole), to.out)
    scale, offset = (
        None if each.constant is None else each.constant.reshape(shape) for each in (weight, bias)
    )
    if scale is not None or offset is not None:
        value = to.add(operations.Scaled(scale, offset), value)
    # a variance in float32 may be computed with other sums
    to.nodes[first:] = [replace(node, inexact=True) for node in to.nodes[first:]]
    return TracedValue(None, (value, None, None))


def _layer_norm(
    to: Translator,
    x: TracedValue,
    shape: TracedValue,
    weight: TracedValue,
    bias: TracedValue,
    eps: TracedValue,
) -> TracedValue:
    rows = x.shape.numel() // math.prod(shape.constant)
    return _normalised(to, x, rows, eps, weight, bias, shape.constant)


def _group_norm(
    to: Translator,
    x: TracedValue,
    weight: TracedValue,
    bias: TracedValue,
    n: TracedValue,
    _channels: TracedValue,
    _values: TracedValue,
    groups: TracedValue,
    eps: TracedValue,
) -> TracedValue:
    shape = (-1, *(1,) * (x.rank - 2))
    return _normalised(to, x, n.constant * groups.constant, eps, weight, bias, shape)


def _viewed(to: Translator, x: TracedValue, *args: TracedValue, **kwargs: TracedValue) -> TracedValue:
    """An operation that only changes the shape."""
    absent = None if x.absent is None else x.absent.reshape(to.out)
    return replace(to.reshaped(x, to.out), absent=absent)


def _expanded(to: Translator, x: TracedValue, *args: TracedValue, **kwargs: TracedValue) -> TracedValue:
    """Copies of a value along dimensions."""
    x = to.aligned(x, to.out)
    out = tuple(shape_of_example(to.out))
    if to.shape_of(x) == out:
        return TracedValue(x.node, shape=to.out)
    copies = math.prod(out) // to.shape_of(x).numel()
    return to.add(operations.Nonnegative(partial(_copied, shape=out), copies), x)


def _copied(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return x.expand(len(x), *shape)


def _permuted(to: Translator, x: TracedValue, dims: TracedValue) -> TracedValue:
    order = [dim % x.rank for dim in dims.constant]
    wide = [dim for dim in order if x.shape[dim] != 1]
    if wide == sorted(wide):
        return to.reshaped(x, to.out)

    def function(before: int) -> Callable[[Tensor], Tensor]:
        return partial(torch.permute, dims=[*range(before), *(dim + before for dim in order)])

    return featured(to, x, function, keeps_first=order[0] == 0)


def _transposed(to: Translator, x: TracedValue, first: TracedValue, second: TracedValue) -> TracedValue:
    order = list(range(x.rank))
    a, b = first.constant % x.rank, second.constant % x.rank
    order[a], order[b] = b, a
    return _permuted(to, x, TracedValue(None, order))


def _matrix_transposed(to: Translator, x: TracedValue) -> TracedValue:
    return _permuted(to, x, TracedValue(None, [*reversed(range(x.rank))]))


def _of_dimension(
    to: Translator, x: TracedValue, dim: TracedValue = _FIRST, *args: TracedValue, **kwargs: TracedValue
) -> TracedValue:
    """An operation that chooses or moves values along one dimension or several."""
    several = isinstance(dim.constant, list | tuple)
    dims = [each % x.rank for each in (dim.constant if several else [dim.constant])]

    def function(before: int) -> Callable[[Tensor], Tensor]:
        assert to.current is not None
        places = [each + before for each in dims]
        given = (places if several else places[0], *(constant_of(arg) for arg in args))
        settings = {name: constant_of(arg) for name, arg in kwargs.items()}
        return partial(applied, function=to.current.target, args=given, kwargs=settings)

    return featured(to, x, function, keeps_first=0 not in dims)


def _part(to: Translator, x: TracedValue, dim: int, start: int, length: int) -> TracedValue:
    """Some values along a dimension."""

    def function(before: int) -> Callable[[Tensor], Tensor]:
        return partial(torch.narrow, dim=dim + before, start=start, length=length)

    shape = [*x.shape]
    shape[dim] = length
    return featured(to, x, function, keeps_first=dim > 0, out=shape)


def _split(to: Translator, x: TracedValue, sizes: TracedValue, dim: TracedValue = _FIRST) -> TracedValue:
    place = dim.constant % x.rank
    total, each = x.shape[place], sizes.constant
    lengths = (
        each if isinstance(each, list | tuple) else [min(each, total - i) for i in range(0, total, each)]
    )
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return TracedValue(
        None, [_part(to, x, place, start, length) for start, length in zip(starts, lengths, strict=True)]
    )


def _unbound(to: Translator, x: TracedValue, dim: TracedValue = _FIRST) -> TracedValue:
    place = dim.constant % x.rank
    shape = [size for i, size in enumerate(x.shape) if i != place]
    return TracedValue(None, [to.reshaped(_part(to, x, place, i, 1), shape) for i in range(x.shape[place])])


def _reduced(to: Translator, x: TracedValue, *args: TracedValue, **kwargs: TracedValue) -> TracedValue:
    """A sum or a mean over dimensions."""
    assert to.current is not None
    given = args[0].constant if args else None
    keep = len(args) > 1 and bool(args[1].constant)
    return _summed(to, x, given, keep=keep, mean=operation_name(to.current.target) == "aten.mean")


def _summed(
    to: Translator, x: TracedValue, given: Sequence[int] | None, *, keep: bool, mean: bool = False
) -> TracedValue:
    """The sum or mean of a value over the given dimensions, or over all."""
    dims = _dimensions(x, given)
    out = [1 if i in dims else size for i, size in enumerate(x.shape) if keep or i not in dims]
    first = 1 if leads(x.shape) else 0
    places = [dim + 1 - first for dim in dims if dim >= first]  # in a batch
    if not places:
        return to.reshaped(x, out)
    return to.add(_reduction(to.shape_of(x), places, shape_of_example(out), mean=mean), x, shape=out)


def _dimensions(x: TracedValue, given: Sequence[int] | None) -> list[int]:
    return [dim % x.rank for dim in given] if given else [*range(x.rank)]


def _reduction(
    shape: Sequence[int], places: Sequence[int], out: Sequence[int], *, mean: bool
) -> operations.Reduction:
    """The sum or mean of values of a shape over the dimensions `places` of a batch, in the shape `out`."""
    size = math.prod(shape[place - 1] for place in places)
    function = partial(_reduced_to, dims=tuple(places), out=tuple(out), mean=mean)
    return operations.Reduction(function, size + 2, tuple(places), size if mean else 1)


def _reduced_to(x: Tensor, dims: tuple[int, ...], out: tuple[int, ...], *, mean: bool) -> Tensor:
    return (x.mean(dims) if mean else x.sum(dims)).reshape(len(x), *out)


def _cat(to: Translator, tensors: TracedValue, dim: TracedValue = _FIRST) -> TracedValue:
    out = to.out
    place = dim.constant % len(out)
    parts = [part for part in tensors.constant if _recorded_shape(part)[place]]
    if len(parts) == 1:
        return to.reshaped(parts[0], out)
    varying = [to.aligned(part, out) for part in parts if part.node is not None]
    fixed = [
        None if part.node is not None else part.constant if leads(out) else part.constant[None]
        for part in parts
    ]
    along = place if leads(out) else place + 1
    zeros = [None if each is None else each * 0 for each in fixed]
    joined = to.add(
        operations.Nonnegative(partial(operations.joined_parts, fixed=zeros, dim=along)), *varying
    )
    if all(each is None for each in fixed):
        return joined
    nothing = [torch.zeros(1, *to.shape_of(part)) for part in varying]
    offset = operations.joined_parts(*nothing, fixed=fixed, dim=along)[0]
    return to.add(operations.Scaled(None, offset), joined)


def _recorded_shape(value: TracedValue) -> torch.Size:
    return value.shape if value.node is not None else value.constant.shape


def _stack(to: Translator, tensors: TracedValue, dim: TracedValue = _FIRST) -> TracedValue:
    place = dim.constant % len(to.out)
    parts = []
    for part in tensors.constant:
        shape = [*_recorded_shape(part)]
        shape.insert(place, 1)
        constant = part.node is None
        parts.append(
            TracedValue(None, part.constant.reshape(shape)) if constant else to.reshaped(part, shape)
        )
    return _cat(to, TracedValue(None, parts), TracedValue(None, place))


def _zeros_like(to: Translator, x: TracedValue, **kwargs: TracedValue) -> TracedValue:
    return TracedValue(None, torch.zeros(x.shape))


def _empty(to: Translator, x: TracedValue, size: TracedValue, **kwargs: TracedValue) -> TracedValue:
    """Zeros, also in place of any values, which a network replaces before it uses them."""
    return TracedValue(None, torch.zeros(size.constant))


def _full(to: Translator, x: TracedValue, value: TracedValue) -> TracedValue:
    return TracedValue(None, torch.full(to.out, float(value.constant), dtype=to.dtype))


def _copy(to: Translator, x: TracedValue, source: TracedValue, *_: TracedValue) -> TracedValue:
    if source.node is None:
        return TracedValue(None, torch.as_tensor(source.constant).expand(to.out))
    return _expanded(to, source)


def _scattered(
    to: Translator, x: TracedValue, source: TracedValue, dim: TracedValue = _FIRST, *args: TracedValue
) -> TracedValue:
    """A value of which a part is replaced by another value, as by an assignment to a slice."""
    assert to.current is not None
    given = (dim.constant % len(to.out) + 1, *(each.constant for each in args))
    shapes = [tuple(each.shape if each.node is not None else each.constant.shape) for each in (x, source)]
    function = partial(
        _replaced,
        function=to.current.target,
        args=given,
        shapes=shapes,
        after=tuple(shape_of_example(to.out)),
        fixed=tuple(None if each.node is not None else each.constant * 0 for each in (x, source)),
    )
    varying = [each for each in (x, source) if each.node is not None]
    value = to.add(operations.Nonnegative(function, 1), *varying)
    if len(varying) == 2:
        return value
    fixed = [None if each.node is not None else each.constant for each in (x, source)]
    zero = torch.zeros(1, *to.shape_of(varying[0]))
    return to.add(operations.Scaled(None, function(zero, fixed=tuple(fixed))[0]), value)


def _replaced(
    *x: Tensor,
    function: Any,
    args: tuple[Any, ...],
    shapes: list[tuple[int, ...]],
    after: tuple[int, ...],
    fixed: tuple[Tensor | None, ...],
) -> Tensor:
    varying, n = iter(x), len(x[0])
    parts = [
        next(varying).reshape(n, *shape) if each is None else each.to(x[0]).expand(n, *shape)
        for each, shape in zip(fixed, shapes, strict=True)
    ]
    y: Tensor = function(*parts, *args)
    return y.reshape(n, *after)


def _of_recorded(
    to: Translator, x: TracedValue, *args: TracedValue, terms: int = 0, **kwargs: TracedValue
) -> TracedValue:
    """An operation with nonnegative weights on the value in its recorded shape, which is applied to one example after
    the other.
    """
    assert to.current is not None
    given = tuple(constant_of(arg) for arg in args)
    settings = {name: constant_of(arg) for name, arg in kwargs.items()}
    function = partial(applied, function=to.current.target, args=given, kwargs=settings)
    operation = partial(
        in_recorded_shape,
        function=torch.vmap(function),
        before=tuple(x.shape),
        after=tuple(shape_of_example(to.out)),
    )
    return to.add(operations.Nonnegative(operation, terms), x)


def _copies(to: Translator, x: TracedValue, *args: TracedValue, **kwargs: TracedValue) -> TracedValue:
    """An operation that copies values: each at most as often as there are results."""
    return _of_recorded(to, x, *args, terms=to.out.numel(), **kwargs)


def _cumulated(to: Translator, x: TracedValue, dim: TracedValue, **kwargs: TracedValue) -> TracedValue:
    return _of_recorded(to, x, dim, terms=x.shape[dim.constant] + 2, **kwargs)


def _variance(
    to: Translator,
    x: TracedValue,
    dims: TracedValue = _ABSENT,
    *,
    correction: TracedValue = _ONE,
    keepdim: TracedValue = _NO,
) -> TracedValue:
    count = math.prod(x.shape[dim] for dim in _dimensions(x, dims.constant))
    free = count - (1 if correction.constant is None else correction.constant)
    if free <= 0:
        raise to.refused(
            f"a variance of {count} values with the correction {correction.constant}, as over the examples of a batch"
        )
    mean = _summed(to, x, dims.constant, keep=True, mean=True)
    centred = to.add(operations.Sum(-1.0), x, to.aligned(mean, x.shape), shape=x.shape)
    total = _sum_of_squares(to, centred, dims, keepdim)
    return to.add(operations.Scaled(scalar(to, 1 / free), None), total, shape=total.shape)


def _sum_of_squares(to: Translator, x: TracedValue, dims: TracedValue, keep: TracedValue) -> TracedValue:
    squares = to.add(_power(2.0), x, shape=x.shape)
    return _summed(to, squares, dims.constant, keep=bool(keep.constant))


def _deviation(to: Translator, x: TracedValue, *args: TracedValue, **kwargs: TracedValue) -> TracedValue:
    return to.add(_ROOT, _variance(to, x, *args, **kwargs))


def _vector_norm(
    to: Translator,
    x: TracedValue,
    order: TracedValue = _TWO,
    dims: TracedValue = _ABSENT,
    keepdim: TracedValue = _NO,
    **_: TracedValue,
) -> TracedValue:
    if order.constant != 2:
        raise to.refused(f"a norm of the order {order.constant}")
    return to.add(_ROOT, _sum_of_squares(to, x, dims, keepdim))


def _gated(to: Translator, x: TracedValue, dim: TracedValue = _LAST) -> TracedValue:
    place = dim.constant % x.rank
    half = x.shape[place] // 2
    value, gate = (_part(to, x, place, start, half) for start in (0, half))
    return _mul(to, value, to.add(operations.Smooth(torch.sigmoid, 0.0963), gate, shape=gate.shape))


_VIEWS = ("view", "_unsafe_view", "reshape", "squeeze", "unsqueeze", "clone", "alias", "detach")


TRANSLATIONS: dict[str, Translation] = {
    "aten.add": _add,
    "aten.sub": _sub,
    "aten.rsub": lambda to, a, b, alpha=_ONE: _sub(to, b, a, alpha=alpha),
    "aten.mul": _mul,
    "aten.div": _div,
    "aten.neg": _neg,
    "aten.addmm": _addmm,
    "aten.mm": _mm,
    "aten.bmm": _mm,
    "aten.mv": _mv,
    "aten.baddbmm": _baddbmm,
    "aten.pow": _pow,
    "aten.square": _curved(_power(2.0)),
    "aten.exp": _curved(operations.EXPONENTIAL),
    "aten.expm1": _expm1,
    "aten.log": _curved(_LOGARITHM),
    "aten.log1p": _log1p,
    "aten.reciprocal": _curved(_RECIPROCAL),
    "aten.sqrt": _curved(_ROOT),
    "aten.rsqrt": _curved(_RECIPROCAL_ROOT),
    "aten._softmax": _softmax,
    "aten._safe_softmax": _softmax,
    "aten._log_softmax": _log_softmax,
    "aten.native_layer_norm": _layer_norm,
    "aten.native_group_norm": _group_norm,
    "aten.native_batch_norm": _batch_norm,
    "aten.cudnn_batch_norm": _batch_norm,
    "aten._native_batch_norm_legit_no_training": _batch_norm,
    **dict.fromkeys((f"aten.{name}" for name in _VIEWS), _viewed),
    "aten.expand": _expanded,
    "aten.permute": _permuted,
    "aten.transpose": _transposed,
    "aten.t": _matrix_transposed,
    "aten.slice": _of_dimension,
    "aten.select": _of_dimension,
    "aten.flip": _of_dimension,
    "aten.split": _split,
    "aten.split_with_sizes": _split,
    "aten.unsafe_split": _split,
    "aten.unbind": _unbound,
    "aten.mean": _reduced,
    "aten.sum": _reduced,
    "aten.cat": _cat,
    "aten.stack": _stack,
    "aten.zeros_like": _zeros_like,
    "aten.new_empty": _empty,
    "aten.new_zeros": _empty,
    "aten.empty_like": _zeros_like,
    "aten.fill": _full,
    "aten.copy": _copy,
    "aten.slice_scatter": _scattered,
    "aten.select_scatter": _scattered,
    **dict.fromkeys(("aten.roll", "aten.repeat", "aten.gather", "aten.index", "aten.index_select"), _copies),
    "aten.im2col": _copies,
    "aten.cumsum": _cumulated,
    "aten.var": _variance,
    "aten.std": _deviation,
    "aten.linalg_vector_norm": _vector_norm,
    "aten.glu": _gated,
    **IMAGES,
    **FUNCTIONS,
}
"""Translation of each operation that has sound bounds, by name."""


def register(name: str, function: Callable[[Tensor], Tensor], curvature: float) -> None:
    """Give sound bounds to a function of single values that the tracer does not know, such as `aten.asinh`.

    `name` is the ATen operation without its overload, as the error message of the tracer prints it. `function` computes
    it, and `curvature` is a Lipschitz constant of its derivative: the bounds are sound only if it is not too small.
    Raises `UsageError` if the curvature is not a positive number.
    """
    if not 0 < curvature < float("inf"):
        raise UsageError(
            f"curvature is {curvature}; expected a positive number, a Lipschitz constant of the derivative"
        )
    known = smooth(function, curvature)

    def translate(to: Translator, *args: TracedValue, **kwargs: TracedValue) -> TracedValue:
        value = known(to, *args, **kwargs)
        to.nodes[-1] = replace(to.nodes[-1], inexact=True)  # it may be computed in any way
        return value

    TRANSLATIONS[name] = translate
