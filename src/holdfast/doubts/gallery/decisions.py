"""Masked models that return a hard decision instead of scores: the gradient is zero almost everywhere."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.core.batch import Batch
from holdfast.doubts.gallery.item import Item, digit_network, trained_on_digits

CLASSES = 10
VOTERS = 5  # odd, so that two classes rarely have equally many votes
FEATURES = 64  # length of a vector that is compared with the prototypes
BITS = 16  # length of a code word: the smallest Hadamard matrix with a row for each class
COPIES, RADIUS = 10, 0.3  # noisy copies of an input, and the half side of the hypercube of the noise


class Prototypes(nn.Module):
    """Network whose logits are the negative squared distances of a feature vector to one learned point per class."""

    def __init__(self) -> None:
        super().__init__()
        self.body = digit_network()[:6]
        self.points = nn.Parameter(torch.randn(CLASSES, FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        """Return the negative squared distances of the features of the images `x` to the prototypes."""
        h: Tensor = self.body(x)
        return -(h[:, None] - self.points).square().sum(2) / FEATURES


class NearestPrototype(nn.Module):
    """Model that answers with the class of the nearest prototype only."""

    def __init__(self, net: Prototypes) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Return one for the class of the nearest prototype of each image, and zero for the others."""
        nearest = torch.cdist(self.net.body(x), self.net.points).argmin(1)
        return F.one_hot(nearest, CLASSES).to(x.dtype)


class Agreement(nn.Module):
    """Layer that compares bits between -1 and 1 with the code word of each class."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("words", _hadamard()[1 : CLASSES + 1])
        self.words: Tensor

    def forward(self, bits: Tensor) -> Tensor:
        """Return the inner product of the bits of each example and each code word."""
        products: Tensor = bits @ self.words.T
        return products


class Bits(nn.Module):
    """Layer that rounds its inputs to bits."""

    def forward(self, h: Tensor) -> Tensor:
        """Return 1 where the input `h` is positive, and -1 elsewhere."""
        return 2 * (h > 0).to(h.dtype) - 1


class NearestWord(nn.Module):
    """Layer that decodes bits to the class of the nearest code word."""

    def __init__(self, agreement: Agreement) -> None:
        super().__init__()
        self.agreement = agreement

    def forward(self, bits: Tensor) -> Tensor:
        """Return the negative Hamming distances to the code words, as integers."""
        agreement: Tensor = self.agreement(bits)
        return (agreement - BITS).div(2, rounding_mode="trunc")


class Decided(nn.Module):
    """Model that answers with the decision of a network only."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Return one for the class with the largest logit, and zero for the others."""
        logits: Tensor = self.net(x)
        return torch.zeros_like(logits).scatter(1, logits.argmax(1, keepdim=True), 1.0)


class Mean(nn.Module):
    """Ensemble that returns the mean of the logits of its members."""

    def __init__(self, members: nn.ModuleList) -> None:
        super().__init__()
        self.members = members

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean logits of the images `x`."""
        return torch.stack([member(x) for member in self.members]).mean(0)


class Votes(nn.Module):
    """Ensemble that returns the number of votes for each class, one for each member."""

    def __init__(self, members: nn.ModuleList) -> None:
        super().__init__()
        self.members = members

    def forward(self, x: Tensor) -> Tensor:
        """Return the number of votes for each class."""
        votes = torch.stack([member(x).argmax(1) for member in self.members])
        return F.one_hot(votes, CLASSES).sum(0).to(x.dtype)


class NoisyVotes(nn.Module):
    """Model that decides by the majority of the network's decisions on copies of the input with uniform noise."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Return the share of the noisy copies of each image that is assigned to each class."""
        total = torch.zeros(len(x), CLASSES, dtype=x.dtype, device=x.device)
        for _ in range(COPIES):
            noisy = (x + RADIUS * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
            total = total + F.one_hot(self.net(noisy).argmax(1), CLASSES)
        return total / COPIES


def _hadamard() -> Tensor:
    matrix, two = torch.ones(1, 1), torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    while len(matrix) < BITS:
        matrix = torch.kron(matrix, two)
    return matrix


def prototypes(digits: Batch, twin: nn.Module) -> nn.Module:
    """Return a network trained on the distances to learned prototypes, which answers with the nearest one only."""
    net = trained_on_digits(Prototypes, digits)
    assert isinstance(net, Prototypes)
    return NearestPrototype(net).eval()


def code_words(digits: Batch, twin: nn.Module) -> nn.Module:
    """Return a network trained to output the code word of each class, whose output is rounded to the nearest word."""

    def build() -> nn.Module:
        return nn.Sequential(*list(digit_network())[:-1], nn.Linear(FEATURES, BITS), nn.Tanh(), Agreement())

    *layers, agreement = trained_on_digits(build, digits).children()
    assert isinstance(agreement, Agreement)
    return nn.Sequential(*layers, Bits(), NearestWord(agreement)).eval()


def _without_rounding(model: nn.Module) -> nn.Module:
    *layers, _bits, word = model.children()
    return nn.Sequential(*layers, cast("NearestWord", word).agreement).eval()


def voters(digits: Batch, twin: nn.Module) -> nn.Module:
    """Return an ensemble of networks of different initial weights, which answers with the number of votes."""
    members = [trained_on_digits(digit_network, digits, epochs=4, seed=1 + i) for i in range(VOTERS)]
    return Votes(nn.ModuleList(members)).eval()


ITEMS = (
    Item(
        "nearest-prototype",
        "Mustafa et al., Adversarial defense by restricting the hidden space of deep neural networks, ICCV 2019,"
        " arXiv:1904.00887",
        prototypes,
        twin=lambda model: cast("NearestPrototype", model).net,
    ),
    Item(
        "code-words",
        "Verma & Swami, Error correcting output codes improve probability estimation and adversarial robustness of"
        " deep neural networks, NeurIPS 2019",
        code_words,
        twin=_without_rounding,
    ),
    Item(
        "one-hot",
        "Papernot et al., Practical black-box attacks against machine learning, AsiaCCS 2017, arXiv:1602.02697",
        lambda digits, twin: Decided(twin).eval(),
    ),
    Item(
        "votes",
        "Strauss et al., Ensemble methods as a defense to adversarial perturbations against deep neural networks,"
        " 2017, arXiv:1709.03423",
        voters,
        twin=lambda model: Mean(cast("Votes", model).members).eval(),
    ),
    Item(
        "noisy-votes",
        "Cao & Gong, Mitigating evasion attacks to deep neural networks via region-based classification, ACSAC 2017,"
        " arXiv:1709.05583",
        lambda digits, twin: NoisyVotes(twin).eval(),
    ),
)
