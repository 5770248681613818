"""The card of a hardened model, which shows its metrics next to those of the original model, and its training curve."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from holdfast.reports import tree
from holdfast.reports.charts import LOOKS, epochs
from holdfast.reports.comparison import signed
from holdfast.reports.run import shown_notes
from holdfast.reports.words import (
    SCOPES,
    count_text,
    estimate_cell,
    label,
    number,
    percent,
    plain,
    seconds_text,
    sentences,
    size,
)
from holdfast.statistics.intervals import CONFIDENCE

_LINES = (("clean", "clean, held out"), ("robust", "attacked, held out"), ("accuracy", "training examples"))
"""keys of the lines of the training curve, with their names"""
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


def card_report(card: Mapping[str, Any]) -> tree.Report:
    """Return the card of a hardened model as a report."""
    names = compared_metrics(card)
    attacked = "certified_accuracy" not in names
    return tree.Report(
        verb="harden",
        about=card["name"],
        headline=" ".join(filter(None, (verdict_sentence(card), help_sentence(card)))),
        content=card,
        lead=(
            tree.Paragraph(
                f"hardened against {card['threat']} with the recipe {card['recipe']}, {_why(card)}. Evaluated under "
                f"{card['evaluated_under']}"
            ),
        ),
        sections=[
            _evaluation(card, names, attacked=attacked),
            _on_held_out(card, attacked=attacked),
            tree.Section("Training curve", (curve(card),)),
            tree.Section("Reservations", (tree.Items([*_reservations(card)]),)),
            *_follow_up(card),
            tree.Section(
                "Load it, from the folder in which it was created", (tree.Code([card["opened_by"]]),)
            ),
            tree.Section(
                "Created by",
                (
                    tree.Code([card["command"] or "holdfast.harden(...)"]),
                    tree.Paragraph(_training_cost(card)),
                ),
            ),
            tree.Section("Settings", (tree.Facts([*_settings(card["settings"])]),)),
        ],
    )


def _evaluation(card: Mapping[str, Any], names: Sequence[str], *, attacked: bool) -> tree.Section:
    """The metrics of both models on the test examples."""
    before, after = card["before"], card["after"]
    suite = f", suite {after['suite']}" if attacked else ""
    head = f"on {after['n']:,} test examples{suite}"
    blocks: list[tree.Block] = [_sides(head, before["metrics"], after["metrics"], names)]
    if attacked and not _of_trigger(card):
        blocks.append(tree.Paragraph(f"robust accuracy is {SCOPES[card['scope']]}"))
    return tree.Section("Evaluation", blocks)


def _on_held_out(card: Mapping[str, Any], *, attacked: bool) -> tree.Section:
    """The metrics of both models on the held-out examples, which choose the checkpoint if the threat changes inputs."""
    held_out = card["held_out"]
    both = held_out["before"], held_out["after"]
    gap = tree.Paragraph(generalisation_note(card["generalisation"], robust=attacked))
    if not attacked:
        head = f"on {held_out['n']:,} held-out training examples, which choose no checkpoint"
        return tree.Section("Held-out examples", (_sides(head, *both, _HELD_OUT[:1]), gap))
    written = f"the checkpoint was written {checkpoint_text(card['chosen'], card['epochs'])}"
    error = f"{100 * held_out['standard_error']:.1f} percentage points"
    how = (
        "with the trigger"
        if _of_trigger(card)
        else "attacked by PGD with 20 steps (overestimates robustness)"
    )
    blocks = (
        tree.Paragraph(f"{written}, and is the best on held-out examples"),
        _sides(f"on {held_out['n']:,} held-out training examples, {how}", *both, _HELD_OUT),
        tree.Paragraph(f"the standard error of the robust accuracy after the training is {error}"),
        gap,
    )
    return tree.Section("Held-out examples", blocks)


def curve(card: Mapping[str, Any]) -> tree.Chart:
    """Return the chart of clean and robust accuracy over the epochs of a training, with the checkpoint."""
    looks = ", ".join(f"{name} ({look} line)" for (_, name), look in zip(_LINES, LOOKS, strict=True))
    caption = f"{looks}. The vertical line is the checkpoint."
    drawings = epochs(card["curve"], _LINES, card["chosen"]["epoch"])
    return tree.Chart(drawings, "epochs", "accuracy over the epochs", caption, file="curve.svg")


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


def _follow_up(card: Mapping[str, Any]) -> Iterator[tree.Section]:
    """The tables that the recipe measured after the training, if there are any."""
    for table in card.get("follow_up", {}).get("tables", ()):
        yield tree.Section(table["title"], (tree.Table(table["columns"], table["rows"]),))


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


def _sides(
    head: str, before: Mapping[str, Any], after: Mapping[str, Any], names: Sequence[str]
) -> tree.Table:
    """A table of the metrics of both models."""
    rows: list[tree.Row] = [
        (label(name), estimate_cell(name, before[name]), estimate_cell(name, after[name])) for name in names
    ]
    return tree.Table((head, "before", "after"), rows)


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


_SHOWN = ("verdict", "change", "recipe", "epochs", "ended_by", "advice")


def training_summary(card: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of the card of a hardened model that the summary of its assessment contains."""
    entries = {name: card[name] for name in _SHOWN}
    return {**entries, "message": verdict_sentence(entries), "help": help_sentence(entries)}


