"""The guard of the Python interface: `holdfast.Guard`."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from holdfast.core.batch import Data
from holdfast.core.chain import digest
from holdfast.core.errors import UsageError
from holdfast.core.estimate import Estimate
from holdfast.guard.calibration import (
    Calibration,
    calibrated,
    refuse_other_inputs,
    refuse_too_few,
    write_calibration,
)
from holdfast.guard.detectors.outputs import Fitted, Observation, features_of
from holdfast.guard.guard import GuardPipeline
from holdfast.guard.rules import QUERIES, Action, Incoming, RequestDecision, RequestGuard
from holdfast.guard.stored_inputs import StoredInputs
from holdfast.io.data.arrays import selected_rows
from holdfast.io.data.data import Selection
from holdfast.io.models.models import ROTATING
from holdfast.runs.assess.preparation import readied
from holdfast.runs.assess.request import DescribedModel
from holdfast.runs.harness.target import PreparedModel
from holdfast.settings.guard_settings import (
    GuardSettings,
    check_guard_settings,
    detectors_of,
    read_guard_settings,
)
from holdfast.verbs.opening.arguments import DataLike, ModelLike, beside, gradients
from holdfast.verbs.opening.declared import expected, notes_of, opening_of_symbols, range_of_all
from holdfast.verbs.opening.guard import (
    Coverage,
    GuardNote,
    bounds_of,
    calibration_path,
    coverage,
    fits_radius,
    guard_digest,
    guard_notes,
    guard_to_calibrate,
    input_storage,
    ready_guard,
    schema_of,
    served_digest,
    stored_calibration,
)
from holdfast.verbs.opening.plans import device_of
from holdfast.verbs.opening.resolve import open_beside, open_examples, open_subject
from holdfast.verbs.settings import Calibrate, Doctor

_log = logging.getLogger("holdfast.server")
_BATCH = 256
"""inputs of one forward pass of a calibration"""
_FITTED_SHARE = 5
"""one of so many examples is used for the fit of detectors if no others are given"""


@dataclass(frozen=True)
class Guard(RequestGuard):
    """A guard with its settings: decides about the requests to a model before and after the model is called.

    `decision = guard.before(x, principal=key)`, then, if `decision.answered`, `outputs = model(decision.x)` and
    `decision = guard.after(decision, outputs)`. `decision.action` and `decision.actions` state what to do with the
    request and with each of its inputs. Scores must not be returned to clients.
    """

    settings: GuardSettings
    pipeline: GuardPipeline
    path: Path | None = None
    """file with the settings"""
    calibration: Calibration | None = None
    """the calibration of the thresholds; None before"""

    @classmethod
    def from_yaml(
        cls, path: str | Path, model: ModelLike | None = None, *, model_name: str | None = None
    ) -> "Guard":
        """Return the guard that a guard.yaml describes, with its calibration if there is one.

        With `model`, the calibration is compared with it, and with `model_name` with the name that `calibrate_on` was
        given. Give the model as it was given to the calibration, such as `"net.py:make"`: a file and the network that
        was loaded from it have different digests. Raises `UsageError` for invalid settings, and for a calibration
        with other settings or another model. A rule only reports if neither a calibration nor the settings give its
        threshold, or the radius of the query detector; `notes` states this, and the logger `holdfast.server` warns.
        """
        settings = read_guard_settings(Path(path))
        known = None if model_name is None else _digest_of_name(model_name)
        if model is not None:
            opening = _opening(settings, Calibrate(model=model, **_range(settings, model)))
            known = served_digest(open_subject(opening))
        calibration = stored_calibration(settings, Path(path), known)
        return cls(
            settings, ready_guard(settings, Path(path), calibration), Path(path), calibration
        )._logged()

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> "Guard":
        """Return the guard that the keys of a guard.yaml describe, given as a dictionary. The state of its query
        detector is in the memory of this process.

        Rules without a threshold only report until `calibrate` was called, as with `from_yaml`.
        """
        checked = check_guard_settings(settings, "Guard.from_settings()")
        return cls(checked, ready_guard(checked, None, None))._logged()

    def before_many(self, requests: Sequence[Incoming]) -> list[RequestDecision]:
        """Return the decisions about several requests before the model is called."""
        return self.pipeline.before_many(requests)

    def after_many(
        self,
        decisions: Sequence[RequestDecision],
        outputs: Sequence[Tensor | None],
        features: Sequence[Tensor | None] | None = None,
        *,
        network: Callable[[Tensor], Tensor] | None = None,
    ) -> list[RequestDecision]:
        """Return the final decisions about several requests, given the outputs of the model for each."""
        return self.pipeline.after_many(decisions, outputs, features, network=network)

    @property
    def actions(self) -> frozenset[Action]:
        """Actions of the rules in mode `enforce`."""
        return self.pipeline.actions

    @property
    def notes(self) -> tuple[GuardNote, ...]:
        """Notes about rules that only report, about false-positive rates of given thresholds, and about what the radius
        of the query detector covers.
        """
        return guard_notes(self.settings, self.calibration)

    @property
    def stored_inputs(self) -> StoredInputs | None:
        """The encrypted inputs on which a rule fired, with functions to read and to delete them; None if no inputs are
        stored.
        """
        return input_storage(self.settings, self.path)

    def observed_rate(self) -> Estimate | None:
        """Return the share of inputs on which a calibrated rule fired, with an interval that is valid at all times, or
        None before the first input.
        """
        return self.pipeline.observed.estimate()

    def calibrate(
        self,
        model: ModelLike,
        data: DataLike,
        *,
        false_positives: float | None = None,
        fit: DataLike | None = None,
        seed: int = 0,
    ) -> "Guard":
        """Return the guard with thresholds at which its rules together fire on at most the share `false_positives` of
        inputs like those of `data`, and write them to the file of the calibration if the guard was read from a file.

        `data` are benign inputs as clients send them, which were not used to train the model. `false_positives` is
        that of the settings by default. Detectors that need a fit are fitted on `fit`, or on a random fifth of `data`,
        which is then not used for thresholds. Raises `UsageError` for fewer than 1 / `false_positives` - 1 inputs.
        """
        settings = Calibrate(model=model, data=data, fit=fit, seed=seed, **_range(self.settings, model))
        calibration, notes = _calibrate(self.settings, self.path, settings, self._rate(false_positives))
        for note in notes:
            _log.info("%s", note)
        return self._with(calibration)

    def calibrate_on(
        self,
        stream: Iterable[tuple[Tensor, Tensor]],
        model_name: str,
        *,
        false_positives: float | None = None,
        network: Callable[[Tensor], Tensor] | None = None,
    ) -> "Guard":
        """Return the guard calibrated like `calibrate`, from inputs and outputs of an application whose model is not
        opened here.

        `stream` yields pairs of benign inputs (n, *shape) as clients send them and outputs (n, classes) of the model,
        in the order of the requests. `model_name` identifies the model and its version for `from_yaml`. Detectors that
        need a fit are refused, but for the radius of the query detector: it is fitted on a random fifth of the inputs,
        which is then not used for thresholds, and all pairs are kept in memory for this. With a `defence`, outputs must
        be those for the inputs after it.
        """
        rate, pairs, fitting = self._rate(false_positives), stream, None
        if fits_radius(self.settings):
            pairs, fitting = _divided_pairs(self.settings, list(stream))
        fresh, radius = guard_to_calibrate(self.settings, self.path, fitting, rate)

        def observed() -> Iterator[tuple[Tensor, Observation]]:
            for x, outputs in pairs:
                defended = x if fresh.defence is None else fresh.defence(x)
                yield x, fresh.observation(defended, outputs, network=network)

        fitted_on = 0 if fitting is None else len(fitting)
        _, calibration = calibrated(fresh, observed(), rate, fitted_on=fitted_on)
        named = replace(calibration, guard=guard_digest(self.settings), models=(_digest_of_name(model_name),))
        return self._with(_with_radius(named, radius))

    def _rate(self, given: float | None) -> float:
        rate = self.settings.false_positives if given is None else given
        if not 0 < rate < 1:
            raise UsageError(f"false_positives is {rate!r}; expected a share between 0 and 1, as in 0.001")
        return rate

    def _with(self, calibration: Calibration) -> "Guard":
        """The guard with a calibration, which is written if the guard was read from a file."""
        if self.path is not None:
            write_calibration(calibration, calibration_path(self.settings, self.path))
        pipeline = ready_guard(self.settings, self.path, calibration)
        return replace(self, pipeline=pipeline, calibration=calibration)._logged()

    def _logged(self) -> "Guard":
        """Write the notes about the guard to the log, and return the guard."""
        for note in self.notes:
            _log.log(logging.WARNING if note.warns else logging.INFO, "%s", note)
        return self


def _range(guard: GuardSettings, model: object) -> dict[str, Any]:
    """Return the range in which the model and the data are read: that of the guard, unless a pool determines it. Files
    and texts have none.
    """
    is_pool = isinstance(model, str) and model.startswith(ROTATING)
    return {} if is_pool or guard.inputs.kind != "numbers" else {"bounds": bounds_of(guard).bounds}


def _opening(guard: GuardSettings, settings: Calibrate) -> Calibrate | Doctor:
    """Return the settings with which the model and the data of a guard are opened."""
    kind = guard.inputs.kind
    return settings if kind == "numbers" else opening_of_symbols(kind, settings)


def _digest_of_name(name: str) -> str:
    return digest(f"model name {name}".encode())


@dataclass(frozen=True)
class Calibrated:
    """The calibration of the guard in a file."""

    calibration: Calibration
    path: Path
    """file to which the calibration was written"""
    coverage: Coverage | None
    """what the radius of the query detector covers; None if there is none"""
    notes: tuple[str, ...] = ()
    """notes on the data"""


@gradients()
def calibrate_file(settings: Calibrate) -> Calibrated:
    """Calibrate the guard in a file, write the calibration beside it, and return it."""
    path = Path(settings.guard or "guard.yaml")
    guard = read_guard_settings(path)
    range_of_all(settings, "a guard")
    if "bounds" not in settings.model_fields_set:
        settings = settings.model_copy(update=_range(guard, settings.model))
    rate = guard.false_positives if settings.false_positives is None else settings.false_positives
    (calibration, notes), place = _calibrate(guard, path, settings, rate), calibration_path(guard, path)
    write_calibration(calibration, place)
    return Calibrated(calibration, place, coverage(guard, calibration), notes)


def _calibrate(
    guard: GuardSettings, path: Path | None, settings: Calibrate, rate: float
) -> tuple[Calibration, tuple[str, ...]]:
    """Open the model and the data, and calibrate the guard. Return notes on the data as well."""
    # the guard is calibrated on the model alone
    opening = _opening(guard, settings.model_copy(update={"guard": None}))
    subject = open_subject(opening)
    examples = open_examples(opening, subject.model)
    others = None
    if settings.fit is not None:
        source = beside(opening, settings.fit)
        properties = expected(opening, subject.model, source, first=examples)
        others = open_beside(opening, source, properties)
    device = torch.device(device_of(settings.device))
    calibration = _calibration(guard, path, subject, examples, others, rate, settings.seed, device)
    return calibration, notes_of(examples, others)


def _calibration(
    settings: GuardSettings,
    path: Path | None,
    subject: DescribedModel,
    examples: Data,
    fit: Data | None,
    rate: float,
    seed: int,
    device: torch.device,
) -> Calibration:
    """The calibration of a guard for a model on benign examples. Detectors are fitted on `fit`, or on some of them."""
    if subject.model.rejects:
        raise UsageError(
            "the model has a detector of its own already; calibrate the guard with the network inside"
        )
    if fit is None:
        examples, fit = _divided(settings, examples, seed)
    fitting = None if fit is None else fit.read(0, len(fit))
    fresh, radius = guard_to_calibrate(settings, path, None if fitting is None else fitting.x, rate)
    fitted_on = 0 if fitting is None else len(fitting.x)
    refuse_too_few(len(examples), rate, len(fresh.calibrated), fitted_on)  # before the model is run
    with readied(subject, examples, device) as (target, _), _features(settings, target) as features:

        def network(x: Tensor) -> Tensor:
            return target.logits(x.to(device)).cpu()  # detectors and thresholds are computed on the CPU

        observed = None if fitting is None else _observe(fresh, network, fitting.x, features)[1]
        stream = calibration_stream(fresh, network, examples, features)
        labels = None if fitting is None else fitting.y
        _, calibration = calibrated(fresh, stream, rate, observed, labels, fitted_on=fitted_on)
    named = replace(
        calibration, guard=guard_digest(settings), models=(served_digest(subject),), data=examples.digest
    )
    return _with_radius(named, radius)


def _with_radius(calibration: Calibration, radius: float | None) -> Calibration:
    """The calibration with the fitted radius of the query detector, if there is one."""
    if radius is None:
        return calibration
    return replace(calibration, parameters={**calibration.parameters, QUERIES: {"radius": radius}})


def _divided(settings: GuardSettings, data: Data, seed: int) -> tuple[Data, Data | None]:
    """The examples for the thresholds, and those for the fit of detectors, or None if there is nothing to fit."""
    fitted = any(isinstance(detector, Fitted) for detector in detectors_of(settings).values())
    if not fitted and not fits_radius(settings):
        return data, None
    rows = _fitted_rows(len(data), seed, data.name)
    chosen = set(rows)
    others = tuple(k for k in range(len(data)) if k not in chosen)
    return Selection(data, others), Selection(data, tuple(rows))


def _fitted_rows(n: int, seed: int, name: str) -> list[int]:
    """The rows, of `n` calibration inputs, on which detectors are fitted."""
    if n < _FITTED_SHARE:
        raise UsageError(f"{n} calibration inputs are too few to fit a detector on some of them; give more")
    rows: list[int] = selected_rows(n, n=None, sample=n // _FITTED_SHARE, seed=seed, name=name).tolist()
    return rows


def _divided_pairs(
    settings: GuardSettings, pairs: Sequence[tuple[Tensor, Tensor]]
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """The pairs of inputs and outputs for the thresholds, and the inputs for the radius of the query detector."""
    schema = schema_of(settings)
    for x, outputs in pairs:
        refuse_other_inputs(schema, x)
        if len(x) != len(outputs):
            raise UsageError(f"{len(x)} inputs have {len(outputs)} outputs; give one row for each")
    fitted = torch.zeros(sum(len(x) for x, _ in pairs), dtype=torch.bool)
    fitted[_fitted_rows(len(fitted), 0, "the stream")] = True
    masks = torch.split(fitted, [len(x) for x, _ in pairs])
    fitting = torch.cat([x[mask] for (x, _), mask in zip(pairs, masks, strict=True)])
    kept = [(x[~mask], outputs[~mask]) for (x, outputs), mask in zip(pairs, masks, strict=True)]
    return [pair for pair in kept if len(pair[0])], fitting


def calibration_stream(
    pipeline: GuardPipeline,
    network: Callable[[Tensor], Tensor],
    data: Data,
    features: Callable[[], Tensor] | None = None,
) -> Iterator[tuple[Tensor, Observation]]:
    """Yield batches of examples as clients send them, each with what the stateless detectors of a guard observe.
    `network` returns the logits of inputs on the CPU.
    """
    for start in range(0, len(data), _BATCH):
        x = data.read(start, min(start + _BATCH, len(data))).x
        yield _observe(pipeline, network, x, features)


def _observe(
    pipeline: GuardPipeline,
    network: Callable[[Tensor], Tensor],
    x: Tensor,
    features: Callable[[], Tensor] | None,
) -> tuple[Tensor, Observation]:
    """Inputs as clients send them, and what the stateless detectors observe."""
    defended = x if pipeline.defence is None else pipeline.defence(x)
    logits = torch.cat([network(part) for part in torch.split(defended, _BATCH)])
    return x, Observation(defended, logits, None if features is None else features().cpu(), network)


def _features(
    settings: GuardSettings, target: PreparedModel
) -> AbstractContextManager[Callable[[], Tensor] | None]:
    """The features of the layer that a detector needs; None if no detector needs features."""
    for name, detector in detectors_of(settings).items():
        if "features" in detector.needs:
            layer = settings.rules.detectors[name].model_dump()["layer"]
            if layer is None:
                raise UsageError(
                    f"rules.{name} has on: features and no layer, so that it cannot be calibrated; name one, as in "
                    "layer: layer4"
                )
            return features_of(target.original.net, layer)
    return nullcontext()
