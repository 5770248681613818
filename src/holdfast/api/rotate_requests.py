"""Creates the request of each step of `holdfast rotate` from its settings: opens the pool, its model and its data."""

from pathlib import Path

from holdfast.api import rotation_opening
from holdfast.api.verb_settings import RotateSettings
from holdfast.core.errors import UsageError
from holdfast.core.remedies import Remedy
from holdfast.rotation.pool.pool import Pool
from holdfast.rotation.steps.admit import AdmitRequest
from holdfast.rotation.steps.collect import CollectRequest
from holdfast.rotation.steps.draw import By, DrawRequest, by_named
from holdfast.rotation.steps.rotation_run import LoopSettings, RunRequest
from holdfast.rotation.steps.train import TrainRequest


def collect_request(
    settings: RotateSettings, path: Path, *, resume: bool = False, expect_head: str = ""
) -> CollectRequest:
    """Return the request for the training of the first parameter sets of a rotation pool, which is created in the
    folder `path`.
    """
    common, budget_s = rotation_opening.rotate_request(settings), rotation_opening.budget_s(settings)
    return CollectRequest(path, common, resume, budget_s, settings.n_judged, expect_head)


def train_request(path: Path, settings: RotateSettings, *, expect_head: str = "") -> TrainRequest:
    """Return the request for the training of a generator of parameter sets for the rotation pool in the
    folder `path`.
    """
    pool = Pool.open(path, expect_head=expect_head)
    common = rotation_opening.reopened(pool, settings)
    return TrainRequest(pool, common, rotation_opening.codec(settings), rotation_opening.diffusion(settings))


def draw_request(
    path: Path,
    settings: RotateSettings,
    *,
    sets: int | None = None,
    by: str | None = None,
    immunising: bool = False,
    resume: bool = False,
    expect_head: str = "",
) -> DrawRequest:
    """Return the request for generating or retraining new parameter sets for a rotation pool. `immunising` states
    whether the new sets are immunised.
    """
    _refuse_no_count(sets)
    method = by_named(by)
    pool = Pool.open(path, expect_head=expect_head)
    common = rotation_opening.reopened(pool, settings)
    immunise = rotation_opening.immunise(settings) if immunising else None
    return DrawRequest(pool, common, sets, method, immunise, resume)


def _refuse_no_count(sets: object) -> None:
    if sets is not None and (isinstance(sets, bool) or not isinstance(sets, int) or sets < 1):
        raise UsageError(f"sets is {sets!r}; expected a number of candidates of at least 1")


def admit_request(path: Path, settings: RotateSettings, *, expect_head: str = "") -> AdmitRequest:
    """Return the request for judging all new parameter sets of the rotation pool in the folder `path`, which decides
    whether they may serve.
    """
    pool = Pool.open(path, expect_head=expect_head)
    common = rotation_opening.reopened(pool, settings)
    return AdmitRequest(pool, common, settings.gates, settings.accept_doubts, settings.n_judged)


def run_request(
    settings: RotateSettings,
    path: Path,
    *,
    by: str | None = None,
    immunising: bool = False,
    once: bool = False,
    anyway: bool = False,
    resume: bool = False,
    expect_head: str = "",
) -> RunRequest:
    """Return the request for all steps of a rotation, with a new pool or, with `resume`, the pool
    in the folder `path`.
    """
    loop = _loop_settings(settings, by_named(by), immunising=immunising, once=once)
    collection = collect_request(settings, path, resume=resume, expect_head=expect_head)
    return RunRequest(
        collection, loop, rotation_opening.codec(settings), rotation_opening.diffusion(settings), once, anyway
    )


def resumed_run_request(
    settings: RotateSettings,
    path: Path,
    *,
    by: str | None = None,
    immunising: bool = False,
    once: bool = False,
    expect_head: str = "",
) -> RunRequest:
    """Return the request for all steps of a rotation with an existing pool, whose model and data are opened again."""
    loop = _loop_settings(settings, by_named(by), immunising=immunising, once=once)
    common = rotation_opening.reopened(Pool.open(path, expect_head=expect_head), settings)
    collection = CollectRequest(path, common, True, n_judged=settings.n_judged, expect_head=expect_head)
    return RunRequest(
        collection, loop, rotation_opening.codec(settings), rotation_opening.diffusion(settings), once
    )


def _loop_settings(settings: RotateSettings, by: By | None, *, immunising: bool, once: bool) -> LoopSettings:
    """Return when sets are swapped and how new ones are produced and judged."""
    triggers = rotation_opening.triggers(settings)
    if not (triggers or once):
        raise UsageError(
            "no condition for swaps is given",
            Remedy("every", ("50q/principal",), repeated=True),
            Remedy("every", ("24h",), repeated=True),
            Remedy("once", True),
        )
    immunise = rotation_opening.immunise(settings) if immunising else None
    gates, accepted = settings.gates, settings.accept_doubts
    return LoopSettings(triggers, settings.min_waiting, immunise, by, gates, accepted, settings.n_judged)
