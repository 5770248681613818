"""The spoken digits of FSDD, and a small network on their log-spectrograms, which is trained by committed code.

python -m benchmarks.spoken_digits FOLDER      # writes train.npz, test.npz and a network of each seed to FOLDER

Clips are cut after one second, and padded with zeros to it. Takes 0 to 4 of each speaker and digit are the test set.
"""

import os
import sys
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.absent import Absent
from benchmarks.networks import CACHE, folder

RATE, SAMPLES, TEST_TAKES = 8000, 8000, 5
EPOCHS, BATCH, SHIFT, MASKED = 40, 64, 400, 800


class SpokenDigits(nn.Module):
    """Convolutions on the logarithm of the power spectrogram: windows of 32 ms every 16 ms."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(256))
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, 2, 1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 48, 3, 2, 1),
            nn.BatchNorm2d(48),
            nn.ReLU(),
            nn.Conv2d(48, 64, 3, 2, 1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d((4, 4)),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * 16, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (n, 10) of clips (n, samples)."""
        spectrum = torch.stft(x, 256, 128, window=self.window, return_complex=True)
        power = spectrum.real.square() + spectrum.imag.square()
        return self.layers(torch.log(power + 1e-4)[:, None] / 4)  # type: ignore[no-any-return]


def clips() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Clips (n, 8000) in [-1, 1], labels and speakers of the train and the test split."""
    path = folder("HOLDFAST_DATA", "data") / "fsdd_audio.npz"
    if not path.is_file():
        raise Absent(f"{path.name} is not in {path.parent}; set HOLDFAST_DATA to its folder")
    with np.load(path, allow_pickle=False) as z:
        audio, offsets, y, speaker, take = (z[name] for name in ("audio", "offsets", "y", "speaker", "take"))
    x = np.zeros((len(y), SAMPLES), np.float32)
    for k, (start, end) in enumerate(pairwise(offsets)):
        clip = audio[start:end][:SAMPLES]
        x[k, : len(clip)] = clip / np.float32(32768)
    test = take < TEST_TAKES
    return {
        name: tuple(torch.from_numpy(part[rows].astype(kind)) for part, kind in columns)  # type: ignore[misc]
        for name, rows in (("train", ~test), ("test", test))
        for columns in [((x, np.float32), (y, np.int64), (speaker, np.int64))]
    }


def trained(seed: int) -> nn.Module:
    """Return the network of a seed in eval mode: trained once, then read from the cache."""
    path = CACHE / f"spoken_digits_{seed}.pt"
    net = SpokenDigits()
    if path.is_file():
        net.load_state_dict(torch.load(path, weights_only=True))
        return net.eval()
    torch.manual_seed(seed)
    net = SpokenDigits()
    x, y, _ = clips()["train"]
    steps = EPOCHS * -(-len(x) // BATCH)
    optimiser = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 5e-3, steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(BATCH):
            gain = 10 ** (torch.empty(len(rows), 1).uniform_(-6, 6) / 20)
            shifted = x[rows].roll(int(torch.randint(-SHIFT, SHIFT, ())), 1)
            start = torch.randint(0, SAMPLES // 2, (len(rows), 1))
            masked = (torch.arange(SAMPLES) >= start) & (torch.arange(SAMPLES) < start + MASKED)
            heard = (gain * shifted * ~masked).clamp(-1, 1)
            loss = F.cross_entropy(net(heard), y[rows], label_smoothing=0.1)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), path)
    return net.eval()


def main(place: Path) -> None:
    place.mkdir(parents=True, exist_ok=True)
    splits = clips()
    for split, (x, y, _) in splits.items():
        np.savez_compressed(place / f"{split}.npz", x=x.numpy(), y=y.numpy())
    x, y, _ = splits["test"]
    for seed in range(3):
        net = trained(seed)
        torch.save(net.state_dict(), place / f"spoken_digits_{seed}.pt")
        with torch.no_grad():
            print(
                f"seed {seed}: {100 * float((net(x).argmax(1) == y).float().mean()):.1f} % of {len(x)} test clips"
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
