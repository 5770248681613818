"""The metered model: what it hides, what it books, and where it stops."""

import platform
import resource
from pathlib import Path

import pytest
import torch

from holdfast.attacks import Boundary
from holdfast.core.batch import Batch
from holdfast.core.constraints import L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.errors import BudgetSpent, UsageError
from holdfast.core.meter import Metered, freed_memory_kept, margin
from holdfast.core.model import Bounds, Classifier
from holdfast.core.threat import ThreatModel
from holdfast.testing.fakes import Constant, LinearOracle

X = torch.tensor([[0.9, 0.1], [0.8, 0.3], [0.6, 0.5], [0.7, 0.6]])
IDS = torch.tensor([30, 10, 20, 40])


class Identity:
    """Logits are the inputs: class 0 while the first value is the larger."""

    bounds = Bounds()

    def __init__(self):
        self.rows = 0

    def __call__(self, x, ids=None):
        self.rows += len(x)
        return x * 1.0


def metered(queries=None, access="gradients", eps=0.2):
    model = Identity()
    batch = Batch(X, torch.zeros(4).long(), IDS)
    return Metered(model, batch, ThreatModel(Linf(eps), access=access, queries=queries)), model, batch


def test_queries_are_booked_on_the_ids_whatever_their_order():
    meter, _, _ = metered()
    meter(X)
    meter(X[[3, 1]], IDS[[3, 1]])
    meter(X[:1], IDS[:1])
    assert meter.spent.queries.tolist() == [2, 2, 1, 2]


def test_inputs_of_some_rows_need_their_ids():
    meter, _, _ = metered()
    with pytest.raises(
        UsageError, match=r"2 inputs have 4 ids; pass the ids of their rows: model\(x, batch.ids\)"
    ):
        meter(X[:2])


@pytest.mark.parametrize("queries", [1, 2, 3, 5])
def test_the_budget_is_never_exceeded_by_one_even_where_a_batch_crosses_it(queries):
    meter, model, _ = metered(queries=queries)
    meter(X[:1], IDS[:1])  # the first example is ahead of the others
    for _ in range(queries - 1):
        meter(X)
    asked = model.rows
    with pytest.raises(BudgetSpent, match=f"all {queries} queries are used"):
        meter(X)
    assert model.rows == asked  # refused before the model was asked, for all of the batch
    assert meter.spent.queries.tolist() == [queries, queries - 1, queries - 1, queries - 1]
    meter(X[1:], IDS[1:])
    assert meter.spent.queries.max() == queries


def test_an_example_that_is_queried_twice_in_one_call_counts_twice():
    meter, _, _ = metered(queries=3)
    meter(X[[0, 0]], IDS[[0, 0]])
    with pytest.raises(BudgetSpent):
        meter(X[[0, 0]], IDS[[0, 0]])
    assert meter.spent.queries.tolist() == [2, 0, 0, 0]


def test_the_first_success_is_the_query_that_broke_it_with_an_allowed_input():
    meter, _, batch = metered(queries=9)
    meter(X)
    far, near = X.flip(1), X + torch.tensor([-0.1, 0.1])
    meter(far)  # breaks all four; the first two lie outside the ball
    meter(near)
    assert meter.spent.first_success.tolist() == [0, 0, 2, 2]
    assert torch.equal(meter.adversarial(), torch.cat((X[:2], far[2:])))
    assert batch.x is X


def test_a_success_among_many_rows_of_a_call_is_counted_to_its_own_row():
    meter, _, _ = metered()
    meter(X)
    near = X + torch.tensor([-0.1, 0.1])  # breaks the last two
    meter(torch.cat((X[2:], near[2:], near[2:], X[2:])), IDS[[2, 3, 2, 3, 3, 2, 2, 3]])
    assert meter.spent.first_success.tolist() == [0, 0, 3, 3]
    assert meter.spent.queries.tolist() == [1, 1, 5, 5]


def test_an_input_outside_the_box_is_no_success():
    meter, _, _ = metered(eps=5.0)
    meter(X + torch.tensor([0.0, 3.0]))
    assert meter.spent.first_success.tolist() == [0, 0, 0, 0]


def test_a_target_must_be_reached():
    x = torch.tensor([[0.6, 0.5, 0.4]])
    batch = Batch(x, torch.tensor([0]), torch.tensor([7]), target=torch.tensor([2]))
    meter = Metered(Identity(), batch, ThreatModel(Linf(1.0), goal=2))
    meter(torch.tensor([[0.1, 0.9, 0.4]]))
    assert meter.spent.first_success.tolist() == [0]
    meter(torch.tensor([[0.1, 0.3, 0.4]]))
    assert meter.spent.first_success.tolist() == [2]


@pytest.mark.parametrize("access", ["labels", "scores", "gradients"])
def test_what_the_access_does_not_allow_is_hidden(access):
    meter, _, _ = metered(access=access)
    logits = meter(X.clone().requires_grad_())
    assert logits.requires_grad == (access == "gradients")
    expected = torch.tensor([[1.0, 0.0]] * 4) if access == "labels" else X
    assert torch.equal(logits.detach(), expected)


