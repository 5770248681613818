"""The report of a run as JUnit XML for CI systems, with gates and doubts as test cases.

The file contains a failure exactly if the exit code is not 0. CI systems show skipped cases as passed, so an `unclear`
gate is a failure of type `unclear`. A raised doubt alone is not a failure, but the gate that it affects is, so it is a
skipped case with the finding as its message. No case has more than one failure, since some readers ignore the others.
"""

from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree as ET

from holdfast.core.names import line
from holdfast.reports.numbers import number
from holdfast.reports.words import interval_of_gate, shown_of_gate


def junit_document(summary: Mapping[str, Any]) -> str:
    """Return the report of a run as JUnit XML, which is valid under the schemas of Jenkins and of the legacy reports of
    JUnit 5.
    """
    cases = [_assessment(summary)]
    cases += [_gate(gate) for gate in summary["gates"]]
    cases += [_doubt(doubt, summary["accepted_doubts"]) for doubt in summary["doubts"]]
    failures = sum(case.find("failure") is not None for case in cases)
    skipped = sum(case.find("skipped") is not None for case in cases)
    time = f"{number(summary['cost']['seconds']):.3f}"
    counted = {
        "tests": str(len(cases)),
        "failures": str(failures),
        "errors": "0",
        "skipped": str(skipped),
        "time": time,
    }
    root = ET.Element("testsuites", {"name": "holdfast"} | counted)
    suite = ET.SubElement(root, "testsuite", {"name": f"holdfast {summary['verb']}"} | counted)
    if summary["run"].get("created"):
        suite.set("timestamp", summary["run"]["created"].removesuffix("Z"))
    properties = ET.SubElement(suite, "properties")
    for name, value in _properties(summary).items():
        ET.SubElement(properties, "property", {"name": name, "value": value})
    suite.extend(cases)
    return xml_text(root)


def xml_text(root: ET.Element) -> str:
    """Return a document as XML, in which each text is on one line and without control characters, which XML cannot
    contain, and commands of CI systems.
    """
    for element in root.iter():
        element.text = line(element.text) if element.text else None
        for name, value in element.items():
            element.set(name, line(value))
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _properties(summary: Mapping[str, Any]) -> dict[str, str]:
    properties = {
        "verdict": summary["verdict"],
        "exit_code": str(summary["exit_code"]),
        "model": str(summary["model"].get("name", "")),
        "data": str(summary["data"].get("name", "")),
        "threat": summary["threat"]["constraint"],
        "suite": summary["suite"],
        "seed": str(summary["seed"]),
        "command": summary["reproduce"],
    }
    properties |= {f"accepted doubt {name}": why for name, why in summary["accepted_doubts"].items()}
    properties |= {f"metric {name}": f"{item['value']}" for name, item in summary["metrics"].items()}
    properties |= {
        f"robust_accuracy of class {row['name']}": f"{row['robust_accuracy']['value']}"
        for row in summary["per_class"]
    }
    return {name: value for name, value in properties.items() if value}


def _case(group: str, name: str, text: str) -> ET.Element:
    case = ET.Element("testcase", {"classname": f"holdfast.{group}", "name": name, "time": "0"})
    if text:
        ET.SubElement(case, "system-out").text = text
    return case


def _assessment(summary: Mapping[str, Any]) -> ET.Element:
    name = f"{summary['model'].get('name', 'model')} on {summary['data'].get('name', 'data')}"
    return _case("assessment", f"{name}, {summary['threat']['constraint']}", summary["headline"])


def _gate(gate: Mapping[str, Any]) -> ET.Element:
    text = f"{shown_of_gate(gate)}, interval {interval_of_gate(gate)}: {gate['message']}"
    if gate["verdict"] == "pass":
        return _case("gates", gate["condition"], text)
    case = _case("gates", gate["condition"], "")
    failure = ET.SubElement(
        case, "failure", {"type": gate["verdict"], "message": f"{gate['verdict']}: {text}"}
    )
    failure.text = f"{gate['condition']}: {text}"
    return case


def _doubt(doubt: Mapping[str, Any], accepted: Mapping[str, str]) -> ET.Element:
    name, state, text = doubt["name"], doubt["state"], doubt["message"] or doubt["title"]
    if state in ("clear", "answered"):
        return _case("doubts", name, text)
    if state == "raised" and name in accepted:
        return _case("doubts", name, f"accepted because {accepted[name]}. Measured: {text}")
    case = _case("doubts", name, "")
    ET.SubElement(case, "skipped", {"message": f"{state}: {text}"})
    return case
