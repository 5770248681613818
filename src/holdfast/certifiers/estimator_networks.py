"""Linear models and multi-layer perceptrons of scikit-learn as networks in torch, whose operations have bounds."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from holdfast.core.errors import NoBounds
from holdfast.core.model import Classifier
from holdfast.core.types import Inputs
from holdfast.io.models.estimators import Estimator

_SAME = 1e-4
"""largest difference of outputs, relative to the largest one"""


def _affine(weight: Any, bias: Any) -> nn.Module:
    rows = torch.tensor(np.atleast_2d(np.asarray(weight, np.float64)))
    layer = nn.Linear(rows.shape[1], rows.shape[0], dtype=torch.float64)
    layer.weight.data, layer.bias.data = (
        rows,
        torch.tensor(np.asarray(bias, np.float64)).expand(len(rows)).clone(),
    )
    return layer


class _Scaler(nn.Module):
    """(x - shift) * scale + offset for each feature, clamped if there are limits."""

    shift: Tensor | None
    scale: Tensor | None
    offset: Tensor | None

    def __init__(
        self,
        shift: Any = None,
        scale: Any = None,
        offset: Any = None,
        limits: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("shift", shift), ("scale", scale), ("offset", offset)):
            self.register_buffer(name, None if value is None else torch.tensor(np.asarray(value, np.float64)))
        self.limits = limits

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled features (n, features)."""
        x = x if self.shift is None else x - self.shift
        x = x if self.scale is None else x * self.scale
        x = x if self.offset is None else x + self.offset
        return x if self.limits is None else x.clamp(*self.limits)


def _standard(step: Any) -> nn.Module:
    return _Scaler(step.mean_ if step.with_mean else None, 1 / step.scale_ if step.with_std else None)


def _min_max(step: Any) -> nn.Module:
    low, high = map(float, step.feature_range)
    return _Scaler(scale=step.scale_, offset=step.min_, limits=(low, high) if step.clip else None)


def _robust(step: Any) -> nn.Module:
    return _Scaler(
        step.center_ if step.with_centering else None, 1 / step.scale_ if step.with_scaling else None
    )


_SCALERS: Mapping[str, Callable[[Any], nn.Module]] = {
    "StandardScaler": _standard,
    "MinMaxScaler": _min_max,
    "MaxAbsScaler": lambda step: _Scaler(scale=1 / step.scale_),
    "RobustScaler": _robust,
}
_ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "logistic": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
}


def _perceptron(estimator: Any) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for weight, bias in zip(estimator.coefs_, estimator.intercepts_, strict=True):
        layers += [_affine(weight.T, bias), _ACTIVATIONS[estimator.activation]()]
    return layers[:-1]


def _linear(estimator: Any) -> list[nn.Module]:
    return [_affine(estimator.coef_, estimator.intercept_)]


def _support_vectors(estimator: Any) -> list[nn.Module]:
    for name, value, expected in (
        ("kernel", estimator.kernel, "linear"),
        ("probability", getattr(estimator, "probability", False), False),
        ("number of classes", len(estimator.classes_), 2),
    ):
        if value not in (expected, "deprecated"):
            raise NoBounds(
                f"the {type(estimator).__name__} has the {name} {value!r}, and {expected!r} was expected, because its "
                "class is otherwise no function of linear scores; fit a LinearSVC"
            )
    return _linear(estimator)


def _by_gradient_steps(estimator: Any) -> list[nn.Module]:
    if estimator.loss == "modified_huber":
        raise NoBounds(
            "the SGDClassifier has the loss modified_huber, whose probabilities are equal where its scores are not; "
            "fit it with loss='log_loss' or 'hinge'"
        )
    return _linear(estimator)


_READERS: Mapping[str, Callable[[Any], list[nn.Module]]] = {
    **dict.fromkeys(
        ("LogisticRegression", "LogisticRegressionCV", "LinearSVC", "RidgeClassifier", "RidgeClassifierCV"),
        _linear,
    ),
    **dict.fromkeys(("Perceptron", "LinearDiscriminantAnalysis"), _linear),
    "SGDClassifier": _by_gradient_steps,
    "SVC": _support_vectors,
    "NuSVC": _support_vectors,
    "MLPClassifier": _perceptron,
}
ACCEPTED = f"of scikit-learn, these have bounds: {', '.join(_READERS)}, also after {', '.join(_SCALERS)} in a Pipeline"
"""what the message about another estimator says"""


def _steps(model: Classifier) -> Sequence[Any]:
    """The steps of a pipeline of scikit-learn, the last of which is the estimator; empty for another model."""
    source: Any = model.net.interface.source if isinstance(model.net, Estimator) else None
    steps = [step for _, step in source.steps] if type(source).__name__ == "Pipeline" else [source]
    steps = [step for step in steps if step is not None and step != "passthrough"]
    return steps if all(type(step).__module__.startswith("sklearn.") for step in steps) else []


def has_network(model: Classifier) -> bool:
    """Return whether a model is an estimator of scikit-learn that is read as a network."""
    steps = _steps(model)
    return bool(steps) and type(steps[-1]).__name__ in _READERS


def network_of(model: Classifier, sample: Inputs) -> Classifier:
    """Return an estimator of scikit-learn as a network in double precision with the same logits. Its final sigmoid or
    softmax is left out, which does not change the order of the classes.

    Raises `NoBounds` for another model, and if the outputs for the inputs `sample` (n, *shape) are not those of the
    estimator.
    """
    *scalers, estimator = _steps(model)
    layers: list[nn.Module] = [nn.Flatten()]
    for step in scalers:
        read = _SCALERS.get(type(step).__name__)
        if read is None:
            raise NoBounds(
                f"the pipeline has the step {type(step).__name__}, which has no bounds; {ACCEPTED}"
            )
        layers.append(read(step))
    layers += _READERS[type(estimator).__name__](estimator)
    network = Classifier(nn.Sequential(*layers), bounds=model.bounds, output="logit")
    network.register_buffer("mean", model.mean)
    network.register_buffer("std", model.std)
    network = network.to(sample.device, torch.float64).requires_grad_(requires_grad=False).eval()
    with torch.no_grad():
        logits, expected = network(sample.double()), model(sample).double()
    candidates = [logits]
    if model.output == "probability":
        # of several classes, the probabilities are a softmax, or sigmoids with the sum 1
        several = logits.sigmoid() / logits.sigmoid().sum(1, keepdim=True)
        candidates, expected = [logits.softmax(1), several], expected.exp()
    scale = expected.abs().amax().clamp(min=1.0)
    if not any(bool(((each - expected).abs() <= _SAME * scale).all()) for each in candidates):
        raise NoBounds(
            f"the {type(estimator).__name__} returns other scores than its coefficients give, so that nothing can be "
            f"proved about it; {ACCEPTED}"
        )
    return network
