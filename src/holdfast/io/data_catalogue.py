"""The catalogue of data sets that can be opened by name: descriptions, sources, and paths of their files."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from holdfast.core.errors import UsageError
from holdfast.io.files import similar_name

_DIGITS = tuple("0123456789")


@dataclass(frozen=True)
class RemoteFile:
    """An official file of a data set, with its URL and the checksum that its authors or torchvision publish."""

    url: str
    md5: str
    """published MD5 digest, which detects damage; HTTPS protects against tampering where the server offers it"""

    @property
    def file(self) -> str:
        """Name of the file, which is the last part of its URL."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Entry:
    """The description of a data set in the catalogue: its title, files, licence and classes."""

    title: str
    file: str
    """name of the file in the data folder"""
    licence: str
    cite: str
    classes: tuple[str, ...] | None = None
    label: str | None = None
    """name of the label column of a table"""
    drop: tuple[str, ...] = ()
    """columns of a table that are not features: row numbers and strings"""
    remotes: tuple[RemoteFile, ...] = ()
    """official files; empty if their format is not supported"""
    form: Literal["idx", "cifar-binary"] | None = None
    """format of the official files"""
    parts: tuple[str, ...] = ()
    """names of files that `import` accepts instead of `file`"""


_MNIST_MIRROR = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_FASHION_MIRROR = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
"""Address of an HTTP server, because the authors do not offer HTTPS; the checksums detect changes."""

CATALOGUE: Mapping[str, Entry] = MappingProxyType(
    {
        "mnist": Entry(
            "MNIST handwritten digits, 60,000 + 10,000 images of 28 x 28",
            "mnist.npz",
            "CC BY-SA 3.0",
            "LeCun, Cortes and Burges, The MNIST database of handwritten digits",
            classes=_DIGITS,
            remotes=(
                RemoteFile(_MNIST_MIRROR + "train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
                RemoteFile(_MNIST_MIRROR + "train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432"),
                RemoteFile(_MNIST_MIRROR + "t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3"),
                RemoteFile(_MNIST_MIRROR + "t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c"),
            ),
            form="idx",
        ),
        "fashion-mnist": Entry(
            "Fashion-MNIST, 60,000 + 10,000 images of 28 x 28",
            "fashion_mnist.npz",
            "MIT",
            "Xiao, Rasul and Vollgraf, Fashion-MNIST, arXiv:1708.07747",
            classes=(
                *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
                *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
            ),
            remotes=(
                RemoteFile(
                    _FASHION_MIRROR + "train-images-idx3-ubyte.gz", "8d4fb7e6c68d591d4c3dfef9ec88bf0d"
                ),
                RemoteFile(
                    _FASHION_MIRROR + "train-labels-idx1-ubyte.gz", "25c81989df183df01b3e8a0aad5dffbe"
                ),
                RemoteFile(_FASHION_MIRROR + "t10k-images-idx3-ubyte.gz", "bef4ecab320f06d8554ea6380940ec79"),
                RemoteFile(_FASHION_MIRROR + "t10k-labels-idx1-ubyte.gz", "bb300cfdad3c16e7a12a480ee83cd310"),
            ),
            form="idx",
        ),
        "cifar10": Entry(
            "CIFAR-10, 50,000 + 10,000 colour images of 32 x 32",
            "cifar10.npz",
            "none stated by the authors",
            "Krizhevsky, Learning multiple layers of features from tiny images, 2009",
            classes=(
                *("airplane", "automobile", "bird", "cat", "deer"),
                *("dog", "frog", "horse", "ship", "truck"),
            ),
            remotes=(
                RemoteFile(
                    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
                    "c32a1d4ab5d03f1284b67883e8d87530",
                ),
            ),
            form="cifar-binary",
            parts=("cifar10_train0.npz", "cifar10_train1.npz", "cifar10_test.npz"),
        ),
        "gtsrb": Entry(
            "German traffic signs, a subset at 32 x 32 (not the official test set)",
            "gtsrb32.npz",
            "free for research",
            "Stallkamp et al., Man vs. computer, Neural Networks 2012",
        ),
        "pneumoniamnist": Entry(
            "PneumoniaMNIST (MedMNIST v2), chest X-rays at 28 x 28",
            "pneumoniamnist.npz",
            "CC BY 4.0",
            "Yang et al., MedMNIST v2, Scientific Data 2023",
            classes=("normal", "pneumonia"),
        ),
        "clamp": Entry(
            "ClaMP, header fields of Windows programs, malware or benign",
            "clamp_pe_malware.csv.gz",
            "none stated by the authors",
            "Kumar et al., Journal of King Saud University 2019",
            label="class",
            drop=("packer_type",),
        ),
        "credit-default": Entry(
            "Default of credit card clients (UCI), 30,000 rows of 23 features",
            "credit_default.csv.gz",
            "CC BY 4.0",
            "Yeh and Lien, Expert Systems with Applications 2009",
            label="default",
            drop=("ID",),
        ),
        "credit-fraud": Entry(
            "Credit-card fraud (ULB), a subset of 4,474 rows",
            "credit_fraud_small.csv.gz",
            "ODbL 1.0",
            "Dal Pozzolo et al., IEEE SSCI 2015",
            label="Class",
        ),
        "phishing": Entry(
            "Web-page phishing detection, 11,426 rows of 87 features and the address",
            "phishing_url.csv.gz",
            "CC BY 4.0",
            "Hannousse and Yahiouche, Engineering Applications of AI 2021",
            label="status",
            drop=("url",),
        ),
        "location30": Entry(
            "Location-30, binary check-in features, for membership inference",
            "location30.npz",
            "none stated by the authors",
            "Shokri et al., IEEE S&P 2017",
        ),
    }
)


GENERATED: Mapping[str, str] = MappingProxyType(
    {"scenes": "generated digits and signs with masks and boxes, 4,000 + 500 colour images of 64 x 64"}
)
"""Descriptions of the data sets that are generated when they are opened, by name."""


@dataclass(frozen=True)
class Listed:
    """A data set of the catalogue as a row of the table that `holdfast data` prints."""

    name: str
    title: str
    path: Path
    present: bool
    fetchable: bool


def data_folder() -> Path:
    """Return the folder with the files of data sets: the environment variable `HOLDFAST_DATA`, or else a folder in the
    user's cache.
    """
    configured = os.environ.get("HOLDFAST_DATA")
    return Path(configured) if configured else cache_folder() / "data"


def cache_folder() -> Path:
    """Return the folder of Holdfast in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "holdfast"


def entry_of(name: str) -> Entry:
    """Return the catalogue entry of the data set called `name`.

    Raises `UsageError` if there is none; its message contains the most similar name.
    """
    if name not in CATALOGUE:
        raise UsageError(
            f"there is no data set {name!r}{similar_name(name, CATALOGUE)}; holdfast data lists them"
        )
    return CATALOGUE[name]


def refuse_environment(name: str) -> None:
    """Raise `UsageError` if gymnasium is installed and has registered an environment of this name."""
    try:
        from gymnasium.envs.registration import registry
    except ModuleNotFoundError:
        return
    if name in registry:
        raise UsageError(
            f"{name!r} is an environment of gymnasium, and data were expected; assess, certify and harden accept an "
            "environment with a threat for policies, such as observations:linf:0.1"
        )


def listed_data_sets() -> tuple[Listed, ...]:
    """Return all data sets of the catalogue, and for each whether its files are on this machine."""
    folder = data_folder()
    return tuple(
        Listed(name, entry.title, folder / entry.file, (folder / entry.file).exists(), bool(entry.remotes))
        for name, entry in CATALOGUE.items()
    )
