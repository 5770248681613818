"""What an estimator in hand is known by: a digest of all that it holds."""

import hashlib
import io
import pickle
from typing import Any


def contents(estimator: Any) -> str:
    """SHA-256 in hex over the fitted values of an estimator; the same in another process.

    The objects are walked as they would be pickled, and nothing is loaded. Empty where the estimator holds what cannot
    be pickled, such as a function without a name.
    """
    try:
        walked = _walked(estimator)
    except (pickle.PicklingError, AttributeError, TypeError, ValueError, RecursionError):
        return ""
    kind = type(estimator)
    return hashlib.sha256(f"{kind.__module__}.{kind.__qualname__} {walked}".encode()).hexdigest()


def _walked(estimator: Any) -> str:
    try:
        import joblib  # scikit-learn brings it; it orders sets and names equal strings once
    except ImportError:
        buffer = io.BytesIO()
        pickle.dump(estimator, buffer, protocol=5)
        return hashlib.sha256(buffer.getvalue()).hexdigest()
    return str(joblib.hash(estimator, hash_name="sha1"))
