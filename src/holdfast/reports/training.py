"""Text on the verdict on a training: whether the new model is better than the given one, and what would help."""

from collections.abc import Mapping
from typing import Any

from holdfast.reports.comparison import signed
from holdfast.reports.numbers import count_text, percent, plain, seconds_text, size
from holdfast.reports.words import label, sentences
from holdfast.statistics.intervals import CONFIDENCE

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
