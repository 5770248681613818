"""Assess MLServer and LitServe over HTTP, and compare each with the same model in the process.

    python -m benchmarks.servers VENV      where VENV has what requirements.txt beside this file asks for

For each server it prints `right` or `WRONG`. Right means: over HTTP and in the process the accuracies, the verdict of a
gate, and the queries of each attack are equal; and the rows that a proxy in front of the server counted are those that
the report states, with doubts and without. The exit code is 1 if anything is wrong.
"""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import holdfast
from benchmarks.servers.counting import CountingProxy
from benchmarks.servers.digits import trained
from holdfast.core.types import Access

ROOT = Path(__file__).resolve().parents[2]
TRAINED_ON, N, SEED = 1200, 30, 0
THREAT, SUITE, GATE = "linf:0.1,queries=100", "black-box", "robust_accuracy >= 0.5"
STARTS_WITHIN_S = 180.0
PATIENCE_S = 600.0
"""for one run of the command line"""
LOOKED_AT = 1 + 3 * 8
"""rows that are asked for before a run with a gate begins, which `cost` leaves out"""

Json = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One way in which a server serves a model, and the same model in the process."""

    name: str
    path: str
    flags: tuple[str, ...]
    model: Any
    """what `holdfast.assess` takes in the process"""
    access: Access


@dataclass(frozen=True)
class Server:
    """A server, which serves one model or several at a port."""

    command: tuple[str, ...]
    port: int
    ready: tuple[str, ...]
    """paths that answer with 200 once it serves"""
    cases: tuple[Case, ...]


def main() -> int:
    """Check every server; 0 if all are right."""
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    bin_folder = Path(sys.argv[1]).resolve() / "bin"
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        for server in servers(Path(folder), bin_folder):
            with running(server, Path(folder)):
                for case in server.cases:
                    faults = faults_of(case, server.port, Path(folder) / "digits.npz")
                    wrong += bool(faults)
                    print(
                        "WRONG" if faults else "right",
                        case.name,
                        *faults,
                        sep="\n      " if faults else " ",
                        flush=True,
                    )
    return int(wrong > 0)


def servers(folder: Path, bin_folder: Path) -> Iterator[Server]:
    """Train the models, write what the servers read into a folder, and describe the servers."""
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    np.savez(folder / "digits.npz", x_test=x[TRAINED_ON:], y_test=y[TRAINED_ON:])
    net = trained(torch.from_numpy(x[:TRAINED_ON]), torch.from_numpy(y[:TRAINED_ON]))
    torch.save(net.state_dict(), folder / "digits.pt")
    estimator = LogisticRegression(max_iter=1000).fit(x[:TRAINED_ON], y[:TRAINED_ON])
    joblib.dump(estimator, folder / "digits.joblib")
    yield mlserver(folder, bin_folder, net, estimator)
    yield litserve(folder, bin_folder, net)


def mlserver(folder: Path, bin_folder: Path, net: Any, estimator: Any) -> Server:
    """MLServer with two models: a torch network behind a custom runtime, and an estimator behind its runtime."""
    http, grpc, metrics = free_ports(3)
    models = folder / "models"
    tensors = {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 64]}],
        "outputs": [{"name": "scores", "datatype": "FP32", "shape": [-1, 10]}],
    }
    written = {
        "settings.json": {
            "host": "127.0.0.1",
            "http_port": http,
            "grpc_port": grpc,
            "metrics_port": metrics,
            "parallel_workers": 0,
        },
        "net/model-settings.json": {
            "name": "net",
            "implementation": "benchmarks.servers.mlserver_torch.Digits",
            "parameters": {"uri": str(folder / "digits.pt")},
            **tensors,
        },
        "estimator/model-settings.json": {
            "name": "estimator",
            "implementation": "mlserver_sklearn.SKLearnModel",
            "parameters": {"uri": str(folder / "digits.joblib")},
        },
    }
    for name, content in written.items():
        (models / name).parent.mkdir(parents=True, exist_ok=True)
        (models / name).write_text(json.dumps(content))
    of_net, of_estimator = "/v2/models/net", "/v2/models/estimator"
    probabilities = ("--http-response", "predict_proba", "--model-output", "probability")
    return Server(
        (str(bin_folder / "mlserver"), "start", str(models)),
        http,
        (f"{of_net}/ready", f"{of_estimator}/ready"),
        (
            Case("MLServer, torch, scores", of_net, (), net, "scores"),
            Case(
                "MLServer, scikit-learn, labels",
                of_estimator,
                ("--http-labels", "--classes", "10"),
                estimator,
                "labels",
            ),
            Case("MLServer, scikit-learn, probabilities", of_estimator, probabilities, estimator, "scores"),
        ),
    )


def litserve(folder: Path, bin_folder: Path, net: Any) -> Server:
    """LitServe with the torch network."""
    (port,) = free_ports(1)
    template = ("--http-request", '{"instances": $x}', "--http-response", "predictions")
    command = (
        str(bin_folder / "python"),
        "-m",
        "benchmarks.servers.litserve_torch",
        str(folder / "digits.pt"),
    )
    cases = (Case("LitServe, torch, scores", "/predict", template, net, "scores"),)
    return Server((*command, str(port)), port, ("/health",), cases)


def faults_of(case: Case, port: int, data: Path) -> list[str]:
    """What differs between a case over HTTP and in the process, or between the rows counted and reported."""
    faults, runs = [], {}
    for doubts in ("--no-doubts", "--doubts"):
        with CountingProxy(port) as proxy:
            done = over_http(case, proxy.port, data, doubts)
            rows = proxy.rows
        if done.returncode not in {0, 1, 4}:
            return [*faults, f"{shlex.join(done.args)} ended with {done.returncode}: {done.stderr.strip()}"]
        runs[doubts] = json.loads(done.stdout)
        if reported_rows(runs[doubts]) != rows:
            faults.append(f"{doubts}: the server saw {rows} rows, {reported_rows(runs[doubts])} are reported")
    there, here = found(runs["--no-doubts"]), found(in_process(case, data))
    faults += [
        f"{name}: {there[name]} over HTTP, {here[name]} in the process"
        for name in here
        if there[name] != here[name]
    ]
    return faults


def reported_rows(content: Json) -> int:
    """Rows that the server saw, by the report of a run."""
    served = content.get("served")
    # TO ADAPT: once every report of a served model has `served`, read served["rows"] alone.
    return served["rows"] if served is not None else LOOKED_AT + content["cost"]["forwards"]


def found(content: Json) -> Json:
    """What must be equal over HTTP and in the process."""
    accuracies = {name: content["metrics"][name]["value"] for name in ("clean_accuracy", "robust_accuracy")}
    kept = ("queries", "standing_before", "standing_after")
    attacks = {attack["name"]: {name: attack[name] for name in kept} for attack in content["attacks"]}
    return {**accuracies, "verdict": content["verdict"], **attacks}


def over_http(case: Case, port: int, data: Path, doubts: str) -> subprocess.CompletedProcess[str]:
    """Assess a case by the command line."""
    host = f"127.0.0.1:{port}"
    words = ["assess", f"http://{host}{case.path}", str(data), "--allow-host", host, *case.flags, doubts]
    words += [
        "-t",
        THREAT,
        "--suite",
        SUITE,
        "--gate",
        GATE,
        "-n",
        str(N),
        "--seed",
        str(SEED),
        "-q",
        "-o",
        "-",
    ]
    command = [sys.executable, "-m", "holdfast", *words]
    return subprocess.run(
        command, cwd=data.parent, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )


def in_process(case: Case, data: Path) -> Json:
    """Assess the model itself, with no more access than its server gives."""
    with np.load(data) as arrays:
        given = arrays["x_test"], arrays["y_test"]
    threat = f"{THREAT},access={case.access}"
    return holdfast.assess(
        case.model, given, threat, SUITE, gates=[GATE], n=N, seed=SEED, doubts=False
    ).summary()


@contextmanager
def running(server: Server, folder: Path) -> Iterator[None]:
    """Start a server, wait until it serves, and end it with all of its processes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    log = folder / f"{server.port}.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            server.command, cwd=folder, env=environment, stdout=out, stderr=out, start_new_session=True
        )
    try:
        deadline = time.monotonic() + STARTS_WITHIN_S
        while not all(answers(f"http://127.0.0.1:{server.port}{path}") for path in server.ready):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{shlex.join(server.command)} does not serve:\n{log.read_text()[-3000:]}")
            time.sleep(0.5)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(url: str) -> bool:
    """Whether an address answers with 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def free_ports(n: int) -> Sequence[int]:
    """Ports of this machine that nothing listens to."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


if __name__ == "__main__":
    sys.exit(main())
