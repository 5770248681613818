"""Text for reports: sentences on results, and the formatting of numbers."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from holdfast.core.batch import BY_LABEL
from holdfast.core.catalogue import PATCH_MASKS
from holdfast.core.names import MAP, in_255ths, threat_text
from holdfast.doubts.probing import doubt_test
from holdfast.gates.judging import depends_on, shortage
from holdfast.metrics.names import (
    LOWER_BOUNDS,
    METRICS,
    NOT_SHARES,
    OF_EPS,
    OF_TASKS,
    PERTURBATIONS,
    TASKS,
    UPPER_BOUNDS,
)
from holdfast.metrics.shares import FEWEST_IN_GROUP
from holdfast.reports.tree import Block, Cell, Group, Row, Table

_UNSAFE = re.compile(
    r"[\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]|#(?=#[A-Za-z]*\[)"
)
"""Characters that are legal in JSON, but that a terminal interprets, a file cannot contain, or a CI system executes."""
NOT_A_NUMBER_WORDS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
"""Strings for the numbers that strict JSON cannot represent: infinities and NaN."""


def strict(value: Any) -> Any:
    """Convert a nested value to strict JSON: infinities and NaN become the strings "inf", "-inf" and "nan"."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()  # file names may not be UTF-8
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Tensor):
        return strict(value.detach().cpu().tolist())
    if isinstance(value, Mapping):
        return {strict(str(key)): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [strict(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        settings = {field.name: strict(getattr(value, field.name)) for field in fields(value)}
        return {type(value).__name__: settings}
    return strict(str(getattr(value, "__name__", value)))


def json_text(content: Mapping[str, Any]) -> str:
    """Return the content of a report as strict JSON text, with a newline at the end. Characters that a terminal or a CI
    system would interpret are escaped, so that the text can be printed.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def number(value: float | str) -> float:
    """Return a number from strict JSON, in which infinities and NaN are the strings "inf", "-inf" and "nan"."""
    return NOT_A_NUMBER_WORDS[value] if isinstance(value, str) else float(value)


def percent(value: float | str, digits: int = 1) -> str:
    """Return a fraction in percent as text, with more digits if rounding would give 0 or 100 %."""
    share = number(value)
    if not math.isfinite(share):
        return "not defined"
    for places in range(digits, 5):
        text = f"{100 * share:.{places}f}"
        if share in {0.0, 1.0} or float(text) not in {0.0, 100.0}:
            break
    return f"{text} %"


def plain(value: float | str, digits: int = 3) -> str:
    """Return a number as text with a few significant digits, and in scientific notation only if it is very small or
    very large.
    """
    amount = number(value)
    if math.isnan(amount):
        return "not defined"
    if math.isinf(amount):
        return "∞" if amount > 0 else "−∞"
    if amount == 0:
        return "0"
    if 1e-4 <= abs(amount) < 1e7:
        text = f"{amount:,.{max(0, digits - 1 - math.floor(math.log10(abs(amount))))}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
    else:
        text = f"{amount:.{digits - 1}e}"
    return text.replace("-", "−")


def feature_value(value: float | str) -> str:
    """Return the value of a feature as text: a category as it is, and a number with six significant digits."""
    return value if isinstance(value, str) and value not in NOT_A_NUMBER_WORDS else plain(value, 6)


def value_text(value: str | float | None) -> str:
    """Return a cell of a table of numbers and words as text: a float with a few digits, and None as an empty text."""
    if value is None:
        return ""
    return plain(value) if isinstance(value, float) else str(value)


def count_text(value: float | str) -> str:
    """Return a number, rounded to an integer, as text with thousands separators. NaN and infinity, which JSON contains
    as text, have the form of `plain`.
    """
    amount = number(value)
    return f"{amount:,.0f}" if math.isfinite(amount) else plain(amount)


def seconds_text(value: float | str) -> str:
    """Return a duration, given in seconds, as text in a suitable unit such as minutes."""
    amount = number(value)
    if not math.isfinite(amount):
        return plain(amount)
    if amount < 1:
        return f"{1000 * amount:.0f} ms"
    if amount < 120:
        return f"{amount:.1f} s"
    minutes = amount / 60
    return f"{minutes:.1f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def size(eps: float | str, *, decibels: bool = False) -> str:
    """Return a perturbation radius as text, such as `0.3` or `8/255`, or `40 dB` for the radius 0.01 in decibels.

    It is a fraction of 255 if the radius is a multiple of 1/255 without a short decimal form, and otherwise a decimal
    number.
    """
    amount = number(eps)
    if decibels:
        return "∞ dB" if amount == 0 else f"{plain(round(-20 * math.log10(amount), 1) + 0.0)} dB"
    return f"{round(amount * 255)}/255" if in_255ths(amount) else plain(amount)


Json = dict[str, Any]

VERDICTS = {
    "pass": ("✓", "Pass"),
    "fail": ("✕", "Fail"),
    "unclear": ("?", "Unclear"),
    "no gate": ("–", "No gate"),
}
"""Sign and word for each verdict, so that verdicts differ not only in their colour."""

STATE_SIGNS = {"raised": "▲", "clear": "✓", "answered": "◆", "not measured": "○", "not applicable": "–"}
"""Sign for each state of a doubt."""

_ACCESS = {
    "none": "has no access to the model",
    "labels": "sees the predicted class only",
    "scores": "sees the scores of all classes, but no gradients",
    "gradients": "has full access to the model, gradients included",
}

_BALLS = {
    "Linf": "may change every value of an input by at most {eps}",
    "L2": "may change an input by a Euclidean length of at most {eps}",
    "L1": "may change an input by absolute changes that add up to at most {eps}",
    "Corruptions": "applies each common corruption, such as noise, blur or fog, once at severity {eps} of 5",
    "LinfOfClips": "may change every sample of the sound of a clip by at most {eps}",
    "L2OfClips": "may change the sound of a clip by a Euclidean length of at most {eps}",
    "SNR": "may add a sound to a clip whose power is at least {eps} below that of the clip, so that a larger number is "
    "a weaker attacker",
    "Peak": "may add a sound to a clip whose peak is at least {eps} below that of the clip, so that a larger number is "
    "a weaker attacker",
    "L0": "may change at most {eps} {values}, each to any legal value",
    "TrainingSet": "may add or remove at most {eps} training examples, before the training",
}


_CHANGES = {
    "rotate": "rotate an image by at most {} degrees in either direction",
    "shift": "shift it by at most {} pixels along each axis",
    "scale": "enlarge or shrink it by a share of at most {}",
    "flow": "move each pixel of an image by at most {} pixels in any direction",
    "hue": "rotate the hue by at most {} degrees",
    "saturation": "change the saturation by a share of at most {}",
    "brightness": "change the brightness by at most {} of the range of values",
    "contrast": "change the contrast by a share of at most {}",
}
"""Descriptions of the limits of threat models that transform images."""

_TEXT_CHANGES = {
    "edits": "may change at most {words} words of a text by at most {edits} edits each. An edit deletes, repeats or "
    "replaces a character, swaps two neighbouring ones or inserts an invisible one",
    "synonyms": "may replace at most {synonyms} words of a text by their synonyms in {file}",
    "inserts": "may append at most {inserts} words of {file} to a text",
}
"""Descriptions of the limits of threat models on texts."""


def only_trained(summary: Mapping[str, Any]) -> bool:
    """Return whether the only verdict on a run is that on its training, because no gate was set."""
    return summary.get("training") is not None and summary["verdict"] == "no gate"


def verdict_of(summary: Mapping[str, Any]) -> tuple[str, str]:
    """Return the sign and the word for the verdict on a run: that of its gates, or of its training if no gate was
    set.
    """
    sign, word = VERDICTS[summary["verdict"]]
    return sign, summary["training"]["verdict"].capitalize() if only_trained(summary) else word


def label(metric: str) -> str:
    """Return the name of a metric as a heading in reports, such as `Robust accuracy`."""
    text = metric.replace("_", " ").capitalize()
    return (
        re.sub(r"\b(linf|l[012]|f1)\b", lambda match: match[0].capitalize(), text)
        .replace("auroc", "AUROC")
        .replace("iou", "IoU")
        .replace("MIoU", "Mean IoU")
        .replace("mIoU", "mean IoU")
        .replace("Ap", "AP")
        .replace("Clean ap", "Clean AP")
        .replace("ap50", "AP50")
        .replace("Mce", "mCE")
    )


def metric_cell(metric: str, href: str = "") -> Cell:
    """Return the name of a metric with its definition, which is empty for a metric of another package."""
    return Cell(label(metric), about=capitalized(METRICS.get(metric, "")), href=href)


def is_share(metric: str) -> bool:
    """Return whether a metric is a fraction, so that reports show it in percent."""
    return metric not in NOT_SHARES


def shown(metric: str, value: float | str, *, decibels: bool = False) -> str:
    """Return a value of a metric as text for reports, in percent if the metric is a fraction. With `decibels`, sizes
    in the unit of eps are in decibels.
    """
    if decibels and metric in OF_EPS:
        return size(value, decibels=True)
    return percent(value) if is_share(metric) else plain(value)


def interval(metric: str, estimate: Mapping[str, Any], *, decibels: bool = False) -> str:
    """Return the confidence interval of a metric as text, such as `38.4–44.6 %`, with `decibels` as in `shown`."""
    low, high = (shown(metric, estimate[end], decibels=decibels) for end in ("low", "high"))
    if low == high:
        return low
    return f"{low.removesuffix(' %')}–{high}" if high.endswith(" %") else f"{low} to {high}"


def estimate_cell(metric: str, estimate: Mapping[str, Any]) -> Cell:
    """Return a metric as a cell with its value and its interval."""
    return Cell(shown(metric, estimate["value"]), (interval(metric, estimate),))


def metric_tables(
    headings: Sequence[str], rows: Mapping[str, Row], title: str, further: str = ""
) -> list[Block]:
    """Return the table of the main metrics, and the folded one of all others, from the rows of metrics by name.
    `title` and `further` are the titles of the two.
    """
    first, others = ([row for name, row in rows.items() if (name in FIRST) is main] for main in (True, False))
    blocks: list[Block] = [Table(headings, first, title, depth="notebook")]
    if others:
        heading = amount(len(others), "more metrics")
        blocks.append(Group(heading, (Table(headings, others, further),), folded=True))
    return blocks


def shown_of_gate(gate: Mapping[str, Any]) -> str:
    """Return the measured value of a gate as text. It is in percentage points for the verdict on a training, which is
    by the difference of two models.
    """
    value = gate["estimate"]["value"]
    return (
        f"{_points(value)} percentage points" if gate["versus"] == "before" else shown(gate["metric"], value)
    )


def interval_of_gate(gate: Mapping[str, Any]) -> str:
    """Return the confidence interval of the measured value of a gate as text, in the same unit as the value."""
    low, high = gate["estimate"]["low"], gate["estimate"]["high"]
    if gate["versus"] == "before":
        return f"{_points(low)} to {_points(high)} percentage points"
    return interval(gate["metric"], gate["estimate"])


def _points(difference: float | str) -> str:
    """A difference of fractions in percentage points."""
    return f"{100 * number(difference):.1f}"


def amount(n: int, noun: str) -> str:
    """Return a number of things as text, such as `1,000 images` or `1 image`."""
    return f"{count_text(n)} {noun.removesuffix('s') if n == 1 else noun}"


def capitalized(sentence: str) -> str:
    """Return the text with its first letter in upper case."""
    return sentence[:1].upper() + sentence[1:]


def uncapitalized(text: str) -> str:
    """Return the text with its first letter in lower case, as inside a sentence, unless it begins with an abbreviation,
    such as AP50.
    """
    return text if text[1:2].isupper() else text[:1].lower() + text[1:]


def sentences(*parts: str) -> str:
    """Join nonempty texts as sentences, each with an upper-case first letter and a full stop.

    >>> sentences("3 of 4 fail", "", "look at them.")
    '3 of 4 fail. Look at them.'
    """
    return " ".join(
        capitalized(part) + ("" if part.endswith((".", "!", "?", "…")) else ".") for part in parts if part
    )


def grouped_doubts(doubts: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Return the doubts of a run that were not raised, in groups for the report. Doubts that were not measured for the
    same reason are one group.
    """
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for doubt in doubts:
        same_reason = doubt["state"] in ("not measured", "not applicable") and doubt["message"]
        key = (doubt["state"], doubt["message"]) if same_reason else (doubt["name"],)
        if doubt["state"] != "raised":
            groups.setdefault(key, []).append(doubt)
    return list(groups.values())


def main_metric(summary: Mapping[str, Any]) -> str | None:
    """Return the name of the metric that the headline of a report states, such as `robust_accuracy`, or None if no such
    metric was measured.
    """
    candidates = [
        "trigger_success_rate",
        "worst_group",  # which only runs with groups have
        "robust_accuracy",
        "targeted_success_rate",
        "robust_margin",
        "clean_accuracy",
    ]
    task = summary["model"].get("task")
    if task is not None:  # its first metric
        candidates = [next(iter(TASKS[task["name"]]))]
    if summary["threat"]["goal"] is not None and number(summary["threat"]["eps"]) == float("inf"):
        candidates.insert(0, f"perturbation_{summary['threat']['norm'].lower()}")
    if summary["verb"] == "certify" or summary["threat"]["norm"] == "TrainingSet":
        candidates.insert(0, "certified_accuracy")
    return next((name for name in candidates if name in summary["metrics"]), None)


def shown_metrics(summary: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the metrics of a run that text reports show. Redundant ones, such as an error rate next to the accuracy,
    are left out.
    """
    # differences of code points and of bytes mean nothing
    of_codes = summary["threat"]["norm"] in ("TextEdits", "ByteChanges")
    unattacked = summary["threat"]["norm"] in ("TrainingSet", "WordEmbeddings")  # no input changes
    metrics = {
        name: estimate
        for name, estimate in summary["metrics"].items()
        if not (of_codes and "perturbation_" in name)
        and not (unattacked and name in UPPER_BOUNDS | LOWER_BOUNDS)
    }
    return without_redundant(metrics)


def without_redundant(estimates: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return the given metrics without those that are redundant in text reports, such as an error rate next to the
    accuracy.

    An infinite median of the changes is left out: it means that fewer than half of the examples were broken, which
    robust accuracy shows as well.
    """
    metrics = dict(estimates)
    robust = metrics.get("robust_accuracy")
    if "clean_accuracy" in metrics:
        metrics.pop("clean_error_rate", None)
    if robust is not None:
        metrics.pop("attack_success_rate", None)
        metrics.pop("robust_error_rate", None)
        for name in [name for name in PERTURBATIONS if name in metrics]:
            if number(metrics[name]["value"]) == float("inf"):
                del metrics[name]
        if metrics.get("suite_robust_accuracy", {}).get("value") == robust["value"]:
            metrics.pop("suite_robust_accuracy", None)
    return metrics


def measured(summary: Mapping[str, Any], *, intervals: bool = True) -> str:
    """Return a sentence that states the main result of a run, such as robust accuracy, without gates. With `intervals`,
    it contains the confidence interval.
    """
    metric = main_metric(summary)
    if metric is None:
        return f"{amount(summary['n'], summary['noun']).capitalize()} were assessed"
    estimate = summary["metrics"][metric]
    decibels = summary["threat"]["decibels"]
    rate = shown(metric, estimate["value"], decibels=decibels)
    interval_text = interval(metric, estimate, decibels=decibels)
    of = f"of {amount(estimate['n'], summary['noun'])}"
    groups = summary["groups"] if metric == "worst_group" else None
    all_groups = f"{len(groups['rows'])} {kind_of_groups(groups)[1]}" if groups else ""
    n_unclear = sum(row["unclear"] for row in groups["rows"]) if groups else 0
    compared = (
        f"the {len(groups['rows']) - n_unclear} of {all_groups} with {FEWEST_IN_GROUP} or more {summary['noun']}"
        if groups and 0 < n_unclear < len(groups["rows"])
        else all_groups
    )
    together = f" for all {all_groups} together" if groups else ""
    interval_part = (
        f" ({100 * summary['confidence']:.0f} % interval {interval_text}{together})" if intervals else ""
    )
    if groups:
        every = summary["metrics"]["robust_accuracy"]
        return (
            f"{rate} {of} of {worst_of(groups)}, the worst of {compared}, survive "
            f"{all_attacks_text(summary['threat'])}{interval_part}; "
            f"{percent(every['value'])} of all {count_text(every['n'])} survive"
        )
    if metric == "robust_accuracy":
        verb = "survives" if estimate["n"] == 1 else "survive"
        return (
            f"{rate} {of} {verb} {all_attacks_text(summary['threat'])}{interval_part}{_suite_alone(summary)}"
        )
    if metric == "certified_accuracy":
        constraint, robust = summary["threat"]["constraint"], summary["metrics"].get("robust_accuracy")
        attacked = robust and summary["attacks"]
        rest = (
            f"; {percent(robust['value'])} survive {all_attacks_text(summary['threat'])}" if attacked else ""
        )
        results = summary.get("certification")
        model = ", for the smoothed classifier" if results and results.get("statistical") else ""
        if results and any(row["name"] == PATCH_MASKS for row in results["rows"]):
            model = ", for the vote over masks"
        return f"{rate} {of} are certified under {constraint}{model}{interval_part}{rest}"
    if metric == "trigger_success_rate":
        goal = summary["threat"]["goal"]
        outcome = "change their class" if goal is None else f"of other classes are assigned to class {goal}"
        return f"{rate} {of} {outcome} with the trigger{interval_part}"
    if metric == "targeted_success_rate":
        return f"{rate} {of} could be changed to class {summary['threat']['goal']}{interval_part}"
    if metric in OF_TASKS:
        return _of_task(summary, metric, interval_part)
    if metric != "clean_accuracy":
        goal = summary["threat"]["goal"]
        outcome = "break" if goal is None else f"reach class {goal}"
        return f"Half {of} {outcome} within an {summary['threat']['norm']} change of {rate}{interval_part}"
    return f"{rate} {of} are correct without any attack{interval_part}"


def _of_task(summary: Mapping[str, Any], metric: str, interval_part: str) -> str:
    """The sentence on the main metric of a model with another task than classes."""
    estimate, clean = summary["metrics"][metric], summary["metrics"].get(clean_metric(metric))
    rate, of = shown(metric, estimate["value"]), f"of {amount(estimate['n'], summary['noun'])}"
    without = "" if clean is None else f", and {shown(metric, clean['value'])} without an attack"
    under = f"under {all_attacks_text(summary['threat'])}{interval_part}{without}"
    if metric == "within_tolerance":
        return f"{rate} {of} are within the tolerance {under}"
    if metric == "label_accuracy":
        return f"{rate} of the labels {of} are right {under}"
    return f"{label(metric)} {of} is {rate} {under}"


def clean_metric(metric: str) -> str:
    """Return the name of the metric of clean inputs that corresponds to the main one of a task."""
    return "clean_accuracy" if metric == "within_tolerance" else f"clean_{metric}"


def worst_of(groups: Mapping[str, Any]) -> str:
    """Return the name of the worst group of a run, such as `class normal`. Groups of fewer than 30 examples count only
    if there are no others.
    """
    rows = [row for row in groups["rows"] if not row["unclear"]] or groups["rows"]
    worst = min(rows, key=lambda row: number(row["robust_accuracy"]["value"]))
    return f"{kind_of_groups(groups)[0]} {worst['name']}"


def kind_of_groups(groups: Mapping[str, Any]) -> tuple[str, str]:
    """Return what the groups of a run are called, as singular and plural."""
    return ("class", "classes") if groups["column"] == BY_LABEL else ("group", "groups")


def _suite_alone(summary: Mapping[str, Any]) -> str:
    """The robust accuracy under the suite alone, `standard@1: 92.0 %`, if other passes broke more."""
    suite_estimate = summary["metrics"].get("suite_robust_accuracy")
    if suite_estimate is None or suite_estimate["value"] == summary["metrics"]["robust_accuracy"]["value"]:
        return ""
    return f"; {summary['suite'] or 'the list of attacks'}: {percent(suite_estimate['value'])}"


def all_attacks_text(threat: Mapping[str, Any]) -> str:
    """Return the words for the attacks of a run in a sentence of a report: `every attack tried` or `every corruption
    tried`.
    """
    return f"every {'corruption' if threat['norm'] == 'Corruptions' else 'attack'} tried"


def condition_text(gate: Mapping[str, Any]) -> str:
    """Return the condition of a gate in words, such as `at least 50 % robust accuracy`."""
    if gate["versus"] == "before":
        return f"the verdict {gate['condition']}"
    comparison = "at least" if gate["relation"] == ">=" else "at most"
    bound = shown(gate["metric"], gate["bound"]).replace(".0 %", " %")
    at = ""
    if gate["eps"] is not None and gate["metric"] == "object_recall":
        at = f" for objects of at least {gate['eps']:g} x {gate['eps']:g} pixels"
    elif gate["eps"] is not None:
        at = f" at eps {size(gate['eps'], decibels=gate['decibels'])}"
    reference = f" against the {gate['versus']}" if gate["versus"] else ""
    return f"{comparison} {bound} {uncapitalized(label(gate['metric']))}{at}{reference}"


def open_doubts(summary: Mapping[str, Any]) -> list[str]:
    """Return the names of the doubts of a run that were raised and that the user has not accepted."""
    return [
        doubt["name"]
        for doubt in summary["doubts"]
        if doubt["state"] == "raised" and doubt["name"] not in summary["accepted_doubts"]
    ]


def unmeasured_doubts(summary: Mapping[str, Any]) -> list[str]:
    """Return the names of the doubts that were not measured and that could invalidate a gate that passed. Doubts that
    need a surrogate are left out.
    """
    passed = [gate for gate in summary["gates"] if gate["verdict"] == "pass"]
    return [
        doubt["name"]
        for doubt in summary["doubts"]
        if doubt["state"] == "not measured"
        and not doubt_test(doubt["name"]).needs_surrogate
        and any(depends_on(gate["metric"], gate["relation"], doubt["name"]) for gate in passed)
    ]


def doubted(gate: Mapping[str, Any]) -> bool:
    """Return whether a gate is unclear only because of raised doubts that the user has not accepted."""
    low, high = number(gate["estimate"]["low"]), number(gate["estimate"]["high"])
    bound = number(gate["bound"])
    if gate["versus"] == "before":
        return gate["verdict"] == "unclear" and low > bound
    return gate["verdict"] == "unclear" and (low >= bound if gate["relation"] == ">=" else high <= bound)


def why(gate: Mapping[str, Any], doubts: Sequence[str]) -> str:
    """Return the reason for the verdict of a gate in words, such as the position of the confidence interval relative to
    the threshold.
    """
    scope = f"; {SCOPES[gate['scope']]}" if gate["scope"] else ""
    return f"{_because(gate, interval_of_gate(gate), doubts)}{scope}{_looks_text(gate.get('looks'))}"


def _looks_text(looks: Mapping[str, Any] | None) -> str:
    if looks is None:
        return ""
    n = f"{looks['of']:,} example{'s' * (looks['of'] != 1)}"
    return (
        f"; it was judged at look {looks['look']}, after {looks['examples']:,} of {n}, by an interval that is valid at "
        "every look"
    )


SCOPES: Mapping[str, str] = {
    "every pass": "compared by the adversarial examples of every pass, because both runs have the same passes",
    "suite only": "compared by the suites' own robust accuracies, because the runs do not have the same passes",
}
"""Text on which adversarial examples count in a comparison of two runs, for each scope."""


def _because(gate: Mapping[str, Any], interval_text: str, doubts: Sequence[str]) -> str:
    if doubted(gate):
        return f"the interval ({interval_text}) meets the threshold, but doubts are open: {', '.join(doubts)}"
    if gate["versus"] == "before":
        place = {"pass": "is above", "unclear": "contains", "fail": "is below"}[gate["verdict"]]
        return f"the interval of the difference from the given model ({interval_text}) {place} 0"
    if gate["verdict"] == "unclear" and (few := gate.get("too_few")) is not None:
        return shortage(gate["metric"], few["counts"], few["needed"])
    if gate["verdict"] == "unclear":
        return f"the interval ({interval_text}) contains the threshold; more examples are needed to decide"
    return f"the whole interval ({interval_text}) {'meets' if gate['verdict'] == 'pass' else 'misses'} the threshold"


def headline(summary: Mapping[str, Any]) -> str:
    """Return the result of a run in one sentence: the main metric, the gates and the verdict. For a hardened model, the
    verdict on its training and what would help come first.
    """
    training = summary.get("training")
    result = _headline(summary)
    return result if training is None else sentences(training["message"], training["help"], result)


def _headline(summary: Mapping[str, Any]) -> str:
    gates, result = summary["gates"], _meaning(summary, measured(summary))
    if not gates:
        return f"{result}; no gate was set."
    if len(gates) == 1:
        sentence = f"{result}; the gate requires {_brief(gates[0], summary)}: {gates[0]['verdict']}"
    else:
        sentence = f"{result}; {_tally(gates)}"
    doubts = open_doubts(summary)
    if summary["verdict"] == "unclear" and doubts and any(doubted(gate) for gate in gates):
        sentence += f", because of open doubts ({', '.join(doubts)})"
    accepted = sorted(summary["accepted_doubts"])
    if accepted:
        sentence += f". Accepted doubts: {', '.join(accepted)}"
    return f"{sentence}{_unmeasured(summary)}."


def title(summary: Mapping[str, Any]) -> str:
    """Return the main result of a run in a short sentence, as the title of a page that shows interval, gates and doubts
    separately.
    """
    return f"{_meaning(summary, measured(summary, intervals=False))}{_unmeasured(summary)}."


def _unmeasured(summary: Mapping[str, Any]) -> str:
    """Statement on the doubts that the verdict depends on and that were not measured; empty if there are none."""
    names = unmeasured_doubts(summary)
    return f". Doubts that were not measured: {', '.join(names)}" if names else ""


def _meaning(summary: Mapping[str, Any], result: str) -> str:
    meaningless = _meaningless(summary)
    return f"not meaningful: {meaningless}; {result}" if meaningless else result


def _meaningless(summary: Mapping[str, Any]) -> str:
    """Reason why the robust accuracy is not meaningful, from the open doubts; empty if it is meaningful."""
    doubts = {doubt["name"]: doubt for doubt in summary["doubts"]}
    ranks = {name: doubt_test(name).meaningless for name in open_doubts(summary)}
    meaningless = sorted(filter(ranks.get, ranks), key=ranks.__getitem__)
    return uncapitalized(str(doubts[meaningless[0]]["title"])) if meaningless else ""


def _tally(gates: Sequence[Mapping[str, Any]]) -> str:
    """The verdicts of the gates: `1 of 3 gates fails, 2 pass: fail`, or `all 3 gates pass`."""
    verbs = {"fail": ("fails", "fail"), "unclear": ("is unclear", "are unclear"), "pass": ("passes", "pass")}
    counted = {verdict: sum(gate["verdict"] == verdict for gate in gates) for verdict in verbs}
    present = [verdict for verdict, n in counted.items() if n]
    if len(present) == 1:
        return f"{'both' if len(gates) == 2 else f'all {len(gates)}'} gates {verbs[present[0]][1]}"
    (first, verb), *others = ((verdict, verbs[verdict][counted[verdict] > 1]) for verdict in present)
    rest = ", ".join(f"{counted[verdict]} {other}" for verdict, other in others)
    return f"{counted[first]} of {len(gates)} gates {verb}, {rest}: {first}"


def _brief(gate: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """The claim, without the name of the metric if the sentence already contains it and the claim ends with it."""
    stated = gate["metric"] == main_metric(summary) and gate["eps"] is None and not gate["versus"]
    text = condition_text(gate)
    return text.removesuffix(f" {uncapitalized(label(gate['metric']))}") if stated else text


def _limited(kind: str, limits: Mapping[str, Any]) -> str:
    """The allowed changes of a threat model that is not a ball."""
    if kind == "Patch":
        places = {
            "anywhere": "anywhere",
            "centre": "in its centre",
            "on": "with its centre on an object",
            "beside": "beside all objects",
        }
        at = places.get(limits["at"], f"at {limits['at']}")
        around = f", within {limits['jitter']} pixels of that" if limits["jitter"] else ""
        if "within" in limits:
            around += ", inside the rectangle from pixel {} to {}".format(*limits["within"].split("-"))
        pixels = f"{limits['height']}x{limits['width']} pixels of an image"
        if "shape" in limits:
            pixels = f"the pixels of the shape {limits['shape'].removeprefix('@')} in {pixels}"
        colours = {"": "any values", "default": "colours that printers can print"}.get(
            limits.get("printable", ""), f"the colours in {limits.get('printable', '').removeprefix('@')}"
        )
        return f"may replace {pixels} with {colours}, {at}{around}"
    if kind == "Table":
        return (
            f"may change a row of the table as the rules in {limits['file']} allow, with a budget of "
            f"{size(limits['eps'])}"
        )
    if kind == "Stamped":
        return f"adds the trigger in {limits['file']} to an input, and changes nothing else"
    if kind == "ByteChanges":
        return _of_bytes(limits)
    if kind == "WordEmbeddings":
        return (
            f"may change the embedding of any one word, by at most {size(limits['eps'])} in {limits['norm']}"
        )
    if kind == "TextEdits":
        return _TEXT_CHANGES[next(name for name in _TEXT_CHANGES if name in limits)].format(**limits)
    changes = [_CHANGES[name].format(size(limit)) for name, limit in limits.items()]
    return f"may {', and '.join(changes)}"


def _of_bytes(limits: Mapping[str, Any]) -> str:
    """The allowed changes of the bytes of a file."""
    changes = [
        text.format(count_text(limits[name]))
        for name, text in (
            ("change", "give {} of its bytes other values"),
            ("insert", "insert {} bytes at one place"),
            ("append", "append {} bytes"),
        )
        if name in limits
    ]
    rules = f", as the rules in {limits['file']} allow" if "file" in limits else ""
    return f"may change a file: {', and '.join(changes)} at most{rules}"


_AIMS: Mapping[str, str] = {
    "segmentation": "wrong classes of pixels",
    "detection": "objects that are not found",
    "regression": "the largest error",
    "multilabel": "wrong labels",
    "vanish": "objects that are not found",
    "fabricate": "boxes where no object is",
    "mislabel": "wrong labels of objects",
}
"""What an attacker aims for, by objective or by task."""


def threat_in_words(
    threat: Mapping[str, Any], surrogates: Sequence[Mapping[str, Any]], task: str = "classes"
) -> list[str]:
    """Return the assumptions of a threat model about the attacker in words, with one sentence for each assumption.
    `task` is that of the model.
    """
    eps = number(threat["eps"])
    ball = _BALLS.get(threat["norm"], "may change an input within " + threat["constraint"])
    if threat["limits"]:
        change = _limited(threat["norm"], threat["limits"])
    elif eps == float("inf"):
        change = f"looks for the smallest change in {threat['norm']} that breaks the model, of any size"
    else:
        values = "pixels of an image" if threat["per"] == "pixel" else "values of an input"
        change = ball.format(
            eps=size(eps, decibels=threat["decibels"]) if threat["norm"] != "L0" else count_text(eps),
            values=values,
        )
    goal = threat["goal"]
    aim = "any wrong class" if goal is None else f"class {goal}; no other class counts as success"
    objective = str(threat.get("objective", ""))
    if objective.startswith(MAP):
        aim = f"class {objective.removeprefix(MAP)} of all pixels"
    elif task != "classes":
        aim = _AIMS[objective or task]
    budget = query_budget(threat) or "any number of queries"
    return [
        f"The attacker {change}."
        + (
            ""
            if threat["norm"] in ("TextEdits", "ByteChanges", "TrainingSet", "WordEmbeddings")
            else " Every value stays inside the legal range of inputs."
        )
        + (f" Eps is in {threat['unit']}." if threat.get("unit") else ""),
        f"The attacker aims for {aim}.",
        f"The attacker {_ACCESS[threat['access']]}.",
        f"The attacker may use {budget}.",
        *(
            f"{beginning}: {', '.join(names)}."
            for beginning, member in (
                ("The attacker has surrogate models", False),
                ("Examples are also computed on each member of the model", True),
            )
            if (names := [card["name"] for card in surrogates if bool(card.get("member")) is member])
        ),
    ]


def query_budget(threat: Mapping[str, Any]) -> str:
    """Return the limit on queries of a threat model in words, or an empty string if there is no limit.

    >>> query_budget({"queries": 1_000})
    'at most 1,000 queries for each example in each attack'
    """
    queries = threat["queries"]
    if queries is None:
        return ""
    return f"at most {count_text(queries)} {'query' if queries == 1 else 'queries'} for each example in each attack"


def threat_syntax(threat: Mapping[str, Any]) -> str:
    """Return the threat model of a run in the syntax of the command line, such as `linf:8/255`."""
    return threat_text(threat["constraint"], threat["goal"], threat["access"], threat["queries"])


FIRST = frozenset(
    (
        "clean_accuracy",
        "rejection_rate",
        "detection_auroc",
        "detection_rate_at_5_percent",
        "oblivious_detection_rate_at_5_percent",
        "robust_accuracy",
        "certified_accuracy",
        "suite_robust_accuracy",
        "robustness_score",
        "worst_class",
        "worst_group",
        "attack_success_rate",
        "targeted_success_rate",
        "trigger_success_rate",
        "transfer_success",
        "robust_margin",
        "adversarial_radius",
        "corruption_error_rate",
        "worst_corruption",
        "mce",
        "regression",
        "clean_accuracy_drop",
        *OF_TASKS,
    )
)
"""Names of the metrics that reports show first, and a terminal by default."""
