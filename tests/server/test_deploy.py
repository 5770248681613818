"""The files for operators: every metric in the dashboard and in the alert rules exists, with its labels."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from holdfast.cli.app import run, verbs
from holdfast.cli.measure import settings_of_flags
from holdfast.cli.operate import serve
from holdfast.guard.rules import Rule
from holdfast.server.telemetry import METRICS, MetricTotals, Telemetry
from holdfast.server.traffic import Profile
from holdfast.settings.grammar import seconds
from holdfast.settings.guard_settings import check_guard_settings
from holdfast.verbs.settings import Serve
from waiting import until

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
    telemetry.set("holdfast_not_ready", 0, "audit")
    telemetry.set("holdfast_monitor_alarm", 0, "martingale")
    Profile().report(telemetry)
    totals.follow("worker-1", telemetry.memory)
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


@pytest.mark.parametrize(("page", "file"), [("serving", "demo-guard"), ("loop", "demo-loop-guard")])
def test_the_guards_of_the_tutorials_are_those_of_the_demonstrations(page, file):
    text = (DEPLOY.parent / "docs" / "tutorials" / f"{page}.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    demonstration = (DEPLOY / f"{file}.yaml").read_text()
    assert yaml.safe_load(block) == yaml.safe_load(demonstration)
    assert check_guard_settings(yaml.safe_load(block), "guard").rules.queries.action == "flag"


@contextmanager
def demonstration(folder):
    """The server of the demonstration: its ports, and what it printed."""
    ports = [free_port(), free_port()]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    server = subprocess.Popen(
        [DEPLOY / "demo-serve.sh", folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PATH": path, "PORT": str(ports[0]), "ADMIN_PORT": str(ports[1])},
    )
    try:
        shown = ""
        while "metrics:" not in shown:
            line = server.stdout.readline()
            assert line, shown
            shown += line
        yield ports, shown
    finally:
        server.terminate()
        assert server.wait(60) == 0
        server.stdout.close()


@pytest.mark.slow
def test_the_demonstration_serves_the_bundled_model_and_prints_a_command_with_a_key(tmp_path):
    with demonstration(tmp_path / "demo") as (ports, shown):
        attacker, operator = re.findall(r"hf_[\w-]+", shown)
        answer = httpx.get(
            f"http://127.0.0.1:{ports[0]}/v2/models/mnist-cnn",
            headers={"Authorization": f"Bearer {attacker}"},
        )
        assert answer.json()["name"] == "mnist-cnn"
        fired = 'holdfast_rule_fired_total{mode="enforce",rule="queries"} 0.0'
        key = {"Authorization": f"Bearer {operator}"}
        # workers report every half second
        until(lambda: fired in httpx.get(f"http://127.0.0.1:{ports[1]}/metrics", headers=key).text)
        command = shown[shown.index("holdfast assess") :].split("\n\n")[0].replace("\\\n", " ")
        assert run([*shlex.split(command)[1:], "--dry-run"]) == 2  # KEY is not set
        os.environ["KEY"] = f"Bearer {attacker}"
        try:
            assert run([*shlex.split(command)[1:-2], "--dry-run"]) == 0
        finally:
            del os.environ["KEY"]


@pytest.mark.slow
def test_schemathesis_finds_no_fault_in_the_server_with_guard_and_keys(tmp_path):
    schemathesis = shutil.which("schemathesis")
    if schemathesis is None:
        pytest.skip("schemathesis is not installed (from PyPI, in an environment of its own)")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance"
    checks += ",response_schema_conformance,negative_data_rejection"
    with demonstration(tmp_path / "demo") as (ports, shown):
        key = re.findall(r"hf_[\w-]+", shown)[0]
        done = subprocess.run(
            [
                *(schemathesis, "run", f"http://127.0.0.1:{ports[0]}/openapi.json"),
                *("--header", f"Authorization: Bearer {key}", "--checks", checks),
                *("--max-examples", "40", "--seed", "1", "--no-color"),
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No issues found" in done.stdout


def documents():
    """The Kubernetes objects by kind and name."""
    files = [path for path in (DEPLOY / "kubernetes").glob("*.yaml") if path.stem != "kustomization"]
    return {
        (each["kind"], each["metadata"]["name"]): each
        for path in files
        for each in yaml.safe_load_all(path.read_text())
    }


def dockerfile():
    """The instructions of the Dockerfile as pairs of a keyword and its text."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    return [tuple(line.split(maxsplit=1)) for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def unit():
    """The settings of the systemd unit, of which some occur several times."""
    lines = (DEPLOY / "holdfast.service").read_text().splitlines()
    return [tuple(line.split("=", 1)) for line in lines if re.match(r"\w+=", line)]


def compose():
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]


def commands():
    """The arguments of `holdfast` in each recipe."""
    (pod,) = documents()["StatefulSet", "holdfast"]["spec"]["template"]["spec"]["containers"]
    return {
        "Dockerfile": json.loads(dict(dockerfile())["CMD"]),
        "compose": compose()["serve"]["command"],
        "kubernetes": pod["args"],
        "systemd": shlex.split(dict(unit())["ExecStart"])[1:],
    }


