"""Usual inputs of other software: data sets of the Hugging Face hub, tables in other forms, missing values, sparse
matrices and LightGBM.
"""

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import holdfast
from holdfast.core.batch import Batch, WithMissing, with_missing, without_missing
from holdfast.core.constraints import L0, L1, L2, Linf, allowed
from holdfast.core.errors import HoldfastError, TargetError, UsageError
from holdfast.core.model import Bounds, Classifier
from holdfast.io.data.data import open_data
from holdfast.io.data.layouts import DeclaredData
from holdfast.io.data.loaders import as_data
from holdfast.runs.harden.attempt_training import training_notes

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (12, 5, 4, 3), dtype=np.uint8)
Y = np.arange(12) % 3
X = torch.from_numpy(IMAGES).permute(0, 3, 1, 2).float() / 255


def encoded(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def cleanly(model: object, data: object) -> float:
    return float(holdfast.assess(model, data, "linf:0.001", "fgsm", doubts=False)["clean_accuracy"])


# models ----------------------------------------------------------------------------------------------


@dataclass
class Output:
    logits: Tensor


class Returning(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.layer, self.auxiliary, self.form = nn.Linear(4, 3), nn.Linear(4, 3), form

    def forward(self, x):
        return self.form(self.layer(x), self.auxiliary(x), self.training)


class Heads(NamedTuple):
    logits: Tensor
    aux_logits: Tensor


FORMS = {
    "object": lambda main, auxiliary, training: Output(main),
    "mapping": lambda main, auxiliary, training: {"logits": main},
    "named tuple": lambda main, auxiliary, training: Heads(main, auxiliary) if training else main,
    "tuple": lambda main, auxiliary, training: (main, auxiliary) if training else main,
}


@pytest.mark.parametrize("form", FORMS)
def test_the_logits_are_found_among_several_outputs(form):
    net, x = Returning(FORMS[form]), torch.rand(6, 4)
    for training in (False, True):
        torch.testing.assert_close(Classifier(net.train(training))(x), net.layer(x))
    with pytest.raises(TargetError, match="the model returned a tuple"):
        Classifier(Returning(lambda main, auxiliary, training: (main, auxiliary)).eval())(x)


def test_weights_that_the_loss_does_not_use_are_named():
    x = torch.rand(6, 4)
    (note,) = training_notes(Classifier(Returning(FORMS["tuple"])), x)
    assert "2 of 4 parameters are not trained" in note and "auxiliary.weight" in note
    assert not training_notes(Classifier(nn.Linear(4, 3)), x)


def test_weights_on_the_device_meta_are_refused_by_name():
    with pytest.raises(TargetError, match="2 weights are on the device meta.*: weight, bias; load"):
        cleanly(nn.Linear(4, 3, device="meta"), (torch.rand(6, 4), torch.arange(6) % 3))


@pytest.mark.parametrize("device", ["mps", "xpu", "meta", "nothing"])
def test_devices_without_support_are_refused_with_those_that_are_accepted(device):
    with pytest.raises(
        UsageError, match=f"device is '{device}', which is not supported; expected one of auto, cpu"
    ) as caught:
        holdfast.assess(nn.Linear(4, 3), (torch.rand(6, 4), torch.arange(6) % 3), device=device)
    assert caught.value.remedy.words() == ("--device", "cpu")


@pytest.mark.parametrize("kind", [torch.Tensor.clone, torch.Tensor.numpy], ids=["tensor", "array"])
@pytest.mark.parametrize("shape", [(8, 6, 6), (8, 1, 6, 6)])
def test_a_tuple_of_outputs_is_the_cause_of_a_refusal_whatever_the_shape_of_the_images(kind, shape):
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 3))

    class Several(nn.Module):
        def forward(self, x):
            return net(x), x

    x, y = torch.rand(shape), torch.arange(8) % 3
    with pytest.raises(TargetError, match="the model returned a tuple; it must return one tensor of logits"):
        cleanly(Several(), (kind(x), y))
    if len(shape) == 3:
        with pytest.raises(
            TargetError, match=r"insert an axis for one channel in the data, as in x\[:, None\]"
        ):
            cleanly(net, (x, y))


