"""A small network, its signature, and a pool of its parameter sets, for the tests of the server."""

import json

import torch
from torch import nn

from holdfast.core.model import Classifier
from holdfast.rotation.pool import Pool
from holdfast.rotation.rotating_model import canary
from holdfast.server.protocol_v2 import Signature

FEATURES, CLASSES = 4, 3
SIGNATURE = Signature("small", (FEATURES,), CLASSES, max_rows=8)


def network(seed=0):
    """A linear network whose logits differ clearly between seeds."""
    torch.manual_seed(seed)
    return Classifier(nn.Linear(FEATURES, CLASSES)).eval().requires_grad_(False)


def request(x, **more):
    """The JSON of a request with the inputs `x` (n, features)."""
    tensor = {"name": "input", "shape": list(x.shape), "datatype": "FP32", "data": x.flatten().tolist()}
    return json.dumps({"inputs": [tensor], **more}).encode()


def pool(path, n=4):
    """A pool with `n` admitted sets of the network, and canary inputs."""
    made = Pool.create(path, {})
    x = torch.rand(32, FEATURES, generator=torch.Generator().manual_seed(0))
    made.keep("canaries", {"x": x}, {})
    for seed in range(n):
        model = network(seed)
        name = made.add(dict(model.net.state_dict()), {})
        made.admit(name, canary=canary(model, x))
    return made
