"""Temporary folders and processes of a process that is killed are removed by its watcher."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.rows.cluster import children
from holdfast.engine import ray_watcher

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="processes are found in /proc"
)
SCRIPT = """
import os, subprocess, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from holdfast.engine import ray_watcher
folder = Path(sys.argv[1])
(folder / "file").touch()
ray_watcher.folder_watcher(folder, folder / "t")
subprocess.Popen(["sleep", "60"], env={**os.environ, "TMPDIR": str(folder / "t")})
print(flush=True)
time.sleep(60)
"""
WORKER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from holdfast.engine import ray_watcher
watcher = ray_watcher.folder_watcher(Path(sys.argv[1]))
watcher.wait()  # for the child, which has started a process of its own
print(flush=True)
time.sleep(60)
"""


def test_a_process_that_is_killed_leaves_neither_its_folder_nor_its_processes(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    words = [sys.executable, "-c", SCRIPT, str(folder), str(ROOT / "src")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    temporary, until = str(folder / "t"), time.monotonic() + 20
    while not (known := ray_watcher.processes_with(temporary)) and time.monotonic() < until:
        time.sleep(0.01)  # the environment of a process is set a moment after it has started
    os.kill(process.pid, signal.SIGKILL)
    _, said = process.communicate()  # until the watcher has ended, which has the same stderr
    assert len(known) == 1
    assert "continue the run with --resume" in said
    assert not folder.exists()
    assert not ray_watcher.processes_with(temporary)


def test_the_watcher_of_a_worker_is_no_child_of_it_and_removes_its_folder(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    words = [sys.executable, "-c", WORKER, str(folder), str(ROOT / "src")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    killed_by_ray = children(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    assert not killed_by_ray
    assert process.communicate()[1] == ""
    assert not folder.exists()


def test_a_watcher_that_is_closed_removes_its_folder_without_a_word(tmp_path, capfd):
    folder = tmp_path / "folder"
    folder.mkdir()
    ray_watcher.close(ray_watcher.folder_watcher(folder, folder / "t"))
    assert not folder.exists()
    assert capfd.readouterr().err == ""
