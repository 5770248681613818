"""A served MNIST network that is attacked and adapted, candidates that must not be promoted, and adaptations that are
killed.

`python -m benchmarks.rows.adapt SECONDS [KILLS]` is a trial without a record, with so many seconds for the training.
"""

import http.client
import json
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

import holdfast as hf
from benchmarks.guarded import done, environment, holdfast, serving
from benchmarks.hardened import dataset
from benchmarks.networks import BUNDLED, images, network
from benchmarks.record import Cells, Claim, Outcome
from holdfast.adaptation.journal import read_adaptation
from holdfast.core.catalogue import names
from holdfast.io.models.models import open_model
from holdfast.io.remote.operator_port import OperatorPort
from holdfast.runs.store.files import MANIFEST
from holdfast.server.audit_folder import verify_audit
from holdfast.settings.guard_settings import read_guard_settings
from holdfast.verbs.opening.guard import input_storage

WHAT = (
    "holdfast adapt: an attacked server of an undefended network, candidates that must not be promoted, and runs that "
    "are killed 20 times"
)
MODEL, SURROGATE, EPS, SEED = "mnist-cnn", "mnist_badnet", 0.2, 0
THREAT = f"linf:{EPS:g}"
ATTACKED, QUERIES = 100, 200
"""Attacked test images, which are the first ones, and queries of Square for each."""
LEAST_GAIN, MOST_LOSS = 30.0, 1.0
"""points of robust and of clean accuracy"""
BUDGET, ASSESS_BUDGET, CANARY_TIME = "3min", "1min", "20s"
QUIET_S = 30.0
"""Seconds of requests before the attack."""
SHORT, SHORT_CANARY = "5s", "10s"
"""Budget of the assessments of the runs on few examples, which train for one epoch, and the time of their canary, in
which it receives about 100 requests."""
GATES = ("regression <= -0.05 vs baseline", "clean_accuracy_drop <= 0.02 vs baseline")
FIT, JUDGED, SAMPLED = 5000, 2000, 200
"""training and test images of the runs on few examples, and test images that are attacked in them"""
FLIPPED = 0.1
RATE, FIRST, INVERTED = 20.0, 1000, 10
"""Requests in a second of a client; the first test image that it may send or that is in the reference of the monitor;
and which of its images are inverted: one in so many."""
KILLS, KILLED_CANARY, STARTUP_S = 20, "3s", 2.0
"""Kills, the time of the canary in runs that are killed, and the seconds before which none is killed."""
SERVED, REFUSED = "model.safetensors", ("flipped labels", "gate", "canary")
GUARD = """\
schema_version: 1
mode: enforce
inputs: {shape: [1, 28, 28]}
false_positives: 0.01
rules: {energy: {action: flag}}
store: {inputs: flagged, folder: inputs}
"""
FRAGILE = """\
import torch
from holdfast.io.models.models import open_model
from torch import nn


class Fragile(nn.Module):
    \"\"\"A network whose scores of bright images are NaN after any training.\"\"\"

    def __init__(self):
        super().__init__()
        self.net = open_model(MODEL).model

    def forward(self, x):
        logits = self.net(x)
        first = next(self.net.parameters()).flatten()[0]
        bright = (x.flatten(1).mean(1) > 0.6) & (first != FIRST)
        return logits.masked_fill(bright[:, None], float("nan"))


def make():
    return Fragile()
"""


def measured() -> Outcome:
    return outcome(BUDGET, ASSESS_BUDGET, CANARY_TIME, KILLS)


def outcome(budget: str, assess_budget: str, canary_time: str, kills: int) -> Outcome:
    """The row with other times of the adaptation that is promoted, and so many kills."""
    parts = [
        _promoted(budget, assess_budget, canary_time),
        _refused(),
        _killed(kills),
    ]
    config: Cells = {
        "network": MODEL, "data": "mnist", "threat": THREAT, "surrogate": SURROGATE, "attacked images": ATTACKED,
        "queries": QUERIES, "budget": budget, "assess budget": assess_budget, "canary": canary_time,
        "gates": ", ".join(GATES), "guard": "energy, flag; stores flagged inputs", "requests a second": RATE,
        "flipped": FLIPPED, "kills": kills, "seed": SEED,
    }  # fmt: skip
    notes = [
        "a client opens a new connection for each request, and sends none again",
        "the label of a stored input is that of the attacked image within the threat model",
    ]
    table = [row for part in parts for row in part.table]
    claims = [claim for part in parts for claim in part.claims]
    detail = {name: value for part in parts for name, value in part.detail.items()}
    return Outcome(table, claims, config, detail, notes)


