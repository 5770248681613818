"""`python -m fuzzing`: damages files with new seeds, until it is stopped."""

import argparse
import hashlib
import itertools
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import HealthCheck, Phase, given, seed, settings

from fuzzing.files import FORMATS, File, good
from fuzzing.mutations import mutations
from fuzzing.opening import Opener

_AT_ONCE = 100
"""files of one format before the next has its turn"""


def run(opener: Opener, n: int, number: int, kept: Path) -> None:
    """Open n damaged files, and keep those that are a fault of the package."""

    @seed(number)
    @settings(
        max_examples=n,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(mutations(opener.form))
    def each(file: File) -> None:
        outcome = opener(file)
        if outcome.fault:
            folder = kept / opener.form / hashlib.sha256(file.content).hexdigest()[:12]
            shutil.copytree(opener.place, folder, dirs_exist_ok=True)
            place = folder / file.name
            print(
                f"\n{place}: {outcome.fault}\nagain: make fuzz ARGS='{opener.form} --file {place}'\n",
                flush=True,
            )

    each()


def openers(forms: list[str], folder: Path, stack: ExitStack) -> Iterator[Opener]:
    """One for each format whose libraries are installed."""
    for form in forms:
        try:
            good(form)
        except ImportError as error:
            print(f"{form:13} is left out: {error}", flush=True)
            continue
        (folder / form).mkdir()
        yield stack.enter_context(Opener(form, folder / form))


def main() -> int:
    """Parse the arguments and run; 1 where a fault was found."""
    parser = argparse.ArgumentParser(prog="python -m fuzzing", description=__doc__)
    parser.add_argument(
        "formats", nargs="*", metavar="FORMAT", help=f"one of {', '.join(FORMATS)}; all by default"
    )
    parser.add_argument("--mutations", type=int, metavar="N", help="stop after N files of each format")
    parser.add_argument(
        "--keep", type=Path, default=Path("build/fuzz"), metavar="FOLDER", help="where faults are kept"
    )
    parser.add_argument(
        "--file", type=Path, help="open this file of the one format, and print what comes of it"
    )
    asked = parser.parse_args()
    if unknown := set(asked.formats) - {*FORMATS}:
        parser.error(f"{', '.join(unknown)} is no format; expected {', '.join(FORMATS)}")
    with TemporaryDirectory(prefix="holdfast-fuzz-") as name, ExitStack() as stack:
        found = list(openers(asked.formats or list(FORMATS), Path(name), stack))
        if asked.file is not None:
            (opener,) = found
            outcome = opener.opened(asked.file.resolve())
            print(outcome.fault or f"exit {outcome.code} {outcome.text}")
            return bool(outcome.fault)
        return _rounds(found, asked.mutations, asked.keep)


def _rounds(found: list[Opener], most: int | None, kept: Path) -> int:
    try:
        for turn in itertools.count():
            n = _AT_ONCE if most is None else min(_AT_ONCE, most - turn * _AT_ONCE)
            if n <= 0:
                break
            for opener in found:
                run(opener, n, secrets.randbits(64), kept)
                print(f"{opener.form:13} {opener.tally}", flush=True)
    except KeyboardInterrupt:
        print("\nstopped:")
        for opener in found:
            print(f"{opener.form:13} {opener.tally}")
    return int(any(opener.tally.faults for opener in found))


if __name__ == "__main__":
    sys.exit(main())
