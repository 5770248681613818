"""Records, in a process of pytest, the outcome and the time of each test. `PROBE` is a module that records which test
executes which place; it is added to the package while the tests run.
"""

import json
import os
import time
from pathlib import Path

import pytest

PROBE = '''"""Records which test executes a place."""

import os

_SEEN = set()
_FOLDER = {folder!r}


def hit(place):
    """Record the place once for each test and process."""
    test = os.environ.get("PYTEST_CURRENT_TEST", "")
    if (place, test) in _SEEN:
        return
    _SEEN.add((place, test))
    try:
        if not test:
            with open(_FOLDER + "/current") as file:
                test = file.read()
        with open(f"{{_FOLDER}}/hits-{{os.getpid()}}", "a") as file:
            file.write(f"{{place}}\\t{{test.rpartition(' (')[0] or test}}\\n")
    except OSError:  # a process with limits
        pass
'''
"""source of `holdfast._probe`"""
_FOLDER = Path(os.environ.get("HOLDFAST_FAULTS", "."))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    """Write the name of the test and then its time, with that of its fixtures."""
    (_FOLDER / "current").write_text(item.nodeid)
    start, used = time.monotonic(), time.process_time()
    result = yield
    slow = item.get_closest_marker("slow") is not None
    entry = {"test": item.nodeid, "slow": slow, "s": round(time.monotonic() - start, 3)}
    entry["cpu_s"] = round(time.process_time() - used, 3)
    with (_FOLDER / "times").open("a") as file:
        file.write(json.dumps(entry) + "\n")
    return result


def pytest_runtest_logreport(report):
    """Write which test failed."""
    if report.failed:
        with (_FOLDER / "failures").open("a") as file:
            file.write(json.dumps({"test": report.nodeid, "why": str(report.longrepr)[-300:]}) + "\n")
