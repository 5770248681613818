"""The Python twins: whatever a caller has in hand, the same results as the command line."""

import math
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import holdfast
from holdfast.attacks import FGSM, FMN, PGD, Corruption
from holdfast.core.constraints import L1, L2, Linf
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Bounds, Classifier
from holdfast.runs.assess.preparation import small_eps_note, wide_bounds_note
from holdfast.runs.engine.progress import Step
from holdfast.verbs.opening.resolve import open_subject
from holdfast.verbs.settings import Assess

N, CLASSES = 12, 3


def seeded(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def network():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, CLASSES))
    with torch.no_grad():
        net[1].weight.copy_(seeded(CLASSES, 16) - 0.5)
        net[1].bias.zero_()
    return net.eval()


X = seeded(N, 1, 4, 4)
Y = network()(X).argmax(1)
ATTACKS = [PGD(steps=3), FGSM()]


@dataclass(frozen=True)
class Needy:
    """An attack of another package, with a setting that has no default."""

    steps: int
    needs: ClassVar[str] = "gradients"

    def __call__(self, model, batch, threat, *, rng):
        return batch.x


def test_every_kind_of_model_is_measured_alike():
    net = network()
    wanted = holdfast.assess(net, (X, Y), "linf:0.1", ATTACKS).evidence["success"]
    for model in (Classifier(net), net.forward, lambda x: net(1 * x)):
        assert torch.equal(holdfast.assess(model, (X, Y), "linf:0.1", ATTACKS).evidence["success"], wanted)


def makes():
    return network()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (5, "(model|surrogates.0) is 5; expected an address, or in Python an object"),
        (network().state_dict(), r"model is an OrderedDict, as a state dict is.*net\.load_state_dict"),
        ({"state_dict": network().state_dict()}, "model is a dict, as a state dict is"),
        (makes, "model is a function that accepts no inputs.*give the network that it returns"),
        (torch.nn.Flatten, r"model is the class Flatten; give an object of it, as in Flatten\(\)"),
    ],
)
def test_what_is_no_model_is_refused_before_the_data_are_read(model, message):
    for call in (holdfast.assess, holdfast.doctor, holdfast.certify):
        with pytest.raises(UsageError, match=message):
            call(model, "no such data")
    with pytest.raises(UsageError, match=message.replace("model is", "a surrogate is")):
        holdfast.assess(network(), (X, Y), surrogates=[model])


def test_a_function_that_returns_a_network_is_refused():
    with pytest.raises(
        TargetError, match="returned a torch.nn.*; it must return .* give the network that it"
    ):
        holdfast.assess(lambda width: network(), (X, Y))


@pytest.mark.parametrize(
    "data",
    [X, X.numpy(), (X,), (X, None), torch.utils.data.TensorDataset(X)],
    ids=lambda data: type(data).__name__,
)
def test_data_without_labels_are_refused(data):
    with pytest.raises(TargetError, match="one label for each input was expected: give"):
        holdfast.assess(network(), data)


@pytest.mark.parametrize(
    "verb", [holdfast.assess, holdfast.harden, holdfast.doctor], ids=lambda v: v.__name__
)
def test_lazy_layers_that_have_met_no_input_are_refused(verb):
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(CLASSES))
    with pytest.raises(
        TargetError,
        match="1.weight is UninitializedParameter: .*; call the network on a batch before",
    ):
        verb(net, (X, Y))
    net(X[:2])
    assert holdfast.assess(net, (X, Y), "linf:0.1", ATTACKS).evidence["success"].shape == (N,)
    counts = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyBatchNorm1d(affine=False))
    with pytest.raises(TargetError, match="1.running_mean is UninitializedBuffer"):
        verb(counts, (X, Y))


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode], ids=lambda off: off.__name__)
def test_gradients_are_switched_on_where_the_caller_has_them_off(off):
    wanted = holdfast.assess(network(), (X, Y), "linf:0.1", ATTACKS).evidence["success"]
    with off():
        net = network()  # made in inference mode too
        assert torch.equal(holdfast.assess(net, (X, Y), "linf:0.1", ATTACKS).evidence["success"], wanted)
        assert any(found.message == "gradients reach the input" for found in holdfast.doctor(net, (X, Y)))


