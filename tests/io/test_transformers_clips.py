"""Folders of transformers with a classifier of clips: opened with the numbers of transformers itself."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import holdfast
from holdfast.core.errors import TargetError, UsageError
from holdfast.io.data.clips import wav_content
from holdfast.io.models.models import Declared, open_model
from holdfast.runs.harden.attempt_training import refuse_untrainable
from holdfast.verbs.serve_opening import server_setup
from holdfast.verbs.settings import Serve

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
RATE = 8000
X = torch.from_numpy(np.random.default_rng(0).normal(0.02, 0.1, (4, 700)).astype(np.float32)).clamp(-1, 1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with random networks: `group` without masks, `layer` with masks of the padding, and one on spectra."""
    place = tmp_path_factory.mktemp("hub")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    front = {"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2}
    more = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        for name in ("group", "layer"):
            config = transformers.Wav2Vec2Config(**sizes, **front, **more, feat_extract_norm=name)
            transformers.Wav2Vec2ForSequenceClassification(config).save_pretrained(place / name)
            extractor = transformers.Wav2Vec2FeatureExtractor(
                sampling_rate=RATE, return_attention_mask=name == "layer"
            )
            extractor.save_pretrained(place / name)
        config = transformers.ASTConfig(**sizes, max_length=32, num_mel_bins=32)
        transformers.ASTForAudioClassification(config).save_pretrained(place / "spectra")
        transformers.ASTFeatureExtractor(num_mel_bins=32, max_length=32).save_pretrained(place / "spectra")
    return place


@pytest.mark.parametrize("name", ["group", "layer"])
def test_the_logits_are_those_of_the_extractor_and_the_network(folders: Path, name: str) -> None:
    model = open_model(str(folders / name), declared=Declared()).model
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folders / name)
    net = transformers.AutoModelForAudioClassification.from_pretrained(folders / name).eval()
    x = X.clone()
    if name == "layer":  # without masks, the extractor normalises over the padding as well
        x[1:, 500:] = 0
    clips = [clip[: int(clip.nonzero().max()) + 1].numpy() for clip in x]
    inputs = extractor(clips, sampling_rate=RATE, return_tensors="pt", padding=True)
    x.requires_grad_()
    logits = model(x)
    torch.testing.assert_close(logits, net(**inputs).logits, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), x)
    assert (gradient.abs().amax(1) > 0).all()


def test_folders_are_assessed_on_clips_of_the_rate_that_they_state(folders: Path, tmp_path: Path) -> None:
    data = tmp_path / "clips"
    for place in range(2):
        (data / f"LABEL_{place}").mkdir(parents=True)
        (data / f"LABEL_{place}" / "1.wav").write_bytes(wav_content(X[place], RATE))
    result = holdfast.assess(str(folders / "layer"), str(data), threat="snr:20dB", suite="pgd")
    assert result.evidence.data["sampling_rate"] == RATE
    other = holdfast.open_data(str(data), sampling_rate=4000)
    with pytest.raises(
        UsageError, match=r"is 4,000 Hz, and the feature extractor of the model takes 8,000 Hz; "
    ):
        holdfast.assess(str(folders / "layer"), other, threat="snr:20dB")
    arrays = tmp_path / "clips.npz"
    np.savez(arrays, x=X.numpy()[:2], y=np.arange(2))
    with pytest.raises(UsageError, match=r"of .*clips.npz is unknown, .*; give .*sampling_rate=8000"):
        holdfast.assess(str(folders / "layer"), str(arrays), threat="linf:0.001")
    with pytest.raises(UsageError, match="is 4000, and the feature extractor of the model takes 8000"):
        server_setup(Serve(model=str(folders / "layer"), sampling_rate=4000, input_shape=(700,)))
    with pytest.raises(TargetError, match="harden cannot write to a folder"):
        refuse_untrainable(open_model(str(folders / "layer"), declared=Declared()).model)


def test_folders_that_cannot_be_opened_are_refused_with_the_reason(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"feature extractor 'ASTFeatureExtractor', .*give file.py:factory"):
        open_model(str(folders / "spectra"), declared=Declared())
    with pytest.raises(UsageError, match="is a model of clips, and the threat is on texts"):
        open_model(str(folders / "group"), declared=Declared(texts=True))
    copy = Path(shutil.copytree(folders / "spectra", tmp_path / "copy"))
    (copy / "preprocessor_config.json").unlink()
    with pytest.raises(TargetError, match="has no preprocessor_config.json, which states"):
        open_model(str(copy), declared=Declared())
