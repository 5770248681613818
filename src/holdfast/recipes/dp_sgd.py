"""DP-SGD: training with differential privacy, which limits what the weights reveal about a training example.

Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, arXiv:1607.00133: the gradient of each example is
clipped, and Gaussian noise is added to the sum over a batch that contains each example with the same probability. Li et
al., "Large Language Models Can Be Strong Differentially Private Learners", ICLR 2022, arXiv:2110.05679: the norms of
the gradients are computed without the gradients (ghost clipping, by Opacus). Gopi, Lee & Wutschitz, "Numerical
Composition of Differential Privacy", NeurIPS 2021, arXiv:2106.02848: the noise for a given epsilon. Differs from the
papers: the weights are averaged, and the learning rate follows one cycle.

The guarantee is for adding or removing one row (example) on which the network is trained, and not for a person with
several rows. It needs that the given weights do not depend on these examples, and that the seed, from which the noise
is computed, is not published.
"""

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from annotated_types import Gt, Lt
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from holdfast.core.batch import Batch, TrainingData
from holdfast.core.draws import Draws
from holdfast.core.errors import Install, Remedy, UsageError
from holdfast.core.estimate import Goal
from holdfast.core.model import Classifier
from holdfast.core.types import Inputs, Positive
from holdfast.recipes.training.fit import Training, drawing, updates
from holdfast.recipes.training.learner import Learner, Loop, hits
from holdfast.recipes.training.recipe import LossRecipe
from holdfast.statistics.privacy_budget import RowBudget, row_budget

if TYPE_CHECKING:
    from opacus.grad_sample import GradSampleHooksFastGradientClipping as Hooks

_COMPARED = 4
"""examples whose norms are compared with those of their own gradients before the training"""
_TOLERANCE = 1e-3
"""largest relative difference of these norms, which are computed in another order of float32 operations"""
_PRECISION, _LARGEST = 0.01, math.log(1e6)
"""precision of the logarithm of the noise, and the largest one that is tried"""


