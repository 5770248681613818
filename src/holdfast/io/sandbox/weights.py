"""Loads a state dict with torch's option `weights_only` in a limited process, and writes it as a safetensors file."""

import io
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from holdfast.core.errors import TRUST_CODE, CarriesCode, TargetError
from holdfast.core.names import kind_of

NESTINGS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "module",
    "weights",
    "params",
)
"""Keys under which training scripts store the state dict, in the order of the search."""
SAFER = (
    "It is safer to save model.state_dict() and to declare the architecture, or to export a .pt2 program or ONNX, "
    "which run no code"
)
"""Advice for model files that run code."""
WRITTEN = "weights.safetensors"
"""Name of the file with the tensors, in the folder that both processes use."""


def read(path: Path, content: bytes | None, folder: Path) -> dict[str, object]:
    """Write the tensors of a state dict to a safetensors file in the folder, and return notes for the report.

    Raises `CarriesCode` for a file that would run code, and `TargetError` for other files.
    """
    assert content is not None, "the file is read once"
    torch.set_num_threads(1)
    try:
        # With this, torch compares the indices of sparse tensors with their sizes, which it does not do by default.
        with torch.sparse.check_sparse_tensor_invariants():  # type: ignore[no-untyped-call]
            tensors, notes = state_dict(
                torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            )
            # Cloned, because safetensors refuses tensors that share memory, as tied weights do.
            dense_tensors = {
                name: dense(name, tensor).contiguous().clone() for name, tensor in tensors.items()
            }
        safetensors.torch.save_file(dense_tensors, folder / WRITTEN)
    except pickle.UnpicklingError as error:
        raise CarriesCode(f"{str(path)!r} {explain(error)} {SAFER}", TRUST_CODE) from error
    except Exception as error:  # any error that an untrusted file causes is reported in one sentence
        raise TargetError(f"{str(path)!r} {explain(error)}") from error
    return {"notes": notes}


class NoStateDictError(TypeError):
    """Error for a file that torch can read, but whose content is not a state dict of dense tensors."""


def state_dict(checkpoint: object) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of a loaded checkpoint, and notes on the entry that contains them and on entries that were
    left out.

    Raises `NoStateDictError` if there are none.
    """
    notes: list[str] = []
    for _ in range(3):  # the deepest known nesting is a list of one checkpoint that contains a state dict
        if isinstance(checkpoint, (list, tuple)) and len(checkpoint) == 1:
            checkpoint = checkpoint[0]
            notes.append("the state dict was the only entry of a list")
        elif isinstance(checkpoint, Mapping) and (nested_name := _nested(checkpoint)):
            checkpoint = checkpoint[nested_name]
            notes.append(f"the state dict was taken from the entry {nested_name!r}")
        else:
            break
    if not isinstance(checkpoint, Mapping):
        raise NoStateDictError(
            f"contains {kind_of(checkpoint)}; a state dict (names with tensors) was expected"
        )
    tensors = {str(name): value for name, value in checkpoint.items() if isinstance(value, Tensor)}
    if not tensors:
        names = ", ".join(map(repr, list(checkpoint)[:5])) or "nothing"
        raise NoStateDictError(f"contains no tensors; it has {names}. Save model.state_dict() into it")
    left_out = [str(name) for name in checkpoint if str(name) not in tensors]
    if left_out:
        notes.append(f"{len(left_out)} entries that are no tensors were left out ({', '.join(left_out[:3])})")
    return tensors, notes


def dense(name: str, tensor: Tensor) -> Tensor:
    """Return a tensor of a state dict without gradient, converted from sparse to dense.

    Raises `NoStateDictError` for a nested tensor, whose offsets are not checked.
    """
    if tensor.is_nested:
        raise NoStateDictError(
            f"contains the nested tensor {name!r}; save tensors of one shape each, or give ONNX"
        )
    return tensor.detach().to_dense()


def _nested(checkpoint: Mapping[object, object]) -> str | None:
    for name in NESTINGS:
        entry = checkpoint.get(name)
        if isinstance(entry, Mapping) or (isinstance(entry, (list, tuple)) and len(entry) == 1):
            return name
    return None


def explain(error: Exception) -> str:
    """Return an explanation of an error of `torch.load` for users without knowledge of pickle."""
    text = str(error)
    if match := re.search(r"nsupported (?:global: )?GLOBAL (\S+)", text):
        return (
            f"wants code: it would call {match[1]}. Only tensors are read from such a file, which may be the pickle "
            "of a whole model, and nothing in it was run."
        )
    if isinstance(error, pickle.UnpicklingError):
        return f"is no state dict that can be read safely: {_cause(text)}. Nothing in it was run."
    if isinstance(error, NoStateDictError):
        return text
    return f"is damaged, truncated or no torch file: {text.splitlines()[0][:200] if text else type(error).__name__}"


def _cause(text: str) -> str:
    lines = [
        line.strip() for line in text.split("WeightsUnpickler error:", 1)[-1].splitlines() if line.strip()
    ]
    cause = lines[0].rstrip(".")[:200] if lines else "it ends early"
    if operand := re.match(r"Unsupported operand (\d+)", cause):
        return f"it is a pickle that torch.save did not write (it contains operation {operand[1]})"
    return cause
