"""Compressed networks: checkpoints that contain the compressed weights beside those in training, and what the card of a
new model states about its size and about attacks on it.

Attacks on a compressed network are made through the network itself, and on the given one, whose adversarial examples
are transferred (Ye et al., "Adversarial Robustness vs. Model Compression, or Both?", ICCV 2019, arXiv:1903.12561).
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.attacks.parts.losses import margin
from holdfast.attacks.pgd import margin_pgd
from holdfast.attacks.protocol import attacked_inputs
from holdfast.core.batch import Batch
from holdfast.core.meter import results_in_pieces
from holdfast.core.model import Classifier
from holdfast.core.training import AVERAGE, STATE, WEIGHTS, Checkpoint, without_prefix
from holdfast.io.models.architectures import int8_layers, naive_gradients
from holdfast.recipes.training.fit import drawing
from holdfast.recipes.training.recipe import Finished

_TRAINED = STATE + "trained."
"""prefix of the tensors of a training in a checkpoint whose weights are compressed"""


def compressed(
    checkpoint: Checkpoint, compress: Callable[[dict[str, Tensor], Checkpoint], dict[str, Tensor]]
) -> Checkpoint:
    """Return the checkpoint of a training with compressed weights of the new model, which `compress` returns from the
    averaged weights, or from the last ones without an average. `uncompressed` restores the others.
    """
    weights = without_prefix(checkpoint.tensors, AVERAGE if checkpoint.averaged else WEIGHTS)
    tensors = {_TRAINED + name: value for name, value in checkpoint.tensors.items()}
    # clones, because tensors of a file may not share memory
    new = {WEIGHTS + name: value.clone() for name, value in compress(weights, checkpoint).items()}
    return replace(checkpoint, tensors=tensors | new)


def uncompressed(checkpoint: Checkpoint | None) -> Checkpoint | None:
    """Return the checkpoint from which a training continues. Checkpoints within an epoch contain nothing else."""
    tensors = {} if checkpoint is None else without_prefix(checkpoint.tensors, _TRAINED)
    return replace(checkpoint, tensors=tensors) if checkpoint is not None and tensors else checkpoint


def bytes_of(net: nn.Module) -> int:
    """Return the number of bytes of the parameters and buffers of a network."""
    return sum(value.numel() * value.element_size() for value in net.state_dict().values())


def after_compression(finished: Finished, size: int, sizes: str) -> tuple[dict[str, Any], str]:
    """Return the sizes of both networks and the robust accuracies of the new one as an entry of the card, and a
    sentence on them.

    `size` is the number of bytes of the new network, and `sizes` describes it. Robust accuracies are shares of the test
    examples that are right after PGD with 40 steps: `through` the new network, `transferred` from the given one,
    `worst` of both, and for rounded networks `naive`, with the true gradient of the rounding, which is zero.
    """
    given, new = finished.given, finished.new
    before = bytes_of(given)
    accuracies = {"given": _robust(given, given, finished), "through": _robust(new, new, finished)}
    accuracies["transferred"] = _robust(given, new, finished)
    accuracies["worst"] = accuracies["through"] & accuracies["transferred"]
    rounds = bool(int8_layers(new.net))
    if rounds:
        accuracies["naive"] = _robust(new, new, finished, naive=True)
    shares = {name: float(right.double().mean()) for name, right in accuracies.items()}
    entry = {"bytes": {"before": before, "after": size}, "n": len(finished.test), "robust_accuracy": shares}
    percent = {name: f"{100 * share:.1f} %" for name, share in shares.items()}
    sentence = (
        f"the network has {size:,} bytes ({sizes}) in place of {before:,}. Under PGD with 40 steps, "
        f"{percent['through']} of {len(finished.test):,} test examples are robust in attacks through the compressed "
        f"network, {percent['transferred']} against adversarial examples of the given one, {percent['worst']} against "
        f"both; of the given network {percent['given']}"
    )
    if rounds:
        sentence += f". An overestimate is {percent['naive']}, by a naive attack with the zero gradient of the rounding"
    return entry, sentence


def _robust(attacked: Classifier, judged: Classifier, finished: Finished, *, naive: bool = False) -> Tensor:
    """Return whether each test example is classified correctly by `judged`, as it is and after an attack on
    `attacked`.
    """
    assert isinstance(attacked.net, nn.Module)
    rng = finished.rng.at("compression")
    # a transferred attack continues after it has broken the attacked network
    attack = replace(margin_pgd(), drop=attacked is judged)
    modes = [(module, module.training) for net in (attacked, judged) for module in net.modules()]
    attacked.eval()
    judged.eval()

    def right(part: Batch) -> Tensor:
        x_adv = attacked_inputs(attack, attacked, part, finished.threat, rng=rng)
        with torch.no_grad():
            return (margin(judged(part.x), part) > 0) & (margin(judged(x_adv), part) > 0)

    with naive_gradients(attacked.net) if naive else nullcontext(), drawing(rng, finished.test.x.device):
        parts = results_in_pieces(finished.test, right)
    for module, mode in modes:
        module.training = mode
    return torch.cat(parts)
