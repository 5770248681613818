"""Models of Keras on its torch back end, in a process of their own: the back end is chosen when keras is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")  # both come with the packages of the tests; keras itself is slow to look for

SCRIPT = Path(__file__).with_name("keras_models_checked.py")


@pytest.mark.slow  # importing keras takes some seconds
def test_models_of_keras_are_networks_with_a_layout():
    environment = {**os.environ, "KERAS_BACKEND": "torch"}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(SCRIPT)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if "No module named 'keras'" in done.stderr:
        pytest.skip("needs keras")
    assert done.returncode == 0, done.stderr
