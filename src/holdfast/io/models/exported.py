"""Opens `.pt2` files, which contain programs of `torch.export`, that may be untrusted."""

import hashlib
import io
import json
import math
import re
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from holdfast.core.errors import TRUST_CODE, TargetError, UsageError
from holdfast.core.model import Batches
from holdfast.io.files import refusing
from holdfast.io.models.weights import check_archive, read_once
from holdfast.io.sandbox.calling import read_under_limits
from holdfast.io.sandbox.sandbox_main import Limits, is_out_of_memory

_LAYERS = """
addmm baddbmm bilinear bmm conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution dot
einsum embedding linear matmul mm mv one_hot outer tensordot
gru gru_cell lstm lstm_cell rnn_relu rnn_relu_cell rnn_tanh rnn_tanh_cell
_native_batch_norm_legit_no_training batch_norm cosine_similarity group_norm instance_norm layer_norm
linalg_inv linalg_inv_ex linalg_norm linalg_solve linalg_vector_norm native_group_norm native_layer_norm norm
pairwise_distance rms_norm
_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d
max_pool2d_with_indices max_pool3d max_pool3d_with_indices
_log_softmax _safe_softmax _softmax log_softmax scaled_dot_product_attention softmax
grid_sampler grid_sampler_2d upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d
upsample_nearest2d upsample_nearest3d upsample_trilinear3d _upsample_nearest_exact1d _upsample_nearest_exact2d
_upsample_nearest_exact3d
"""
_SHAPES = """
_assert_scalar _assert_tensor_metadata _to_copy _unsafe_view alias broadcast_to cat channel_shuffle chunk clone col2im
concat concatenate constant_pad_nd contiguous detach diagonal expand expand_as flatten flip gather hstack im2col index
mH mT index_add index_put index_select lift_fresh_copy masked_fill meshgrid movedim narrow pad permute pixel_shuffle
pixel_unshuffle ravel reflection_pad1d reflection_pad2d reflection_pad3d repeat repeat_interleave replication_pad1d
replication_pad2d replication_pad3d reshape reshape_as roll rot90 scatter scatter_add select select_scatter
slice slice_scatter split split_with_sizes squeeze stack swapaxes sym_constrain_range sym_constrain_range_for_size
sym_numel sym_size t take_along_dim tensor_split tile to transpose tril triu type_as unbind unflatten unfold unsqueeze
view view_as view_as_complex view_as_real vstack imag real
arange bernoulli eye full full_like linspace new_full new_ones new_zeros ones ones_like rand rand_like randn randn_like
scalar_tensor zeros zeros_like
fft_fft fft_fft2 fft_fftn fft_ifft fft_ifft2 fft_ifftn fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftn
"""
_REDUCTIONS = """
all amax amin any argmax argmin argsort count_nonzero cumprod cumsum diff logsumexp max mean median min prod sort std
std_mean sum topk var var_mean
"""
_POINTWISE = """
abs absolute acos acosh add addcdiv addcmul alpha_dropout asin asinh atan atan2 atanh bitwise_and bitwise_not bitwise_or
bitwise_xor ceil celu clamp clamp_max clamp_min clip conj copy copy_ cos cosh div divide dropout elu eq erf erfc erfinv
exp exp2 expm1 feature_alpha_dropout feature_dropout fill floor floor_divide fmax fmin fmod frac ge gelu glu greater
greater_equal gt hardshrink hardsigmoid hardswish hardtanh hypot isfinite isinf isnan le leaky_relu lerp less less_equal
log log10 log1p log2 log_sigmoid logaddexp logical_and logical_not logical_or logical_xor logit lt maximum minimum mish
mul multiply nan_to_num native_dropout ne neg negative not_equal pow prelu reciprocal relu relu6 remainder round rrelu
rsqrt rsub selu sgn sigmoid sign silu sin sinh softplus softshrink sqrt square sub subtract tan tanh threshold
true_divide trunc where xlogy zero
"""
_OPERATORS = frozenset(f"{_LAYERS} {_SHAPES} {_REDUCTIONS}".split())
_IN_PLACE = frozenset(
    {*_POINTWISE.split(), "index_add", "index_put", "masked_fill", "scatter", "scatter_add"}
)
"""Operators of which a program may also call the version that modifies its argument, such as `relu_`."""
_NUMBERS = re.compile(r"_operator\.(getitem|add|sub|mul|floordiv|mod|neg|pow)", re.ASCII)
_TENSORS = re.compile(r"torch\.ops\.aten\.(\w+)\.(\w+)", re.ASCII)
_RECURRENT = frozenset({"gru", "lstm", "rnn_relu", "rnn_tanh"})
"""Operators that are permitted only for whole batches, because the sizes of packed sequences are not checked."""