def test_no_label_is_made_of_nan():
    class Lost(Identity):
        def __call__(self, x, ids=None):
            return x.masked_fill(x[:, :1] < 0.5, torch.nan)

    batch = Batch(X, torch.zeros(4).long(), IDS)
    threat = ThreatModel(L2(0.8), access="labels")
    meter = Metered(Lost(), batch, threat)
    logits = meter(torch.cat((X[:3], X[3:] - 0.4)))
    assert logits[:3].tolist() == [[1.0, 0.0]] * 3 and logits[3].isnan().all()
    assert meter.spent.first_success.tolist() == [0, 0, 0, 1]
    x_adv = Boundary(queries=50)(Metered(Lost(), batch, threat), batch, threat, rng=Draws(0))
    assert not (margin(Lost()(x_adv), batch) > 0).any()


def test_a_gradient_is_booked_on_the_rows_it_was_taken_for():
    meter, _, _ = metered()
    x = X[[2, 0]].clone().requires_grad_()
    torch.autograd.grad(meter(x, IDS[[2, 0]]).sum(), x)
    assert meter.spent.backwards.tolist() == [1, 0, 1, 0]
    meter(x, IDS[[2, 0]])
    assert meter.spent.backwards.tolist() == [1, 0, 1, 0]


def test_dead_gradients_of_the_first_pass_are_noted():
    def logits(x, ids=None):
        cut = torch.tensor([1.0, 0.0, torch.nan, 1.0])[: len(x), None]
        return x * cut

    model = Identity()
    model.__class__ = type("Cut", (Identity,), {"__call__": staticmethod(logits)})
    meter = Metered(model, Batch(X, torch.zeros(4).long(), IDS), ThreatModel())
    x = X.clone().requires_grad_()
    torch.autograd.grad(meter(x).sum(), x)
    assert meter.spent.dead.tolist() == [False, True, True, False]


def test_the_counts_of_a_meter_are_a_copy():
    meter, _, _ = metered()
    before = meter.spent
    meter(X)
    assert before.queries.tolist() == [0, 0, 0, 0]


def test_the_box_is_that_of_the_model():
    box = Bounds(-1.0, 2.0)
    model = LinearOracle(torch.eye(2), torch.zeros(2), box)
    assert Metered(model, Batch(X, torch.zeros(4).long(), IDS), ThreatModel()).bounds is box


def test_the_margin_by_hand():
    logits = torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 0.0], [torch.nan, 0.0, 0.0]])
    batch = Batch(torch.zeros(3, 1), torch.tensor([0, 0, 0]), torch.arange(3))
    assert margin(logits, batch)[:2].tolist() == [1.0, 0.0]
    assert not margin(logits, batch)[2] > 0  # what is no number does not hold
    aimed = batch.towards(torch.tensor([1, 1, 1]))
    assert margin(logits, aimed)[:2].tolist() == [2.0, 0.0]


@pytest.mark.parametrize("target", [None, 0])
@pytest.mark.parametrize("logits", [(0.3, 0.3), (torch.nan, 0.0), (torch.nan, torch.nan)])
def test_a_tie_and_no_number_are_successes_as_they_are_to_the_judge(logits, target):
    """Whichever class `argmax` would name, the margin does not hold: kept when the budget ends the attack."""
    batch = Batch(torch.full((2, 2), 0.5), torch.full((2,), int(target == 0)), torch.arange(2))
    batch = batch.towards(None if target is None else torch.zeros(2).long())
    model, tried = Classifier(Constant(logits)), batch.x + 0.05
    assert not (margin(model(tried), batch) > 0).any()
    meter = Metered(model, batch, ThreatModel(Linf(0.1), goal=target, queries=2))
    meter(tried)
    assert meter.spent.first_success.tolist() == [1, 1]
    assert torch.equal(meter.adversarial(), tried)


def test_without_an_eps_the_closest_success_is_kept():
    meter, _, _ = metered(queries=3, eps=float("inf"))
    for change in (0.8, 0.3, 0.6):
        meter(X + change * torch.tensor([-1.0, 1.0]))
    wide = torch.tensor([0.6, 0.3, 0.3, 0.3])[:, None]
    assert torch.allclose(meter.adversarial(), X + wide * torch.tensor([-1.0, 1.0]))
    assert meter.spent.first_success.tolist() == [1, 2, 2, 2]  # 0.8 leaves the box on three of them


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_a_measurement_reuses_freed_memory_and_returns_it_at_the_end():
    def pass_of_a_large_network() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        activations = [torch.ones(30 << 18) for _ in range(4)]  # 120 MiB, or 30,720 pages of 4 KiB
        del activations
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    def resident_pages() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    with freed_memory_kept():
        pass_of_a_large_network()
        assert pass_of_a_large_network() < 10_000
        kept = resident_pages()
    assert resident_pages() < kept - 20_000
