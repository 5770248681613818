"""Folders of transformers with a classifier of images: opened offline, with the numbers of transformers itself."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from holdfast.cli.app import run
from holdfast.core.errors import TargetError, UsageError
from holdfast.io.models.models import Declared, open_model

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
CLASSES = {0: "cat", 1: "dog", 2: "owl"}
SIDE = 32
IMAGES = np.random.default_rng(0).integers(0, 256, (4, SIDE, SIDE, 3), dtype=np.uint8)
X = torch.from_numpy(IMAGES).permute(0, 3, 1, 2) / 255


def _vit():
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=SIDE,
        patch_size=8,
        initializer_range=0.5,
        id2label=CLASSES,
    )
    size = {"height": SIDE, "width": SIDE}
    mean, std = [0.2, 0.4, 0.6], [0.3, 0.5, 0.7]
    return config, transformers.ViTImageProcessor(size=size, image_mean=mean, image_std=std)


def _resnet():
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", id2label=CLASSES
    )
    return config, transformers.ViTImageProcessor(size={"height": SIDE, "width": SIDE}, resample=3)


def _convnext():
    config = transformers.ConvNextConfig(
        hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], initializer_range=0.5, id2label=CLASSES
    )
    return config, transformers.ConvNextImageProcessor(size={"shortest_edge": SIDE})


def _mobilevit():  # the order of its channels is blue, green, red
    config = transformers.MobileViTConfig(
        image_size=SIDE,
        hidden_sizes=[16, 16, 16],
        neck_hidden_sizes=[8] * 7,
        num_attention_heads=2,
        id2label=CLASSES,
    )
    crop = {"height": SIDE, "width": SIDE}
    return config, transformers.MobileViTImageProcessor(size={"shortest_edge": 36}, crop_size=crop)


KINDS = {"vit": _vit, "resnet": _resnet, "convnext": _convnext, "mobilevit": _mobilevit}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders with random networks of several kinds, by the kind."""
    place = tmp_path_factory.mktemp("hub")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        for name, make in KINDS.items():
            config, processor = make()
            net = transformers.AutoModelForImageClassification.from_config(config)
            for weight in net.parameters():
                if weight.dim() > 1:
                    torch.nn.init.kaiming_normal_(weight)
            net.save_pretrained(place / name)
            processor.save_pretrained(place / name)
    return {name: place / name for name in KINDS}


@pytest.fixture
def copy(folders, tmp_path):
    """A copy of the folder of a ViT that a test may change."""
    return Path(shutil.copytree(folders["vit"], tmp_path / "model"))


def by_transformers(folder, images, **steps):
    """The logits that transformers computes for images in uint8, with its own processor."""
    net = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        return net(**processor([*images], return_tensors="pt", **steps)).logits


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers_with_the_processor(folders, kind):
    model = open_model(str(folders[kind])).model
    assert model.class_names == ("cat", "dog", "owl") and model.access == "gradients"
    x = X.clone().requires_grad_()
    logits = model(x)
    # the images have the size after resizing and cropping already
    expected = by_transformers(folders[kind], IMAGES, do_resize=False, do_center_crop=False)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), x)
    assert gradient.abs().flatten(1).amax(1).min() > 0


def test_logits_are_those_of_the_pipeline(folders):
    pipeline = transformers.pipeline("image-classification", model=str(folders["vit"]))
    results = pipeline([Image.fromarray(image) for image in IMAGES], function_to_apply="none", top_k=3)
    names = list(CLASSES.values())
    expected = [sorted(each, key=lambda entry: names.index(entry["label"])) for each in results]
    scores = torch.tensor([[entry["score"] for entry in each] for each in expected])
    torch.testing.assert_close(open_model(str(folders["vit"])).model(X), scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_images_of_another_size_are_resized_inside_the_model_as_by_the_processor(folders, kind):
    opened = open_model(str(folders[kind]))
    (note,) = opened.notes
    assert "images of 32 x 32" in note and note.endswith("; others are resized to it inside the model")
    # Pillow rounds and clamps after each of two directions: moderate values are not clamped
    small = np.random.default_rng(1).integers(64, 192, (4, 12, 20, 3), dtype=np.uint8)
    x = (torch.from_numpy(small).permute(0, 3, 1, 2) / 255).requires_grad_()
    processor = transformers.AutoImageProcessor.from_pretrained(folders[kind])
    expected = processor([*small], return_tensors="pt")["pixel_values"]
    assert (opened.model.net.processed(x) - expected).abs().max() < 2.5 / 255 / min(processor.image_std)
    assert opened.model(x).requires_grad


@pytest.mark.parametrize("kind", ["convnext", "mobilevit"])
def test_images_that_the_processor_would_crop_are_refused_with_the_size(folders, kind):
    with pytest.raises(
        TargetError, match=r"has the shape \(3, 48, 48\), and the network takes 32 x 32; resize or crop"
    ):
        open_model(str(folders[kind])).model(torch.rand(2, 3, 48, 48))


def test_a_folder_is_assessed_and_examined(folders, tmp_path, monkeypatch, capsys, in_this_process):
    monkeypatch.chdir(tmp_path)
    labels = open_model(str(folders["vit"])).model(X).argmax(1).numpy()
    np.savez("images.npz", x=IMAGES, y=labels)
    flags = [str(folders["vit"]), "images.npz"]
    assert run(["assess", *flags, "--threat", "linf:1/255", "--suite", "Sprint", "-o", "a.json"]) == 0
    content = json.loads(Path("a.json").read_text())
    assert content["metrics"]["clean_accuracy"]["value"] == 1
    assert content["model"]["how"] == "transformers"
    assert run(["doctor", *flags]) == 0
    np.savez("fit.npz", x=IMAGES[:, ::-1], y=labels)
    assert run(["harden", *flags, "--fit", "fit.npz", "--threat", "linf:1/255", "--budget", "1min"]) == 3
    assert "AutoModelForImageClassification.from_pretrained(FOLDER)" in capsys.readouterr().err
    assert run(["assess", *flags, "--threat", "text:edits=1,words=2"]) == 2


def edited(folder, file, **changes):
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | changes))


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("preprocessor_config.json", {"size": {"height": 10**6, "width": 10**6}}, "number 1e.06; sizes"),
        ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "a.B"}}, "auto_map"),
        ("config.json", {"hidden_size": 2**20}, "do not fit"),
        ("config.json", {"num_hidden_layers": 10**9}, "do not fit"),
        ("config.json", {"num_hidden_layers": 0}, "unexpected vit.*; train or save it again"),
        ("config.json", {"id2label": {"0": "a", "1": "a", "2": "b"}}, "distinct name"),
    ],
)
def test_a_folder_that_is_not_as_expected_is_refused(copy, file, changes, words):
    edited(copy, file, **changes)
    with pytest.raises(TargetError, match=words):
        open_model(str(copy))


def test_a_processor_that_is_missing_or_does_more_than_scale_is_refused(copy):
    edited(copy, "preprocessor_config.json", image_processor_type="ImageGPTImageProcessor")
    with pytest.raises(TargetError, match="ImageGPT.*another way than by size, scale, mean and std"):
        open_model(str(copy))
    (copy / "preprocessor_config.json").unlink()
    with pytest.raises(TargetError, match="no preprocessor_config.json.*processor.save_pretrained"):
        open_model(str(copy))
    (copy / "preprocessor_config.json").write_text("{}")
    with pytest.raises(UsageError, match="is a model of images, and the threat is on texts"):
        open_model(str(copy), declared=Declared(texts=True))