def is_operator_of_networks(name: str) -> bool:
    """Return whether an untrusted exported program may call the torch operator called `name`, such as
    `torch.ops.aten.relu.default`.
    """
    if _NUMBERS.fullmatch(name):
        return True
    match = _TENSORS.fullmatch(name)
    if match is None:
        return False
    operator, overload = match.groups()
    without_underscore = operator.removesuffix("_") if operator.endswith("_") else ""
    if operator not in _OPERATORS | _IN_PLACE and without_underscore not in _IN_PLACE:
        return False
    packet = getattr(torch.ops.aten, operator, None)
    if (
        packet is None
        or overload not in packet.overloads()
        or (operator in _RECURRENT and overload != "input")
    ):
        return False
    # an overload that changes an argument is in place, or writes to an output tensor of any size
    return operator.endswith("_") or not getattr(packet, overload)._schema.is_mutable


def replace_unchecked(graph: fx.Graph) -> None:
    """Replace operators of an exported program that do not check the sizes of their weights by operators that do.
    Modifies the graph in place.
    """
    aten = torch.ops.aten
    for target, checked in (
        (aten._native_batch_norm_legit_no_training.default, _batch_norm),
        (aten.lstm.input, _lstm),
    ):
        for node in graph.find_nodes(op="call_function", target=target):
            node.target = checked


def _batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
) -> tuple[Tensor]:
    return (torch.batch_norm(input, weight, bias, running_mean, running_var, False, momentum, eps, False),)


def _lstm(*arguments: object) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result of an LSTM that is computed without oneDNN, which does not check the size of the weights."""
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)  # torch's context manager warns about other flags that it sets
    try:
        outputs: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.lstm.input(*arguments)
    finally:
        torch._C._set_mkldnn_enabled(enabled)
    return outputs


Sizes = tuple[int | None, ...]
LIMITS = Limits(copies=8, spare_bytes=2**31)
"""Limits of the process in which a program is first loaded and run."""
_MOST_TRIED = 2**24
"""Largest number of input values of a fixed batch for which other batch sizes are tried.

Other batch sizes use two to four times the memory of the fixed one.
"""
SLICES = "other batches are split and padded, which is slow; export it with a free batch size, as in"
"""what happens with batches of another size than the fixed one, and the way to avoid it"""
FREE_BATCH = "torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim('n')},))"
"""export of a program that accepts any batch size"""
_NAME = re.compile(r"(?!(.*\.)?__\w*__(\.|$))[\w@-]+(\.[\w@-]+)*|", re.ASCII)
"""Pattern of dotted names that may be written into generated code.

Names with two underscores at both ends do not match, because Python reserves them.
"""
_TEXT = re.compile(r"[\w .,:;+<>=*/-]*", re.ASCII)
_TENSOR_FILE = re.compile(r"(weight|tensor)_\d+", re.ASCII)
_CONTAINERS = frozenset({"builtins.tuple", "builtins.list", "builtins.dict"})
_PROGRAM = "models/model.json"
_DAMAGE = (
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
)
"""Errors that torch's reader and this module raise for a damaged archive."""
_WORDS = frozenset(
    {
        "Symbol",
        "Integer",
        "Add",
        "Mul",
        "Mod",
        "Pow",
        "Max",
        "Min",
        "FloorDiv",
        "CleanDiv",
        "PythonMod",
        "int_oo",
    }
    | {"Eq", "Ne", "Ge", "Gt", "Le", "Lt", "And", "Or", "Not", "True", "False", "None", "and", "or", "not"}
    | {"positive", "integer", "nonnegative", "negative", "real", "finite", "L", "size"}
)
_TOKENS = re.compile(r"[A-Za-z_]\w*|\d+|[\s'\"()\[\],.=<>!+\-*/%]")
_SYMBOL = re.compile(r"[su]\d+")


