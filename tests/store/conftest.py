"""Flushing to the disk guards against power cuts, which no test makes; without it the runs of a test are quick."""

import os
import subprocess
import sys

import pytest


@pytest.fixture(autouse=True)
def unflushed(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


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
