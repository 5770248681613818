"""Waiting for other processes and threads, on a machine that may be busy."""

import time

PATIENCE_S = 60.0


def until(condition, seconds=PATIENCE_S):
    """Wait until a condition holds, for up to a minute."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"the condition did not hold within {seconds:g} s"
        time.sleep(0.02)
