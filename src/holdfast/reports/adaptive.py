"""The tables of an adaptive search: what each method did, and the checks of the search."""

from collections.abc import Iterator, Mapping
from typing import Any

from holdfast.reports.numbers import count_text
from holdfast.reports.words import TextTable


def tables(summary: Mapping[str, Any]) -> Iterator[TextTable]:
    """Yield the table of the methods of each adaptive search of a run, and that of its checks if there are some."""
    for attack in summary["attacks"]:
        if attack.get("search"):
            yield methods_table(attack)
    if summary.get("answer_checks"):
        yield checks_table(summary)


def methods_table(attack: Mapping[str, Any]) -> TextTable:
    """Return the table of the methods of an adaptive search, with the examples that each broke and its passes."""
    rows = [
        (
            method["name"],
            method["state"],
            count_text(method["broke"]),
            count_text(method["forwards"]),
            count_text(method["backwards"]),
        )
        for method in attack["search"]["methods"]
    ]
    title = f"{attack['name']}: methods that share the budget"
    return TextTable(title, ("method", "state", "broke", "forwards", "backwards"), rows)


def checks_table(summary: Mapping[str, Any]) -> TextTable:
    """Return the table of the checks of the adaptive attack; if one is failed, it answers no doubt."""
    rows = [(check["name"], check["state"], check["message"]) for check in summary["answer_checks"]]
    return TextTable(
        "checks of the adaptive search: it answers no doubt if one is failed",
        ("check", "state", "measured"),
        rows,
    )
