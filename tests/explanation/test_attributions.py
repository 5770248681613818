"""Attributions beside closed forms and Captum."""

import sys

import pytest
import torch
from torch import nn

import holdfast
from holdfast.core.model import Bounds, Classifier
from holdfast.explanation.counterfactual import (
    default_window,
    gradient,
    integrated_gradients,
    occlusion,
    rank_correlation,
    smooth_gradient,
    top_overlap,
)


def linear(w, bias=0.0):
    layer = nn.Linear(w.shape[1], len(w)).double()
    with torch.no_grad():
        layer.weight.copy_(w)
        layer.bias.fill_(bias)
    return Classifier(layer, bounds=Bounds(-10.0, 10.0)).eval()


@pytest.fixture
def small():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    return Classifier(net).eval().requires_grad_(False)


def images(n=3):
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("n_classes", [2, 3])
def test_attributions_of_a_linear_model_are_known(n_classes):
    random = torch.Generator().manual_seed(0)
    w, x, start = (torch.randn(n_classes, 6, generator=random, dtype=torch.float64) for _ in range(3))
    model, classes = linear(w, 0.3), torch.arange(n_classes).flip(0)
    exact = w[classes] - w[1 - classes] if n_classes == 2 else w[classes]
    assert torch.allclose(gradient(model, x, classes), exact)
    noise = torch.randn(3, n_classes, 6).double()
    assert torch.allclose(smooth_gradient(model, x, classes, noise), exact)
    result = integrated_gradients(model, x, start, classes)
    assert torch.allclose(result.values, exact * (x - start))
    assert float(result.gap.max()) < 1e-9
    assert torch.allclose(occlusion(model, x, start, classes, (1,), (1,)), exact * (x - start))


def attributed(model, x, y, index):
    """The attributions of an example, by method for each column in order."""
    opened = holdfast.open_model(model, **({"model_output": "logit"} if isinstance(model, nn.Module) else {}))
    case = holdfast.explain(opened, x, y, "linf:0.3", index=index)
    figure = next(each for each in case.figures if each.name == "attributions")
    columns = [heading.partition(",")[0] for heading in figure.headings if heading.endswith(", clean")]
    places = [figure.headings.index(f"{name}, clean") for name in columns]
    rows = {str(row[0]): row for row in figure.rows}
    order = [f"feature {k}" for k in range(x.shape[1])]
    return {
        name: torch.tensor([float(rows[each][place]) for each in order], dtype=torch.float64)
        for name, place in zip(columns, places, strict=True)
    }


W = torch.tensor([3.0, -2.0, 0.0, 1.0])
TABLE = torch.rand(80, 4, generator=torch.Generator().manual_seed(0))
TABLE_Y = (TABLE @ W > 1).long()


def one_output():
    net = nn.Linear(4, 1)
    with torch.no_grad():
        net.weight.copy_(W)
        net.bias.fill_(-1.0)
    return net


def svm():
    from sklearn.svm import LinearSVC

    return LinearSVC(random_state=0).fit(TABLE.numpy(), TABLE_Y.numpy())


def logistic():
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression().fit(TABLE.numpy(), TABLE_Y.numpy())


@pytest.mark.parametrize("build", [one_output, svm, logistic])
@pytest.mark.parametrize("predicted", [0, 1])
def test_attributions_of_a_linear_model_with_one_output_follow_its_weights_for_both_classes(build, predicted):
    model = build()
    linear = build is one_output
    weights = W.double() if linear else torch.tensor(model.coef_[0], dtype=torch.float64)
    bias = -1.0 if linear else float(model.intercept_[0])
    index = int(((TABLE.double() @ weights + bias > 0).long() == predicted).nonzero()[0])
    sign = 1 if predicted else -1
    values = attributed(model, TABLE, TABLE_Y, index)
    base = TABLE.median(0).values
    assert not linear or (values["gradient"] - sign * weights).abs().max() < 1e-5
    moved = sign * weights * (TABLE[index] - base)
    assert (values["occlusion"] - moved).abs().max() < 1e-5


def svc():
    from sklearn.svm import SVC

    return SVC().fit(TABLE.numpy(), TABLE_Y.numpy())


def xgboost():
    library = pytest.importorskip("xgboost")
    return library.XGBClassifier(n_estimators=8, max_depth=3).fit(TABLE.numpy(), TABLE_Y.numpy())


