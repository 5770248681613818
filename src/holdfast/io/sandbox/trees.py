"""Tests in a limited process that an XGBoost model can be loaded and called; a damaged file may crash XGBoost."""

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.core.errors import TargetError
from holdfast.io.files import refusing

_MOST_FEATURES = 10_000_000
_PLACE = re.compile(r"\[[\d:]+\] \S+:\d+: ")
"""Pattern of the time and the line of the source code at the start of a message of XGBoost."""


def read(path: Path, content: bytes | None, folder: Path) -> dict[str, object]:
    """Test that an XGBoost model can be loaded and called on two rows. Return an empty dictionary if this is possible,
    else raise `TargetError`.
    """
    assert content is not None, "the file is read once"
    if path.suffix == ".json":
        _refuse_foreign(path, content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns about files of another version
            _call_with_two_rows(content)
    except MemoryError:
        raise
    except Exception as error:  # any error that a damaged file causes is reported in one line
        raise damaged(path, str(error) or type(error).__name__) from error
    return {}


def damaged(path: Path, reason: str) -> TargetError:
    """Return the error for a file that XGBoost cannot read, with the first line of the reason."""
    return TargetError(
        f"{str(path)!r} is no readable model of XGBoost: {first_line(reason)}; save it again with save_model, or "
        "download it again"
    )


def first_line(message: str) -> str:
    """Return the first line of a message of XGBoost, without the place in its source code.

    The other lines are a stack trace of native code.
    """
    return _PLACE.sub("", (message.splitlines() or ["no message"])[0], count=1)[:200]


def _refuse_foreign(path: Path, content: bytes) -> None:
    """Raise `TargetError` for a `.json` file that XGBoost did not write."""
    no_json = f"{str(path)!r} is no readable JSON"
    with refusing(no_json, (ValueError, RecursionError), "save the booster again"):
        content_of_file = json.loads(content)
    if not isinstance(content_of_file, Mapping) or not isinstance(content_of_file.get("learner"), Mapping):
        description = (
            f"the keys {', '.join(map(str, list(content_of_file)[:5]))}"
            if isinstance(content_of_file, Mapping)
            else type(content_of_file).__name__
        )
        raise TargetError(
            f"{str(path)!r} holds {description} and is no model of XGBoost, which has the key learner; a .json model "
            "is what Booster.save_model or XGBClassifier.save_model wrote"
        )


def _call_with_two_rows(content: bytes) -> None:
    """Load the model, check its trees and call it with two rows."""
    import xgboost

    booster = xgboost.Booster({"nthread": 1})
    booster.load_model(bytearray(content))
    booster.save_config()
    width = booster.num_features()
    if width > _MOST_FEATURES:
        raise ValueError(f"it declares {width} features")
    learner = json.loads(booster.save_raw("json"))["learner"]
    parameters = learner["learner_model_param"]
    outputs = max(1, int(parameters["num_class"]), int(parameters.get("num_target", 1)))
    if outputs > len(content):
        raise ValueError(f"it declares {outputs} outputs in {len(content)} bytes")
    refuse_stray_numbers(learner["gradient_booster"], outputs, width)
    best = best_iteration(booster)
    rows = np.stack((np.zeros(width, np.float32), np.ones(width, np.float32)))
    matrix = xgboost.DMatrix(
        rows,
        feature_names=booster.feature_names,
        feature_types=booster.feature_types,
        enable_categorical=True,
        nthread=1,
    )
    booster.predict(matrix, output_margin=True, iteration_range=(0, 0 if best is None else best + 1))


def best_iteration(booster: Any) -> int | None:
    """Return the index of the last boosting iteration that `XGBClassifier` uses for predictions. Return None for a file
    that `XGBClassifier` did not write.

    Raises `ValueError` for an iteration that the booster does not have, because XGBoost may read outside of its memory.
    """
    attributes = booster.attributes()
    best = attributes.get("best_iteration")
    if attributes.get("scikit_learn") is None or best is None or not best.isdecimal():
        return None
    rounds = booster.num_boosted_rounds()
    if int(best) >= rounds:
        raise ValueError(f"its best iteration is {int(best)}, and it has {rounds} iterations, counted from 0")
    return int(best)


def refuse_stray_numbers(boosted: dict[str, Any], outputs: int, width: int) -> None:
    """Raise `ValueError` for an XGBoost model with a linear booster whose number of weights is not the expected one, or
    with a tree that has no valid class or has invalid nodes.

    XGBoost does not check this when it loads a file, and may later read outside of its memory for some rows. `boosted`
    is the part of the model with the trees or weights, `outputs` the number of outputs and `width` that of features.
    """
    model = boosted.get("gbtree", boosted)["model"]  # dart has its trees one level deeper
    n_weights = (width + 1) * outputs
    if "trees" not in model and len(model["weights"]) != n_weights:
        raise ValueError(f"it has {len(model['weights'])} weights, and {n_weights} were expected")
    if any(not 0 <= number < outputs for number in model.get("tree_info", [])):
        raise ValueError("a tree is of a class that there is not")
    for tree in model.get("trees", []):
        refuse_stray_nodes(tree, width)
        refuse_stray_leaves(tree, outputs)


def refuse_stray_nodes(tree: dict[str, Any], width: int) -> None:
    """Raise `ValueError` if a decision tree has a node with an invalid child, a repeated child or an invalid
    feature.
    """
    left, right = np.array(tree["left_children"], int), np.array(tree["right_children"], int)
    features = np.array(tree["split_indices"], int)
    n, splits = len(left), left != -1
    children = np.concatenate((left[splits], right[splits]))
    of_nodes = (
        tree[name] for name in ("right_children", "split_indices", "split_conditions", "default_left")
    )
    same_size = all(len(each) == n for each in of_nodes) and n > 0
    if not same_size or np.any((children < 1) | (children >= n)) or len(np.unique(children)) < len(children):
        raise ValueError("a tree has nodes that lead nowhere")
    if np.any((features[splits] < 0) | (features[splits] >= width)):
        raise ValueError("a tree looks at a feature that there is not")


def refuse_stray_leaves(tree: dict[str, Any], outputs: int) -> None:
    """Raise `ValueError` if a leaf of a tree with vector leaves has no vector, or a vector has another size than the
    number of outputs.
    """
    size = int(tree["tree_param"]["size_leaf_vector"])
    if size < 2:  # 0 in older files
        return
    left, right = np.array(tree["left_children"], int), np.array(tree["right_children"], int)
    places = right[left == -1]
    n_vectors = len(places) if "leaf_weights" in tree else len(left)  # older files have one for each node
    vectors = tree.get("leaf_weights", tree["base_weights"])
    beyond = "leaf_weights" in tree and np.any((places < 0) | (places >= n_vectors))
    if size != outputs or len(vectors) != n_vectors * size or beyond:
        raise ValueError("a tree has leaves without numbers for each output")


def prepare() -> None:
    """Import XGBoost before the memory of the process is limited."""
    import xgboost  # noqa: F401
