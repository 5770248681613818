"""A server that answers by the vote over masks, and states which images are certified."""

import json

import httpx
import numpy as np
import pytest
import torch

from holdfast.certifiers.patch_masks import PatchMasks
from holdfast.core.batch import Batch
from holdfast.core.errors import UsageError
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.server.app import openapi_document
from holdfast.server.protocol_v2 import LENGTH_HEADER, Signature
from holdfast.threats.transformations import Patch
from holdfast.verbs.serve_opening import server_setup
from holdfast.verbs.settings import Serve

from .small import request
from .test_server import JSON, running

SHAPE, PATCH, MASKS = (1, 6, 6), "patch:2x2", 3
CODE = """
import torch


def make():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 3, bias=False))
"""


@pytest.fixture
def setup(tmp_path):
    def prepared(**settings):
        (tmp_path / "net.py").write_text(CODE)
        usual = {"port": 0, "name": "small", "model": f"{tmp_path / 'net.py'}:make", "input_shape": SHAPE}
        return server_setup(Serve(**{**usual, "masked_vote": PATCH, "masks": MASKS, **settings}))

    return prepared


def images():
    """Images, each also with a bright patch at random places."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(40, *SHAPE, generator=generator)
    attacked = x.clone()
    for row in attacked:
        top, left = torch.randint(5, (2,), generator=generator).tolist()
        row[:, top : top + 2, left : left + 2] = 1.0
    return x, attacked


def expected(x):
    names = {}
    exec(CODE, names)
    model = Classifier(names["make"]()).eval().requires_grad_(False)
    ready = PatchMasks(MASKS).ready(model, Batch(x, torch.zeros(len(x), dtype=torch.long), torch.arange(len(x))),
                                    ThreatModel(Patch(2, 2)))  # fmt: skip
    votes = ready.model(x).argmax(1)
    return votes, ~ready.vote.disagreeing(x, votes)[0].any(1)


@pytest.mark.slow
def test_clients_receive_the_vote_and_whether_a_patch_can_have_changed_it(setup):
    prepared, (x, attacked) = setup(), images()
    votes, certified = expected(x)
    votes_of_attacked, certified_of_attacked = expected(attacked)
    assert 5 < certified.sum() < 35 and 5 < certified_of_attacked.sum() < 35
    # what clients rely on: a certified class is also that of the image without the patch
    assert torch.equal(votes_of_attacked[certified_of_attacked], votes[certified_of_attacked])
    with running(prepared) as (_, url, _), httpx.Client(timeout=60) as client:
        for inputs, classes, flags in (
            (x, votes, certified),
            (attacked, votes_of_attacked, certified_of_attacked),
        ):
            named = {"outputs": [{"name": "certified"}, {"name": "scores"}]}
            output, scores = client.post(url, content=request(inputs, **named), headers=JSON).json()[
                "outputs"
            ]
            assert torch.tensor(scores["data"]).reshape(-1, 3).argmax(1).tolist() == classes.tolist()
            assert output == {
                "name": "certified", "datatype": "BOOL", "shape": [40], "parameters": {"patch": PATCH},
                "data": flags.tolist(),
            }  # fmt: skip
        binary = request(x, parameters={"binary_data_output": True})
        response = client.post(url, content=binary, headers=JSON)
        length = int(response.headers[LENGTH_HEADER])
        sizes = [
            each["parameters"]["binary_data_size"]
            for each in json.loads(response.content[:length])["outputs"]
        ]
        assert sizes == [40 * 3 * 4, 40] and len(response.content) == length + sum(sizes)
        assert np.frombuffer(response.content[-40:], bool).tolist() == certified.tolist()
        outputs = client.get(url.removesuffix("/infer")).json()["outputs"]
        assert [each["name"] for each in outputs] == ["scores", "certified"]
    signature = Signature("small", SHAPE, 3, certified_patch=PATCH)
    assert '"const": "certified"' in json.dumps(openapi_document(signature, keys=False, max_body=9))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"masked_vote": "linf:0.1"}, "a patch in images was expected"),
        ({"masked_vote": "patch:7x7"}, "does not fit into images of 6x6"),
        ({"masked_vote": "patch:2x2,goal=targeted:1"}, "excludes all wrong classes"),
        ({"masked_vote": None}, "concerns the vote over masks"),
        ({"masks": 1}, "hides the whole image"),
        ({"monitor": "mnist-mini"}, "a monitor compares the outputs of the model itself"),
        (
            {"model": None, "proxy": "http://127.0.0.1:9"},
            "masked_vote, masks belong to a model of this server",
        ),
    ],
)
def test_votes_that_cannot_be_served_are_refused(setup, settings, message):
    with pytest.raises(UsageError, match=message):
        setup(**settings)


def test_a_vote_of_a_model_with_random_outputs_is_refused():
    class Noisy(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :3] + torch.rand(len(x), 3)

    vote = PatchMasks(MASKS).net(Classifier(Noisy()), torch.zeros(1, *SHAPE), ThreatModel(Patch(2, 2)))
    with pytest.raises(UsageError, match="a certificate is about a fixed function"):
        vote.refuse_random()


def test_rules_that_judge_outputs_are_refused(setup, tmp_path):
    guard = tmp_path / "guard.yaml"
    guard.write_text("inputs: {shape: [1, 6, 6]}\nrules: {range: {}, energy: {threshold: 0}}\n")
    with pytest.raises(UsageError, match="energy would judge or change"):
        setup(guard=str(guard))
    guard.write_text("inputs: {shape: [1, 6, 6]}\nrules: {range: {}}\n")
    assert setup(guard=str(guard)).worker.shape == SHAPE
