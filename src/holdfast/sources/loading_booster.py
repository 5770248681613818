"""A program of its own: loads one model of XGBoost under limits and asks it once, so that a damaged file ends only it.

`python -P loading_booster.py FILE` exits with 0 where that went well; else the last line of stderr says what did not.
It imports nothing of the package.
"""

import sys
from pathlib import Path

SPARE_BYTES = 2**30
"""memory beyond eight copies of the file, which JSON needs"""
CPU_SECONDS = 240


def limit(path: Path) -> None:
    """Cap memory, CPU time and core dumps where the system has such limits."""
    try:
        import resource
    except ImportError:
        return
    mapped = Path("/proc/self/statm")
    in_use = int(mapped.read_text().split()[0]) * resource.getpagesize() if mapped.exists() else 2**31
    allowance = in_use + 8 * path.stat().st_size + SPARE_BYTES
    resource.setrlimit(
        resource.RLIMIT_AS if mapped.exists() else resource.RLIMIT_DATA, (allowance, allowance)
    )
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main(name: str) -> None:
    """Load the model and ask it for two rows."""
    import numpy as np
    import xgboost

    path = Path(name)
    limit(path)
    booster = xgboost.Booster({"nthread": 1})
    booster.load_model(bytearray(path.read_bytes()))
    booster.save_config()
    width = booster.num_features()
    if width > 10_000_000:
        raise ValueError(f"it declares {width} features")
    rows = np.stack((np.zeros(width, np.float32), np.ones(width, np.float32)))
    matrix = xgboost.DMatrix(
        rows,
        feature_names=booster.feature_names,
        feature_types=booster.feature_types,
        enable_categorical=True,
        nthread=1,
    )
    booster.predict(matrix, output_margin=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except Exception as error:  # noqa: BLE001 - whatever a damaged file provokes becomes one line
        sys.exit((str(error).splitlines() or [type(error).__name__])[0])
