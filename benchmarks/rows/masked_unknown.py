"""Masked models that the attacks were not developed on, honest networks, and models without any gradient, under
`--adaptive`.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks import controls
from benchmarks.networks import images
from benchmarks.parts import part
from benchmarks.record import Cells, Claim, Outcome
from holdfast.attacks import HopSkipJump, Square
from holdfast.attacks.suites import suite
from holdfast.core.batch import Batch, Data
from holdfast.core.constraints import Linf
from holdfast.doubts.gallery import DISCRETE, EPS, Item, undefended
from holdfast.io.data.data import open_data
from holdfast.io.data.loaders import as_data
from holdfast.runs.assess.result import Result
from holdfast.runs.harness.kinds.passes import FIXED
from holdfast.runs.harness.stage import Member
from holdfast.verbs.exhibition import SOUND, assessed_net

WHAT = "masked models that attacks were not developed on, honest networks, and models without any gradient"
ROW = "masked-unknown"
N = 200
CONTROLS = 50
"""Images of each honest network, with which all of them take about a quarter of an hour."""
SEARCHED = 60
"""Digits of each model without any gradient, whose thousands of queries are slow."""
FOREST = 100
"""Trees of the random forest."""
PASSES, SECONDS = 20_000, 300
LEAST = 200
"""Queries of each search that a model without any gradient is compared with, where the adaptive run has spent none."""


class Forest(nn.Module):
    """A random forest on pixels, which returns the probabilities of scikit-learn."""

    def __init__(self, digits: Batch) -> None:
        super().__init__()
        from sklearn.ensemble import RandomForestClassifier

        self.forest = RandomForestClassifier(FOREST, random_state=0, n_jobs=1)
        self.forest.fit(digits.x.flatten(1).numpy(), digits.y.numpy())

    def forward(self, x: Tensor) -> Tensor:
        probabilities = self.forest.predict_proba(x.detach().flatten(1).cpu().numpy())
        return torch.from_numpy(probabilities.astype(np.float32)).to(x.device)


class NearestPixels(nn.Module):
    """The label of the nearest training digit in Euclidean distance, as one-hot scores."""

    def __init__(self, digits: Batch) -> None:
        super().__init__()
        self.register_buffer("stored", digits.x.flatten(1))
        self.register_buffer("labels", nn.functional.one_hot(digits.y, 10).float())
        self.stored: Tensor
        self.labels: Tensor

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.labels[torch.cdist(x.flatten(1), self.stored).argmin(1)]


REFERENCE = (
    "*reference* is the robust accuracy of the twin of a masked model under `standard`, of an honest network itself "
    "under `standard`, and of a model without any gradient under Square and HopSkipJump, whose queries are together as "
    "many as the passes of the adaptive run"
)

BARE: dict[str, Callable[[Batch], nn.Module]] = {"random-forest": Forest, "nearest-pixels": NearestPixels}
"""Models without any gradient that are no defence."""


def measured() -> Outcome:
    masked = {item.name: part(ROW, item.name, partial(_masked, item)) for item in DISCRETE}
    honest = {c.name: part(ROW, f"honest {c.name}", partial(_honest, c)) for c in controls.HONEST}
    bare = {name: part(ROW, name, partial(_bare, build)) for name, build in BARE.items()}
    unknown = [kept["measured"] for kept in masked.values()]
    far = [row for row in unknown if row["adaptive"] - row["reference"] > 0.10]
    calm = [row for row in far if not row["raised after"]]
    controlled = [kept["measured"] for kept in honest.values()]
    trees = [kept["measured"] for kept in bare.values()]
    claims = [
        Claim("masked models >= 8", len(unknown), 8, least=True),
        Claim(
            "share of them with adaptive - twin <= 0.10, >= 0.75",
            1 - len(far) / len(unknown),
            0.75,
            least=True,
        ),
        Claim("others of them without a doubt that stays raised <= 0", len(calm), 0),
        Claim(f"most passes per example <= {PASSES}", max(row["passes"] for row in unknown), PASSES),
        Claim(f"most CPU seconds of an adaptive run <= {SECONDS}", max(r["CPU s"] for r in unknown), SECONDS),
        Claim("honest networks >= 20", len(controlled), 20, least=True),
        Claim("honest networks with a raised doubt <= 0", sum(bool(r["raised"]) for r in controlled), 0),
        Claim(
            "examples that adaptive and standard differ by, honest networks, most <= 1",
            max(round(abs(row["adaptive"] - row["reference"]) * row["n"]) for row in controlled),
            1,
        ),
        *(
            Claim(f"{name}: adaptive - Square + HopSkipJump at equal queries <= 0", _beyond(kept), 0)
            for name, kept in bare.items()
        ),
    ]
    config: Cells = {
        "n": N,
        "n of honest networks": CONTROLS,
        "n of models without a gradient": SEARCHED,
        "naive": "PGD-40, cross-entropy",
        "seed": 0,
        "trees": FOREST,
    }
    return Outcome([*unknown, *controlled, *trees], claims, config, masked | honest | bare, [REFERENCE])


def _beyond(kept: Cells) -> float:
    return float(kept["measured"]["adaptive"] - kept["measured"]["reference"])


def _digits() -> Batch:
    training = open_data("mnist-mini", split="train")
    return training.read(0, len(training))


def _masked(item: Item) -> Cells:
    """The row of one masked model, whose twin is attacked by `standard`."""
    training, data = _digits(), open_data("mnist-mini", n=N)
    plain = undefended(training)
    model = item.build(training, plain)
    twin = item.twin(model) if item.twin else plain
    sound = assessed_net(twin, data, item.eps, _members(item.eps))
    return _attacked("masked", item.name, model, item.eps, sound)


def _honest(control: controls.Control) -> Cells:
    """The row of an honest network, which the suite `standard` attacks, and then what its doubts require."""
    x, y = images(control.data, CONTROLS)
    result, most = _adaptively(controls.trained(control), as_data(x, y), control.eps, _members(control.eps))
    left = [a.surviving_after for a in result.attacks if not a.adaptive][-1]
    return _cells("honest", control.name, control.eps, result, most) | {"reference": left / len(x)}


def _bare(build: Callable[[Batch], nn.Module]) -> Cells:
    """The row of a model without any gradient, beside two searches with the passes of the adaptive run as queries."""
    model, data = build(_digits()), open_data("mnist-mini", n=SEARCHED)
    adaptive, most = _adaptively(model, data, EPS, (FIXED,))
    row = _cells("without a gradient", type(model).__name__, EPS, adaptive, most)
    queries = max(LEAST, row["passes"] // 2)
    searches = (
        Member("Square", Square(queries=queries)),
        Member("HopSkipJump", HopSkipJump(queries=queries)),
    )
    searched = assessed_net(model, data, EPS, searches)
    return row | {"reference": _robust(searched), "naive": _naive(adaptive), "queries": 2 * queries}


def _attacked(kind: str, name: str, model: nn.Module, eps: float, sound: Result) -> Cells:
    data = open_data("mnist-mini", n=N)
    adaptive, most = _adaptively(model, data, eps, (FIXED,))
    return _cells(kind, name, eps, adaptive, most) | {"naive": _naive(adaptive), "reference": _robust(sound)}


def _adaptively(model: nn.Module, data: Data, eps: float, members: tuple[Member, ...]) -> tuple[Result, int]:
    """The result of a run with doubts and adaptive attacks, and the most forward and backward passes of an example in
    all adaptive attacks and their checks.
    """
    with TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        result = assessed_net(model, data, eps, members, doubts="all", adaptive=True, run=run)
        stages = [run / f"{attack.stage}.safetensors" for attack in result.attacks if attack.adaptive]
        read = [load_file(file) for file in (*stages, *run.glob("answer-checks-*.safetensors"))]
    passes = sum((each["queries"] + each["backwards"] for each in read), torch.zeros(1, dtype=torch.int64))
    return result, int(passes.max())


def _members(eps: float) -> tuple[Member, ...]:
    return tuple(Member(*named) for named in suite(SOUND, Linf(eps)).attacks)


def _robust(result: Result) -> float:
    return float(result.metrics["robust_accuracy"].value)


def _naive(result: Result) -> float:
    """What PGD-40 alone leaves: the first attack of the run."""
    return result.attacks[0].surviving_after / len(result.evidence["correct"])


def _cells(kind: str, name: str, eps: float, result: Result, passes: int) -> Cells:
    """The cells that all rows have, of a run with doubts and adaptive attacks, and its most passes of an example."""
    ran = [attack for attack in result.attacks if attack.adaptive]
    names: dict[str, list[str]] = {state: [] for state in ("raised", "answered")}
    for doubt in result.doubts:
        if doubt.state in names:
            names[doubt.state].append(doubt.name)
    return {
        "model": name,
        "kind": kind,
        "eps": eps,
        "n": len(result.evidence["correct"]),
        "clean": float(result.metrics["clean_accuracy"].value),
        "naive": "",
        "reference": "",
        "adaptive": _robust(result),
        "raised": ", ".join((*names["raised"], *names["answered"])),
        "raised after": ", ".join(names["raised"]),
        "attacks": ", ".join(f"{a.name} {a.surviving_before} → {a.surviving_after}" for a in ran),
        "passes": passes,
        "CPU s": sum(a.cost.cpu_s for a in ran),
    }
