"""Results of certifications, audits, explanations, a monitor and a guard, on small files that this module writes.

A result is what the command line prints as JSON, without what differs from run to run, and a digest of each array that
it wrote. The guard is also called as a library, and behind the server.
"""

import contextlib
import hashlib
import http.client
import json
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

PROGRAMS = '''
import numpy as np
import torch
from torch import nn


def make():
    """A network of rows of six features, without training."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


def fit(x, y, seed, steps=100):
    """The network after full-batch training."""
    net = make()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net


def trained():
    """The network after training on 100 of the rows."""
    rows = np.load("rows.npz")
    return fit(torch.from_numpy(rows["x"][:100]), torch.from_numpy(rows["y"][:100]), 0)


def forest():
    """Boosted trees of the rows."""
    from sklearn.ensemble import GradientBoostingClassifier

    rows = np.load("rows.npz")
    return GradientBoostingClassifier(n_estimators=8, max_depth=3, random_state=0).fit(rows["x"], rows["y"])


def keywords():
    """A function that counts words of spam."""

    def scores(texts):
        words = [text.lower().split() for text in texts]
        return [[0.5, float(sum(word in ("win", "cash", "prize") for word in row))] for row in words]

    return scores


def linear():
    """A linear model of the words of a text."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    texts = ["nice lunch today", "see you home", "win cash prize", "cash prize now"] * 3
    return make_pipeline(CountVectorizer(), LogisticRegression()).fit(texts, ["ham", "ham", "spam", "spam"] * 3)


class Mixture:
    """A generator of rows from two normal distributions."""

    def sample(self, n, seed):
        rng = np.random.default_rng(seed)
        return (0.5 + 0.1 * rng.normal(size=(n, 6)) + 0.2 * rng.integers(0, 2, (n, 1))).clip(0, 1).astype("float32")


def generator():
    """The generator as an object."""
    return Mixture()
'''
TEXTS = """label,text
ham,see you at home and thanks for the nice lunch we had today
spam,win cash prize win cash prize win cash prize win cash prize
spam,win cash prize see you at home and thanks for the lunch
ham,nice lunch today and see you home
"""
SYNONYMS = {"synonyms": {"win": ["gain"], "cash": ["money"], "lunch": ["meal"]}, "insert": ["hello"]}
GUARD = """schema_version: 1
mode: enforce
inputs: {shape: [1, 28, 28], low: 0, high: 1}
false_positives: 0.05
defence: {bits: 5}
rules:
  schema: {action: block}
  range: {action: block}
  queries: {action: flag}
  energy: {action: flag}
  squeezing: {action: label_only}
"""
_VARIES = re.compile(
    r"(_s|_at|wall|cpu|time|version|digest|chain|created|started|finished|code|command|path|run)$|seconds"
)
"""keys whose values differ from run to run or from version to version, such as the head of the chain, which contains
the digest of the code"""

_INPUTS = ("net.py", "texts.csv", "rows.npz", "others.npz", "split.npz", "stream.npz", "drill.npz")
_RATE = 0.05
"""false-positive rate of the guard"""


