"""Wraps models of Keras 3 that use the torch back end as torch networks, and determines their layout and output."""

import re
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.core.errors import TargetError
from holdfast.core.outputs import OutputKind
from holdfast.core.types import Layout
from holdfast.io.models.estimators import Adapted


class KerasNet(nn.Module):
    """A Keras model wrapped as a torch module. Dropout and updates of batch norm are active only in train mode."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.name = type(model).__qualname__

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of the Keras model for a batch."""
        try:
            outputs: Tensor = self.model(x, training=self.training)
        except (ValueError, RuntimeError) as error:  # raised by an input or a layer of another shape
            error.args = (error_line(str(error)),)
            raise
        return outputs

    def __deepcopy__(self, memo: dict[int, object]) -> "KerasNet":
        """Return a copy with the same layers and its own weights.

        The copy function of Keras is not used, because it would write a file.
        """
        import keras

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras converts numbers in a way that numpy deprecates
            model = keras.models.clone_model(self.model)
        with torch.no_grad():
            for copy, original in zip(model.variables, self.model.variables, strict=True):
                copy.value.data.copy_(original.value.data)
        copied = KerasNet(model)
        copied.train(self.training)
        return copied


_COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # escape sequences of terminals, which Keras writes into messages
_TENSOR = re.compile(r"\s*\btensor\(\[.*?\](?:, [^()]*)?\)", re.DOTALL)
_LONGEST = 300
"""Largest number of characters of an error of Keras that a message contains."""


def error_line(text: str) -> str:
    r"""Return the first line of a Keras error message, without layer names, terminal colours and tensor values.

    >>> error_line("Exception encountered when calling A\n\n\x1b[1mshapes (4, 2) and (3, 1)\x1b[0m\n\nArguments: x")
    'shapes (4, 2) and (3, 1)'
    >>> error_line("Invalid shape for input tensor([[0.1],\n [0.2]]). Expected (None, 2), got (2, 1)")
    'Invalid shape for input. Expected (None, 2), got (2, 1)'
    """
    cleaned = _TENSOR.sub("", _COLOURS.sub("", text))
    lines = [line.strip() for line in cleaned.splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].startswith("Exception encountered when calling"):
        del lines[0]
    first = lines[0] if lines else ""
    return first[:_LONGEST] + ("…" if len(first) > _LONGEST else "")


def adapted_keras(model: Any) -> Adapted:
    """Return a Keras model wrapped as a torch network, with the layout of its inputs and whether its outputs are
    probabilities.

    Raises `TargetError` for another back end than torch, and for a model without weights.
    """
    import keras

    backend = keras.backend.backend()
    if backend != "torch":
        raise TargetError(
            f"the Keras model uses the back end {backend}, but torch was expected; set the environment variable "
            "KERAS_BACKEND=torch before keras is imported, and load or build the model again"
        )
    if not model.built:
        raise TargetError(
            f"the {type(model).__qualname__} of Keras has no weights before its first input; begin it with "
            "keras.Input(shape), or call it on a batch first"
        )
    return Adapted(KerasNet(model), output=_output(model, keras), layout=_layout(model, keras))


def _layout(model: Any, keras: Any) -> Layout | None:
    """Return the layout of images or volumes according to the layers of the model, or None for other inputs."""
    shape = getattr(model, "input_shape", None)
    if not isinstance(shape, tuple) or len(shape) not in (4, 5):
        return None
    declared = [
        layer.data_format for layer in model.layers if isinstance(getattr(layer, "data_format", None), str)
    ]
    order = declared[0] if declared else keras.config.image_data_format()
    return "hwc" if order == "channels_last" else "chw"


def _output(model: Any, keras: Any) -> OutputKind | None:
    """Return "probability" if the last layer computes probabilities. Otherwise return None.

    The result is also None for a model of a user-defined class, whose outputs are unknown.
    """
    if len(getattr(model, "outputs", None) or ()) != 1:
        return None
    last = model.layers[-1]  # layers are in the order of the graph
    if isinstance(last, keras.Model):
        return _output(last, keras)
    if isinstance(last, keras.layers.Softmax):
        return "probability"
    probabilities = (keras.activations.softmax, keras.activations.sigmoid)
    return "probability" if getattr(last, "activation", None) in probabilities else None
