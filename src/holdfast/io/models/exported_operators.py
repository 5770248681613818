"""List of the torch operators that an untrusted exported program may call: operators of networks that check their
arguments.

Other operators of aten build tensors from unchecked indices, strides or pointers, and may therefore read or write
outside of their memory. A common operator without checks is replaced by an equivalent one with checks.
"""

import re

import torch
from torch import Tensor, fx

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
