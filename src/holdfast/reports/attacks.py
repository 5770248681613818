"""The report's table of attacks: how many examples survive each attack or, for minimum-norm attacks, the sizes of the
changes.
"""

from collections.abc import Mapping
from typing import Any

from holdfast.reports.numbers import count_text, number, percent, plain, seconds_text
from holdfast.reports.words import amount, interval

STANDING = ("attack", "broke", "surviving", "share", "time", "interval", "queries")
SMALLEST = ("attack", "found", "share", "median", "time", "interval", "queries")


def by_distance(summary: Mapping[str, Any]) -> bool:
    """Return whether the table of attacks shows sizes of changes instead of surviving examples. This is so if the
    threat model has no radius eps.
    """
    return number(summary["threat"]["eps"]) == float("inf") and all(
        attack.get("success_rate") and attack.get("median_distance") for attack in summary["attacks"]
    )


def title(summary: Mapping[str, Any]) -> str:
    """Return the title of the table of attacks, such as `1,000 images, linf:0.2, standard@1`."""
    suite = f", {summary['suite']}" if summary["suite"] else ""
    suffix = ": the smallest changes found" if by_distance(summary) else ""
    return f"{amount(summary['n'], summary['noun'])}, {summary['threat']['constraint']}{suite}{suffix}"


def left_out(attack: Mapping[str, Any]) -> bool:
    """Return whether an attack was not run on any surviving example, because the time of the run was over."""
    return not attack["forwards"] and bool(attack["surviving_before"])


def row(attack: Mapping[str, Any], *, distance: bool) -> dict[str, str]:
    """Return the cells of one attack in the table of attacks, by column heading."""
    after = attack["robust_accuracy"]
    cells = {
        "attack": attack["name"],
        "time": seconds_text(attack["seconds"]),
        "queries": count_text(attack["queries"]),
    }
    if distance:
        return cells | {
            "found": "not run"
            if left_out(attack)
            else count_text(number(attack["success_rate"]["value"]) * attack["success_rate"]["n"]),
            "share": percent(attack["success_rate"]["value"]),
            "median": plain(attack["median_distance"]["value"]),
            "interval": interval("distance", attack["median_distance"]),
        }
    return cells | {
        "broke": "not run"
        if left_out(attack)
        else count_text(attack["surviving_before"] - attack["surviving_after"]),
        "surviving": count_text(attack["surviving_after"]),
        "share": percent(after["value"]) if after else "–",
        "interval": interval("robust_accuracy", after) if after else "–",
    }


def risks(summary: Mapping[str, Any]) -> str:
    """Return a line for the report on examples that attacks have not tried, with an upper bound on the fraction of them
    that would break.

    The line is empty if all surviving examples were tried.
    """
    partly_run = [attack for attack in summary["attacks"] if attack["not_tried"]]
    untried = (
        f"{attack['name']} {count_text(attack['not_tried']['n'])} "
        f"({percent(attack['not_tried']['max_success_rate'])})"
        for attack in partly_run
    )
    description = (
        "examples that were skipped, because all examples closer to the decision boundary survived, with the largest "
        "share of them that would break (95 % confidence, if none is easier to break)"
    )
    return f"{description}: {', '.join(untried)}" if partly_run else ""


def fits_text(summary: Mapping[str, Any]) -> str:
    """Return a line for the report that states how often each learned attack was fitted, or an empty string if there is
    no learned attack.
    """
    learned = [
        f"{attack['name']} {count_text(attack['fits'])}" for attack in summary["attacks"] if attack["fits"]
    ]
    description = "number of fits of each learned attack, the best of which was evaluated"
    return f"{description}: {', '.join(learned)}" if learned else ""


def passes_outside(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the attacks and probes outside the suite, without the methods of certification, which have a table of
    their own.
    """
    results = summary["certification"]
    methods = {row["stage"] for row in results["rows"]} if results else set()
    return [record for record in summary["passes"] if record["stage"] not in methods]


def passes_line(summary: Mapping[str, Any], *, brief: bool = False) -> str:
    """Return a line for the report on the attacks and probes outside the suite, with the number of examples that only
    they broke.

    With `brief`, passes that broke no example are not named.
    """
    passes_run = passes_outside(summary)
    if not passes_run:
        return ""
    broke = [f"{record['name']} {count_text(record['broken'])}" for record in passes_run if record["broken"]]
    total = count_text(sum(record["broken"] for record in passes_run))
    names = f": {', '.join(broke)}" if broke else ""
    run = f"{count_text(len(passes_run))} pass{'es' * (len(passes_run) > 1)}"
    text = f"outside the suite, {run} broke {total} more examples{names}"
    idle = [record["name"] for record in passes_run if not record["broken"]]
    return text if brief or not idle else f"{text}; no more examples were broken by {', '.join(idle)}"