RESULT_CODES = (0, 1, 4)
"""exit codes of results: a gate that fails or is unclear is one"""
_JSON = "--seed 0 --device cpu -o -"
_TRUSTED = f"--trust-code {_JSON}"
_ROWS = "net.py:trained rows.npz -n 40 --timeout 1h -o examples.csv"
_TEXTS = "texts.csv --label label"
COMMANDS: Mapping[str, tuple[str, ...]] = {
    **{
        f"certify {method}": (f"certify {_ROWS} --method {method} --threat linf:{eps} {_TRUSTED}",)
        for eps, methods in (
            (0.05, ("ibp", "crown-ibp", "crown")),
            (0.1, ("alpha-crown", "branch-and-bound", "auto")),
        )
        for method in methods
    },
    "certify crown of images": (
        f"certify mnist-cnn-hardened mnist-mini -n 6 --method crown --threat linf:0.1 {_JSON}",
    ),
    "certify lipschitz": (f"certify {_ROWS} --method lipschitz --threat l2:0.05 {_TRUSTED}",),
    "certify smoothing": (
        f"certify {_ROWS} --method smoothing --threat l2:0.1 --sigma 0.25 --draws 2000 {_TRUSTED}",
    ),
    "certify trees": (
        f"certify net.py:forest rows.npz -n 40 --threat linf:0.02 --timeout 1h -o examples.csv {_TRUSTED}",
    ),
    "certify substitutions": (
        f"certify net.py:linear {_TEXTS} --threat text:synonyms=1,file=words.json {_TRUSTED}",
    ),
    "certify masking": (
        (
            f"certify net.py:keywords {_TEXTS} --threat text:edits=1,words=1 --method masking --keep 0.2 --draws 500 "
            f"{_TRUSTED}"
        ),
    ),
    "certify partitions": (
        (
            "harden net.py:make split.npz --recipe partitions --set recipe.partitions=5 "
            f"--set recipe.training.epochs=2 -o partitions/ {_TRUSTED}"
        ),
        f"certify partitions/ split.npz --threat training-set:1 {_JSON}",
    ),
    "certify geometry": (f"certify {_ROWS} --method crown --threat linf:0.05 --geometry 2 {_TRUSTED}",),
    "harden denoised": (
        (
            "harden mnist-cnn mnist-mini --recipe denoised --threat l2:0.5 -n 4 --suite fgsm "
            f"--set recipe.training.epochs=1 {_JSON}"
        ),
    ),
    **{
        f"harden {recipe}": (
            "data poison mnist-mini --attack badnets,target=1,rate=0.1 -o drill.npz --seed 0",
            (
                f"harden mnist-cnn mnist-mini --recipe {recipe} --threat trigger:drill.trigger.npz -n 32 "
                f"--set recipe.training.epochs=1 {_JSON}"
            ),
        )
        for recipe in ("repair", "ft-sam")
    },
    "audit backdoor": (f"audit backdoor net.py:trained rows.npz {_TRUSTED}",),
    "audit poison": (f"audit poison split.npz --model net.py:make --suspects suspects.csv {_TRUSTED}",),
    "audit membership": (
        f"audit membership net.py:make rows.npz --train net.py:fit --references 4 --fpr 0.1 {_TRUSTED}",
    ),
    "audit privacy": (
        f"audit privacy net.py:make rows.npz --train net.py:fit --epsilon 2 --canaries 100 {_TRUSTED}",
    ),
    "audit generator": (
        f"audit generator net.py:generator rows.npz --held-out others.npz --samples 300 {_TRUSTED}",
    ),
    "explain a model": (f"explain mnist-cnn mnist-mini --threat linf:0.1 -n 24 {_JSON}",),
    "explain an example": (f"explain mnist-cnn mnist-mini --threat linf:0.1 --index 17 {_JSON}",),
    "explain a row": (f"explain net.py:trained rows.npz --threat linf:0.1 --index 7 {_TRUSTED}",),
    "monitor": (
        "monitor stream.npz --reference others.npz --model net.py:trained --trust-code --seed 0 -o -",
    ),
    "calibrate and assess a guard": (
        "calibrate mnist-cnn mnist-mini --guard guard.yaml -n 300 --seed 0 --device cpu",
        (
            "assess mnist-cnn mnist-mini -n 16 --threat linf:0.1,queries=50 --suite fgsm --no-doubts "
            f"--guard guard.yaml {_JSON}"
        ),
    ),
}
"""commands that are run one after the other in a folder with the files; the last one prints the result"""


def write_files() -> None:
    """Write the programs and the data that the commands name into the current folder."""
    Path("net.py").write_text(PROGRAMS)
    Path("texts.csv").write_text(TEXTS)
    Path("words.json").write_text(json.dumps(SYNONYMS))
    Path("guard.yaml").write_text(GUARD)
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(6, 3))
    x = rng.random((700, 6)).astype(np.float32)
    y = (x @ weight).argmax(1)
    np.savez("rows.npz", x=x[:400], y=y[:400])
    np.savez("others.npz", x=x[400:], y=y[400:])
    np.savez("split.npz", x_train=x[:300], y_train=y[:300], x_test=x[300:340], y_test=y[300:340])
    moved = (x[:300] + np.float32([0, 0.3, 0, 0, 0, 0])).clip(0, 1)
    np.savez("stream.npz", x=moved, y=y[:300])


def lasting(content: Any) -> Any:
    """The content of a JSON document without what differs from run to run."""
    if isinstance(content, dict):
        return {key: lasting(value) for key, value in content.items() if not _VARIES.search(key)}
    return [lasting(each) for each in content] if isinstance(content, list) else content


