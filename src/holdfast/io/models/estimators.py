"""Wraps estimators of scikit-learn, and of libraries with the same methods, as models with scores or labels."""

import hashlib
import importlib.util
import io
import math
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, cast, runtime_checkable

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor, nn

from holdfast.core.batch import CLASSIFIERS_ONLY
from holdfast.core.errors import HoldfastError, TargetError
from holdfast.core.model import Bounds
from holdfast.core.outputs import OutputKind
from holdfast.core.types import Access, Layout


@dataclass(frozen=True)
class Adapted:
    """A torch module that calls a model of another library, and the properties that the original model declares.

    A property is None if it is not declared.
    """

    net: nn.Module
    access: Access = "gradients"
    hides: str = ""
    """reason why the model gives no gradients; empty if it gives them"""
    classes: int | None = None
    class_names: tuple[str, ...] | None = None
    class_labels: tuple[int, ...] | None = None
    """labels of the classes in the order of the outputs, if they are integers other than 0, 1, 2, …"""
    feature_names: tuple[str, ...] | None = None
    """names of the columns that the model was fitted on, in their order"""
    output: OutputKind | None = None
    layout: Layout | None = None
    bounds: Bounds | None = None
    numbers: bool = False
    """whether the outputs are the numbers of a regression, and not scores of classes"""


def contents(estimator: Any) -> str:
    """Return the SHA-256 in hex of the fitted values of an estimator. It is the same in every process.

    The objects are traversed as for pickling, and nothing is loaded. The result is "" if the estimator contains an
    object that cannot be pickled, such as a function without a name.
    """
    try:
        values = _hash_of_values(estimator)
    except (pickle.PicklingError, AttributeError, TypeError, ValueError, RecursionError):
        return ""
    kind = type(estimator)
    return hashlib.sha256(f"{kind.__module__}.{kind.__qualname__} {values}".encode()).hexdigest()


def _hash_of_values(estimator: Any) -> str:
    try:
        from joblib.hashing import (
            NumpyHasher,
        )  # a dependency of scikit-learn; it sorts sets and stores equal strings once
    except ImportError:
        buffer = io.BytesIO()
        pickle.dump(estimator, buffer, protocol=5)
        return hashlib.sha256(buffer.getvalue()).hexdigest()

    class Hasher(NumpyHasher):  # type: ignore[misc]  # joblib has no types
        def save(self, value: object) -> None:
            if isinstance(value, dict) and _ADDRESS in value:
                value = {key: entry for key, entry in value.items() if key != _ADDRESS}
            super().save(value)

    return str(Hasher(hash_name="sha1").hash(estimator))


Array = NDArray[Any]
Form = Literal["array", "frame", "sparse"]
"""Form in which an estimator accepts rows: an array, a table with the names of the features, or a sparse matrix."""
_ADDRESS = "_stop_words_id"
"""Attribute in which a vectoriser of scikit-learn stores an address in memory, which differs between processes."""
_SEPARATION = 4e-6
"""Relative amount by which the predicted class is raised above equal scores of other classes.

It is the smallest difference that is visible in the logarithm of a probability in single precision.
"""
_OTHER_SCORES = 0.1
"""Largest fraction of examples whose largest score may belong to another class than that of `predict`.

If the fraction is larger, the scores are not used.
"""
_WAY_OUT = "give a function from inputs to logits instead, as file.py:factory or in Python"


@runtime_checkable
class Predictor(Protocol):
    """Protocol of objects with a method `predict` for arrays (n, features), such as the estimators of scikit-learn."""

    def predict(self, X: Any, /) -> Any:  # noqa: N803 - the name of scikit-learn
        """Return the predicted labels of the rows `X` (n, features)."""


