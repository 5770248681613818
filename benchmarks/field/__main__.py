"""Measure the field: `python -m benchmarks.field`; with `--only NAME`, one entry without a record."""

import argparse
import json
import shutil
import sys
import traceback

from benchmarks.field import packages
from benchmarks.field.entries import ENTRIES
from benchmarks.field.entry import measured


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.field", description=__doc__)
    parser.add_argument("--only", metavar="ENTRY", choices=ENTRIES)
    name = parser.parse_args().only
    if name is None:
        from benchmarks.__main__ import main as rows

        sys.argv[1:] = ["--only", "field", "--afresh"]
        return rows()
    packages.install()
    folder = packages.FOLDER.with_name(name)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        cells = measured(ENTRIES[name], folder)
    except Exception as error:  # noqa: BLE001 - whatever prevents a measurement is the reason in the row
        traceback.print_exc()
        cells = {"reason": str(error)}
    (folder / "cells.json").write_text(json.dumps(cells, indent=1))
    print(json.dumps({k: v for k, v in cells.items() if k not in ("shown", "code")}, indent=1))
    return int("reason" in cells)


if __name__ == "__main__":
    raise SystemExit(main())
