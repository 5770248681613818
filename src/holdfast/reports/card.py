"""The card of a hardened model, which shows its metrics next to those of the original model, and its training curve."""

from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.core.names import line
from holdfast.reports.charts import Axis, Plane
from holdfast.reports.comparison import signed
from holdfast.reports.markdown import code, escaped, markdown_table
from holdfast.reports.notes import shown_notes
from holdfast.reports.numbers import number, percent, plain
from holdfast.reports.training import checkpoint_text, help_sentence, verdict_sentence
from holdfast.reports.words import SCOPES, capitalized, interval, label, shown

_WIDTH, _HEIGHT = 640.0, 320.0
_LINES = (
    ("clean", "clean, held out", "#1f6feb", ""),
    ("robust", "attacked, held out", "#b3261e", ""),
    ("accuracy", "training examples", "#6e7781", ' stroke-dasharray="4 3"'),
)
_STYLE = "text{font:12px system-ui,sans-serif;fill:#24292f} path,line{fill:none}"


def curve_svg(points: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any]) -> str:
    """Return an SVG chart of clean and robust accuracy over the epochs of a training, in which the epoch of the
    checkpoint, `chosen`, is marked.
    """
    plane = Plane(_WIDTH, _HEIGHT, Axis(float(max(point["epoch"] for point in points)), logarithmic=False))
    parts = [f'<rect width="{_WIDTH:g}" height="{_HEIGHT:g}" fill="#fff"/>']
    for k in range(5):
        at = plane.level(k / 4)
        parts += [
            f'<line x1="{plane.across(0):.1f}" x2="{plane.right:.1f}" y1="{at:.1f}" y2="{at:.1f}" stroke="#d0d7de"/>',
            f'<text x="{plane.across(0) - 6:.1f}" y="{at + 4:.1f}" text-anchor="end">{25 * k} %</text>',
        ]
    for value, text in plane.axis.ticks:
        parts += [_text(plane.across(value), plane.bottom + 18, text)]
    parts += [_text((plane.across(0) + plane.right) / 2, plane.bottom + 36, "epochs")]
    parts += [_line(points, plane, key, colour, dashes) for key, _, colour, dashes in _LINES]
    x, y = plane.across(chosen["epoch"]), plane.level(chosen["robust"])
    parts += [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#b3261e"><title>the checkpoint</title></circle>'
    ]
    for k, (_, name, colour, _) in enumerate(_LINES):
        at = plane.bottom - 14 - 18 * (len(_LINES) - 1 - k)
        parts += [
            f'<rect x="{plane.right - 150:.1f}" y="{at - 9:.1f}" width="12" height="4" fill="{colour}"/>',
            f'<text x="{plane.right - 132:.1f}" y="{at:.1f}">{name}</text>',
        ]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img"'
    about = "<title>accuracy over the epochs of the training</title>"
    return "\n".join([f"{head}>", about, f"<style>{_STYLE}</style>", *parts, "</svg>"]) + "\n"


def _line(points: Sequence[Mapping[str, Any]], plane: Plane, key: str, colour: str, dashes: str) -> str:
    """A line through one quantity over the epochs; a dot if there is only one epoch."""
    places = [(plane.across(point["epoch"]), plane.level(point[key])) for point in points]
    if len(places) == 1:
        return f'<circle cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="3" fill="{colour}"/>'
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    return f'<path d="{path}" stroke="{colour}" stroke-width="2"{dashes}/>'