@pytest.mark.parametrize("recipe", ["Dockerfile", "compose", "kubernetes", "systemd"])
def test_the_command_of_each_recipe_is_valid(recipe):
    command, *arguments = commands()[recipe]
    assert command == "serve"
    flags = serve.make_context("serve", arguments, verbs.make_context("holdfast", ["serve"])).params
    settings = settings_of_flags(flags, Serve)
    assert settings.keys and settings.audit and settings.guard and settings.log_format == "json"


def test_recipes_wait_for_the_drain_before_they_kill_the_server():
    pod = documents()["StatefulSet", "holdfast"]["spec"]["template"]["spec"]
    (_, pause) = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    drain_s = sum(seconds(text, "drain") for text in ("5s", Serve.model_fields["drain"].default)) + 10
    assert "--drain-delay=5s" in pod["containers"][0]["args"]
    assert pod["terminationGracePeriodSeconds"] >= int(pause) + drain_s
    assert seconds(compose()["serve"]["stop_grace_period"], "stop") >= drain_s
    assert int(dict(unit())["TimeoutStopSec"]) >= drain_s


def test_the_containers_have_no_rights_and_no_secrets():
    instructions = dockerfile()
    assert (
        dict(instructions)["USER"] == "10001:10001"
        and "/v2/health/ready" in dict(instructions)["HEALTHCHECK"]
    )
    root, ignored = DEPLOY.parent, (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    for text in (text for keyword, text in instructions if keyword == "COPY" and "--from" not in text):
        for source in text.split()[:-1]:
            assert (root / source).exists() and f"!{Path(source).parts[0]}" in ignored
    assert {"**/*.key", "**/keys.json*"} < {*ignored}
    for service in compose().values():
        assert service["read_only"] and service["cap_drop"] == ["ALL"]
        assert all("${" in value or value.isdigit() for value in service["environment"].values())
    for (kind, _), content in documents().items():
        if kind == "StatefulSet":
            pod = content["spec"]["template"]["spec"]
            assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
            for container in (*pod.get("initContainers", ()), *pod["containers"]):
                rights = container["securityContext"]
                assert rights["readOnlyRootFilesystem"] and rights["capabilities"] == {"drop": ["ALL"]}
                assert not rights["allowPrivilegeEscalation"] and container["resources"]["limits"]["memory"]


def test_names_in_the_manifests_are_those_of_objects_that_exist():
    every = documents()
    secret = every["Secret", "holdfast"]["stringData"]
    guard = yaml.safe_load((DEPLOY / "served" / "guard.yaml").read_text())
    variable = guard["state"]["at"].removeprefix("env:")
    assert check_guard_settings(guard, "guard").rules.queries.action == "flag"
    assert variable in compose()["serve"]["environment"]
    kinds = {"StatefulSet": ("spec", "selector", "matchLabels"), "Service": ("spec", "selector")}
    for (kind, name), content in every.items():
        labels = content
        for key in kinds.get(kind, ()):
            labels = labels[key]
        if kind in kinds:
            assert labels == {"app": name.removesuffix("-pods")}
        if kind != "StatefulSet":
            continue
        assert ("Service", content["spec"]["serviceName"]) in every
        pod = content["spec"]["template"]["spec"]
        volumes = {each["name"] for each in pod.get("volumes", ())}
        volumes |= {each["metadata"]["name"] for each in content["spec"]["volumeClaimTemplates"]}
        for container in pod["containers"]:
            ports = {each["name"] for each in container["ports"]}
            assert {each["name"] for each in container["volumeMounts"]} <= volumes
            for probe in (value for key, value in container.items() if key.endswith("Probe")):
                assert probe.get("httpGet", probe.get("tcpSocket", {"port": min(ports)}))["port"] in ports
            references = [
                each["valueFrom"]["secretKeyRef"] for each in container["env"] if "valueFrom" in each
            ]
            assert all(each["name"] == "holdfast" and each["key"] in secret for each in references)
    (serve_pod,) = every["StatefulSet", "holdfast"]["spec"]["template"]["spec"]["containers"]
    assert {variable, "HOLDFAST_GUARD_KEY"} < {each["name"] for each in serve_pod["env"]}


def test_the_manifests_follow_the_schema_of_kubernetes():
    schemas = pytest.importorskip("kubernetes_validate", reason="from PyPI, 110 MB")
    for content in documents().values():
        schemas.validate(content, schemas.latest_version(), strict=True)


def test_systemd_accepts_the_unit(tmp_path):
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed (Debian's package systemd)")
    text = (DEPLOY / "holdfast.service").read_text()
    here = tmp_path / "holdfast.service"
    here.write_text(text.replace("/opt/holdfast/bin/holdfast", sys.executable))  # which must exist
    done = subprocess.run([analyze, "verify", here], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def test_promtool_accepts_the_rules_and_the_configuration(tmp_path):
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian's package prometheus)")
    for kind, name in (("rules", "alerts.yml"), ("config", "prometheus.yml")):
        done = subprocess.run(
            [promtool, "check", kind, DEPLOY / name], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
