"""Tests of properties that every attack must have. Each function raises `AssertionError` with numbers if an attack does
not have the property.

A law takes a `Case`: an attack, a norm, and the factors that state how close to the exact distance the attack must come
on a linear model. Other packages can run the laws on their attacks:

    @pytest.mark.parametrize("law", laws.ATTACK_LAWS)
    def test_law(law):
        law(Case(MyAttack(), Linf))
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from holdfast.attacks.protocol import Attack
from holdfast.core.batch import Batch
from holdfast.core.constraints import L0, Norm, allowed
from holdfast.core.draws import Draws
from holdfast.core.errors import BudgetSpent
from holdfast.core.meter import Metered, Spent, margin
from holdfast.core.model import Classifier, Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Inputs, Mask, PerExample
from holdfast.runs.harness.measure import measure
from holdfast.testing.fakes import (
    SHAPE,
    Constant,
    Gradientless,
    LinearOracle,
    NaNBeyond,
    examples,
    labelled,
    linear_problem,
    network,
)

Kind = Callable[[float], Norm]
"""function that returns a norm of a given radius, such as `Linf`"""


@dataclass(frozen=True)
class Case:
    """An attack and a norm, for which the properties of attacks are tested."""

    attack: Attack
    norm: Kind
    slack: float = 0.95
    """an example of a two-class linear model must be broken if its exact distance is at most this fraction of eps"""
    many: float = 0.4
    """the same fraction for more classes, where the most likely other class may be farther away than the nearest one"""
    smallest: bool = False
    """whether the attack searches for the smallest perturbation, and so works without an eps"""
    variant: str = ""
    """name that distinguishes several cases of the same attack"""

    def __repr__(self) -> str:
        kind = self.norm.func if isinstance(self.norm, partial) else self.norm
        named = "-".join(filter(None, (type(self.attack).__name__, self.variant)))
        return f"{named}-{getattr(kind, '__name__', kind)}"

    @property
    def counts(self) -> bool:
        """Whether the radius of the norm is a number of values, as under L0, so that it must be an integer."""
        return isinstance(self.norm(1.0), L0)

    def eps(self, radius: float) -> float:
        """Return a valid radius of the norm near `radius`, which is rounded to an integer for L0."""
        return max(1.0, round(radius)) if self.counts else radius

    def enough(self, exact: PerExample, classes: int) -> PerExample:
        """Return for each example the radius at which the attack must break it, computed from its exact distance to the
        decision boundary. It is rounded up for L0.
        """
        needed = exact / (self.slack if classes == 2 else self.many)
        return needed.ceil() if self.counts else needed


def run(
    case: Case, model: Model, batch: Batch, threat: ThreatModel, *, seed: int = 0
) -> tuple[Inputs, Spent]:
    """Run an attack on a model that counts its queries, as in an assessment, and return the attacked inputs and the
    number of queries.

    The model is also the surrogate.
    """
    threat = replace(threat, surrogates=(model,))
    metered = Metered(model, batch, threat)
    try:
        x_adv = case.attack(metered, batch, threat, rng=Draws(seed))
    except BudgetSpent:
        x_adv = metered.adversarial()
    return x_adv, metered.spent


def broken(model: Model, batch: Batch, x_adv: Inputs) -> Mask:
    """Return for each attacked input whether the model misclassifies it, as a boolean mask."""
    with torch.no_grad():
        return ~(margin(model(x_adv), batch) > 0)


def problem(
    case: Case,
    seed: int = 0,
    *,
    n: int = 10,
    classes: int = 4,
    shape: tuple[int, ...] = SHAPE,
    dtype: torch.dtype = torch.float64,
    rippled: bool = False,
) -> tuple[Classifier, Batch, ThreatModel]:
    """Return a test problem for an attack: a small network, examples that it classifies correctly, and a threat model
    whose eps breaks about half of them.
    """
    model = network(seed, classes=classes, shape=shape, rippled=rippled).to(dtype)
    batch = labelled(model, examples(seed, n=n, shape=shape, dtype=dtype))
    radius = {"Linf": 0.06, "L2": 0.3, "L1": 1.2, "L0": 2.0}.get(type(case.norm(1.0)).__name__, 0.1)
    return model, batch, ThreatModel(case.norm(case.eps(radius)))


def stays_inside(case: Case) -> None:
    """Check that every point that an attack returns is finite, inside the ball and inside the bounds, also in
    float32.
    """
    for seed, dtype in ((0, torch.float64), (1, torch.float32), (2, torch.float32)):
        model, batch, threat = problem(case, seed, dtype=dtype)
        x_adv, _ = run(case, model, batch, threat, seed=seed)
        assert x_adv.shape == batch.x.shape, (
            f"{case}: {tuple(x_adv.shape)} for inputs of {tuple(batch.x.shape)}"
        )
        assert x_adv.dtype == dtype, f"{case}: {x_adv.dtype} for inputs of {dtype}"
        assert x_adv.isfinite().all(), f"{case}: a returned point is not finite"
        inside = allowed(threat.constraint, x_adv, batch.x, model.bounds)
        distance = threat.constraint.distance(x_adv, batch.x)
        assert inside.all(), (
            f"{case}: {distance[~inside].tolist()} beyond {threat.constraint} or outside the box"
        )


def agrees_with_exact_distances(case: Case) -> None:
    """Check on linear models that an attack breaks no example whose exact distance to the boundary exceeds eps, and
    breaks every example whose distance is well below eps.

    With more than two classes the distance is that of the nearest class, which may not be the most likely one; see
    `Case.many`.
    """
    for seed, classes in ((0, 2), (1, 2), (2, 3), (3, 3), (4, 10), (5, 10)):
        model, batch = linear_problem(seed, classes=classes)
        exact = model.distance(batch.x, batch.y, case.norm(1.0))
        enough = case.enough(exact, classes)
        eps = float((enough if case.counts else exact).median())
        threat = ThreatModel(case.norm(eps), access=case.attack.needs, surrogates=(model,))
        success = measure(model.classifier(), [batch], [case.attack], threat, seed=seed)["success"]
        beyond = success & (exact > 1.001 * eps)
        assert not beyond.any(), (
            f"{case}: success at eps {eps} where the boundary is {exact[beyond].tolist()} away"
        )
        missed = ~success & (enough <= eps)
        assert not missed.any(), (
            f"{case}: failed at eps {eps} where it is {exact[missed].tolist()} to the nearest of {classes} classes"
        )
        if case.smallest:
            _finds_the_smallest(case, model, batch, exact, enough, seed)


def _finds_the_smallest(
    case: Case, model: LinearOracle, batch: Batch, exact: PerExample, enough: PerExample, seed: int
) -> None:
    x_adv, _ = run(case, model, batch, ThreatModel(case.norm(torch.inf)), seed=seed)
    assert broken(model, batch, x_adv).all(), f"{case}: leaves examples of a linear model unbroken"
    distance = case.norm(1.0).distance(x_adv, batch.x)
    ratio = distance / exact
    assert (ratio > 0.999).all(), f"{case}: closer than the boundary, {ratio.min():.4f} of the distance"
    assert (distance <= enough).all(), (
        f"{case}: {ratio[distance > enough].max():.4f} times the exact distance"
    )


def is_reproducible(case: Case) -> None:
    """Check that two runs of an attack with the same seed return the same points."""
    model, batch, threat = problem(case)
    first, second = run(case, model, batch, threat, seed=5)[0], run(case, model, batch, threat, seed=5)[0]
    assert torch.equal(first, second), f"{case}: two runs of one seed differ"


def does_not_depend_on_the_batch(case: Case) -> None:
    """Check that the result of an attack on an example does not depend on the batch size, the order of the batch or its
    other examples.

    Verdicts must be equal. Points must be equal except for a few examples in which a different order of summation
    changes a comparison.
    """
    model, batch, threat = problem(case, n=5)
    together, _ = run(case, model, batch, threat)
    separate = [run(case, model, piece, threat)[0] for piece in batch.split(2)]  # the last is a batch of one
    _same(case, "batches of 2, 2 and 1", model, batch, together, torch.cat(separate))
    order = torch.arange(len(batch)).flip(0)
    reordered = run(case, model, batch.take(order), threat)[0].flip(0)
    _same(case, "another order", model, batch, together, reordered)


def _same(case: Case, description: str, model: Model, batch: Batch, expected: Tensor, x_adv: Tensor) -> None:
    verdicts = broken(model, batch, expected) == broken(model, batch, x_adv)
    assert verdicts.all(), f"{case}: {description} gives other verdicts on {batch.ids[~verdicts].tolist()}"
    worst = (expected - x_adv).flatten(1).abs().amax(1)
    assert (worst < 1e-6).double().mean() >= 0.8, f"{case}: {description} moves points by {worst.tolist()}"


def returns_successful_queries(case: Case) -> None:
    """Check that an attack returns an adversarial example for each example for which one of its queries inside the
    constraint was successful.
    """
    for seed, rippled in ((0, False), (1, False), (0, True), (1, True)):
        model, batch, threat = problem(case, seed, rippled=rippled)
        x_adv, spent = run(case, model, batch, threat, seed=seed)
        lost = (spent.first_success > 0) & ~broken(model, batch, x_adv)
        assert not lost.any(), f"{case}: {int(lost.sum())} examples were broken on the way and returned whole"


def eps_zero_changes_nothing(case: Case) -> None:
    """Check that an attack returns the clean inputs if the radius of the ball is zero."""
    model, batch, _ = problem(case)
    x_adv, _ = run(case, model, batch, ThreatModel(case.norm(0.0)))
    assert torch.equal(x_adv, batch.x), f"{case}: moved by {float((x_adv - batch.x).abs().max())} at eps 0"


def works_for_any_number_of_classes(case: Case) -> None:
    """Check that an attack breaks some example of networks with 2, 3, 8 and 1,000 classes. The tests of the other
    properties use 3, 4 and 10 classes.
    """
    for classes in (2, 3, 8, 1000):
        model, batch, threat = problem(case, classes=classes, n=6)
        x_adv, _ = run(case, model, batch, ThreatModel(case.norm(case.eps(threat.constraint.eps * 3))))
        assert broken(model, batch, x_adv).any(), f"{case}: breaks nothing with {classes} classes"


def takes_inputs_of_any_shape(case: Case) -> None:
    """Check that an attack stays inside the constraint and breaks some example if the inputs are rows of a table,
    sequences or images with one channel.
    """
    for shape in ((24,), (2, 12), (1, 5, 7)):
        model, batch, threat = problem(case, n=6, shape=shape)
        threat = ThreatModel(case.norm(case.eps(threat.constraint.eps * 3)))
        x_adv, _ = run(case, model, batch, threat)
        assert allowed(threat.constraint, x_adv, batch.x, model.bounds).all(), (
            f"{case}: outside, inputs {shape}"
        )
        assert broken(model, batch, x_adv).any(), f"{case}: breaks nothing with inputs of shape {shape}"


def does_not_change_the_model(case: Case) -> None:
    """Check that an attack does not change weights, their gradients, `requires_grad` or the mode of the model, and that
    its results do not depend on `requires_grad`.
    """
    model, batch, threat = problem(case)
    frozen, _ = run(case, model, batch, threat)
    model.requires_grad_(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    unfrozen, _ = run(case, model, batch, threat)
    assert torch.equal(frozen, unfrozen), f"{case}: the points depend on the weights' requires_grad"
    assert not model.training, f"{case}: left the model in train mode"
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), f"{case}: changed the weights {name}"
    for name, weight in model.named_parameters():
        assert weight.grad is None, f"{case}: left a gradient on {name}"
        assert weight.requires_grad, f"{case}: froze {name}"


def does_not_change_its_arguments(case: Case) -> None:
    """Check that an attack does not change its inputs, labels and ids in place, nor the inputs of its earlier calls of
    the model.

    A model may store the inputs of its calls.
    """
    model, batch, threat = problem(case)
    x, y, ids = batch.x.clone(), batch.y.clone(), batch.ids.clone()
    calls: list[tuple[Tensor, Tensor]] = []
    with model.register_forward_pre_hook(
        lambda _, inputs: calls.append((inputs[0], inputs[0].detach().clone()))
    ):
        run(case, model, batch, threat)
    untouched = torch.equal(x, batch.x) and torch.equal(y, batch.y) and torch.equal(ids, batch.ids)
    assert untouched, f"{case}: edited its arguments"
    assert all(torch.equal(*pair) for pair in calls), (
        f"{case}: changed the inputs of an earlier call of the model"
    )


def needs_only_the_declared_access(case: Case) -> None:
    """Check that an attack returns the same points with the access that it declares as with access to gradients."""
    model, batch, threat = problem(case)
    declared, _ = run(case, model, batch, replace(threat, access=case.attack.needs))
    with_gradients, _ = run(case, model, batch, replace(threat, access="gradients"))
    assert torch.equal(declared, with_gradients), (
        f"{case}: sees more than {case.attack.needs}, which it declares"
    )


def respects_the_query_budget(case: Case) -> None:
    """Check that an attack makes at most `queries` queries for each example, and returns the adversarial examples that
    it finds within this budget.
    """
    model, batch, threat = problem(case)
    for queries in (1, 2, 13):
        limited = replace(threat, queries=queries, access=case.attack.needs)
        x_adv, spent = run(case, model, batch, limited)
        largest = int(spent.queries.max())
        assert largest <= queries, f"{case}: {largest} queries of {queries}"
        assert allowed(threat.constraint, x_adv, batch.x, model.bounds).all(), (
            f"{case}: outside when cut short"
        )
        lost = (spent.first_success > 0) & ~broken(model, batch, x_adv)
        assert not lost.any(), f"{case}: a success within the budget was lost"


def handles_unusual_batches(case: Case) -> None:
    """Check that an attack works for batches that are empty, have one example, are not contiguous, have the channels
    last, or are already misclassified.
    """
    model, batch, threat = problem(case)
    together, _ = run(case, model, batch, threat)
    first = batch.take(torch.tensor([0]))
    _same(case, "a batch of one", model, first, together[:1], run(case, model, first, threat)[0])
    empty = batch.take(torch.zeros(0, dtype=torch.int64))
    assert run(case, model, empty, threat)[0].shape == empty.x.shape, (
        f"{case}: an empty batch comes back changed"
    )
    strided = torch.empty(*batch.x.shape[:-1], 2 * batch.x.shape[-1], dtype=batch.x.dtype)[..., ::2]
    _same(
        case,
        "a non-contiguous batch",
        model,
        batch,
        together,
        run(case, model, batch.at(strided.copy_(batch.x)), threat)[0],
    )
    last = batch.x.to(memory_format=torch.channels_last)
    _same(case, "a channels-last batch", model, batch, together, run(case, model, batch.at(last), threat)[0])
    wrong = Batch(batch.x, (batch.y + 1) % 4, batch.ids)
    x_adv, _ = run(case, model, wrong, threat)
    assert broken(model, wrong, x_adv).all(), f"{case}: an already wrong example comes back right"


def handles_unusual_models(case: Case) -> None:
    """Check that an attack returns finite points inside the constraint for models with constant outputs, without
    gradients, or with NaN for some or all inputs.
    """
    model, batch, threat = problem(case)
    logits = (3.0, 1.0, 1.0, 0.0)
    odd = {
        "constant": Constant(logits),
        "tied": Constant((1.0,) * 4),
        "NaN": Constant((float("nan"),) * 4),
        "NaN further out": NaNBeyond(model, batch.x, 0.02),
        "gradientless": Gradientless(model),
    }
    for name, net in odd.items():
        bare = Classifier(net).eval()
        examples_of_net = Batch(batch.x, 0 * batch.y, batch.ids) if isinstance(net, Constant) else batch
        x_adv, _ = run(case, bare, examples_of_net, threat)
        assert x_adv.isfinite().all(), f"{case}: returns NaN from a {name} model"
        assert allowed(threat.constraint, x_adv, batch.x, bare.bounds).all(), f"{case}: outside, {name} model"


def reaches_targets(case: Case) -> None:
    """Check that a targeted attack with a large eps reaches its target class for most examples."""
    model, batch, threat = problem(case)
    aimed = batch.towards((batch.y + 1) % 4)
    targeted = ThreatModel(case.norm(case.eps(threat.constraint.eps * 8)), goal=1)
    x_adv, _ = run(case, model, aimed, targeted)
    share = float(broken(model, aimed, x_adv).double().mean())
    assert share >= 0.6, f"{case}: only {share:.0%} of the targets are reached"


def breaks_an_undefended_network(case: Case) -> None:
    """Check that a minimum-norm attack breaks every example of an undefended network, and that these results do not
    depend on the batch size.
    """
    if not case.smallest:
        return
    model, batch, _ = problem(case)
    x_adv, _ = run(case, model, batch, ThreatModel(case.norm(torch.inf)))
    verdicts = broken(model, batch, x_adv)
    assert verdicts.all(), (
        f"{case}: leaves {int((~verdicts).sum())} of {len(verdicts)} examples of an undefended network"
    )
    single = torch.cat([broken(model, example, x_adv[k : k + 1]) for k, example in enumerate(batch.split(1))])
    assert torch.equal(verdicts, single), f"{case}: verdicts change with the batch size"


ATTACK_LAWS: tuple[Callable[[Case], None], ...] = (
    stays_inside,
    agrees_with_exact_distances,
    is_reproducible,
    does_not_depend_on_the_batch,
    returns_successful_queries,
    eps_zero_changes_nothing,
    works_for_any_number_of_classes,
    takes_inputs_of_any_shape,
    does_not_change_the_model,
    does_not_change_its_arguments,
    needs_only_the_declared_access,
    respects_the_query_budget,
    handles_unusual_batches,
    handles_unusual_models,
    reaches_targets,
    breaks_an_undefended_network,
)
"""all laws of attacks, for `pytest.mark.parametrize`"""

LIMITED_LAWS = tuple(
    law
    for law in ATTACK_LAWS
    if law
    not in (
        agrees_with_exact_distances,
        eps_zero_changes_nothing,
        takes_inputs_of_any_shape,
        reaches_targets,
        breaks_an_undefended_network,
    )
)
"""laws that also hold under threats other than balls, such as patches, which have no radius and are for images"""


def breaks_all_that_a_weaker_one_breaks(weaker: Attack, stronger: Attack, norm: Kind) -> None:
    """Check that the attack `stronger`, such as one with more restarts, breaks every example that the attack `weaker`
    breaks.
    """
    for seed in range(3):
        case = Case(weaker, norm)
        model, batch, threat = problem(case, seed)
        by_weaker = broken(model, batch, run(case, model, batch, threat, seed=seed)[0])
        by_stronger = broken(model, batch, run(Case(stronger, norm), model, batch, threat, seed=seed)[0])
        assert not (by_weaker & ~by_stronger).any(), (
            f"{stronger} loses {int((by_weaker & ~by_stronger).sum())} examples of {weaker}"
        )
