"""Reports as JUnit XML for CI systems, with gates and doubts as test cases.

The file contains a failure exactly if the exit code is not 0. CI systems show skipped cases as passed, so an `unclear`
gate is a failure of type `unclear`. A raised doubt alone is not a failure, but the gate that it affects is, so it is a
skipped case with the finding as its message. No case has more than one failure, since some readers ignore the others.
"""

from typing import TextIO
from xml.etree import ElementTree as ET

from holdfast.core.names import line
from holdfast.reports.tree import Check, Report


def render(report: Report, file: TextIO) -> None:
    """Write a report as JUnit XML, which is valid under the schemas of Jenkins and of the legacy reports of JUnit 5."""
    group, name = report.case or (report.verb, report.about)
    checks = [Check(group, name, "pass", report.headline), *report.checks]
    states = [check.state for check in checks]
    counted = {
        "tests": str(len(checks)),
        "failures": str(states.count("fail") + states.count("unclear")),
        "errors": "0",
        "skipped": str(states.count("skipped")),
        "time": f"{report.seconds:.3f}",
    }
    root = ET.Element("testsuites", {"name": "holdfast"} | counted)
    suite = ET.SubElement(root, "testsuite", {"name": f"holdfast {report.verb}"} | counted)
    if report.created:
        suite.set("timestamp", report.created.removesuffix("Z"))
    properties = ET.SubElement(suite, "properties")
    for name, value in report.properties.items():
        if value:
            ET.SubElement(properties, "property", {"name": name, "value": value})
    suite.extend(map(_case, checks))
    for element in root.iter():  # XML cannot contain control characters, and CI systems obey some lines
        element.text = line(element.text) if element.text else None
        for name, value in element.items():
            element.set(name, line(value))
    ET.indent(root)
    file.write(f'<?xml version="1.0" encoding="UTF-8"?>\n{ET.tostring(root, encoding="unicode")}\n')


def _case(check: Check) -> ET.Element:
    case = ET.Element("testcase", {"classname": f"holdfast.{check.group}", "name": check.name, "time": "0"})
    if check.state == "skipped":
        ET.SubElement(case, "skipped", {"message": check.text})
    elif check.state == "pass":
        if check.text:
            ET.SubElement(case, "system-out").text = check.text
    else:
        message = f"{check.state}: {check.text}"
        failure = ET.SubElement(case, "failure", {"type": check.state, "message": message})
        failure.text = f"{check.name}: {check.text}"
    return case
