"""The optimiser Adam for inputs instead of weights, as attacks need it."""

import torch

from holdfast.core.types import Inputs

_TINY = 1e-12  # a mean of zero then gives a step of zero and not NaN


class Adam:
    """The optimiser Adam (Kingma & Ba, "Adam: a method for stochastic optimization", ICLR 2015, arXiv:1412.6980) for
    inputs.
    """

    def __init__(self, like: Inputs, decay: float = 0.9, decay_square: float = 0.999) -> None:
        self._decays = decay, decay_square
        self._mean, self._square = torch.zeros_like(like), torch.zeros_like(like)
        self._steps = 0

    def take(self, rows: torch.Tensor) -> None:
        """Restrict the state of the optimiser to the given rows of the batch, because the other examples are no longer
        attacked.
        """
        self._mean, self._square = self._mean[rows], self._square[rows]

    def __call__(self, gradient: Inputs) -> Inputs:
        """Update the running means with a gradient and return the direction of the next step."""
        mean, scale = self.mean_and_scale(gradient)
        return mean / scale

    def mean_and_scale(self, grad: Inputs) -> tuple[Inputs, Inputs]:
        """Update the running means of Adam with the gradient `grad`, and return the bias-corrected mean and the square
        root of the bias-corrected mean square.
        """
        self._steps += 1
        decay, decay_square = self._decays
        self._mean = torch.lerp(grad, self._mean, decay)
        self._square = torch.lerp(grad**2, self._square, decay_square)
        unbiased = self._square / (1 - decay_square**self._steps)
        return self._mean / (1 - decay**self._steps), unbiased.sqrt() + _TINY
