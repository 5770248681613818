"""The guard of the Python interface: `holdfast.Guard`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from holdfast.config.guard_opening import (
    bounds_of,
    calibration_path,
    guard_digest,
    guard_pipeline,
    served_digest,
)
from holdfast.config.guard_settings import GuardSettings, check_guard_settings, read_guard_settings
from holdfast.config.references import DataLike, ModelLike, Sources, data_reference, model_reference
from holdfast.config.resolve import open_examples, open_subject
from holdfast.core.batch import Data
from holdfast.core.errors import UsageError
from holdfast.core.estimate import Estimate
from holdfast.detectors.protocol import Fitted, Observation
from holdfast.harness import Target
from holdfast.serving.calibration import (
    Calibration,
    calibrated,
    read_calibration,
    refuse_stale,
    with_calibration,
    write_calibration,
)
from holdfast.serving.decisions import Decision, Incoming, Mode
from holdfast.serving.guard import GuardPipeline
from holdfast.serving.observed import ObservedRate
from holdfast.sources.arrays import selected_rows
from holdfast.sources.selection import Selection
from holdfast.verbs.preparation import readied

_BATCH = 256
"""inputs of one forward pass of a calibration"""
_FITTED_SHARE = 5
"""one of so many examples is used for the fit of detectors if no others are given"""


@dataclass(frozen=True)
class Guard:
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
    def from_yaml(cls, path: str | Path, model: ModelLike | None = None) -> "Guard":
        """Return the guard that a guard.yaml describes, with its calibration if there is one.

        With `model`, the calibration is compared with it. Raises `UsageError` for invalid settings, for a calibration
        with other settings or another model, and for a rule in mode `shadow` or `enforce` without a threshold.
        """
        guard = cls._without_calibration(read_guard_settings(Path(path)), Path(path))
        place = calibration_path(guard.settings, Path(path))
        if place.exists():
            digest = None if model is None else served_digest(open_subject(guard._sources(model, None)))
            guard = guard._with(read_calibration(place), digest, str(place))
        guard._refuse_uncalibrated()
        return guard

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> "Guard":
        """Return the guard that the keys of a guard.yaml describe, given as a dictionary.

        Rules without a threshold must be in mode `observe` until `calibrate` was called.
        """
        guard = cls._without_calibration(check_guard_settings(settings, "Guard.from_settings()"), None)
        guard._refuse_uncalibrated()
        return guard

    def before(self, x: Tensor, *, principal: str = "") -> Decision:
        """Return the decision about the inputs (n, *shape) of a request before the model is called; see
        `GuardPipeline.before`.
        """
        return self.pipeline.before(x, principal=principal)

    def before_many(self, requests: Sequence[Incoming]) -> list[Decision]:
        """Return the decisions about several requests before the model is called."""
        return self.pipeline.before_many(requests)

    def after(
        self,
        decision: Decision,
        outputs: Tensor,
        features: Tensor | None = None,
        *,
        network: Callable[[Tensor], Tensor] | None = None,
    ) -> Decision:
        """Return the final decision about a request, given the outputs (n, classes) of the model; see
        `GuardPipeline.after`.
        """
        return self.pipeline.after(decision, outputs, features, network=network)

    def after_many(
        self,
        decisions: Sequence[Decision],
        outputs: Sequence[Tensor | None],
        features: Sequence[Tensor | None] | None = None,
        *,
        network: Callable[[Tensor], Tensor] | None = None,
    ) -> list[Decision]:
        """Return the final decisions about several requests; see `GuardPipeline.after_many`."""
        return self.pipeline.after_many(decisions, outputs, features, network=network)

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
        rate = self.settings.false_positives if false_positives is None else false_positives
        if not 0 < rate < 1:
            raise UsageError(f"false_positives is {rate!r}; expected a share between 0 and 1, as in 0.001")
        return self._calibrated(self._sources(model, data, seed), rate, fit)

    def _sources(self, model: ModelLike, data: DataLike, seed: int = 0) -> Sources:
        return Sources(model_reference(model), data_reference(data), bounds_of(self.settings), seed=seed)

    def _calibrated(self, sources: Sources, rate: float, fit: DataLike | None) -> "Guard":
        subject = open_subject(sources)
        if subject.model.rejects:
            raise UsageError(
                "the model has a detector of its own already; calibrate the guard with the network inside"
            )
        examples = open_examples(sources, subject.model)
        fresh = self._without_calibration(self.settings, self.path).pipeline
        with readied(subject, examples, torch.device("cpu")) as (target, _):
            examples, fitting = _divided(fresh, examples, sources.seed) if fit is None else (
                examples, open_examples(replace(sources, data=sources.beside(fit)), subject.model)
            )  # fmt: skip
            observed, labels = None, None
            if fitting is not None:
                batch = fitting.read(0, len(fitting))
                observed, labels = _observe(fresh, target, batch.x)[1], batch.y
            stream = (_observe(fresh, target, x) for x in _batches(examples))
            _, calibration = calibrated(fresh, stream, rate, observed, labels)
        calibration = replace(
            calibration,
            guard=guard_digest(self.settings),
            models=(served_digest(subject),),
            data=examples.digest,
        )
        if self.path is not None:
            write_calibration(calibration, calibration_path(self.settings, self.path))
        return self._without_calibration(self.settings, self.path)._with(calibration, None, "the guard")

    @classmethod
    def _without_calibration(cls, settings: GuardSettings, path: Path | None) -> "Guard":
        return cls(settings, guard_pipeline(settings), path)

    def _with(self, calibration: Calibration, model: str | None, where: str) -> "Guard":
        """The guard with a calibration, after comparing it with the settings and the model."""
        refuse_stale(calibration, guard_digest(self.settings), model, where)
        pipeline = with_calibration(self.pipeline, calibration)
        observed = ObservedRate(calibration.false_positives)
        return replace(self, pipeline=replace(pipeline, observed=observed), calibration=calibration)

    def _refuse_uncalibrated(self) -> None:
        """Raise `UsageError` for a rule that is to act and never fires."""
        for name, rule in self.pipeline.rules.items():
            if (
                rule.mode is not Mode.OBSERVE
                and rule.threshold == torch.inf
                and not self._has_threshold(name)
            ):
                raise UsageError(
                    f"the rule {name} has the mode {rule.mode} and no threshold; run holdfast calibrate MODEL DATA "
                    f"--guard {self.path or 'guard.yaml'}, give a threshold, or set its mode to observe"
                )

    def _has_threshold(self, name: str) -> bool:
        return self.calibration is not None and name in self.calibration.thresholds


def _divided(pipeline: GuardPipeline, data: Data, seed: int) -> tuple[Data, Data | None]:
    """The examples for the thresholds, and those for the fit of detectors, or None if there is nothing to fit."""
    if not any(isinstance(d, Fitted) and not d.fitted for d in pipeline.detectors.values()):
        return data, None
    n = len(data) // _FITTED_SHARE
    if n < 1:
        raise UsageError(
            f"{len(data)} calibration inputs are too few to fit a detector on some of them; give more"
        )
    rows = selected_rows(len(data), n=None, sample=n, seed=seed, name=data.name).tolist()
    chosen = set(rows)
    return Selection(data, tuple(k for k in range(len(data)) if k not in chosen)), Selection(
        data, tuple(rows)
    )


def _batches(data: Data) -> Iterator[Tensor]:
    for start in range(0, len(data), _BATCH):
        yield data.read(start, min(start + _BATCH, len(data))).x


def _observe(pipeline: GuardPipeline, target: Target, x: Tensor) -> tuple[Tensor, Observation]:
    """Inputs as clients send them, and what the stateless detectors observe."""
    defended = x if pipeline.defence is None else pipeline.defence(x)
    logits = torch.cat([target.logits(part) for part in torch.split(defended, _BATCH)])
    return x, Observation(defended, logits, network=target.logits)
