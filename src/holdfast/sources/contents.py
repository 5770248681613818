"""Digest of the fitted values of an estimator object, by which the evidence identifies it."""

import hashlib
import io
import pickle
from typing import Any


def contents(estimator: Any) -> str:
    """SHA-256 in hex over the fitted values of an estimator, equal in every process.

    The objects are traversed as for pickling, and nothing is loaded. The result is empty if the estimator contains an
    object that cannot be pickled, such as a function without a name.
    """
    try:
        walked = _walked(estimator)
    except (pickle.PicklingError, AttributeError, TypeError, ValueError, RecursionError):
        return ""
    kind = type(estimator)
    return hashlib.sha256(f"{kind.__module__}.{kind.__qualname__} {walked}".encode()).hexdigest()


def _walked(estimator: Any) -> str:
    try:
        import joblib  # a dependency of scikit-learn; it sorts sets and stores equal strings once
    except ImportError:
        buffer = io.BytesIO()
        pickle.dump(estimator, buffer, protocol=5)
        return hashlib.sha256(buffer.getvalue()).hexdigest()
    return str(joblib.hash(estimator, hash_name="sha1"))