def lightgbm():
    library = pytest.importorskip("lightgbm")
    model = library.LGBMClassifier(n_estimators=8, min_child_samples=5, verbose=-1)
    return model.fit(TABLE.numpy(), TABLE_Y.numpy())


def xgboost_booster():
    """A booster without the interface of scikit-learn, which has one output."""
    library = pytest.importorskip("xgboost")
    data = library.DMatrix(TABLE.numpy(), label=TABLE_Y.numpy())
    return library.train({"objective": "binary:logistic", "max_depth": 3, "nthread": 1}, data, 8)


def lightgbm_booster():
    library = pytest.importorskip("lightgbm")
    settings = {"objective": "binary", "min_data_in_leaf": 5, "verbose": -1, "num_threads": 1}
    return library.train(settings, library.Dataset(TABLE.numpy(), label=TABLE_Y.numpy()), 8)


def decision(model, rows):
    """The difference of the logits of both classes, as the library computes it."""
    if hasattr(model, "decision_function"):
        return torch.tensor(model.decision_function(rows.numpy()), dtype=torch.float64)
    inputs = rows.numpy()
    if type(model).__module__.startswith("xgboost"):
        how = {"output_margin": True}
        inputs = inputs if type(model).__name__ == "XGBClassifier" else sys.modules["xgboost"].DMatrix(inputs)
    else:
        how = {"raw_score": True}
    return torch.tensor(model.predict(inputs, **how), dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:X does not have valid feature names")
@pytest.mark.parametrize(
    "build",
    [
        svc,
        xgboost,
        xgboost_booster,
        pytest.param(lightgbm, marks=pytest.mark.slow),
        pytest.param(lightgbm_booster, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("predicted", [0, 1])
def test_occlusion_of_a_model_with_one_output_is_the_fall_of_its_decision(build, predicted):
    model = build()
    index = int(((decision(model, TABLE) > 0).long() == predicted).nonzero()[0])
    rows = TABLE[index].repeat(5, 1)
    for k, middle in enumerate(TABLE.median(0).values):
        rows[k + 1, k] = middle
    fall = decision(model, rows)
    exact = (1 if predicted else -1) * (fall[0] - fall[1:])
    assert (attributed(model, TABLE, TABLE_Y, index)["occlusion"] - exact).abs().max() < 1e-5


def test_attributions_equal_those_of_captum(small):
    attr = pytest.importorskip("captum.attr")
    x = images()
    classes, zero = small(x).argmax(1), torch.zeros_like(x)
    ours = integrated_gradients(small, x, zero, classes, nodes=20).values
    theirs = attr.IntegratedGradients(small).attribute(x, zero, classes, n_steps=20, method="gausslegendre")
    assert torch.allclose(ours, theirs.float(), atol=1e-6)
    for window, stride in (((1, 3, 3), (1, 2, 2)), ((1, 4, 4), (1, 3, 3))):
        theirs = attr.Occlusion(small).attribute(x, window, stride, zero, classes)
        assert torch.allclose(occlusion(small, x, zero, classes, window, stride), theirs, atol=1e-6)
    theirs = attr.Saliency(small).attribute(x.clone().requires_grad_(), classes, abs=False)
    assert torch.allclose(gradient(small, x, classes), theirs, atol=1e-6)


def test_the_completeness_gap_of_a_network_with_relus_is_small(small):
    x = images(5)
    result = integrated_gradients(small, x, torch.zeros_like(x), small(x).argmax(1))
    assert float(result.gap.max()) < 0.01


def test_similarity_of_attributions():
    a = torch.arange(40.0).view(1, 5, 8)
    assert rank_correlation(a, a) == pytest.approx(1)
    assert rank_correlation(a, -a) == pytest.approx(-1)
    assert rank_correlation(a, torch.zeros_like(a)) == 0
    background = torch.cat((torch.zeros(1, 5, 8), a + 1))
    assert rank_correlation(background, background.flip(0)) == 0
    assert rank_correlation(background, -background) == pytest.approx(-1)
    assert rank_correlation(torch.tensor([1.0, 1.0, 2.0]), torch.tensor([2.0, 1.0, 3.0])) == pytest.approx(
        0.75**0.5
    )
    assert top_overlap(a, a) == 1
    assert top_overlap(a, a.flip(2).flip(1)) == 0
    assert default_window((1, 28, 28)) == ((1, 4, 4), (1, 2, 2))
    assert default_window((7,)) == ((1,), (1,))
