"""Creates the table of attackers from the settings of an assessment of a pool."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from holdfast.config import rotating
from holdfast.config.pooled import pool_of
from holdfast.config.settings import AssessSettings, RotateSettings, check_settings
from holdfast.core.batch import Batch
from holdfast.core.evidence import Evidence
from holdfast.engine.progress import Progress
from holdfast.verbs.request import Keep, MeasureAttackers
from holdfast.verbs.rotate.attackers import AttackerTable


def attackers(settings: AssessSettings) -> MeasureAttackers | None:
    """Return the function that measures the attackers of a pool, or None if the model is not a pool or `adaptive` is
    off.
    """
    return partial(_measured, settings) if settings.adaptive and pool_of(settings.model) else None


def _measured(
    settings: AssessSettings,
    evidence: Evidence,
    judged_on: Batch,
    *,
    known: Mapping[str, Any] | None,
    keep: Keep,
    progress: Progress,
) -> Mapping[str, Any]:
    """Open the training data of the pool only when the table is measured, because they may be large."""
    pool = pool_of(settings.model)
    assert pool is not None
    trusted = {"device": settings.device, "trust_code": settings.trust_code}
    request = rotating.reopened(pool, check_settings(trusted, str(settings.model), kind=RotateSettings))
    return AttackerTable(pool, request)(evidence, judged_on, known=known, keep=keep, progress=progress)
