"""Good files of every format, a few kilobytes each, and some that would run code if the format were trusted."""

import gzip
import io
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from runs.stored import assessment

CANARY = "canary"
"""the file, in the current folder, that code of a file would make"""
CHAIN = "chain.jsonl"
FEATURES, CLASSES, SIDE = 4, 3, 6
_PLAIN = """\
model: mnist-cnn
data: mnist-mini
threat: linf:8/255
n: 100
seed: 3
bounds: [0, 1]
attacks:
- {use: PGD, steps: 10}
- use: Square
  queries: 100
gates: [robust_accuracy >= 0.2]
"""
_RICH = """\
model: m.onnx
data: d.npz
mean: [0.5]
std: [0.2]
suite: [pgd, square]
output: [r.html]
recipe: {use: auto}
device: cpu
classes: 10
label: 'a b'
"""
_CALLING = f"model: !!python/object/apply:os.mkdir [{CANARY}]\ndata: 2001-01-01\n"


@dataclass(frozen=True)
class File:
    """A file before it is damaged: its name in the folder that is opened, and its content."""

    name: str
    content: bytes
    sealed: bool = False
    """whether the chain of the run folder is computed again with it, as a stranger can"""


class Touching:
    """Unpickled, it makes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (CANARY,)


def saved(save: Callable[[Path], object], name: str) -> File:
    """What a function writes to a path with that name."""
    with TemporaryDirectory() as folder:
        save(Path(folder) / name)
        return File(name, (Path(folder) / name).read_bytes())


def repacked(content: bytes, edit: Callable[[str, bytes], bytes]) -> bytes:
    """A zip archive with its members edited, each compressed as it was."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        for member in old.infolist():
            new.writestr(member.filename, edit(member.filename, old.read(member)), member.compress_type)
    return out.getvalue()


def archives() -> Sequence[File]:
    """Arrays, stored, compressed and pickled."""
    x, y = np.linspace(0, 1, 8 * FEATURES, dtype=np.float32).reshape(8, FEATURES), np.arange(8) % CLASSES
    named = {"x": x, "y": y, "classes": np.array(["a", "b", "c"])}
    pickled = {"x": x, "y": np.array([Touching()] * 8)}
    return [
        saved(lambda path: np.savez(path, **named), "data.npz"),
        saved(lambda path: np.savez_compressed(path, **named), "data.npz"),
        saved(lambda path: np.savez(path, **pickled), "data.npz"),
    ]


def _rows() -> list[dict[str, object]]:
    return [
        {"a": k / 8, "b": 1e-3 * k, "c": k % 2, "split": "test", "label": "xyz"[k % CLASSES]}
        for k in range(8)
    ]


def _text() -> bytes:
    rows = _rows()
    lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    return "\n".join(lines).encode()


def tables() -> Sequence[File]:
    """A table as text."""
    return [
        File("data.csv", _text()),
        File("data.csv", b'\xef\xbb\xbfa,label\r\n"0.5",\'x\'\r\n"1e3",""\r\n'),
    ]


def zipped_tables() -> Sequence[File]:
    """A table as compressed text."""
    return [File("data.csv.gz", gzip.compress(_text(), mtime=0))]


