"""A pretended device: tensors that report the device `lazy` and are computed on the CPU.

An operation that would fail on an accelerator because its tensors are on several devices fails here as well, so that a
CPU suffices to test that code follows the device of its input. Not found here: what differs in the numbers of an
accelerator, and operations that it lacks.
"""

from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE, CPU = torch.device("lazy"), torch.device("cpu")

aten = torch.ops.aten
_BETWEEN_DEVICES = {"aten::copy_", "aten::_to_copy"}
"""names of operations whose tensors may be on several devices"""
_INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
"""operations whose indices may be on the CPU"""
_OF_NUMBERS = {aten.masked_fill.Tensor, aten.masked_fill_.Tensor, aten.fill_.Tensor}
"""operations, besides the elementwise ones, that accept a CPU tensor without dimensions as a number"""


class Pretended(Tensor):
    """A tensor that reports the device `lazy`; its values are in the CPU tensor `values_on_cpu`."""

    @staticmethod
    def __new__(cls, values_on_cpu):
        tensor = Tensor._make_wrapper_subclass(
            cls,
            values_on_cpu.shape,
            strides=values_on_cpu.stride(),
            storage_offset=values_on_cpu.storage_offset(),
            dtype=values_on_cpu.dtype,
            device=DEVICE,
        )
        tensor.values_on_cpu = values_on_cpu
        return tensor

    def tolist(self):
        """PyTorch does not offer it for subclasses."""
        return self.values_on_cpu.tolist()

    def __repr__(self):
        return f"Pretended({self.values_on_cpu})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _carried_out(function, args, kwargs or {})


def _tensors(values):
    """All tensors of nested arguments, in their order."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _mapped(value, change):
    """The nested value with each of its tensors changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_mapped(each, change) for each in value])
    return value


def _refuse_several_devices(function, tensors):
    others = [each for each in tensors if not isinstance(each, Pretended)]
    if not others or len(others) == len(tensors) or function.name() in _BETWEEN_DEVICES:
        return
    on_device = isinstance(tensors[0], Pretended)
    in_place = function.name().split(".")[0].endswith("_") and not on_device
    takes_numbers = torch.Tag.pointwise in function.tags or function in _OF_NUMBERS
    if takes_numbers and not in_place and all(not each.dim() for each in others):
        return
    if function in _INDEXING and on_device:
        value = tensors[0 if function is aten.index.Tensor else -1]
        if isinstance(value, Pretended) or not value.dim():
            return
    devices = ", ".join(f"{tuple(each.shape)} on {each.device}" for each in tensors)
    raise RuntimeError(f"{function} has tensors on several devices: {devices}")


def _carried_out(function, args, kwargs):
    tensors = list(_tensors((args, tuple(kwargs.values()))))
    _refuse_several_devices(function, tensors)
    on_device = any(isinstance(each, Pretended) for each in tensors)
    if kwargs.get("device") is not None:
        on_device = kwargs["device"].type == DEVICE.type
        kwargs = {**kwargs, "device": CPU if on_device else kwargs["device"]}
    if on_device and kwargs.get("generator") is not None:
        raise RuntimeError(f"expected a generator of the device {DEVICE}, got one of the CPU")
    wrappers = {id(each.values_on_cpu): each for each in tensors if isinstance(each, Pretended)}

    def unwrapped(tensor):
        return tensor.values_on_cpu if isinstance(tensor, Pretended) else tensor

    def wrapped(tensor):
        # an operation in place returns its argument
        return wrappers[id(tensor)] if id(tensor) in wrappers else Pretended(tensor)

    kwargs = {name: _mapped(value, unwrapped) for name, value in kwargs.items()}
    result = function(*_mapped(args, unwrapped), **kwargs)
    return _mapped(result, wrapped) if on_device else result


def _with_tensors(index):
    """The index with its lists of numbers as tensors, which PyTorch would create on the device."""
    if isinstance(index, tuple):
        return tuple(map(_with_tensors, index))
    return torch.tensor(index) if isinstance(index, list) else index


class _Operations(TorchDispatchMode):
    """Carries out operations without tensors as well, such as `torch.zeros(3, device="lazy")`."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _carried_out(function, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Carries out functions that create a tensor without an operation, or that replace the values of one."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") == DEVICE:
            return function(*args, **{**kwargs, "device": CPU}).to(DEVICE)
        if function is Tensor.new_tensor and isinstance(args[0], Pretended):
            return args[0].values_on_cpu.new_tensor(*args[1:], **kwargs).to(DEVICE)
        if function in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], Pretended):
            args = (args[0], _with_tensors(args[1]), *args[2:])
        if function == Tensor.data.__set__ and isinstance(args[0], Pretended):
            args[0].values_on_cpu = args[1].values_on_cpu
            return None
        return function(*args, **kwargs)


@contextmanager
def pretended():
    """Make `DEVICE` usable. Autocasting on it is that of the CPU."""
    autocast = torch.autocast

    def of_the_cpu(device_type, *args, **kwargs):
        return autocast("cpu" if device_type == DEVICE.type else device_type, *args, **kwargs)

    with patch.object(torch, "autocast", of_the_cpu), _Functions(), _Operations():
        yield
