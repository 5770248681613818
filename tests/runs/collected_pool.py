"""A pool of a problem that a small network learns in a second, collected once for all tests of its later steps."""

import shutil

import pytest

from holdfast.io.data.loaders import as_data
from holdfast.recipes import SingleStep, Standard
from holdfast.recipes.training.fit import Training
from holdfast.rotation import Basins, Codec, Immunise, LatentDiffusion
from holdfast.rotation.immunising import Crafting
from holdfast.rotation.pool import Pool
from holdfast.rotation.steps.rotation_request import RotateRequest, split_examples, trainable_subject
from holdfast.runs.assess.request import DescribedModel
from holdfast.runs.harden.candidates import Candidate
from rotation.problem import THREAT, examples, network
from runs import steps

SOURCE = Basins(seeds=2, sets=4, every=2, lr=1e-3)
CODEC, DIFFUSION = Codec(dims=8, hidden=64, steps=400), LatentDiffusion(width=64, depth=2, steps=400)
IMMUNISE = Immunise(crafting=Crafting(examples=64, steps=2))


def terms(source=SOURCE, *, robust=False, epochs=8, lr=0.02, seed=0, given=None) -> RotateRequest:
    """Of the small problem; a test set far from what is trained on."""
    kind = SingleStep if robust else Standard
    recipe = kind(training=Training(epochs=epochs, batch=64, lr=lr, averaging="none"))
    data, other = examples(n=640), examples(1, 64)
    parts = split_examples(data, as_data(other.x, other.y), "blobs", 4, seed)
    subject = DescribedModel(given or network(), "digest", {"name": "net"})
    trainable = trainable_subject(subject, "cpu", parts)
    candidate = Candidate("standard", recipe, {})
    return RotateRequest(trainable, THREAT, "linf:0.1", candidate, source, parts, seed, "own")


@pytest.fixture(scope="session")
def collected(tmp_path_factory):
    """A pool with everything collected and a generator, to be copied."""
    path = tmp_path_factory.mktemp("collected") / "pool"
    pool = steps.create(path, terms())
    found = steps.collect(pool, terms())
    learned = steps.train(pool, terms(), CODEC, DIFFUSION)
    return path, found, learned


@pytest.fixture
def pool(collected, tmp_path):
    path = tmp_path / "pool"
    shutil.copytree(collected[0], path)
    shutil.copy(collected[0].with_name("pool.key"), tmp_path / "pool.key")
    return Pool.open(path)
