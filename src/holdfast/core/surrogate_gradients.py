"""Relaxed gradients: a model computes its own outputs, but operations without a useful gradient, such as arg max,
comparisons, rounding and look-ups in a table, have the gradient of a smooth function.

It extends the straight-through estimator (Bengio, Léonard & Courville, "Estimating or propagating gradients through
stochastic neurons for conditional computation", arXiv:1308.3432) and BPDA (Athalye, Carlini & Wagner, "Obfuscated
gradients give a false sense of security", ICML 2018, arXiv:1802.00420) to operations anywhere in a forward pass, so
that they need no module of their own. Differs from both: an arg max is a distribution over its outcomes, which is
followed through integer operations until it becomes a floating-point value.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from holdfast.core.gradients import instead

_SOFTNESS = 0.3
"""temperature of a distribution over outcomes, and width of a soft step, in standard deviations of their arguments:
smaller ones leave most examples without a gradient, larger ones mix unrelated outcomes"""
_MOST_OUTCOMES = 5_000_000
"""largest number of values of a distribution, which bounds the memory"""
_ROUNDINGS = frozenset({"round", "floor", "ceil", "trunc", "fix"})
_CASTS = frozenset(
    {
        "to",
        "type",
        "type_as",
        "float",
        "double",
        "half",
        "bfloat16",
        "int",
        "long",
        "short",
        "char",
        "byte",
        "to_copy",
    }
)
_MOVES = frozenset(
    {
        "view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "permute", "transpose", "movedim", "t",
        "T", "mT", "contiguous", "clone", "expand", "repeat",
    }
)  # fmt: skip
"""operations that move elements, and so the distributions of each"""
_UNUSUAL = (RuntimeError, TypeError, IndexError, ValueError)
_LEAVING = frozenset({"numpy", "__array__", "tolist"})
"""operations whose results are no tensors"""


@dataclass(frozen=True)
class _Soft:
    """Differentiable stand-in of a tensor of integers or truth values."""

    dense: Tensor
    """expected value, in the shape of the tensor"""
    chances: Tensor | None = None
    """probability of each outcome, of the shape of the choice and then the number of outcomes"""
    table: Tensor | None = None
    """value of the tensor for each outcome, with the outcomes in the first dimension"""


def _choice(chances: Tensor, table: Tensor) -> _Soft:
    return _Soft(torch.tensordot(chances, table.to(chances.dtype), dims=1), chances, table)


class Relaxation(TorchFunctionMode):
    """Context in which the forward passes of modules have relaxed gradients; `relaxed` enters it.

    It also records intermediate tensors with a gradient, by names that are the same in each forward pass.
    """

    def __init__(self, *, cross: bool = True) -> None:
        super().__init__()
        self.cross = cross
        """whether a gradient passes through `detach` and `no_grad`"""
        self.passed = 0
        """number of operations with a relaxed gradient"""
        self.choices = 0
        """number of choices among outcomes, such as an arg max over the entries of a codebook, and of functions outside
        torch: their relaxed gradients do not predict which outcomes an input near by has"""
        self.recorded: list[Tensor] = []
        """outputs of modules, and tensors at which the gradient is cut, in the order of their computation"""
        self.cuts: list[int] = []
        """positions in `recorded` of tensors that enter an operation after which no gradient is left, or a relaxed
        one"""
        self._depth = 0
        self._outside: Tensor | None = None
        self._soft: dict[int, tuple[Tensor, _Soft]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: Any = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        if self._outside is not None and self._depth:
            args = _mapped(self._returned, args)
        live = [value for value in _tensors((args, kwargs)) if self._is_live(value)] if self._depth else []
        if not live:
            return func(*args, **kwargs)
        if not self.cross:
            return self._computed(func, _name(func), args, kwargs, live)
        with torch.enable_grad():
            return self._computed(func, _name(func), args, kwargs, live)

    def entered(self, *_: Any) -> None:  # noqa: ANN401
        """Count the beginning of a module's forward pass; relaxation is limited to them."""
        if not self._depth:
            self.passed, self.choices = 0, 0
            self.recorded, self.cuts, self._soft, self._outside = [], [], {}, None
        self._depth += 1

    def left(self, _module: nn.Module, _inputs: Any, output: Any) -> None:  # noqa: ANN401
        """Count the end of a module's forward pass, and record its output."""
        self._depth -= 1
        if isinstance(output, Tensor) and output.requires_grad:
            self.recorded.append(output)

    def _is_live(self, value: Tensor) -> bool:
        return value.requires_grad or id(value) in self._soft

    def soft_of(self, value: object) -> _Soft | None:
        """Return the stand-in of a tensor of integers or truth values, or None if it has none."""
        return self._soft[id(value)][1] if id(value) in self._soft else None

    def dense(self, value: Any) -> Any:  # noqa: ANN401
        """Return the expected value of a tensor that has a stand-in, and any other value unchanged."""
        soft = self.soft_of(value)
        return value if soft is None else soft.dense

    def cut(self, value: object) -> None:
        """Record a tensor at which the gradient is cut, or replaced by a relaxed one."""
        if isinstance(value, Tensor) and value.requires_grad and value.dim() > 1:
            self.cuts.append(len(self.recorded))
            self.recorded.append(value)

    def _computed(
        self,
        func: Callable[..., Any],
        name: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        live: list[Tensor],
    ) -> Any:  # noqa: ANN401
        if name in ("detach", "data") and self.cross:
            return self._passed_on(args[0])
        if name == "requires_grad_":
            return args[0]
        if name in _LEAVING:
            self.cut(args[0])
            self._outside = args[0] if args[0].requires_grad and args[0].dim() > 1 else None
            return func(args[0].detach(), *args[1:], **kwargs)
        plain = name.strip("_")
        if plain in _ROUNDINGS and name != plain:
            return self._rounded_in_place(func, args, kwargs)
        value = func(*args, **kwargs)
        rule = _RULES.get(plain) if name == plain or name.startswith("__") else None
        if rule is not None and isinstance(value, (Tensor, tuple)):
            try:
                stand_in = rule(self, value, *args, **kwargs)
            except _UNUSUAL:  # arguments that the rule does not know
                stand_in = None
            if stand_in is not None:
                return self._replaced(value, stand_in)
        if any(id(one) in self._soft for one in live):
            return self._followed(func, value, args, kwargs, moves=name in _MOVES)
        lost = [one for one in _tensors(value) if one.numel() > 1]
        if lost and not any(one.requires_grad for one in lost) and not name.endswith("_like"):
            for one in live:
                self.cut(one)
        return value

    def _returned(self, value: Tensor) -> Tensor:
        """The first tensor in the shape of one that left torch, as for a function of numpy, gets its gradient."""
        outside = self._outside
        if outside is None or value.requires_grad or value.shape != outside.shape:
            return value
        if isinstance(value, nn.Parameter) or not value.is_floating_point() or value.is_inference():
            return value
        self._outside = None
        self.passed += 1
        self.choices += 1
        return instead(value, outside.to(value.dtype))

    def _passed_on(self, value: Tensor) -> Tensor:
        """A copy with the gradient, which the model may change in place as it may a detached tensor."""
        copied, soft = value.clone(), self.soft_of(value)
        if soft is not None:
            self._soft[id(copied)] = copied, soft
        return copied

    def _rounded_in_place(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:  # noqa: ANN401
        before = args[0].clone()
        value = func(*args, **kwargs)
        self.passed += 1
        return args[0].copy_(instead(value, before))

    def _replaced(self, value: Any, stand_in: Any) -> Any:  # noqa: ANN401
        """The value of an operation with its stand-in: a gradient, or a record for a tensor that has none."""
        if isinstance(value, tuple):  # values and indices
            self._soft[id(value[1])] = value[1], stand_in
            return value
        if value.is_floating_point():
            dense = stand_in.dense if isinstance(stand_in, _Soft) else stand_in
            self.passed += 1
            return instead(value, dense.to(value.dtype).expand_as(value))
        soft = stand_in if isinstance(stand_in, _Soft) else _Soft(stand_in)
        self._soft[id(value)] = value, soft
        return value

    def _followed(
        self,
        func: Callable[..., Any],
        value: Any,  # noqa: ANN401
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        moves: bool,
    ) -> Any:  # noqa: ANN401
        """The value of any operation on recorded tensors: the operation on their stand-ins gives its own."""
        if not isinstance(value, Tensor):
            return value
        first = self.soft_of(args[0]) if args else None
        outcomes = moves and first is not None and first.table is not None and first.table.dim() == 1
        if outcomes and first is not None and first.chances is not None and first.table is not None:
            chances = torch.vmap(lambda one: func(one, *args[1:], **kwargs), -1, -1)(first.chances)
            return self._replaced(value, _choice(chances, first.table))
        try:
            soft = func(*_mapped(self.dense, args), **_mapped(self.dense, dict(kwargs)))
        except _UNUSUAL:  # an operation on integers alone
            for one in _tensors((args, kwargs)):
                self.cut(self.dense(one))
            return value
        if not isinstance(soft, Tensor) or soft.shape != value.shape or not soft.requires_grad:
            return value
        return self._replaced(value, soft)


@contextmanager
def relaxed(*, cross: bool = True) -> Iterator[Relaxation]:
    """Context manager in which forward passes of modules have relaxed gradients. Outputs do not change.

    With `cross`, gradients also pass through `detach` and `no_grad`. Yields the record of the last forward pass.
    """
    mode = Relaxation(cross=cross)
    left = register_module_forward_hook(mode.left, always_call=True)  # also after an error of the module
    hooks = [register_module_forward_pre_hook(mode.entered), left]
    try:
        with mode:
            yield mode
    finally:
        for hook in hooks:
            hook.remove()


def _name(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", "")
    if name == "__get__":  # of a property, such as `data`
        return str(getattr(func, "__self__", func).__name__)
    return name.partition(".")[0]  # of an overload, such as `argmax.default`


def _tensors(values: object) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(tuple(values.values()))


def _mapped(function: Callable[[Any], Any], values: Any) -> Any:  # noqa: ANN401
    if isinstance(values, dict):
        return {key: _mapped(function, value) for key, value in values.items()}
    if isinstance(values, (tuple, list)):
        return type(values)(_mapped(function, value) for value in values)
    return function(values) if isinstance(values, Tensor) else values


def _spread_of(values: Tensor, dim: int | None = None) -> Tensor:
    """Standard deviation of the values, over all or along one dimension, as a constant of the gradient."""
    values = values.detach().float()
    deviation = values.std(unbiased=False) if dim is None else values.std(dim, unbiased=False, keepdim=True)
    return deviation.nan_to_num(1.0).clamp_min(1e-6)


def _chances(scores: Tensor, dim: int) -> Tensor:
    """Probabilities of the outcomes along a dimension, moved to the last."""
    scale = (_SOFTNESS * _spread_of(scores, dim)).to(scores.dtype)
    return (scores / scale).softmax(dim).movedim(dim, -1)


def _outcomes(
    mode: Relaxation, scores: Tensor, dim: int | None, sign: int, *, keepdim: bool = False
) -> _Soft | None:
    scores = mode.dense(scores)
    if dim is None and scores.dim() == 1:
        dim = 0
    if dim is None or not scores.is_floating_point() or scores.numel() > _MOST_OUTCOMES:
        return None
    mode.cut(scores)
    mode.choices += 1
    chances = _chances(sign * scores, dim)
    if keepdim:
        chances = chances.unsqueeze(dim if dim >= 0 else dim - 1)
    return _choice(chances, torch.arange(chances.shape[-1], device=scores.device))


def _arg(sign: int) -> Callable[..., Any]:
    def rule(
        mode: Relaxation,
        value: Tensor,
        scores: Tensor,
        dim: int | None = None,
        keepdim: bool = False,  # noqa: FBT001, FBT002  as in torch
        **_: Any,  # noqa: ANN401
    ) -> _Soft | None:
        return _outcomes(mode, scores, dim, sign, keepdim=keepdim)

    return rule


def _extreme(sign: int) -> Callable[..., Any]:
    def rule(
        mode: Relaxation,
        value: Any,  # noqa: ANN401
        scores: Tensor,
        dim: Any = None,  # noqa: ANN401
        keepdim: bool = False,  # noqa: FBT001, FBT002
        **_: Any,  # noqa: ANN401
    ) -> _Soft | None:
        if not isinstance(value, tuple):
            return None
        return _outcomes(mode, scores, dim, sign, keepdim=keepdim)

    return rule


def _topk(
    mode: Relaxation,
    value: Any,  # noqa: ANN401
    scores: Tensor,
    k: int,
    dim: int = -1,
    largest: bool = True,  # noqa: FBT001, FBT002
    *_: Any,  # noqa: ANN401
    **__: Any,  # noqa: ANN401
) -> _Soft | None:
    """Each of the `k` choices has the distribution of the first."""
    if scores.numel() * k > _MOST_OUTCOMES:
        return None
    soft = _outcomes(mode, scores, dim, 1 if largest else -1)
    if soft is None or soft.chances is None or soft.table is None:
        return None
    repeated = soft.chances.unsqueeze(-2)
    repeated = repeated.expand(*repeated.shape[:-2], k, repeated.shape[-1])
    dim = dim % scores.dim()
    return _choice(repeated.movedim(-2, dim) if dim < scores.dim() - 1 else repeated, soft.table)


def _looked_up(
    mode: Relaxation,
    index: Any,  # noqa: ANN401
    look_up: Callable[[Tensor], Tensor],
) -> _Soft | None:
    """The values of a table at an index that has outcomes."""
    soft = mode.soft_of(index) if isinstance(index, Tensor) else None
    if soft is None or soft.chances is None or soft.table is None or soft.table.dim() != 1:
        return None
    table = look_up(soft.table)
    return _choice(soft.chances, table)


def _step(sign: int) -> Callable[..., Any]:
    def rule(mode: Relaxation, value: Tensor, first: Any, second: Any, **_: Any) -> Tensor | None:  # noqa: ANN401
        difference: Tensor = 1.0 * mode.dense(first) - 1.0 * mode.dense(second)
        if not difference.requires_grad:
            return None
        mode.cut(first)
        return (sign * difference / (_SOFTNESS * _spread_of(difference)).to(difference.dtype)).sigmoid()

    return rule


def _same(sign: int) -> Callable[..., Any]:
    """Equality of values that differ by whole numbers, such as bits and classes."""

    def rule(mode: Relaxation, value: Tensor, first: Any, second: Any, **_: Any) -> Any:  # noqa: ANN401
        soft = mode.soft_of(first)
        if soft is not None and soft.chances is not None and not isinstance(second, Tensor):
            return _choice(soft.chances, soft.table == second if sign > 0 else soft.table != second)
        difference = 1.0 * mode.dense(first) - 1.0 * mode.dense(second)
        if not isinstance(difference, Tensor) or not difference.requires_grad:
            return None
        equal = 1 - difference.abs().clamp_max(1)
        return equal if sign > 0 else 1 - equal

    return rule


def _signed(mode: Relaxation, value: Tensor, x: Tensor) -> Tensor:
    mode.cut(x)
    dense: Tensor = mode.dense(x)
    return (dense / (2 * _SOFTNESS * _spread_of(x)).to(x.dtype)).tanh()


def _rounded(mode: Relaxation, value: Tensor, x: Tensor, *_: Any, **__: Any) -> Tensor:  # noqa: ANN401
    mode.cut(x)
    dense: Tensor = mode.dense(x)
    return dense


def _cast(mode: Relaxation, value: Any, x: Tensor, *_: Any, **__: Any) -> Any:  # noqa: ANN401
    soft = mode.soft_of(x)
    if soft is None:
        if value.is_floating_point():
            return None
        mode.cut(x)
        return x
    if soft.table is not None and not value.is_floating_point():
        return soft
    return soft.dense


def _chosen(mode: Relaxation, value: Tensor, condition: Tensor, *branches: Any) -> Tensor | None:  # noqa: ANN401
    soft = mode.soft_of(condition)
    if soft is None or len(branches) != 2:
        return None
    first, second = (mode.dense(branch) for branch in branches)
    return soft.dense * first + (1 - soft.dense) * second  # type: ignore[no-any-return]


def _filled(mode: Relaxation, value: Tensor, x: Tensor, mask: Tensor, filling: Any) -> Tensor | None:  # noqa: ANN401
    soft = mode.soft_of(mask)
    if soft is None or (not isinstance(filling, Tensor) and abs(filling) > 1e6):
        return None
    return (1 - soft.dense) * mode.dense(x) + soft.dense * filling  # type: ignore[no-any-return]


def _interval(mode: Relaxation, value: Tensor, x: Tensor, boundaries: Tensor, **_: Any) -> _Soft | None:  # noqa: ANN401
    """A distribution over the intervals between boundaries, by the distance from their middles."""
    if boundaries.dim() != 1 or len(boundaries) < 1 or x.numel() * len(boundaries) > _MOST_OUTCOMES:
        return None
    mode.cut(x)
    gaps = boundaries.diff() if len(boundaries) > 1 else boundaries.new_ones(1)
    ends = torch.cat((boundaries[:1] - gaps[:1], boundaries, boundaries[-1:] + gaps[-1:]))
    middles = ((ends[1:] + ends[:-1]) / 2).to(x.dtype)
    width = gaps.mean().clamp_min(1e-6).to(x.dtype)
    chances = (-((mode.dense(x)[..., None] - middles) / width).square() / _SOFTNESS).softmax(-1)
    return _choice(chances, torch.arange(len(middles), device=x.device))


def _either(mode: Relaxation, value: Tensor, first: Any, second: Any) -> Any:  # noqa: ANN401
    one, other = (mode.dense(term) for term in (first, second))
    return 1 - (1 - one * 1.0) * (1 - other * 1.0)


def _both(mode: Relaxation, value: Tensor, first: Any, second: Any) -> Any:  # noqa: ANN401
    return mode.dense(first) * 1.0 * mode.dense(second)


def _opposite(mode: Relaxation, value: Tensor, x: Tensor) -> Any:  # noqa: ANN401
    return 1 - mode.dense(x) * 1.0


_RULES: Mapping[str, Callable[..., Any]] = {
    **dict.fromkeys(_ROUNDINGS, _rounded),
    **dict.fromkeys(_CASTS, _cast),
    "argmax": _arg(1),
    "argmin": _arg(-1),
    "max": _extreme(1),
    "min": _extreme(-1),
    "topk": _topk,
    "gt": _step(1),
    "ge": _step(1),
    "lt": _step(-1),
    "le": _step(-1),
    "eq": _same(1),
    "ne": _same(-1),
    "sign": _signed,
    "sgn": _signed,
    "where": _chosen,
    "masked_fill": _filled,
    "bucketize": _interval,
    "searchsorted": lambda mode, value, boundaries, x, **kw: _interval(mode, value, x, boundaries),
    "one_hot": lambda mode, value, index, *a, **kw: _looked_up(
        mode, index, lambda table: torch.nn.functional.one_hot(table, value.shape[-1])
    ),
    "index": lambda mode, value, table, index: (
        _looked_up(mode, index[0], lambda rows: table[rows]) if len(index) == 1 else None
    ),
    "getitem": lambda mode, value, table, index: _looked_up(mode, index, lambda rows: table[rows]),
    "embedding": lambda mode, value, index, table, *a, **kw: (
        _looked_up(mode, index, lambda rows: table[rows]) or _looked_up(mode, table, lambda rows: index[rows])
    ),
    "index_select": lambda mode, value, table, dim, index: (
        _looked_up(mode, index, lambda rows: table[rows]) if dim == 0 else None
    ),
    "and": _both,
    "bitwise_and": _both,
    "logical_and": _both,
    "or": _either,
    "bitwise_or": _either,
    "logical_or": _either,
    "invert": _opposite,
    "bitwise_not": _opposite,
    "logical_not": _opposite,
}
"""operations with a stand-in of their own: `rule(mode, value, *args, **kwargs)` returns it, or None"""