def _text(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{text}</text>'


_KEPT = (
    "clean_accuracy",
    "robust_accuracy",
    "suite_robust_accuracy",
    "certified_accuracy",
    "trigger_success_rate",
)
_HELD_OUT = ("clean_accuracy", "robust_accuracy")


def compared_metrics(card: Mapping[str, Any]) -> tuple[str, str]:
    """Return the names of the two metrics by which the card compares the hardened model with the original one."""
    if card["change"]["metric"] == "certified_accuracy":
        return "clean_accuracy", "certified_accuracy"
    if _of_trigger(card):
        return "clean_accuracy", "trigger_success_rate"
    return "clean_accuracy", "suite_robust_accuracy" if card["scope"] == "suite only" else "robust_accuracy"


def _of_trigger(card: Mapping[str, Any]) -> bool:
    """Whether the goal of the training is a lower success rate of a trigger."""
    return bool(card["change"]["metric"] == "trigger_success_rate")


def judged(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return those parts of the summary of an assessment that the card of a hardened model contains."""
    raised = [doubt for doubt in summary["doubts"] if doubt["state"] == "raised"]
    tested = [doubt for doubt in summary["doubts"] if doubt["state"] in {"raised", "clear"}]
    return {
        "headline": summary["headline"],
        "suite": summary["suite"],
        "n": summary["metrics"]["clean_accuracy"][
            "n"
        ],  # also with a target class, whose examples do not count
        "metrics": {name: summary["metrics"][name] for name in _KEPT if name in summary["metrics"]},
        "doubts": [{"name": doubt["name"], "message": doubt["message"]} for doubt in raised],
        "doubts_tested": len(tested),
        "notes": shown_notes(summary),
        "accepted_doubts": dict(summary["accepted_doubts"]),
    }


def generalisation_note(generalisation: Mapping[str, Any], *, robust: bool = True) -> str:
    """Return a sentence on the robust generalisation of a hardened model, without a full stop. Without `robust`, the
    threat changes no input.
    """
    error = "robust error" if robust else "error"
    gap = generalisation["robust_error_gap"]
    value, low, high = number(gap["value"]), number(gap["low"]), number(gap["high"])
    direction, meaning = "higher", "an interval above 0 shows that the model overfits"
    if round(100 * value, 1) == 0:
        return (
            f"the {error} on held-out examples is equal to that on {generalisation['n_training']:,} training "
            f"examples (difference {signed(low)} to {signed(high)} percentage points); {meaning}"
        )
    if value < 0:
        value, low, high = -value, -high, -low
        direction, meaning = "lower", "this does not show that the model overfits"
    return (
        f"the {error} on held-out examples is {100 * value:.1f} percentage points {direction} ({signed(low)} to "
        f"{signed(high)}) than that on {generalisation['n_training']:,} training examples; {meaning}"
    )


def card_document(card: Mapping[str, Any]) -> str:
    """Return the card of a hardened model as a Markdown document."""
    before, after = card["before"], card["after"]
    lines = [f"# {escaped(card['name'])}", ""]
    lines += [
        escaped(verdict_sentence(card)),
        *([escaped(help_sentence(card))] if help_sentence(card) else []),
        "",
        f"Hardened against {escaped(card['threat'])} with the recipe {code(card['recipe'])}, {_why(card)}.",
        "",
    ]
    lines += [f"Evaluated under {escaped(card['evaluated_under'])}.", ""]
    names, attacked = compared_metrics(card), "certified_accuracy" not in compared_metrics(card)
    suite = f", suite {escaped(after['suite'])}" if attacked else ""
    lines += _sides(f"on {after['n']:,} test examples{suite}", before["metrics"], after["metrics"], names)
    if attacked and not _of_trigger(card):
        lines += [f"Robust accuracy is {SCOPES[card['scope']].removeprefix('; ')}.", ""]
    lines += _on_held_out(card, attacked=attacked)
    lines += [f"{capitalized(generalisation_note(card['generalisation'], robust=attacked))}.", ""]
    lines += ["![accuracy over the epochs](curve.svg)", ""]
    lines += _reservations(card)
    lines += _tables_of_follow_up(card)
    lines += [
        "",
        "Load it, from the folder in which it was created:",
        "",
        f"    {line(card['opened_by'])}",
        "",
    ]
    lines += ["Created by:", "", f"    {line(card['command'] or 'holdfast.harden(...)')}", ""]
    lines += [_training_cost(card), ""]
    lines += ["Settings:", "", *(f"    {line(setting)}" for setting in _settings(card["settings"]))]
    return "\n".join(lines) + "\n"


def _on_held_out(card: Mapping[str, Any], *, attacked: bool) -> list[str]:
    """The metrics of both models on the held-out examples, which choose the checkpoint if the threat changes inputs."""
    held_out, chosen = card["held_out"], card["chosen"]
    if not attacked:
        head = f"on {held_out['n']:,} held-out training examples, which choose no checkpoint"
        return _sides(head, held_out["before"], held_out["after"], _HELD_OUT[:1])
    error = f"{100 * held_out['standard_error']:.1f} percentage points"
    return [
        f"The checkpoint was written {checkpoint_text(chosen, card['epochs'])}, and is the best on held-out examples:",
        "",
        *_sides(
            f"on {held_out['n']:,} held-out training examples, {_held_out_attack(card)}",
            held_out["before"],
            held_out["after"],
            _HELD_OUT,
        ),
        f"The standard error of the robust accuracy after the training is {error}.",
        "",
    ]


def _held_out_attack(card: Mapping[str, Any]) -> str:
    """How the held-out examples are attacked."""
    if _of_trigger(card):
        return "with the trigger"
    return "attacked by PGD with 20 steps (overestimates robustness)"


def _reservations(card: Mapping[str, Any]) -> list[str]:
    """The doubts about both models, and the notes."""
    before, after = card["before"], card["after"]
    lines = []
    if before["at_chance"]:
        lines.append(
            "- the given model is no better than one that always predicts the majority class, as untrained weights "
            "are: the difference between both models is the effect of training, not of this recipe alone"
        )
    for side, assessment in (("before", before), ("after", after)):
        lines += [
            f"- doubt {side}, {code(doubt['name'])}: {escaped(doubt['message'])}"
            for doubt in assessment["doubts"]
        ]
    lines += [f"- accepted, {code(name)}: {escaped(why)}" for name, why in after["accepted_doubts"].items()]
    if not after["doubts"]:
        probed = after["doubts_tested"]
        assessment = f"none of {probed} tested doubts was raised" if probed else "no doubt was tested"
        lines += [f"- {assessment} for the hardened model"]
    lines += [f"- {escaped(note)}" for note in card["notes"]]
    return [*lines, *(f"- {escaped(note)}" for note in _of_judging(card))]


def _tables_of_follow_up(card: Mapping[str, Any]) -> list[str]:
    """The tables that the recipe measured after the training, if there are any."""
    lines = []
    for table in card.get("follow_up", {}).get("tables", ()):
        lines += ["", f"{capitalized(escaped(table['title']))}:", ""]
        lines += markdown_table(table["columns"], [[escaped(cell) for cell in row] for row in table["rows"]])[
            :-1
        ]
    return lines


def _training_cost(card: Mapping[str, Any]) -> str:
    """The cost and the hardware of the training, as text."""
    cost = card["cost"]
    seconds = f"{plain(cost['wall_s'])} s ({plain(cost['cpu_s'])} s of CPU time)"
    passes = (
        f"; each example passed through the network {plain(cost['forwards'])} times"
        if cost["forwards"]
        else ""
    )
    if cost["planning_s"]:
        seconds += f", plus {plain(cost['planning_s'])} s for planning,"
    if "budget_s" in cost:
        several = len(card["recipes_tried"]) > 1
        passes += (
            f". {'Planning and all trainings' if several else 'Both'} used {percent(cost['budget_used'], 0)} of the "
            f"budget of {plain(cost['budget_s'])} s"
        )
        if several:
            passes += (
                f" and of the {plain(cost['announced_s'] - cost['budget_s'])} s more if doubts are raised"
            )
    early = {"patience": "of patience", "collapse": "the network collapsed to one class"}
    if card["ended_by"] in early:
        passes += f". The training stopped early because {early[card['ended_by']]}"
    return f"Training took {seconds} on {escaped(card['hardware'])}, seed {card['seed']}{passes}."


def _sides(head: str, before: Mapping[str, Any], after: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """A Markdown table of the metrics of both models."""
    rows = (
        (capitalized(label(name)), *(_measured(name, side[name]) for side in (before, after)))
        for name in names
    )
    return markdown_table((head, "before", "after"), rows)


def _of_judging(card: Mapping[str, Any]) -> list[str]:
    """Notes on one or both assessments that are not notes on the training."""
    before, after = (
        [note for note in card[side]["notes"] if note not in card["notes"]] for side in ("before", "after")
    )
    shared = [f"evaluation: {note}" for note in before if note in after]
    single = (
        (side, note)
        for side, notes, other_notes in (("before", before, after), ("after", after, before))
        for note in notes
        if note not in other_notes
    )
    return [*shared, *(f"evaluation {side}: {note}" for side, note in single)]


def _why(card: Mapping[str, Any]) -> str:
    return (
        escaped(card["reason"])
        if card["requested_recipe"] == card["recipe"]
        else f"chosen: {escaped(card['reason'])}"
    )


def _measured(name: str, estimate: Mapping[str, Any]) -> str:
    return f"{shown(name, estimate['value'])} ({interval(name, estimate)})"


def _settings(settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            lines += _settings(value, f"{prefix}{name}.")
        else:
            lines.append(f"{prefix}{name}: {value}")
    return lines
