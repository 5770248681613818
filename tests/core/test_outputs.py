"""Outputs of one number an example: logits and probabilities of class 1, and which of them they are."""

import pytest
import torch
from torch import nn

import holdfast
from holdfast.core.errors import TargetError, UnclearOutput, UsageError
from holdfast.core.model import Classifier
from holdfast.core.outputs import OutputKind, with_detector

WEIGHT = torch.tensor([8.0, 0.0])


class Single(nn.Module):
    """The logit 8 (x_0 - 0.5) of class 1, or its probability, of shape (n,) or (n, 1)."""

    def __init__(self, *, sigmoid: bool, flat: bool, scale: float = 1.0) -> None:
        super().__init__()
        self.sigmoid, self.flat, self.scale = sigmoid, flat, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.scale * (x @ WEIGHT.to(x) - 4)
        z = z.sigmoid() if self.sigmoid else z
        return z if self.flat else z[:, None]


@pytest.fixture
def data() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(200, 2, generator=torch.Generator().manual_seed(0))
    return x, (x[:, 0] > 0.5).long()


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("sigmoid, output", [(True, "probability"), (False, None), (False, "logit")])
def test_robust_accuracy_is_exact_whatever_the_form(data, sigmoid, flat, output):
    exact = float(((data[0][:, 0] - 0.5).abs() > 0.2).double().mean())
    net = Single(sigmoid=sigmoid, flat=flat)
    found = holdfast.assess(
        holdfast.open_model(net, model_output=output), data, "linf:0.2", "quick", doubts=False
    )
    assert found.metrics["clean_accuracy"].value == 1
    assert found.metrics["robust_accuracy"].value == pytest.approx(exact, abs=1e-9)


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: with_detector(net, lambda x: x[:, 0], 2.0)])
def test_an_undeclared_probability_is_refused(data, flat, wrap):
    with pytest.raises(UnclearOutput, match=r"model_output='probability' .*model_output='logit'"):
        holdfast.assess(wrap(Single(sigmoid=True, flat=flat)), data, "linf:0.2", "quick")


def test_a_logit_outside_0_and_1_shows_it_wherever_it_is(data):
    x, _ = data
    x = x[(x[:, 0] > 0.5) & (x[:, 0] < 0.6)].repeat(40, 1)
    x[-1, 0] = 0.1
    found = holdfast.assess(
        Single(sigmoid=False, flat=True), (x, (x[:, 0] > 0.5).long()), "linf:0.01", "quick", doubts=False
    )
    assert found.metrics["clean_accuracy"].value == 1


def test_logits_of_probabilities_have_their_gradient():
    x = torch.rand(5, 2, dtype=torch.float64, requires_grad=True)
    plain = Classifier(Single(sigmoid=False, flat=True), output="logit")(x).log_softmax(1)
    found = Classifier(Single(sigmoid=True, flat=True), output="probability")(x)
    torch.testing.assert_close(found, plain)
    own, other = (torch.autograd.grad(side[:, 1].sum(), x, retain_graph=True)[0] for side in (found, plain))
    torch.testing.assert_close(own, other)


@pytest.mark.parametrize("kind", ["probability", None])
def test_saturated_outputs_stay_finite(kind: OutputKind | None):
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    logits = Classifier(Single(sigmoid=kind is not None, flat=True, scale=100), output=kind)(x)
    assert logits.isfinite().all() and logits.argmax(1).tolist() == [0, 1]


def test_softmax_outputs_that_are_declared_become_logits():
    x = torch.rand(4, 3, dtype=torch.float64)
    found = Classifier(nn.Softmax(1), output="probability")(x)
    torch.testing.assert_close(found, x.log_softmax(1))


def test_what_is_no_probability_is_refused(data):
    with pytest.raises(TargetError, match="probabilities are from 0 to 1"):
        holdfast.assess(
            holdfast.open_model(Single(sigmoid=False, flat=True), model_output="probability"),
            data,
            "linf:0.2",
            "quick",
        )
    inside = with_detector(nn.Linear(2, 2), lambda x: x[:, 0], 2.0)
    with pytest.raises(UsageError, match="network inside"):
        holdfast.assess(holdfast.open_model(inside, model_output="probability"), data, "linf:0.2", "quick")


def test_doctor_finds_it(data):
    checks = {f.check: f for f in holdfast.doctor(Single(sigmoid=True, flat=False), data)}
    assert (
        checks["output"].level == "problem" and "--model-output logit" in checks["output"].on_command_line()
    )