class Counted(torch.utils.data.Dataset):
    """Many examples, which counts those that are read."""

    def __init__(self):
        self.read = 0

    def __len__(self):
        return 5_000

    def __getitem__(self, place):
        self.read += 1
        return X[place % N], Y[place % N]


@pytest.mark.parametrize("loader", [False, True], ids=["dataset", "loader"])
def test_of_a_loader_no_more_is_read_than_is_used(loader):
    wanted = holdfast.assess(network(), (X, Y), "linf:0.1", ATTACKS, n=10).evidence
    for verb in (partial(holdfast.assess, threat="linf:0.1", suite=ATTACKS), holdfast.doctor):
        many = Counted()
        found = verb(network(), DataLoader(many, batch_size=20) if loader else many, n=10)
        assert many.read == (20 if loader else 10)
        if verb is not holdfast.doctor:
            assert torch.equal(found.evidence["success"], wanted["success"])


class Raising(torch.nn.Module):
    """Writes in place into what a function saved for its backward pass."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x):
        saved = x.sigmoid()
        logits = self.net(saved * saved)
        saved.mul_(1)
        return logits


def test_a_model_whose_backward_pass_raises_is_attacked_by_its_scores():
    y = Raising()(X).argmax(1)
    found = holdfast.assess(Raising(), (X, y), "linf:0.1,queries=20", doubts=False)
    assert found.evidence.suite == "black-box@1"
    assert any("its backward pass raises RuntimeError" in note for note in found.evidence.notes)
    with pytest.raises(UsageError, match="PGD needs gradients.*its backward pass raises.*suite='black-box'"):
        holdfast.assess(Raising(), (X, y), "linf:0.1", ATTACKS)
    with pytest.raises(TargetError, match="cannot be trained: its backward pass raises"):
        holdfast.harden(Raising(), (X, y), "linf:0.1", fit=(X, y))


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
def test_torchscript_is_assessed_and_not_trained():
    scripted = torch.jit.trace(network(), X[:2])
    assert holdfast.assess(scripted, (X, Y), "linf:0.1", ATTACKS).evidence["success"].any()
    with pytest.raises(TargetError, match="TorchScript, whose copies cannot be trained"):
        holdfast.harden(scripted, (X, Y), "linf:0.1", fit=(X, Y))


def test_every_kind_of_data_is_measured_alike():
    wanted = holdfast.assess(network(), (X, Y), "linf:0.1", ATTACKS).evidence
    kinds = [
        (X.numpy(), Y.numpy()),
        DataLoader(TensorDataset(X, Y), batch_size=5),
        TensorDataset(X, Y),
    ]
    for data in kinds:
        found = holdfast.assess(network(), data, "linf:0.1", ATTACKS).evidence
        assert torch.equal(found["success"], wanted["success"])
        assert torch.equal(found["digest"], wanted["digest"])


def test_files_are_the_same_data(tmp_path):
    np.savez(tmp_path / "d.npz", x=X.numpy(), y=Y.numpy())
    found = holdfast.assess(network(), tmp_path / "d.npz", "linf:0.1", ATTACKS).evidence
    wanted = holdfast.assess(network(), (X, Y), "linf:0.1", ATTACKS).evidence
    assert torch.equal(found["success"], wanted["success"])
    assert found.data["name"] == str(tmp_path / "d.npz")


def test_the_first_examples_or_a_sample_keep_their_rows():
    first = holdfast.assess(network(), (X, Y), "linf:0.1", ATTACKS, n=5).evidence
    assert first["id"].tolist() == [0, 1, 2, 3, 4]
    drawn = holdfast.assess(network(), (X, Y), "linf:0.1", ATTACKS, sample=5, seed=1).evidence
    again = holdfast.assess(network(), (X, Y), "linf:0.1", ATTACKS, sample=5, seed=1).evidence
    assert drawn["id"].tolist() == again["id"].tolist() == sorted(drawn["id"].tolist())
    assert drawn["id"].tolist() != [0, 1, 2, 3, 4]
    whole = holdfast.assess(network(), (X, Y), "linf:0.1", ATTACKS, seed=1).evidence
    rows = drawn["id"]
    assert torch.equal(drawn["success"], whole["success"][rows])
    assert torch.equal(drawn["distance_l2"], whole["distance_l2"][rows])


def test_preprocessing_and_bounds_are_declared():
    inner = network()
    bytes_ = (X * 255).round()
    wanted = holdfast.assess(inner, (bytes_ / 255, Y), "linf:0.1", ATTACKS).evidence
    scaled = holdfast.assess(
        inner, (bytes_, Y), "linf:25.5", ATTACKS, bounds=(0, 255), mean=[0.0], std=[255.0]
    ).evidence
    assert torch.equal(scaled["success"], wanted["success"])
    assert scaled.model["bounds"] == [0.0, 255.0]
    kept = holdfast.assess(
        Classifier(inner, bounds=Bounds(0, 255), std=[255.0]), (bytes_, Y), "linf:25.5", ATTACKS
    ).evidence
    assert torch.equal(kept["success"], wanted["success"])


def test_a_named_suite_brings_what_a_list_does_not():
    named = holdfast.assess(network(), (X, Y), "linf:0.1", "quick", doubts=False)
    assert named.evidence.suite == "quick@1"
    assert "attacked_f1" in named.metrics
    listed = holdfast.assess(network(), (X, Y), "linf:0.1", ATTACKS)
    assert listed.evidence.suite == ""
    assert "attacked_f1" not in listed.metrics
    assert [record.name for record in listed.attacks] == ["PGD", "FGSM"]
    assert listed.attacks[0].settings["steps"] == 3


def test_only_and_skip_choose_from_the_suite():
    only = holdfast.assess(network(), (X, Y), "linf:0.1", "fast", only=["sprint", "apgd-t"], doubts=False)
    assert [record.name for record in only.attacks] == ["Sprint", "APGD-T"]
    assert only.evidence.suite == "fast@2 without FMN, Relay, Relay-2, Square"
    assert "no doubt was measured, because the doubts were switched off" in only.evidence.notes
    skip = holdfast.assess(
        network(), (X, Y), "linf:0.1", "fast", skip=["relay", "square", "apgd-t"], doubts=False
    )
    assert [record.name for record in skip.attacks] == ["Sprint", "FMN", "Relay-2"]
    with pytest.raises(UsageError, match="this suite has no attack 'apgd-q'; did you mean 'apgd-t'"):
        holdfast.assess(network(), (X, Y), "linf:0.1", "fast", only=["apgd-q"])
    with pytest.raises(UsageError, match="no attack is left; this suite has sprint"):
        holdfast.assess(network(), (X, Y), "linf:0.1", "quick", skip=["sprint"])


def test_without_an_eps_only_the_smallest_change_is_measured():
    with pytest.raises(UsageError, match="l2 has no eps, .* give suite='minimum-norm'"):
        holdfast.assess(network(), (X, Y), "l2")
    found = holdfast.assess(network(), (X, Y), "l2", "minimum-norm", doubts=False, only=["alma"])
    exact = found.evidence["distance"]
    assert exact.isfinite().all() and (exact > 0).all()
    assert found.metrics["robust_margin"].value == pytest.approx(float(exact.median()), rel=0.3)


@pytest.mark.parametrize(
    ("suite", "says"),
    [
        ([], "suite is empty; expected a suite, as in fast, or attacks"),
        (5, "suite is 5; expected the name"),
        ([PGD(), 5], "suite contains 5; expected the name"),
        ([PGD(), "fast"], "fast is a suite, which cannot be combined with other names"),
        ("pgd,standard", "standard is a suite, which cannot be combined with other names"),
        ([PGD(), "pgdd"], "there is no attack 'pgdd'; did you mean 'PGD'"),
        ("pgdd", "suite is 'pgdd'; did you mean 'PGD'"),
        ("apgd-t,pgd-ce", "PGD-CE is the name of PGD in suites under l0, and the threat is linf"),
        ([Needy], r"Needy needs steps; give an attack with it, as Needy\(steps="),
        ([Corruption], "Corruption is a common corruption, and the threat is linf"),
        ([PGD(steps=0)], "PGD: steps is 0; expected at least 1$"),
        ([FGSM(), PGD(steps=-3)], "PGD: steps is -3; expected at least 1$"),
        ([PGD(steps=2.5)], "PGD: steps is 2.5; expected a whole number$"),
        ([PGD(steps="5")], "PGD: steps is '5'; expected a whole number$"),
        ([PGD(steps=True)], "PGD: steps is True; expected a whole number$"),
        ([PGD(reach=-1.0)], "PGD: reach is -1.0; expected more than 0$"),
        ([PGD(loss="dlr")], "PGD: loss is 'dlr'; expected a function"),
    ],
)
def test_a_suite_that_cannot_be_meant_is_refused(suite, says):
    with pytest.raises(UsageError, match=says):
        holdfast.assess(network(), (X, Y), "linf:0.1", suite)


def test_settings_may_come_from_numpy():
    attacks = [PGD(steps=np.int64(2), reach=np.float32(2))]
    assert len(holdfast.assess(network(), (X, Y), "linf:0.1", attacks, n=np.int64(3)).evidence) == 3


@pytest.mark.parametrize("n", [True, "5", 2.0])
def test_numbers_of_examples_are_whole(n):
    with pytest.raises(UsageError, match="n is .*; expected a whole number"):
        holdfast.assess(network(), (X, Y), "linf:0.1", ATTACKS, n=n)


def test_a_result_is_shown_in_a_line_and_offers_its_metrics():
    result = holdfast.assess(network(), (X, Y), "linf:0.1", ATTACKS)
    assert repr(result).startswith("<Result: No gate; ")
    assert "every attack tried" in repr(result)
    assert len(repr(result)) < 200
    with pytest.raises(KeyError, match="'robust_acuracy'; did you mean 'robust_accuracy'") as unknown:
        result.metrics["robust_acuracy"]
    assert "this run has clean_accuracy, " in str(unknown.value)
    assert result.metrics.get("robust_acuracy") is None


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0"])
def test_the_smallest_changes_joined_bring_the_margin_the_radius_and_accuracy_at_every_eps(norm):
    found = holdfast.assess(network(), (X, Y), norm, "minimum-norm", doubts=False)
    each = [values for name, values in found.evidence.columns.items() if name.endswith(".distance")]
    joined = found.evidence["distance"]
    assert len(each) > 1
    assert torch.equal(joined, torch.stack(each).amin(0))
    assert found.metrics["robust_margin"].value == pytest.approx(joined.double().median().item(), rel=0.5)
    eps = joined[joined.isfinite()].median().item()
    share = (joined > eps).double().mean().item()
    assert found.gate(f"robust_accuracy@{eps!r} <= 1").estimate.value == pytest.approx(share)
    assert found.metrics["adversarial_radius"].value > 0


def test_a_curve_adds_accuracy_against_eps():
    found = holdfast.assess(network(), (X, Y), "linf:0.1", ATTACKS, curve=True)
    assert "distance" in found.evidence
    assert found.gate("robust_accuracy@0 >= 1").estimate.value == 1.0


def test_a_misspelt_name_is_offered_the_nearest():
    with pytest.raises(UsageError, match="'blackbox'"):
        holdfast.assess(network(), (X, Y), "linf:0.1", accept_doubts={"blackbox": "why not"})
    with pytest.raises(UsageError, match="without a reason; give accept_doubts="):
        holdfast.assess(network(), (X, Y), "linf:0.1", accept_doubts={"noise": " "})
    with pytest.raises(UsageError, match="mnist-cnn"):
        holdfast.assess("mnist-cmn", "mnist-mini")
    with pytest.raises(UsageError, match="suite"):
        holdfast.assess(network(), (X, Y), "linf:0.1", "standart")
    with pytest.raises(UsageError, match="device is 'gpu'"):
        holdfast.assess(network(), (X, Y), "linf:0.1", ATTACKS, device="gpu")


def test_runs_are_kept_reported_verified_and_compared(tmp_path):
    weak, strong = network(), network()
    with torch.no_grad():
        strong[1].weight.mul_(1).add_(0.2)  # another boundary, the same examples
    a = holdfast.assess(
        weak, (X, Y), "linf:0.1", ATTACKS, run=tmp_path / "a", gates=["clean_accuracy >= 0.5"]
    )
    b = holdfast.assess(strong, (X, Y), "linf:0.1", ATTACKS, run=tmp_path / "b")
    assert a.exit_code == 0
    assert holdfast.report(tmp_path / "a").summary() == a.summary()
    assert holdfast.verify(tmp_path / "a").complete
    compared = holdfast.compare(tmp_path / "a", b)
    held = [(r.evidence["correct"] & ~r.evidence["success"]).double().mean() for r in (a, b)]
    assert compared.regression.value == pytest.approx(float(held[0] - held[1]))
    paired = compared.summary()["paired"]["robust_accuracy"]
    assert paired["only_first"] - paired["only_second"] == round(float(held[0] - held[1]) * N)
    assert compared.summary()["n"] == N
    assert compared.write(tmp_path / "c.json").read_text() == compared.to_json()
    assert compared.text().startswith(f"{N} shared images")
    gates = ["regression <= 1 vs baseline"]
    gated = holdfast.assess(strong, (X, Y), "linf:0.1", ATTACKS, gates=gates, baseline=tmp_path / "a")
    assert gated.gates[0].estimate == compared.regression
    with pytest.raises(UsageError, match="compares with another run; give baseline=RUN"):
        holdfast.assess(strong, (X, Y), "linf:0.1", ATTACKS, gates=gates)
    other = holdfast.assess(strong, (X.flip(0) * 0.5, Y), "linf:0.1", ATTACKS)
    with pytest.raises(UsageError, match="share no example"):
        holdfast.compare(a, other).summary()


@pytest.mark.parametrize("verb", [holdfast.assess, holdfast.harden], ids=["assess", "harden"])
def test_to_resume_needs_a_folder(verb):
    with pytest.raises(UsageError, match="resume=True continues a run; give its folder, as in run="):
        verb(network(), (X, Y), "linf:0.1", resume=True)


def test_a_run_of_a_python_model_resumes_and_identifies_it_by_its_weights(tmp_path):
    run = tmp_path / "run"
    first = holdfast.assess(network(), (X, Y), "linf:0.1", ATTACKS, run=run)
    assert (
        holdfast.assess(network(), (X, Y), "linf:0.1", ATTACKS, run=run, resume=True).summary()
        == first.summary()
    )
    changed = network()
    with torch.no_grad():
        changed[1].bias.add_(1e-6)
    with pytest.raises(UsageError, match="a run with another model"):
        holdfast.assess(changed, (X, Y), "linf:0.1", ATTACKS, run=run, resume=True)
    with pytest.raises(UsageError, match="a run with another model"):
        holdfast.assess(network(), (X, Y), "linf:0.1", ATTACKS, run=run, resume=True, mean=[0.1])


class Scaled(torch.nn.Module):
    """Its factor stands in no weight and in no printed form."""

    def __init__(self, net, factor, act=torch.relu):
        super().__init__()
        self.net, self.factor, self.act = net, factor, act

    def forward(self, x):
        return self.factor * self.net(self.act(x))


class Negated(Scaled):
    def forward(self, x):
        return -self.factor * self.net(self.act(x))


def renamed(cls):
    """The same name and the same weights, as after an edit."""
    return type("Scaled", (cls,), {"__qualname__": "Scaled", "__module__": cls.__module__})


def code_of(model):
    return open_subject(Assess(model=model)).digest


def test_a_changed_python_model_is_another_model():
    net, other = network(), network()
    with torch.no_grad():
        other[1].bias.add_(1)
    for a, b in (
        (lambda x: net(x) * 2, lambda x: net(x) * -2),
        (lambda x: 1 * net(x), lambda x: 1 * other(x)),
        (lambda x: sum(net(y * 2) for y in (x,)), lambda x: sum(net(y * 3) for y in (x,))),
        (lambda x, by=1: net(x) * by, lambda x, by=2: net(x) * by),
        (partial(torch.mul, other=2), partial(torch.mul, other=3)),
        (Scaled(net, 1.0), Scaled(net, 2.0)),
        (Scaled(net, 1.0), Scaled(net, 1.0, torch.tanh)),
        (Scaled(net, 1.0), renamed(Negated)(net, 1.0)),
        (torch.nn.Sequential(Scaled(net, 1.0)), torch.nn.Sequential(renamed(Negated)(net, 1.0))),
        (Scaled(net, torch.tensor(1.0)), Scaled(net, torch.tensor(2.0))),
    ):
        assert code_of(a) != code_of(b)


@pytest.mark.slow
def test_an_equal_python_model_is_the_same_in_another_process(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "torch.manual_seed(0)\n"
        "net = torch.nn.Linear(2, 3)\n"
        "def help(x):\n    return x in {'a', 'b', 'c'}\n"
        "class Net(torch.nn.Module):\n"
        "    def forward(self, x):\n        return net(x) if help('a') else net(-x)\n"
        "from holdfast import Assess\n"
        "from holdfast.verbs.opening.resolve import open_subject\n"
        "for model in (Net(), lambda x: net(x) * 2, Net().forward):\n"
        "    print(open_subject(Assess(model=model)).digest)\n"
    )
    said = [
        subprocess.run(
            [sys.executable, tmp_path / "mine.py"],
            env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": seed},
            check=True,
            capture_output=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert said[0] == said[1]
    assert len(set(said[0].split())) == 3


def test_progress_is_reported_to_a_given_function():
    steps: list[Step] = []
    holdfast.assess(network(), (X, Y), "linf:0.1", ATTACKS, progress=steps.append)
    assert {(step.stage, step.title) for step in steps} == {
        ("clean", "clean"),
        ("1-pgd", "PGD"),
        ("2-fgsm", "FGSM"),
    }


def test_a_model_that_is_no_classifier_of_these_is_refused():
    with pytest.raises(TargetError, match="the model returned a tuple"):
        holdfast.assess(lambda x: (x.flatten(1),), (X, Y))
    with pytest.raises(
        TargetError, match="labels of data in memory range from 0 to 2, but the model has 2 classes"
    ):
        holdfast.assess(lambda x: x.flatten(1)[:, :2], (X, torch.arange(N) % CLASSES))


@pytest.mark.slow
def test_a_function_of_numpy_is_attacked_by_its_scores():
    weights = network()[1].weight.detach().numpy()

    def scores(x):
        return x.numpy().reshape(len(x), -1) @ weights.T

    def through(x):
        return torch.from_numpy(scores(x))

    for model in (scores, through):
        assert holdfast.assess(model, (X, Y), "linf:0.1,queries=300").evidence["success"].any()
    seen = "linf:0.1,access=scores,queries=300"
    *found, wanted = (
        holdfast.assess(model, (X, Y), seen, "black-box").evidence for model in (scores, through, network())
    )
    assert all(torch.equal(each["success"], wanted["success"]) for each in found) and wanted["success"].any()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"split": "test"}, "split='test'"),
        ({"label": "y"}, "label='y'"),
        ({"drop": ["id"]}, r"drop=\['id'\]"),
        ({"split": "train", "label": "y"}, "split='train', label='y'"),
    ],
)
def test_words_for_an_address_are_refused_for_data_in_hand(words, said):
    with pytest.raises(
        UsageError, match=f"{said} is not possible for data given as a Python object.*leave out"
    ):
        holdfast.open_data((X, Y), **words)


def test_the_doctor_sees_what_the_caller_has():
    findings = holdfast.doctor(lambda x: network()(x).softmax(1), (X, Y))
    assert any(finding.level != "good" and "probabilit" in finding.message for finding in findings)


def test_attacks_may_come_from_a_generator():
    wanted = holdfast.assess(network(), (X, Y), "linf:0.1", ATTACKS).evidence["success"]
    found = holdfast.assess(network(), (X, Y), "linf:0.1", (attack for attack in ATTACKS)).evidence["success"]
    assert torch.equal(found, wanted)


def test_half_precision_inputs_are_widened_and_networks_of_them_refused_with_a_remedy():
    half = X.half()
    found = holdfast.assess(network(), (half, Y), "linf:0.1", ATTACKS).evidence["success"]
    assert torch.equal(
        found, holdfast.assess(network(), (half.float(), Y), "linf:0.1", ATTACKS).evidence["success"]
    )
    narrow = network().bfloat16()
    with pytest.raises(
        TargetError,
        match=r"are bfloat16 and the inputs float32: give net\.to\(torch\.float32\), or .* x\.to\(torch\.bfloat16\)",
    ):
        holdfast.assess(narrow, (X.bfloat16(), Y), "linf:0.1", ATTACKS)
    holdfast.assess(lambda x: narrow(x.to(torch.bfloat16)), (X.bfloat16(), Y), "linf:0.1", ATTACKS)
    with pytest.raises(
        TargetError, match=r"are float32 and the inputs float64: give net\.to\(torch\.float64\)"
    ):
        holdfast.assess(network(), (X.double(), Y), "linf:0.1", ATTACKS)
    holdfast.assess(network().to(torch.float64), (X.double(), Y), "linf:0.1", ATTACKS)


@pytest.mark.parametrize(
    "threat, width, slight",
    [
        ("linf:8/255", 255, True), ("linf:8", 255, False), ("linf:1/255", 1, False),
        ("l2:0.1", 255, True), ("l2:0.5", 1, False), ("l1:1", 255, True), ("l1:1", 1, False), ("l0:1", 255, False),
    ],
)  # fmt: skip
def test_an_eps_for_another_box_is_pointed_out(threat, width, slight):
    net = network()
    result = holdfast.assess(
        lambda x: net(x / width),
        (X * width, Y),
        threat,
        [FGSM()] if "l0" not in threat else [PGD(steps=2)],
        bounds=(0, width),
    )
    said = [note for note in result.evidence.notes if "check that eps is in the units of the inputs" in note]
    assert bool(said) == slight


@pytest.mark.parametrize(("width", "wide"), [(1, False), (8, False), (12, True)])
def test_bounds_far_wider_than_the_inputs_are_noted(width, wide):
    note, *_ = (*wide_bounds_note(torch.tensor([[0.0, math.nan], [0.5, 1.0]]), Bounds(0, width)), "")
    assert note.startswith("the inputs range from 0 to 1, which is 8.3% of the bounds") == wide
    result = holdfast.assess(network(), (X, Y), "linf:0.1", [FGSM()], bounds=(0, width), doubts=False)
    assert any("% of the bounds: check" in each for each in result.evidence.notes) == wide


@pytest.mark.parametrize(("constraint", "shown"), [
    (Linf(0.0001), "eps 0.0001 is less"),
    (L2(0.001), "eps 0.001, divided by the square root of the 784 values of an input, is less"),
    (L1(0.1), "eps 0.1, divided by the 784 values of an input, is less"),
])  # fmt: skip
def test_the_note_on_a_small_eps_states_what_is_compared(constraint, shown):
    (note,) = small_eps_note(constraint, Bounds(0, 1), 784)
    assert note.startswith(shown)


@pytest.mark.slow
def test_a_suite_and_a_threat_may_be_given_in_every_form():
    def found(suite, threat="linf:0.1"):
        evidence = holdfast.assess(network(), (X, Y), threat, suite, doubts=False).evidence
        return evidence.suite, [(each.name, each.settings.get("steps")) for each in evidence.attacks]

    pgd, fmn = ("PGD", PGD().steps), ("FMN", FMN().steps)
    for form in (PGD(), PGD, "pgd", "PGD", ["pgd"], [PGD], (PGD(),), "pgd,"):
        assert found(form) == ("", [pgd])
    for form in ("pgd,fmn", ["pgd", "FMN"], [PGD(), "fmn"], ("pgd, fmn",), (PGD, FMN())):
        assert found(form) == ("", [pgd, fmn])
    assert found("autoattack")[0] == found("standard")[0] == found(["AA"])[0] == "standard@1"
    names = [name for name, _ in found("apgdce,Sprint", holdfast.Linf(0.1))[1]]
    assert names == ["APGD-CE", "Sprint"]
    given = holdfast.ThreatModel(holdfast.Linf(8 / 255), goal=1, access="scores", queries=9)
    evidence = holdfast.assess(network(), (X, Y), given, "square", doubts=False).evidence
    assert evidence.threat == given
    with pytest.raises(
        UsageError, match="threat is '0.1'; a norm, a colon and a size were expected; give threat='linf:0.1'"
    ):
        holdfast.assess(network(), (X, Y), 0.1)


def test_surrogates_are_models_in_hand_or_addresses(tmp_path):
    net, alike = network(), network()
    found = holdfast.assess(net, (X, Y), "linf:0.1,access=none", surrogates=[alike], doubts=False)
    assert found.evidence.suite == "transfer@1"
    assert [card["name"] for card in found.evidence.surrogates] == ["Sequential"]
    assert "transfer_success" in found.metrics
    path = tmp_path / "nets.py"
    path.write_text(
        "import torch\n\n\ndef build(classes: int):\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, classes))\n"
    )
    both = [Classifier(alike, mean=[0.5], std=[0.25]), f"{path}:build,classes=3"]
    found = holdfast.assess(net, (X, Y), "linf:0.1", ATTACKS, surrogates=both)
    assert found.summary()["transfer"]["models"][1:] == ["Sequential 2", "nets.py:build"]
    assert len(found.summary()["transfer"]["rows"]) == 4


def test_data_to_carry_changes_to_is_in_hand_or_an_address(tmp_path):
    net = network()
    np.savez(tmp_path / "more.npz", x=X.flip(0).numpy(), y=np.full(len(X), 77))
    others = [(X**2, Y + 50), tmp_path / "more.npz"]
    found = holdfast.assess(net, (X, Y), "linf:0.1", ATTACKS, across=others).summary()
    assert found["data_transfer"]["data"] == ["data in memory 1", "data in memory 2", "more.npz"]
    with pytest.raises(UsageError, match="across is a tuple; give a list of data sets"):
        holdfast.assess(net, (X, Y), "linf:0.1", ATTACKS, across=(X, Y))


def test_surrogates_are_a_sequence_of_models_whose_settings_all_apply():
    seen = "linf:0.1,access=none"
    one, other = (
        holdfast.assess(network(), (X, Y), seen, surrogates=given, n=4, doubts=False)
        for given in ([network()], (holdfast.open_model(network()),))
    )
    assert one.evidence.surrogates == other.evidence.surrogates
    unused = holdfast.open_model(network(), classes=11)
    with pytest.raises(UsageError, match="classes=11 is not possible for a surrogate"):
        holdfast.assess(network(), (X, Y), seen, surrogates=[unused])


def test_the_skip_gradients_of_a_surrogate_are_part_of_the_run(tmp_path):
    net, alike = network(), network()
    last = next(name for name, _ in reversed(list(alike.named_modules())))
    given = [alike, holdfast.skipped(alike, last), holdfast.skipped(alike, last, decay=0.2)]
    path = tmp_path / "nets.py"
    path.write_text(
        "import torch\n\n\ndef build():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))\n"
    )
    given += [f"{path}:build{more}" for more in ("", ",skip=1", ",skip=1,decay=0.2", ",skip=[1]")]
    found = holdfast.assess(net, (X, Y), "linf:0.1", ATTACKS, surrogates=given)
    assert len({card["digest"] for card in found.evidence.surrogates}) == len(given)
    assert any(
        "0.2 of the gradient passes back through 1, 1 of its modules" in note for note in found.evidence.notes
    )
    with pytest.raises(UsageError, match=r"called 'bn\*'; it has \*"):
        holdfast.assess(net, (X, Y), "linf:0.1", ATTACKS, surrogates=[f"{path}:build,skip=bn*"])


@pytest.mark.parametrize(
    "given, said",
    [
        ("mnist-cnn", "surrogates is 'mnist-cnn'; expected a list of models"),
        ([5], "surrogates.0 is 5; expected an address"),
        (["mnist-cn"], "did you mean 'mnist-cnn'"),
        (
            [Classifier(network(), bounds=Bounds(-2.0, 2.0))],
            "takes inputs from -2 to 2, the model from 0 to 1",
        ),
    ],
    ids=["text", "number", "misspelt", "bounds"],
)
def test_what_is_no_surrogate_is_refused(given, said):
    with pytest.raises(UsageError, match=said):
        holdfast.assess(network(), (X, Y), "linf:0.1", ATTACKS, surrogates=given)