@dataclass(frozen=True)
class EstimatorInterface:
    """The methods with which an estimator is called on rows (n, features), and properties such as its number of
    features.
    """

    name: str
    """name of the estimator's class"""
    scores: Callable[[Any], Any] | None
    """method that returns scores (n, classes), or scores (n,) of class 1"""
    labels: Callable[[Any], Any] | None = None
    """method that returns labels (n,) out of `classes`; None if the largest score determines the class"""
    classes: Array | None = None
    """labels in the order of the scores; None if they are 0, 1, 2, … as many as there are scores"""
    features: int | None = None
    """number of features that the estimator was fitted on; None if the estimator has no such attribute"""
    columns: tuple[str, ...] | None = None
    """names of the features, if the estimator was fitted on a table"""
    dtype: DTypeLike = np.float64
    kind: OutputKind | None = None
    """kind of the scores: logits or probabilities; None if there are no scores"""
    parallel: bool = True
    """whether the estimator may start as many threads and processes as its `n_jobs` specifies"""
    source: Any = None
    """object of the library, from which the trees of an ensemble are read"""
    numbers: bool = False
    """whether `scores` returns the numbers of a regression"""


class Estimator(nn.Module):
    """An estimator with the methods of scikit-learn, wrapped as a torch module. It returns scores of a batch in the
    type of the inputs, without gradients.

    Inputs (n, *features) with more than two axes are flattened in the order of their axes (channels, rows, columns) if
    the result has as many features as the estimator was fitted on. A forward pass costs one call of the estimator, or
    two if `decides` is True.
    """

    fitted_on: ClassVar[str] = "these features"
    """what an estimator must be fitted on, in errors"""

    def __init__(self, interface: EstimatorInterface, digest: str) -> None:
        super().__init__()
        self.interface = interface
        self.name = interface.name
        self.digest = digest
        """digest of the estimator's fitted values"""
        self.gives = "scores" if interface.scores is not None else "labels"
        self.form: Form | None = None
        """form in which the estimator accepts rows; None before its first call"""
        self.decides = False
        """whether `predict` is called as well, because the largest score does not always determine its class"""

    def __deepcopy__(self, memo: dict[int, object]) -> "Estimator":
        """Return the module itself, because calling the estimator does not change it, and a copy may be large."""
        return self

    def extra_repr(self) -> str:
        """Return the name of the estimator's class, which torch shows in the description of the module."""
        return self.name

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores (n, classes) of a batch, or (n,) of class 1. Return one-hot labels if the estimator has no
        scores.
        """
        rows = self.rows(x)
        kind = np.float64 if x.dtype == torch.float64 else np.float32
        outputs = self._one_hot(rows, kind) if self.gives == "labels" else self._scores(rows, kind)
        return torch.from_numpy(np.ascontiguousarray(outputs)).to(x.device, x.dtype)

    def settle(self, x: Tensor) -> tuple[str, ...]:
        """Compare for the rows `x` the class with the largest score with the class that the estimator predicts. The
        result determines whether attacks use the scores.

        Return a note if they differ for some rows. The midpoints of adjacent rows are compared as well, because there
        the scores of two classes are close. Raises `TargetError` for an estimator that predicts several labels for each
        example, and for one that raises an error.
        """
        if self.interface.labels is None or self.interface.scores is None or self.decides:
            return ()
        rows = self.rows(self._compared(x))
        try:
            numbers, scores = self._numbers(rows), self._raw(rows)
        except (HoldfastError, MemoryError):
            raise
        except Exception as error:  # an estimator, above all one of a damaged file, may raise anything
            first_line = (str(error).splitlines() or [""])[0].rstrip(".")
            raise TargetError(
                f"the {self.name} raised {type(error).__name__}: {first_line}. Check that it is fitted on "
                f"{self.fitted_on}, save it again, or {_WAY_OUT}"
            ) from error
        if self.gives == "labels":
            assert self.interface.classes is not None
            n_classes = len(self.interface.classes)
            note = f"the scores of {self.name} have {scores.shape[-1]} columns for {n_classes} classes"
            return (f"{note}, so they are not used: the model is attacked by its labels",)
        largest = _largest(scores)
        differs = numbers != largest
        if not differs.any():
            return ()
        note = (
            f"the largest score is of another class than predict() in {differs.sum():,} of {len(rows):,} rows"
        )
        if differs[: len(x)].mean() > _OTHER_SCORES:
            self.gives = "labels"
            return (f"{note}, so the scores are not used: the model is attacked by its labels",)
        self.decides = True
        return (f"{note}: the class is that of predict(), and the other scores are lowered below its score",)

    def _compared(self, x: Tensor) -> Tensor:
        """Return the rows `x` and their midpoints with the row before."""
        return torch.cat((x, (x + x.roll(1, 0)) / 2))

    def rows(self, x: Tensor) -> Array:
        """Return the inputs in the type that the estimator is called with, usually float64, in which scikit-learn
        computes.
        """
        width, expected = math.prod(x.shape[1:]), self.interface.features
        if x.dim() < 2 or (expected is not None and width != expected):
            raise TargetError(
                f"the {self.name} was fitted on {expected} features, but an example of shape {tuple(x.shape[1:])} has "
                f"{width} values; give the features that it was fitted on, in their order"
            )
        flat = x if expected is None else x.reshape(len(x), width)
        rows: Array = flat.detach().cpu().numpy().astype(self.interface.dtype, copy=False)
        return rows

    def _called(self, method: Callable[[Any], Any], rows: Array) -> Any:
        """Return the result of `method` for the rows.

        An estimator that was fitted on a table also accepts an array, which is faster, unless it selects its columns by
        name. Some estimators of the user accept only sparse matrices. Warnings are suppressed, because they would be
        repeated for every batch.
        """
        errors: list[Exception] = []
        with warnings.catch_warnings(), _in_parallel(allowed=self.interface.parallel):
            warnings.simplefilter("ignore")
            for form in self._forms():
                try:
                    result = method(self._in_form(rows, form))
                except Exception as error:  # noqa: BLE001  an estimator may refuse a form with any error
                    errors.append(error)
                else:
                    self.form = form
                    return result
        raise errors[
            -2 if self.form is None else -1
        ]  # the sparse matrix is the last resort, and rarely the reason

    def _forms(self) -> tuple[Form, ...]:
        """Return the forms in which rows are given to the estimator, in the order in which they are tried."""
        if self.form is not None:
            return (self.form,)
        named = self.interface.columns is not None and importlib.util.find_spec("pandas") is not None
        return ("array", "frame", "sparse") if named else ("array", "sparse")

    def _in_form(self, rows: Array, form: Form) -> Any:
        if form == "array":
            return rows
        if form == "sparse":
            from scipy.sparse import csr_matrix

            return csr_matrix(rows)
        import pandas as pd

        return pd.DataFrame(rows, columns=list(self.interface.columns or ()), copy=False)

    def _raw(self, rows: Array) -> Array:
        """Return the scores of the estimator. If they do not match its classes, only labels are used from then on."""
        assert self.interface.scores is not None
        result = self._called(self.interface.scores, rows)
        classes = self.interface.classes
        if isinstance(result, list):
            raise _several_labels(self.name)
        scores = np.asarray(result)
        n_scores = 0 if scores.ndim not in (1, 2) else 2 if _is_single(scores) else scores.shape[1]
        if len(scores) != len(rows) or not n_scores or (classes is not None and n_scores != len(classes)):
            if self.interface.labels is None:
                raise TargetError(
                    f"the {self.name} returned scores of shape {scores.shape} for {len(rows)} rows; one for each "
                    f"class and row was expected. Otherwise {_WAY_OUT}"
                )
            self.gives = "labels"
        return scores

    def _scores(self, rows: Array, kind: type[np.floating[Any]]) -> Array:
        scores = self._raw(rows)
        if self.gives == "labels":
            return self._one_hot(rows, kind)
        winners = self._numbers(rows) if self.decides else _largest(scores)
        if _is_single(scores):
            return _with_sign_of(scores.reshape(len(scores)).astype(kind), winners)
        return _with_winner_first(scores.astype(kind, copy=True), winners)

    def _one_hot(self, rows: Array, kind: type[np.floating[Any]]) -> Array:
        assert self.interface.classes is not None
        return np.eye(len(self.interface.classes), dtype=kind)[self._numbers(rows)]

    def _numbers(self, rows: Array) -> NDArray[np.int64]:
        """Return the index of each predicted label among the classes."""
        assert self.interface.labels is not None
        labels = np.asarray(self._called(self.interface.labels, rows))
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels[:, 0]
        if labels.shape != (len(rows),):
            raise _several_labels(self.name)
        if self.interface.classes is None:
            return labels.astype(np.int64)
        # The classes need not be sorted, as searchsorted requires.
        order = np.argsort(self.interface.classes)
        places = np.searchsorted(self.interface.classes, labels, sorter=order)
        numbers = order[np.minimum(places, len(order) - 1)]
        unknown = self.interface.classes[numbers] != labels
        if unknown.any():
            raise TargetError(
                f"the {self.name} predicts {labels[unknown][0]!r}, which is not among its classes_ "
                f"{self.interface.classes.tolist()!r}; fit it again, or {_WAY_OUT}"
            )
        return cast("NDArray[np.int64]", numbers.astype(np.int64))


def adapted_estimator(estimator: Predictor, *, parallel: bool = True) -> Adapted:
    """Return a classifier with the methods of scikit-learn wrapped as a model. Raises `TargetError` if the object is
    not a fitted classifier.
    """
    return as_model(interface_of(estimator, parallel=parallel), contents(estimator))


def interface_of(estimator: Predictor, *, parallel: bool = True) -> EstimatorInterface:
    """Return the methods with which an estimator that is a classifier or a regressor is called, and properties such as
    its classes and features.

    Raises `TargetError` if the object is neither or is not fitted.
    """
    name = type(estimator).__qualname__
    if _is_regressor(estimator):
        _refuse_unfitted(estimator, name)
        fitted_on = getattr(estimator, "n_features_in_", None)
        n_features = None if fitted_on is None else int(fitted_on)
        return EstimatorInterface(
            name, estimator.predict, features=n_features, parallel=parallel, numbers=True
        )
    probabilities: Any = getattr(estimator, "predict_proba", None)
    scores = probabilities or getattr(estimator, "decision_function", None)
    classes = _classes(estimator, name, gives_probabilities=probabilities is not None)
    kind: OutputKind | None = None if scores is None else "logit" if probabilities is None else "probability"
    features, columns = (
        getattr(estimator, "n_features_in_", None),
        getattr(estimator, "feature_names_in_", None),
    )
    return EstimatorInterface(
        name,
        scores,
        estimator.predict,
        classes,
        None if features is None else int(features),
        None if columns is None else tuple(map(str, columns)),
        kind=kind,
        parallel=parallel,
        source=estimator,
    )


def as_model(interface: EstimatorInterface, digest: str) -> Adapted:
    """Return an estimator wrapped as a torch module, with the access that it permits, its classes and its feature
    names.
    """
    net = Estimator(interface, digest)
    names, labels = (None, None) if interface.classes is None else named(interface.classes.tolist())
    return Adapted(
        net,
        "labels" if net.gives == "labels" else "scores",
        no_gradient(interface.name),
        None if interface.classes is None else len(interface.classes),
        names,
        labels,
        interface.columns,
        interface.kind,
        numbers=interface.numbers,
    )


def no_gradient(name: str) -> str:
    """Return the message that the estimator `name` is attacked without gradients."""
    return f"{name} is an estimator without gradients"


def named(classes: Sequence[Any]) -> tuple[tuple[str, ...] | None, tuple[int, ...] | None]:
    """Return the class names of an estimator as strings, and its class labels as integers. Both are None if the labels
    are 0, 1, 2, ….

    False and True are 0 and 1. Labels that are strings, or numbers with a fraction, have only names.
    """
    are_integers = all(
        isinstance(label, bool | int) or (isinstance(label, float) and label.is_integer())
        for label in classes
    )
    if not are_integers:
        return tuple(map(str, classes)), None
    numbers = tuple(map(int, classes))
    return (None, None) if numbers == tuple(range(len(numbers))) else (tuple(map(str, numbers)), numbers)


@contextmanager
def _in_parallel(*, allowed: bool) -> Iterator[None]:
    """Context manager in which estimators start threads and processes only if `allowed` is True, whatever their
    `n_jobs`.

    A file may specify any number of processes, and joblib starts them with `python -m`, which imports modules from the
    current folder.
    """
    if allowed:
        yield
        return
    from joblib import parallel_backend  # a dependency of scikit-learn

    with parallel_backend("sequential"):
        yield


def _classes(estimator: Any, name: str, *, gives_probabilities: bool) -> Array | None:
    """Return the labels in the order of the scores, or None if only the number of probabilities determines them.

    Raises `TargetError` for an object that is not a classifier with one label for each example.
    """
    try:
        classes = estimator.classes_
    except AttributeError:  # in a pipeline or a search this is a property that depends on the inner estimator
        _refuse_unfitted(estimator, name)
        if gives_probabilities:
            return None
        raise TargetError(
            f"the {name} is not a classifier: it has no classes_. {CLASSIFIERS_ONLY}. A fitted classifier was "
            "expected, with classes_ and predict_proba, decision_function or predict"
        ) from None
    labels = None if isinstance(classes, list) else np.asarray(classes)
    if labels is None or labels.ndim != 1:
        raise _several_labels(name)
    if len(labels) < 2:
        raise TargetError(
            f"the {name} has {len(labels)} class ({labels.tolist()}), but at least two were expected; fit it on "
            "examples of all classes"
        )
    return labels


def _is_regressor(estimator: Any) -> bool:
    """Return whether an estimator states that it is a regressor, as those of scikit-learn and of libraries with its
    interface do.
    """
    if "sklearn" not in sys.modules or hasattr(estimator, "classes_"):
        return False
    from sklearn.base import BaseEstimator, is_regressor

    return isinstance(estimator, BaseEstimator) and bool(is_regressor(estimator))


def no_classifier_but_regressor(name: str) -> TargetError:
    """Return the error for a regressor in place of a classifier."""
    return TargetError(f"the {name} is a regressor, and no classifier. {CLASSIFIERS_ONLY}")


def _refuse_unfitted(estimator: Any, name: str) -> None:
    if "sklearn" not in sys.modules:
        return
    from sklearn.base import BaseEstimator
    from sklearn.exceptions import NotFittedError
    from sklearn.utils.validation import check_is_fitted

    if not isinstance(estimator, BaseEstimator):
        return
    try:
        check_is_fitted(estimator)
    except NotFittedError:
        raise TargetError(f"the {name} is not fitted; call fit(X, y) first") from None


def _several_labels(name: str) -> TargetError:
    return TargetError(
        f"the {name} predicts several labels per example, but one was expected; give one of its estimators, or "
        f"{_WAY_OUT}"
    )


def _is_single(scores: Array) -> bool:
    return scores.ndim == 1 or scores.shape[1] == 1


def _largest(scores: Array) -> NDArray[np.int64]:
    """Return the class (n,) that `predict` derives from scores: the first of the largest ones.

    For single scores it is class 1 if the score is above zero, else class 0.
    """
    if _is_single(scores):
        return (scores.reshape(len(scores)) > 0).astype(np.int64)
    return cast("NDArray[np.int64]", scores.argmax(1))


def _with_winner_first(scores: Array, winners: NDArray[np.int64]) -> Array:
    """Lower all scores that equal or exceed that of the predicted class in `winners`, so that it is the only largest
    one.

    Modifies `scores` in place.
    """
    rows = np.arange(len(scores))
    winning = scores[rows, winners]
    # One step below in the type of the scores; `tiny` covers a best score of zero, where a relative step is zero.
    below = winning - np.maximum(np.abs(winning) * _SEPARATION, np.finfo(scores.dtype).tiny)
    too_large = scores >= winning[:, None]
    too_large[rows, winners] = False
    np.copyto(scores, below[:, None], where=too_large)
    return scores


def _with_sign_of(scores: Array, winners: NDArray[np.int64]) -> Array:
    """Return the scores of class 1, changed where their sign is not that of the predicted class in `winners`."""
    tiny = np.finfo(scores.dtype).tiny
    scores = np.where((winners == 1) & (scores <= 0), tiny, scores)
    return np.where((winners == 0) & (scores >= 0), -tiny, scores)