@dataclass(frozen=True)
class Program:
    """A program of `torch.export` wrapped as a module, and the only batch size that it accepts, or None if it accepts
    any.
    """

    net: nn.Module
    batch_size: int | None
    digest: str
    """SHA-256 of the file, in hex"""


class FixedBatch(nn.Module):
    """A module that runs an exported program with a fixed batch size on any number of rows, one slice after another.

    The last slice is filled up with copies of its last row.
    """

    def __init__(self, net: nn.Module, size: int) -> None:
        super().__init__()
        self.net = net
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of the exported program for all rows of a batch."""
        if not len(x):
            empty: Tensor = self.net(x.new_zeros(self.size, *x.shape[1:]))[:0]
            return empty
        return Batches(self.size).through(self.net, x)


class MappedBatch(nn.Module):
    """A module that runs a network with a fixed batch size on any number of rows, all slices at once.

    The operations of the network are mapped over the slices (`torch.vmap`), and the last slice is filled up with copies
    of its last row.
    """

    def __init__(self, net: nn.Module, size: int) -> None:
        super().__init__()
        self.net = net
        self.batches = Batches(size, multiples=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of the network for all rows of a batch."""
        if not len(x):
            return FixedBatch(self.net, self.batches.size)(x)  # type: ignore[no-any-return]
        return self.batches.through(self._mapped, x)

    def _mapped(self, x: Tensor) -> Tensor:
        size = self.batches.size
        with sdpa_kernel(SDPBackend.MATH):  # the other kernels of attention cannot be mapped
            slices: Tensor = torch.vmap(self.net)(x.reshape(-1, size, *x.shape[1:]))
        return slices.flatten(0, 1)


def open_program(path: Path, *, trust_code: bool) -> Program:
    """Return the exported program in a `.pt2` file. Raises `UsageError` for a file that contains code unless
    `trust_code` is True.

    Without trust, the program is checked, loaded and run once in a separate process before it is loaded in this one.
    """
    content = read_once(path, "exported program")  # the checked bytes are the loaded ones
    check_archive(path, content)
    if trust_code:
        reasons_to_refuse(path, content)  # a damaged file is refused with trust, too
    else:
        with read_under_limits("programs", path, LIMITS, content=content):
            pass  # it is loaded here after that has gone well
    net, sizes = loaded_program(path, content)
    size = sizes[0]
    if size is not None:
        net = rebatched(net, size, sizes[1:])
    return Program(net, size if isinstance(net, FixedBatch) else None, hashlib.sha256(content).hexdigest())


def exported(net: nn.Module, x: Tensor) -> bytes | None:
    """Return a network as the content of a `.pt2` file that is opened without trust and accepts any batch size. Return
    None if torch cannot export it so.
    """
    file = io.BytesIO()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            batch = torch.export.Dim("batch", min=1)
            program = torch.export.export(net.eval(), (x[:2],), dynamic_shapes=({0: batch},))
            torch.export.save(program, file)
        harmless = not list(_needs_trust(file.getvalue()))
    except Exception:  # noqa: BLE001  the code of the user's network may raise anything
        return None
    return file.getvalue() if harmless else None


def reasons_to_refuse(path: Path, content: bytes) -> list[str]:
    """Return descriptions of all parts of an exported program that could run code, which are all parts other than
    tensors and operators of networks.

    Raises `TargetError` if the program is damaged.
    """
    with refusing(f"{str(path)!r} is no program of torch.export.save, or is damaged", _DAMAGE):
        return list(_needs_trust(content))


def refuse_code_in_program(path: Path, content: bytes) -> None:
    """Raise `UsageError` for an exported program that contains anything other than tensors and neural-network
    operators, because other parts could run code.
    """
    reasons = reasons_to_refuse(path, content)
    if reasons:
        raise UsageError(
            f"{str(path)!r} carries what could run as code, or reach outside of its tensors: "
            f"{'; '.join(reasons[:3])}; export it to ONNX, or give the network as file.py:factory",
            TRUST_CODE,
        )


