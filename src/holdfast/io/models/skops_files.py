"""Opens estimators in `.skops` files, which contain the values and the types of an estimator without pickle.

A file with types that skops does not trust is opened only if the user trusts its code. The content is read once, so
that the bytes that are checked are those that are loaded.
"""

import hashlib
import warnings
from pathlib import Path
from typing import Any

from holdfast.core.errors import TargetError, UsageError
from holdfast.core.names import kind_of
from holdfast.core.remedies import TRUST_CODE, Install
from holdfast.io.limited.calling import read_under_limits
from holdfast.io.limited.limits import Limits
from holdfast.io.models.adapted import Adapted
from holdfast.io.models.archive import check_archive, read_once
from holdfast.io.models.estimators import Predictor, adapted_estimator
from holdfast.io.models.inspecting import refuse_access
from holdfast.io.models.lightgbm_models import open_lightgbm
from holdfast.io.models.trees import open_booster

_SHOWN = 5
_SAVED_BY = "save it with skops.io.dump(estimator, file), without compression"


LIMITS = Limits(copies=8, spare_bytes=2**30)
"""Limits of the process that first loads an estimator."""


def open_skops(path: Path, *, trust_code: bool) -> tuple[Any, str, tuple[str, ...]]:
    """Return the estimator in a `.skops` file, the SHA-256 of the file, and notes for the report.

    If `trust_code` is False, the estimator is first loaded in a separate process and called with two rows, and types
    that skops does not trust raise `UsageError`. Raises `TargetError` for a damaged file.
    """
    content = read_once(path, "model")
    if not trust_code:
        with read_under_limits("estimators", path, LIMITS, content=content):
            pass  # loaded here after the separate process succeeded
    estimator, notes = loaded_estimator(path, content, trust_code=trust_code)
    return estimator, hashlib.sha256(content).hexdigest(), notes


def loaded_estimator(path: Path, content: bytes, *, trust_code: bool) -> tuple[Any, tuple[str, ...]]:
    """Return the estimator in the content of a `.skops` file, and notes for the report. Raises the same errors as
    `open_skops`.
    """
    try:
        import skops.io as sio
    except ImportError as error:
        raise UsageError(
            f"{str(path)!r} is a .skops file, and skops is missing", Install("sklearn")
        ) from error
    # Checked before skops reads it, because a small archive can need any amount of memory.
    check_archive(path, content, saved_by=_SAVED_BY)
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        try:
            untrusted = sio.get_untrusted_types(data=content)
        except MemoryError:
            raise
        except Exception as error:  # skops raises any error, such as KeyError, for an untrusted file
            raise _damaged(path, error) from error
        if untrusted and not trust_code:
            boosted = any(warning.startswith("xgboost.") for warning in untrusted)
            raise UsageError(
                f"{str(path)!r} contains {_listed(untrusted)}, which skops does not trust, because loading them "
                "may run code"
                + (
                    "; save models of XGBoost with their method save_model, as .json or .ubj"
                    if boosted
                    else ""
                ),
                TRUST_CODE,
            )
        try:
            estimator = sio.loads(content, trusted=untrusted)
        except MemoryError:
            raise
        except Exception as error:  # as above
            raise _damaged(path, error) from error
    if not trust_code:
        refuse_access(path, estimator)
    return estimator, tuple(dict.fromkeys(str(warning.message).split("\n")[0] for warning in recorded))


def _listed(types: list[str]) -> str:
    more = f" and {len(types) - _SHOWN} more" if len(types) > _SHOWN else ""
    return f"the types {', '.join(types[:_SHOWN])}{more}" if len(types) > 1 else f"the type {types[0]}"


def _damaged(path: Path, error: Exception) -> TargetError:
    # Shortened, because the text may come from an untrusted file.
    first_line = (str(error).splitlines() or [""])[0][:200]
    return TargetError(
        f"{str(path)!r} is not an estimator that skops can open: {type(error).__name__}: {first_line}; {_SAVED_BY}"
    )


_FACTORY = "load it in a factory of yours, and give that as file.py:factory"
_SKLEARN = f"save a scikit-learn estimator with skops.io.dump, as .skops, and give that; or {_FACTORY}"
_KERAS = "load it with keras.models.load_model in a factory of yours, and give that as file.py:factory"
_RUN_CODE = {".pkl": _SKLEARN, ".pickle": _SKLEARN, ".joblib": _SKLEARN, ".keras": _KERAS, ".h5": _KERAS}
"""Suffixes of files that may run code when they are loaded, with advice for each."""
ESTIMATOR_SUFFIXES = (".skops", ".json", ".ubj", ".txt", *_RUN_CODE)
"""Suffixes of files that contain an estimator or a Keras model."""


def open_estimator(path: Path, *, trust_code: bool) -> tuple[Adapted, str, tuple[str, ...]]:
    """Return the estimator in a `.skops` file wrapped as a model, the SHA-256 of the file, and notes for the report.

    Raises `UsageError` if a required package is missing or the file needs `trust_code`, and `TargetError` for a damaged
    file and for an object that is not a classifier.
    """
    if path.suffix in (".json", ".ubj"):
        return (*open_booster(path), ())
    if path.suffix == ".txt":
        return (*open_lightgbm(path), ())
    if path.suffix in _RUN_CODE:
        if not path.exists():
            raise TargetError(f"model {str(path)!r} does not exist")
        raise UsageError(
            f"{str(path)!r} may run code when it is loaded and is not opened: {_RUN_CODE[path.suffix]}"
        )
    estimator, digest, notes = open_skops(path, trust_code=trust_code)
    if not isinstance(estimator, Predictor):
        raise TargetError(
            f"{str(path)!r} contains {kind_of(estimator)}; an estimator with the method predict was expected"
        )
    return adapted_estimator(estimator, parallel=trust_code), digest, notes
