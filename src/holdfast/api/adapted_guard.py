"""The guard of a server that is adapted: its calibration is replaced together with the model.

The path of the calibration is fixed at the start. Only a calibration that was read and parsed is written there, so that
neither the server nor a later change of the guard's file decides what is written where.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from holdfast.api.guard_candidates import candidate_calibrations, refuse_uncalibratable
from holdfast.api.guard_opening import calibration_path, guard_pipeline, settings_without_queries
from holdfast.api.verb_settings import Calibrate
from holdfast.core.errors import TargetError
from holdfast.guard.calibration import read_calibration, write_calibration
from holdfast.guard.guard import GuardPipeline
from holdfast.reports.write import refuse_unwritable
from holdfast.runs.store.files import PRIVATE, refuse_shared
from holdfast.settings.guard_settings import read_guard_settings

EARLIER, CANDIDATE = "guard.calibration.json", "candidate.calibration.json"
"""files in the folder of a run: the calibration before it, and the one for the candidate alone"""


def calibration_of(guard: Path) -> Path:
    """Return the path of the calibration of a guard, without links. Raises `TargetError` if it is outside of the folder
    of the guard, or if another user could change it or the guard.
    """
    refuse_shared(guard)
    place = calibration_path(read_guard_settings(guard), guard).resolve()
    if place.parent != guard.resolve().parent:
        raise TargetError(
            f"the calibration {str(place)!r} of {str(guard)!r} is not in the folder of the guard, and adapt writes to "
            "no other; remove the setting calibration, or give the name of a file in that folder, and calibrate again"
        )
    if place.exists():
        refuse_shared(place)
    return place


@dataclass(frozen=True)
class AdaptedGuard:
    """The guard in a file, and the place of its calibration."""

    guard: Path
    place: Path
    """path of the calibration when the run began"""
    folder: Path
    """folder of the run"""

    def store(self) -> None:
        """Store the present calibration in the folder of the run, if there is one."""
        if self.place.exists():
            write_calibration(read_calibration(self.place), self.folder / EARLIER, PRIVATE)

    def refuse_unfit(self, settings: Calibrate) -> None:
        """Raise the error with which `extend` would fail for any candidate, given the settings for the served model."""
        refuse_unwritable(self.place)
        refuse_uncalibratable(settings)

    def extend(self, settings: Calibrate) -> None:
        """Calibrate the guard for the served model and the candidate together, given the settings for the candidate."""
        if calibration_of(self.guard) != self.place:
            raise TargetError(
                f"the calibration of {str(self.guard)!r} was {str(self.place)!r} when the run began, and is another "
                "file now; restore the guard, or begin a new run"
            )
        found = candidate_calibrations(settings)
        if found is not None:
            both, alone = found
            write_calibration(alone, self.folder / CANDIDATE, PRIVATE)
            write_calibration(both, self.place)

    def rules(self, *, candidate: bool) -> GuardPipeline:
        """Return the guard without its query detector, calibrated for the candidate or for the earlier model."""
        own = [self.folder / CANDIDATE] if candidate else []
        stored = next((each for each in [*own, self.folder / EARLIER, self.place] if each.exists()), None)
        calibration = None if stored is None else read_calibration(stored)
        settings = settings_without_queries(read_guard_settings(self.guard))
        return replace(guard_pipeline(settings, None, calibration), outputs="logit")

    def accept_both(self) -> None:
        """Let the guard accept the candidate and the earlier model, which a worker opens that is replaced before the
        reload.
        """
        if self._extended:
            alone, before = read_calibration(self.folder / CANDIDATE), read_calibration(self.folder / EARLIER)
            write_calibration(replace(alone, models=(*before.models, *alone.models)), self.place)

    def accept_candidate(self) -> None:
        """Let the guard accept the candidate alone."""
        if self._extended:
            write_calibration(read_calibration(self.folder / CANDIDATE), self.place)

    def restore(self) -> None:
        """Write the calibration from before the run again."""
        if (self.folder / EARLIER).exists():
            write_calibration(read_calibration(self.folder / EARLIER), self.place)

    @property
    def _extended(self) -> bool:
        return (self.folder / CANDIDATE).exists()
