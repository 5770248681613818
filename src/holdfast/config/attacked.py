"""Creates the table of attackers from the settings of an assessment of a pool."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from holdfast.config import rotating
from holdfast.config.pooled import pool_of
from holdfast.config.references import Sources
from holdfast.config.settings import RotateSettings, check_settings
from holdfast.core.batch import Batch
from holdfast.core.evidence import Evidence
from holdfast.engine.progress import Progress
from holdfast.verbs.request import Keep, MeasureAttackers
from holdfast.verbs.rotate.attackers import AttackerTable


def attackers(sources: Sources, device: str, *, adaptive: bool) -> MeasureAttackers | None:
    """Return the function that measures the attackers of a pool, or None if the model is not a pool or `adaptive` is
    off.
    """
    address = sources.model.address
    if address is None or not adaptive or not pool_of(address):
        return None
    return partial(_measured, address, device, trust_code=sources.model.source.trust_code)


def _measured(
    address: str,
    device: str,
    evidence: Evidence,
    judged_on: Batch,
    *,
    trust_code: bool,
    known: Mapping[str, Any] | None,
    keep: Keep,
    progress: Progress,
) -> Mapping[str, Any]:
    """Open the training data of the pool only when the table is measured, because they may be large."""
    pool = pool_of(address)
    assert pool is not None
    trusted = {"device": device, "trust_code": trust_code}
    request = rotating.reopened(pool, check_settings(trusted, address, kind=RotateSettings))
    return AttackerTable(pool, request)(evidence, judged_on, known=known, keep=keep, progress=progress)
