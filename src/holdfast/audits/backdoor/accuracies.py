"""What a finding states about the accuracies and the training of the controls: sentences, and a table."""

from collections.abc import Sequence

from holdfast.audits.backdoor.controls import MAX_DIFFERENCE, MIN_CONTROLS
from holdfast.audits.backdoor.measurements import Control, Measured
from holdfast.audits.finding import Table

_NAMED = 5
"""Number of controls that a sentence names."""


def left_out_of(measured: Measured) -> str:
    """Return the part of a headline that names the controls that are left out; empty if there are none."""
    names = [repr(control.name) for control in measured.left_out]
    return f" (left out: {_first(names)})" if names else ""


def sentences(measured: Measured) -> tuple[str, ...]:
    """Return the sentences about the controls: which are left out, how far the others differ, and what is missing."""
    if not measured.controls:
        return ()
    less = sum(control.is_below for control in measured.controls)
    apart = ""
    if measured.used:
        apart = (
            "The clean accuracies of the model and of the compared controls differ by at most "
            f"{100 * measured.largest_difference:.1f} points."
        )
    below = ""
    if less:
        below = f"{less} of the {len(measured.controls)} controls are less accurate than the model, as if trained less."
    trained = _trained(measured) if measured.trained else ""
    return tuple(
        part for part in (_left_out(measured), apart, below, trained, _missing(measured, less)) if part
    )


def _left_out(measured: Measured) -> str:
    described = [f"{control.name!r} ({_beside(control)})" for control in measured.left_out]
    if not described:
        return ""
    return (
        f"The accuracy of the model is {100 * measured.accuracy:.1f} %. Left out are the controls for which the whole "
        f"interval of the difference is beyond {100 * MAX_DIFFERENCE:.0f} points: {_first(described)}."
    )


def _beside(control: Control) -> str:
    low, high = 100 * control.difference.low, 100 * control.difference.high
    return f"{100 * control.accuracy:.1f} %, {low:+.1f} to {high:+.1f} points"


def _first(items: Sequence[str]) -> str:
    named = ", ".join(items[:_NAMED])
    return named if len(items) <= _NAMED else f"{named}, and {len(items) - _NAMED} more"


def _trained(measured: Measured) -> str:
    fewest, most = min(measured.trained), max(measured.trained)
    if fewest == most:
        return f"The audit trained each control for {most} epoch{'s' * (most != 1)}."
    return f"The audit trained the controls for {fewest} to {most} epochs."


def _missing(measured: Measured, less: int) -> str:
    """What the user can do if controls are missing, or are less accurate because the time ended."""
    if measured.trained and less:
        return (
            "The time of train_controls ended before they were as accurate; with a longer time, their training "
            "continues."
        )
    missing = MIN_CONTROLS - len(measured.used)
    if missing <= 0:
        return ""
    networks = "network" if missing == 1 else "networks"
    return f"Give {missing} more {networks} that were trained like the model (controls)."


def controls_table(measured: Measured) -> Table:
    """Return the table of the controls with their accuracies and smallest ratios."""
    compared = measured.compared
    ratios = iter([] if compared is None else compared.rank.of_controls)
    rows = []
    for control in measured.controls:
        difference = control.difference
        ratio: str | float = ""
        if compared is not None and control.is_comparable:
            ratio = next(ratios)
        accuracies = (control.accuracy, difference.value, difference.low, difference.high)
        rows.append((control.name, *accuracies, ratio, "yes" if control.is_comparable else "left out"))
    return Table(
        "Control networks",
        ("control", "accuracy", "difference", "low", "high", "smallest ratio", "compared"),
        rows,
        "The difference is that to the accuracy of the model on the same examples, with its 95 % interval. A control "
        f"is left out if the whole interval is beyond {100 * MAX_DIFFERENCE:.0f} points.",
    )
