"""Relaxed gradients: outputs stay as they are, and operations that cut the gradient have that of a smooth function."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from holdfast.core.surrogate_gradients import relaxed

TABLE = torch.rand(6, 5, generator=torch.Generator().manual_seed(2))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


class Function(nn.Module):
    """A front with a gradient and a function of its outputs (n, 6)."""

    def __init__(self, function):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.front = nn.Linear(8, 6)
        self.front.weight.data = torch.randn(6, 8, generator=draw)
        self.front.bias.data.zero_()
        self.function = function

    def forward(self, x):
        return self.function(self.front(x))


def in_place(h):
    h = 3 * h
    h.round_()
    return h


def without_gradient(h):
    with torch.no_grad():
        return h * 2


CUT = {
    "one-hot": lambda h: F.one_hot(h.argmax(1), 6).float(),
    "nearest": lambda h: F.one_hot(torch.cdist(h, torch.eye(6)).argmin(1), 6).float(),
    "labels of the nearest": lambda h: F.one_hot(LABELS[h.argmin(1)], 3).float(),
    "codebook": lambda h: TABLE[h.argmax(1)],
    "codebook in a grid": lambda h: TABLE[h.view(-1, 2, 3).argmin(-1)].permute(0, 2, 1).flatten(1),
    "embedding": lambda h: F.embedding(h.argmax(1), TABLE),
    "embedding of a moved index": lambda h: F.embedding(h.view(-1, 3).argmax(1).view(-1, 2), TABLE).sum(1),
    "index select": lambda h: TABLE.index_select(0, h.argmax(1)),
    "maximum": lambda h: F.one_hot(h.max(1).indices, 6).float(),
    "several nearest": lambda h: F.one_hot(LABELS[h.topk(3, dim=1).indices], 3).sum(1).float(),
    "signs": torch.sign,
    "bits": lambda h: (h > 0).float(),
    "differing bits": lambda h: ((h > 0)[:, None] != (TABLE[:, :1].T > 0.5)).sum(-1).float(),
    "two comparisons": lambda h: ((h > -1) & ~(h > 1)).float(),
    "votes": lambda h: sum(F.one_hot((k * h).argmax(1), 6) for k in (1, -1, 2)).float(),
    "branches": lambda h: torch.where(h > 0, torch.tensor(1.0), torch.tensor(-1.0)),
    "rounding": lambda h: (4 * h).round() / 4,
    "rounding in place": in_place,
    "integers": lambda h: (20 * h).to(torch.int8).float(),
    "intervals": lambda h: torch.tensor([0.0, 1.0, 2.0])[torch.bucketize(h, torch.tensor([-0.5, 0.5]))],
    "numpy and back": lambda h: torch.from_numpy((4 * h).detach().numpy().round()) / 4,
    "detach": lambda h: 2 * h.detach(),
    "data": lambda h: h.data + 1,
    "no gradient": without_gradient,
    "a number": lambda h: (4 * h).round() * float(h.amax() * 0 + 1),
    "a whole number": lambda h: (4 * h).round() * int(h.amax() * 0 + 1),
    "a type": lambda h: (4 * h).round().type(h.type()),
    "operators": lambda h: torch.ops.aten.index.Tensor(TABLE, [torch.ops.aten.argmax.default(h, 1)]),
}


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
@pytest.mark.parametrize("name", CUT)
def test_an_operation_that_cuts_the_gradient_keeps_its_output_and_gets_one(name):
    model = Function(CUT[name])
    x = torch.randn(7, 8, generator=torch.Generator().manual_seed(1))
    plain = x.clone().requires_grad_()
    before = model(plain)
    (dead,) = torch.autograd.grad(before.sum(), plain) if before.requires_grad else (torch.zeros_like(x),)
    assert not dead.any()
    leaf = x.clone().requires_grad_()
    with relaxed() as record:
        after = model(leaf)
    assert torch.equal(after.detach(), before.detach())
    assert record.passed or name in ("detach", "data", "no gradient")
    weights = torch.arange(after[0].numel()).view(after[0].shape).cos()
    (grad,) = torch.autograd.grad((weights * after).sum(), leaf)
    assert grad.isfinite().all()
    assert grad.flatten(1).any(1).all()


def test_the_gradient_of_an_arg_max_points_to_the_outcome():
    model = Function(CUT["labels of the nearest"])
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(3)).requires_grad_()
    with relaxed():
        wanted = model(x)[:, 2]
    (grad,) = torch.autograd.grad(wanted.sum(), x)
    before, after = (
        (-model.front(point)).softmax(1)[:, [2, 5]].sum() for point in (x, x + 0.1 * grad.sign())
    )
    assert after > before + 1


def test_a_network_with_a_gradient_is_left_as_it_is():
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3), nn.Softmax(1))
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with relaxed() as record:
        logits = model(x)
    assert not record.passed
    assert not record.cuts
    gradients = [torch.autograd.grad(out[:, 0].sum(), x)[0] for out in (logits, model(x))]
    assert torch.equal(*gradients)


def test_values_that_leave_torch_are_recorded():
    model = Function(lambda h: torch.from_numpy(h.detach().numpy().round().sum(1, keepdims=True)))
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with relaxed() as record:
        assert not model(x).requires_grad
    assert torch.equal(record.recorded[record.cuts[0]].detach(), model.front(x).detach())


def test_after_an_error_of_a_model_the_record_begins_anew():
    def fails(h):
        raise ValueError("far from the data")

    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with relaxed() as record:
        with pytest.raises(ValueError, match="far"):
            Function(fails)(x)
        assert not x.detach().requires_grad
        Function(torch.sign)(x)
        assert len(record.cuts) == 1


def test_outside_of_modules_nothing_changes():
    x = torch.ones(3, requires_grad=True)
    with relaxed():
        assert not x.detach().requires_grad
        assert not (x > 0).float().requires_grad
