"""What an accelerator must show: `python -m benchmarks.gpu`, in at most nine minutes.

It runs with the Python and torch that it finds: it needs numpy and annotated-types besides torch, and Pillow for the
images of CIFAR-10, but neither an installed package nor a network. The data (`cifar10_test.npz` and
`cifar10_train0.npz`, 58 MB) come from the folder that `HOLDFAST_DATA` names, the networks from that of
`HOLDFAST_MODELS`. Each part has its own time limit, and the record is written after each line of a part.
"""

import argparse
import importlib
import importlib.util
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import device as Device

    from holdfast.core.batch import Batch

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("torch", "numpy", "annotated_types", "PIL")
LEARNING = ("standard", "n-fgsm", "pgd", "trades", "mart")
"""recipes of which one epoch is timed"""
TRACKS = ("pgd", "trades")
"""recipes with which ResNet-18 is trained for as many epochs as time allows"""
Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Numbers of examples, and the width of the network that is trained; small ones test the code without a GPU."""

    verdicts: int = 128
    exact: int = 32
    """of the suite `standard`, which is also run on the processor"""
    certified: int = 64
    training: int = 20_000
    judged: int = 1_000
    width: int = 64
    batch: int = 256


@dataclass(frozen=True)
class Part:
    """A part of the measurement: its name, its time limit in seconds, and its lines."""

    name: str
    limit_s: int
    rows: Callable[["Device", Sizes, float], Iterator[Row]]
    """function of the device, the sizes and the time (`time.monotonic`) at which the part ends"""


def laws(device: "Device", sizes: Sizes, end: float) -> Iterator[Row]:
    """Each attack under each norm: its points are allowed, and break the examples that its points on the CPU break."""
    from holdfast.core.constraints import allowed
    from holdfast.testing import laws as properties

    cases = importlib.import_module("cases")  # of the tests
    for case in map(cases.brief, [*cases.ATTACKS, *cases.LIMITED]):
        model, batch, threat = properties.problem(case)
        expected, _ = properties.run(case, model, batch, threat)
        broken = properties.broken(model, batch, expected)
        model, moved = model.to(device), batch.to(device)
        x_adv, _ = properties.run(case, model, moved, threat)
        differing = int((properties.broken(model, moved, x_adv).cpu() != broken).sum())
        inside = bool(allowed(threat.constraint, x_adv, moved.x, model.bounds).all())
        yield {
            "what": repr(case),
            "differing verdicts": differing,
            "ok": inside and differing <= 1 and x_adv.device == moved.x.device,
        }


def verdicts(device: "Device", sizes: Sizes, end: float) -> Iterator[Row]:
    """Examples that `fast` and `standard` break on the device and on the CPU."""
    import torch

    from benchmarks.networks import present
    from holdfast.attacks.suites import suite
    from holdfast.core.batch import Batch
    from holdfast.core.constraints import Linf
    from holdfast.core.model import Classifier
    from holdfast.core.threat import ThreatModel
    from holdfast.runs.harness.measure import measure

    settings = (("cifar_cnn_a_adv", 2 / 255), ("cifar_resnet20", 1 / 255))
    for name, n in (("fast", sizes.verdicts), ("standard", sizes.exact)):
        notes: list[str] = []
        for net, x, y, eps in present(settings, n, notes):
            model, batch = Classifier(net.module).eval().requires_grad_(False), Batch(x, y, torch.arange(n))
            attacks = [attack for _, attack in suite(name, Linf(eps)).attacks]
            found, took = {}, {}
            for place in (device, torch.device("cpu")):
                begin = time.monotonic()
                evidence = measure(model.to(place), [batch.to(place)], attacks, ThreatModel(Linf(eps)))
                took[place] = time.monotonic() - begin
                found[place] = evidence["correct"] & ~evidence["success"]
            differing = int((found[device] != found[torch.device("cpu")]).sum())
            yield {
                "what": f"{name}, {net.name}",
                "n": n,
                "robust": int(found[device].sum()),
                "differing verdicts": differing,
                "s": round(took[device], 2),
                "s on the CPU": round(took[torch.device("cpu")], 2),
                "ok": differing <= max(1, n // 100),
            }
        for note in notes:
            yield {"what": f"{name}: {note}", "ok": False}


def crown(device: "Device", sizes: Sizes, end: float) -> Iterator[Row]:
    """Bounds by CROWN on the device and on the CPU."""
    import torch

    from benchmarks.networks import present
    from holdfast.certifiers.provers import Crown
    from holdfast.core.batch import Batch
    from holdfast.core.constraints import Linf
    from holdfast.core.model import Classifier
    from holdfast.core.threat import ThreatModel

    notes: list[str] = []
    for net, x, y, eps in present((("cifar_cnn_a_adv", 1 / 255),), sizes.certified, notes):
        model = Classifier(net.module).eval().requires_grad_(False)
        batch, threat = Batch(x, y, torch.arange(len(x))), ThreatModel(Linf(eps))
        expected = Crown().ready(model, batch, threat)(batch)
        model, moved = model.to(device), batch.to(device)
        ready = Crown().ready(model, moved, threat)
        ready(moved)  # the first call chooses the algorithms of the libraries
        wait(device)
        begin = time.monotonic()
        proofs = ready(moved)
        wait(device)
        difference = (proofs.bound.cpu() - expected.bound).abs() / (1 + expected.bound.abs())
        clear = expected.bound.abs() > 1e-2
        differing = int((proofs.certified.cpu() != expected.certified)[clear].sum())
        yield {
            "what": f"CROWN, {net.name}",
            "certified": int(proofs.certified.sum()),
            "differing": differing,
            "largest relative difference of a bound": float(difference.max()),
            "ms an image": round(1000 * (time.monotonic() - begin) / len(batch), 3),
            "ok": not differing and float(difference.max()) <= 1e-2,
        }
    for note in notes:
        yield {"what": note, "ok": False}


def throughput(device: "Device", sizes: Sizes, end: float) -> Iterator[Row]:
    """Images a second of ResNet-18: predictions, and PGD with ten steps."""
    import torch

    from holdfast.attacks import PGD
    from holdfast.core.batch import Batch
    from holdfast.core.constraints import Linf
    from holdfast.core.draws import Draws
    from holdfast.core.model import Classifier
    from holdfast.core.threat import ThreatModel
    from holdfast.core.training import Precision, computing, lay_out

    n, attack, threat = sizes.batch, PGD(steps=10, drop=False), ThreatModel(Linf(8 / 255))
    batch = Batch(torch.rand(n, 3, 32, 32), torch.zeros(n, dtype=torch.long), torch.arange(n)).to(device)
    formats: tuple[Precision, ...] = ("float32", "bfloat16")
    for precision in formats:
        model = Classifier(resnet18(sizes)).eval().requires_grad_(False).to(device)
        lay_out(model, "channels-last")
        works = {
            "predictions": partial(model, batch.x),
            "PGD-10": partial(attack, model, batch, threat, rng=Draws(0)),
        }
        for what, work in works.items():
            with computing(precision, device):
                work()
                wait(device)
                begin, rounds = time.monotonic(), 0
                while rounds < 1 or (time.monotonic() - begin < 4 and time.monotonic() < end):
                    work()
                    wait(device)
                    rounds += 1
            per_second = rounds * n / (time.monotonic() - begin)
            yield {"what": f"{what} in {precision}", "images a second": round(per_second, 1), "ok": True}


def epochs(device: "Device", sizes: Sizes, end: float) -> Iterator[Row]:
    """One epoch of five recipes in bfloat16: its time, and whether the loss is finite."""
    data = cifar("train", sizes.training, device)
    for name in LEARNING:
        begin = time.monotonic()
        *_, last = learned(name, sizes, data, device, 1)
        wait(device)
        yield {
            "what": f"one epoch of {name} on {len(data)} images",
            "s": round(time.monotonic() - begin, 2),
            "loss": last.measured["loss"],
            "GB": memory(device),
            "ok": last.measured["loss"] < float("inf"),
        }


def tracks(device: "Device", sizes: Sizes, end: float) -> Iterator[Row]:
    """ResNet-18, trained for as many epochs as time allows, and its accuracy, clean and under PGD-40."""
    import torch

    from holdfast.attacks import PGD
    from holdfast.core.constraints import Linf
    from holdfast.core.model import Classifier
    from holdfast.core.threat import ThreatModel
    from holdfast.runs.harness.measure import measure

    data, judged = cifar("train", sizes.training, device), cifar("test", sizes.judged, device)
    for place, name in enumerate(TRACKS):
        begin = time.monotonic()
        share_s = (end - begin) / (len(TRACKS) - place)
        list(learned(name, sizes, data, device, 1))
        epoch_s = time.monotonic() - begin  # too long by the choice of algorithms, which leaves time to judge
        n_epochs = max(1, int(0.85 * (share_s - epoch_s) / epoch_s))
        *_, last = learned(name, sizes, data, device, n_epochs)
        model = Classifier(resnet18(sizes)).to(device)
        last.put_into(model)
        evidence = measure(
            model.eval().requires_grad_(False), [judged], [PGD(steps=40)], ThreatModel(Linf(8 / 255))
        )
        robust = evidence["correct"] & ~evidence["success"]
        yield {
            "what": f"{name}, {n_epochs} epochs on {len(data)} images",
            "clean accuracy": round(float(evidence["correct"].double().mean()), 4),
            "robust accuracy": round(float(robust.double().mean()), 4),
            "s an epoch": round(epoch_s, 2),
            "s": round(time.monotonic() - begin, 1),
            "ok": bool(torch.isfinite(evidence["margin"]).all()),
        }


PARTS = (
    Part("laws", 60, laws),
    Part("verdicts", 120, verdicts),
    Part("crown", 40, crown),
    Part("throughput", 40, throughput),
    Part("epochs", 80, epochs),
    Part("tracks", 170, tracks),
)
"""the parts in their order; the limits are 8.5 minutes together"""


def resnet18(sizes: Sizes) -> Any:
    """A new ResNet-18 for CIFAR-10, or a narrower one."""
    from holdfast.io.models.architectures import ARCHITECTURES

    return ARCHITECTURES["resnet"](width=sizes.width, blocks=2, stages=4)


def learned(name: str, sizes: Sizes, data: "Batch", device: "Device", n_epochs: int) -> Iterator[Any]:
    """The checkpoints of a recipe that trains a new ResNet-18."""
    import torch

    from holdfast import recipes
    from holdfast.core.catalogue import RECIPES
    from holdfast.core.constraints import Linf
    from holdfast.core.draws import Draws
    from holdfast.core.model import Classifier
    from holdfast.core.threat import ThreatModel
    from holdfast.recipes.training.fit import Training
    from holdfast.recipes.training.recipe import trained_as

    torch.manual_seed(0)
    how = Training(
        epochs=n_epochs, batch=sizes.batch, optimizer="sgd", lr=0.1, precision="bfloat16", augment="shift"
    )
    entry = RECIPES[name]
    recipe = trained_as(getattr(recipes, entry.cls)(**entry.settings), how)
    yield from recipe(Classifier(resnet18(sizes)).to(device), data, ThreatModel(Linf(8 / 255)), rng=Draws(0))


def cifar(split: str, n: int, device: "Device") -> "Batch":
    """The first images of CIFAR-10 on the device."""
    import torch

    from benchmarks.networks import images
    from holdfast.core.batch import Batch

    x, y = images("cifar10", n, split)
    return Batch(x, y, torch.arange(len(x))).to(device)


def wait(device: "Device") -> None:
    """Wait until the device has finished its work."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory(device: "Device") -> float:
    """Largest memory in use on the device so far, in GB; 0 on the CPU."""
    import torch

    return round(torch.cuda.max_memory_allocated(device) / 1e9, 2) if device.type == "cuda" else 0.0


