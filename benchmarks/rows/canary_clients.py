"""One client that would refuse a candidate of `holdfast adapt`, or hide that it is worse: simulated clients, and a
server with keys whose candidate gives low scores to the images of one class.

`python -m benchmarks.rows.canary_clients` prints the outcome without a record.
"""

import http.client
import json
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from benchmarks.guarded import done, holdfast, serving
from benchmarks.networks import BUNDLED, images
from benchmarks.record import Cells, Claim, Outcome
from holdfast.adaptation.journal import OF_FILE, Adaptation, open_journal, read_adaptation
from holdfast.io.models.models import open_model
from holdfast.io.remote.operator_port import OperatorPort, read_key
from holdfast.verbs.adapt_comparison import compared
from holdfast.verbs.adapt_served import EARLIER
from holdfast.verbs.configuration import canonical_settings
from holdfast.verbs.opening.guard import open_guard
from holdfast.verbs.opening.resolve import open_subject
from holdfast.verbs.settings import Adapt, Doctor

WHAT = (
    "holdfast adapt: one client that sends noise or crafted inputs to refuse a candidate, or floods the server to hide "
    "that it is worse"
)
RUNS, CLIENTS, INPUTS, FLOOD = 5, (3, 4, 10), 60, 2000
"""runs of each simulated case, numbers of honest clients, and inputs of an honest client and of the other one"""
USUAL, WORSE = 0.02, 0.25
"""shares of flagged inputs of an honest client: for a good candidate, and for one that is worse"""
TILTED, FACTOR = 8, 0.3
"""class whose score the candidate multiplies, and by what"""
RATE, FAST, HONEST = 20.0, 80.0, 4
"""Requests in a second of an honest client and of the other one, and number of honest clients of a server."""
CANARY_TIME, DATA, SERVED, SEED = "8s", "mnist-mini", "model.safetensors", 0
GUARD = """\
schema_version: 1
mode: shadow
inputs: {shape: [1, 28, 28]}
false_positives: 0.01
rules: {energy: {action: flag}}
"""


def measured() -> Outcome:
    table: list[Cells] = []
    wrong = {"promotions": 0, "refusals": 0}
    for case, (worse, other) in SIMULATED.items():
        found = [_simulated(worse, other, n, seed) for n in CLIENTS for seed in range(RUNS)]
        wrong["promotions" if worse else "refusals"] += sum(each is not worse for each in found)
        table.append({"case": f"simulated: {case}", "runs": len(found), "worse": sum(found),
                      "expected": "worse" if worse else "not worse"})  # fmt: skip
    detail: Cells = {}
    for case, (worse, attack) in SERVERS.items():
        ended, sent = _served(worse, attack)
        wrong["promotions" if worse else "refusals"] += (ended.outcome == "promoted") is worse
        detail[case] = {
            step.step: dict(step.facts) for step in ended.steps if step.step in ("canary", "watch")
        }
        table.append({"case": f"server: {case}", "runs": 1, "worse": int(ended.outcome != "promoted"),
                      "expected": "worse" if worse else "not worse", "requests of the other client": sent})  # fmt: skip
    claims = [Claim(f"wrong {name} <= 0", n, 0) for name, n in wrong.items()]
    config: Cells = {
        "runs": RUNS, "honest clients": list(CLIENTS), "inputs of each": INPUTS, "inputs of the other one": FLOOD,
        "flagged shares": [USUAL, WORSE], "network": "mnist-cnn", "tilted class": TILTED, "factor": FACTOR,
        "canary": CANARY_TIME, "requests a second": [RATE, FAST], "seed": SEED,
    }  # fmt: skip
    notes = [
        "the steps before the canary are written, and not taken, so that the candidate is chosen",
        "the client that recognises the canary by its scores keeps that connection",
    ]
    return Outcome(table, claims, config, detail, notes)


# --- simulated clients

Flags = Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]
"""function that returns which inputs of a client the guards of the candidate and of the served model flag"""


