"""Doubts: none on honest networks, the right ones on masked ones, within the budget of their probes."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from holdfast.attacks import PGD, Square
from holdfast.attacks.parts.fast_networks import in_training
from holdfast.core.batch import Batch
from holdfast.core.constraints import L0, L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.evidence import Doubt
from holdfast.core.meter import Metered
from holdfast.core.model import Classifier
from holdfast.core.outputs import change
from holdfast.core.threat import ThreatModel
from holdfast.doubts import protocol
from holdfast.doubts.probing import (
    all_probes,
    conclude,
    counts,
    doubt_tests,
    probes_for,
    rows_for,
    sample_rows,
    surviving_examples,
)
from holdfast.doubts.protocol import MeasurementContext, Probed, probe_title, probing_threat
from holdfast.runs.harness.measure import measure
from holdfast.runs.harness.target import prepared

THREAT = ThreatModel(Linf(0.04))
SUITE = (PGD(steps=40, restarts=2), PGD(steps=40, reach=10))
CHEAP = {probe.name for probe in all_probes()} - {"search"}
"""All but the search, whose thousand queries take longer than the others together."""
EVIDENCE = (
    "scale",
    "one-step",
    "black-box",
    "noise",
    "not-exhausted",
    "whole-box",
    "loss-spread",
    "shattered",
)


def patterns(n, seed):
    """Images 1 x 8 x 8 of four classes, each a blurred pattern under noise."""
    generator = torch.Generator().manual_seed(99)
    means = torch.rand(4, 1, 8, 8, generator=generator)
    generator.manual_seed(seed)
    y = torch.randint(0, 4, (n,), generator=generator)
    x = 0.5 + 0.25 * (means[y] - 0.5) + 0.09 * torch.randn(n, 1, 8, 8, generator=generator)
    return Batch(x.clamp(0, 1), y, torch.arange(n))


def trained(net, *, temperature=1.0, epochs=60, lr=5e-3):
    batch = patterns(1000, seed=1)
    optimiser = torch.optim.Adam(net.parameters(), lr)
    for _ in range(epochs):
        optimiser.zero_grad()
        F.cross_entropy(net(batch.x) / temperature, batch.y).backward()
        optimiser.step()
    return net.eval().requires_grad_(False)


def plain_net():
    return nn.Sequential(nn.Conv2d(1, 8, 3, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4))


@pytest.fixture(scope="module")
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return trained(plain_net())


class Changed(nn.Module):
    """A network with something before and after it."""

    def __init__(self, net, before=None, after=None):
        super().__init__()
        self.net, self.before, self.after = net, before or nn.Identity(), after or nn.Identity()

    def forward(self, x):
        return self.after(self.net(self.before(x)))


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def evidence_columns(model, batch, threat=THREAT, suite=SUITE):
    columns = dict(measure(model, [batch], suite, threat).columns)
    with torch.no_grad():
        logits = model(batch.x)
    columns["nan"] = logits.isnan().any(1)
    columns["is_probability"] = ((logits.sum(1) - 1).abs() < 1e-4) & (logits >= 0).all(1)
    return columns


def probe_all(model, batch, columns, threat=THREAT, suite=SUITE, *, only=None, seed=0):
    """What every probe that applies (of those named) returned, and what it spent of each example."""
    rng, within = Draws(seed).at("doubts"), probing_threat(threat, columns)
    found, spent = {}, {}
    for probe in probes_for(within, dict(enumerate(suite))):
        rows = rows_for(probe, columns, threat, rng)
        if len(rows) and (only is None or probe.name in only):
            some = batch.take(rows)
            if within.goal is not None:
                some = some.towards(torch.full_like(some.y, within.goal))
            meter = Metered(model, some, dataclasses.replace(within, queries=None))
            found[probe.name] = Probed(rows, probe.run(meter, some, within, rng))
            spent[probe.name] = meter.spent
    return found, spent


def findings(module, *, batch=None, threat=THREAT, suite=SUITE, context=None, only=None):
    model = Classifier(module).eval().requires_grad_(False)
    batch = batch or patterns(80, seed=2)
    columns = evidence_columns(model, batch, threat, suite)
    found, _ = probe_all(model, batch, columns, threat, suite, only=only)
    fitting = Doubt("input", "clear", 0.0, 0.15, len(batch), "the data fit the model")
    context = dataclasses.replace(context or MeasurementContext(threat, "standard@1"), input=fitting)
    return conclude(found, columns, context, broken_by(found, columns, threat))


def broken_by(found, columns, threat):
    """Which examples each probe that counts broke."""
    probes = {probe.name: probe for probe in probes_for(threat, dict(enumerate(SUITE)))}
    passes = {}
    for name, probed in found.items():
        if counts(probes[name], threat):
            passes[probe_title(name)] = torch.zeros_like(columns["correct"])
            passes[probe_title(name)][probed.rows] = probed.columns["broken"]
    return passes


def raised(module, **options):
    return {doubt.name for doubt in findings(module, **options).doubts if doubt.state == "raised"}


@pytest.mark.slow
def test_a_network_without_masking_raises_no_doubt(net):
    result = findings(net)
    assert [doubt.name for doubt in result.doubts] == [
        name for name, test in doubt_tests().items() if test.conclude
    ]
    assert not [doubt for doubt in result.doubts if doubt.state == "raised"]
    assert {doubt.name for doubt in result.doubts if doubt.state == "not measured"} == {"transfer"}
    assert not result.missed
    for doubt in result.doubts:
        assert doubt.message
        assert doubt.name == "transfer" or doubt.n > 0


@pytest.mark.slow
def test_losses_that_break_alike_are_not_played_off(net):
    hardly = ThreatModel(Linf(1e-6))
    (found,) = (doubt for doubt in findings(net, threat=hardly).doubts if doubt.name == "loss-spread")
    assert found.message == "with each of its untargeted losses PGD-20 breaks 0.0 %"


@pytest.mark.slow
@pytest.mark.parametrize("bias", [1e3, -1e3])
def test_logits_that_share_an_offset_raise_nothing(net, bias):
    assert raised(Changed(net, after=Function(lambda logits: logits + bias)), only=CHEAP) == set()


@pytest.mark.slow
def test_log_probabilities_are_logits(net):
    assert raised(Changed(net, after=nn.LogSoftmax(1)), only=CHEAP) == set()


@pytest.mark.slow
def test_a_network_with_batch_norm_raises_nothing():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        normed = nn.Sequential(
            nn.Conv2d(1, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4)
        )
        assert raised(trained(normed), only=CHEAP) == set()


def test_steps_without_a_gradient_raise_zero_gradient_and_whole_box(net):
    stairs = Changed(net, before=Function(lambda x: torch.floor(12 * x) / 12))
    assert {"zero-gradient", "whole-box"} <= raised(stairs, only={"gradients", "whole-box"})


def test_saturation_raises_scale_and_is_no_zero_gradient(net):
    result = findings(
        Changed(net, after=Function(lambda logits: 1000 * logits)),
        only={"gradients", "cross-entropy", "small-cross-entropy"},
    )
    by_name = {doubt.name: doubt for doubt in result.doubts}
    assert by_name["scale"].state == "raised"
    assert by_name["zero-gradient"].state == "clear"
    assert "saturation" in by_name["zero-gradient"].message


@pytest.mark.slow
def test_distillation_raises_scale():
    with torch.random.fork_rng():
        torch.manual_seed(2)
        assert "scale" in raised(
            trained(plain_net(), temperature=100.0, epochs=150, lr=0.05),
            only={"cross-entropy", "small-cross-entropy"},
        )


def test_noise_on_the_input_raises_randomness_and_not_state(net):
    names = raised(
        Changed(net, before=Function(lambda x: x + 0.1 * torch.randn_like(x))), only={"steadiness"}
    )
    assert "randomness" in names
    assert "state" not in names


def test_a_suite_that_averages_over_draws_answers_randomness(net):
    noisy = Changed(net, before=Function(lambda x: x + 0.02 * torch.randn_like(x)))
    averaged = findings(noisy, context=MeasurementContext(THREAT, "rand@1"), only={"steadiness"})
    doubt = next(d for d in averaged.doubts if d.name == "randomness")
    assert doubt.state == "clear"
    assert "averages" in doubt.message
    assert doubt.statistic > doubt.threshold


def test_logits_that_depend_on_the_batch_raise_state(net):
    assert "state" in raised(
        Changed(net, before=Function(lambda x: x - x.mean(0, keepdim=True) + 0.5)), only={"steadiness"}
    )


def test_logits_that_depend_on_the_order_raise_state(net):
    ranked = Function(lambda x: x + 0.01 * torch.linspace(0, 1, len(x)).view(-1, 1, 1, 1))
    assert "state" in raised(Changed(net, before=ranked), only={"steadiness"})


def test_logits_that_depend_on_history_raise_state(net):
    calls = iter(range(10_000))
    assert "state" in raised(
        Changed(net, after=Function(lambda logits: logits * (1 + 0.001 * next(calls)))), only={"steadiness"}
    )


def test_layers_in_train_mode_raise_state(net):
    result = findings(
        net,
        context=MeasurementContext(THREAT, "standard@1", in_training=("net.1", "net.4")),
        only={"steadiness"},
    )
    doubt = next(d for d in result.doubts if d.name == "state")
    assert doubt.state == "raised"
    assert "net.1" in doubt.message and "call model.eval() before the model is passed" in doubt.message


def test_only_layers_that_mind_the_mode_count_as_in_training():
    mixed = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 4)
    )
    model = Classifier(mixed).train()
    assert in_training(model) == ("net.2", "net.4")
    with prepared(model, patterns(4, seed=2)) as target:
        assert target.in_training == ("net.2", "net.4")
    assert in_training(model.eval()) == ()
    attention = nn.ModuleList(nn.MultiheadAttention(4, 2, dropout=share) for share in (0.1, 0.0))
    assert in_training(attention) == ("0",)


ONE_HOT, SYMMETRIC = torch.eye(2), torch.tensor([[0.71, 0.29], [0.29, 0.71]])
ROUNDING = torch.tensor([[1.0, 1.0 + 1e-7, -1.0], [1.0 + 1e-7, 1.0, -1.0]])


@pytest.mark.parametrize(
    ("scores", "labels", "state"),
    [
        (ONE_HOT, (0, 1), "clear"),
        (SYMMETRIC, (0, 1), "clear"),
        (ONE_HOT, (1, 0), "clear"),
        (SYMMETRIC, (1, 0), "clear"),
        (ONE_HOT[[0, 0]], (0, 1), "raised"),
        (SYMMETRIC[[1, 1]], (0, 1), "raised"),
        (ROUNDING, (2, 1), "raised"),
        (ONE_HOT, (0, 0), "not applicable"),
        (ONE_HOT, (1, 1), "raised"),
    ],
)
def test_constant_compares_outputs_of_inputs_and_not_margins(scores, labels, state):
    """Half of the inputs get the first row of `scores`, the others the second one; `labels` are theirs."""
    kinds = torch.arange(40) % 2 if labels[0] != labels[1] else torch.zeros(40, dtype=torch.int64)
    x = kinds[:, None, None, None] + 0.1 * torch.rand(40, 1, 2, 2)
    batch = Batch(x, torch.tensor(labels)[kinds], torch.arange(40))
    found = findings(
        Function(lambda x: scores[x[:, 0, 0, 0].long()]), batch=batch, suite=(), only={"steadiness"}
    )
    assert {doubt.name: doubt.state for doubt in found.doubts}["constant"] == state


def test_probabilities_are_distinguished_from_logits(net):
    assert "probabilities" in raised(Changed(net, after=nn.Softmax(1)), only={"steadiness"})


def test_nan_is_reported(net):
    def holes(logits):
        return torch.where(torch.arange(len(logits))[:, None] == 3, torch.nan, logits)

    assert "nan" in raised(Changed(net, after=Function(holes)), only={"steadiness"})


def test_a_misleading_gradient_is_reported_as_shattered(net):
    """Ripples far shorter than any step: steep everywhere, and going nowhere."""
    ripples = Function(lambda x: x + 0.005 * torch.sin(4000 * x))
    assert "shattered" in raised(Changed(net, before=ripples), only={"gradients"})


@pytest.mark.slow
def test_the_same_weights_without_what_hides_them_raise_transfer(net):
    ripples = Changed(net, before=Function(lambda x: x + 0.005 * torch.sin(4000 * x)))
    held = ThreatModel(Linf(0.08), surrogates=(Classifier(net).eval().requires_grad_(False),))
    only = {"transfer", "margin"}
    assert "transfer" in raised(ripples, threat=held, only=only)
    (found,) = (doubt for doubt in findings(net, threat=held, only=only).doubts if doubt.name == "transfer")
    assert found.state == "clear"
    assert found.n > 0
    assert "a transfer attack from the surrogates" in found.message


def test_a_network_that_cuts_the_graph_has_a_zero_gradient(net):
    """A comparison leaves nothing to differentiate, not even zeros."""
    assert "zero-gradient" in raised(
        Changed(net, before=Function(lambda x: (x > 0.5).to(x.dtype))), only={"gradients"}
    )


def test_a_suite_that_does_too_little_is_not_exhausted(net):
    weak = (PGD(steps=1, reach=0.5),)
    result = findings(net, suite=weak, only=CHEAP)
    doubt = next(d for d in result.doubts if d.name == "not-exhausted")
    assert doubt.state == "raised"
    assert {probe_title("margin"), probe_title("cross-entropy")} <= set(result.missed)
    for ids in result.missed.values():
        assert len(ids) > 0


@pytest.mark.slow
def test_the_examples_that_probes_broke_stood(net):
    model, batch = Classifier(net), patterns(80, seed=2)
    columns = evidence_columns(model, batch, suite=(PGD(steps=1, reach=0.5),))
    found, _ = probe_all(model, batch, columns)
    held = set(columns["id"][surviving_examples(columns, THREAT)].tolist())
    passes = broken_by(found, columns, THREAT)
    missed = conclude(found, columns, MeasurementContext(THREAT, "quick@1"), passes).missed
    assert probe_title("whole-box") not in missed
    assert missed and all(set(ids.tolist()) <= held for ids in missed.values())


@pytest.mark.slow
def test_probes_stay_within_their_budget(net):
    model, batch = Classifier(net), patterns(80, seed=2)
    columns = evidence_columns(model, batch, ThreatModel(Linf(0.01)))
    _, spent = probe_all(model, batch, columns, ThreatModel(Linf(0.01)))
    apart = {"search", "settling-search", "again"}
    assert set(spent) == {probe.name for probe in all_probes()} - {"transfer"} | {"again"}
    forwards = sum(int(s.queries.max()) for name, s in spent.items() if name not in apart)
    backwards = sum(int(s.backwards.max()) for name, s in spent.items() if name not in apart)
    assert 200 < forwards <= protocol.FORWARDS
    assert 100 < backwards <= protocol.BACKWARDS
    assert int(spent["search"].queries.max()) <= 1001
    assert int(spent["settling-search"].queries.max()) <= 201 and len(spent["settling-search"].queries) <= 32
    assert len(spent["again"].queries) <= protocol.FRESH_ROWS


@pytest.mark.parametrize("attack", [Square(queries=1000), PGD(steps=40, restarts=3)])
def test_what_breaks_a_standing_example_keeps_to_the_budget_of_the_threat(net, attack):
    model, batch = Classifier(net), patterns(80, seed=2)
    threat = ThreatModel(Linf(0.01), access=attack.needs, queries=30)
    columns = evidence_columns(model, batch, threat, (attack,))
    found, spent = probe_all(model, batch, columns, threat, (attack,))
    judged = 1
    for name in ("noise", "search", "again"):
        assert 0 < int(spent[name].queries.max()) <= threat.queries + judged
    said = {
        d.name: d.message for d in conclude(found, columns, MeasurementContext(threat, "black-box@1")).doubts
    }
    assert said["noise"].startswith("30 random inputs")


@pytest.mark.parametrize(("queries", "counted"), [(1, False), (2, True), (20, True), (None, True)])
def test_a_probe_beyond_the_query_budget_raises_no_doubt_about_the_suite(net, queries, counted):
    model, batch = Classifier(net), patterns(80, seed=2)
    threat = ThreatModel(Linf(0.3), queries=queries)
    columns = evidence_columns(
        model, batch, dataclasses.replace(threat, queries=1), (PGD(steps=1, reach=0.01),)
    )
    found, _ = probe_all(model, batch, columns, threat, (PGD(steps=1, reach=0.01),))
    assert found["one-step"].columns["broken"].any() and found["margin"].columns["broken"].any()
    passes = broken_by(found, columns, threat)
    missed = conclude(found, columns, MeasurementContext(threat, "quick@1"), passes).missed
    assert (probe_title("one-step") in missed) is counted
    assert (probe_title("margin") in missed) is (queries is None)


@pytest.mark.slow
def test_probes_state_their_numbers_of_queries(net):
    model, batch = Classifier(net), patterns(80, seed=2)
    columns = evidence_columns(model, batch, ThreatModel(Linf(0.01)))
    _, spent = probe_all(model, batch, columns, ThreatModel(Linf(0.01)))
    said = {probe.name: probe.queries for probe in all_probes() if probe.queries}
    assert said == {name: int(spent[name].queries.max()) for name in said}


@pytest.mark.slow
def test_probes_draw_by_example_and_not_by_batch(net):
    model, batch = Classifier(net.double()), patterns(40, seed=2)
    try:
        batch = dataclasses.replace(batch, x=batch.x.double())
        columns = evidence_columns(model, batch)
        some = torch.arange(3, 40, 5)
        rng = Draws(0).at("doubts")
        for probe in probes_for(THREAT, dict(enumerate(SUITE))):
            if probe.name == "steadiness":
                continue
            whole = probe.run(Metered(model, batch, THREAT), batch, THREAT, rng)
            part = probe.run(Metered(model, batch.take(some), THREAT), batch.take(some), THREAT, rng)
            for name, values in part.items():
                torch.testing.assert_close(
                    values, whole[name][some], equal_nan=True, msg=f"{probe.name} {name}"
                )
        assert len(columns["id"]) == 40
    finally:
        net.float()


def test_the_sample_is_drawn_by_id_and_in_source_order():
    columns = {"id": torch.arange(1000) + 7}
    among = torch.arange(1000) % 3 == 0
    rows = sample_rows(columns, among, Draws(0), 50)
    assert len(rows) == 50
    assert bool(among[rows].all())
    assert bool((rows.diff() > 0).all())
    shuffled = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    again = sample_rows({"id": columns["id"][shuffled]}, among[shuffled], Draws(0), 50)
    assert set(columns["id"][shuffled][again].tolist()) == set(columns["id"][rows].tolist())


def test_a_list_of_attacks_raises_the_free_doubts_only(net):
    model, batch = Classifier(net), patterns(60, seed=2)
    columns = evidence_columns(model, batch)
    dead = torch.zeros(60, dtype=torch.bool)
    fitting = Doubt("input", "clear")
    free = conclude({}, columns, MeasurementContext(THREAT, first_gradient_dead=dead, input=fitting))
    assert [doubt.name for doubt in free.doubts] == [
        name for name, test in doubt_tests().items() if test.free
    ]
    assert {doubt.state for doubt in free.doubts} == {"clear"}
    vanished = conclude(
        {}, columns, MeasurementContext(THREAT, first_gradient_dead=~dead, in_training=("net.1",))
    )
    assert {doubt.name for doubt in vanished.doubts if doubt.state == "raised"} == {"zero-gradient", "state"}
    unwatched = conclude({}, columns, MeasurementContext(THREAT))
    assert next(d for d in unwatched.doubts if d.name == "zero-gradient").state == "not measured"


@pytest.mark.parametrize(
    "threat, states",
    [
        (
            ThreatModel(Linf(0.04), access="scores"),
            {"scale": "not applicable", "noise": "clear", "black-box": "not applicable"},
        ),
        (ThreatModel(Linf(0.04), access="labels"), {"whole-box": "not applicable", "noise": "clear"}),
        (
            ThreatModel(Linf(0.0)),
            {"scale": "not applicable", "zero-gradient": "clear", "shattered": "not applicable"},
        ),
        (ThreatModel(L0(3)), {"black-box": "not applicable", "scale": "clear"}),
        (ThreatModel(Linf(0.04), goal=1), {"scale": "clear", "whole-box": "clear", "nan": "clear"}),
        (ThreatModel(L2(0.4)), {"scale": "clear", "whole-box": "clear", "shattered": "clear"}),
    ],
    ids=str,
)
def test_what_the_threat_model_rules_out_is_not_applicable(net, threat, states):
    suite = SUITE if threat.access == "gradients" else ()
    result = findings(net, batch=patterns(60, seed=2), threat=threat, suite=suite, only=CHEAP)
    found = {doubt.name: doubt.state for doubt in result.doubts}
    assert {name: found[name] for name in states} == states
    assert found["randomness"] == found["state"] == "clear"


def test_a_model_that_is_never_right_is_not_measured(net):
    wrong = Changed(net, after=Function(lambda logits: -logits))
    batch = patterns(40, seed=2)
    with torch.no_grad():
        batch = batch.take(wrong(batch.x).argmax(1) != batch.y)
    found = {doubt.name: doubt.state for doubt in findings(wrong, batch=batch).doubts}
    assert all(found[name] == "not measured" for name in EVIDENCE)


def test_a_minimum_norm_run_is_probed_at_the_median_it_found():
    columns = {
        "correct": torch.tensor([True, True, True, True, False]),
        "distance": torch.tensor([0.1, 0.2, 0.3, torch.inf, 0.0]),
    }
    threat = ThreatModel(L2())
    assert probing_threat(threat, columns).constraint == L2(pytest.approx(0.2))
    assert surviving_examples(columns, threat).tolist() == [False, False, True, True, False]


def test_change_is_relative_to_what_distinguishes_the_classes():
    logits = torch.tensor([[1000.0, 1001.0], [1002.0, 1000.0]])
    assert change(logits, logits + 5).max() == 0
    moved = logits.clone()
    moved[0, 1] += 0.02
    assert change(logits, moved).tolist() == pytest.approx([0.01, 0.0], abs=1e-4)
    moved[1, 0] = torch.nan
    assert change(logits, moved)[1] == 1.0


@pytest.mark.parametrize("mask", [-torch.inf, -1e9])
def test_change_is_seen_beside_a_class_that_is_masked_out(mask):
    logits = torch.tensor([[1.0, 2.0, mask], [3.0, 1.0, mask]])
    assert change(logits, logits).max() == 0
    moved = logits.clone()
    moved[0, 0] += 1
    assert change(logits, moved)[0] > 0.3
    moved[1, 2] = 0.0
    assert change(logits, moved)[1] > 0.3


class HalfNan(torch.autograd.Function):
    """The identity with a gradient that is not a number for the first half of the pixels."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.index_fill(2, torch.arange(4), torch.nan)


