"""A disk that is full."""

import subprocess
import sys

import pytest


@pytest.fixture
def tiny(tmp_path):
    """A real disk of 256 kB, which is full for root too, where mounting one is allowed."""
    if sys.platform != "linux":
        pytest.skip("needs a file system that is full")
    place = tmp_path / "tiny"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    yield place
    subprocess.run(["umount", str(place)], check=True)
