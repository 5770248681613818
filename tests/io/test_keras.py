"""Models of Keras on its torch back end, in a process of their own: the back end is chosen when keras is imported."""

import copy
import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import holdfast
from holdfast.attacks import PGD
from holdfast.core.errors import TargetError
from holdfast.io.models.adapting import adapted, digest_of_object

X = np.random.default_rng(0).random((40, 8, 8, 1), dtype=np.float32)


@pytest.mark.slow  # importing keras takes some seconds
@pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="needs keras")
def test_models_of_keras_are_networks_with_a_layout():
    environment = {**os.environ, "KERAS_BACKEND": "torch"}
    command = [sys.executable, "-W", "error", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def network(keras):
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(4, 3, activation="relu"),
            layers.BatchNormalization(),
            layers.Dropout(0.5),
            layers.Flatten(),
            layers.Dense(3, activation="softmax"),
        ]
    )


def check():
    import keras

    layers = keras.layers
    keras.utils.set_random_seed(1)
    net = network(keras)
    probabilities = net(torch.from_numpy(X)).detach().numpy()
    y = probabilities.argmax(1)

    # The declared layout: arrays with the channels last, first and without an axis of channels are the same images.
    results = [
        holdfast.assess(net, (x, y), "linf:0.1", [PGD(steps=3)], doubts=False, save_adversarial=True)
        for x in (X, np.moveaxis(X, -1, 1), X[..., 0])
    ]
    for result in results:
        assert result.metrics["clean_accuracy"].value == 1
        assert result.metrics["robust_accuracy"].value == results[0].metrics["robust_accuracy"].value < 0.9
    attacked = np.moveaxis(results[0].adversarial["x"].numpy(), 1, -1)
    assert (net(torch.from_numpy(attacked)).argmax(1).numpy() != y[results[0].adversarial["id"]]).all()

    # The last activation declares probabilities; dropout is on in train mode alone, and a copy has weights of its own.
    found = adapted(net)
    assert (found.layout, found.output) == ("hwc", "probability")
    assert (
        adapted(keras.Sequential([keras.Input((8, 8, 1)), layers.Flatten(), layers.Dense(3)])).output is None
    )
    first = adapted(
        keras.Sequential([keras.Input((1, 8, 8)), layers.Conv2D(2, 3, data_format="channels_first")])
    )
    assert first.layout == "chw"
    x = torch.from_numpy(X)
    assert torch.equal(found.net.eval()(x), torch.from_numpy(probabilities))
    assert not torch.equal(found.net.train()(x), found.net(x))
    copied = copy.deepcopy(found.net.eval())
    assert torch.equal(copied(x), found.net(x))
    before = found.net(x)
    with torch.no_grad():
        next(weight for weight in copied.parameters() if weight.is_floating_point()).add_(1)
    assert torch.equal(found.net(x), before)
    assert digest_of_object(copied) != digest_of_object(found.net) == digest_of_object(adapted(net).net)

    with pytest.raises(TargetError, match="Sequential of Keras"):
        holdfast.harden(net, (X, y), "linf:0.1")
    with pytest.raises(TargetError, match="no weights before its first input"):
        adapted(keras.Sequential([layers.Dense(3)]))
    keras.backend.backend = lambda: "jax"
    with pytest.raises(TargetError, match="KERAS_BACKEND=torch before keras is imported"):
        adapted(net)


if __name__ == "__main__":
    check()
