"""Networks that are composed of several: ensembles, mixes, and a denoiser in front of a classifier."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from itertools import product
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.core.errors import TargetError, UsageError
from holdfast.core.gradients import instead
from holdfast.core.model import Classifier
from holdfast.core.outputs import OutputKind, of_classes
from holdfast.core.types import Inputs, Labels, Logits
from holdfast.io.models.weights import digest_of_weights

WIDTH, DEPTH = 32, 4
"""default numbers of channels and of layers of a denoiser"""


class DenoisedNetwork(nn.Module):
    """Network that classifies the output of a denoiser. The classifier is not trained and stays in evaluation mode."""

    def __init__(
        self, classifier: nn.Module, channels: int, *, width: int = WIDTH, depth: int = DEPTH
    ) -> None:
        super().__init__()
        if depth < 2 or width < 1:
            raise UsageError(
                f"a denoiser of width {width} and depth {depth} was requested; the width must be at least 1 and the "
                "depth at least 2"
            )
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, 1, 1), nn.ReLU()]
        for _ in range(depth - 2):
            layers += [nn.Conv2d(width, width, 3, 1, 1), nn.ReLU()]
        last = nn.Conv2d(width, channels, 3, 1, 1)
        nn.init.zeros_(last.weight)
        assert last.bias is not None
        nn.init.zeros_(last.bias)
        self.residual = nn.Sequential(*layers, last)
        self.classifier = classifier.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "DenoisedNetwork":  # noqa: FBT001, FBT002  as in nn.Module
        """Set the mode of the denoiser; the classifier stays in evaluation mode."""
        super().train(mode)
        self.classifier.eval()
        return self

    def denoise(self, x: Inputs) -> Inputs:
        """Return the images without the noise that the denoiser finds in them."""
        clean: Inputs = x + self.residual(x)
        return clean

    def forward(self, x: Tensor) -> Logits:
        """Return the logits of the classifier for the denoised images (n, channels, height, width)."""
        logits: Logits = self.classifier(self.denoise(x))
        return logits

    @contextmanager
    def recorded(self) -> Iterator[list[Tensor]]:
        """Context manager that returns a list, to which each forward pass inside it appends its denoised images."""
        images: list[Tensor] = []
        hook = self.classifier.register_forward_pre_hook(lambda _, inputs: images.append(inputs[0]))
        try:
            yield images
        finally:
            hook.remove()


def with_denoiser(net: nn.Module, sizes: Mapping[str, int]) -> DenoisedNetwork:
    """Return a network with an untrained denoiser in front of it, with the `channels`, `width` and `depth` that are
    given.
    """
    denoised = DenoisedNetwork(net, sizes["channels"], width=sizes["width"], depth=sizes["depth"])
    like = next(net.parameters(), torch.zeros(()))
    return denoised.to(like.device, like.dtype) if like.is_floating_point() else denoised


Combination = Literal["votes", "mean", "logits"]
"""`votes`: each member votes for its most probable class; `mean`: the probabilities of the members are averaged;
`logits`: their logits are averaged"""
RULE = "blake2b of the input, modulo the number of members"
"""how the recipe `partitions` assigns a training example to a member; another rule needs another text"""
_STEP = 2.0**-20
"""relative difference between the shares of two neighbouring classes with equal votes"""


class Ensemble(nn.Module):
    """Network whose outputs are the vote shares, the mean probabilities, or the mean logits, of its members.

    Of classes with equally many votes, the smallest is predicted: the share of class c is reduced by a fraction of c ·
    2⁻²⁰. Votes have no gradient, unless `straight` is true: then the outputs are logits, the number of votes of a class
    plus its mean probability, which resolves ties, and their gradient is that of the mean log-probabilities, as of a
    straight-through estimator. `names` are those of the members in errors. `output` states what the members return, as
    for `Classifier`. An ensemble that the recipe `partitions` trained has `training_set`, the SHA-256 of its training
    set, which is zero before the training.
    """

    training_set: Tensor

    def __init__(
        self,
        members: Sequence[nn.Module],
        *,
        combine: Combination = "votes",
        output: OutputKind | None = None,
        partitioned: bool = False,
        straight: bool = False,
        names: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if not members or combine not in get_args(Combination):
            raise UsageError(
                f"an ensemble of {len(members)} members with combine={combine!r} was requested; at least one member "
                f"and one of {', '.join(get_args(Combination))} were expected"
            )
        self.members = nn.ModuleList(members)
        self.combine, self.output, self.partitioned = combine, output, partitioned
        self.straight, self.names = straight, tuple(names)
        if partitioned:
            self.register_buffer("training_set", torch.zeros(32, dtype=torch.uint8))

    def logits(self, x: Inputs) -> Tensor:
        """Return the logits of the members, (members, n, classes)."""
        return torch.stack(outputs_of(self.members, x, self.output, self.names))

    def votes(self, x: Inputs) -> Tensor:
        """Return how many members vote for each class, (n, classes) int64."""
        return self._ballots(self.logits(x))

    def _ballots(self, logits: Tensor) -> Tensor:
        ballots = torch.zeros(logits.shape[1:], dtype=torch.int64, device=logits.device)
        # argmax returns the first of equal values
        chosen = logits.argmax(2).T
        return ballots.scatter_add_(1, chosen, torch.ones_like(chosen))

    def forward(self, x: Inputs) -> Tensor:
        """Return the vote shares, the votes as logits, the mean probabilities or the mean logits (n, classes)."""
        if self.combine == "logits":
            # a sum, because operations along the dimension of the members have no sound bounds
            first, *others = outputs_of(self.members, x, self.output, self.names)
            return sum(others, first) / len(self.members)
        if self.combine == "mean":
            return self.logits(x).softmax(2).mean(0)
        if self.straight:
            logits = self.logits(x)
            value = self._ballots(logits) + logits.softmax(2).mean(0)
            return instead(value, logits.log_softmax(2).mean(0))
        votes = self.votes(x)
        classes = votes.shape[1]
        if classes * len(self.members) >= 1 / _STEP:
            raise TargetError(
                f"{len(self.members)} members vote for {classes} classes, and ties are resolved for at most "
                f"{round(1 / _STEP):,} members times classes; give fewer members, or combine='mean'"
            )
        shares = votes.to(x.dtype) / len(self.members)
        return shares * (1 - _STEP * torch.arange(classes, device=x.device, dtype=x.dtype))

    def declare(self, model: Classifier) -> None:
        """Declare what a classifier of this network returns: logits, or probabilities, of which votes have no
        gradient.
        """
        if self.combine == "logits" or self.straight:
            return
        model.output = "probability"
        if self.combine == "votes":
            model.access, model.hides = "scores", "the votes of an ensemble have no gradients"

    @property
    def is_trained(self) -> bool:
        """Whether the recipe `partitions` trained the members, and their votes are counted."""
        return self.partitioned and self.combine == "votes" and bool(self.training_set.any())

    def metadata(self) -> dict[str, Any]:
        """Return what a file with the weights states about the ensemble. For partitions these are the rule, and the
        digests of the training set and of each member, which `declared_ensemble` compares.
        """
        entries: dict[str, Any] = {
            "members": len(self.members),
            "combine": self.combine,
            "output": self.output,
        }
        if self.is_trained:
            entries["partitions"] = {
                "rule": RULE,
                "training_set": bytes(self.training_set.tolist()).hex(),
                "members": [digest_of_weights(member.state_dict()) for member in self.members],
            }
        return entries


def outputs_of(
    members: Iterable[nn.Module], x: Inputs, output: OutputKind | None = None, names: Sequence[str] = ()
) -> list[Tensor]:
    """Return the logits (n, classes) of each of several networks. `names` are their names in errors. Raises
    `TargetError` if a member does not accept the inputs, or if the numbers of classes differ.
    """
    logits: list[Tensor] = []
    for k, member in enumerate(members):
        name = names[k] if k < len(names) else f"{k + 1}"
        try:
            logits.append(of_classes(member(x), output))
        except TargetError as error:
            raise error.reworded(f"the member {name}: {error.message}") from error
        if logits[k].shape != logits[0].shape:
            first, own = (values.shape[1] for values in (logits[0], logits[k]))
            raise TargetError(
                f"the member {name} has {own} classes, and the first one has {first}; give members with the same "
                "classes"
            )
    return logits


def declared_ensemble(
    net: nn.Module, model: Classifier, metadata: Mapping[str, Any], source: str
) -> tuple[str, ...]:
    """Declare what a model returns whose network is an ensemble from a weights file. Return notes for the report.

    Raises `TargetError` if the members or the training set differ from those that the metadata of the file state.
    """
    assert isinstance(net, Ensemble)
    if metadata.get("partitions") != net.metadata().get("partitions"):
        raise TargetError(
            f"the members of {source} are not those that the recipe partitions trained: the file states other digests "
            "or another rule, so that nothing is certified about it; train the model again"
        )
    net.declare(model)
    trained = metadata.get("partitions")
    of = f", trained on parts of the training set {trained['training_set'][:12]}…" if trained else ""
    return (f"the model is an ensemble of {len(net.members)} members ({net.combine}){of}",)


def ensemble_of(net: nn.Module, metadata: Mapping[str, Any]) -> Ensemble:
    """Return the untrained ensemble that the metadata of a weights file describe, whose members are copies of a
    network.
    """
    return Ensemble(
        [deepcopy(net) for _ in range(metadata["members"])],
        combine=metadata["combine"],
        output=metadata.get("output"),
        partitioned="partitions" in metadata,
    )


_TINY = 1e-6  # keeps the gradient of a power finite at zero
_SCALES, _POWERS, _SHIFTS = (
    (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0),
    (1.0, 2.0, 3.0, 4.0),
    (-1.5, -1.0, -0.5, 0.0),
)


class Mixture(nn.Module):
    """Network that averages the probabilities of an accurate network and those of the transformed logits of a robust
    one. It returns the logarithm of the average.
    """

    def __init__(
        self,
        accurate: nn.Module,
        robust: nn.Module,
        *,
        weight: float = 0.8,
        scale: float = 0.5,
        power: float = 3.0,
        shift: float = 0.0,
        names: Sequence[str] = (),
    ) -> None:
        super().__init__()
        for name, value, valid, expected in (
            ("weight", weight, 0 < weight < 1, "a number between 0 and 1, the weight of the robust network"),
            ("scale", scale, 0 < scale < math.inf, "a positive number"),
            ("power", power, 1 <= power < math.inf, "a number of at least 1"),
            ("shift", shift, abs(shift) < math.inf, "a finite number"),
        ):
            if not valid:
                raise UsageError(f"{name} of the mix is {value}; expected {expected}")
        self.members = nn.ModuleList((accurate, robust))
        self.weight, self.scale, self.power, self.shift = weight, scale, power, shift
        self.names = tuple(names)

    @property
    def parameters_of_mix(self) -> dict[str, float]:
        """The parameters of the mix by name."""
        return {"weight": self.weight, "scale": self.scale, "power": self.power, "shift": self.shift}

    def forward(self, x: Inputs) -> Tensor:
        """Return the logarithms of the weighted mean of the class probabilities of both networks, (n, classes). The
        logits of the robust network are transformed first, as the settings of the mix state.

        Raises `TargetError` if a network does not accept the inputs, or for different or fewer than 3 classes.
        """
        accurate, robust = outputs_of(self.members, x, names=self.names)
        if robust.shape[1] < 3:
            raise TargetError(
                f"the members of the mix have {robust.shape[1]} classes; expected at least 3, because the layer norm "
                "of two logits contains no confidence; give an ensemble of both networks"
            )
        robust = transformed(robust, self.scale, self.power, self.shift)
        return torch.logaddexp(
            accurate.log_softmax(1) + math.log1p(-self.weight), robust.log_softmax(1) + math.log(self.weight)
        )


def transformed(logits: Logits, scale: float, power: float, shift: float) -> Logits:
    """Return the logits (n, classes) of a robust network after layer norm, shift, GELU, power and scale. The order of
    classes above the smallest value of the GELU does not change.
    """
    activated = F.gelu(F.layer_norm(logits, logits.shape[1:]) + shift)
    powered: Logits = scale * activated.sign() * (activated.abs() + _TINY) ** power
    return powered


def fitted(clean: Logits, attacked: Logits, y: Labels, *, kept: float = 0.985) -> dict[str, float]:
    """Return the parameters of a mix from the logits (n, classes) of the robust network on `clean` and on `attacked`
    inputs with the labels `y`, which are no test examples.

    Where the accurate network is sure of a wrong class, the mix still returns the class of the robust network if the
    margin of this class among the transformed probabilities is at least (1 - weight) / weight. For each transformation
    of a grid, the weight is such that this is true of the share `kept` of the attacked inputs that the robust network
    classifies correctly. Of these transformations, the one is returned for which it is true of the fewest clean inputs
    that the robust network classifies wrongly, where the accurate one shall decide. Raises `UsageError` if the robust
    network classifies all clean inputs correctly, or no attacked one.
    """
    chosen = clean.argmax(1)
    wrong, robust = chosen != y, attacked.argmax(1) == y
    if not wrong.any() or not robust.any():
        raise UsageError(
            f"the robust network classifies {int(robust.sum())} of {len(y)} attacked inputs correctly and "
            f"{int(wrong.sum())} clean ones wrongly; at least one of each was expected to fit a mix"
        )
    best, parameters = math.inf, dict[str, float]()
    for scale, power, shift in product(_SCALES, _POWERS, _SHIFTS):
        won, lost = (
            _margins(transformed(logits, scale, power, shift), classes)
            for logits, classes in ((attacked[robust], y[robust]), (clean[wrong], chosen[wrong]))
        )
        threshold = float(won.quantile(1 - kept))
        overruled = float((lost >= threshold).double().mean())
        if 0 < threshold < 1 and overruled < best:
            best = overruled
            parameters = {"weight": 1 / (1 + threshold), "scale": scale, "power": power, "shift": shift}
    if not parameters:
        raise UsageError(
            "no transformation of the robust network's logits has a margin between 0 and 1 on attacked inputs; give "
            "more attacked inputs, or a robust network with other logits"
        )
    return parameters


def _margins(logits: Logits, classes: Labels) -> Tensor:
    """Return the probability of the class of each example minus the largest one of another class. It is negative where
    a transformation has changed the order of the classes.
    """
    probabilities = logits.softmax(1)
    own = probabilities.gather(1, classes[:, None])
    others = probabilities.scatter(1, classes[:, None], -1.0).amax(1)
    difference: Tensor = own[:, 0] - others
    return difference
