"""The stateless detectors and their interface: the Mahalanobis distance to the nearest class mean, energy of the
logits, stability under noise, and feature squeezing.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Annotated, ClassVar, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from annotated_types import Le
from torch import Tensor, nn

from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.types import Count, Fraction, Inputs, Labels, Logits, PerExample, Positive, Steps
from holdfast.guard.detectors.fingerprints import grid_of
from holdfast.guard.rules import median_filtered, with_bits

Need = Literal["network", "features", "fit"]
"""what a detector needs besides inputs and logits: calls of the network, features, or parameters that are fitted"""


@dataclass(frozen=True)
class Observation:
    """Inputs of a classifier with its outputs, as detectors receive them."""

    x: Inputs
    """inputs (n, *features) of the network"""
    logits: Logits
    """outputs of the network (n, classes); log probabilities are logits too"""
    features: Tensor | None = None
    """activations of an inner layer (n, d), for detectors that need them"""
    network: Callable[[Tensor], Tensor] | None = None
    """function from inputs to logits, for detectors that need further forward passes"""


class Detector(Protocol):
    """Protocol of a stateless detector: a frozen dataclass that maps inputs and outputs to one score for each input.

    Its fields are the settings of its rule in a guard.yaml, except those with the metadata `{"written": False}`: `low`
    and `high`, which the guard sets to the valid range of the inputs, and the parameters of a `Fitted` detector.
    """

    @property
    def needs(self) -> tuple[Need, ...]:
        """What the detector needs besides inputs and logits."""

    def __call__(self, seen: Observation) -> PerExample:
        """Return the scores (n,), larger for more suspicious inputs."""


@runtime_checkable
class Fitted(Protocol):
    """Protocol of a detector with parameters that are estimated from clean examples. They are float32 tensors in fields
    with the metadata `{"written": False}`, which a calibration stores.
    """

    @property
    def fitted(self) -> bool:
        """Whether the parameters have been estimated."""

    def fit(self, seen: Observation, y: Labels) -> "Fitted":
        """Return the detector with parameters that are estimated from clean examples with labels (n,)."""


_SHOWN = 12
"""number of names that a message lists"""


@contextmanager
def features_of(
    network: nn.Module | Callable[[Tensor], Tensor], layer: str
) -> Iterator[Callable[[], Tensor]]:
    """Context manager that yields a function which returns the outputs of a layer (n, d) in all calls of the network
    since its last call. Images of features are averaged over their pixels, as in the paper of the Mahalanobis detector.

    `layer` is the name of a module, as in `layer4` or `0.2`. Raises `UsageError` if the network has no such module.

    >>> net = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    >>> with features_of(net, "0") as taken:
    ...     _ = net(torch.zeros(4, 3))
    ...     taken().shape
    torch.Size([4, 5])
    """
    modules = dict(network.named_modules()) if isinstance(network, nn.Module) else {}
    if not layer or layer not in modules:
        names = [name for name in modules if name]
        known = ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
        raise UsageError(f"the network has no layer {layer!r}; it has {known or 'none, as it is a function'}")
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, output: object) -> None:
        if not isinstance(output, Tensor) or output.dim() < 2:
            raise UsageError(
                f"the layer {layer} returns {type(output).__name__}; name one that returns (n, d, …)"
            )
        outputs.append(output.flatten(2).mean(2) if output.dim() > 2 else output)

    def taken() -> Tensor:
        parts = torch.cat(outputs)
        outputs.clear()
        return parts

    hook = modules[layer].register_forward_hook(keep)
    try:
        yield taken
    finally:
        hook.remove()


def layer_before_last_linear(net: object) -> str | None:
    """Return the name of the layer without parts that precedes the last linear layer; None if there is none."""
    if not isinstance(net, nn.Module):
        return None
    leaves = [(name, module) for name, module in net.named_modules() if name and not list(module.children())]
    linear = [place for place, (_, module) in enumerate(leaves) if isinstance(module, nn.Linear)]
    return leaves[linear[-1] - 1][0] if linear and linear[-1] else None


class LastFeatures:
    """Function that returns the outputs of a layer (n, …) in the last call of a network by the same thread, which it
    forgets; None if there was none, if they are no tensor, or if there is no such layer. Copies of the network share
    it.
    """

    def __init__(self, network: object, layer: str | None) -> None:
        self._last = threading.local()
        modules = dict(network.named_modules()) if isinstance(network, nn.Module) else {}
        if layer is not None and layer in modules:
            modules[layer].register_forward_hook(self._keep)

    def __deepcopy__(self, memo: object) -> "LastFeatures":
        return self

    def _keep(self, module: nn.Module, inputs: object, output: object) -> None:
        self._last.output = output

    def __call__(self) -> Tensor | None:
        output, self._last.output = getattr(self._last, "output", None), None
        return output if isinstance(output, Tensor) and output.dim() > 1 else None


_CELLS = 200  # largest number of cells of an image, as in the query detector


@dataclass(frozen=True, eq=False)
class Mahalanobis:
    """The squared Mahalanobis distance of the logits or features of an input, or of the input itself, to the nearest
    class mean. It needs no further forward pass.
    """

    on: Literal["logits", "features", "inputs"] = "logits"
    """vectors whose distance is measured: the logits, the features that the application passes to the guard, or the
    inputs"""
    layer: str | None = None
    """module of the network whose output are the features, as in layer4; the guard computes them with it"""
    shrinkage: Fraction = 0.01
    """weight of the identity in the covariance"""
    means: Tensor | None = field(default=None, metadata={"written": False})
    """class means (classes, d), float32; None before the fit"""
    precision: Tensor | None = field(default=None, metadata={"written": False})
    """inverse of the covariance (d, d) that the classes share, float32"""

    @property
    def needs(self) -> tuple[Need, ...]:
        """What the detector needs besides inputs and logits."""
        return ("fit", "features") if self.on == "features" else ("fit",)

    @property
    def fitted(self) -> bool:
        """Whether the class means have been estimated."""
        return self.means is not None

    def fit(self, seen: Observation, y: Labels) -> "Mahalanobis":
        """Return the detector with class means and covariance estimated from clean examples.

        Classes without an example are left out. Raises `UsageError` if there are fewer than two examples.
        """
        z = self._vectors(seen).double()
        if len(z) < 2:
            raise UsageError(f"the Mahalanobis distance is fitted on {len(z)} examples; give at least 2")
        classes, codes = torch.unique(y, return_inverse=True)
        counts = torch.bincount(codes, minlength=len(classes))
        means = z.new_zeros(len(classes), z.shape[1]).index_add_(0, codes, z) / counts[:, None]
        centred = z - means[codes]
        covariance = centred.T @ centred / len(z)
        scale = float(covariance.diagonal().mean()) or 1.0
        shrunk = (1 - self.shrinkage) * covariance + self.shrinkage * scale * torch.eye(
            len(covariance)
        ).double()
        return replace(self, means=means.float(), precision=torch.linalg.pinv(shrunk, hermitian=True).float())

    def __call__(self, seen: Observation) -> PerExample:
        """Return the squared distances (n,)."""
        if self.means is None or self.precision is None:
            raise UsageError(
                "the Mahalanobis distance has no class means yet; run guard.calibrate(model, data)"
            )
        centre, projected, lengths = self._projected
        z = self._vectors(seen)
        z = z - centre.to(z)
        squares = ((z @ self.precision.to(z)) * z).sum(1, keepdim=True)
        return (squares - 2 * z @ projected.to(z).T + lengths.to(z)).amin(1)

    @cached_property
    def _projected(self) -> tuple[Tensor, Tensor, Tensor]:
        """The mean of the class means (d), their differences from it times the precision (classes, d), and the squared
        lengths (classes) of these differences, so that each input needs one product with the precision.
        """
        assert self.means is not None and self.precision is not None
        means, precision = self.means, self.precision
        centre = means.mean(0)
        projected = (means - centre) @ precision
        return centre, projected, (projected * (means - centre)).sum(1)

    def _vectors(self, seen: Observation) -> Tensor:
        if self.on == "logits":
            return seen.logits
        if self.on == "inputs":
            grid = grid_of(seen.x.shape[1:], _CELLS)
            x = seen.x.float()
            return (x if grid is None else F.adaptive_avg_pool2d(x, grid)).flatten(1)
        if seen.features is None:
            raise UsageError(
                "the Mahalanobis distance on features needs features; give them, as in "
                "guard.after(decision, outputs, features=z), or set on: logits"
            )
        return seen.features.flatten(1)


@dataclass(frozen=True)
class Energy:
    """The free energy `-T log(sum(exp(logits / T)))` of an input. It needs no further forward pass.

    Logits that are log probabilities have the energy 0 at temperature 1, so that nothing is detected.
    """

    temperature: Positive = 1.0
    """temperature T"""

    needs: ClassVar[tuple[Need, ...]] = ()

    def __call__(self, seen: Observation) -> torch.Tensor:
        """Return the energy (n,) of each input."""
        if self.temperature == 1:
            return -seen.logits.logsumexp(1)
        return -self.temperature * (seen.logits / self.temperature).logsumexp(1)


@dataclass(frozen=True)
class FeatureSqueezing:
    """The largest L1 distance between the probabilities for an input and for its squeezed versions, from 0 to 2. It
    costs one forward pass for each squeeze.
    """

    bits: Annotated[Count, Le(16)] = 5
    """number of bits of each value; 0 leaves this squeeze out. The paper uses 1 for MNIST and 4 or 5 for CIFAR-10"""
    median: Annotated[Count, Le(15)] = 2
    """side of the window of the median filter in pixels; 0 leaves this squeeze out, which inputs that are not images
    need"""
    low: float = field(default=0.0, metadata={"written": False})
    """lowest valid value of the inputs"""
    high: float = field(default=1.0, metadata={"written": False})
    """highest valid value of the inputs"""

    needs: ClassVar[tuple[Need, ...]] = ("network",)

    def __post_init__(self) -> None:
        if not self.bits and not self.median:
            raise UsageError("bits and median are both 0; feature squeezing needs at least one of them")

    def __call__(self, seen: Observation) -> PerExample:
        """Return the distances (n,)."""
        network = network_of(seen, "feature squeezing")
        return torch.stack([prediction_change(seen.logits, network(x)) for x in self._squeezed(seen.x)]).amax(
            0
        )

    def _squeezed(self, x: Tensor) -> Iterator[Tensor]:
        if self.bits:
            yield with_bits(x, self.bits, self.low, self.high)
        if self.median:
            yield median_filtered(x, self.median)


def prediction_change(
    logits: Logits, other: Logits, *, exact: float = 0.0, certain: float = 1.0
) -> PerExample:
    """Return the L1 distance (n,) between the probabilities of two outputs (n, classes), from 0 to 2.

    The gradient of the distance vanishes where both outputs are certain of different classes, so that attacks could not
    reduce it. The gradient of the result is therefore `exact` times that of the distance plus `certain` times that of
    the cross-entropies of both outputs with the class that `logits` predict.
    """
    distance = (other.softmax(1) - logits.softmax(1)).abs().sum(1)
    if not (logits.requires_grad or other.requires_grad):
        return distance
    predicted = logits.detach().argmax(1)
    uncertain = sum(F.cross_entropy(each, predicted, reduction="none") for each in (logits, other))
    slope = exact * distance + certain * uncertain
    return distance.detach() + (slope - slope.detach())


def network_of(seen: Observation, detector: str) -> Callable[[Tensor], Tensor]:
    """Return the network of an observation. Raises `UsageError` if there is none."""
    if seen.network is None:
        raise UsageError(
            f"{detector} calls the network on changed inputs, and no network was given; give it, as in "
            "guard.after(decision, outputs, network=net), or remove the rule"
        )
    return seen.network


@dataclass(frozen=True)
class NoiseStability:
    """The mean L1 distance between the probabilities for an input and for noisy versions of it, from 0 to 2. It costs
    `draws` forward passes.
    """

    sigma: Positive = 0.05
    """standard deviation of the Gaussian noise, in the units of the inputs"""
    draws: Steps = 4
    """number of noisy versions of each input"""
    seed: Count = 0
    """seed of the noise. An attacker that does not know it knows less about the detector"""

    needs: ClassVar[tuple[Need, ...]] = ("network",)

    def __call__(self, seen: Observation) -> PerExample:
        """Return the mean distances (n,)."""
        network = network_of(seen, "the stability under noise")
        noise = _noise(self.seed, self.draws, tuple(seen.x.shape[1:])).to(seen.x)
        # weights of the gradient at which attacks on the bundled model reached the lowest scores
        changes = [
            prediction_change(seen.logits, network(seen.x + self.sigma * each), exact=1.0, certain=0.1)
            for each in noise
        ]
        return torch.stack(changes).mean(0)


@lru_cache(maxsize=8)
def _noise(seed: int, draws: int, shape: tuple[int, ...]) -> Tensor:
    return Draws(seed).at("stability").normal(torch.arange(draws), *shape)
