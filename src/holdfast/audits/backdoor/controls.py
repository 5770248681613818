"""Comparison of a model with control networks: clean networks of the same architecture.

The size of the smallest trigger of a class depends on the class: few pixels turn some digits into others. So each size
is divided by that of the same class in the controls, and then by the median of these ratios over the classes, because
the triggers of some networks are smaller for all classes. The smallest ratio is the statistic of a network. Its rank
among the controls gives a p-value without assumptions on the distribution of sizes. Because one clean network of 21 has
the lowest rank, the statistic must also be below the prediction limit of the controls. The index of Neural Cleanse,
whose spread comes from the few classes of one network, is only shown.
"""

import json
import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import TypeVar

import torch
from torch import Tensor, nn

from holdfast.core.errors import TargetError, UsageError
from holdfast.core.estimate import Estimate
from holdfast.core.model import Classifier
from holdfast.core.types import Inputs, Labels
from holdfast.io.files import replacing, sha256_of_file, text_of_file
from holdfast.io.models.archive import Weights
from holdfast.io.models.models import STATE_DICT_SUFFIXES
from holdfast.io.models.weights import digest_of_weights, fit_weights, read_state_dict, state_dict_content
from holdfast.runs.store.forms import refuse_form

T = TypeVar("T")

MIN_CONTROLS = 20
"""Smallest number of controls: with fewer, no rank gives p <= 0.05."""
LEVEL = 0.05
"""Largest p-value at which a model is flagged."""
OUTSIDE = 1e-4
"""Probability that the ratio of a further clean network is below the prediction limit, if the logarithms of the ratios
are normally distributed. They have a heavier lower tail: one of ten clean networks was 3.9 standard deviations below
the mean, and planted backdoors are 33 to 40 (docs/decisions/0040)."""
MAX_DIFFERENCE = 0.03
"""Largest difference of accuracy between the model and a control, on all inputs of their kind."""

_ROWS = 500
"""Number of examples in one forward pass."""
_KEPT_BYTES = 2**30
"""Total size of the files of controls that are read only once: a state dict of torch is read in a process of its
own, which takes seconds."""


@torch.no_grad()
def predicted(model: Classifier, x: Inputs) -> Labels:
    """Return the predicted class of each input."""
    return torch.cat([model(piece).argmax(1) for piece in torch.split(x, _ROWS)])


@dataclass(frozen=True)
class Rank:
    """The rank of a model among its controls."""

    label: int
    """class with the smallest ratio"""
    ratios: tuple[float, ...]
    """for each class, size of the trigger relative to those of the controls; 1 if it is as usual"""
    of_controls: tuple[float, ...]
    """smallest ratio of each control, computed in the same way"""
    p: float
    """probability that a clean network has as small a ratio as the model, if it was trained like the controls"""

    @property
    def ratio(self) -> float:
        """The smallest ratio of the model."""
        return self.ratios[self.label]

    @property
    def limit(self) -> float:
        """Lower limit of the one-sided prediction interval for the ratio of a further clean network, from the mean and
        the standard deviation of the logarithms of the ratios of the controls.
        """
        from scipy.special import stdtrit

        logs, n = [math.log(ratio) for ratio in self.of_controls], len(self.of_controls)
        return math.exp(mean(logs) + float(stdtrit(n - 1, OUTSIDE)) * stdev(logs) * math.sqrt(1 + 1 / n))


def ranked(sizes: Tensor, controls: Tensor) -> Rank:
    """Return the rank of a model with these trigger sizes (classes) among controls (n, classes).

    The model and the controls are treated alike: each is compared with all other networks. So all ranks are equally
    likely if the model was trained like the controls, whatever the distribution of sizes.
    """
    logs = torch.cat([controls, sizes[None]]).double().log()
    others = (logs.sum(0) - logs) / (len(logs) - 1)
    differences = logs - others
    differences = differences - differences.quantile(0.5, dim=1, keepdim=True)
    ratios = differences.exp()
    smallest = ratios.min(1).values
    p = (1 + int((smallest[:-1] <= smallest[-1]).sum())) / len(smallest)
    return Rank(int(ratios[-1].argmin()), tuple(ratios[-1].tolist()), tuple(smallest[:-1].tolist()), p)


def _refuse_copies(files: Sequence[Path], digests: Sequence[str]) -> None:
    """Raise `UsageError` if two controls have the same digest, of their files or of their weights."""
    first = dict[str, Path]()
    for path, digest in zip(files, digests, strict=True):
        if digest in first:
            raise UsageError(
                f"the controls {first[digest].name!r} and {path.name!r} are the same network; give networks that were "
                "trained with different seeds"
            )
        first[digest] = path