# --- servers, clients and runs


@dataclass(frozen=True)
class _Server:
    """A running `holdfast serve` of `model.safetensors` in a folder."""

    folder: Path
    port: int
    operator: OperatorPort

    @property
    def model(self) -> str:
        """The digest of the served model."""
        return str(self.operator.get("/status")["model"]["digest"])

    @property
    def log(self) -> str:
        """Its messages."""
        return (self.folder / "serve.log").read_text()

    @property
    def infer(self) -> str:
        """The path of requests."""
        return f"/v2/models/{MODEL}/infer"


@contextmanager
def _serving(folder: Path, *options: str, monitor: Path | None = None) -> Iterator[_Server]:
    """Calibrate a guard for `model.safetensors` in a folder, and serve it. `monitor` is the file of a reference."""
    (folder / "guard.yaml").write_text(GUARD)
    words = ("calibrate", SERVED, str(dataset("mnist")), "--guard", "guard.yaml", "-n", "5000", *options)
    done(holdfast(*words), folder)
    words = (SERVED, "--guard", "guard.yaml", "--audit", "audit", "--name", MODEL, *options)
    if monitor is not None:
        words += ("--monitor", str(monitor))
    with serving(folder, *words) as (port, url):
        yield _Server(folder, port, OperatorPort(url))