def verdict_sentence(training: Mapping[str, Any]) -> str:
    """Return a sentence that states the verdict on a training, with the metric of both models and its change."""
    change = training["change"]
    before, after = percent(change["before"]), percent(change["after"])
    metric = label(change["metric"]).lower()
    interval = f"{100 * CONFIDENCE:.0f} % interval {signed(change['low'])} to {signed(change['high'])}"
    return sentences(
        f"{training['verdict']}: {metric} is {after} after the training and was {before} before it "
        f"({signed(change['value'])} points, {interval}, n = {count_text(change['n'])})"
    )


def help_sentence(training: Mapping[str, Any]) -> str:
    """Return a sentence that states what would help a training that improved nothing; empty if nothing is known."""
    advice = training["advice"]
    ways = []
    if advice["epochs"] is not None:
        budget = (
            "" if advice["budget_s"] is None else f" (a budget of about {seconds_text(advice['budget_s'])})"
        )
        ways.append(f"{advice['epochs']} epochs instead of {plain(training['epochs'])}{budget}")
    if advice["lr"] is not None:
        ways.append(f"a smaller learning rate ({plain(advice['lr'])})")
    if advice["warmup"] is not None:
        ways.append(f"a longer warm-up ({plain(advice['warmup'])} of the training)")
    if advice["recipe"] is not None:
        ways.append(f"the recipe {advice['recipe']}")
    if advice["eps"] is not None:
        ways.append(f"a smaller eps ({size(advice['eps'])})")
    collapse = "the network collapsed to one class" if training["ended_by"] == "collapse" else ""
    listed = ", ".join(ways[:-1]) + (" or " if len(ways) > 1 else "") + "".join(ways[-1:])
    return sentences(collapse, f"what may help: {listed}" if ways else "")


def checkpoint_text(chosen: Mapping[str, Any], epochs: float) -> str:
    """Return when the checkpoint of a training was written, as text.

    >>> checkpoint_text({"epoch": 3, "part": 1.0}, 30), checkpoint_text({"epoch": 1, "part": 0.559}, 0.559)
    ('after epoch 3 of 30', 'after 0.559 epochs')
    """
    trained = chosen["epoch"] - 1 + chosen["part"]
    if epochs == int(epochs):
        return f"after epoch {chosen['epoch']} of {plain(epochs)}"
    return (
        f"after {plain(trained)} epochs"
        if trained == epochs
        else f"after {plain(trained)} of {plain(epochs)} epochs"
    )