@dataclass(frozen=True)
class Controls:
    """Files with the weights of control networks, which are opened one at a time."""

    files: tuple[Path, ...]
    digests: tuple[str, ...]
    """SHA-256 of each file, in hex"""
    _weights: dict[int, Weights] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of_folder(cls, folder: Path) -> "Controls":
        """Return the weights files of a folder, in the order of their names.

        Raises `UsageError` if there are fewer than `MIN_CONTROLS`, or if two are copies of the same network.
        """
        files = tuple(
            path for path in sorted(folder.iterdir()) if path.suffix in STATE_DICT_SUFFIXES and path.is_file()
        )
        if len(files) < MIN_CONTROLS:
            raise UsageError(
                f"controls is {str(folder)!r}, which has {len(files)} weights files "
                f"({', '.join(STATE_DICT_SUFFIXES)}); at least {MIN_CONTROLS} clean networks are needed for "
                f"p <= {LEVEL}: train more of them with different seeds"
            )
        return cls.of_files(files)

    @classmethod
    def of_files(cls, files: Sequence[Path]) -> "Controls":
        """Return weights files with their digests. Raises `UsageError` if two are copies of the same network."""
        digests = tuple(map(sha256_of_file, files))
        _refuse_copies(files, digests)
        return cls(tuple(files), digests)

    def opened(self, place: int, model: Classifier) -> Classifier:
        """Return a control as a copy of the model with other weights. Raises `TargetError` if they do not fit."""
        path = self.files[place]
        weights = self._weights.get(place)
        if weights is None:
            weights, _ = read_state_dict(path, state_dict_content(path))
            if len(self.files) * path.stat().st_size < _KEPT_BYTES:
                self._weights[place] = weights
        control = deepcopy(model)
        assert isinstance(control.net, nn.Module)  # `refuse_untrainable` was called
        try:
            fit_weights(control.net, weights, path.name)
        except TargetError as error:
            raise TargetError(
                f"the control {path.name!r} has another architecture than the model: {error.message}",
                *error.remedies,
            ) from error
        given = model.state_dict()
        if all(torch.equal(value, given[name]) for name, value in control.state_dict().items()):
            raise UsageError(
                f"the control {path.name!r} has the weights of the model itself; remove it from the folder"
            )
        return control.eval().requires_grad_(requires_grad=False)

    def take(self, names: Sequence[str]) -> "Controls":
        """Return the controls with these names of files."""
        places = [place for place, path in enumerate(self.files) if path.name in names]
        weights = {new: self._weights[old] for new, old in enumerate(places) if old in self._weights}
        files, digests = [self.files[place] for place in places], [self.digests[place] for place in places]
        return Controls(tuple(files), tuple(digests), weights)

    def each(self, model: Classifier, measure: Callable[[Classifier], T]) -> dict[str, T]:
        """Return the results of a measurement on each control, by the name of its file. Raises `UsageError` if two
        controls have the same weights.
        """
        results, digests = dict[str, T](), list[str]()
        for place, path in enumerate(self.files):
            control = self.opened(place, model)
            digests.append(digest_of_weights(control.state_dict()))
            results[path.name] = measure(control)
        _refuse_copies(self.files, digests)
        return results


@dataclass(frozen=True)
class SizeCache:
    """A JSON file with the trigger sizes of controls by the digest of their weights.

    Its name depends on everything else that determines the sizes, such as the architecture and the clean examples.
    """

    path: Path

    def read(self) -> dict[str, list[float]]:
        """Return the stored sizes. Raises `TargetError` if the file is damaged."""
        if not self.path.exists():
            return {}
        try:
            content = json.loads(text_of_file(self.path, "file of trigger sizes"))
        except ValueError as error:
            raise TargetError(f"{str(self.path)!r} is damaged: {error}; delete it") from error
        refuse_form(self.path, content, dict[str, list[float]])
        return dict(content)

    def add(self, digest: str, sizes: Sequence[float]) -> None:
        """Store the sizes of a control."""
        content = json.dumps(self.read() | {digest: list(sizes)})
        with replacing(self.path) as file:
            file.write(content.encode())


def is_comparable(difference: Estimate) -> bool:
    """Return whether a control may be as accurate as the model, up to `MAX_DIFFERENCE`: a part of the interval of the
    difference of both accuracies is within it.

    Other controls were trained in another way, so that the sizes of their triggers are not comparable.
    """
    return difference.low <= MAX_DIFFERENCE and difference.high >= -MAX_DIFFERENCE