class Late(BaseException):
    """A part has reached its time limit. It is no `Exception`, because code of a part may handle those."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise `Late` inside the context after some seconds."""

    def late(number: int, frame: FrameType | None) -> None:
        raise Late

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measured(device: "Device", sizes: Sizes, parts: tuple[Part, ...], path: Path) -> list[Row]:
    """The lines of all parts, which are written to a record after each of them. A part that fails or reaches its limit
    has a line that says so.
    """
    rows: list[Row] = []
    for part in parts:
        begin = time.monotonic()
        produced = part.rows(device, sizes, begin + part.limit_s)
        try:
            with limited(part.limit_s):
                for row in produced:
                    add(rows, {"part": part.name, **row}, device, path)
        except Late:
            add(
                rows,
                {"part": part.name, "what": f"stopped after {part.limit_s} s", "ok": False},
                device,
                path,
            )
        except Exception as error:  # noqa: BLE001 - the other parts are measured nevertheless
            what = f"{type(error).__name__}: {error}"
            add(rows, {"part": part.name, "what": what, "ok": False}, device, path)
    return rows


def add(rows: list[Row], row: Row, device: "Device", path: Path) -> None:
    """Print a line, and write the record with it."""
    import torch

    from benchmarks.record import hardware, versions

    print("  ".join(f"{value}" for value in row.values()), flush=True)
    rows.append(row)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    record = {
        "row": "gpu",
        "what": "Attacks, verdicts, bounds and training on an accelerator, against the CPU",
        "command": "python -m benchmarks.gpu",
        "made": f"{datetime.now(UTC):%Y-%m-%dT%H:%MZ}",
        "hardware": {**hardware(), "accelerator": name},
        "versions": versions(),
        "claims": [{"claim": row["what"], "value": float(row["ok"]), "met": row["ok"]} for row in rows],
        "table": rows,
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """Measure on the first accelerator, and return the exit code: 0, 1 if a line is not as it must be, 2 if nothing can
    be measured.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).parent / "records" / f"{datetime.now(UTC):%Y-%m-%d}-gpu.json"
    parser.add_argument("--record", type=Path, default=default, help="file that the record is written to")
    path = parser.parse_args().record
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"this Python ({sys.executable}) lacks {', '.join(missing)}; install it there", file=sys.stderr)
        return 2
    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]  # the cases of the laws are those of the tests
    import torch

    if not torch.cuda.is_available():
        print("torch finds no accelerator (torch.cuda.is_available() is false)", file=sys.stderr)
        return 2
    rows = measured(torch.device("cuda"), Sizes(), PARTS, path)
    print(path)
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
