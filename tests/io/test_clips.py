"""Folders of clips: what is read, and the message for each file that cannot be."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Classifier
from holdfast.io.data.clips import SIGNAL_BOUNDS
from holdfast.io.data.data import open_data
from holdfast.io.data.layouts import DeclaredData
from holdfast.io.remote.probing import ProbedClassifier

soundfile = pytest.importorskip("soundfile")

pytestmark = pytest.mark.usefixtures("in_this_process")  # tests/test_clips.py decodes in another one
RNG = np.random.default_rng(0)
RATE = 8000


def noise(n: int, *channels: int) -> np.ndarray:
    return RNG.integers(-3000, 3000, (n, *channels), dtype=np.int16)


class Spectra(nn.Module):
    """A classifier of mono clips by short-time spectra of 64 samples."""

    def forward(self, x: Tensor) -> Tensor:
        window = torch.hann_window(64)
        return torch.stft(x, 64, 32, window=window, return_complex=True).abs().mean(-1)[:, :2]


def for_spectra() -> DeclaredData:
    model = Classifier(Spectra(), bounds=SIGNAL_BOUNDS)
    return DeclaredData(SIGNAL_BOUNDS, probe=ProbedClassifier(model))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "clips"
    for name in "ab":
        (root / name).mkdir(parents=True)
        soundfile.write(root / name / "1.wav", noise(240), RATE)
    return root


def test_clips_of_16_bits_are_scaled_and_padded_to_the_longest(folder: Path) -> None:
    longer = noise(400)
    soundfile.write(folder / "b" / "2.flac", longer, RATE)
    data = open_data(str(folder), expected=for_spectra())
    assert (data.x.dtype, data.x.shape, data.sampling_rate) == (np.int16, (3, 400), RATE)
    batch = data.read(0, 3)
    assert batch.y.tolist() == [0, 1, 1] and not batch.x[:2, 240:].any()
    torch.testing.assert_close(batch.x[2], torch.from_numpy(longer).float() / 32768, rtol=0, atol=0)
    assert data.notes == ("3 clips of 0.03 to 0.05 s at 8,000 Hz, padded with zeros to 0.05 s",)
    assert open_data(str(folder), n=1).x.shape == (1, 400)  # whatever is selected


def test_clips_of_24_bits_and_of_several_channels_keep_them(folder: Path) -> None:
    values = RNG.uniform(-0.1, 0.1, (240, 2))
    for name in "ab":
        soundfile.write(folder / name / "1.wav", values, RATE, subtype="PCM_24")
    x = open_data(str(folder)).read(0, 2).x
    assert x.shape == (2, 2, 240)
    torch.testing.assert_close(x[0], torch.from_numpy(values.T).float(), rtol=0, atol=2**-22)


def test_compressed_clips_that_have_no_random_access_are_decoded(folder: Path) -> None:
    soundfile.write(folder / "b" / "2.wav", noise(320), RATE, subtype="GSM610")
    assert open_data(str(folder)).read(0, 3).x[2].any()


def test_clips_that_were_written_to_a_pipe_state_no_size(folder: Path) -> None:
    content = bytearray((folder / "a" / "1.wav").read_bytes())
    content[40:44] = b"\xff" * 4
    (folder / "b" / "2.wav").write_bytes(content)
    assert open_data(str(folder)).x.shape == (3, 240)


def test_resampling_keeps_a_tone_and_removes_what_the_lower_rate_cannot_represent(folder: Path) -> None:
    t = np.arange(1600) / 16_000
    low, high = (0.5 * np.sin(2 * np.pi * hz * t) for hz in (500, 7000))
    soundfile.write(folder / "a" / "1.wav", low, 16_000)
    soundfile.write(folder / "b" / "1.wav", high, 16_000)
    data = open_data(str(folder), sampling_rate=RATE)
    x = data.read(0, 2).x[:, 100:700]
    expected = torch.from_numpy(low[200:1400:2]).float()
    assert (x[0] - expected).abs().max() < 0.005 and x[1].abs().max() < 0.005
    assert data.notes[0] == "2 of 2 clips were resampled to 8,000 Hz"


def test_silent_and_clipped_clips_are_counted(folder: Path) -> None:
    loud = np.clip(noise(240).astype(int) * 100, -32768, 32767).astype(np.int16)
    soundfile.write(folder / "a" / "2.wav", loud, RATE)
    soundfile.write(folder / "b" / "2.wav", np.zeros(100, np.int16), RATE)
    notes = " | ".join(open_data(str(folder)).notes)
    assert (
        "1 of 4 clips has no sound, first '" in notes and "b/2.wav'; silence has no signal-to-noise" in notes
    )
    assert "1 of 4 clips is clipped (3 or more successive samples at full scale), first '" in notes
    declared = open_data(str(array_of(folder)), sampling_rate=RATE, expected=DeclaredData(SIGNAL_BOUNDS))
    assert "1 of 2 clips has no sound, first row 1; silence" in " | ".join(declared.notes)


def array_of(folder: Path) -> Path:
    path = folder.parent / "clips.npz"
    np.savez(path, x=np.stack([noise(100), np.zeros(100, np.int16)]), y=np.arange(2))
    return path


def test_arrays_of_16_bits_are_scaled_if_their_sampling_rate_is_declared(folder: Path) -> None:
    data = open_data(str(array_of(folder)), sampling_rate=RATE, expected=DeclaredData(SIGNAL_BOUNDS))
    assert (data.scale, data.sampling_rate) == (32768, RATE) and data.read(0, 2).x.abs().max() < 0.1


def written(folder: Path, fault: str) -> None:
    """Write the file b/2.wav (or .flac) with a fault."""
    path, good = folder / "b" / "2.wav", (folder / "a" / "1.wav").read_bytes()
    if fault == "rate":
        soundfile.write(path, noise(240), 16_000)
    elif fault == "channels":
        soundfile.write(path, noise(240, 2), RATE)
    elif fault in ("nan", "loud"):
        values = np.full(240, {"nan": np.nan, "loud": 1.5}[fault], np.float32)
        soundfile.write(path, values, RATE, subtype="FLOAT")
    elif fault == "no bytes":
        path.write_bytes(b"")
    elif fault == "no samples":
        soundfile.write(path, noise(0), RATE)
    elif fault == "text":
        path.write_text("this is a text, and no clip\n" * 9)
    elif fault == "codec":
        path.write_bytes(good[:20] + (0x2000).to_bytes(2, "little") + good[22:])
    elif fault == "format":
        soundfile.write(path.with_suffix(".ogg"), noise(240), RATE)
        path.with_suffix(".ogg").rename(path)
    elif fault == "shortened":
        path.write_bytes(good[:-100])
    elif fault == "truncated":
        soundfile.write(path.with_suffix(".flac"), noise(40_000), RATE)
        content = path.with_suffix(".flac").read_bytes()
        path.with_suffix(".flac").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            "rate",
            r"1.wav' has 8,000 Hz, '.*b/2.wav' 16,000 Hz; one value was expected; give sampling_rate=8000",
        ),
        ("channels", r"1.wav' has 1, '.*b/2.wav' 2; one value was expected: convert them to mono"),
        ("nan", r"b/2.wav' has nan at sample 0; numbers from -1 to 1 were expected: repair"),
        ("loud", r"b/2.wav' has 1.5 at sample 0; numbers from -1 to 1 were expected: divide"),
        ("no bytes", r"b/2.wav' is empty \(0 bytes\)"),
        ("no samples", r"b/2.wav' has 0 samples, and at least 1 was expected"),
        ("text", r"b/2.wav' cannot be read as WAV or FLAC: Format not recognised"),
        ("codec", r"b/2.wav' cannot be read as WAV or FLAC: "),
        ("format", r"b/2.wav' has the format OGG; WAV or FLAC was expected"),
        (
            "shortened",
            r"b/2.wav' is truncated: it has 380 bytes of samples, and its header states 480; write",
        ),
        ("truncated", r"b/2.flac' cannot be read as WAV or FLAC: "),
    ],
)
def test_a_file_that_cannot_be_used_is_named_in_one_line(folder: Path, fault: str, message: str) -> None:
    written(folder, fault)
    with pytest.raises(TargetError, match=message) as raised:
        open_data(str(folder))
    assert "\n" not in str(raised.value)


def test_clips_that_do_not_suit_the_model_are_named(folder: Path) -> None:
    for name in "ab":
        soundfile.write(folder / name / "1.wav", noise(16), RATE)
    with pytest.raises(
        TargetError, match=r"samples \(0.002 s at 8,000 Hz\), the length of the longest, '.*1.wav'"
    ):
        open_data(str(folder), expected=for_spectra())
    for name in "ab":
        soundfile.write(folder / name / "1.wav", noise(240, 2), RATE)
    with pytest.raises(
        TargetError, match=r"1.wav' has 2 channels, and the model accepts one; .* as in x.mean\(1\)"
    ):
        open_data(str(folder), expected=for_spectra())


@pytest.mark.parametrize("axis", [1, 2])
def test_arrays_of_clips_that_do_not_suit_the_model_are_named(folder: Path, axis: int) -> None:
    path = folder.parent / "clips.npz"
    np.savez(path, x=np.stack([noise(240, 2).T if axis == 1 else noise(240, 2)] * 2), y=np.arange(2))
    with pytest.raises(TargetError, match=rf"clips.npz' have 2 channels, .* x.mean\(axis={axis}\), or"):
        open_data(str(path), sampling_rate=RATE, expected=for_spectra())
    np.savez(path, x=np.stack([noise(16)] * 2), y=np.arange(2))
    with pytest.raises(TargetError, match=r"16 samples \(0.002 s at 8,000 Hz\), as in '.*clips.npz'"):
        open_data(str(path), sampling_rate=RATE, expected=for_spectra())


def test_a_sampling_rate_is_refused_for_images(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(UsageError, match="has no clips, .* leave out sampling_rate"):
        open_data(str(tmp_path), sampling_rate=RATE)


def test_a_link_out_of_the_folder_is_refused(folder: Path) -> None:
    shutil.move(folder / "b" / "1.wav", folder.parent / "1.wav")
    (folder / "b" / "1.wav").symlink_to(folder.parent / "1.wav")
    with pytest.raises(TargetError, match="is a link to .*follow_links=True"):
        open_data(str(folder))
    assert len(open_data(str(folder), follow_links=True)) == 2
