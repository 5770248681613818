"""What an operator should know about the rules of a guard: which only report, and which false-positive rates were
measured.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

from holdfast.api.guard_opening import basis_of, calibration_path, query_radius, rules_of, stored_calibration
from holdfast.core.errors import HoldfastError
from holdfast.core.estimate import Estimate
from holdfast.guard.calibration import Calibration
from holdfast.guard.decisions import Mode
from holdfast.guard.detectors.queries import covered_eps
from holdfast.guard.rules import QUERIES, RANGE, SCHEMA, Basis
from holdfast.reports.geometry import rounded_up
from holdfast.settings.guard_settings import GuardSettings, read_guard_settings

_ROUNDED = 1e-6  # so that a radius that was computed from eps covers it


@dataclass(frozen=True)
class GuardNote:
    """A note about a rule of a guard."""

    rule: str
    basis: Basis
    """where the threshold or the radius of the rule comes from"""
    warns: bool
    """whether the rule does not do what the settings state, or what it does was not measured"""
    text: str

    def __str__(self) -> str:
        return self.text


def guard_notes(settings: GuardSettings, calibration: Calibration | None) -> tuple[GuardNote, ...]:
    """Return the notes about the rules of a guard that are to act or to record what they would do."""
    notes = []
    for name, group in rules_of(settings).items():
        mode = Mode(group.mode or settings.mode)
        if name in (SCHEMA, RANGE) or mode is Mode.OBSERVE:
            continue
        basis = basis_of(name, group, calibration)
        value = "radius" if name == QUERIES else "threshold"
        if basis is Basis.UNFITTED:
            text = (
                f"the rule {name} only reports, although its mode is {mode}: its {value} was neither calibrated nor "
                f"given; run holdfast calibrate MODEL DATA --guard FILE, or give {value}: in the settings"
            )
            notes.append(GuardNote(name, basis, warns=True, text=text))
        elif basis is Basis.GIVEN:
            rate = None if calibration is None else calibration.measured_of(name)
            measured = (
                "and its false-positive rate was not measured; holdfast calibrate measures it"
                if rate is None
                else f"and it fires on {rate_text(rate)} of {rate.n:,} benign inputs"
            )
            text = f"the {value} of the rule {name} is that of the settings, {measured}"
            notes.append(GuardNote(name, basis, warns=rate is None, text=text))
        covered = coverage(settings, calibration) if name == QUERIES else None
        if covered is not None:
            notes.append(GuardNote(name, basis, warns=covered.short, text=covered.text))
    return tuple(notes)


def unchecked_of_file(path: Path) -> str:
    """Return a sentence with what is known about the guard in a file only after its model was opened."""
    settings = read_guard_settings(path)
    place, calibration = calibration_path(settings, path), stored_calibration(settings, path)
    shape = f"whether the model accepts inputs of shape {list(settings.inputs.shape)}"
    if calibration is None:
        return f"not checked, because no model was opened: {shape}. There is no calibration {str(place)!r}"
    models = ", ".join(each[:12] for each in calibration.models)
    return (
        f"not checked, because no model was opened: {shape}, and whether it is the model {models}, with which "
        f"{str(place)!r} was calibrated. holdfast serve MODEL --guard {shlex.quote(str(path))} checks both"
    )


def notes_of_file(path: Path) -> tuple[str, ...]:
    """Return the notes about the guard in a file, and why its calibration cannot be used if this is so."""
    settings, calibration, faults = read_guard_settings(path), None, []
    try:
        calibration = stored_calibration(settings, path)
    except HoldfastError as error:
        faults.append(error.on_command_line())
    return (*faults, *(note.text for note in guard_notes(settings, calibration)))


@dataclass(frozen=True)
class Coverage:
    """Size of the changes of attacks that the radius of a query detector covers."""

    radius: float
    eps: float
    """largest change that it covers"""
    stated: float
    """largest change that the settings state"""

    @property
    def short(self) -> bool:
        """Whether it covers less than the settings state."""
        return self.eps < self.stated * (1 - _ROUNDED)

    @property
    def text(self) -> str:
        """What the radius covers, in a sentence."""
        text = f"queries: the radius {self.radius:.3g} covers changes up to eps {self.eps:.2g}"
        if not self.short:
            return text
        larger = rounded_up(self.radius * self.stated / self.eps, 3)
        return (
            f"{text}, less than eps {self.stated:.3g} of the settings. Attacks with larger changes may not be seen. "
            f"`radius: {larger}` covers them, and may fire on more benign inputs. holdfast calibrate measures this "
            "rate, and refuses a radius that fires more often than the stated rate"
        )


def coverage(settings: GuardSettings, calibration: Calibration | None) -> Coverage | None:
    """Return which changes the radius of the query detector covers; None without one that is given or calibrated."""
    rule, sizes = settings.rules.queries, [size for size in settings.inputs.shape if size is not None]
    if rule is None or len(sizes) < len(settings.inputs.shape):
        return None
    radius = query_radius(rule, calibration)
    return None if radius is None else Coverage(radius, covered_eps(radius, sizes), rule.eps)


def rate_text(rate: Estimate) -> str:
    """Return a share of inputs in percent with its interval."""
    low, high = (f"{100 * end:.2g}" for end in (rate.low, rate.high))
    return f"{100 * rate.value:.2g} % (95 % interval: {low} to {high} %)"