def parquets() -> Sequence[File]:
    """A table of plain columns, and one with dictionaries, lists, times and other types."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    plain = pa.Table.from_pylist(_rows())
    rich = pa.table(
        {
            "l": pa.array([[1, 2], [3], None, []]),
            "t": pa.array([1, 2, 3, 4], pa.timestamp("ns", "UTC")),
            "d": pa.array(["u", "v", "u", None]).dictionary_encode(),
            "n": pa.array([1, None, 3, 2**60]),
            "m": pa.array([1, 2, 3, 4], pa.decimal128(9, 2)),
            "label": pa.array(["x", "y", "z", "x"]),
        }
    )
    images = pa.table(
        {
            "image": pa.array([{"bytes": picture.content, "path": "a.png"} for picture in pictures()[:2]]),
            "label": pa.array([0, 1]),
        }
    )
    return [
        saved(partial(pq.write_table, plain, compression="none"), "data.parquet"),
        saved(partial(pq.write_table, images, compression="none"), "data.parquet"),
        saved(partial(pq.write_table, plain, compression="gzip"), "data.parquet"),
        saved(partial(pq.write_table, rich, compression="none"), "data.parquet"),
    ]


def _picture(form: str, mode: str) -> File:
    out = io.BytesIO()
    pixels = np.arange(SIDE * SIDE * 3, dtype=np.uint8).reshape(SIDE, SIDE, 3)
    Image.fromarray(pixels).convert(mode).save(out, form)
    return File("a/0.png", out.getvalue())


def pictures() -> Sequence[File]:
    """Images of every format that is decoded."""
    modes = {
        "PNG": ("RGB", "P", "L"),
        "JPEG": ("RGB", "L"),
        "WEBP": ("RGB",),
        "GIF": ("P",),
        "BMP": ("RGB", "P"),
    }
    return [_picture(form, mode) for form, some in modes.items() for mode in some] + [_picture("PPM", "RGB")]


def described() -> Sequence[File]:
    """Weights that name a network of the catalogue."""
    from holdfast.io.models.architectures import ARCHITECTURES
    from holdfast.io.models.weights import written

    common = {
        "bounds": [0, 1],
        "mean": [0.5],
        "std": [0.25],
        "classes": CLASSES,
        "class_names": ["a", "b", "c"],
    }
    found = []
    for name, arguments in (
        ("mlp", {"features": FEATURES, "classes": CLASSES, "width": 3, "depth": 1}),
        ("cnn", {"channels": 1, "side": 4, "classes": CLASSES, "width": 2, "depth": 1, "hidden": 2}),
        ("lipschitz-aol", {"side": 4, "classes": CLASSES, "width": 2, "depth": 1, "hidden": 4}),
    ):
        net = ARCHITECTURES[name](**arguments)
        about = {"architecture": name, "arguments": arguments, **common}
        found.append(File("model.safetensors", written(net, about)))
    return found


def state_dicts() -> Sequence[File]:
    """Weights as torch saves them now and did before, nested, sparse, and two files that call a function."""
    from holdfast.io.models.architectures import mlp

    weights = mlp(FEATURES, CLASSES, 3, 1).state_dict()
    sparse = {**weights, "1.weight": weights["1.weight"].to_sparse()}
    kinds = [
        ({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in weights.items()}}, True),
        (weights, False),
        (sparse, True),
        ({**weights, "extra": Touching()}, True),
    ]
    return [
        saved(partial(torch.save, content, _use_new_zipfile_serialization=new), "model.pt")
        for content, new in kinds
    ] + [File("model.pt", pickle.dumps(Touching()))]


def _network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.BatchNorm2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * (SIDE - 2) ** 2, CLASSES),
    ).eval()


def programs() -> Sequence[File]:
    """Exported programs of a free and a fixed batch, and ones with a pickled member and code in an expression."""
    example, found = torch.rand(2, 1, SIDE, SIDE), []
    for sizes in (({0: torch.export.Dim("batch")},), None):
        program = torch.export.export(_network(), (example,), dynamic_shapes=sizes)
        found.append(saved(partial(torch.export.save, program), "model.pt2"))
    pickled = saved(partial(torch.save, Touching()), "inputs.pt").content
    evil = f"__import__('os').mkdir('{CANARY}') or Symbol('s".encode()
    free, fixed = (file.content for file in found)
    bad = [
        repacked(fixed, lambda name, content: pickled if name.endswith(".pt") else content),
        repacked(free, lambda _, content: content.replace(b"Symbol('s", evil)),
    ]
    return [*found, *(File("model.pt2", content) for content in bad)]


def graphs() -> Sequence[File]:
    """A convolutional network with a local function, and a loop."""
    from onnx import TensorProto, helper, numpy_helper

    sets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]

    def tensor(name: str, *shape: int) -> Any:
        values = torch.linspace(-1, 1, int(np.prod(shape))).reshape(shape).numpy()
        return numpy_helper.from_array(values, name)

    def model(nodes: list[Any], tensors: list[Any], functions: Sequence[Any] = (), *shape: object) -> bytes:
        ends = [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *shape]),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", CLASSES]),
        ]
        graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
        made = helper.make_model(graph, opset_imports=sets, functions=list(functions))
        made.ir_version = 8
        return bytes(made.SerializeToString())

    own = helper.make_function("own", "Act", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], sets)
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["c"], kernel_shape=[3, 3]),
        helper.make_node("Act", ["c"], ["r"], domain="own"),
        helper.make_node("Flatten", ["r"], ["f"], axis=1),
        helper.make_node("Gemm", ["f", "w"], ["y"], alpha=1.0, transB=1),
    ]
    convolved = model(nodes, [tensor("k", 2, 1, 3, 3), tensor("w", CLASSES, 32)], [own], 1, SIDE, SIDE)
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Add", ["v", "v"], ["w"])],
        "body",
        [
            helper.make_tensor_value_info("k", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("w", TensorProto.FLOAT, None),
        ],
    )
    starts = [numpy_helper.from_array(np.array(3), "n"), numpy_helper.from_array(np.array(True), "t")]
    looped = model([helper.make_node("Loop", ["n", "t", "x"], ["y"], body=body)], starts, (), CLASSES)
    return [File("model.onnx", convolved), File("model.onnx", looped)]


def _examples() -> tuple[Any, Any]:
    y = np.arange(24) % CLASSES
    x = np.random.default_rng(0).normal(size=(24, FEATURES)).astype(np.float32) + y[:, None]
    return x, y


def estimators() -> Sequence[File]:
    """Linear models, a support vector machine, naive Bayes, and a pipeline that would write a file."""
    import skops.io as sio
    from sklearn.linear_model import LogisticRegression
    from sklearn.naive_bayes import GaussianNB
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, StandardScaler
    from sklearn.svm import SVC

    x, y = _examples()
    fitted = [
        make_pipeline(StandardScaler(), LogisticRegression()).fit(x, y),
        SVC().fit(x, y),
        GaussianNB().fit(x, y),
    ]
    writing = make_pipeline(FunctionTransformer(partial(np.savetxt, CANARY)), LogisticRegression())
    return [saved(partial(sio.dump, found), "model.skops") for found in (*fitted, writing)]


def boosters(suffix: str) -> Sequence[File]:
    """Boosters of three classes, and one of two with categories and dropped trees."""
    import xgboost

    x, y = _examples()
    many = {"objective": "multi:softprob", "num_class": CLASSES, "max_depth": 2, "nthread": 1}
    two = {"objective": "binary:logistic", "booster": "dart", "max_depth": 2, "nthread": 1}
    kinds = ["q", "q", "q", "c"]
    codes = np.column_stack((x[:, :3], y))
    mixed = xgboost.DMatrix(codes, y > 0, feature_types=kinds, enable_categorical=True)
    found = [xgboost.train(many, xgboost.DMatrix(x, y), 2), xgboost.train(two, mixed, 2)]
    return [saved(booster.save_model, f"model.{suffix}") for booster in found]


def lightgbm_boosters() -> Sequence[File]:
    """Boosters of LightGBM of three classes, and one of two with categories."""
    import lightgbm

    x, y = _examples()
    codes = np.column_stack((x[:, :3], y))
    settings = {"num_leaves": 4, "min_data_in_leaf": 2, "min_data_in_bin": 1, "verbose": -1, "num_threads": 1}
    many = {"objective": "multiclass", "num_class": CLASSES, **settings}
    two = {"objective": "binary", "min_data_per_group": 1, "cat_smooth": 0, **settings}
    found = [
        lightgbm.train(many, lightgbm.Dataset(x, y), 2),
        lightgbm.train(two, lightgbm.Dataset(codes, y > 0, categorical_feature=[3]), 2),
    ]
    return [saved(booster.save_model, "model.txt") for booster in found]


def configurations() -> Sequence[File]:
    """Configurations with every kind of value, and one that calls a function."""
    return [File("holdfast.yaml", text.encode()) for text in (_PLAIN, _RICH, _CALLING)]


def runs() -> Sequence[File]:
    """The files of a run folder."""
    return [
        File(path.name, path.read_bytes())
        for path in sorted(assessment().iterdir())
        if path.name != "lease.lock"
    ]


_MADE: Mapping[str, Callable[[], Sequence[File]]] = {
    "npz": archives,
    "csv": tables,
    "csv.gz": zipped_tables,
    "parquet": parquets,
    "images": pictures,
    "safetensors": described,
    "pt": state_dicts,
    "pt2": programs,
    "onnx": graphs,
    "skops": estimators,
    "xgboost.json": partial(boosters, "json"),
    "xgboost.ubj": partial(boosters, "ubj"),
    "lightgbm.txt": lightgbm_boosters,
    "yaml": configurations,
    "run": runs,
}
FORMATS = tuple(_MADE)
"""every format of a file that a user gives"""


@cache
def good(form: str) -> tuple[File, ...]:
    """The files of a format; `ImportError` where the library that writes it is absent."""
    torch.manual_seed(0)
    return tuple(_MADE[form]())


def beside(form: str) -> Sequence[File]:
    """What stands beside a damaged file in the folder that is opened."""
    if form == "images":
        return [File(name, _picture("PNG", "RGB").content) for name in ("a/1.png", "b/0.png")]
    return good(form) if form == "run" else ()