@pytest.mark.slow
def test_a_gradient_that_is_not_a_number_is_dead_to_the_probes_too(net):
    model = Classifier(Changed(net, before=Function(HalfNan.apply)))
    batch = patterns(20, seed=2)
    columns = evidence_columns(model, batch)
    found, _ = probe_all(model, batch, columns, only={"gradients"})
    assert found["gradients"].columns["dead"].all()


def test_the_meter_notes_whose_first_gradient_is_dead(net):
    """An input of the first pixel at zero is multiplied away; a model without a graph has no gradient at all."""
    gated = Classifier(Changed(net, before=Function(lambda x: x * (x[:, :, :1, :1] > 0))))
    batch = patterns(20, seed=2)
    x = batch.x.clone()
    x[:, :, 0, 0] = 0.5
    x[5:9, :, 0, 0] = 0.0
    batch = batch.at(x)
    model = Metered(gated, batch, ThreatModel(Linf(0.0)))
    PGD(steps=2)(model, batch, ThreatModel(Linf(0.0)), rng=Draws(0))
    assert model.spent.dead.nonzero()[:, 0].tolist() == [5, 6, 7, 8]
    cut = Metered(Classifier(Changed(net, before=Function(torch.Tensor.detach))), batch, THREAT)
    PGD(steps=2)(cut, batch, THREAT, rng=Draws(0))
    assert cut.spent.dead.all()
    blind = Metered(Classifier(net), batch, THREAT)
    with torch.no_grad():
        blind(batch.x, batch.ids)
    assert not blind.spent.dead.any()
