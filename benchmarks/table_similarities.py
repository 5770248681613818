"""Write `benchmarks/references/sdmetrics.json`: similarities of two tables by SDMetrics. In an
environment with SDMetrics:

python -m venv ENV && ENV/bin/pip install sdmetrics==0.32.0 && ENV/bin/python -m benchmarks.table_similarities
"""

import json
import warnings
from importlib.metadata import version
from itertools import combinations
from pathlib import Path

import numpy as np

PLACE = Path(__file__).parent / "references" / "sdmetrics.json"
NUMERIC = (True, True, False, False, True)


def tables() -> tuple[np.ndarray, np.ndarray]:
    """Return two tables (n, 5) with numbers, and positions of categories."""
    return _table(400, 0, 0.8), _table(300, 1, 0.2)


def _table(n: int, seed: int, strength: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    first = rng.normal(size=n)
    second = strength * first + rng.normal(size=n)
    category = np.floor(np.clip(2 + strength * first + 0.5 * rng.normal(size=n), 0, 3.99))
    other = rng.integers(0, 3 + seed, n)
    count = np.floor(np.abs(first) * 3)
    return np.column_stack([first, second, category, other, count])


def main() -> None:
    import pandas as pd
    from sdmetrics.column_pairs import ContingencySimilarity, CorrelationSimilarity
    from sdmetrics.single_column import KSComplement, TVComplement

    warnings.simplefilter("ignore")
    synthetic, real = (pd.DataFrame(table, columns=list("abcde")) for table in tables())
    names = [*real.columns]
    shapes = [
        (KSComplement if number else TVComplement).compute(real[name], synthetic[name])
        for name, number in zip(names, NUMERIC, strict=True)
    ]
    trends = []
    for i, j in combinations(range(len(names)), 2):
        both = [names[i], names[j]]
        if NUMERIC[i] and NUMERIC[j]:
            trends.append(CorrelationSimilarity.compute(real[both], synthetic[both]))
            continue
        numbers = [names[k] for k in (i, j) if NUMERIC[k]]
        trends.append(
            ContingencySimilarity.compute(
                real[both].copy(), synthetic[both].copy(), continuous_column_names=numbers or None
            )
        )
    content = {"sdmetrics": version("sdmetrics"), "shapes": shapes, "trends": trends}
    PLACE.write_text(json.dumps(content, default=float) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
