"""The reports of an audit and of a monitored stream."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from holdfast.core.catalogue import AUDITS, SAMPLE_TESTS
from holdfast.core.names import line
from holdfast.reports import tree
from holdfast.reports.charts import LOOKS, growth, rates
from holdfast.reports.tree import Check, Facts, Group, Items, Paragraph, Report, Section, Table
from holdfast.reports.words import VERDICTS, capitalized, count_text, percent, plain, value_text

Json = Mapping[str, Any]

AUDIT_VERSION = 1
"""Version of the format. It is increased if a reader of the previous version would misinterpret the new one."""

NOT_COMPUTED_AGAIN = (
    "The pictures are stored with the audit. When it is opened, everything else in this report is computed again from "
    "the stored measurements; of the pictures only the digest is compared."
)
"""sentence of reports with pictures"""
_TONES: Mapping[str, tree.Tone] = {"flagged": "fail", "not flagged": "pass", "unclear": "unclear"}
"""tone of a report for each verdict"""


def headline(content: Json) -> str:
    """Return the result in one sentence, after the verdict."""
    return line(f"{_word(content)}: {content['headline']}")


def _word(content: Json) -> str:
    verdict: str = content["verdict"]
    return capitalized(AUDITS[content["kind"]].words.get(verdict, verdict))


def failing_gate(content: Json) -> str:
    """Return the gate that would fail if it was set; empty if a gate was set, or if the audit is not flagged."""
    flagged_without_gate = content["verdict"] == "flagged" and not content["gates"]
    return AUDITS[content["kind"]].gate if flagged_without_gate else ""


def audit_report(content: Json) -> tree.Report:
    """Return the report of an audit with the given content."""
    entry = AUDITS[content["kind"]]
    tone = _TONES[content["verdict"]] if entry.judges else content["gate_verdict"] or "no gate"
    model, data = content["model"], content["data"]
    return tree.Report(
        verb="audit",
        about=f"{entry.noun or f'audit {entry.name}'} of {model['name']} on {data['name']}",
        headline=headline(content),
        title=content["headline"],
        content=content,
        tone=tone,
        badge=(VERDICTS[tone][0], _word(content)),
        lead=[*_lead(content)],
        sections=[*_sections(content)],
        case=(entry.noun or "audit", content["kind"]),
        checks=[
            tree.Check("gates", gate["gate"], gate["verdict"], gate["because"]) for gate in content["gates"]
        ],
        properties={
            "verdict": content["verdict"],
            "seed": str(content["seed"]),
            "pictures": NOT_COMPUTED_AGAIN if content["pictures"] else "",
        },
        created=content["created"],
    )


def _lead(content: Json) -> Iterator[tree.Block]:
    """The reasons for the verdict, and the gates."""
    gates = [f"{VERDICTS[g['verdict']][0]} {g['gate']}: {g['because']}" for g in content["gates"]]
    for title, texts in (("Why", content["reasons"]), ("Gates", gates)):
        if texts:
            yield tree.Group(title, (tree.Items(texts),))


def _sections(content: Json) -> Iterator[tree.Section]:
    yield from (tree.Section(curve["title"], (_chart(curve),), depth="page") for curve in content["curves"])
    yield from (_pictures(picture) for picture in content["pictures"])
    for table in content["tables"]:
        rows = [[value_text(cell) for cell in row] for row in table["rows"]]
        texts = frozenset(range(1, len(table["headings"])) if table["texts"] else ())
        blocks: list[tree.Block] = [tree.Table(table["headings"], rows, texts=texts, depth="notebook")]
        blocks += [tree.Paragraph(table["note"])] if table["note"] else []
        yield tree.Section(table["title"], blocks, depth="notebook")
    for title, texts in (("What this does not show", content["limits"]), ("Notes", content["notes"])):
        if texts:
            yield tree.Section(title, (tree.Items(texts),))
    identity = {
        **{
            name: f"{content[name]['name']}, digest {content[name]['digest'][:16]}"
            for name in ("model", "data")
        },
        "seed": str(content["seed"]),
        "versions": ", ".join(f"{name} {version}" for name, version in content["versions"].items()),
    }
    yield tree.Section(
        "Measured" if AUDITS[content["kind"]].verb else "Audited",
        (tree.Facts([*identity.items()]),),
        depth="page",
    )


def _chart(curve: Json) -> tree.Chart:
    of_counts = "least" not in curve
    drawings = growth(curve["lines"]) if of_counts else rates(curve["lines"], curve["least"])
    names = [path.title for path in drawings[0][1].paths]
    lines = ", ".join(f"{name} ({LOOKS[place % 3]} line)" for place, name in enumerate(names))
    axes = "a logarithmic axis" if of_counts else "logarithmic axes"
    alternative = f"{curve['upward']} by {curve['across']}, on {axes}."
    return tree.Chart(drawings, curve["across"], alternative, f"{curve['upward']}: {lines}. {curve['note']}")


def _pictures(picture: Json) -> tree.Section:
    images = [tree.Picture(image["png"], image["caption"]) for image in picture["images"]]
    n = picture["together"]
    blocks = [tree.Pictures(images[start : start + n]) for start in range(0, len(images), n)]
    return tree.Section(picture["title"], blocks, depth="page")


MONITORING_VERSION = 1
"""Version of the format. It is increased if a reader of the previous version would misinterpret the new one."""

NEXT = {
    "inputs": "Compare inputs after the alarm with those of the reference: did the source, the preprocessing or the "
    "users change?",
    "embeddings": "Compare inputs after the alarm with those of the reference: they differ in what the model uses.",
    "predictions": "Compare the shares of the predicted classes with those of the reference.",
    "distance": "Look at the inputs after the alarm: they are unlike those of the reference, or suspiciously alike.",
    "missing values": "Compare the columns with missing values after the alarm with those of the reference: did a "
    "source of the data fail, or its format change?",
    "confidence": "Look at inputs of low confidence after the alarm.",
    "copies": "Compare the samples with the nearest examples of the reference: the generator returns them.",
    "repeats": "Look at samples that repeat others: the generator may have collapsed to few of them.",
    "error": "The accuracy changed: label more recent samples, and look at the error of each class.",
}
"""what to do after an alarm, by the view of its signal"""
_PARTS = {
    "inputs": "its inputs",
    "embeddings": "the embeddings of its inputs",
    "predictions": "the predicted classes",
    "distance": "the distance of the inputs from the reference",
    "missing values": "the share of missing values",
    "confidence": "the confidence of the model",
    "copies": "the share of copies of the reference",
    "repeats": "the share of repeated samples",
    "error": "the accuracy of the model",
}
"""what differs after an alarm, by the view of its signal"""
_RETRAIN = (
    "If the change is lasting, assess the model on labelled samples after the alarm (holdfast assess), train or harden "
    "it with them, and monitor with a new reference."
)
_AUDIT = "Audit the generator (holdfast audit generator) before further samples are used."
_ATTACK = (
    "If clients may attack the model, compare the alarm with the flagged requests of the guard before samples of the "
    "stream are used for training."
)
CBPE_LIMIT = (
    "The expected accuracy assumes that a confidence means the same as on the reference. It is invalid under attack, "
    "and if the meaning of the classes changed."
)


def monitoring_headline(content: Mapping[str, Any]) -> str:
    """Return the result in one sentence."""
    stream, decisive = content["stream"], content["decisive"]
    compared = (
        f"{count_text(stream['n'])} samples of {stream['name']}, compared with {content['reference']['name']}"
    )
    alarms = [test for test in content["tests"] if test["name"] in decisive and test["alarm"]]
    if not alarms:
        several = f"s {', '.join(decisive[:-1])} and" if len(decisive) > 1 else ""
        tests = f"test{several} {decisive[-1]}"
        return line(f"The {tests} found no difference in {compared}.")
    first = min(alarms, key=lambda test: int(test["alarm"]["after"]))
    alarm = first["alarm"]
    part = _PARTS.get(alarm["view"], alarm["view"])  # a report may be of another version
    signal = "" if alarm["signal"] == alarm["view"] else f" ({alarm['signal']})"
    return line(
        f"The stream differs from the reference in {part}{signal}: alarm of the test {first['name']} after "
        f"{count_text(alarm['after'])} of {compared}."
    )


def next_steps(content: Mapping[str, Any]) -> list[str]:
    """Return what to do after an alarm; an empty list without one."""
    views = [test["alarm"]["view"] for test in content["tests"] if test["alarm"]]
    if not views:
        return []
    generated = any(test["name"] in SAMPLE_TESTS for test in content["tests"])
    last = [_AUDIT] if generated else [_RETRAIN, _ATTACK]
    return [*dict.fromkeys(NEXT[view] for view in views), *last]


def monitoring_report(content: Mapping[str, Any]) -> Report:
    """Return the report of a monitored stream with the given content."""
    tests, steps = content["tests"], next_steps(content)
    return Report(
        verb="monitor",
        about=f"monitoring of {content['stream']['name']}",
        headline=monitoring_headline(content),
        content={**content, "next": steps},
        tone="fail" if content["verdict"] == "alarm" else "pass",
        lead=(Group("What to do", (Items(steps),)),) if steps else (),
        sections=[*_stream_sections(content)],
        checks=[
            Check(
                "tests",
                test["name"],
                "fail" if test["alarm"] else "pass" if test["state"] != "too few samples" else "skipped",
                " ".join(_result(test)).strip(),
            )
            for test in tests
            if test["name"] in content["decisive"]
        ],
    )


def _stream_sections(content: Mapping[str, Any]) -> Iterator[Section]:
    tests = content["tests"]
    found = Table(
        ("test", "result", "after", "signal", "evidence"),
        [(test["name"], *_result(test)) for test in tests],
        texts=frozenset({1, 3, 4}),
        depth="notebook",
    )
    power = Table(
        ("test", "shifted signal", "shift", "drop of accuracy", "false alarms"),
        [(test["name"], *_power(test["power"])) for test in tests if test["name"] not in SAMPLE_TESTS],
        texts=frozenset({1}),
    )
    yield Section("Tests", (found,), depth="notebook")
    yield Section("Power: smallest change found within 1,000 samples", (power,))
    yield from _accuracies(content)
    limit = (Paragraph(CBPE_LIMIT),) if content["expected"] else ()
    yield Section("Guarantees", (Facts(guarantees(content)), *limit))
    if content["notes"]:
        yield Section("Notes", (Items(content["notes"]),))


def _result(test: Mapping[str, Any]) -> tuple[str, str, str, str]:
    if test["state"] == "too few samples":
        return f"needs {count_text(test['fewest'])} samples", "", "", ""
    alarm = test["alarm"]
    if alarm is None:
        return "no alarm", "", "", ""
    return "alarm", count_text(alarm["after"]), alarm["signal"], alarm["evidence"]


def _power(power: Mapping[str, Any] | None) -> tuple[str, str, str, str]:
    if power is None:
        return "not computed yet", "", "", ""
    shift = "above 3 sd" if power["shift"] is None else f"{plain(power['shift'])} sd"
    drop = "none" if power["drop"] is None else f"{plain(100 * power['drop'])} points"
    if power["errors"] and power["drop"] is None:
        drop = "above 50 points"
    false_alarms = "" if power["false_alarms"] is None else f"{power['false_alarms']} of 20"
    return power["signal"], shift, drop, false_alarms


def _accuracies(content: Mapping[str, Any]) -> Iterator[Section]:
    rows = [
        (
            name,
            percent(estimate["value"]),
            f"{percent(estimate['low'])} to {percent(estimate['high'])}",
            error,
        )
        for name, estimate, error in _rows_of_accuracy(content)
    ]
    if rows:
        yield Section("Accuracy", (Table(("on", "accuracy", "95 % interval", "calibration error"), rows),))
    if content["measured"]:
        before = {row["name"]: row["error"] for row in (content["of_reference"] or {"errors": ()})["errors"]}
        errors = [_row_of_class(row, before) for row in content["measured"]["errors"]]
        headings = ("class", "samples", "stream", "interval", "reference")
        yield Section("Error of each class", (Table(headings, errors),))


def _rows_of_accuracy(content: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any], str]]:
    rows = []
    for name, key in (("reference", "of_reference"), ("stream, with labels", "measured")):
        if content[key]:
            rows.append((name, content[key]["accuracy"], plain(content[key]["calibration_error"])))
    if content["expected"]:
        rows.append(("stream, expected (invalid under attack)", content["expected"], ""))
    return rows


def _row_of_class(row: Mapping[str, Any], before: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    error, name = row["error"], row["name"]
    interval = f"{percent(error['low'])} to {percent(error['high'])}"
    of_reference = percent(before[name]["value"]) if name in before else ""
    return name, count_text(error["n"]), percent(error["value"]), interval, of_reference


def guarantees(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the name of each test with what it compares and its guarantee."""
    return [
        (test["name"], f"Compares {test['compares']}. {test['guarantee']}{_restarted(test['restarted'])}")
        for test in content["tests"]
    ]


def _restarted(names: Sequence[str]) -> str:
    """A sentence on the series whose detectors began again while they read the reference; empty if there are none."""
    if not names:
        return ""
    return (
        f" It detected a change of the {' and the '.join(names)} while it read the reference, and began again: it "
        "compares the stream with fewer samples of the reference."
    )
