"""What `doctor` says of data that an assessment would refuse, and that it goes on after it."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import holdfast
from holdfast.attacks import FGSM
from holdfast.cli.app import run
from holdfast.core.batch import Batch
from holdfast.core.errors import TargetError
from holdfast.core.model import Bounds, Classifier
from holdfast.io.data.data import open_data
from holdfast.io.doctor import misfit
from holdfast.threats.domains import SIGNAL


def saved(path: Path, factor: float = 1.0, shift: int = 0, n: int = 60) -> str:
    digits: Batch = open_data("mnist-mini").read(0, n)
    np.savez(path, x=digits.x.numpy() * factor, y=digits.y.numpy() + shift)
    return str(path)


def said(findings: tuple) -> dict[str, tuple[str, str]]:
    return {finding.check: (finding.level, finding.way_out) for finding in findings}


def test_floats_to_255_are_named_and_the_rest_is_looked_at_all_the_same(tmp_path: Path, capsys) -> None:
    assert run(["doctor", "mnist-cnn", saved(tmp_path / "float255.npz", 255.0)]) == 3
    out, err = capsys.readouterr()
    assert "x range" in out
    assert "-> divide them by 255; give --bounds 0,255" in out
    assert "+ gradients" in out
    assert "1 problem found" in err
    accuracy = next(line for line in out.splitlines() if line.startswith("+ accuracy"))
    assert float(accuracy.split("accuracy is ")[1].split("%")[0]) > 90


def test_labels_that_start_at_1_are_named(tmp_path: Path) -> None:
    findings = holdfast.doctor("mnist-cnn", saved(tmp_path / "from1.npz", shift=1))
    assert str(findings) == repr(findings)
    assert "\n                -> they seem to start at 1: subtract 1\n" in str(findings)
    found = said(findings)
    assert found["labels"] == ("problem", "they seem to start at 1: subtract 1")
    assert found["accuracy"][0] == found["gradients"][0] == "good"


def test_folders_that_lack_classes_are_named(tmp_path: Path) -> None:
    digits = open_data("mnist-mini").read(0, 40)
    for x, y in zip(digits.x, digits.y.tolist(), strict=True):
        if y in {2, 7}:
            place = tmp_path / str(y)
            place.mkdir(exist_ok=True)
            pixels = (x[0] * 255).round().byte().numpy()
            Image.fromarray(pixels).save(place / f"{len(list(place.iterdir()))}.png")
    found = {finding.check: finding for finding in holdfast.doctor("mnist-cnn", tmp_path)}
    assert found["classes"].level == "problem"
    assert "2 class folders (2, 7)" in found["classes"].message and "10 classes" in found["classes"].message
    names = ",".join(map(str, range(10)))
    found = {
        f.check: f for f in holdfast.doctor(holdfast.open_model("mnist-cnn", class_names=names), tmp_path)
    }
    assert "classes" not in found
    assert found["accuracy"].level == "good"


def test_a_single_misfit_among_many_is_seen(tmp_path: Path) -> None:
    digits = open_data("mnist-mini").read(0, 400)
    x, y = digits.x.clone(), digits.y.clone()
    x[3, 0, 0, 0], y[5] = 1.25, 12
    found = said(holdfast.doctor("mnist-cnn", (x, y)))
    assert found["range"][0] == found["labels"][0] == "problem"
    assert found["accuracy"][0] == "good"


def test_a_table_with_unscaled_features_gets_advice_to_scale_them() -> None:
    x = torch.arange(40.0).view(20, 2)
    found = said(holdfast.doctor(lambda x: x, (x, torch.ones(20, dtype=torch.long))))
    level, way_out = found["range"]
    assert level == "problem" and way_out.startswith("scale the features as in training;")
    assert "bounds=(0, 39) (an estimate from 20 examples" in way_out


@pytest.mark.parametrize("missing", [slice(3, 4), slice(None)], ids=["one value", "a whole feature"])
def test_the_range_of_a_table_with_missing_values_is_that_of_the_values_present(missing: slice) -> None:
    x = torch.arange(40.0).view(20, 2)
    x[missing, 1] = torch.nan
    found = said(holdfast.doctor(lambda x: x.nan_to_num(), (x, torch.ones(20, dtype=torch.long))))
    level, way_out = found["range"]
    last = 39 if missing != slice(None) else 38
    assert level == "problem" and f"bounds=(0, {last})" in way_out
    assert f'"1": [{"1, 39" if last == 39 else "0, 0"}]' in way_out


def test_a_model_that_writes_into_its_input_is_reported() -> None:
    digits = open_data("mnist-mini").read(0, 40)

    def model(x):
        return x.sub_(0.5).flatten(1)[:, :10]

    inputs = digits.x.clone()
    found = said(holdfast.doctor(model, (inputs, digits.y)))
    assert torch.equal(inputs, digits.x)
    assert "randomness" not in said(holdfast.doctor(model, (inputs, digits.y), mean=[0.1], std=[0.3]))
    assert found["in place"] == ("warning", "write x = x - mean in its code instead of x -= mean")


def test_a_weak_model_on_a_few_examples_is_not_accused_of_shifted_labels() -> None:
    def always(x):
        return torch.nn.functional.one_hot(torch.full((len(x),), 2), 4).float() + 0 * x[:, :1]

    y = torch.tensor([1, 3, 3, 0, 0])
    assert "labels" not in said(holdfast.doctor(always, (torch.rand(5, 4), y)))
    many = torch.cat([y] * 10)
    assert "labels" not in said(holdfast.doctor(always, (torch.rand(50, 4), many)))
    x = torch.nn.functional.one_hot((many + 1) % 4).float()
    assert said(holdfast.doctor(lambda x: x * 1.0, (x, many)))["labels"][0] == "problem"


def test_labels_from_1_that_lack_the_last_class_do_not_fit() -> None:
    classes = torch.arange(60) % 3  # of four
    model = Classifier(lambda x: x * 1.0)
    batch = Batch(torch.nn.functional.one_hot(classes, 4).float(), classes + 1, torch.arange(60))
    found, forwards = misfit(model, batch, 60)
    assert found is not None and (found.check, found.gain) == ("labels", 1.0)
    assert "0%, but 100% with labels -1" in found.message
    assert forwards == 2 * 60
    constant = replace(batch, y=torch.where(batch.ids < 50, 2, 3), x=torch.eye(4)[[1]].repeat(60, 1))
    honest = replace(batch, y=classes)
    for fits in (constant, honest):
        found, _ = misfit(model, fits, 60)
        assert found is None or found.check != "labels"


def test_normalisations_of_images_are_not_tried_on_clips() -> None:
    y = torch.arange(60) % 2
    batch = Batch((0.6 * y - 0.3)[:, None].repeat(1, 8), y, torch.arange(60))
    model = Classifier(lambda x: torch.stack((0 * x[:, 0], x.mean(1) - 0.5), 1), bounds=Bounds(-1, 1))
    found = [misfit(model, batch, 60, domain=domain)[0] for domain in (None, SIGNAL)]
    assert found[0] is not None and found[0].check == "normalisation"
    assert found[1] is None


def strict(x):
    """Five of eight classes right, and inputs outside [0, 1] refused."""
    if x.min() < 0 or x.max() > 1:
        raise ValueError("pixels must lie in [0, 1]")
    return x.flatten(1)[:, :8] * torch.tensor([1.0] * 5 + [-1.0] * 3)


WEAK = {
    "strict": (Classifier(strict), torch.eye(8)[:, None, None]),
    "probability": (Classifier(lambda x: x[:, 0, 0, :1], output="probability"), torch.eye(8)[:, None, None]),
    "channels last": (
        Classifier(lambda x: x[..., 2].flatten(1), layout="hwc"),
        torch.rand(8, 3, 2, 4, generator=torch.Generator().manual_seed(0)),
    ),
}


@pytest.mark.parametrize("kind", WEAK)
def test_a_reading_that_a_weak_network_refuses_ends_nothing(kind: str) -> None:
    """What is declared of the network is kept under every other reading, and none of them raises."""
    model, x = WEAK[kind]
    rows = torch.arange(80) % 8
    batch = Batch(x[rows], rows if kind != "probability" else rows % 2, torch.arange(80))
    found, forwards = misfit(model, batch, 40)
    assert forwards > 80 and (found is None or found.check == "scale")
    assert any(finding.check == "accuracy" for finding in holdfast.doctor(model, (batch.x, batch.y)))


def test_an_accurate_network_raises_no_doubt_about_its_data() -> None:
    model = Classifier(lambda x: x, bounds=Bounds(-10, 10))
    y = torch.arange(60) % 4
    batch = Batch(torch.nn.functional.one_hot(y, 4).float(), y, torch.arange(60))
    assert misfit(model, batch, 60)[0] is None
    (finding,) = (f for f in holdfast.doctor(model, (batch.x, y)) if f.check == "scale")
    assert (finding.level, finding.way_out) == ("warning", "scale them as in training, or correct the bounds")


def test_values_to_16_are_not_taken_for_bytes() -> None:
    x = torch.arange(17.0).repeat(40).view(40, 1, 17)
    _, way_out = said(holdfast.doctor(lambda x: x[:, 0, :4], (x, torch.arange(40) % 4)))["range"]
    assert way_out.startswith("scale them as in training, as in x / 16 for values from 0 to 16;")
    with pytest.raises(TargetError, match="scale them as in training, as in x / 16 for values from 0 to 16"):
        holdfast.assess(lambda x: x[:, 0, :4], (x, torch.arange(40) % 4), threat="linf:0.1")


def test_what_is_no_better_than_chance_is_no_alternative() -> None:
    def guess(x):
        return torch.nn.functional.one_hot((x[:, 0] > 0).long(), 2).float() + 0 * x[:, :1]

    x = torch.linspace(0.1, 0.9, 40)[:, None].repeat(1, 3)  # all above zero until a half is taken away
    assert "normalisation" not in said(holdfast.doctor(guess, (x, torch.zeros(40, dtype=torch.long))))


def normalised(x: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (x - mean[:, None, None]) / std[:, None, None]


def colourful(x: torch.Tensor) -> torch.Tensor:
    weight = torch.randn(10, 48, generator=torch.Generator().manual_seed(1))
    return torch.tanh(normalised(x).flatten(1)) @ weight.T


def test_normalising_twice_is_named_on_either_side() -> None:
    x = torch.rand(200, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    y = colourful(x).argmax(1)
    before = said(holdfast.doctor(colourful, (normalised(x), y), bounds=(-3, 3)))
    inside = said(holdfast.doctor(lambda x: colourful(normalised(x)), (x, y)))
    for found in (before, inside):
        assert found["normalisation"][0] == "problem" and found["normalisation"][1].startswith(
            "the network expects the values before this normalisation"
        )
    missing = said(
        holdfast.doctor(
            lambda x: (
                torch.tanh(x.flatten(1)) @ torch.randn(10, 48, generator=torch.Generator().manual_seed(1)).T
            ),
            (x, y),
        )
    )
    level, way_out = missing["normalisation"]
    assert level == "problem" and way_out.startswith("an estimate: ")
    assert way_out.endswith(
        "the values of its training; give mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)"
    )
    assert "normalisation" not in said(holdfast.doctor(colourful, (x, y)))


def test_no_alternative_is_used_if_outputs_change_between_calls() -> None:
    x = torch.rand(200, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    y, calls = colourful(x).argmax(1), []

    def turning(z: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return colourful(z) * (1 if len(calls) % 2 else -1)

    found = said(holdfast.doctor(turning, (x, y)))
    assert found["randomness"][0] == "warning"
    assert not {"normalisation", "labels", "scale"} & set(found)


ORDERS = {"b,a,c": (1, 0, 2), "c,a,b": (1, 2, 0)}


@pytest.mark.parametrize("order", ORDERS)
def test_class_names_in_another_order_are_named_and_no_shift_is_reported(order: str) -> None:
    names = order.split(",")
    y = np.arange(60) % 3
    x = torch.eye(3)[y]
    findings = holdfast.doctor(lambda x: x, (x, np.array(names)[y]))
    (labels,) = (finding for finding in findings if finding.check == "labels")
    assert labels.level == "problem" and f"--class-names {order} if the training" in labels.on_command_line()
    opened = holdfast.open_model(lambda x: x, class_names=names)
    right = holdfast.doctor(opened, (x, np.array(names)[y]))
    assert said(right)["accuracy"][0] == "good" and "labels" not in said(right)


def test_a_model_at_chance_on_text_labels_is_given_the_order_to_check() -> None:
    y = np.arange(60) % 3
    findings = holdfast.doctor(lambda x: x, (torch.eye(3)[np.arange(60) // 20], np.array(["d", "h", "v"])[y]))
    assert "class_names=[A, B, C] to holdfast.open_model in the order" in said(findings)["accuracy"][1]
    assert "if it is not d, h, v" in said(findings)["accuracy"][1]


@pytest.mark.parametrize("takes", ["pixels", "normalised inputs"])
def test_the_advice_on_normalised_data_leads_to_no_problem(takes: str) -> None:
    pixels = torch.rand(200, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    y = (pixels[:, 0, 0, 0] > 0.5).long()
    threshold = 0.5 if takes == "pixels" else 0.0

    def model(x: torch.Tensor) -> torch.Tensor:
        height = x[:, 0, 0, 0] - threshold
        return torch.stack((-height, height), 1)

    findings = holdfast.doctor(model, (2 * pixels - 1, y))
    problems = {finding.check: finding for finding in findings if finding.level == "problem"}
    assert ("normalisation" in problems) == (takes == "pixels")
    assert bool(problems["range"].remedies) == (takes != "pixels")
    remedy = problems["normalisation" if takes == "pixels" else "range"].remedies[-1]
    changes = {part.argument: part.value for part in (remedy, *remedy.also)}
    assert not any(each.level == "problem" for each in holdfast.doctor(model, (2 * pixels - 1, y), **changes))


def test_outputs_that_are_no_scores_of_classes_are_named_where_accuracy_is_at_chance() -> None:
    rng = torch.Generator().manual_seed(0)
    x, y = torch.rand(60, 5, generator=rng), torch.randint(0, 3, (60,), generator=rng)
    qualities = torch.tensor([3.5, 4.1, 2.9])
    findings = holdfast.doctor(lambda x: qualities + x[:, :3] / 10, (x, y))
    (accuracy,) = [finding for finding in findings if finding.check == "accuracy"]
    assert accuracy.level == "warning"
    assert "the 3 outputs do not look like logits or probabilities of the labels" in accuracy.message


class Pooled(nn.Module):
    """A network of large images, which lacks memory for more than `most` of them."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.linear, self.most = nn.Linear(3, 3), most
        self.sizes: set[int] = set()
        self.differentiated: set[tuple[int, bool]] = set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self.most:
            raise torch.OutOfMemoryError("out of memory")
        self.sizes.add(len(x))
        if x.requires_grad:
            self.differentiated.add((len(x), self.linear.weight.requires_grad))
        return self.linear(x.mean((2, 3)))


