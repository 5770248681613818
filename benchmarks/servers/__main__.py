"""Run the servers of docs/tutorials/served-models.md, and compare each with the same model in the process.

    python -m benchmarks.servers VENV [SERVER …]

VENV is the environment of the servers. MLServer, LitServe and FastAPI are run unless servers are named; KServe and
MLflow are the others.

The code of the servers and the commands are those of the page. For each command one line says `right` or `WRONG`. Right
means: over HTTP and in the process the accuracies, the verdict of a gate and the queries of each attack are equal; and
the rows that a proxy in front of the server counted are those that the report states, with doubts and without. The exit
code is 1 if anything is wrong.
"""

import json
import os
import re
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import joblib
import numpy as np

import holdfast
from benchmarks.servers.counting import CountingProxy
from holdfast.core.types import Access

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tutorials" / "served-models.md"
THREAT, N = "linf:0.1,queries=100", 30
"""as the commands of the page say"""
SUITE, GATE, SEED = "black-box", "robust_accuracy >= 0.75", 0
STARTS_WITHIN_S = 180.0
ENDS_WITHIN_S = 600.0
Json = dict[str, Any]


@dataclass(frozen=True)
class Server:
    """How a server is started in a folder with the files of the page."""

    command: str
    ready: str
    """the path that answers with 200 once it serves"""
    before: str | None = None
    """a command that makes what it serves"""


SERVERS: Mapping[str, Server] = {
    "MLServer": Server("mlserver start .", "/v2/health/ready"),
    "LitServe": Server("python litserve_digits.py", "/health"),
    "FastAPI": Server("uvicorn fastapi_digits:app --port 8000", "/docs"),
    "KServe": Server("python kserve_digits.py", "/v2/health/ready"),
    "MLflow": Server(
        "mlflow models serve -m served -p 5000 --env-manager local", "/ping", "python mlflow_digits.py"
    ),
}
BY_DEFAULT = ("MLServer", "LitServe", "FastAPI")
"""those of requirements.txt beside this file; the others want other versions of the same packages"""


@dataclass(frozen=True)
class Case:
    """A command of the page, and the model that it asks, as an object of this process."""

    words: tuple[str, ...]
    """of `holdfast`"""
    model: Any

    @property
    def address(self) -> str:
        """The model's, as the page gives it."""
        return self.words[1]

    @property
    def access(self) -> Access:
        """What the server gives."""
        return "labels" if "--http-labels" in self.words else "scores"

    @property
    def name(self) -> str:
        """The library of the model, and what its server gives."""
        kind = "probabilities" if "probability" in self.words else self.access
        return f"{type(self.model).__module__.partition('.')[0]}, {kind}"

    def at(self, port: int) -> list[str]:
        """The words of the command, with a port of this machine in place of that of the page."""
        there = urlsplit(self.address).netloc
        return [word.replace(there, f"127.0.0.1:{port}") for word in self.words]


def main() -> int:
    """Check the servers that are named; 0 if all are right."""
    if len(sys.argv) < 2 or not set(sys.argv[2:]) <= set(SERVERS):
        print(__doc__, file=sys.stderr)
        return 2
    programs, wrong = Path(sys.argv[1]).resolve() / "bin", 0
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        page = PAGE.read_text(encoding="utf-8")
        sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
        models = made(blocks(page)["digits.py"])
        for name in sys.argv[2:] or BY_DEFAULT:
            cases = list(cases_of(sections[name], models))
            with running(SERVERS[name], sections[name], cases[0], programs) as port:
                for case in cases:
                    rows, faults = compared(case, port)
                    wrong += bool(faults)
                    print("WRONG" if faults else "right", f"{name}, {case.name}: {rows}", flush=True)
                    print(*(f"      {fault}\n" for fault in faults), sep="", end="", flush=True)
        os.chdir(PAGE.parent)
    return int(wrong > 0)