class Logits:
    """The output of a network as an object."""

    def __init__(self, logits):
        self.logits = logits


class OfTextAndImages(nn.Module):
    """A network whose first parameter is not for images."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(36, 3)

    def forward(self, input_ids=None, pixel_values=None, photo=None):
        images = pixel_values if photo is None else photo
        assert input_ids is None and images is not None
        return Logits(self.head(images.flatten(1)))


def test_images_are_passed_by_the_name_of_their_parameter(tmp_path):
    net, x = OfTextAndImages(), torch.rand(8, 1, 6, 6)
    y = net.head(x.flatten(1)).argmax(1)
    mappings = [{"photo": image, "label": int(label)} for image, label in zip(x, y, strict=True)]
    for data in ((x, y), {"pixel_values": x, "labels": y}, holdfast.open_data(mappings, x="photo")):
        result = holdfast.assess(net, data, "linf:0.01", suite="fgsm", doubts=False)
        assert bool(result.evidence["correct"].all())
    assert holdfast.attack(net, x, y, "fgsm").result.evidence["correct"].all()
    assert Classifier(net).renormalised(None, None).input_name == "pixel_values"
    both = [{**entry, "pixel_values": entry["photo"]} for entry in mappings]
    how, run = {"suite": "fgsm", "doubts": False}, tmp_path / "run"
    holdfast.assess(net, holdfast.open_data(both, x="pixel_values"), "linf:0.01", run=run, **how)
    with pytest.raises(UsageError, match="another model"):
        holdfast.assess(net, holdfast.open_data(both, x="photo"), "linf:0.01", run=run, resume=True, **how)


class OfTokens(nn.Module):
    """A network whose inputs are the numbers of tokens."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, input_ids):
        return self.head(self.embedding(input_ids).mean(1))


TOKENS = torch.randint(0, 9, (6, 5))


@pytest.mark.parametrize(
    "data",
    [
        (TOKENS, torch.arange(6) % 3),
        (TOKENS.numpy(), torch.arange(6) % 3),
        (TOKENS.float(), torch.arange(6) % 3),
        {"input_ids": TOKENS, "attention_mask": TOKENS, "labels": torch.arange(6) % 3},
    ],
    ids=["tensor", "array", "floats", "mapping"],
)
def test_ids_of_tokens_are_refused_at_once(data):
    for call in (holdfast.assess, holdfast.doctor):
        with pytest.raises(TargetError, match="ids of tokens are not supported") as refused:
            call(OfTokens(), data)
        assert not refused.value.remedies


def test_an_embedding_inside_a_network_for_images_is_no_reason_to_refuse_it():
    class WithPositions(OfTokens):
        def forward(self, x):
            return self.head(x[..., :4] + self.embedding(torch.arange(1)))

    x = torch.rand(6, 4)
    cleanly(WithPositions(), (x, torch.arange(6) % 3))
    with pytest.raises(TargetError, match="mat1 and mat2|size of tensor"):
        cleanly(WithPositions(), (x[:, :3], torch.arange(6) % 3))


