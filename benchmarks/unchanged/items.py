"""Computes one item with the version of Holdfast that is on the import path, and prints it as JSON.

It uses what users use: names that the documentation shows, and the command line. The benchmarks are those of this
checkout, so that an item is the same for every version of the package.
"""

import contextlib
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

# Before torch is imported: one thread, so that sums are taken in one order. The key of the guard decides its scores.
os.environ.update(
    OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", COLUMNS="100", NO_COLOR="1", HOLDFAST_GUARD_KEY="5a" * 32
)

import numpy as np
import torch
from torch import Tensor

from benchmarks.unchanged.results import RESULTS, lasting, printed

N = 64
FIT, EPS = 1_000, 0.1
NETWORKS: Mapping[str, str] = {
    "mnist_cnn_a_adv": "linf:0.3",
    "cifar_cnn_a_adv": "linf:8/255",
    "mnist-cnn-hardened": "linf:0.1",
    "cifar_resnet20": "linf:0.5/255",
}
SUITES = ("quick", "fast", "standard", "rand", "black-box")
_SMALL = ("mnist-cnn", "mnist-mini", "--threat", "linf:0.1", "-n", "64")
VERBS: Mapping[str, tuple[str, ...]] = {
    "assess": (*_SMALL, "--suite", "quick", "--run", "assessed"),
    "harden": (
        *(*_SMALL, "--suite", "quick", "--run", "hardened"),
        *("--recipe", "fgsm-rs", "--set", "recipe.training.epochs=1"),
    ),
}
"""arguments of the verbs that make a run; its JSON goes to the standard output"""
LATER: Mapping[str, tuple[str, ...]] = {
    "report": ("assessed", "-o", "-"),
    "compare": ("assessed", "assessed", "-o", "-"),
    "verify": ("assessed",),
}
"""arguments of the verbs that read one"""


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        value = tensor.detach().cpu().contiguous()
        found.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def verdicts(network: str, suite: str) -> Any:
    """A digest of each column of an assessment."""
    import holdfast
    from benchmarks import networks

    found = networks.network(network)
    x, y = networks.images(found.data, N)
    evidence = holdfast.assess(
        found.module, (x, y), NETWORKS[network], suite=suite, seed=0, device="cpu"
    ).evidence
    return {name: digest({name: column}) for name, column in evidence.columns.items()}


def weights(recipe: str) -> Any:
    """A digest of the weights after one epoch on 1,000 images."""
    from benchmarks import networks
    from holdfast import L2, Batch, Classifier, Draws, Linf, ThreatModel, recipes
    from holdfast.recipes.training.fit import Training

    x, y = networks.images("mnist", FIT, split="train")
    net = networks.network("mnist_kw01").module
    surrogate = Classifier(networks.network("mnist_cnn_a_adv").module)
    threat = ThreatModel(Linf(EPS), surrogates=(surrogate,))
    further: Mapping[str, Mapping[str, Any]] = {
        "MultiNormTraining": {"others": (L2(1.5),)},
        "GeneratedData": {"samples": "generated.npz"},  # a generator of one epoch is refused
    }
    trained = getattr(recipes, recipe)(training=Training(epochs=1), **further.get(recipe, {}))
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        np.savez("generated.npz", x=x.flip(0).numpy(), y=y.flip(0).numpy())
        last = list(trained(Classifier(net), Batch(x, y, torch.arange(FIT)), threat, rng=Draws(0)))[-1]
    return digest(last.tensors)


def draws(sampler: str) -> Any:
    """A digest of parameter sets that a small generator draws."""
    from holdfast import Draws
    from holdfast.rotation import Codec, LatentDiffusion, Members

    torch.manual_seed(0)
    sets = [{"weight": torch.randn(6, 5), "bias": torch.randn(6)} for _ in range(24)]
    members = Members.of(sets, [place // 8 for place in range(24)])
    rng = Draws(0)
    embedding = Codec()(members, rng=rng.at("codec"))
    generator = LatentDiffusion(steps=50)(embedding, members, rng=rng.at("diffusion"))
    return digest(generator.drawn(8, rng.at("draw"), sampler).tensors)  # type: ignore[arg-type]


def names(module: str) -> Any:
    """What a public module exports."""
    return sorted(getattr(import_module(module), "__all__", []))


def help_text(command: str) -> Any:
    """The help of a command."""
    return printed(f"{command} --help")


def output(verb: str) -> Any:
    """The JSON of one run of a verb, without what differs from run to run."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        first = verb if verb in VERBS else "assess"
        text = printed(" ".join([first, *VERBS[first], "-o", "-"]))
        if verb in LATER:
            text = printed(" ".join([verb, *LATER[verb]]))
    try:
        return lasting(json.loads(text))
    except ValueError:
        return re.sub("[0-9a-f]{64}", "DIGEST", text)


def result(name: str) -> Any:
    """A result of one of the further verbs."""
    return RESULTS[name]()


KINDS: Mapping[str, Callable[..., Any]] = {
    "verdicts": verdicts,
    "weights": weights,
    "draws": draws,
    "names": names,
    "help": help_text,
    "outputs": output,
    "results": result,
}

if __name__ == "__main__":
    kind, *of = sys.argv[1:]
    found = KINDS[kind](*of)
    sys.stdout.write(json.dumps(found, sort_keys=True))
