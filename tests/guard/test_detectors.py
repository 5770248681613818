"""Stateless detectors have the scores of their definitions, and gradients for attacks that know them."""

import pytest
import torch

from holdfast.core.errors import UsageError
from holdfast.guard.detectors.outputs import (
    Energy,
    FeatureSqueezing,
    Mahalanobis,
    NoiseStability,
    Observation,
    prediction_change,
)
from holdfast.guard.rules import median_filtered, with_bits


def test_energy_is_minus_the_logarithm_of_the_sum_and_zero_for_log_probabilities():
    logits = torch.tensor([[0.0, 0.0], [3.0, 1.0]], dtype=torch.float64)
    assert Energy()(Observation(logits, logits)).tolist() == pytest.approx([-0.693147, -3.126928])
    assert Energy(2.0)(Observation(logits, logits)).tolist() == pytest.approx([-1.386294, -3.626523])
    assert Energy()(Observation(logits, logits.log_softmax(1))).abs().max() < 1e-12


def test_squeezed_values_are_the_nearest_of_the_grid_with_the_gradient_of_the_identity():
    x = torch.tensor([[0.0, 0.24, 0.26, 1.0]], dtype=torch.float64, requires_grad=True)
    assert with_bits(x.detach(), 1).tolist() == [[0, 0, 0, 1]]
    squeezed = with_bits(2 * x - 1, 2, -1.0, 1.0)
    assert torch.allclose(squeezed, torch.tensor([[-1, -1 / 3, -1 / 3, 1]], dtype=torch.float64))
    squeezed.sum().backward()
    assert x.grad.tolist() == [[2, 2, 2, 2]]


@pytest.mark.parametrize("size", [2, 3])
def test_the_median_filter_removes_a_single_pixel_and_keeps_the_shape(size):
    x = torch.zeros(1, 2, 6, 5)
    x[0, 0, 3, 2] = 1.0
    assert median_filtered(x, size).eq(0).all()
    assert torch.equal(median_filtered(x + 0.5, size), torch.full_like(x, 0.5))
    ramp = torch.arange(25.0).view(1, 1, 5, 5)
    assert float(median_filtered(ramp, 3)[0, 0, 2, 2]) == 12.0


def test_feature_squeezing_is_the_largest_change_of_the_probabilities():
    def network(x):
        return torch.cat((x.flatten(1), torch.zeros(len(x), 1, dtype=x.dtype)), 1)

    x = torch.tensor([0.4, 1.0], dtype=torch.float64).view(2, 1, 1, 1)
    detector = FeatureSqueezing(bits=1, median=0)
    scores = detector(Observation(x, network(x), network=network))
    expected = 2 * abs(torch.sigmoid(torch.tensor(0.4, dtype=torch.float64)) - 0.5)
    assert scores.tolist() == pytest.approx([float(expected), 0.0])
    with pytest.raises(UsageError, match="calls the network on changed inputs, and no network was given"):
        detector(Observation(x, network(x)))
    with pytest.raises(UsageError, match="at least one of them"):
        FeatureSqueezing(0, 0)


@pytest.mark.parametrize("weights", [{}, {"exact": 1.0, "certain": 0.1}])
def test_a_change_between_certain_outputs_has_its_value_and_a_gradient_that_reduces_it(weights):
    logits, other = torch.tensor([[40.0, 0.0]]), torch.tensor([[0.0, 40.0]], requires_grad=True)
    distance = prediction_change(logits, other, **weights)
    distance.sum().backward()
    assert distance.item() == prediction_change(logits, other.detach()).item() == 2.0
    assert other.grad[0, 0] < -0.05 and other.grad[0, 1] > 0.05


def test_stability_is_zero_for_a_constant_network_and_the_same_each_time():
    x = torch.rand(5, 3, 4, 4)
    constant = NoiseStability()(Observation(x, torch.zeros(5, 2), network=lambda x: torch.zeros(len(x), 2)))
    assert constant.tolist() == [0.0] * 5

    def steep(x):
        return torch.stack((50 * (x.flatten(1).mean(1) - 0.5), torch.zeros(len(x))), 1)

    seen = Observation(x, steep(x), network=steep)
    scores = [
        NoiseStability(sigma=0.5, draws=3, seed=seed)(seen)
        for seen, seed in ((seen, 0), (seen, 0), (seen, 1))
    ]
    assert torch.equal(scores[0], scores[1]) and not torch.equal(scores[0], scores[2])
    whole, row = NoiseStability()(seen), Observation(x[2:3], steep(x[2:3]), network=steep)
    assert torch.allclose(NoiseStability()(row), whole[2:3])


def test_the_mahalanobis_distance_is_that_of_the_shared_covariance():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(4000) % 2
    z = torch.randn(4000, 3, generator=generator) * torch.tensor([1.0, 2.0, 0.5]) + 10.0 * y[:, None]
    fitted = Mahalanobis(shrinkage=0.0).fit(Observation(z, z), y)
    at = torch.tensor([[2.0, 0.0, 0.0], [10.0, 14.0, 10.0], [0.0, 0.0, 0.0]])
    assert fitted(Observation(at, at)).tolist() == pytest.approx([4.0, 4.0, 0.0], abs=0.6)
    flat = torch.cat((z, z[:, :1]), 1)  # dependent features
    assert torch.isfinite(Mahalanobis().fit(Observation(flat, flat), y)(Observation(flat, flat))).all()
    on_features = Mahalanobis("features").fit(Observation(at, at, features=z[:3]), y[:3])
    assert on_features.needs == ("fit", "features")
    with pytest.raises(UsageError, match="needs features"):
        on_features(Observation(at, at))
    with pytest.raises(UsageError, match="no class means yet"):
        Mahalanobis()(Observation(at, at))


@pytest.mark.parametrize("detector", [Energy(), FeatureSqueezing(bits=3, median=3), NoiseStability(draws=2)])
def test_a_detector_passes_a_gradient_to_its_input(detector):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))
    x = torch.rand(2, 3, 4, 4, requires_grad=True)
    detector(Observation(x, network(x), network=network)).sum().backward()
    assert x.grad.abs().sum() > 0