@pytest.mark.parametrize(("most", "largest"), [(100, 8), (5, 4)])
def test_large_images_are_examined_in_batches_that_fit_into_memory_as_by_assess(
    most: int, largest: int
) -> None:
    net, x = Pooled(most), torch.rand(12, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    findings = said(holdfast.doctor(net, (x, torch.arange(12) % 3)))
    assert {"accuracy", "steadiness", "gradients"} <= findings.keys()
    assert max(net.sizes) == largest and (largest, False) in net.differentiated
    assert net.linear.weight.requires_grad


def test_the_number_of_a_regression_is_named_by_doctor_and_assess_unless_it_is_declared() -> None:
    rng = torch.Generator().manual_seed(0)
    x, y = torch.rand(60, 5, generator=rng), torch.randint(0, 2, (60,), generator=rng)

    def price(x: torch.Tensor) -> torch.Tensor:
        return 200 + 50 * x[:, :1]

    def notes(model: object, labels: torch.Tensor, **given: str) -> str:
        opened = holdfast.open_model(model, **given)
        result = holdfast.assess(opened, (x, labels), "linf:0.1", [FGSM()], doubts=False)
        return " ".join(result.summary()["notes"])

    (accuracy,) = [each for each in holdfast.doctor(price, (x, y)) if each.check == "accuracy"]
    assert accuracy.level == "warning"
    assert re.search(
        "the numbers from 200.* to 2.* that the model returns, one for each example", accuracy.message
    )
    assert "do not look like logits of class 1" in notes(price, y)
    assert "do not look like" not in notes(price, y, model_output="logit")
    assert "do not look like" not in notes(lambda x: 20 * (x[:, :1] - 0.5), (x[:, 0] > 0.5).long())


def test_labels_outside_the_labels_of_an_estimator_are_named_as_in_the_data() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    x = np.random.default_rng(0).random((60, 4))
    model = linear.LogisticRegression().fit(x, np.arange(60) % 3 + 1)
    (finding,) = (f for f in holdfast.doctor(model, (x, np.arange(60) % 4 + 1)) if f.check == "labels")
    assert finding.level == "problem" and "1, 2, 3" in finding.message


def test_warnings_are_counted_beside_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digits = open_data("mnist-mini").read(0, 60)
    order = digits.y.argsort()
    np.savez(tmp_path / "sorted.npz", x=digits.x[order].numpy(), y=digits.y[order].numpy())
    assert run(["doctor", "mnist-cnn", str(tmp_path / "sorted.npz"), "-n", "3"]) == 0
    out = capsys.readouterr()
    warnings = sum(line.startswith("! ") for line in out.out.splitlines())
    assert warnings == 1 and "no problem found, 1 warning" in out.err + out.out