# data of the hub -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["struct", "binary", "lists", "floats", "tensor"])
def test_a_parquet_column_of_images_is_read_like_an_array(form, tmp_path: Path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    files = [encoded(image) for image in IMAGES]
    column = {
        "struct": lambda: pa.array([{"bytes": file, "path": "a.png"} for file in files]),
        "binary": lambda: pa.array(files),
        "lists": lambda: pa.array(IMAGES.tolist()),
        "floats": lambda: pa.array((IMAGES / 255).tolist()),
        "tensor": lambda: pa.FixedShapeTensorArray.from_numpy_ndarray(IMAGES),
    }[form]()
    table = pa.table({"image": column, "label": pa.array(Y), "number": pa.array(Y)})
    pq.write_table(table, tmp_path / "test.parquet")
    data = open_data(str(tmp_path / "test.parquet"), label="label")
    x = data.read(0, 12).x
    torch.testing.assert_close(x if x.shape[1] == 3 else x.movedim(-1, 1), X)
    assert data.read(0, 12).y.tolist() == Y.tolist()
    assert "other columns were not read: number" in data.notes[0]
    taken = open_data(str(tmp_path / "test.parquet"), label="label", n=2)
    torch.testing.assert_close(taken.read(0, 2).x, x[:2])


def test_one_of_several_columns_of_images_is_named_and_damaged_ones_are_refused(tmp_path: Path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "t.parquet"
    files = pa.array([encoded(image) for image in IMAGES])
    pq.write_table(pa.table({"a": files, "b": files, "label": pa.array(Y)}), path)
    with pytest.raises(UsageError, match="2 columns of images or of arrays: a, b") as caught:
        open_data(str(path), label="label")
    assert [remedy.words() for remedy in caught.value.remedies] == [("--x", "a"), ("--x", "b")]
    assert len(open_data(str(path), label="label", x="b")) == 12
    nowhere = pa.array(
        [{"bytes": None, "path": "a.png"}], pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    for column, message in (
        (nowhere, "has no content in row 0"),
        (pa.array([b"text"]), "cannot be read as PNG"),
        (pa.array([[[1, 2], [3]]]), "have lists of 1 to 2"),
    ):
        pq.write_table(pa.table({"image": column, "label": pa.array([0])}), path)
        with pytest.raises(TargetError, match=message):
            open_data(str(path), label="label")


class Mappings(torch.utils.data.Dataset):
    def __init__(self, inputs: str, labels: str):
        self.names = inputs, labels

    def __len__(self):
        return 12

    def __getitem__(self, row):
        return dict(zip(self.names, (X[row], int(Y[row])), strict=True))


def test_batches_may_be_mappings():
    loader = torch.utils.data.DataLoader(Mappings("pixel_values", "labels"), batch_size=5)
    rows = [{"image": Image.fromarray(image), "label": int(y)} for image, y in zip(IMAGES, Y, strict=True)]
    for data in (loader, Mappings("x", "label"), {"image": X, "labels": Y}, rows):
        torch.testing.assert_close(as_data(data).read(0, 12).x, X)
        assert as_data(data).read(0, 12).y.tolist() == Y.tolist()
    with pytest.raises(TargetError, match="the entries picture, class; one of pixel_values") as caught:
        as_data(Mappings("picture", "class"))
    assert caught.value.remedy.words() == ("--x", "picture")
    named = as_data(Mappings("picture", "class"), entries=("picture", "class"))
    torch.testing.assert_close(named.read(0, 12).x, X)
    with pytest.raises(UsageError, match="x='picture' is the name of an entry, but the data yield a tuple"):
        cleanly(nn.Flatten(), holdfast.open_data((X, Y), x="picture"))


@pytest.mark.parametrize("form", ["array", "tensor", "folder"])
def test_grey_images_in_colour_are_converted_for_a_network_of_grey_ones(form, tmp_path: Path):
    grey = IMAGES[..., 0]
    colour = np.repeat(grey[..., None], 3, axis=3)
    for row, image in enumerate(colour):
        (tmp_path / f"c{Y[row]}").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / f"c{Y[row]}" / f"{row:02}.png")
    net = nn.Sequential(nn.Flatten(), nn.Linear(20, 3))
    y = net(torch.from_numpy(grey).float() / 255).argmax(1)
    data = {
        "array": (colour, y),
        "tensor": (torch.from_numpy(colour).movedim(-1, 1), y),
        "folder": tmp_path,
    }[form]
    result = holdfast.assess(net, data, "linf:0.001", "fgsm", doubts=False)
    assert form == "folder" or float(result["clean_accuracy"]) == 1
    if form == "array":
        assert holdfast.attack(net, *data, "fgsm", "linf:0.1").x_adv.shape == colour.shape


# tables ----------------------------------------------------------------------------------------------

ROWS = [("0.75", "1", "0.25", "0"), ("0.5", "0", "0.5", "1"), ("0.5", "0.25", "0.75", "1")]


@pytest.mark.parametrize("separator", [";", "\t", "|", " "])
def test_the_remedies_for_another_separator_and_for_no_header_work(separator, tmp_path: Path):
    path, options = tmp_path / "t.csv", {"label": "y"}
    path.write_text("\n".join(separator.join(row) for row in (("a", "b", "c", "y"), *ROWS)))
    with pytest.raises(TargetError, match="its rows seem to be separated by") as caught:
        open_data(str(path), **options)
    separated = holdfast.open_data(path, separator=caught.value.remedy.value).separator
    assert open_data(str(path), **options, separator=separated).read(0, 3).x[0].tolist() == [0.75, 1, 0.25]
    path.write_text("\n".join(separator.join(row) for row in ROWS))
    with pytest.raises(TargetError, match=r"the first row of .* has numbers \(0.75, 1, 0.25, 0") as caught:
        open_data(str(path), **options, separator=separated)
    assert caught.value.remedy.words() == ("--no-header",)
    with pytest.raises(UsageError, match="no column 'y'; its columns are 0, 1, 2, 3"):
        open_data(str(path), **options, separator=separated, header=False)
    data = open_data(str(path), label="3", separator=separated, header=False)
    assert data.read(0, 3).x.tolist()[2] == [0.5, 0.25, 0.75] and data.read(0, 3).y.tolist() == [0, 1, 1]


def test_columns_without_a_header_get_the_names_of_the_models(tmp_path: Path):
    path = tmp_path / "t.csv"
    path.write_text("\n".join(",".join(row) for row in ROWS))
    fitted = DeclaredData(feature_names=("a", "b"))
    data = open_data(str(path), label="3", drop=("1",), header=False, expected=fitted)
    assert data.features == ("a", "b") and data.read(0, 3).x.tolist()[2] == [0.5, 0.75]
    assert any("0=a, 2=b" in note for note in data.notes)
    with pytest.raises(TargetError, match=r"fitted on 2 columns \(a, b\).*3 beside its label") as caught:
        open_data(str(path), label="3", header=False, expected=fitted)
    assert caught.value.remedy.words() == ("--drop", "COLUMN")
    with pytest.raises(TargetError, match="1 beside its label") as caught:
        open_data(str(path), label="3", drop=("0", "1"), header=False, expected=fitted)
    assert not caught.value.remedies


def test_numbers_as_names_of_columns_are_accepted_if_they_increase(tmp_path: Path):
    path = tmp_path / "t.csv"
    path.write_text("400.5,401.5,402.5,y\n1,0,1,0\n1,0,1,1\n")
    assert len(open_data(str(path), label="y")) == 2


# missing values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("constraint", [Linf(0.1), L2(0.3), L1(0.5), L0(2)])
def test_missing_values_stay_missing_and_count_as_no_change(constraint):
    x = torch.rand(40, 6, generator=torch.manual_seed(0))
    x[torch.rand(x.shape) < 0.3] = torch.nan
    moved = x + torch.randn(x.shape)
    points = constraint.project(moved, x, Bounds())
    assert torch.equal(points.isnan(), x.isnan()) and allowed(constraint, points, x, Bounds()).all()
    same = torch.where(x.isnan(), 0.0, points)
    torch.testing.assert_close(constraint.distance(points, x), constraint.distance(same, x.nan_to_num()))
    assert not allowed(constraint, x.nan_to_num(), x, Bounds())[x.isnan().any(1)].any()
    batch = Batch(x, torch.zeros(40, dtype=torch.int64), torch.arange(40))
    model = WithMissing(Classifier(lambda x: x), batch)
    inputs = without_missing(batch, Bounds()).x
    assert inputs.isfinite().all() and torch.equal(model(inputs).isnan(), x.isnan())
    assert torch.equal(with_missing(inputs, x).isnan(), x.isnan())


def test_a_model_that_handles_missing_values_is_attacked_in_the_other_features(tmp_path: Path):
    sklearn = pytest.importorskip("sklearn.ensemble")
    x = RNG.random((200, 3)).astype(np.float32)
    y = (x[:, 0] > 0.5).astype(int)
    x[::2, 1] = np.nan
    model = sklearn.HistGradientBoostingClassifier(max_iter=5).fit(x, y)
    result = holdfast.attack(model, x[:40], y[:40], "square", "linf:0.2,queries=50")
    changed = np.asarray(result.x_adv) - x[:40]
    assert np.array_equal(np.isnan(changed), np.isnan(x[:40])) and np.nanmax(np.abs(changed)) > 0.1
    path = tmp_path / "t.csv"
    rows = [
        ",".join("" if np.isnan(v) else str(v) for v in row) + f",{label}"
        for row, label in zip(x, y, strict=True)
    ]
    path.write_text("\n".join(("a,b,c,y", *rows)))
    attacked = holdfast.assess(
        model, holdfast.open_data(path, label="y"), "linf:0.2,queries=20", "square", doubts=False
    )
    assert float(attacked["robust_accuracy"]) < float(attacked["clean_accuracy"])
    with pytest.raises(TargetError, match="the value of b in row 0 of .* is missing"):
        cleanly(nn.Linear(3, 2), holdfast.open_data(path, label="y"))
    with pytest.raises(
        TargetError, match="NaN or infinity, first in row 0, and the model has no finite output"
    ):
        cleanly(nn.Linear(3, 2), (x, y))


# other libraries -------------------------------------------------------------------------------------


def test_sparse_matrices_are_read_and_given_to_estimators_that_need_them():
    linear, base = pytest.importorskip("sklearn.linear_model"), pytest.importorskip("sklearn.base")
    sparse = pytest.importorskip("scipy.sparse")
    x = sparse.random(60, 8, 0.3, format="csr", rng=np.random.default_rng(0))
    y = (np.asarray(x.sum(1)).ravel() > 1).astype(int)

    class OnlySparse(base.ClassifierMixin, base.BaseEstimator):
        def fit(self, x, y):
            self.inner_ = linear.LogisticRegression().fit(x, y)
            self.classes_, self.n_features_in_ = self.inner_.classes_, x.shape[1]
            return self

        def predict(self, x):
            return self.inner_.predict(x.tocsr())

    for model in (linear.LogisticRegression().fit(x, y), OnlySparse().fit(x, y)):
        result = holdfast.assess(model, (x, y), "linf:0.1,access=labels,queries=3", "rays", doubts=False)
        assert float(result["clean_accuracy"]) == pytest.approx((model.predict(x) == y).mean())


@pytest.mark.parametrize("objective", ["binary", "multiclass", "multiclassova"])
def test_models_of_lightgbm_are_opened_as_objects_and_from_files(objective, tmp_path: Path):
    lightgbm = pytest.importorskip("lightgbm")
    x = RNG.random((120, 3))
    y = (x[:, 0] > 0.5).astype(int) + (0 if objective == "binary" else x[:, 1] > 0.7)
    classes = {} if objective == "binary" else {"num_class": 3}
    settings = {"objective": objective, "verbose": -1, "num_leaves": 4, "min_data_in_leaf": 5, **classes}
    booster = lightgbm.train(settings, lightgbm.Dataset(x, y), 3)
    path = tmp_path / "model.txt"
    booster.save_model(path)
    scores = booster.predict(x.astype(np.float32))
    expected = (scores.argmax(1) if classes else scores > 0.5) == y
    for model in (booster, path):
        result = holdfast.assess(model, (x, y), "linf:0.1,access=labels,queries=3", "rays", doubts=False)
        assert float(result["clean_accuracy"]) == pytest.approx(expected.mean())
    if objective != "binary":
        return
    text = path.read_text()
    for damage in (
        (r"left_child=\S+", "left_child=9"),
        (r"split_feature=\S+", "split_feature=9"),
        ("tree_sizes=", "tree_sizes=9"),
        ("max_feature_idx=2", "max_feature_idx=-9"),
        ("tree\n", "trie\n"),
        (r"\[boosting: gbdt\]", "[boosting"),
        (r"\[boosting: gbdt\]", "[boost\0ing: gbdt]"),
        ("num_leaves=", "num_leaves=99\x0bnum_leaves="),
    ):
        path.write_text(re.sub(*damage, text, count=1))
        with pytest.raises(HoldfastError, match="no readable model of LightGBM"):
            holdfast.assess(path, (x, y))
