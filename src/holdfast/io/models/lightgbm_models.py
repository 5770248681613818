"""Wraps LightGBM models as torch modules. They are given as Python objects or as `.txt` files.

A file is first loaded in a separate process with limits of memory and time, because the reader is native code and a
damaged file could crash the process. The files are data and run no code.
"""

import hashlib
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.core.errors import TargetError, UsageError
from holdfast.core.labels import CLASSIFIERS_ONLY
from holdfast.core.remedies import Install
from holdfast.io.limited.calling import read_under_limits
from holdfast.io.limited.lightgbm_files import header_of, unreadable_lightgbm
from holdfast.io.models.adapted import Adapted
from holdfast.io.models.archive import read_once
from holdfast.io.models.estimators import Array, EstimatorInterface, as_model
from holdfast.io.models.trees import LIMITS, MAX_BYTES

_OBJECTIVES = ("binary", "multiclass", "multiclassova")
"""Training objectives of boosters whose raw scores are logits of classes."""


def adapted_lightgbm(booster: Any) -> Adapted:
    """Return a LightGBM booster that was trained to classify, wrapped as a model. Its raw scores are the logits of the
    classes.

    Raises `TargetError` for another objective.
    """
    text = str(booster.model_to_string())
    kind, *settings = header_of(text).get("objective", "").split() or [""]
    if kind not in _OBJECTIVES:
        raise TargetError(
            f"the booster has the objective {kind or 'of its own'}; one of {', '.join(_OBJECTIVES)} was expected. "
            f"{CLASSIFIERS_ONLY}; for a classifier with another objective, give a function from inputs to logits"
        )
    classes = max(int(booster.num_model_per_iteration()), 2)
    slope = re.search(r"sigmoid:(\S+)", " ".join(settings))
    factor = 1.0 if slope is None else float(slope[1])
    interface = EstimatorInterface(
        "Booster",
        partial(_raw_scores, booster, factor),
        features=booster.num_feature(),
        dtype=np.float64,
        kind="logit",
        source=booster,
    )
    names = tuple(booster.feature_name())
    automatic = names == tuple(f"Column_{place}" for place in range(len(names)))
    adapted = as_model(interface, hashlib.sha256(text.encode()).hexdigest())
    return replace(adapted, classes=classes, feature_names=None if automatic else names)


def open_lightgbm(path: Path) -> tuple[Adapted, str]:
    """Return the LightGBM model in a `.txt` file wrapped as a torch module, and the SHA-256 of the file."""
    content = read_once(path, "model", max_bytes=MAX_BYTES)
    try:
        import lightgbm
    except ImportError as error:
        raise UsageError(
            f"{str(path)!r} is a model of LightGBM, which is not installed", Install("trees")
        ) from error
    with read_under_limits("lightgbm_files", path, LIMITS, content=content):
        pass  # loaded here after the separate process succeeded
    try:
        booster = lightgbm.Booster(model_str=content.decode())
    except lightgbm.basic.LightGBMError as error:
        raise unreadable_lightgbm(path, str(error)) from error
    return adapted_lightgbm(booster), hashlib.sha256(content).hexdigest()


def _raw_scores(booster: Any, factor: float, rows: Array) -> Array:
    """Return the logits (n, classes) of the rows, or those (n,) of class 1."""
    return factor * np.asarray(booster.predict(rows, raw_score=True))
