"""`holdfast assess` on good files of every format, with this version and with the one before files had limits.

Both versions run the same commands in fresh processes, in turn. Counted is the CPU time of the command and of the
processes that it starts. The files are made by this version.
"""

import io
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import nn

from benchmarks.absent import Absent
from benchmarks.record import Cells, Claim, Outcome
from holdfast.io.models.architectures import cnn, mlp
from holdfast.io.models.models import bundled_models

WHAT = "holdfast assess on files of each format: CPU time with limits of memory and time, and before there were any"
BEFORE = "e09f51d"
"""the last commit whose readers parse tables, ONNX, programs and estimators in the process of the run"""
ROUNDS = 5
SETTINGS = ("-n", "64", "--threat", "linf:0.1,queries=40", "--suite")
SIDE, FEATURES, CLASSES = 28, 64, 10
SHARE = 1.02
START_S, START_WITH_TORCH_S = 0.3, 2.0
"""CPU seconds that a limited process may add without torch, and with it"""
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Command:
    """Arguments of `holdfast assess`, and what the limited process that it starts may take."""

    arguments: tuple[str, ...]
    extra_s: float | None = None
    """None where the file is parsed in the process of the run"""
    suite: str = "pgd"


def measured() -> Outcome:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        before, commands = _checkout(folder / "before"), _commands(folder)
        spent: dict[str, dict[str, list[float]]] = {form: {"before": [], "now": []} for form in commands}
        for k in range(ROUNDS + 1):
            for form, command in commands.items():
                order = [("before", before), ("now", _ROOT / "src")]
                for version, source in order if k % 2 else order[::-1]:
                    seconds = _cpu_seconds(command, source, folder)
                    if k:  # the first round compiles and fills the caches
                        spent[form][version].append(seconds)
    imported = [_imported() for _ in range(ROUNDS)]
    table: list[Cells] = []
    claims: list[Claim] = []
    for form, seconds in spent.items():
        pairs = list(zip(seconds["now"], seconds["before"], strict=True))
        share, extra = median(a / b for a, b in pairs), median(a - b for a, b in pairs)
        table.append(
            {"format": form, "CPU s before": median(seconds["before"]), "extra CPU s": extra, "share": share}
        )
        most = commands[form].extra_s
        if most is None:
            claims.append(Claim(f"{form}: CPU / before <= {SHARE}", share, SHARE))
        else:
            claims.append(Claim(f"{form}: CPU - before <= {most} s", extra, most))
    table.append({"format": "import torch, for comparison", "CPU s before": median(imported)})
    config: Cells = {"before": BEFORE, "rounds": ROUNDS, "settings": " ".join(SETTINGS)}
    return Outcome(table, claims, config, {"seconds": spent})


def _checkout(folder: Path) -> Path:
    """The sources of the earlier version; `Absent` where this is no clone with its history."""
    done = subprocess.run(["git", "archive", BEFORE, "src"], cwd=_ROOT, capture_output=True, check=False)
    if done.returncode:
        raise Absent(f"the commit {BEFORE} is not in this clone")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder / "src"


def _cpu_seconds(command: Command, source: Path, folder: Path) -> float:
    environment = {**os.environ, "PYTHONPATH": str(source)}
    words = ["-P", "-m", "holdfast", "assess", *command.arguments, *SETTINGS, command.suite]
    start = _children()
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"holdfast {' '.join(words)} ended with {done.returncode}: {done.stderr}")
    return _children() - start


def _imported() -> float:
    start = _children()
    subprocess.run([sys.executable, "-P", "-c", "import torch"], check=True)
    return _children() - start


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _commands(folder: Path) -> Mapping[str, Command]:
    """Small good files of every format, and how they are assessed."""
    torch.manual_seed(0)
    images, rows = ("mnist-mini",), (str(_rows(folder)),)
    net, flat = cnn(), mlp(FEATURES, CLASSES).eval()
    torch.save(net.state_dict(), folder / "net.pt")
    safetensors.torch.save_file(flat.state_dict(), folder / "flat.safetensors")
    features = ("--arch", "mlp", "--model-args", f"features={FEATURES}")
    found = {
        "bundled .safetensors and .npz": Command(("mnist-cnn", *images)),
        "folder of images": Command(("mnist-cnn", str(_pictures(folder)))),
        ".csv": Command(("flat.safetensors", str(_table(folder)), "--label", "label", *features), START_S),
        ".pt": Command(("net.pt", *images, "--arch", "cnn"), START_WITH_TORCH_S),
        ".pt2": Command((str(_program(net, folder)), *images), START_WITH_TORCH_S),
    }
    return {**found, **_extras(folder, net, rows, images)}


def _rows(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    np.savez(folder / "rows.npz", x=rng.random((200, FEATURES), np.float32), y=rng.integers(0, CLASSES, 200))
    return folder / "rows.npz"


def _table(folder: Path) -> Path:
    with np.load(folder / "rows.npz") as rows:
        lines = [",".join([*(f"c{i}" for i in range(FEATURES)), "label"])]
        lines += [
            ",".join([*map(str, x.tolist()), str(y)]) for x, y in zip(rows["x"], rows["y"], strict=True)
        ]
    (folder / "rows.csv").write_text("\n".join(lines))
    return folder / "rows.csv"


def _pictures(folder: Path) -> Path:
    with np.load(bundled_models()["mnist-cnn"].parent / "mnist-mini.npz") as digits:
        x, y = digits["x_test"][:200], digits["y_test"][:200]
    for i, (image, label) in enumerate(zip(x.reshape(-1, SIDE, SIDE), y, strict=True)):
        place = folder / "images" / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{i}.png")
    return folder / "images"


def _program(net: nn.Module, folder: Path) -> Path:
    batch = torch.export.Dim("n")
    exported = torch.export.export(net.eval(), (torch.rand(2, 1, SIDE, SIDE),), dynamic_shapes=({0: batch},))
    torch.export.save(exported, folder / "net.pt2")
    return folder / "net.pt2"


def _extras(
    folder: Path, net: nn.Module, rows: tuple[str, ...], images: tuple[str, ...]
) -> dict[str, Command]:
    """The formats that need extras of the package, where these are installed."""
    import skops.io
    from sklearn.linear_model import LogisticRegression

    example = torch.rand(2, 1, SIDE, SIDE)
    torch.onnx.export(
        net.eval(),
        (example,),
        folder / "net.onnx",
        dynamo=False,
        dynamic_axes={"x": {0: "n"}},
        input_names=["x"],
    )
    with np.load(rows[0]) as data:
        skops.io.dump(LogisticRegression().fit(data["x"], data["y"]), folder / "model.skops")
    return {
        ".onnx": Command(("net.onnx", *images), START_S),
        ".skops": Command(("model.skops", *rows), START_WITH_TORCH_S, "square"),
    }
