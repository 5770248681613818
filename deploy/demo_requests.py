"""Send benign images to a server, a few in each second, until it is stopped; then print how many were answered.

Usage: demo_requests.py URL KEY IMAGES.npz
"""

import json
import signal
import sys
import time
import urllib.request
from itertools import count
from types import FrameType

import numpy as np

RATE = 20.0
"""requests in a second"""


class _Stopped(Exception):
    """SIGTERM arrived."""


def _stop(number: int, frame: FrameType | None) -> None:
    raise _Stopped


def main(url: str, key: str, images: str) -> None:
    """Send the images in random order, again and again."""
    x, answered, failed = np.load(images)["x"] / 255.0, 0, 0
    rng = np.random.default_rng(0)
    signal.signal(signal.SIGTERM, _stop)
    try:
        for _ in count():
            image = x[rng.integers(len(x))]
            tensor = {
                "name": "input",
                "shape": [1, 1, 28, 28],
                "datatype": "FP32",
                "data": image.ravel().tolist(),
            }
            body = json.dumps({"inputs": [tensor]}).encode()
            headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
            try:
                with urllib.request.urlopen(
                    urllib.request.Request(url, body, headers), timeout=30
                ) as response:
                    response.read()
                answered += 1
            except OSError as error:
                failed += 1
                print(f"a request failed: {error}")
            time.sleep(1 / RATE)
    except _Stopped:
        print(f"benign requests: {answered} answered, {failed} failed")


if __name__ == "__main__":
    main(*sys.argv[1:])