def loaded_program(path: Path, content: bytes) -> tuple[nn.Module, Sizes]:
    """Load a `.pt2` file that was checked or is trusted. Return its network and the shape of its input.

    A size is None if the program accepts any.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = _loaded(content)
            net = _plain(program.module())
    except (
        Exception
    ) as error:  # the loader may raise anything, from KeyError to AssertionError, for an untrusted file
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise TargetError(
            f"{str(path)!r} could not be opened by torch {torch.__version__}: {first_line[:200]}"
        ) from error
    return net, _input_shape(program)


def _loaded(content: bytes) -> torch.export.ExportedProgram:
    from torch.export.pt2_archive._package import load_pt2  # late: it is slow to import, and few need it

    program: torch.export.ExportedProgram = load_pt2(io.BytesIO(content)).exported_programs["model"]
    return program


def _plain(exported: fx.GraphModule) -> fx.GraphModule:
    """Return the program as an ordinary module in eval mode, without checks of sizes.

    A program with one output returns a tensor instead of a tuple.
    """
    graph = fx.Graph()
    output = graph.graph_copy(exported.graph, {})
    graph.output(output[0] if isinstance(output, (tuple, list)) and len(output) == 1 else output)
    for node in graph.find_nodes(op="call_module", target="_guards_fn"):
        graph.erase_node(node)
    replace_unchecked(graph)
    module = fx.GraphModule(exported, graph, "Exported")
    module.delete_all_unused_submodules()
    return module.eval()


def _input_shape(program: torch.export.ExportedProgram) -> Sizes:
    """Return the sizes of the axes of the only input; a size is None if it is free."""
    users = set(program.graph_signature.user_inputs)
    nodes = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in users]
    values = [node.meta["val"] for node in nodes]
    if len(values) != 1 or not isinstance(values[0], Tensor) or values[0].dim() == 0:
        raise TargetError(
            f"the exported program takes {len(values)} inputs, and a classifier takes one batch of inputs; export it "
            "with the others as constants, or give a function of one input, as file.py:factory"
        )
    sizes: tuple[object, ...] = tuple(values[0].shape)  # torch does not annotate the symbols of free sizes
    return tuple(size if isinstance(size, int) else None for size in sizes)


def rebatched(net: nn.Module, size: int, shape: Sizes, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a network that was exported for one batch size and inputs of one shape as one that accepts any batch size:
    the network itself or mapped over slices, if its rows are then equal to those of a `FixedBatch`, or else this.

    The test is worthwhile because slices are many times slower. It is not made if the batch is large.
    """
    slices = FixedBatch(net, size)
    if None in shape or size * math.prod(side or 1 for side in shape) > _MOST_TRIED:
        return slices
    n_rows = (size + 1, 2 * size + 3)
    inputs = [
        torch.rand((n, *(side or 1 for side in shape)), generator=torch.Generator().manual_seed(n)).to(dtype)
        for n in n_rows
    ]
    return next((other for other in (net, MappedBatch(net, size)) if _alike(other, slices, inputs)), slices)


def _alike(net: nn.Module, slices: FixedBatch, inputs: Sequence[Tensor]) -> bool:
    """Return whether a network accepts the inputs, and has the same outputs as for the slices one after another."""
    try:
        # a graph prints its code if an operation fails
        with torch.no_grad(), redirect_stderr(io.StringIO()):
            for x in inputs:
                torch.testing.assert_close(net(x), slices(x), rtol=1e-4, atol=1e-5)
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError):
        return False
    return True


def _needs_trust(content: bytes) -> Iterator[str]:
    """Yield the reasons why a program contains more than tensors and known operators."""
    from torch.export.pt2_archive._package import PT2ArchiveReader  # late, as above

    expected = _member_names(content)
    with PT2ArchiveReader(io.BytesIO(content)) as archive:
        names = archive.get_file_names()
        if sorted(names) != sorted(expected):
            raise ValueError("its two lists of members differ")
        if _PROGRAM not in names:
            raise ValueError(f"it holds no {_PROGRAM}")
        for name in names:
            if name.startswith("data/sample_inputs/"):
                yield from _unsafe_pickle(archive.read_bytes(name), name)
            elif name.startswith("data/aotinductor/") or name.endswith((".so", ".pt", ".pkl")):
                yield f"the member {name}"
            elif name.startswith("models/") and name != _PROGRAM:
                yield f"the second program {name}"
            elif re.fullmatch(r"data/(weights|constants)/.*config\.json", name):
                yield from _unsafe_tensors(json.loads(archive.read_bytes(name))["config"])
        yield from _unsafe_graph(json.loads(archive.read_bytes(_PROGRAM)), "")


