"""A program of its own: unpickles one state dict with `weights_only`, under limits, and writes it as safetensors.

`python -P unpacking.py STATE_DICT OUT` prints one line of JSON: `{"notes": [...]}`, or `{"error": "...", "code": true}`
where the file holds more than tensors. It imports nothing of the package, so that it starts as fast as torch does.
"""

import json
import pickle
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

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
"""entries under which training scripts keep the state dict, in the order tried"""
SPARE_BYTES = 512 * 2**20
"""memory beyond four copies of the file"""
CPU_SECONDS = 240


def limit(path: Path) -> None:
    """Cap memory, CPU time and what is written; what torch has mapped already is not counted against the file.

    Windows has no such limits; there the checks of the zip directory and `weights_only` are what is left.
    """
    try:
        import resource
    except ImportError:
        return
    allowance = 4 * path.stat().st_size + SPARE_BYTES
    mapped = Path("/proc/self/statm")
    if mapped.exists():
        in_use = int(mapped.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + allowance, in_use + allowance))
    else:
        resource.setrlimit(resource.RLIMIT_DATA, (2**30 + allowance, 2**30 + allowance))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (allowance, allowance))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def state_dict(found: object) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a checkpoint, and notes: where they lay, and which entries are no tensors."""
    notes: list[str] = []
    for _ in range(3):  # a list of one entry around a checkpoint around a state dict is the deepest seen
        if isinstance(found, (list, tuple)) and len(found) == 1:
            found = found[0]
            notes.append("the state dict was the only entry of a list")
        elif isinstance(found, Mapping) and (inner := _nested(found)):
            found = found[inner]
            notes.append(f"the state dict was taken from the entry {inner!r}")
        else:
            break
    if not isinstance(found, Mapping):
        raise TypeError(f"holds a {type(found).__name__}; a state dict (names with tensors) was expected")
    tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    if not tensors:
        names = ", ".join(map(repr, list(found)[:5])) or "nothing"
        raise TypeError(f"holds no tensors; it has {names}. Save model.state_dict() into it")
    left_out = [str(name) for name in found if str(name) not in tensors]
    if left_out:
        notes.append(f"{len(left_out)} entries that are no tensors were left out ({', '.join(left_out[:3])})")
    return tensors, notes


def dense(name: str, tensor: Tensor) -> Tensor:
    """A tensor without gradient, dense where it was sparse; `TypeError` for a nested one: its offsets are unchecked."""
    if tensor.is_nested:
        raise TypeError(f"holds the nested tensor {name!r}; save tensors of one shape each, or give ONNX")
    return tensor.detach().to_dense()


def _nested(checkpoint: Mapping[object, object]) -> str | None:
    for name in NESTINGS:
        inner = checkpoint.get(name)
        if isinstance(inner, Mapping) or (isinstance(inner, (list, tuple)) and len(inner) == 1):
            return name
    return None


def explain(error: Exception) -> str:
    """What was wrong, in words that need no knowledge of pickle."""
    text = str(error)
    if wanted := re.search(r"nsupported (?:global: )?GLOBAL (\S+)", text):
        return (
            f"wants code: it would call {wanted[1]}. Only tensors are read from such a file, which may be the pickle "
            "of a whole model, and nothing in it was run."
        )
    if isinstance(error, pickle.UnpicklingError):
        return f"is no state dict that can be read safely: {_cause(text)}. Nothing in it was run."
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "not enough memory" in text:
        return "asks for far more memory than its size; it was refused at the memory limit"
    if isinstance(error, TypeError) and text.startswith("holds"):
        return text
    return f"is damaged, truncated or no torch file: {text.splitlines()[0][:200] if text else type(error).__name__}"


def _cause(text: str) -> str:
    said = [
        line.strip() for line in text.split("WeightsUnpickler error:", 1)[-1].splitlines() if line.strip()
    ]
    cause = said[0].rstrip(".")[:200] if said else "it ends early"
    if operand := re.match(r"Unsupported operand (\d+)", cause):
        return f"it is a pickle that torch.save did not write (it holds operation {operand[1]})"
    return cause


def main(source: str, out: str) -> dict[str, object]:
    """Unpickle `source`, write `out`, and say what was found."""
    torch.set_num_threads(1)
    try:
        limit(Path(source))
        # With this, torch compares the indices of sparse tensors with their sizes, which it does not do by itself.
        with torch.sparse.check_sparse_tensor_invariants():  # type: ignore[no-untyped-call]
            tensors, notes = state_dict(torch.load(source, map_location="cpu", weights_only=True))
            # Cloned: safetensors refuses tensors that share memory, which tied weights do.
            plain = {name: dense(name, tensor).contiguous().clone() for name, tensor in tensors.items()}
        safetensors.torch.save_file(plain, out)
    except Exception as error:  # noqa: BLE001 - whatever a hostile file provokes becomes one sentence; the parent decides
        return {"error": explain(error), "code": isinstance(error, pickle.UnpicklingError)}
    return {"notes": notes}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(*sys.argv[1:])))
