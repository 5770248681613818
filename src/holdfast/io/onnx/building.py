"""Builds a `torch.fx` graph from ONNX operators, and converts those that move or reshape values."""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from holdfast.io.onnx.reading import onnx_module

MAX_ELEMENTS = 2**28
"""Largest number of elements of one value on the examples; a larger one is an attack or an error."""
MAX_COMPUTED = 2**30
"""Largest number of bytes of all computed constants that are not in the file; each is three times in memory."""


class Unsupported(Exception):
    """Error for an ONNX operator or setting that the importer does not support. The model then runs in onnxruntime."""


@dataclass(frozen=True, eq=False)
class Value:
    """An intermediate value of an ONNX network: its node in the `torch.fx` graph, and its values on two example
    batches.

    The node is None if the value does not depend on the input.
    """

    node: fx.Node | None
    at: tuple[Any, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value on the first of the two example batches."""
        return tuple(self.at[0].shape)

    @property
    def rank(self) -> int:
        """Number of dimensions of the value."""
        return len(self.shape)

    def varies(self, dim: int) -> bool:
        """Return whether the size of the dimension `dim` of the value depends on the batch size."""
        return bool(self.at[0].shape[dim] != self.at[1].shape[dim])

    @property
    def is_static(self) -> bool:
        """Whether the value is a constant tensor that depends neither on the input nor on the batch size."""
        first, second = self.at
        return self.node is None and first.shape == second.shape and bool(torch.equal(first, second))


@dataclass(frozen=True)
class Ints:
    """A vector of integers that is an argument of an ONNX operator, on two example batches. Integers that differ are
    multiples of the batch size.
    """

    at: tuple[tuple[int, ...], tuple[int, ...]]


class Builder:
    """The `torch.fx` graph of an ONNX model under construction, with the modules and constants that it uses."""

    def __init__(self, examples: tuple[Tensor, Tensor]) -> None:
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.input = Value(self.graph.placeholder("x"), examples)
        self._sizes = (len(examples[0]), len(examples[1]))
        self._constants: dict[int, fx.Node] = {}
        self._kept: list[Value] = []
        self._computed = 0
        self._count = 0
        self._batch: fx.Node | None = None
        self.one_hots: dict[fx.Node, tuple[Value, Tensor]] = {}
        """whole numbers and their table, by the node that looks them up; the table is a multiple of the identity"""
        self.place = ""
        """file and node of the present operator, in the form of a stack trace of torch"""

    def module(self, name: str, module: nn.Module, *inputs: Value) -> Value:
        """Add a torch module to the graph and return its output.

        Modules without parameters are added too, so that their settings are visible.
        """
        self._count += 1
        target = f"{name.lower()}_{self._count}"
        module.eval()
        at = self._examples(module, inputs, {})
        if all(value.node is None for value in inputs):
            return Value(None, at)
        self.root.add_module(target, module)
        return self._placed(self.graph.call_module(target, tuple(map(self._argument, inputs))), at)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Value:
        """Add the call of a torch function to the graph and return its result.

        No call is added if no argument depends on the input or on the batch size; then the result is a constant.
        """
        at = self._examples(function, args, kwargs)
        used = (*args, *kwargs.values())
        folds = all(value.node is None for value in _values(used))
        sized = any(isinstance(arg, Ints) and arg.at[0] != arg.at[1] for arg in used)
        if folds and not (sized and isinstance(at[0], Tensor) and at[0].is_floating_point()):
            return Value(None, at)
        node = self.graph.call_function(
            function,
            tuple(map(self._argument, args)),
            {name: self._argument(value) for name, value in kwargs.items()},
        )
        return self._placed(node, at)

    def _placed(self, node: fx.Node, at: tuple[Any, Any]) -> Value:
        """Return a node that was added for the present operator as a value, with the place of the operator."""
        node.meta["stack_trace"] = self.place
        return Value(node, at)

    def constant(self, tensor: Tensor) -> Value:
        """Return a tensor that does not depend on the input as a constant value of the graph."""
        return Value(None, (tensor, tensor))

    def item(self, values: Value, index: int) -> Value:
        """Return the output number `index` of an operator with several outputs."""
        return self.call(operator.getitem, values, index)

    def finish(self, output: Value) -> fx.GraphModule:
        """Return the finished graph as a module. Nodes on which `output` does not depend are removed."""
        self.graph.output(self._argument(output))
        built = fx.GraphModule(self.root, self.graph, "Imported")
        built.graph.eliminate_dead_code()
        built.graph.lint()
        built.recompile()
        built.delete_all_unused_submodules()
        return built.eval()

    def _examples(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, Any]:
        with torch.no_grad():
            first, second = (
                function(
                    *(_at(arg, i) for arg in args), **{name: _at(arg, i) for name, arg in kwargs.items()}
                )
                for i in (0, 1)
            )
        if isinstance(first, Tensor) and first.numel() > MAX_ELEMENTS:
            raise Unsupported(f"a value of {first.numel()} elements")
        return first, second

    def _argument(self, arg: Any) -> Any:
        if isinstance(arg, Value):
            return self._constant_node(arg) if arg.node is None else arg.node
        if isinstance(arg, Ints):
            return tuple(self._size(a, b) for a, b in zip(*arg.at, strict=True))
        if isinstance(arg, (tuple, list)):
            return type(arg)(self._argument(inner) for inner in arg)
        return arg

    def _constant_node(self, value: Value) -> fx.Node:
        if not value.is_static:
            raise Unsupported("a number that depends on the batch size, used as data")
        if id(value) not in self._constants:
            self._computed += 0 if value.at[0] is value.at[1] else value.at[0].nbytes
            if self._computed > MAX_COMPUTED:
                raise Unsupported(f"computed constants of more than {MAX_COMPUTED:,} bytes")
            name = f"constant_{len(self._constants)}"
            self.root.register_buffer(name, value.at[0].clone())
            self._kept.append(value)  # keeps the id in the table above valid
            self._constants[id(value)] = self.graph.get_attr(name)
        return self._constants[id(value)]

    def _size(self, first: int, second: int) -> int | fx.Node:
        if first == second:
            return first
        if first % self._sizes[0] or first // self._sizes[0] * self._sizes[1] != second:
            raise Unsupported("a size that is no multiple of the batch size")
        if self._batch is None:
            with self.graph.inserting_after(self.input.node):
                self._batch = self.graph.call_function(torch.Tensor.size, (self.input.node, 0))
        return (
            self._batch
            if first == self._sizes[0]
            else self.graph.call_function(operator.mul, (self._batch, first // self._sizes[0]))
        )


@dataclass(frozen=True)
class GraphStep:
    """An operator of an ONNX file that is to be converted: its inputs, its attributes and its number of outputs."""

    builder: Builder
    op: str
    inputs: tuple[Value | None, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    opset: int = 0
    n_outputs: int = 1
    fixed_batch: int | None = None
    """fixed batch size in the file; None if it is free"""

    @property
    def x(self) -> Value:
        """The first input of the ONNX operator."""
        return self.input(0)

    def given(self, index: int) -> bool:
        """Return whether the optional input number `index` of the ONNX operator is present."""
        return index < len(self.inputs) and self.inputs[index] is not None

    def input(self, index: int) -> Value:
        """Return the required input number `index` of the ONNX operator. Raises `Unsupported` if it is missing."""
        value = self.inputs[index] if index < len(self.inputs) else None
        if value is None:
            raise Unsupported(f"{self.op} without its input {index}")
        return value

    def tensor(self, index: int) -> Tensor:
        """Return an input of the ONNX operator that must be constant. Raises `Unsupported` if it is not."""
        value = self.input(index)
        if not value.is_static:
            raise Unsupported(f"{self.op} whose input {index} is computed from the data")
        tensor: Tensor = value.at[0]
        return tensor

    def ints(self, index: int) -> Ints:
        """Return an integer input of the ONNX operator. It may depend on the batch size, but not on the data."""
        value = self.input(index)
        if value.node is not None:
            raise Unsupported(f"{self.op} whose input {index} is computed from the data")
        first, second = (tuple(int(number) for number in example.flatten().tolist()) for example in value.at)
        return Ints((first, second))

    def axes(self, index: int) -> tuple[int, ...] | None:
        """Return the axes to which the ONNX operator applies, or None if it has none. They are an attribute in older
        operators and an input in newer ones.
        """
        if "axes" in self.attributes:
            return tuple(self.attributes["axes"])
        return tuple(self.tensor(index).flatten().tolist()) if self.given(index) else None

    def setting(self, name: str, default: Any) -> Any:
        """Return the attribute `name` of the ONNX operator, or `default` if the operator does not have it."""
        return self.attributes.get(name, default)


Operator = Callable[[GraphStep], Value | tuple[Value, ...]]


def _at(arg: Any, i: int) -> Any:
    if isinstance(arg, (Value, Ints)):
        return arg.at[i]
    if isinstance(arg, (tuple, list)):
        return type(arg)(_at(inner, i) for inner in arg)
    return arg


def _values(args: tuple[Any, ...]) -> list[Value]:
    values = [arg for arg in args if isinstance(arg, Value)]
    for arg in args:
        if isinstance(arg, (tuple, list)):
            values += _values(tuple(arg))
    return values


_MOST_PLACES = 2**24
"""Largest number of indices of a slice with negative steps, which are listed individually."""


def reshape(step: GraphStep) -> Value:
    """Convert the operator Reshape. The batch size remains free, even if it is fixed in the file."""
    x, requested = step.x, step.ints(1)
    if step.setting("allowzero", 0) and 0 in (*requested.at[0], *requested.at[1]):
        raise Unsupported("Reshape to a size of 0")  # without a 0 the setting has no effect
    first, second = (
        _resolved(tuple(x.at[i].shape), requested.at[i], step.fixed_batch if x.rank and x.varies(0) else None)
        for i in (0, 1)
    )
    return _reshaped(step.builder, x, Ints((first, second)))


def flatten(step: GraphStep) -> Value:
    """Convert the operator Flatten, which merges the dimensions before an axis to one dimension, and the remaining
    dimensions to a second one.
    """
    axis = step.setting("axis", 1)
    axis = axis + step.x.rank if axis < 0 else axis
    first, second = (
        (shape[:axis].numel(), shape[axis:].numel()) for shape in (example.shape for example in step.x.at)
    )
    return _reshaped(step.builder, step.x, Ints((first, second)))


def squeeze(step: GraphStep) -> Value:
    """Convert the operator Squeeze, which removes dimensions of size one."""
    axes = step.axes(1)
    x = step.x
    removed = {axis % x.rank for axis in axes} if axes else {i for i in range(x.rank) if x.shape[i] == 1}
    first, second = (tuple(s for i, s in enumerate(example.shape) if i not in removed) for example in x.at)
    if any(x.shape[i] != 1 or x.varies(i) for i in removed):
        raise Unsupported("Squeeze of a dimension that is not one")
    return _reshaped(step.builder, x, Ints((first, second)))


def unsqueeze(step: GraphStep) -> Value:
    """Convert the operator Unsqueeze, which inserts dimensions of size one."""
    axes = step.axes(1) or ()
    rank = step.x.rank + len(axes)
    new = {axis % rank for axis in axes}
    shapes = []
    for example in step.x.at:
        sizes = iter(example.shape)
        shapes.append(tuple(1 if i in new else next(sizes) for i in range(rank)))
    return _reshaped(step.builder, step.x, Ints((shapes[0], shapes[1])))


def transpose(step: GraphStep) -> Value:
    """Convert the operator Transpose, which permutes the dimensions."""
    order = step.setting("perm", tuple(reversed(range(step.x.rank))))
    return step.builder.call(torch.permute, step.x, tuple(order))


def concat(step: GraphStep) -> Value:
    """Convert the operator Concat, which concatenates tensors along an axis."""
    values = [step.input(i) for i in range(len(step.inputs))]
    if len(values) == 1:
        return values[0]
    return step.builder.call(torch.cat, tuple(values), step.attributes["axis"])


def split(step: GraphStep) -> tuple[Value, ...]:
    """Convert the operator Split, which splits a tensor along an axis."""
    axis = step.setting("axis", 0) % step.x.rank
    size = step.x.shape[axis]
    sizes = step.attributes.get("split")
    if sizes is None and step.given(1):
        sizes = step.tensor(1).tolist()
    if sizes is None:
        part_size = -(-size // step.n_outputs)
        sizes = [part_size] * (size // part_size) + ([size % part_size] if size % part_size else [])
    parts = step.builder.call(torch.split, step.x, tuple(sizes), axis)
    return tuple(step.builder.item(parts, i) for i in range(step.n_outputs))


def slice_(step: GraphStep) -> Value:
    """Convert the operator Slice, which selects a range of entries along some axes of a tensor."""
    if "starts" in step.attributes:  # before opset 10
        starts, ends = step.attributes["starts"], step.attributes["ends"]
        axes, steps = step.attributes.get("axes", range(len(starts))), [1] * len(starts)
    else:
        starts, ends = step.tensor(1).flatten().tolist(), step.tensor(2).flatten().tolist()
        axes = step.tensor(3).flatten().tolist() if step.given(3) else range(len(starts))
        steps = step.tensor(4).flatten().tolist() if step.given(4) else [1] * len(starts)
    y, cuts = step.x, [slice(None)] * step.x.rank
    for axis, start, end, stride in zip(axes, starts, ends, steps, strict=True):
        axis %= step.x.rank
        if stride > 0:
            cuts[axis] = slice(start, end if end < 2**31 else None, stride)
        else:
            indices_kept = range(step.x.shape[axis])[start : end if end > -(2**31) else None : stride]
            if len(indices_kept) > _MOST_PLACES:
                raise Unsupported(f"Slice of {len(indices_kept)} places from the end")
            places = torch.arange(indices_kept.start, indices_kept.stop, indices_kept.step)
            y = step.builder.call(torch.index_select, y, axis, step.builder.constant(places))
    if all(cut == slice(None) for cut in cuts):
        return y
    return step.builder.call(operator.getitem, y, tuple(cuts))


def gather(step: GraphStep) -> Value:
    """Convert the operator Gather, which selects entries of a tensor by their indices along an axis."""
    axis = step.setting("axis", 0) % step.x.rank
    places = step.input(1)
    if not places.is_static:
        if axis == 0 and step.x.rank == 2 and step.x.is_static:
            return step.builder.call(F.embedding, places, step.x)
        raise Unsupported("Gather by places that are computed from the data")
    indices = step.tensor(1)
    size = step.x.shape[axis]
    indices = torch.where(indices < 0, indices + size, indices)
    if indices.dim() == 0:
        return step.builder.call(torch.select, step.x, axis, int(indices))
    if indices.dim() == 1:
        return step.builder.call(torch.index_select, step.x, axis, step.builder.constant(indices))
    raise Unsupported(f"Gather by places of {indices.dim()} dimensions")


def one_hot(step: GraphStep) -> Value:
    """Convert the operator OneHot, which marks the place of each index on a new axis, to an embedding."""
    depth, (off, on) = int(step.tensor(1).reshape(())), step.tensor(2)
    if any(bool((example < 0).any() | (example >= depth).any()) for example in step.x.at):
        raise Unsupported("OneHot of indices out of range")
    _bounded((depth, depth))
    y = _marked(step.builder, step.x, torch.where(torch.eye(depth, dtype=torch.bool), on, off))
    axis = step.setting("axis", -1) % y.rank
    return y if axis == y.rank - 1 else step.builder.call(torch.movedim, y, -1, axis)


def equal(step: GraphStep) -> Value:
    """Convert the operator Equal. A comparison of whole numbers with 0, 1, 2, … on a new last axis marks their places,
    and becomes an embedding, so that attacks get a gradient for each number.
    """
    for x, numbers in ((step.x, step.input(1)), (step.input(1), step.x)):
        depth = numbers.shape[-1] if numbers.is_static and numbers.rank else 0
        # a stride of 0 shows that the last axis repeats one value
        repeats = x.node is not None and bool(x.rank) and (x.shape[-1] == 1 or x.at[0].stride(-1) == 0)
        if (
            repeats
            and numbers.rank <= x.rank
            and not x.at[0].is_floating_point()
            and depth > 1
            and depth * (depth + 1) <= MAX_ELEMENTS
            and torch.equal(numbers.at[0].flatten(), torch.arange(depth, dtype=numbers.at[0].dtype))
        ):
            places = step.builder.call(
                torch.Tensor.to, step.builder.call(torch.select, x, -1, 0), torch.int64
            )
            clamped = step.builder.call(torch.clamp, places, min=-1, max=depth)
            # numbers out of range equal none: the last row of the table
            places = step.builder.call(torch.remainder, clamped, depth + 1)
            table = torch.eye(depth + 1, depth)
            y = step.builder.call(torch.Tensor.to, _marked(step.builder, places, table), torch.bool)
            assert y.node is not None
            step.builder.one_hots[y.node] = (places, table)
            return y
    return step.builder.call(torch.eq, step.x, step.input(1))


def _marked(builder: Builder, x: Value, table: Tensor) -> Value:
    """Return the rows of a table for the whole numbers of `x`, and record how they were computed."""
    places = x if x.at[0].dtype == torch.int64 else builder.call(torch.Tensor.to, x, torch.int64)
    y = builder.call(F.embedding, places, builder.constant(table))
    if y.node is not None:
        builder.one_hots[y.node] = (places, table)
    return y


def projected_one_hot(step: GraphStep) -> Value | None:
    """Return the product of marked places and a constant matrix as an embedding in the rows of the matrix, or None for
    other products.
    """
    right = step.input(1)
    if step.x.node not in step.builder.one_hots or not right.is_static or right.rank != 2:
        return None
    places, table = step.builder.one_hots[step.x.node]
    return step.builder.call(F.embedding, places, step.builder.constant(table @ right.at[0]))


def scatter_elements(step: GraphStep) -> Value:
    """Convert the operator ScatterElements, which writes elements to indices along an axis."""
    how = step.setting("reduction", b"none").decode()
    if how != "none":
        raise Unsupported(f"ScatterElements with reduction {how}")
    return step.builder.call(torch.scatter, step.x, step.setting("axis", 0), step.input(1), step.input(2))


def pad(step: GraphStep) -> Value:
    """Convert the operator Pad, which extends a tensor at the beginnings and ends of its dimensions."""
    mode = step.setting("mode", b"constant").decode()
    pads = list(step.attributes["pads"] if "pads" in step.attributes else step.tensor(1).tolist())
    value = float(step.tensor(2)) if step.given(2) else step.setting("value", 0.0)
    rank = step.x.rank
    axes = [axis % rank for axis in step.tensor(3).tolist()] if step.given(3) else list(range(rank))
    pads_of_dims = [(0, 0)] * rank
    for i, axis in enumerate(axes):
        pads_of_dims[axis] = (pads[i], pads[i + len(axes)])
    while pads_of_dims and pads_of_dims[0] == (0, 0):
        pads_of_dims.pop(0)
    if not pads_of_dims:
        return step.x
    flat = tuple(size for pair in reversed(pads_of_dims) for size in pair)
    if mode == "constant":
        return step.builder.call(F.pad, step.x, flat, value=value)
    names = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}
    if mode not in names or len(pads_of_dims) > rank - 2 or rank < 3:
        raise Unsupported(f"Pad of mode {mode} around {len(pads_of_dims)} of {rank} dimensions")
    return step.builder.call(F.pad, step.x, flat, mode=names[mode])


def resize(step: GraphStep) -> Value:
    """Convert the operators Resize and Upsample, with nearest-neighbour or linear interpolation."""
    mode = step.setting("mode", b"nearest").decode()
    coordinates = step.setting(
        "coordinate_transformation_mode", b"half_pixel" if step.opset > 10 else b"asymmetric"
    ).decode()
    rounding = step.setting("nearest_mode", b"round_prefer_floor" if step.opset > 10 else b"floor").decode()
    sizes = _sizes(step)
    spatial = sizes[2:]
    if sizes[:2] != step.x.shape[:2] or step.x.rank not in (3, 4, 5) or step.setting("antialias", 0):
        raise Unsupported("Resize of batch or channels, or with antialias")
    if mode == "nearest" and coordinates == "asymmetric" and rounding == "floor":
        return step.builder.call(F.interpolate, step.x, spatial, mode="nearest")
    integer_scale = all(new % old == 0 for new, old in zip(spatial, step.x.shape[2:], strict=True))
    if (
        mode == "nearest"
        and coordinates in ("half_pixel", "pytorch_half_pixel")
        and integer_scale
        and rounding.startswith("round")
    ):
        return step.builder.call(F.interpolate, step.x, spatial, mode="nearest-exact")
    if mode == "linear" and coordinates in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        linear = {3: "linear", 4: "bilinear", 5: "trilinear"}[step.x.rank]
        corners = coordinates == "align_corners"
        return step.builder.call(F.interpolate, step.x, spatial, mode=linear, align_corners=corners)
    raise Unsupported(f"Resize of mode {mode}, {coordinates}, {rounding}")


def expand(step: GraphStep) -> Value:
    """Convert the operator Expand, which repeats a tensor along dimensions of size one."""
    first, second = (
        tuple(np.broadcast_shapes(tuple(example.shape), requested))
        for example, requested in zip(step.x.at, step.ints(1).at, strict=True)
    )
    _bounded(first)
    return step.builder.call(torch.Tensor.expand, step.x, Ints((first, second)))


def tile(step: GraphStep) -> Value:
    """Convert the operator Tile, which repeats a tensor along its dimensions."""
    times = step.ints(1)
    _bounded((*times.at[0], step.x.at[0].numel()))
    return step.builder.call(torch.tile, step.x, times)


def cast(step: GraphStep) -> Value:
    """Convert the operator Cast, which converts a tensor to another type."""
    dtype = _dtype(step.attributes["to"])
    if step.x.node in step.builder.one_hots and dtype.is_floating_point:  # not by way of truth values
        places, table = step.builder.one_hots[step.x.node]
        return _marked(step.builder, places, table.to(dtype))
    return step.x if step.x.at[0].dtype == dtype else step.builder.call(torch.Tensor.to, step.x, dtype)


def constant(step: GraphStep) -> Value:
    """Convert the operator Constant, which returns a constant that the ONNX file contains."""
    ((name, value),) = step.attributes.items()
    if name == "value":
        return step.builder.constant(as_tensor(value))
    kinds = {
        "value_float": torch.float32,
        "value_floats": torch.float32,
        "value_int": torch.int64,
        "value_ints": torch.int64,
    }
    if name not in kinds:
        raise Unsupported(f"Constant given as {name}")
    return step.builder.constant(torch.tensor(value, dtype=kinds[name]))


def constant_of_shape(step: GraphStep) -> Value:
    """Convert the operator ConstantOfShape, which returns a tensor of a given shape, filled with one number."""
    value = as_tensor(step.attributes["value"]) if "value" in step.attributes else torch.zeros(1)
    shape = step.ints(0)
    _bounded(shape.at[0])
    return step.builder.call(torch.full, shape, value.item(), dtype=value.dtype)


def shape(step: GraphStep) -> Value:
    """Convert the operator Shape, which returns the sizes of the dimensions of a tensor."""
    rows = slice(step.setting("start", 0), step.attributes.get("end"))
    first, second = (torch.tensor(list(example.shape)[rows], dtype=torch.int64) for example in step.x.at)
    return Value(None, (first, second))


def size(step: GraphStep) -> Value:
    """Convert the operator Size, which returns the number of elements of a tensor."""
    first, second = (torch.tensor(example.numel()) for example in step.x.at)
    return Value(None, (first, second))


def range_(step: GraphStep) -> Value:
    """Convert the operator Range, which returns equally spaced numbers from a start to an end."""
    start, end, stride = (step.tensor(i) for i in range(3))
    if stride == 0 or abs((end - start).item() / stride.item()) > MAX_ELEMENTS:
        raise Unsupported("Range without an end")
    return step.builder.constant(torch.arange(start.item(), end.item(), stride.item(), dtype=start.dtype))


def identity(step: GraphStep) -> Value:
    """Convert the operators Identity and Dropout, which return their input; dropout has an effect only in training."""
    if step.n_outputs > 1:
        raise Unsupported(f"{step.op} that returns a mask")
    return step.x


def as_tensor(array: Any) -> Tensor:
    """Convert an array of an ONNX file to a torch tensor. Raises `Unsupported` for a type that torch does not have."""
    try:
        return torch.from_numpy(array.copy())
    except TypeError as error:
        raise Unsupported(f"numbers of type {array.dtype}") from error


def _reshaped(builder: Builder, x: Value, sizes: Ints) -> Value:
    """Return a reshaped value. If everything except the batch is flattened, `nn.Flatten` is used."""
    first, second = sizes.at
    if first == tuple(x.at[0].shape) and second == tuple(x.at[1].shape):
        return x
    if (
        x.node is not None
        and x.rank > 1
        and len(first) == 2
        and first[0] != second[0]
        and x.varies(0)
        and len(x.at[0]) == first[0]
    ):
        return builder.module("flatten", nn.Flatten(1), x)
    return builder.call(torch.reshape, x, sizes)


def _resolved(old: tuple[int, ...], new: tuple[int, ...], fixed_batch: int | None) -> tuple[int, ...]:
    """Return the sizes as numbers: 0 becomes the old size, -1 is inferred, and a fixed batch size is that of the
    example.
    """
    sizes = [old[i] if size == 0 else size for i, size in enumerate(new)]
    if fixed_batch is not None and sizes and sizes[0] == fixed_batch:
        sizes[0] = old[0]
    total, known_size = torch.Size(old).numel(), torch.Size([s for s in sizes if s != -1]).numel()
    if -1 in sizes:
        sizes[sizes.index(-1)] = total // max(known_size, 1)
    if torch.Size(sizes).numel() != total:
        raise Unsupported(f"Reshape of {old} to {new}")
    return tuple(sizes)


def _sizes(step: GraphStep) -> tuple[int, ...]:
    """Return the output sizes of the operators Resize and Upsample."""
    if step.given(3):
        return tuple(step.ints(3).at[0])
    place = 1 if step.op == "Upsample" or step.opset < 11 else 2
    scales = step.attributes.get("scales") or step.tensor(place).tolist()
    return tuple(int(size * scale) for size, scale in zip(step.x.shape, scales, strict=True))


def _bounded(sizes: tuple[int, ...]) -> None:
    if torch.Size(sizes).numel() > MAX_ELEMENTS:
        raise Unsupported(f"a value of shape {sizes}")


def _dtype(number: int) -> torch.dtype:
    array = onnx_module().helper.tensor_dtype_to_np_dtype(number).type(0)
    return as_tensor(array.reshape(1)).dtype


SHAPING: dict[str, Operator] = {
    "Cast": cast,
    "Concat": concat,
    "Constant": constant,
    "ConstantOfShape": constant_of_shape,
    "Dropout": identity,
    "Equal": equal,
    "Expand": expand,
    "Flatten": flatten,
    "Gather": gather,
    "Identity": identity,
    "OneHot": one_hot,
    "Pad": pad,
    "Range": range_,
    "Reshape": reshape,
    "Resize": resize,
    "ScatterElements": scatter_elements,
    "Shape": shape,
    "Size": size,
    "Slice": slice_,
    "Split": split,
    "Squeeze": squeeze,
    "Tile": tile,
    "Transpose": transpose,
    "Unsqueeze": unsqueeze,
    "Upsample": resize,
}
"""Functions that convert the operators of this module, by their ONNX names."""