def _both(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Noise, of which both guards flag nearly all."""
    return rng.random(FLOOD) < 0.9, rng.random(FLOOD) < 0.9


def _crafted(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Inputs that only the guard of the candidate flags."""
    return np.ones(FLOOD, bool), np.zeros(FLOOD, bool)


def _harmless(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Inputs that no guard flags."""
    return np.zeros(FLOOD, bool), np.zeros(FLOOD, bool)


def _compensating(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Inputs that only the guard of the served model flags."""
    return np.zeros(FLOOD, bool), np.ones(FLOOD, bool)


SIMULATED: dict[str, tuple[bool, Flags]] = {
    "veto by noise": (False, _both),
    "veto by crafted inputs": (False, _crafted),
    "regression hidden by a harmless flood": (True, _harmless),
    "regression hidden by inputs on which the served model is worse": (True, _compensating),
}


def _simulated(worse: bool, other: Flags, clients: int, seed: int) -> bool:
    """Whether the candidate is found to be worse."""
    rng = np.random.default_rng([seed, clients])
    shares = WORSE if worse else USUAL, USUAL
    honest = [tuple(rng.random(INPUTS) < share for share in shares) for _ in range(clients)]
    flags = [*honest, other(rng)]
    names = [str(k) for k, (candidate, _) in enumerate(flags) for _ in candidate]
    candidate, served = (np.concatenate([each[side] for each in flags]) for side in (0, 1))
    return compared(names, candidate, served).worse


# --- a server with keys


@dataclass(frozen=True)
class _Server:
    folder: Path
    port: int
    url: str

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def scores(self, connection: http.client.HTTPConnection, client: str, image: Tensor) -> list[float]:
        """The scores of an image. Raises `OSError` or `HTTPException` if the connection has ended."""
        tensor = {
            "name": "input",
            "shape": [1, *image.shape],
            "datatype": "FP32",
            "data": image.flatten().tolist(),
        }
        key = read_key(self.folder / f"{client}.key")
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        connection.request("POST", "/v2/models/model/infer", json.dumps({"inputs": [tensor]}), headers)
        content = json.loads(connection.getresponse().read())
        found: list[float] = content["outputs"][0]["data"]
        return found


@contextmanager
def _serving(folder: Path) -> Iterator[_Server]:
    (folder / "guard.yaml").write_text(GUARD)
    done(holdfast("calibrate", SERVED, DATA, "--guard", "guard.yaml"), folder)
    for name in ["operator", "other", *(f"client-{k}" for k in range(HONEST))]:
        scope = "admin" if name == "operator" else "infer"
        words = ("keys", "add", name, "--scope", scope, "--expires", "1d", "--file", "keys.json", "--quiet")
        (folder / f"{name}.key").write_text(done(holdfast(*words), folder))
        (folder / f"{name}.key").chmod(0o600)
    words = (SERVED, "--guard", "guard.yaml", "--keys", "keys.json", "--audit", "audit", "--name", "model")
    with serving(folder, *words) as (port, url):
        yield _Server(folder, port, url)


def _tilted() -> dict[str, Tensor]:
    """Parameters of a candidate that gives low scores to the images of one class."""
    weights = safetensors.torch.load_file(BUNDLED / "mnist-cnn.safetensors")
    for name in ("9.weight", "9.bias"):
        weights[name][TILTED] *= FACTOR
    return weights


@dataclass(eq=False)
class _Requests:
    """Images that a client sends again and again during a block."""

    server: _Server
    client: str
    images: Tensor
    rate: float = RATE
    keeps: Callable[[list[float]], bool] = lambda scores: True
    """function from the scores of the first image to whether the connection is kept"""
    sent: int = field(default=0, init=False)

    @contextmanager
    def sending(self) -> Iterator[None]:
        over = threading.Event()
        thread = threading.Thread(target=self._send, args=(over,))
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _send(self, over: threading.Event) -> None:
        while not over.wait(1 / self.rate):
            connection = self.server.connection()
            with suppress(OSError, http.client.HTTPException, ValueError, KeyError):
                if self.keeps(self.server.scores(connection, self.client, self.images[0])):
                    while not over.wait(1 / self.rate):
                        self.sent += 1
                        image = self.images[self.sent % len(self.images)]
                        self.server.scores(connection, self.client, image)
            connection.close()


SERVERS = {
    "veto by noise to the canary": (False, "noise"),
    "veto by crafted inputs": (False, "crafted"),
    "regression hidden by a flood": (True, "flood"),
}


def _served(worse: bool, attack: str) -> tuple[Adaptation, int]:
    """The end of an adaptation of a server, and the number of requests of its attacker. The honest clients
    send images of the tilted class if the candidate is to be worse for them.
    """
    with tempfile.TemporaryDirectory(prefix="holdfast-canary-") as place:
        folder = Path(place)
        (folder / SERVED).write_bytes((BUNDLED / "mnist-cnn.safetensors").read_bytes())
        with _serving(folder) as server:
            settings = Adapt(
                server=server.url, key_file=str(folder / "operator.key"), data=DATA, threat="linf:0.2", trigger="now",
                canary_time=CANARY_TIME, seed=SEED,
            )  # fmt: skip
            _prepared(server, settings)
            x, y = images("mnist", 10_000)
            honest = x[y == TILTED] if worse else x[y != TILTED]
            clients = [
                _Requests(server, f"client-{k}", part)
                for k, part in enumerate(torch.tensor_split(honest[: 200 * HONEST], HONEST))
            ]
            clients.append(_attacker(server, attack, x, y))
            ended = _while_sending(clients, lambda: _ended(settings, folder / "run"))
            return ended, clients[-1].sent


def _while_sending(clients: Sequence[_Requests], ended: Callable[[], Adaptation]) -> Adaptation:
    if not clients:
        return ended()
    with clients[0].sending():
        return _while_sending(clients[1:], ended)


def _ended(settings: Adapt, run: Path) -> Adaptation:
    settings.run(run, resume=True)
    return read_adaptation(run)


def _attacker(server: _Server, attack: str, x: Tensor, y: Tensor) -> _Requests:
    probe = x[y == TILTED][:1]
    served = open_model(str(server.folder / SERVED)).model.eval()
    with torch.no_grad():
        usual = served(probe)[0, TILTED].item()

    def is_canary(scores: list[float]) -> bool:
        return abs(scores[TILTED] - usual) > 0.1

    if attack == "noise":
        noise = torch.rand(500, *x.shape[1:], generator=torch.Generator().manual_seed(SEED))
        return _Requests(server, "other", torch.cat([probe, noise]), FAST, is_canary)
    if attack == "crafted":
        tilted = x[y == TILTED]
        guard = open_guard(server.folder / "guard.yaml")
        candidate = open_model(str(server.folder / "candidate.safetensors")).model.eval()
        with torch.no_grad():
            ours, theirs = (
                guard.detected(guard.observation(tilted, net(tilted)))["energy"]
                for net in (candidate, served)
            )
        # the most suspicious ones for the guard of the candidate, and usual ones for that of the served model
        chosen = tilted[(theirs <= guard.rules["energy"].threshold).nonzero().flatten()]
        order = ours[theirs <= guard.rules["energy"].threshold].argsort(descending=True)
        return _Requests(server, "other", chosen[order[:100]], FAST)
    return _Requests(server, "other", x[y != TILTED][:500], FAST)


def _prepared(server: _Server, settings: Adapt) -> None:
    """Write the steps of a run before its canary, with the tilted network as the candidate."""
    port = OperatorPort(server.url, read_key(server.folder / "operator.key"))
    status: dict[str, Any] = port.get("/status")["model"]
    candidate = server.folder / "candidate.safetensors"
    safetensors.torch.save_file(_tilted(), candidate, metadata=_metadata(server.folder / SERVED))
    opening = {key: value for key, value in status["settings"].items() if key not in ("guard", "model")}
    digest = open_subject(Doctor(model=str(candidate), **opening)).digest
    facts: dict[str, Cells] = {
        "begin": {"set": status["set"], "model": str(server.folder / SERVED), "digest": status["digest"],
                  "settings": status["settings"], "calibration": str(server.folder / EARLIER)},
        "harden": {"digest": digest},
    }  # fmt: skip
    config = {**canonical_settings(settings), "server": server.url}
    with open_journal(server.folder / "run", config, resume=False) as journal:
        journal.keep("incumbent.safetensors", (server.folder / SERVED).read_bytes())
        journal.keep("candidate.safetensors", candidate.read_bytes())
        journal.keep(EARLIER, (server.folder / EARLIER).read_bytes())
        for step in OF_FILE[: OF_FILE.index("canary")]:
            journal.take(step, lambda step=step: facts.get(step, {}))


def _metadata(file: Path) -> dict[str, str]:
    with safetensors.safe_open(file, "pt") as stored:
        return dict(stored.metadata() or {})


def main() -> None:
    """Print the outcome of a trial."""
    found = measured()
    print(json.dumps([found.table, found.detail], indent=1))
    for claim in found.claims:
        print("met   " if claim.met else "MISSED", f"{claim.text}: {claim.value:.4g}")


if __name__ == "__main__":
    main()
