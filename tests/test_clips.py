"""An assessment of clips of sound: the files that it writes, its reports and an explanation."""

import base64
import io
import re
import shutil
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import holdfast
from holdfast.cli.app import run
from holdfast.core.errors import TargetError
from holdfast.io.data.clips import wav_content
from holdfast.io.data.data import open_data
from holdfast.runs.store.verify import verify
from holdfast.threats.parsing import parse_threat
from holdfast.verbs.opening.recipes import refuse_unheld

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
    place = folder.parent / "run"
    result = holdfast.assess(
        Pitch(),
        str(folder),
        threat="snr:20dB",
        suite="pgd",
        save_adversarial=True,
        run=str(place),
    )
    assert result.evidence.data["sampling_rate"] == RATE
    saved = open_data(str(place / "clips"))
    assert saved.classes == ("0", "1") and len(saved) > 2
    x_adv = saved.read(0, len(saved))
    clean = open_data(str(folder)).read(0, 6).x
    # each changed clip is near the clip from which it was computed alone
    ratios = 20 * (clean.norm(dim=1) / (x_adv.x[:, None] - clean).norm(dim=2)).log10()
    assert (ratios.max(1).values >= 20).all()
    assert (Pitch()(x_adv.x).argmax(1) != x_adv.y).all()
    padding = clean[ratios.argmax(1)] == 0
    assert not x_adv.x[padding & (padding.flip(1).cumprod(1).flip(1) > 0)].any()
    assert not verify(place).notes
    based = holdfast.assess(
        Pitch(), str(folder), threat="snr:20dB", suite="pgd", doubts=False, baseline=str(place)
    )
    reuse = based.attacks[0].reuse
    assert reuse.transferred == reuse.tried == len(saved)  # the stored clips themselves, without a search
    path = next((place / "clips").glob("*/*.wav"))
    other, link = path.with_name("other.wav"), path.with_name("others")
    shutil.copy(path, other)
    link.symlink_to(folder)
    assert verify(place).notes == tuple(
        f"{str(each)!r} is in no record of the chain" for each in (other, link)
    )
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(TargetError, match=r"wav' was changed"):
        verify(place)


@pytest.mark.parametrize(("method", "covers"), [("lipschitz", True), ("ibp", False)])
def test_a_certification_states_whether_its_method_covers_the_padding(
    folder: Path, method: str, covers: bool
) -> None:
    result = holdfast.certify(nn.Linear(512, 2), str(folder), threat="l2:0.01", method=method, n=6)
    noted = [note for note in result.summary()["notes"] if "4 of 6 clips are padded with zeros" in note]
    assert bool(noted) == covers


@pytest.mark.parametrize("recipe", ["auto", "pgd"])
def test_recipes_train_against_threats_on_clips(recipe: str) -> None:
    refuse_unheld(parse_threat("snr:40dB"), recipe)


def test_a_run_that_saves_no_clips_has_no_strange_files(folder: Path) -> None:
    place = folder.parent / "run"
    holdfast.assess(
        Pitch(),
        str(folder),
        threat="snr:100dB",
        suite="pgd",
        doubts=False,
        save_adversarial=True,
        run=str(place),
    )
    assert (place / "clips").is_dir() and not [*(place / "clips").glob("*/*")]
    assert not verify(place).notes


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("axes", [("n", "t"), ("n", 1, "t")])
def test_an_onnx_file_of_any_length_takes_the_length_of_the_clips(
    folder: Path, axes: tuple[str | int, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    onnx = pytest.importorskip("onnx")
    helper, kind = onnx.helper, onnx.TensorProto
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["high"], axes=[*range(1, len(axes))]),
        helper.make_node("Cast", ["sr"], ["rate"], to=kind.FLOAT),
        helper.make_node("Mul", ["high", "rate"], ["scaled"]),
        helper.make_node("Reshape", ["scaled", "shape"], ["score"]),
        helper.make_node("MatMul", ["score", "weights"], ["y"]),
    ]
    values = {"shape": (kind.INT64, [2], [-1, 1]), "weights": (kind.FLOAT, [1, 2], [1.0, -1.0])}
    inputs = [
        helper.make_tensor_value_info("x", kind.FLOAT, axes),
        helper.make_tensor_value_info("sr", kind.INT64, []),
    ]
    outputs = [helper.make_tensor_value_info("y", kind.FLOAT, ["n", 2])]
    tensors = [helper.make_tensor(name, *value) for name, value in values.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    path = folder.parent / "vad.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    assert run(["doctor", str(path), str(folder), "--constant", f"sr={RATE}"]) == 0
    assert "gradients reach the input" in capsys.readouterr().out


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
def test_an_explanation_plays_the_changed_clip_and_names_the_times_of_parts(folder: Path) -> None:
    explained = holdfast.explain(Pitch(), str(folder), threat="snr:20dB", index=0)
    page = folder.parent / "why.html"
    explained.write(page)
    html = page.read_text()
    assert html.count("data:audio/wav;base64,") == 3
    assert re.search(r"depends most on \d+\.\d to \d+\.\d ms", html)
    assert "dB below the clip; snr:20dB allows 20 dB below the clip" in explained.text()
