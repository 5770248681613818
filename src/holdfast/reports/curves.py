"""The report's tables of attacks, and the curves and accuracies by class and by group in the summary of a run."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import ones_like

from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Evidence
from holdfast.core.types import Mask
from holdfast.metrics.predictions import Curve, accuracy_against_eps, accuracy_against_queries
from holdfast.metrics.shares import FEWEST_IN_GROUP, Absent, per_class, per_group
from holdfast.reports.json_schemas import EstimateJson
from holdfast.reports.tree import Block, Cell, Facts, Group, Highlight, Paragraph, Section, Table
from holdfast.reports.words import (
    amount,
    capitalized,
    count_text,
    interval,
    kind_of_groups,
    number,
    percent,
    plain,
    query_budget,
    seconds_text,
    size,
    strict,
)

SummaryPart = Mapping[str, Any]

_STANDING = ("attack", "broke", "surviving", "share", "time", "interval", "queries")
_OF_TASK = ("attack", "newly broken", "surviving", "share", "score left", "time", "interval", "queries")
_SMALLEST = ("attack", "found", "share", "median", "time", "interval", "queries")


def by_distance(summary: SummaryPart) -> bool:
    """Return whether the table of attacks shows sizes of changes instead of surviving examples. This is so if the
    threat model has no radius eps.
    """
    return number(summary["threat"]["eps"]) == float("inf") and all(
        attack.get("success_rate") and attack.get("median_distance") for attack in summary["attacks"]
    )


def hardest(summary: SummaryPart) -> Iterator[Highlight]:
    """Yield the attack that broke most examples, if one broke some, or that left least of the score of a task."""
    attacks = summary["attacks"]
    scored = [attack for attack in attacks if attack.get("left") is not None]
    if scored:
        lowest = min(scored, key=lambda attack: number(attack["left"]))
        yield Highlight(
            "Hardest attack", lowest["name"], (f"alone leaves a mean score of {percent(lowest['left'])}",)
        )
        return
    attack = max(attacks, key=_broke, default=None)
    if attack is not None and _broke(attack) > 0 and not by_distance(summary):
        attacked = count_text(attack["surviving_before"])
        broke = f"broke {count_text(_broke(attack))} of the {attacked} that it attacked"
        yield Highlight("Hardest attack", attack["name"], (broke,))


def _broke(attack: SummaryPart) -> int:
    broke: int = attack["surviving_before"] - attack["surviving_after"]
    return broke


def attack_sections(summary: SummaryPart) -> Iterator[Section]:
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
    if (card := summary["model"].get("task")) is not None and not distance:
        from holdfast.tasks.catalogue import task_of  # late: most models are of classes

        task = task_of(card)
        score = "aim" if card.get("aim") is not None else card.get("objective") or task.name
        lead = (
            f"each attack runs on all {summary['noun']}, and goes on after one is broken. An {task.noun} survives if "
            f"{task.correct_if}, clean and under all attacks so far. The score left is that under this attack alone: "
            f"{_SCORES[score]}"
        )
    budget = query_budget(summary["threat"])
    allowed = f"the threat model allows {budget}" if budget else ""
    notes = (allowed, _baseline(summary), _risks(summary), _fits(summary), _passes_line(summary))
    blocks: list[Block] = [table, *(Paragraph(note) for note in notes if note)]
    if noted := [f"{attack['name']}: {note}" for attack in summary["attacks"] for note in attack["notes"]]:
        blocks += [Paragraph(note, "page") for note in noted]
    blocks += [*_searches(summary), *_passes(summary)]
    if summary["attacks"]:
        blocks.append(settings_group("Settings of each attack", summary["attacks"]))
    title = "Smallest change of each attack" if distance else "Attacks"
    yield Section(title, blocks, lead, "attacks", "Attacks", "notebook")


def settings_group(title: str, records: Iterator[SummaryPart] | list[SummaryPart]) -> Group:
    """Return the settings of attacks or methods, folded."""
    pairs = [
        (each["name"], ", ".join(f"{name} = {value}" for name, value in each["settings"].items()) or "none")
        for each in records
    ]
    return Group(title, (Facts(pairs),), folded=True, depth="page")


def _table(summary: SummaryPart) -> Table:
    distance = by_distance(summary)
    of_task = "task" in summary["model"] and not distance
    rows: list[tuple[str | Cell, ...]] = []
    clean = summary["metrics"].get("clean_accuracy")
    if clean and summary["threat"]["goal"] is None and not distance:
        share = Cell(percent(clean["value"]), bar=(number(clean["value"]),) * 3, pale=True)
        surviving = count_text(round(clean["value"] * clean["n"]))
        rows.append(
            ("no attack", "", surviving, share, *[""] * of_task, "", interval("clean_accuracy", clean), "")
        )
    decibels = summary["threat"]["decibels"]
    rows += [
        _smallest(attack, decibels=decibels) if distance else _standing(attack, of_task=of_task)
        for attack in summary["attacks"]
    ]
    suite = f", {summary['suite']}" if summary["suite"] else ""
    suffix = ": the smallest changes found" if distance else ""
    title = f"{amount(summary['n'], summary['noun'])}, {summary['threat']['constraint']}{suite}{suffix}"
    headings = _OF_TASK if of_task else _SMALLEST if distance else _STANDING
    extra = frozenset({1, 6, 7} if of_task else {5, 6})
    return Table(headings, rows, title, extra=extra, depth="notebook")


def _standing(attack: SummaryPart, *, of_task: bool) -> tuple[str | Cell, ...]:
    after = attack["robust_accuracy"]
    left = "" if attack.get("left") is None else percent(attack["left"])
    return (
        attack["name"],
        "not run" if _left_out(attack) else count_text(_broke(attack)),
        count_text(attack["surviving_after"]),
        bar(after) if after else "–",
        *([left] if of_task else ()),
        seconds_text(attack["seconds"]),
        interval("robust_accuracy", after) if after else "–",
        count_text(attack["queries"]),
    )


def _smallest(attack: SummaryPart, *, decibels: bool) -> tuple[str | Cell, ...]:
    rate, median = attack["success_rate"], attack["median_distance"]
    value, low, high = (
        size(median[key], decibels=True) if decibels else plain(median[key])
        for key in ("value", "low", "high")
    )
    return (
        attack["name"],
        "not run" if _left_out(attack) else count_text(number(rate["value"]) * rate["n"]),
        bar(rate),
        value,
        seconds_text(attack["seconds"]),
        f"{low} to {high}" if decibels else interval("distance", median),
        count_text(attack["queries"]),
    )


def bar(estimate: SummaryPart) -> Cell:
    """Return a share as a cell with a bar."""
    value, low, high = (number(estimate[key]) for key in ("value", "low", "high"))
    return Cell(percent(value), bar=(value, low, high))


def _left_out(attack: SummaryPart) -> bool:
    """Whether an attack was not run on any surviving example, because the time of the run was over."""
    return not attack["forwards"] and bool(attack["surviving_before"])


def _baseline(summary: SummaryPart) -> str:
    """A line on what the stored adversarial examples of an earlier run broke, and the queries that this saved."""
    stored = next((attack["baseline"] for attack in summary["attacks"] if attack.get("baseline")), None)
    if stored is None:
        return ""
    transferred, broke = stored["transferred"], stored["broke"]
    line = (
        f"baseline: the stored adversarial examples of the earlier run broke {count_text(transferred)} of "
        f"{count_text(stored['tried'])} examples, and searches that began with them "
        f"{count_text(broke - transferred)} more"
    )
    if broke:
        line += (
            f"; the attacks of the earlier run made {count_text(stored['earlier_queries'])} queries for these "
            f"{count_text(broke)}, and this one {count_text(stored['queries'])}"
        )
    return f"{line}. All attacks of the suite were run on the others, and the doubts do not depend on it"


def _risks(summary: SummaryPart) -> str:
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


def _fits(summary: SummaryPart) -> str:
    """A line that states how often each learned attack was fitted."""
    learned = [
        f"{attack['name']} {count_text(attack['fits'])}" for attack in summary["attacks"] if attack["fits"]
    ]
    description = "number of fits of each learned attack, the best of which was evaluated"
    return f"{description}: {', '.join(learned)}" if learned else ""


def _searches(summary: SummaryPart) -> Iterator[Block]:
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
_SCORES: Mapping[str, str] = {
    "segmentation": "the mean over the images of the mean IoU of their classes",
    "detection": "the mean over the images of the share of objects that are found",
    "vanish": "the mean over the images of the share of objects that are found",
    "mislabel": "the mean over the images of the share of objects that are found",
    "fabricate": "the mean over the images of the share of boxes that match an object",
    "aim": "the mean over the images of the share of pixels that do not get the class",
    "regression": "the mean of tolerance / (tolerance + error)",
    "multilabel": "the mean over the examples of the share of labels that are right",
}
"""Descriptions of the mean score, by the name of the task, or what the attacker aims for."""


def _outside(summary: SummaryPart) -> list[SummaryPart]:
    """The attacks and probes outside the suite that were run, without the methods of certification, which have a table
    of their own.
    """
    results = summary["certification"]
    methods = {row["stage"] for row in results["rows"]} if results else set()
    return [record for record in summary["passes"] if record["tried"] and record["stage"] not in methods]


def _passes_line(summary: SummaryPart) -> str:
    """A line on the attacks and probes outside the suite, with the number of examples that only they broke."""
    passes = _outside(summary)
    if not passes:
        return ""
    broke = [f"{record['name']} {count_text(record['broken'])}" for record in passes if record["broken"]]
    total = count_text(sum(record["broken"] for record in passes))
    names = f": {', '.join(broke)}" if broke else ""
    run = f"{count_text(len(passes))} pass{'es' * (len(passes) > 1)}"
    return f"outside the suite, {run} broke {total} more examples{names}"


def _passes(summary: SummaryPart) -> Iterator[Block]:
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


Json = dict[str, Any]

MOST_CLASSES = 1000
"""Largest number of classes in the summary. If there are more, those of lowest robust accuracy are included."""


def judged(evidence: Evidence) -> Mask:
    """Return the mask of the examples that metrics count: all or, for a targeted threat model, those that are neither
    labelled nor predicted as the target class when clean.
    """
    return evidence["eligible"].bool() if "eligible" in evidence else ones_like(evidence["correct"].bool())


def robust_examples(evidence: Evidence) -> Mask:
    """Return the mask of the robust examples: correct and unbroken or, for a targeted threat model, only unbroken."""
    unbroken = ~evidence["success"].bool()
    return unbroken if evidence.threat.goal is not None else unbroken & evidence["correct"].bool()


def estimate_to_json(value: Estimate) -> EstimateJson:
    """Return the value, the confidence interval and the sample size of an estimate as JSON for the summary of a run."""
    return {"value": strict(value.value), "low": strict(value.low), "high": strict(value.high), "n": value.n}


def accuracy_curves(evidence: Evidence) -> dict[str, list[Json]]:
    """Return robust accuracy as a function of eps and as a function of queries, as JSON for the summary, with at most a
    hundred steps each.

    A curve is empty if the attacks for it were not run.
    """
    return {
        "eps": _points(accuracy_against_eps, evidence, "eps"),
        # attacks on other tasks go on after an example is broken, and do not note the query
        "queries": [] if "task" in evidence.model else _points(accuracy_against_queries, evidence, "queries"),
    }


def _points(curve: Callable[[Evidence], Curve], evidence: Evidence, axis: str) -> list[Json]:
    if not len(evidence):
        return []
    try:
        points = curve(evidence)
    except Absent:
        return []
    return [{axis: strict(x), **estimate_to_json(y)} for x, y in zip(points.x, points.y, strict=True)]


def per_class_to_json(evidence: Evidence, names: tuple[str, ...]) -> list[Json]:
    """Return the clean and robust accuracy of each class as JSON for the summary. Of more than a thousand classes, the
    worst are included.
    """
    if evidence.threat.goal is not None or not len(evidence):
        return []
    rows = [row for row in per_class(evidence) if row.robust_accuracy is not None]
    worst = sorted(rows, key=lambda row: row.robust_accuracy.value if row.robust_accuracy else 0.0)
    return [
        {
            "class": row.label,
            "name": class_name(row.label, names),
            "n": row.n,
            "clean_accuracy": estimate_to_json(row.clean_accuracy),
            "robust_accuracy": estimate_to_json(row.robust_accuracy),
        }
        for row in sorted(worst[:MOST_CLASSES], key=lambda row: row.label)
        if row.robust_accuracy is not None
    ]


def class_name(label: int, names: tuple[str, ...]) -> str:
    """Return the name of a class, or its number as text if the class has no name."""
    return names[label] if 0 <= label < len(names) else str(label)


def groups(evidence: Evidence) -> Json | None:
    """Return the clean and robust accuracy of each group for the summary of a run, or None if the run has no groups or
    no robust accuracy.
    """
    try:
        rows = per_group(evidence)
    except Absent:
        return None
    names = evidence.data["groups"]["names"]
    return {
        "column": evidence.data["groups"]["column"],
        "rows": [
            {
                "name": names[row.place],
                "n": row.robust_accuracy.n,
                "clean_accuracy": estimate_to_json(row.clean_accuracy),
                "robust_accuracy": estimate_to_json(row.robust_accuracy),
                "unclear": row.unclear,
            }
            for row in rows
        ],
    }


def groups_section(results: Mapping[str, Any], noun: str) -> Section:
    """Return the section of the groups: clean and robust accuracy of each, and whether it is clear."""
    singular, kind = kind_of_groups(results)
    by = f" by {results['column']}" if results["column"] else ""
    small = any(row["unclear"] for row in results["rows"])
    rule = (
        f"; one of fewer than {FEWEST_IN_GROUP} {noun} is unclear, and no gate on worst_group passes with it"
    )
    lead = f"clean and robust accuracy{by}; the intervals of all {kind} hold together{rule if small else ''}"
    return Section(
        capitalized(kind),
        (accuracy_table(singular, noun, results["rows"]),),
        lead,
        "groups",
        capitalized(kind),
    )


def accuracy_table(name: str, noun: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table of classes or groups: the number of examples, and clean and robust accuracy, of each."""
    cells = [
        (
            row["name"],
            count_text(row["n"]),
            percent(row["clean_accuracy"]["value"]),
            bar(row["robust_accuracy"]),
            interval("robust_accuracy", row["robust_accuracy"]) + (", unclear" if row.get("unclear") else ""),
        )
        for row in rows
    ]
    return Table((name, noun, "clean", "robust", "interval"), cells, extra=frozenset({1, 4}))
