"""Write `benchmarks/references/river.json`: where ADWIN and Page-Hinkley of river detect changes. In an environment
with river:

    python -m venv ENV && ENV/bin/pip install river==0.26.1 && ENV/bin/python -m benchmarks.river_detections
"""

import json
from importlib.metadata import version
from pathlib import Path

from river.drift import ADWIN, PageHinkley

from benchmarks.drift_streams import streams

DETECTORS = {
    "adwin": lambda: ADWIN(delta=0.002),
    "page-hinkley": lambda: PageHinkley(delta=0.15, threshold=30.0),
    "page-hinkley, defaults of river": lambda: PageHinkley(delta=0.005, threshold=50.0),
}
PLACE = Path(__file__).parent / "references" / "river.json"


def detections(detector: object, values: list[float]) -> list[int]:
    found = []
    for n, value in enumerate(values, 1):
        detector.update(value)
        if detector.drift_detected:
            found.append(n)
    return found


def main() -> None:
    rows = {
        name: {key: detections(make(), values) for key, make in DETECTORS.items()}
        for name, values in streams()
    }
    content = {"river": version("river"), "detections": rows}
    lines = json.dumps(content, separators=(",", ":")).replace('},"', '},\n"')
    PLACE.write_text(lines + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
