"""Transfer: its views and kernels, what each setting adds, and that the target is never asked."""

import pytest
import torch
import torch.nn.functional as F

from holdfast.attacks import Transfer
from holdfast.attacks.parts.ascent import ascend
from holdfast.attacks.parts.fast_networks import Ensemble
from holdfast.attacks.parts.losses import cross_entropy, margin_loss
from holdfast.attacks.suites import PUBLISHED
from holdfast.attacks.transfer import SHRUNK, halved_view, resized, shifted
from holdfast.core.constraints import L2, Linf, allowed
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Bounds
from holdfast.core.threat import ThreatModel
from holdfast.testing.fakes import examples, labelled, linear_problem, network

RNG, BOX = Draws(4), Bounds()
PLAIN = {"reach": 2.5, "neighbours": 0}


class Silent:
    """A target that may not be asked."""

    bounds = BOX

    def __call__(self, x, ids=None):
        raise AssertionError("the target was asked")


def made(attack, batch, surrogates, constraint=None, seed=0):
    threat = ThreatModel(constraint or Linf(0.06), surrogates=tuple(surrogates))
    return attack(Silent(), batch, threat, rng=Draws(seed))


def test_a_moved_gradient_is_a_gaussian_blur():
    grad = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    steps = torch.linspace(-3, 3, 5, dtype=torch.float64)
    one = torch.exp(-(steps**2) / 2)
    kernel = torch.outer(one, one) / one.sum() ** 2
    blurred = F.conv2d(grad, kernel.expand(3, 1, 5, 5), padding=2, groups=3)
    torch.testing.assert_close(shifted(grad, 2), blurred)


def test_what_is_no_image_is_shown_as_it_is():
    x, ids = torch.rand(5, 7), torch.arange(5)
    assert resized(x, ids, BOX, 1.0, RNG) is x
    assert shifted(x, 3) is x


def test_a_resized_image_is_smaller_somewhere_on_an_empty_ground_and_each_for_itself():
    ids = torch.arange(400)
    x = torch.ones(400, 1, 32, 32, dtype=torch.float64)
    some = resized(x, ids, BOX, 0.5, RNG)
    changed = (some != x).flatten(1).any(1)
    assert 0.4 < changed.double().mean() < 0.6
    sides = some[changed].mean((1, 2, 3)).sqrt()
    assert SHRUNK - 0.02 < sides.min() < 0.92
    assert 0.98 < sides.max() <= 1
    assert ((some >= 0) & (some <= 1)).all()
    corners = torch.stack([some[changed][:, 0, row, column] for row in (0, -1) for column in (0, -1)], 1)
    assert (corners.amin(0) == 0).all()
    torch.testing.assert_close(resized(x[7:9], ids[7:9], BOX, 0.5, RNG), some[7:9])
    below = resized(x - 2, ids, Bounds(-2.0, 2.0), 0.5, RNG)
    assert below.min() >= -2


def test_values_are_halved_towards_the_lower_bound():
    x = torch.tensor([[1.0, -1.0, 0.0]])
    torch.testing.assert_close(halved_view(x, 2, Bounds(-1.0, 1.0)), torch.tensor([[-0.5, -1.0, -0.75]]))


def test_several_models_are_the_mean_of_their_logits():
    models, batch = (network(0), network(1)), examples(0, n=4)
    together = Ensemble(models, BOX)(batch.x, batch.ids)
    torch.testing.assert_close(together, (models[0](batch.x) + models[1](batch.x)) / 2)


def test_with_momentum_alone_it_is_momentum_pgd_to_its_last_step():
    model = network(0)
    batch = labelled(model, examples(0, n=8))
    last, _ = ascend(
        model, batch, batch.x, cross_entropy, Linf(0.06), steps=10, step_size=0.015, momentum=1.0, keep="last"
    )
    assert torch.equal(made(Transfer(**PLAIN), batch, [model]), last)


@pytest.mark.parametrize("setting", [{"neighbours": 3}, {"ahead": True}, {"halvings": 2}], ids=str)
def test_where_the_gradient_is_everywhere_the_same_no_other_view_adds_anything(setting):
    model, batch = linear_problem(0, classes=2)
    plain = made(Transfer(**PLAIN, loss=margin_loss), batch, [model])
    more = made(Transfer(**PLAIN | setting, loss=margin_loss), batch, [model])
    torch.testing.assert_close(more, plain)


@pytest.mark.parametrize(
    "attack",
    [Transfer(), *(spec.build() for spec in PUBLISHED)],
    ids=["Transfer", *(spec.name for spec in PUBLISHED)],
)
@pytest.mark.parametrize("norm", [Linf(0.06), L2(0.3)], ids=str)
def test_examples_of_a_like_model_turn_the_target(attack, norm):
    target = network(0)
    alike = network(0)
    with torch.no_grad():
        for weight in alike.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    batch = labelled(target, examples(0, n=40))
    x_adv = made(attack, batch, [alike], norm)
    assert allowed(norm, x_adv, batch.x, BOX).all()
    turned = (target(x_adv).argmax(1) != batch.y).double().mean()
    noise = norm.sample(batch, BOX, RNG)
    assert turned > (target(noise).argmax(1) != batch.y).double().mean() + 0.1


def test_an_attack_without_an_eps_is_refused():
    with pytest.raises(UsageError, match="eps"):
        made(Transfer(), examples(0, n=2), [network(0)], Linf())


def test_a_missing_surrogate_is_refused_with_a_remedy():
    with pytest.raises(UsageError, match="surrogates="):
        made(Transfer(), examples(0, n=2), [])