@dataclass(frozen=True)
class DPSGD(LossRecipe):
    """Trains with differential privacy on clean inputs: clipped gradients with noise, for a stated epsilon and
    delta.
    """

    epsilon: Positive = 8.0
    """privacy budget of each training row: a smaller value reveals less of it, and needs more noise; for k equal rows,
    it is up to k times as large"""
    delta: Annotated[float, Gt(0), Lt(1)] = 1e-5
    """probability with which the budget may be exceeded; it must be smaller than 1 / number of training examples"""
    max_grad_norm: Positive = 1.0
    """norm to which the gradient of an example is clipped if it is larger"""
    training: Training = field(default_factory=lambda: Training(batch=512))

    goal: ClassVar[Goal] = Goal("clean_accuracy")
    private: ClassVar[bool] = True
    differentiated_twice: ClassVar[bool] = True
    in_one_process: ClassVar[bool] = True
    sets_gradients: ClassVar[bool] = True

    def prepared(self, loop: Loop) -> Loop:
        """Return the training with its noise. Raises `UsageError` if the guarantee would not hold."""
        n = len(loop.data)
        self._refuse_unsound(loop.data)
        refuse_unclippable(loop.model, loop.data.first(_COMPARED))
        loss = partial(self.private_loss, expected=min(self.training.batch, n), noise=self.noise(n))
        # the norms must be exact
        return replace(loop, loss=loss, how=replace(self.training, precision="float32"))

    def budget_on(self, fingerprints: Sequence[bytes]) -> RowBudget:
        """Return the privacy budget of a training on rows with these hashes of their inputs."""
        return row_budget(self.epsilon, self.delta, fingerprints)

    def noise(self, n: int) -> float:
        """Return the standard deviation of the noise for `n` training examples, in multiples of `max_grad_norm`."""
        steps = self.training.epochs * updates(n, self.training.batch)
        return noise_multiplier(self.epsilon, self.delta, min(self.training.batch / n, 1.0), steps)

    def private_loss(
        self, learner: Learner, batch: Batch, x: Inputs, *, expected: int, noise: float
    ) -> tuple[Tensor, Tensor]:
        """Set the gradients of a batch, clipped and with noise, and return the mean loss and the number of correct
        examples, which are not private.

        The sum of the gradients is divided by the expected number of examples. Cost: a forward and two backwards.
        """
        weights = [weight for weight in learner.net.parameters() if weight.requires_grad]
        value = right = x.new_zeros(())
        if len(x):
            with clipping(learner.net, self.max_grad_norm) as hooks:
                logits = learner.net(x)
                losses = cross_entropy(logits, batch.y, reduction="none")
                losses.sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
                factors = hooks.get_clipping_coef().detach()
                hooks.disable_hooks()
                learner.net.zero_grad()
                (factors * losses).sum().backward()
            value, right = losses.detach().mean(), hits(logits, batch.y)
        for weight in weights:
            total = torch.zeros_like(weight) if weight.grad is None else weight.grad
            weight.grad = (total + noise * self.max_grad_norm * torch.randn_like(weight)) / expected
        return value, right

    def _refuse_unsound(self, data: TrainingData) -> None:
        """Raise `UsageError` for settings with which the guarantee would not hold or would have no meaning."""
        how = self.training
        if how.pacing is not None:
            raise UsageError(
                "dp-sgd computes its noise from the number of epochs, which a budget of time changes; give "
                "recipe.training.epochs",
                Remedy("budget"),
            )
        if self.delta >= 1 / len(data):
            raise UsageError(
                f"delta is {self.delta:g}; with {len(data):,} training examples it must be smaller than "
                f"{1 / len(data):.2g}, because publishing one example has this delta",
                Remedy("recipe.delta", float(f"{0.1 / len(data):.0e}")),
            )
        if how.awp or how.immunity is not None or not isinstance(how.augment, str):
            raise UsageError(
                "dp-sgd clips the gradient of each example by itself, which is not possible with awp, immunity or an "
                "augmentation by a function, which may mix examples; leave them out"
            )
        if how.precision == "bfloat16":
            raise UsageError("dp-sgd clips with exact norms, and bfloat16 rounds them; leave precision out")


@lru_cache(maxsize=16)
def noise_multiplier(epsilon: float, delta: float, rate: float, steps: int) -> float:
    """Return the standard deviation of the noise, in multiples of the clipping norm, with which `steps` updates on
    samples of the share `rate` are (epsilon, delta)-differentially private. It is at most 1 % larger than needed.

    The accountant returns upper bounds of epsilon. Raises `UsageError` if Opacus is missing, or if no noise is enough.
    """
    from scipy.optimize import brentq

    def excess(log_noise: float) -> float:
        """Logarithm of the spent epsilon, divided by the given one."""
        return math.log(spent_epsilon(math.exp(log_noise), delta, rate, steps, epsilon / 50) / epsilon)

    high = 0.0
    while excess(high) > 0:
        high += math.log(2)
        if high > _LARGEST:
            raise UsageError(
                f"no noise is large enough for epsilon={epsilon:g} and delta={delta:g} in {steps:,} updates; expected "
                "a larger epsilon or fewer epochs"
            )
    low = high - math.log(2)
    while excess(low) <= 0:
        low -= math.log(2)
    found = brentq(excess, low, high, xtol=_PRECISION / 2)
    while excess(found) > 0:
        found += _PRECISION / 2
    return math.exp(found)


def spent_epsilon(noise: float, delta: float, rate: float, steps: int, error: float = 0.01) -> float:
    """Return an upper bound of the epsilon of `steps` updates, computed by Opacus with a numerical `error`."""
    _refuse_missing()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on the numerical grid, whose error is included in the bound
        from opacus.accountants import PRVAccountant

        accountant = PRVAccountant()
        accountant.history = [(noise, rate, steps)]
        return float(accountant.get_epsilon(delta, eps_error=error))


