"""The report's tables of attacks: how many examples survive each attack or, for minimum-norm attacks, the sizes of the
changes; the methods of an adaptive search; and the passes outside the suite.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from holdfast.reports.numbers import count_text, number, percent, plain, seconds_text
from holdfast.reports.tree import Block, Cell, Facts, Group, Highlight, Paragraph, Section, Table
from holdfast.reports.words import amount, capitalized, interval, query_budget

Json = Mapping[str, Any]

_STANDING = ("attack", "broke", "surviving", "share", "time", "interval", "queries")
_SMALLEST = ("attack", "found", "share", "median", "time", "interval", "queries")


def by_distance(summary: Json) -> bool:
    """Return whether the table of attacks shows sizes of changes instead of surviving examples. This is so if the
    threat model has no radius eps.
    """
    return number(summary["threat"]["eps"]) == float("inf") and all(
        attack.get("success_rate") and attack.get("median_distance") for attack in summary["attacks"]
    )


def hardest(summary: Json) -> Iterator[Highlight]:
    """Yield the attack that broke most examples, if one broke some."""
    attacks = summary["attacks"]
    attack = max(attacks, key=_broke, default=None)
    if attack is not None and _broke(attack) > 0 and not by_distance(summary):
        attacked = count_text(attack["surviving_before"])
        broke = f"broke {count_text(_broke(attack))} of the {attacked} that it attacked"
        yield Highlight("Hardest attack", attack["name"], (broke,))


def _broke(attack: Json) -> int:
    broke: int = attack["surviving_before"] - attack["surviving_after"]
    return broke


def attack_sections(summary: Json) -> Iterator[Section]:
    """Yield the section of the attacks, if some were run, with the tables of an adaptive search and of the passes
    outside the suite.
    """
    table = _table(summary)
    if not table.rows:
        return
    distance = by_distance(summary)
    lead = (
        "each attack looks for the smallest change of every example. The median is over all examples: those that are "
        "misclassified when clean count as 0, those for which no change was found as ∞"
        if distance
        else "each attack runs only on the examples that survive the attacks before it. An example is robust if it "
        "survives all of them"
    )
    budget = query_budget(summary["threat"])
    allowed = f"the threat model allows {budget}" if budget else ""
    notes = (allowed, _risks(summary), _fits(summary), _passes_line(summary))
    blocks: list[Block] = [table, *(Paragraph(note) for note in notes if note)]
    if noted := [f"{attack['name']}: {note}" for attack in summary["attacks"] for note in attack["notes"]]:
        blocks += [Paragraph(note, "page") for note in noted]
    blocks += [*_searches(summary), *_passes(summary)]
    if summary["attacks"]:
        blocks.append(settings_group("Settings of each attack", summary["attacks"]))
    title = "Smallest change of each attack" if distance else "Attacks"
    yield Section(title, blocks, lead, "attacks", "Attacks", "notebook")


def settings_group(title: str, records: Iterator[Json] | list[Json]) -> Group:
    """Return the settings of attacks or methods, folded."""
    pairs = [
        (each["name"], ", ".join(f"{name} = {value}" for name, value in each["settings"].items()) or "none")
        for each in records
    ]
    return Group(title, (Facts(pairs),), folded=True, depth="page")


def _table(summary: Json) -> Table:
    distance = by_distance(summary)
    rows: list[tuple[str | Cell, ...]] = []
    clean = summary["metrics"].get("clean_accuracy")
    if clean and summary["threat"]["goal"] is None and not distance:
        share = Cell(percent(clean["value"]), bar=(number(clean["value"]),) * 3, pale=True)
        surviving = count_text(round(clean["value"] * clean["n"]))
        rows.append(("no attack", "", surviving, share, "", interval("clean_accuracy", clean), ""))
    rows += [(_smallest if distance else _standing)(attack) for attack in summary["attacks"]]
    suite = f", {summary['suite']}" if summary["suite"] else ""
    suffix = ": the smallest changes found" if distance else ""
    title = f"{amount(summary['n'], summary['noun'])}, {summary['threat']['constraint']}{suite}{suffix}"
    headings = _SMALLEST if distance else _STANDING
    return Table(headings, rows, title, extra=frozenset({5, 6}), depth="notebook")


def _standing(attack: Json) -> tuple[str | Cell, ...]:
    after = attack["robust_accuracy"]
    return (
        attack["name"],
        "not run" if _left_out(attack) else count_text(_broke(attack)),
        count_text(attack["surviving_after"]),
        bar(after) if after else "–",
        seconds_text(attack["seconds"]),
        interval("robust_accuracy", after) if after else "–",
        count_text(attack["queries"]),
    )


def _smallest(attack: Json) -> tuple[str | Cell, ...]:
    rate, median = attack["success_rate"], attack["median_distance"]
    return (
        attack["name"],
        "not run" if _left_out(attack) else count_text(number(rate["value"]) * rate["n"]),
        bar(rate),
        plain(median["value"]),
        seconds_text(attack["seconds"]),
        interval("distance", median),
        count_text(attack["queries"]),
    )


def bar(estimate: Json) -> Cell:
    """Return a share as a cell with a bar."""
    value, low, high = (number(estimate[key]) for key in ("value", "low", "high"))
    return Cell(percent(value), bar=(value, low, high))


def _left_out(attack: Json) -> bool:
    """Whether an attack was not run on any surviving example, because the time of the run was over."""
    return not attack["forwards"] and bool(attack["surviving_before"])


def _risks(summary: Json) -> str:
    """A line on examples that attacks have not tried, with an upper bound on the fraction of them that would break."""
    untried = [
        f"{attack['name']} {count_text(attack['not_tried']['n'])} "
        f"({percent(attack['not_tried']['max_success_rate'])})"
        for attack in summary["attacks"]
        if attack["not_tried"]
    ]
    description = (
        "examples that were skipped, because all examples closer to the decision boundary survived, with the largest "
        "share of them that would break (95 % confidence, if none is easier to break)"
    )
    return f"{description}: {', '.join(untried)}" if untried else ""


def _fits(summary: Json) -> str:
    """A line that states how often each learned attack was fitted."""
    learned = [
        f"{attack['name']} {count_text(attack['fits'])}" for attack in summary["attacks"] if attack["fits"]
    ]
    description = "number of fits of each learned attack, the best of which was evaluated"
    return f"{description}: {', '.join(learned)}" if learned else ""


def _searches(summary: Json) -> Iterator[Block]:
    """The tables of an adaptive search: what each method did, and the checks of the search."""
    for attack in summary["attacks"]:
        if attack.get("search"):
            rows = [
                (method["name"], method["state"], *map(count_text, (method[key] for key in _COUNTS)))
                for method in attack["search"]["methods"]
            ]
            title = f"{attack['name']}: methods that share the budget"
            table = Table(("method", "state", *_COUNTS), rows, title, texts=frozenset({1}))
            yield Group(capitalized(title), (table,))
    if summary.get("answer_checks"):
        rows = [(check["name"], check["state"], check["message"]) for check in summary["answer_checks"]]
        title = "checks of the adaptive search: it answers no doubt if one is failed"
        table = Table(("check", "state", "measured"), rows, title, texts=frozenset({1, 2}))
        yield Group(capitalized(title), (table,))


_COUNTS = ("broke", "forwards", "backwards")


def _outside(summary: Json) -> list[Json]:
    """The attacks and probes outside the suite, without the methods of certification, which have a table of their
    own.
    """
    results = summary["certification"]
    methods = {row["stage"] for row in results["rows"]} if results else set()
    return [record for record in summary["passes"] if record["stage"] not in methods]


def _passes_line(summary: Json) -> str:
    """A line on the attacks and probes outside the suite, with the number of examples that only they broke."""
    passes = _outside(summary)
    if not passes:
        return ""
    broke = [f"{record['name']} {count_text(record['broken'])}" for record in passes if record["broken"]]
    total = count_text(sum(record["broken"] for record in passes))
    names = f": {', '.join(broke)}" if broke else ""
    run = f"{count_text(len(passes))} pass{'es' * (len(passes) > 1)}"
    return f"outside the suite, {run} broke {total} more examples{names}"


def _passes(summary: Json) -> Iterator[Block]:
    """The table of the passes outside the suite, folded."""
    if passes := _outside(summary):
        alone = summary["metrics"].get("suite_robust_accuracy")
        text = "Examples that they broke inside the threat model count as broken in robust accuracy."
        if alone:
            text += (
                " Robust accuracy under the suite alone, for comparison with published numbers, is "
                f"{percent(alone['value'])}."
            )
        rows = [(each["name"], count_text(each["tried"]), count_text(each["broken"])) for each in passes]
        table = Table(("pass", "tried", "broke more"), rows)
        yield Group("Passes outside the suite", (Paragraph(text, "page"), table), folded=True)
