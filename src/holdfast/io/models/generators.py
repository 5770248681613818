"""Opens a generator: an object with a method `sample(n, seed)`, which a function in a Python file returns or that is
given as a Python object. What else it can do is read from its further methods and attributes (`Abilities`).
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from holdfast.core.chain import canonical, digest
from holdfast.core.draws import Draws
from holdfast.core.errors import HoldfastError, TargetError, UsageError
from holdfast.core.names import kind_of
from holdfast.io.models.adapting import digest_of_object
from holdfast.io.models.factories import error_text, function_digest, function_from_file, function_name

_PIECE = 500  # samples of one call
_TESTED = 8  # samples of the tests of the seed
_SHOWN = {
    "decode": "decode(z)",
    "encode": "encode(x)",
    "discriminate": "discriminate(x)",
    "denoising_loss": "denoising_loss(x, t, noise)",
    "denoised": "denoised(noise)",
    "log_prob": "log_prob(x)",
}
"""How each method of `Abilities` is called, for messages."""


@runtime_checkable
class Generator(Protocol):
    """Protocol of a generator of examples."""

    def sample(self, n: int, seed: int) -> Any:
        """Return `n` samples (n, *features), a tensor or an array, that are determined by `seed`. Values are in the
        units of the training examples; bytes are divided by 255.
        """


class Abilities(Protocol):
    """Methods and attributes that a generator may have beside `sample`. A method is used if the object has it; all but
    `sample` may be differentiated, and take and return tensors on the device of the generator's parameters.
    """

    latent_shape: tuple[int, ...]
    """shape of the latent vector of one sample, whose elements are drawn from N(0, 1)"""
    classes: int
    """number of classes; a conditional generator takes `condition` (n) in `sample` and `decode`"""

    def decode(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return samples (n, *features) for latent vectors (n, *latent_shape)."""

    def encode(self, x: Tensor) -> Tensor:
        """Return latent vectors (n, *latent_shape) for examples (n, *features)."""

    def discriminate(self, x: Tensor) -> Tensor:
        """Return the scores (n) of the discriminator: the higher, the more like a real example."""

    def denoising_loss(self, x: Tensor, t: float, noise: Tensor) -> Tensor:
        """Return the loss (n) of the prediction of standard normal `noise` (n, *features) in examples `x` at time `t`
        of the diffusion, from 0 (no noise) to 1 (only noise).
        """

    def denoised(self, noise: Tensor) -> Tensor:
        """Return the samples (n, *features) into which the diffusion turns `noise` (n, *features) of time 1."""

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the logarithm of the density (n), or a lower bound on it."""


@dataclass(frozen=True)
class OpenedGenerator:
    """A generator with what identifies it."""

    name: str
    digest: str
    """SHA-256 in hex of the file of its function, and of the object"""
    generator: Generator

    def lacks(self, *names: str) -> str:
        """Return the first of `Abilities` that the generator lacks, as in `decode(z)`; empty for none."""
        for name in names:
            found = getattr(self.generator, name, None)
            if found is None:
                return _SHOWN.get(name, name)
        return ""

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of the latent vector of one sample. Raises `AttributeError` if the generator does not state it."""
        return tuple(int(size) for size in self.generator.latent_shape)  # type: ignore[attr-defined]

    @property
    def classes(self) -> int | None:
        """Number of classes of a conditional generator, else None."""
        found = getattr(self.generator, "classes", None)
        return None if found is None else int(found)

    @property
    def device(self) -> torch.device:
        """Device of the parameters of the generator, or of a module that is an attribute of it; without any, the
        CPU.
        """
        for found in (self.generator, *getattr(self.generator, "__dict__", {}).values()):
            if (
                isinstance(found, torch.nn.Module)
                and (parameter := next(found.parameters(), None)) is not None
            ):
                return parameter.device
        return torch.device("cpu")

    def call(self, name: str, *arguments: Any) -> Tensor:
        """Return what a method of `Abilities` returns for tensors, with gradients where these are enabled. Raises
        `TargetError` if it raises an exception, or returns something else than finite numbers for each example.
        """
        try:
            found = getattr(self.generator, name)(*arguments)
        except (Exception, SystemExit) as error:  # the user's code may raise anything; its message is shown
            raise TargetError(f"{_SHOWN[name]} of {self.name} raised {error_text(error, [])}") from error
        n = len(arguments[0])
        if not isinstance(found, Tensor) or found.shape[:1] != (n,):
            shown = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else kind_of(found)
            raise TargetError(
                f"{_SHOWN[name]} of {self.name} returned {shown} for {n} rows; expected a tensor with {n} rows"
            )
        if not bool(found.detach().isfinite().all()):
            raise TargetError(f"{_SHOWN[name]} of {self.name} returned NaN or infinity")
        return found

    def samples(self, n: int, seed: int, condition: int | None = None) -> Tensor:
        """Return `n` samples as a tensor of floats (n, *features), of one class if `condition` is given. They are
        requested in pieces, each with a seed of its own. Raises `TargetError` if the generator raises an exception, or
        returns another number of samples or NaN.
        """
        rng, starts = Draws(seed).at("samples"), range(0, n, _PIECE)
        pieces = [self._piece(min(_PIECE, n - start), rng.at(start).seed, condition) for start in starts]
        shapes = {tuple(piece.shape[1:]) for piece in pieces}
        if len(shapes) > 1:
            raise TargetError(f"{self.name} returns samples of several shapes: {sorted(shapes)}")
        return torch.cat(pieces)

    def _piece(self, n: int, seed: int, condition: int | None = None) -> Tensor:
        # a generator without classes takes no condition
        given = {} if condition is None else {"condition": torch.full((n,), condition, device=self.device)}
        try:
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(seed)
                drawn = self.generator.sample(n, seed, **given)
                samples = (
                    drawn.detach().cpu() if isinstance(drawn, Tensor) else torch.from_numpy(np.asarray(drawn))
                )
        except HoldfastError:
            raise
        except (Exception, SystemExit) as error:  # the user's code may raise anything; its message is shown
            raise TargetError(f"sample({n}, {seed}) of {self.name} raised {error_text(error, [])}") from error
        if samples.dim() < 2 or len(samples) != n:
            raise TargetError(
                f"sample({n}, {seed}) of {self.name} returned shape {tuple(samples.shape)}; expected {n} samples, "
                f"({n}, *features)"
            )
        if samples.dtype == torch.uint8:  # as the pixels of files
            samples = samples.float() / 255
        samples = samples if samples.dtype == torch.float64 else samples.float()
        if not bool(samples.isfinite().all()):
            bad = int((~samples.isfinite()).flatten(1).any(1).sum())
            raise TargetError(
                f"{bad} of {n} samples of {self.name} contain NaN or infinity; look for a division or a logarithm of "
                "zero in it"
            )
        return samples

    def notes(self, seed: int) -> tuple[str, ...]:
        """Return notes for the report: whether the generator ignores its seed, or is not determined by it."""
        rng = Draws(seed).at("tested")
        first, again, other = (self._piece(_TESTED, rng.at(place).seed) for place in (0, 0, 1))
        if not torch.equal(first, again):
            return (
                f"{self.name} is not determined by its seed, so that the audit cannot be repeated exactly",
            )
        if torch.equal(first, other):
            return (f"{self.name} ignores its seed: two seeds gave the same samples",)
        return ()


def open_generator(source: object) -> OpenedGenerator:
    """Return the generator that the function at an address `file.py:name` returns, or one that is given as an object.

    The file is imported. Raises `UsageError` for anything else.
    """
    if isinstance(source, str):
        function = function_from_file(source)
        name, identity = function_name(function), function_digest(function)
        try:
            generator = function()
        except (Exception, SystemExit) as error:  # the user's code may raise anything; its message is shown
            raise TargetError(f"{name} raised {error_text(error, [])}") from error
    else:
        generator, name = source, f"{type(source).__module__}.{type(source).__qualname__}"
        identity = ""
    if isinstance(generator, type) or not isinstance(generator, Generator):
        raise UsageError(
            f"{name} {'returned' if isinstance(source, str) else 'is'} {kind_of(generator)}; expected a generator, an "
            "object with a method sample(n, seed), or a file of samples"
        )
    # of the object too, because the function may load weights
    content = digest(canonical([identity, digest_of_object(generator.sample)]))
    return OpenedGenerator(name, content, generator)
