"""A program of its own: loads one model of XGBoost under limits and asks it once, so that a damaged file ends only it.

`python -P loading_booster.py` reads the bytes of the file from its input and exits with 0 where that went well; else
the last line of stderr says what did not. It imports nothing of the package.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import xgboost

SPARE_BYTES = 2**30
"""memory beyond eight copies of the file, which JSON needs"""
CPU_SECONDS = 240


def limit(n_bytes: int) -> None:
    """Cap memory, CPU time and core dumps where the system has such limits."""
    try:
        import resource
    except ImportError:
        return
    mapped = Path("/proc/self/statm")
    in_use = int(mapped.read_text().split()[0]) * resource.getpagesize() if mapped.exists() else 2**31
    allowance = in_use + 8 * n_bytes + SPARE_BYTES
    resource.setrlimit(
        resource.RLIMIT_AS if mapped.exists() else resource.RLIMIT_DATA, (allowance, allowance)
    )
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main(content: bytes) -> None:
    """Load the model, look at its trees and ask it for two rows."""
    limit(len(content))
    booster = xgboost.Booster({"nthread": 1})
    booster.load_model(bytearray(content))
    booster.save_config()
    width = booster.num_features()
    if width > 10_000_000:
        raise ValueError(f"it declares {width} features")
    learner = json.loads(booster.save_raw("json"))["learner"]
    refuse_stray_trees(learner["gradient_booster"], int(learner["learner_model_param"]["num_class"]), width)
    rows = np.stack((np.zeros(width, np.float32), np.ones(width, np.float32)))
    matrix = xgboost.DMatrix(
        rows,
        feature_names=booster.feature_names,
        feature_types=booster.feature_types,
        enable_categorical=True,
        nthread=1,
    )
    booster.predict(matrix, output_margin=True)


def refuse_stray_trees(boosted: dict[str, Any], classes: int, width: int) -> None:
    """`ValueError` where a tree is of no class, or has stray nodes; a linear booster has no trees."""
    model = boosted.get("gbtree", boosted)["model"]  # dart holds its trees one level deeper
    if any(not 0 <= number < max(classes, 1) for number in model.get("tree_info", [])):
        raise ValueError("a tree is of a class that there is not")
    for tree in model.get("trees", []):
        refuse_stray_nodes(tree, width)


def refuse_stray_nodes(tree: dict[str, Any], width: int) -> None:
    """`ValueError` where a node leads outside its tree, or back, or looks at a feature that there is not.

    The reader of XGBoost does not look, and would read beyond its memory when some other row is asked.
    """
    left, right = np.array(tree["left_children"], int), np.array(tree["right_children"], int)
    features = np.array(tree["split_indices"], int)
    n, splits = len(left), left != -1
    children = np.concatenate((left[splits], right[splits]))
    same_size = len(right) == n and len(features) == n and n > 0
    if not same_size or np.any((children < 1) | (children >= n)) or len(np.unique(children)) < len(children):
        raise ValueError("a tree has nodes that lead nowhere")
    if np.any((features[splits] < 0) | (features[splits] >= width)):
        raise ValueError("a tree looks at a feature that there is not")


if __name__ == "__main__":
    try:
        main(sys.stdin.buffer.read())
    except Exception as error:  # noqa: BLE001 - whatever a damaged file provokes becomes one line
        sys.exit((str(error).splitlines() or [type(error).__name__])[0])