def _member_names(content: bytes) -> list[str]:
    """Return the names of the members inside their common folder. Raises `ValueError` if names differ only by case.

    torch ignores case in these names.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = [name.partition("/") for name in archive.namelist()]
    folders, names = {folder for folder, _, _ in parts}, [name for _, _, name in parts]
    if len(folders) != 1 or "" in folders or "" in names:
        raise ValueError("its members do not all lie in one folder")
    if any("\\" in name for name in names) or len({name.casefold() for name in names}) < len(names):
        raise ValueError("two of its members have one name, or a name has a backslash")
    return names


def _unsafe_tensors(entries: dict[str, Any]) -> Iterator[str]:
    """Yield tensors that are not stored as plain bytes, because torch unpickles these, and names that are not plain."""
    for entry, how in entries.items():
        if how["use_pickle"] or not _TENSOR_FILE.fullmatch(how["path_name"]):
            yield f"the pickled tensor {entry[:60]!r}"
        elif not _NAME.fullmatch(entry):
            yield f"the name {entry[:60]!r}"


def _unsafe_pickle(content: bytes, name: str) -> Iterator[str]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            yield f"the compressed pickle {name}"
            return
    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except Exception as error:  # whatever it is, the loader would then fall back to unsafe unpickling
        if is_out_of_memory(error):
            raise
        yield f"the pickle {name}"


def _unsafe_graph(value: Any, key: str) -> Iterator[str]:
    """Yield the parts of a graph that torch would resolve, evaluate or write into source code, if they are not known.

    `metadata` of strings is not among them.
    """
    if isinstance(value, dict):
        if key == "custom_obj_values" and value:
            yield "custom objects"
        for name, entry in value.items():
            if not _NAME.fullmatch(name):
                yield f"the name {name[:60]!r}"
            is_metadata = name == "metadata" and not key.endswith("_values")
            if not is_metadata or not all(isinstance(text, str) for text in entry.values()):
                yield from _unsafe_graph(entry, name)
    elif isinstance(value, list):
        for entry in value:
            yield from _unsafe_graph(entry, key)
    elif isinstance(value, str):
        yield from _unsafe_text(key, value)


def _unsafe_text(key: str, text: str) -> Iterator[str]:
    if key in ("target", "as_operator"):
        kind, is_harmless = "operator", is_operator_of_networks(text)
    elif key in ("expr_str", "guards_code"):
        kind, is_harmless = "expression", _harmless(text)
    elif key in ("in_spec", "out_spec"):
        kind, is_harmless = "container", _plain_container(json.loads(text)[1])
    elif key in ("as_string", "torch_version"):
        kind, is_harmless = "text", bool(_TEXT.fullmatch(text))
    else:
        kind, is_harmless = "name", bool(_NAME.fullmatch(text))
    if not is_harmless:
        yield f"the {kind} {text[:60]!r}"


def _plain_container(spec: dict[str, Any]) -> bool:
    """Return whether a container is a tuple, a list or a dictionary with names as keys.

    The context of any other container may import a module.
    """
    if spec["type"] is None:
        return True
    context = json.loads(spec["context"])
    keys = [] if context is None else context
    has_names_as_keys = isinstance(keys, list) and all(
        isinstance(k, str) and _NAME.fullmatch(k) for k in keys
    )
    return (
        has_names_as_keys
        and spec["type"] in _CONTAINERS
        and all(map(_plain_container, spec["children_spec"]))
    )


def _harmless(expression: str) -> bool:
    tokens = _TOKENS.findall(expression)
    words = [token for token in tokens if token[0].isalpha() or token[0] == "_"]
    all_known = all(word in _WORDS or _SYMBOL.fullmatch(word) or _quoted(word, expression) for word in words)
    return "".join(tokens) == expression and all_known


def _quoted(word: str, expression: str) -> bool:
    """Return whether an input name occurs in an expression only as `L['input']`."""
    return expression.count(word) == expression.count(f"L['{word}']") and "__" not in word
