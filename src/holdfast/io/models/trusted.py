"""Opens model files that run code when they are loaded, with the user's consent: TorchScript, and pickles of whole
modules.

A file is read once, so that the bytes that are checked and hashed are those that are loaded.
"""

import hashlib
import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from holdfast.core.errors import TargetError
from holdfast.io.files import OWN_FUNCTION
from holdfast.io.limited.weights import NESTINGS, state_dict
from holdfast.io.models.factories import importable
from holdfast.io.models.weights import Weights, check_archive, is_script


def open_trusted(path: Path, content: bytes) -> tuple[nn.Module | Weights, str, str]:
    """Load the `content` of a trusted model file, which runs its code. Return the model, its format and its SHA-256.

    The result is a module, or weights if the file has no module. Raises `TargetError` if it cannot be loaded.
    """
    check_archive(path, content, trust_code=True)
    script = is_script(content)
    content_or_module = _loaded(path, io.BytesIO(content), script=script)
    if isinstance(content_or_module, Mapping):
        content_or_module = next(
            (
                content_or_module[name]
                for name in NESTINGS
                if isinstance(content_or_module.get(name), nn.Module)
            ),
            content_or_module,
        )
    if not isinstance(content_or_module, nn.Module):
        try:
            content_or_module = Weights(
                *(kind(part) for kind, part in zip((dict, tuple), state_dict(content_or_module), strict=True))
            )
        except TypeError as error:
            raise TargetError(f"{str(path)!r} {error}, or a torch.nn.Module") from error
    if script:
        _refuse_several_inputs(path, content_or_module)
    return content_or_module, "torchscript" if script else "pickle", hashlib.sha256(content).hexdigest()


def _refuse_several_inputs(path: Path, net: Any) -> None:
    """Raise `TargetError` for a script that needs further arguments than its inputs, such as a state or a rate."""
    schema = getattr(net.forward, "schema", None)  # a script may have no method `forward`
    named = [] if schema is None else schema.arguments[1:]
    arguments = [each for each in named if not each.has_default_value()]
    if len(arguments) > 1:
        zeros = ", ".join(
            "torch.zeros(len(x))" if str(each.type) == "Tensor" else "0" for each in arguments[1:]
        )
        raise TargetError(
            f"{str(path)!r} is called with {', '.join(each.name for each in arguments)}; one batch of inputs was "
            f"expected: {OWN_FUNCTION}, here with zeros in place of your values"
        ).with_code(
            "import torch",
            f"net = torch.jit.load({str(path)!r}).eval()",
            f"def make(): return lambda x: net(x, {zeros})",
        )


def _loaded(path: Path, content: io.BytesIO, *, script: bool) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit.load is deprecated, and classes may have changed
            if script:
                return torch.jit.load(content, map_location="cpu")  # type: ignore[no-untyped-call]
            with importable(path.parent):
                return torch.load(content, map_location="cpu", weights_only=False)
    except (AttributeError, ImportError) as error:
        raise TargetError(
            f"{str(path)!r} needs a class that cannot be imported here: {error}. Put the file that defines it beside "
            "the model, or give a factory that loads the model, as file.py:factory"
        ) from error
    except Exception as error:  # the code in the file may raise anything
        first_line = (str(error).splitlines() or [""])[0][:200]
        raise TargetError(
            f"{str(path)!r} could not be loaded by torch {torch.__version__}: {type(error).__name__}: {first_line}"
        ) from error
