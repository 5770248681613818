"""Write `benchmarks/references/vnncomp2021.json`: queries of VNN-COMP 2021 and what its entries answered.

    python -m benchmarks.published_verdicts BENCHMARKS RESULTS

BENCHMARKS is a checkout of stanleybak/vnncomp2021, and RESULTS one of stanleybak/vnncomp2021_results. The queries are
all of the category `test`, and others that are drawn by a seed. The published verdict is that of the majority, as in
the competition; there is none in a tie. The answers of RPM in `mnistfc` are left out, as in the competition, because it
misread the queries.
"""

import argparse
import csv
import json
import random
from collections import Counter, defaultdict
from pathlib import Path

from benchmarks.networks import REFERENCES

DRAWN = {"acasxu": 9, "mnistfc": 8, "eran": 8}
SEED = 0
ANSWERS = {"holds": "unsat", "unsat": "unsat", "violated": "sat", "sat": "sat"}
LEFT_OUT = {("RPM", "mnistfc")}

Instance = tuple[str, str, str]
"""category, network and query"""


def instances(benchmarks: Path) -> list[Instance]:
    """The queries, in the order of the lists and of the draws."""
    rng, chosen = random.Random(SEED), []
    for category in ("test", *DRAWN):
        with (benchmarks / "benchmarks" / category / f"{category}_instances.csv").open() as file:
            listed = [(category, row[0], row[1]) for row in csv.reader(file) if row]
        chosen += rng.sample(listed, DRAWN[category]) if category in DRAWN else listed
    return chosen


def answers(results: Path) -> dict[Instance, dict[str, str]]:
    """For each query, by the names of its files, the answer of each entry; an empty one is no verdict."""
    found: dict[Instance, dict[str, str]] = defaultdict(dict)
    for path in sorted((results / "results_csv").glob("*.csv")):
        with path.open() as file:
            for category, network, query, _, answer, *_ in csv.reader(file):
                if (path.stem, category) not in LEFT_OUT:
                    key = (category, Path(network).name, Path(query).name)
                    found[key].setdefault(path.stem, ANSWERS.get(answer.lower(), ""))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("benchmarks", type=Path)
    parser.add_argument("results", type=Path)
    chosen = parser.parse_args()
    known, queries = answers(chosen.results), []
    for category, network, query in instances(chosen.benchmarks):
        given = known[category, Path(network).name, Path(query).name]
        counts = Counter(filter(None, given.values()))
        (first, n), (_, second) = [*counts.most_common(2), ("", 0), ("", 0)][:2]
        verdict = first if n > second else ""
        queries.append(
            {
                "category": category,
                "network": network,
                "query": query,
                "published": verdict,
                "solved": counts[verdict] if verdict else 0,
                "entries": len(given),
            }
        )
    lines = ",\n".join(json.dumps(each) for each in queries)
    (REFERENCES / "vnncomp2021.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
