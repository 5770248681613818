"""An assessment of clips of sound: the files that it writes, its reports and an explanation."""

import base64
import io
import re
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import holdfast
from holdfast.io.data.clips import wav_content
from holdfast.io.data.data import open_data

pytest.importorskip("soundfile")
RATE, RNG = 8000, np.random.default_rng(0)


class Pitch(nn.Module):
    """Returns which of two tones has more power. Most of the power of both is in one line of the spectrum."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        power = torch.fft.rfft(x[:, :512]).abs().square().clamp_min(1e-12).log()
        return power[:, (32, 96)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "clips"
    t = np.arange(512) / 512
    for name, low, high in (("0", 0.2, 0.18), ("1", 0.18, 0.2)):
        (root / name).mkdir(parents=True)
        for number in range(3):
            tones = low * np.sin(2 * np.pi * 32 * t) + high * np.sin(2 * np.pi * 96 * t)
            samples = tones[: 512 - 40 * number] * RNG.uniform(0.5, 1)
            content = wav_content(torch.from_numpy(samples), RATE)
            (root / name / f"{number}.wav").write_bytes(content)
    return root


def test_saved_clips_are_broken_and_allowed_when_they_are_read_again(folder: Path) -> None:
    run = folder.parent / "run"
    result = holdfast.assess(
        Pitch(),
        str(folder),
        threat="snr:20dB",
        suite="pgd",
        save_adversarial=True,
        run=str(run),
    )
    assert result.evidence.data["sampling_rate"] == RATE
    saved = open_data(str(run / "clips"))
    assert saved.classes == ("0", "1") and len(saved) > 2
    x_adv = saved.read(0, len(saved))
    clean = open_data(str(folder)).read(0, 6).x
    # each changed clip is near the clip from which it was computed alone
    ratios = 20 * (clean.norm(dim=1) / (x_adv.x[:, None] - clean).norm(dim=2)).log10()
    assert (ratios.max(1).values >= 20).all()
    assert (Pitch()(x_adv.x).argmax(1) != x_adv.y).all()
    padding = clean[ratios.argmax(1)] == 0
    assert not x_adv.x[padding & (padding.flip(1).cumprod(1).flip(1) > 0)].any()


@pytest.mark.usefixtures("in_this_process")
def test_reports_show_and_play_clips_and_state_how_loud_the_change_is(folder: Path) -> None:
    result = holdfast.assess(Pitch(), str(folder), threat="snr:20dB", suite="pgd")
    page, text = (folder.parent / f"r.{suffix}" for suffix in ("html", "md"))
    result.write(page)
    result.write(text)
    html = page.read_text()
    assert "media-src data:" in html and "<script" not in html
    sounds = re.findall(r'src="data:audio/wav;base64,([^"]+)"', html)
    example = result.summary()["examples"][0]
    assert len(sounds) == 2 * len(result.summary()["examples"]) and example["kind"] == "signal"
    with wave.open(io.BytesIO(base64.b64decode(sounds[0]))) as file:
        assert (file.getframerate(), file.getsampwidth(), file.getnchannels()) == (RATE, 2, 1)
    assert example["snr_db"] >= 20
    assert f"the change is {example['snr_db']:.1f} dB below the clip" in text.read_text()
    assert "dB below the clips (signal-to-noise ratio)" in text.read_text()


@pytest.mark.usefixtures("in_this_process")
def test_an_explanation_plays_the_changed_clip_and_names_parts_in_seconds(folder: Path) -> None:
    explained = holdfast.explain(Pitch(), str(folder), threat="snr:20dB", index=0)
    page = folder.parent / "why.html"
    explained.write(page)
    html = page.read_text()
    assert html.count("data:audio/wav;base64,") == 3
    assert re.search(r"depends most on \d\.\d\d to \d\.\d\d s", html)
    assert "dB below the clip; snr:20dB allows 20 dB below the clip" in explained.text()
