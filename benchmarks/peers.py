"""Where the peers are: importable packages, and checkouts of those that live in git only.

`use(folder)` puts checkouts on the import path: the folder may hold `auto-attack` (fra31/auto-attack), `adv-lib`
(jeromerony/adversarial-library), `sparse-imperceivable-attacks` (fra31/sparse-imperceivable-attacks), `RayS`
(uclaml/RayS), `SurFree` (t-maho/SurFree), `sparse-rs` (fra31/sparse-rs), `blackbox-bandits`
(MadryLab/blackbox-bandits), `advertorch` (BorealisAI/advertorch), `Adversarial-Patch-Training`
(sukrutrao/Adversarial-Patch-Training, licensed for research alone), `skip-connections-matter`
(csdongxian/skip-connections-matter) and `ml_privacy_meter` (privacytrustlab/ml_privacy_meter). adv-lib imports
torchvision and visdom at the top of modules that the attacks compared here never use (perceptual distances and
live plots), so empty stand-ins take their place, as they do for advertorch's pictures and for the log files of
Adversarial-Patch-Training; RayS gets one for its progress bar, which wants a terminal; torchattacks is
installed with `--no-deps`. The audio packages of `packaged_audio.py` get stand-ins for what reads and resamples
files. The row `onnx-files` reads wheels from the same folder.
"""

import importlib
import importlib.metadata
import itertools
import os
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from benchmarks.absent import Absent

CHECKOUTS = {
    "autoattack": "auto-attack",
    "adv_lib": "adv-lib",
    "pgd_attacks_pt": "sparse-imperceivable-attacks",
    "RayS": "RayS",
    "surfree": "SurFree",
    "rs_attacks": "sparse-rs",
    "main": "blackbox-bandits/src",
    "utils_sgm": "skip-connections-matter",
    "advertorch": "advertorch",
    "attacks": "Adversarial-Patch-Training",
    "modules": "ml_privacy_meter",
}
DISTRIBUTIONS = {
    "foolbox": "foolbox",
    "art": "adversarial-robustness-toolbox",
    "cleverhans": "cleverhans",
    "torchattacks": "torchattacks",
    "pycocotools": "pycocotools",
}
_TENSORBOARD = tuple(
    itertools.accumulate(("tensorboard", "backend", "event_processing", "event_accumulator"), "{}.{}".format)
)
_UNUSED: dict[str, dict[str, dict[str, Any]]] = {
    "adv_lib": {"torchvision": {"models": None}, "visdom": {}},
    "RayS": {"pgbar": {"progress_bar": lambda *_, **__: None}},
    "advertorch": {"torchvision": {"transforms": SimpleNamespace(ToPILImage=object, ToTensor=object)}},
    "attacks": {name: {} for name in ("h5py", *_TENSORBOARD)},
    "torchcrepe": {name: {} for name in ("librosa", "resampy", "torchaudio", "tqdm")},
    "resemblyzer": {
        "librosa": {},
        "webrtcvad": {},
        "scipy.ndimage.morphology": {"binary_dilation": None},
    },
}
"""Modules that a peer imports and never needs here, and what it takes from them by name."""
_commits: dict[str, str] = {}
_places: dict[str, str] = {}
_folders: list[Path] = []


def use(checkouts: Path | None) -> None:
    """Make the checkouts under a folder importable and remember the commit of each."""
    if checkouts is None:
        return
    if not checkouts.is_dir():
        raise Absent(
            f"{checkouts} is no folder; --peers wants the folder that holds {sorted(CHECKOUTS.values())}"
        )
    _folders.append(checkouts)
    for name, sub in CHECKOUTS.items():
        at = checkouts / sub
        if (at / name).is_dir() or (at / f"{name}.py").is_file():
            sys.path.insert(0, str(at))
            _commits[name], _places[name] = commit(at), str(at)


def folder() -> Path | None:
    """The folder that `--peers` names."""
    return _folders[-1] if _folders else None


def commit(checkout: Path) -> str:
    """The commit that a folder is checked out at."""
    asked = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    said = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
    return said.strip()[:12] or "no commit known"


def peer(module: str) -> ModuleType:
    """The imported module of a peer, or `Absent` with the way to get it."""
    top = module.partition(".")[0]
    try:
        with warnings.catch_warnings(), _alone(top), stand_ins(_UNUSED.get(top, {})):
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ImportError as e:
        where = (
            f"a checkout named {CHECKOUTS[top]} under --peers"
            if top in CHECKOUTS
            else f"`pip install {DISTRIBUTIONS.get(top, top)}` in the benchmarks' environment"
        )
        raise Absent(f"{top} does not import ({e}); it wants {where}") from e


def server_python(module: str) -> Path:
    """Python of the environment of the servers, which `make check-servers` creates in `.venv-servers`, or which the
    variable `HOLDFAST_SERVERS` names. Raises `Absent` if it does not have a module.
    """
    venv = Path(os.environ.get("HOLDFAST_SERVERS") or Path(__file__).resolve().parents[1] / ".venv-servers")
    python = venv / "bin" / "python"
    if server_version(module, python) is None:
        raise Absent(
            f"{module} is not in {venv}; `make check-servers` installs it, or HOLDFAST_SERVERS names its environment"
        )
    return python


def server_version(module: str, python: Path) -> str | None:
    """Version of a package in the environment of the servers; None if it is not installed."""
    code = f"import importlib.metadata as m; print(m.version({module!r}))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def version(module: str) -> str:
    """Version of an installed peer, or the commit of a checkout."""
    if module in _commits:
        return _commits[module]
    try:
        return importlib.metadata.version(DISTRIBUTIONS.get(module, module))
    except importlib.metadata.PackageNotFoundError:
        return "absent"


@contextmanager
def _alone(top: str) -> Iterator[None]:
    """No checkout on the path but its own, while a peer is imported: several have modules of the same name."""
    others = {place for name, place in _places.items() if name != top} if top in _places else set()
    kept = sys.path[:]
    sys.path[:] = [place for place in kept if place not in others]
    for name in [name for name in sys.modules if others and name.partition(".")[0] == "utils"]:
        del sys.modules[name]
    try:
        yield
    finally:
        sys.path[:] = kept


@contextmanager
def stand_ins(wanted: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """Modules with these names in them and nothing else, while a peer is imported or created. Modules that are imported
    already are not replaced.
    """
    lent = [name for name in wanted if name not in sys.modules]
    for name in lent:
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(wanted[name])
    try:
        yield
    finally:
        for name in lent:
            del sys.modules[name]