@contextmanager
def clipping(net: nn.Module, max_grad_norm: float) -> Iterator["Hooks"]:
    """Context manager in which backward passes of a network compute the gradient norm of each example, for
    `get_clipping_coef` of the result.

    Layers of the network that overwrite their input do so no longer, because hooks do not allow it.
    """
    _refuse_missing()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.grad_sample import GradSampleHooksFastGradientClipping as Hooks
    for module in net.modules():
        if isinstance(getattr(module, "inplace", None), bool):
            module.inplace = False  # type: ignore[assignment]
    hooks = Hooks(net, loss_reduction="sum", max_grad_norm=max_grad_norm, use_ghost_clipping=True)
    try:
        with warnings.catch_warnings():
            # the inputs of the first layer have no gradient, which is not needed
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            yield hooks
    finally:
        hooks.remove_hooks()


def refuse_unclippable(model: Classifier, batch: Batch) -> None:
    """Raise `UsageError` if the gradient of an example depends on the others, if its norm is not computed correctly,
    or if the network keeps statistics of its inputs.

    The norms of a few examples are compared with those of their own gradients.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            raise UsageError(
                f"{name} is batch norm, which mixes the examples of a batch, so that their gradients cannot be clipped "
                "one by one; replace it by torch.nn.GroupNorm"
            )
    net, x = deepcopy(model).train(), batch.x.clone().requires_grad_()
    weights = [weight for weight in net.parameters() if weight.requires_grad]
    buffers = {name: value.clone() for name, value in net.named_buffers()}
    other_network = Remedy("recipe", "standard", reason="for a training without privacy")
    try:
        with torch.enable_grad(), drawing(Draws(0), x.device), clipping(net, 1.0) as hooks:
            losses = cross_entropy(net(x), batch.y, reduction="none")
            losses.sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
            norms = hooks.get_norm_sample()
            hooks.disable_hooks()
            own = [
                torch.autograd.grad(loss, [x, *weights], retain_graph=True, allow_unused=True)
                for loss in losses
            ]
    except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"Opacus cannot clip the gradients of this network by example ({type(error).__name__}: {error}); give a "
            "network of layers that it supports, such as linear layers and convolutions",
            other_network,
        ) from error
    exact = [_norm(of_weights) for _, *of_weights in own]
    is_own = torch.eye(len(x), dtype=torch.bool, device=x.device)
    mixes = any(bool(of_x[~row].any()) for (of_x, *_), row in zip(own, is_own, strict=True))
    if mixes or not torch.allclose(norms, torch.tensor(exact).to(norms), rtol=_TOLERANCE, atol=1e-6):
        raise UsageError(
            "the network mixes the examples of a batch, so that the gradient of one depends on the others; expected "
            "layers that treat each example by itself"
            if mixes
            else f"Opacus computes gradient norms of {norms.tolist()} for examples whose gradients have the norms "
            f"{exact}; the network uses a weight outside its layer; expected a network that calls its layers",
            other_network,
        )
    changed = [name for name, value in net.named_buffers() if not torch.equal(value, buffers[name])]
    if changed:
        raise UsageError(
            f"{changed[0]} keeps statistics of the training inputs, which would be published without noise; replace "
            "the layer, as by torch.nn.GroupNorm"
        )


def _norm(gradients: Iterable[Tensor | None]) -> float:
    """Norm of the gradients of all weights together; those of unused weights are None."""
    return math.hypot(*(float(gradient.norm()) for gradient in gradients if gradient is not None))


def _refuse_missing() -> None:
    """Raise `UsageError` if Opacus is not installed."""
    from importlib.util import find_spec

    if find_spec("opacus") is None:
        raise UsageError("dp-sgd needs Opacus, which is not installed", Install("privacy"))