def printed(line: str, codes: Container[int] = (0,)) -> str:
    """What a command prints to its standard output. An exit code that is not in `codes` is an error."""
    command = [sys.executable, "-P", "-m", "holdfast", *shlex.split(line)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in codes:
        raise RuntimeError(f"holdfast {line} ended with {done.returncode}")
    return done.stdout


@contextlib.contextmanager
def folder_with_files() -> Iterator[Path]:
    """A temporary folder with the files, as the current one."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        write_files()
        yield Path(folder)


def of_commands(lines: tuple[str, ...]) -> Any:
    """The JSON that the last command prints, the examples of its table, and digests of the arrays that were written."""
    with folder_with_files() as folder:
        text = [printed(line, RESULT_CODES) for line in lines][-1]
        try:
            content = lasting(json.loads(text))
        except ValueError:
            content = text
        tables = {path.name: path.read_text() for path in folder.glob("*.csv") if path.name not in _INPUTS}
        paths = sorted(path for kind in ("npz", "safetensors") for path in folder.rglob(f"*.{kind}"))
        written = [path for path in paths if path.name not in _INPUTS and "holdfast-runs" not in path.parts]
        digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in written}
    return {"printed": content, "tables": tables, "arrays": digests}


def guarded_in_python() -> Any:
    """The decisions of a calibrated guard about requests, with the scores of its rules."""
    import torch
    from torch import nn

    import holdfast
    from benchmarks import networks

    x, y = networks.images("mnist", 400)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).eval()
    requests = [x[300:301], x[300:304], x[310:312] + 0.5, x[310:311].clamp(0, 0.4), torch.zeros(1, 28, 28)]
    requests += [(x[320:321] + 0.01 * step).clamp(0, 1) for step in range(6)]
    decisions = []
    with folder_with_files():
        guard = holdfast.Guard.from_yaml("guard.yaml").calibrate(
            network, (x[:300], y[:300]), false_positives=_RATE
        )
        for request in requests:
            decision = guard.before(request, principal="client")
            if decision.answered:
                with torch.no_grad():
                    decision = guard.after(decision, network(decision.x), network=network)
            scores = [[_described(score) for score in row.scores] for row in decision.rows]
            actions = [str(action) for action in decision.actions]
            decisions.append([str(decision.action), actions, scores, str(decision.refusal)])
    return decisions


def _described(score: Any) -> list[Any]:
    """The fields of a score of a rule. The score of `queries` decreases with the time since the last query."""
    value = round(score.value, 4) if score.rule == "queries" else score.value
    return [score.rule, value, score.fired, str(score.mode), str(score.action)]


@dataclass(frozen=True)
class Served:
    """A server that runs, and its process."""

    process: "subprocess.Popen[str]"
    host: str
    path: str

    def post(self, connection: http.client.HTTPConnection, x: np.ndarray) -> tuple[int, Any]:
        """The status and the JSON of the response to a request."""
        tensor = {"name": "input", "shape": list(x.shape), "datatype": "FP32", "data": x.reshape(-1).tolist()}
        headers = {"Content-Type": "application/json"}
        connection.request("POST", f"{self.path}/infer", json.dumps({"inputs": [tensor]}), headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())


@contextlib.contextmanager
def served(*options: str) -> Iterator[Served]:
    """A server of a bundled model with a guard, in the current folder."""
    address = ["serve", "mnist-cnn", "--port", "0", "--admin-port", "0", "--guard", "guard.yaml", *options]
    command = [sys.executable, "-P", "-m", "holdfast", *address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if found := re.search(r"serving http://([^/ ]+)(/\S+)", line):
                    yield Served(process, found[1], found[2])
                    break
            else:
                raise RuntimeError("the server ended before it answered")
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate()


def images(n: int) -> np.ndarray:
    """The first images of a data set."""
    from benchmarks import networks

    return networks.images("mnist", n)[0].numpy()


def guarded_by_a_server() -> Any:
    """Statuses and outputs of requests to a guarded server, and what `holdfast verify` prints about its audit."""
    x, answers = images(400), []
    requests = [
        x[300:301],
        x[300:304],
        x[310:312] + 0.5,
        x[310:311].clip(0, 0.4),
        np.zeros((1, 28, 28), np.float32),
    ]
    requests += [(x[320:321] + 0.01 * step).clip(0, 1) for step in range(6)]
    with folder_with_files():
        printed(
            f"calibrate mnist-cnn mnist-mini --guard guard.yaml -n 300 --false-positives {_RATE} --seed 0"
        )
        with served("--audit", "audit") as server:
            connection = http.client.HTTPConnection(server.host, timeout=60)
            for request in requests:
                status, content = server.post(connection, request)
                content.pop("id", None)
                answers.append([status, content])
        verified = re.sub(r"[0-9a-f]{64}|\d{4}-\d\d-\d\dT[0-9:.]*Z?", "…", printed("verify audit"))
    return {"answers": answers, "verified": verified}


RESULTS: Mapping[str, Callable[[], Any]] = {
    **{name: partial(of_commands, lines) for name, lines in COMMANDS.items()},
    "guarded requests in Python": guarded_in_python,
    "guarded requests to a server": guarded_by_a_server,
}
