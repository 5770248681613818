"""Comparison of a model with control networks: clean networks of the same architecture.

The size of the smallest trigger of a class depends on the class: few pixels turn some digits into others. So each size
is divided by that of the same class in the controls, and then by the median of these ratios over the classes, because
the triggers of some networks are smaller for all classes. The smallest ratio is the statistic of a network. Its rank
among the controls gives a p-value without assumptions on the distribution of sizes. The index of Neural Cleanse, whose
spread comes from the few classes of one network, is only shown.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Classifier
from holdfast.io.files import replacing, sha256_of_file, text_of_file
from holdfast.io.models.archive import Weights
from holdfast.io.models.models import STATE_DICT_SUFFIXES
from holdfast.io.models.weights import digest_of_weights, fit_weights, read_state_dict, state_dict_content
from holdfast.runs.store.forms import refuse_form

MIN_CONTROLS = 20
"""Smallest number of controls: with fewer, no rank gives p <= 0.05."""
LEVEL = 0.05
"""Largest p-value at which a model is flagged."""
MAX_DIFFERENCE = 0.03
"""Largest difference of accuracy between the model and a control."""

_KEPT_BYTES = 2**30
"""Total size of the files of controls that are read only once: a state dict of torch is read in a process of its
own, which takes seconds."""


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
        """Return the weights files of a folder, by their names.

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
        digests = tuple(map(sha256_of_file, files))
        _refuse_copies(files, digests)
        return cls(files, digests)

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

    def each(self, model: Classifier, measure: Callable[[Classifier], float]) -> dict[str, float]:
        """Return the results of a measurement on each control, by the name of its file. Raises `UsageError` if two
        controls have the same weights.
        """
        results, digests = dict[str, float](), list[str]()
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


def refuse_other_accuracy(model: float, controls: Mapping[str, float], n: int, *, trained: bool) -> None:
    """Raise `UsageError` if the accuracy of a control, by its name, is too far from that of the model, on `n` examples.

    Such networks were trained in another way, so that the sizes of their triggers are not comparable. `trained` states
    whether the audit trained the controls.
    """
    advice = "give controls that were trained like the model"
    if trained:
        advice = "give a longer train_controls or more data, or controls that were trained like the model"
    for name, accuracy in controls.items():
        if abs(accuracy - model) > MAX_DIFFERENCE + 1e-9:  # of rounding
            raise UsageError(
                f"the control {name!r} has an accuracy of {100 * accuracy:.1f} % on {n} clean examples, and the model "
                f"{100 * model:.1f} %; they may differ by at most {100 * MAX_DIFFERENCE:.0f} points: {advice}"
            )
