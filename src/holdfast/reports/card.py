"""The card of a hardened model, which shows its metrics next to those of the original model, and its training curve."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from holdfast.reports.charts import LOOKS, Axis, Plane, epochs
from holdfast.reports.comparison import signed
from holdfast.reports.numbers import number, percent, plain
from holdfast.reports.run import shown_notes
from holdfast.reports.training import checkpoint_text, help_sentence, verdict_sentence
from holdfast.reports.tree import (
    Block,
    Cell,
    Chart,
    Code,
    Facts,
    Items,
    Paragraph,
    Report,
    Row,
    Section,
    Table,
)
from holdfast.reports.words import SCOPES, interval, label, shown

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


def card_report(card: Mapping[str, Any]) -> Report:
    """Return the card of a hardened model as a report."""
    names = compared_metrics(card)
    attacked = "certified_accuracy" not in names
    return Report(
        verb="harden",
        about=card["name"],
        headline=" ".join(filter(None, (verdict_sentence(card), help_sentence(card)))),
        content=card,
        lead=(
            Paragraph(
                f"hardened against {card['threat']} with the recipe {card['recipe']}, {_why(card)}. Evaluated under "
                f"{card['evaluated_under']}"
            ),
        ),
        sections=[
            _evaluation(card, names, attacked=attacked),
            _on_held_out(card, attacked=attacked),
            Section("Training curve", (_curve(card),)),
            Section("Reservations", (Items([*_reservations(card)]),)),
            *_follow_up(card),
            Section("Load it, from the folder in which it was created", (Code([card["opened_by"]]),)),
            Section(
                "Created by",
                (Code([card["command"] or "holdfast.harden(...)"]), Paragraph(_training_cost(card))),
            ),
            Section("Settings", (Facts([*_settings(card["settings"])]),)),
        ],
    )


def _evaluation(card: Mapping[str, Any], names: Sequence[str], *, attacked: bool) -> Section:
    """The metrics of both models on the test examples."""
    before, after = card["before"], card["after"]
    suite = f", suite {after['suite']}" if attacked else ""
    head = f"on {after['n']:,} test examples{suite}"
    blocks: list[Block] = [_sides(head, before["metrics"], after["metrics"], names)]
    if attacked and not _of_trigger(card):
        blocks.append(Paragraph(f"robust accuracy is {SCOPES[card['scope']].removeprefix('; ')}"))
    return Section("Evaluation", blocks)


def _on_held_out(card: Mapping[str, Any], *, attacked: bool) -> Section:
    """The metrics of both models on the held-out examples, which choose the checkpoint if the threat changes inputs."""
    held_out = card["held_out"]
    both = held_out["before"], held_out["after"]
    gap = Paragraph(generalisation_note(card["generalisation"], robust=attacked))
    if not attacked:
        head = f"on {held_out['n']:,} held-out training examples, which choose no checkpoint"
        return Section("Held-out examples", (_sides(head, *both, _HELD_OUT[:1]), gap))
    written = f"the checkpoint was written {checkpoint_text(card['chosen'], card['epochs'])}"
    error = f"{100 * held_out['standard_error']:.1f} percentage points"
    how = (
        "with the trigger"
        if _of_trigger(card)
        else "attacked by PGD with 20 steps (overestimates robustness)"
    )
    blocks = (
        Paragraph(f"{written}, and is the best on held-out examples"),
        _sides(f"on {held_out['n']:,} held-out training examples, {how}", *both, _HELD_OUT),
        Paragraph(f"the standard error of the robust accuracy after the training is {error}"),
        gap,
    )
    return Section("Held-out examples", blocks)


def _curve(card: Mapping[str, Any]) -> Chart:
    looks = ", ".join(f"{name} ({look} line)" for (_, name, *_), look in zip(_LINES, LOOKS, strict=True))
    caption = f"{looks}. The vertical line is the checkpoint."
    drawings = epochs(card["curve"], [(key, name) for key, name, *_ in _LINES], card["chosen"]["epoch"])
    return Chart(drawings, "epochs", "accuracy over the epochs", caption, file="curve.svg")


def _reservations(card: Mapping[str, Any]) -> Iterator[str]:
    """The doubts about both models, and the notes."""
    before, after = card["before"], card["after"]
    if before["at_chance"]:
        yield (
            "the given model is no better than one that always predicts the majority class, as untrained weights are: "
            "the difference between both models is the effect of training, not of this recipe alone"
        )
    for side, assessment in (("before", before), ("after", after)):
        for doubt in assessment["doubts"]:
            yield f"doubt {side}, {doubt['name']}: {doubt['message']}"
    for name, why in after["accepted_doubts"].items():
        yield f"accepted, {name}: {why}"
    if not after["doubts"]:
        probed = after["doubts_tested"]
        assessment = f"none of {probed} tested doubts was raised" if probed else "no doubt was tested"
        yield f"{assessment} for the hardened model"
    yield from card["notes"]
    yield from _of_judging(card)


def _follow_up(card: Mapping[str, Any]) -> Iterator[Section]:
    """The tables that the recipe measured after the training, if there are any."""
    for table in card.get("follow_up", {}).get("tables", ()):
        yield Section(table["title"], (Table(table["columns"], table["rows"]),))


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
    return f"Training took {seconds} on {card['hardware']}, seed {card['seed']}{passes}."


def _sides(head: str, before: Mapping[str, Any], after: Mapping[str, Any], names: Sequence[str]) -> Table:
    """A table of the metrics of both models."""
    rows: list[Row] = [
        (
            label(name),
            *(Cell(shown(name, e["value"]), (interval(name, e),)) for e in (before[name], after[name])),
        )
        for name in names
    ]
    return Table((head, "before", "after"), rows)


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
    reason: str = card["reason"]
    return reason if card["requested_recipe"] == card["recipe"] else f"chosen: {reason}"


def _settings(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _settings(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)
