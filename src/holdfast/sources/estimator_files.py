"""Opens files that contain an estimator, and rejects those that would run code when loaded."""

from pathlib import Path

from holdfast.core.errors import TargetError, UsageError
from holdfast.sources.adapted import Adapted
from holdfast.sources.estimators import Predictor, adapted_estimator
from holdfast.sources.skops_files import open_skops
from holdfast.sources.trees import open_booster

_FACTORY = "load it in a factory of yours, and give that as file.py:factory"
_SKLEARN = f"save a scikit-learn estimator with skops.io.dump, as .skops, and give that; or {_FACTORY}"
_KERAS = "load it with keras.models.load_model in a factory of yours, and give that as file.py:factory"
_RUN_CODE = {".pkl": _SKLEARN, ".pickle": _SKLEARN, ".joblib": _SKLEARN, ".keras": _KERAS, ".h5": _KERAS}
"""Suffixes of files that may run code when they are loaded, with advice for each."""
ESTIMATOR_SUFFIXES = (".skops", ".json", ".ubj", *_RUN_CODE)
"""Suffixes of files that contain an estimator or a Keras model."""


def open_estimator(path: Path, *, trust_code: bool) -> tuple[Adapted, str, tuple[str, ...]]:
    """Return the estimator in a file wrapped as a model, the SHA-256 of the file, and notes.

    Raises `UsageError` if a required package is missing or the file needs `trust_code`, and `TargetError` for a damaged
    file and for an object that is not a classifier.
    """
    if path.suffix in (".json", ".ubj"):
        return (*open_booster(path), ())
    if path.suffix in _RUN_CODE:
        if not path.exists():
            raise TargetError(f"model {str(path)!r} does not exist")
        raise UsageError(
            f"{str(path)!r} may run code when it is loaded and is not opened: {_RUN_CODE[path.suffix]}"
        )
    found, digest, notes = open_skops(path, trust_code=trust_code)
    if not isinstance(found, Predictor):
        raise TargetError(
            f"{str(path)!r} holds a {type(found).__qualname__}; an estimator with the method predict was expected"
        )
    return adapted_estimator(found, parallel=trust_code), digest, notes
