"""Boosters of XGBoost as models: in hand, and from the files `.json` and `.ubj` that XGBoost writes.

A file is first loaded in a process of its own, under limits of memory and time: the reader is native code, and a
damaged file must not end this process. Files are data and run no code.
"""

import hashlib
import json
import subprocess
import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.core.errors import TargetError, UsageError
from holdfast.sources.adapted import Adapted
from holdfast.sources.estimators import Array, Asked, as_model
from holdfast.sources.files import megabytes, readable_file

MAX_BYTES = 2**30
"""of a file; a booster of 10,000 deep trees has some hundred megabytes"""
LOAD_SECONDS = 300
"""wall time that loading one file may take"""
_OBJECTIVES = frozenset(
    {"binary:logistic", "binary:logitraw", "binary:hinge", "multi:softmax", "multi:softprob"}
)
"""those whose margins are logits of classes"""
_LOADING = Path(__file__).with_name("loading_booster.py")


def adapted_booster(booster: Any) -> Adapted:
    """A booster with the objective of a classifier, as a model: its margins, which are logits of the classes."""
    return _adapted(booster, hashlib.sha256(bytes(booster.save_raw("ubj"))).hexdigest(), None)


def open_booster(path: Path) -> tuple[Adapted, str]:
    """The booster in a `.json` or `.ubj` file as a model, and the SHA-256 of the file.

    Trees after the best iteration are left out where `XGBClassifier` wrote the file and stopped early, as it does.
    """
    content = _content(path)
    try:
        import xgboost
    except ImportError as error:
        raise UsageError(
            f'{str(path)!r} is a model of XGBoost; opening it needs pip install "holdfast[trees]"'
        ) from error
    _refuse_damaged(path, content)
    booster = xgboost.Booster()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of files that another version wrote
            booster.load_model(bytearray(content))
        best = _best_iteration(booster.attributes())
        adapted = _adapted(booster, hashlib.sha256(content).hexdigest(), best)
    except xgboost.core.XGBoostError as error:
        raise _damaged(path, str(error)) from error
    return adapted, hashlib.sha256(content).hexdigest()


def _content(path: Path) -> bytes:
    """The bytes, read once; a `.json` file that is no model of XGBoost is refused."""
    readable_file(path, "model")
    if path.stat().st_size > MAX_BYTES:
        raise TargetError(
            f"{str(path)!r} has {megabytes(path.stat().st_size)}; at most {megabytes(MAX_BYTES)} is read"
        )
    content = path.read_bytes()
    if path.suffix != ".json":
        return content
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise TargetError(f"{str(path)!r} is no readable JSON: {error}; save the booster again") from error
    if not isinstance(found, Mapping) or not isinstance(found.get("learner"), Mapping):
        held = (
            f"the keys {', '.join(map(str, list(found)[:5]))}"
            if isinstance(found, Mapping)
            else type(found).__name__
        )
        raise TargetError(
            f"{str(path)!r} holds {held} and is no model of XGBoost, which has the key learner; a .json model is what "
            "Booster.save_model or XGBClassifier.save_model wrote"
        )
    return content


def _refuse_damaged(path: Path, content: bytes) -> None:
    """Load the bytes in a process of its own, and raise `TargetError` where that ends otherwise than well."""
    # -P: the folder of the script holds modules that must not come first on the path
    command = [sys.executable, "-P", "-s", str(_LOADING)]
    try:
        done = subprocess.run(command, input=content, capture_output=True, timeout=LOAD_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise TargetError(
            f"{str(path)!r} took more than {LOAD_SECONDS} s to load and was given up"
        ) from error
    if done.returncode:
        ended = f"the process that loads it under limits ended with status {done.returncode}"
        raise _damaged(path, (done.stderr.decode(errors="replace").strip().splitlines() or [ended])[-1])


def _damaged(path: Path, said: str) -> TargetError:
    first = (said.splitlines() or ["no message"])[0][:200]
    return TargetError(
        f"{str(path)!r} is no readable model of XGBoost: {first}; save it again with save_model, or download it again"
    )


def _best_iteration(attributes: Mapping[str, str | None]) -> int | None:
    """The last iteration that `XGBClassifier` uses, which marks its files."""
    best = attributes.get("best_iteration")
    marked = attributes.get("scikit_learn") is not None
    return int(best) if marked and best is not None and best.isdecimal() else None


def _adapted(booster: Any, digest: str, best: int | None) -> Adapted:
    learner = json.loads(booster.save_config())["learner"]
    objective, parameters = learner["objective"]["name"], learner["learner_model_param"]
    if objective not in _OBJECTIVES:
        raise TargetError(
            f"the booster has the objective {objective}, and one of {', '.join(sorted(_OBJECTIVES))} was expected; "
            "give a function from inputs to logits instead, as file.py:factory or in Python"
        )
    if int(parameters.get("num_target", 1)) > 1:
        raise TargetError(
            f"the booster predicts {parameters['num_target']} labels an example, and one was expected; train it on one"
        )
    classes = max(int(parameters["num_class"]), 2)
    asked = Asked(
        "Booster",
        partial(_margins, booster, (0, 0 if best is None else best + 1)),
        features=booster.num_features(),
        dtype=np.float32,
        kind="logit",
    )
    names = booster.feature_names
    return replace(
        as_model(asked, digest), classes=classes, feature_names=None if names is None else tuple(names)
    )


def _margins(booster: Any, iterations: tuple[int, int], rows: Array) -> Array:
    """Logits (n, classes), or (n,) of class 1."""
    import xgboost

    matrix = xgboost.DMatrix(
        rows,
        feature_names=booster.feature_names,
        feature_types=booster.feature_types,
        enable_categorical=True,
    )
    found: Array = booster.predict(matrix, output_margin=True, iteration_range=iterations)
    return found
