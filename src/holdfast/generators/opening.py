"""Reads and writes generators of this package as files with weights, and opens the bundled ones by name."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

from torch import nn

from holdfast.core.errors import TargetError, UsageError
from holdfast.generators.networks import Diffusion, ImageGAN
from holdfast.generators.vae import ImageVAE
from holdfast.io.files import sha256_of_file
from holdfast.io.models.generators import OpenedGenerator, open_generator
from holdfast.io.models.models import BUNDLED_FOLDER
from holdfast.io.models.weights import (
    fit_weights,
    read_state_dict,
    refuse_misfit,
    state_dict_content,
    written,
)

FILE = "generator.safetensors"
"""Name of the weights of a generator in a folder."""
GENERATORS: Mapping[str, Callable[..., nn.Module]] = MappingProxyType(
    {"diffusion": Diffusion, "gan": ImageGAN, "vae": ImageVAE}
)
"""Classes of generators, by the names that a file with weights may contain."""


def bundled_generators() -> dict[str, Path]:
    """Return the paths of the generators that are bundled with Holdfast, by name."""
    return {path.stem: path for path in sorted((BUNDLED_FOLDER / "generators").glob("*.safetensors"))}


def names_generator(address: str) -> bool:
    """Return whether an address is that of a bundled generator, or of a file or folder with weights of one."""
    path = Path(address)
    is_file = path.suffix == ".safetensors" or (path / FILE).is_file()
    return address in bundled_generators() or is_file


def content_of(net: nn.Module, kind: str, arguments: Mapping[str, int]) -> bytes:
    """Return the bytes of a file with the weights of a generator, which `GENERATORS[kind](**arguments)` builds."""
    return written(net, {"generator": kind, "arguments": dict(arguments)})


def load(path: Path) -> nn.Module:
    """Return the generator of a file with weights. Raises `TargetError` if it is not one of a generator."""
    weights, metadata = read_state_dict(path, state_dict_content(path))
    if "generator" not in metadata:
        raise TargetError(
            f"{str(path)!r} contains weights, and does not state the modules; load them in a function that builds the "
            "generator, as in gen.py:make"
        )
    kind, arguments = str(metadata["generator"]), metadata.get("arguments", {})
    if kind not in GENERATORS:
        raise TargetError(
            f"the metadata of {str(path)!r} name the generator {kind!r}; one of {', '.join(sorted(GENERATORS))} was "
            "expected, as in a file that Holdfast writes"
        )
    try:
        build = partial(GENERATORS[kind], **arguments)
        refuse_misfit(build, weights, str(path))
    except (TypeError, ValueError, RuntimeError) as error:
        raise TargetError(
            f"the {kind} of {str(path)!r} cannot be built: {error}; write the file again"
        ) from error
    net = build()
    fit_weights(net, weights, str(path))
    return net.eval().requires_grad_(False)


def opened_generator(source: object) -> OpenedGenerator:
    """Return a generator that is bundled, saved by Holdfast in a file or folder, returned by a function at an address
    `file.py:name`, or given as an object.

    Raises the errors of `load` and of `open_generator`.
    """
    if not isinstance(source, str) or not names_generator(source):
        return open_generator(source)
    bundled, path = bundled_generators(), Path(source)
    path = bundled[source] if source in bundled else path / FILE if path.is_dir() else path
    if not path.is_file():
        raise UsageError(f"there is no file {str(path)!r}; bundled are {', '.join(bundled)}")
    return replace(open_generator(load(path)), name=source, digest=sha256_of_file(path))
