"""The files for operators: every metric in the dashboard and in the alert rules exists, with its labels."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from holdfast.serving.rules import Rule
from holdfast.serving.telemetry import METRICS, MetricTotals, Telemetry

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
OF_PROMETHEUS = {"instance", "job", "le"}


def alerts():
    (group,) = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
    return {rule["alert"]: rule["expr"] for rule in group["rules"]}


def panels():
    board = json.loads((DEPLOY / "dashboard.json").read_text())
    variable = {entry["name"]: entry.get("definition", "") for entry in board["templating"]["list"]}
    return {
        panel["title"]: [target["expr"] for target in panel["targets"]] for panel in board["panels"]
    }, variable


def samples():
    """The names of the samples on `/metrics` of a server whose guard has a rule, with their labels."""
    telemetry, totals = Telemetry(), MetricTotals()
    telemetry.begin({"queries": Rule("queries")})
    telemetry.set("holdfast_pool_alarm", 0, "empty")
    totals.add("worker-1", telemetry.report())
    families = text_string_to_metric_families(totals.text().decode())
    return {sample.name: {*sample.labels} for family in families for sample in family.samples}


def test_every_metric_of_the_dashboard_and_of_the_alerts_exists_with_its_labels():
    boards, variables = panels()
    known, used = samples(), set()
    expressions = [
        *alerts().values(),
        *(each for several in boards.values() for each in several),
        *variables.values(),
    ]
    for expression in expressions:
        names = set(re.findall(r"\bholdfast_\w+", expression))
        assert names <= {*known}, names - {*known}
        labels = {label for name in names for label in known[name]} | OF_PROMETHEUS
        given = re.findall(r"(\w+)\s*[=!]~?\s*\"", expression)
        for group in re.findall(r"\b(?:by|ignoring)\s*\(([^)]*)\)", expression):
            given += re.split(r",\s*", group)
        assert {*given} <= labels, (expression, {*given} - labels)
        used |= {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}
    assert used == {*METRICS}  # a metric that no panel and no alert shows is of no use


def test_every_alert_is_explained():
    page = (DEPLOY.parent / "docs" / "how-to" / "operate.md").read_text(encoding="utf-8")
    assert {*re.findall(r"`(Holdfast\w+)`", page)} == {*alerts()}


def test_promtool_accepts_the_rules_and_the_configuration(tmp_path):
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian's package prometheus)")
    for kind, name in (("rules", "alerts.yml"), ("config", "prometheus.yml")):
        done = subprocess.run(
            [promtool, "check", kind, DEPLOY / name], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