def blocks(text: str) -> dict[str, str]:
    """The files of a part of the page by their names: Python by its first line, settings of MLServer by their model."""
    python = re.findall(r"^```python\n(# (\S+)\n.*?)^```", text, re.MULTILINE | re.DOTALL)
    settings = re.findall(r"^```json\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    named = {f"{json.loads(content)['name']}/model-settings.json": content for content in settings}
    return {name: content for content, name in python} | named


def made(code: str) -> dict[str, Any]:
    """Train the models into the current folder, and return the objects by the names that the addresses hold."""
    Path("digits.py").write_text(code, encoding="utf-8")
    subprocess.run([sys.executable, "digits.py"], check=True)
    net = runpy.run_path("digits.py")["opened"]()
    return {"net": net, "estimator": joblib.load("digits.joblib")}


def cases_of(section: str, models: Mapping[str, Any]) -> Iterator[Case]:
    """The commands of a section."""
    for line in re.findall(r"^\$ holdfast (assess .*)$", section.replace("\\\n", ""), re.MULTILINE):
        words = tuple(shlex.split(line))
        assert THREAT in words and str(N) in words
        yield Case(words, models["estimator" if re.search("estimator|probability", line) else "net"])


@contextmanager
def running(server: Server, section: str, case: Case, programs: Path) -> Iterator[int]:
    """Write a server's files, start it, yield its port once it serves, and end it with all of its processes."""
    port, grpc, metrics = free_ports(3)
    there = str(urlsplit(case.address).port)
    for name, content in blocks(section).items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(content.replace(there, str(port)), encoding="utf-8")
    ports = {"HTTP": port, "GRPC": grpc, "METRICS": metrics}
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": ".",
        "MLSERVER_HOST": "127.0.0.1",
        "MLSERVER_PARALLEL_WORKERS": "0",
        **{f"MLSERVER_{kind}_PORT": str(number) for kind, number in ports.items()},
    }
    if server.before is not None:
        subprocess.run(shlex.split(server.before), env=environment, check=True, capture_output=True)
    log = Path(f"{port}.log")
    with log.open("w") as out:
        command = shlex.split(server.command.replace(there, str(port)))
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        deadline = time.monotonic() + STARTS_WITHIN_S
        while not answers(f"http://127.0.0.1:{port}{server.ready}"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{server.command} does not serve:\n{log.read_text()[-3000:]}")
            time.sleep(0.5)
        yield port
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def compared(case: Case, port: int) -> tuple[str, list[str]]:
    """The rows that a case cost, and what is wrong with it."""
    costs, faults, runs = [], [], {}
    for doubts in ("--no-doubts", "--doubts"):
        with CountingProxy(port) as proxy:
            done = over_http(case, proxy.port, doubts)
            costs.append(f"{proxy.rows:,} rows in {proxy.requests:,} requests with {doubts}")
        if done.returncode not in {0, 1, 4}:
            command = shlex.join(done.args)
            return "; ".join(costs), [f"{command} ended with {done.returncode}: {done.stderr.strip()}"]
        runs[doubts] = json.loads(done.stdout)
        reported = runs[doubts]["served"]["rows"]
        if reported != proxy.rows:
            faults.append(f"{doubts}: the server saw {proxy.rows} rows, {reported} are reported")
    there, here = found(runs["--no-doubts"]), found(in_process(case))
    differing = (name for name in here if there[name] != here[name])
    faults += [f"{name}: {there[name]} over HTTP, {here[name]} in the process" for name in differing]
    return "; ".join(costs), faults


def found(content: Json) -> Json:
    """What must be equal over HTTP and in the process."""
    accuracies = {name: content["metrics"][name]["value"] for name in ("clean_accuracy", "robust_accuracy")}
    kept = ("queries", "surviving_before", "surviving_after")
    attacks = {attack["name"]: {name: attack[name] for name in kept} for attack in content["attacks"]}
    return {**accuracies, "verdict": content["verdict"], **attacks}


def over_http(case: Case, port: int, doubts: str) -> subprocess.CompletedProcess[str]:
    """Carry out the command of a case, through a port."""
    more = [doubts, "--suite", SUITE, "--gate", GATE, "--seed", str(SEED), "-q", "-o", "-"]
    command = [sys.executable, "-m", "holdfast", *case.at(port), *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=ENDS_WITHIN_S, check=False)


def in_process(case: Case) -> Json:
    """Assess the model itself, with no more access than its server gives."""
    with np.load("digits.npz") as arrays:
        data = arrays["x"], arrays["y"]
    threat = f"{THREAT},access={case.access}"
    result = holdfast.assess(case.model, data, threat, SUITE, gates=[GATE], n=N, seed=SEED, doubts=False)
    return result.summary()


def answers(url: str) -> bool:
    """Whether an address answers with 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def free_ports(n: int) -> list[int]:
    """Ports of this machine that nothing listens to."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


if __name__ == "__main__":
    sys.exit(main())