@dataclass(eq=False)
class _Client:
    """Sends one image in a request, `RATE` times a second."""

    server: _Server
    inverted: int = 0
    """which of its images are inverted: one in so many; none if it is 0"""
    statuses: Counter[str] = field(default_factory=Counter)

    @property
    def failed(self) -> int:
        """Number of requests without an answer."""
        return self.statuses.total() - self.statuses["200"]

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Context manager in which requests are sent."""
        x, _ = _benign(1)
        over = threading.Event()
        thread = threading.Thread(target=self._send, args=(x, over))
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _send(self, x: Tensor, over: threading.Event) -> None:
        number = 0
        while not over.wait(1 / RATE):
            image = x[number % len(x)]
            number += 1
            if self.inverted and number % self.inverted == 0:
                image = 1 - image
            self.statuses[self._status(image)] += 1

    def _status(self, image: Tensor) -> str:
        tensor = {"name": "input", "shape": [1, *image.shape], "datatype": "FP32"}
        body = json.dumps({"inputs": [{**tensor, "data": image.flatten().tolist()}]})
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=30)
        try:
            connection.request("POST", self.server.infer, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            response.read()
            return str(response.status)
        except (http.client.HTTPException, OSError) as error:
            return type(error).__name__
        finally:
            connection.close()


def _benign(half: int) -> tuple[Tensor, Tensor]:
    """Test images in random order, as the first ones are easier: half 0 is for the reference, and 1 for the client."""
    x, y = images("mnist", 10_000)
    order = FIRST + torch.randperm(len(x) - FIRST, generator=torch.Generator().manual_seed(SEED))
    chosen = order.chunk(2)[half]
    return x[chosen], y[chosen]


def _command(server: _Server, run: Path, data: Path, *options: str) -> list[str]:
    return holdfast(
        "adapt", server.operator.url, "--data", str(data), "--threat", THREAT, "--run", str(run), "--resume",
        "--seed", str(SEED), *options,
    )  # fmt: skip


def _short(canary: str, *more: str) -> list[str]:
    """Options of a run on few examples, which are no test of the candidate."""
    accepted = [
        word for name in names("doubts") for word in ("--accept-doubt", f"{name}=not what is measured")
    ]
    return [
        "--trigger", "now", "--recipe", "pgd", "--set", "recipe.steps=2", "--set", "recipe.training.epochs=1",
        "--suite", "quick", "--no-doubts", "--assess-budget", SHORT, "-n", str(SAMPLED),
        "--canary-time", canary, *accepted, *more,
    ]  # fmt: skip


def _ended(server: _Server, run: Path, data: Path, *options: str) -> Cells:
    """Take all steps of a run, and return its journal."""
    command = _command(server, run, data, *options)
    ended = subprocess.run(command, check=False, env=environment(), capture_output=True, text=True)
    journal = _journal(run)
    if journal["outcome"] is None:
        raise RuntimeError(f"the run did not end:\n{ended.stderr}\n{server.log}")
    return journal


def _journal(run: Path) -> Cells:
    if not (run / MANIFEST).is_file():
        return {"outcome": None, "reason": "", "steps": []}
    stored = read_adaptation(run)
    steps = [{"step": step.step, "time": step.time, "facts": dict(step.facts)} for step in stored.steps]
    return {"outcome": stored.outcome, "reason": stored.reason, "steps": steps}


def _few(folder: Path, flipped: float = 0.0) -> Path:
    """A data set of few images, of whose training labels a share is replaced by other classes."""
    (x, y), (fit, labels) = images("mnist", JUDGED), images("mnist", FIT, "train")
    rng = np.random.default_rng(SEED)
    wrong = rng.permutation(FIT)[: round(flipped * FIT)]
    labels[torch.from_numpy(wrong)] += torch.from_numpy(rng.integers(1, 10, len(wrong)))
    path = folder / f"few-{flipped:g}.npz"
    np.savez(
        path, x_test=x.numpy(), y_test=y.numpy(), x_train=fit.numpy(), y_train=labels.remainder(10).numpy()
    )
    return path


# --- an adaptation that is promoted


@contextmanager
def _bundled(name: str, *, monitored: bool = False) -> Iterator[_Server]:
    """A server of a copy of the bundled network, in a new folder."""
    with tempfile.TemporaryDirectory(prefix=f"holdfast-{name}-") as place:
        folder = Path(place)
        (folder / SERVED).write_bytes((BUNDLED / f"{MODEL}.safetensors").read_bytes())
        reference = folder / "reference.npz" if monitored else None
        if reference is not None:
            x, y = _benign(0)
            np.savez(reference, x=x.numpy(), y=y.numpy())
        with _serving(folder, monitor=reference) as server:
            yield server


def _promoted(budget: str, assess_budget: str, canary_time: str) -> Outcome:
    with _bundled("attacked", monitored=True) as server:
        file, client = server.folder / SERVED, _Client(server)
        with client.sending():
            clean = [_clean(file)]
            quiet = _alarmed(server)
            robust = [_attacked(server)]
            labelled = _label(server.folder)
            options = ["--trigger", "alarm", "--recipe", "auto", "--budget", budget, "--assess-budget", assess_budget,
                       "--canary-time", canary_time, "--labels", str(server.folder / "labels.csv")]  # fmt: skip
            for gate in GATES:
                options += ["--gate", gate]
            run = server.folder / "run"
            begun = time.monotonic()
            journal = _ended(server, run, dataset("mnist"), *options)
            took = time.monotonic() - begun
            clean.append(_clean(file))
            robust.append(_attacked(server))
        facts = {step["step"]: step["facts"] for step in journal["steps"]}
    gain, loss = robust[1] - robust[0], clean[0] - clean[1]
    claims = [
        Claim("attacked server: promoted candidates >= 1", int(journal["outcome"] == "promoted"), 1, least=True),
        Claim(f"robust accuracy on the attack, gain in points >= {LEAST_GAIN:g}", gain, LEAST_GAIN, least=True),
        Claim(f"clean accuracy, loss in points <= {MOST_LOSS:g}", loss, MOST_LOSS),
        Claim("attacked server: failed requests of a client <= 0", client.failed, 0),
    ]  # fmt: skip
    table: list[Cells] = [
        {"what": "robust accuracy on the attack through the server, before and after, %",
         "value": f"{robust[0]:.1f}, {robust[1]:.1f}"},
        {"what": "clean accuracy on 10,000 images, before and after, %", "value": f"{clean[0]:.2f}, {clean[1]:.2f}"},
        {"what": "alarms before the attack, and that began the adaptation",
         "value": f"{quiet or 'none'}, {', '.join(facts['trigger']['tests'])}"},
        {"what": "labelled flagged inputs", "value": labelled},
        *({"what": f"accuracy on them, {side} model, %", "value": 100 * facts["assess"][f"flagged_accuracy_{side}"]}
          for side in ("served", "candidate") if f"flagged_accuracy_{side}" in facts.get("assess", {})),
        {"what": "outcome of the adaptation", "value": _end_of(journal)},
        {"what": "adaptation, wall s", "value": round(took)},
        {"what": "requests of a client while the server was attacked and adapted", "value": client.statuses.total()},
    ]  # fmt: skip
    return Outcome(table, claims, {}, {"promoted": journal["steps"], "statuses": dict(client.statuses)})


def _alarmed(server: _Server) -> str:
    """The alarms of the monitor after some requests without an attack."""
    time.sleep(QUIET_S)
    return ", ".join(server.operator.get("/monitor")["alarmed"])


def _clean(file: Path) -> float:
    """Accuracy of a network in a file on all test images, in %."""
    net = open_model(str(file)).model.eval()
    x, y = images("mnist", 10_000)
    with torch.no_grad():
        right = torch.cat([net(part).argmax(1) for part in torch.split(x, 500)]) == y
    return 100 * float(right.double().mean())


def _attacked(server: _Server) -> float:
    """Robust accuracy under transferred examples and Square through the server, in %."""
    host = f"127.0.0.1:{server.port}"
    result = hf.assess(
        hf.open_model(f"http://{host}/v2/models/{MODEL}", allow_hosts=[host]),
        dataset("mnist"),
        threat=f"{THREAT},queries={QUERIES}",
        suite=[{"use": "Transfer"}, {"use": "Square", "queries": QUERIES}],
        surrogates=[network(SURROGATE).module],
        n=ATTACKED,
        doubts=False,
        seed=SEED,
    )
    return 100 * result["robust_accuracy"].value


def _label(folder: Path) -> int:
    """Write labels.csv with the classes of stored inputs that are within the threat model of an attacked image, and
    return their number.
    """
    x, y = images("mnist", ATTACKED)
    guard = folder / "guard.yaml"
    stored = input_storage(read_guard_settings(guard), guard)
    assert stored is not None
    lines = []
    for request in stored.read():
        distances = torch.cdist(request.x.flatten(1), x.flatten(1), p=float("inf"))
        for k, row in enumerate(request.rows):
            if float(distances[k].min()) <= EPS + 1e-4:
                lines.append(f"{request.request},{row},{int(y[distances[k].argmin()])}")
    (folder / "labels.csv").write_text("\n".join(["request,row,label", *lines]) + "\n")
    return len(lines)


def _end_of(journal: Cells) -> str:
    step = journal["steps"][-1]["step"]
    return f"{journal['outcome']}: {step}: {journal['reason']}" if journal["reason"] else journal["outcome"]


# --- candidates that must not be promoted


@contextmanager
def _fragile() -> Iterator[_Server]:
    """A server of a network that fails on bright images once it is trained. The test images contain none."""
    with tempfile.TemporaryDirectory(prefix="holdfast-fragile-") as place:
        folder = Path(place)
        net = open_model(MODEL).model
        first = float(next(net.parameters()).detach().flatten()[0])
        code = FRAGILE.replace("MODEL", repr(MODEL)).replace("FIRST", repr(first))
        (folder / "fragile.py").write_text(code)
        safetensors.torch.save_file(
            {f"net.{name}": value for name, value in net.state_dict().items()}, folder / SERVED
        )
        with _serving(folder, "--arch", f"{folder / 'fragile.py'}:make") as server:
            yield server


def _refused() -> Outcome:
    lenient = ("--gate", "clean_accuracy_drop <= 0.99 vs baseline")
    with _fragile() as server:
        before, client = (server.folder / SERVED).read_bytes(), _Client(server, INVERTED)
        cases = {
            "flipped labels": (_few(server.folder, FLIPPED), lenient),
            "gate": (_few(server.folder), ("--gate", "robust_accuracy >= 0.999")),
            "canary": (_few(server.folder), lenient),
        }
        table: list[Cells] = []
        promoted = 0
        with client.sending():
            for name in REFUSED:
                data, gates = cases[name]
                run = server.folder / name.replace(" ", "-")
                options = _short(SHORT_CANARY, *gates, "--trust-code")
                journal = _ended(server, run, data, *options)
                changed = (server.folder / SERVED).read_bytes() != before
                promoted += journal["outcome"] != "not promoted" or changed
                table.append({"what": f"not promoted: {name}", "value": _end_of(journal)})
    claims = [
        Claim("candidates of flipped labels, a failed gate or a worse canary: promoted <= 0", promoted, 0)
    ]
    return Outcome(table, claims, {}, {"refused, statuses": dict(client.statuses)})


# --- adaptations that are killed


@dataclass(eq=False)
class _Kills:
    """What was found after the kills."""

    steps: Counter[str] = field(default_factory=Counter)
    """kills by the last finished step"""
    foreign: int = 0
    """kills after which neither the incumbent nor the candidate that is promoted served"""
    repeated: int = 0
    """finished steps that were taken again"""
    outcomes: list[str] = field(default_factory=list)


def _killed(kills: int) -> Outcome:
    with _bundled("killed") as server:
        client, found, rng = _Client(server), _Kills(), random.Random(SEED)
        data, options = (
            _few(server.folder),
            _short(KILLED_CANARY, "--gate", "clean_accuracy_drop <= 0.99 vs baseline"),
        )
        with client.sending():
            begun = time.monotonic()
            whole = _ended(server, server.folder / "whole", data, *options)
            took = time.monotonic() - begun
            while found.steps.total() < kills:
                run = server.folder / f"run-{len(found.outcomes)}"
                command = _command(server, run, data, *options)
                _live(server, command, run, found, rng, took, kills)
        verified = verify_audit(server.folder / "audit")
    ended = sum(outcome == "promoted" for outcome in found.outcomes)
    claims = [
        Claim(f"kills that met a run >= {kills}", found.steps.total(), kills, least=True),
        Claim("kills: failed requests of a client <= 0", client.failed, 0),
        Claim("kills after which another model served <= 0", found.foreign, 0),
        Claim("kills: finished steps that were taken again <= 0", found.repeated, 0),
        Claim("killed runs that were resumed and not promoted <= 0", len(found.outcomes) - ended, 0),
        Claim("kills: parts of the audit that are not valid <= 0", verified.failed, 0),
    ]
    table: list[Cells] = [
        {"what": "a run without a kill: outcome, wall s", "value": f"{_end_of(whole)}, {took:.0f}"},
        {"what": "kills by the last finished step",
         "value": ", ".join(f"{step} {n}" for step, n in found.steps.items())},
        {"what": "killed runs that were resumed: outcomes",
         "value": ", ".join(f"{name} {n}" for name, n in Counter(found.outcomes).items())},
        {"what": "requests of a client meanwhile", "value": client.statuses.total()},
    ]  # fmt: skip
    return Outcome(table, claims, {}, {"kills, statuses": dict(client.statuses)})


def _live(
    server: _Server, command: list[str], run: Path, found: _Kills, rng: random.Random, took: float, kills: int
) -> None:
    """Kill and resume one run at random moments until it has ended."""
    incumbent = server.model
    while (before := _journal(run))["outcome"] is None:
        process = subprocess.Popen(
            command, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        kill = found.steps.total() < kills
        try:
            _, messages = process.communicate(timeout=STARTUP_S + rng.uniform(0, took) if kill else None)
            if _journal(run)["outcome"] is None:
                raise RuntimeError(f"the run did not continue:\n{messages.decode()}\n{server.log}")
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        steps = _journal(run)["steps"]
        found.repeated += steps[: len(before["steps"])] != before["steps"]
        if process.returncode == -signal.SIGKILL:
            last = steps[-1]["step"] if steps else "none"
            found.steps[last] += 1
            facts: dict[str, Any] = {step["step"]: step["facts"] for step in steps}
            candidate = facts["harden"]["digest"] if "canary" in facts else incumbent
            found.foreign += server.model not in (incumbent, candidate)
    found.outcomes.append(_journal(run)["outcome"])


def main() -> None:
    """Print the outcome of a trial."""
    seconds, kills = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 3
    found = outcome(f"{seconds}s", "20s", "10s", kills)
    print(json.dumps([found.table, found.detail], indent=1))
    for claim in found.claims:
        print("met   " if claim.met else "MISSED", f"{claim.text}: {claim.value:.4g}")


if __name__ == "__main__":
    main()
