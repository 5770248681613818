"""Checks of a command line before torch is imported: missing files, unknown names, and unknown formats of reports.

They report a mistake within half a second. Other functions repeat these checks for callers from Python.
"""

from collections.abc import Iterable
from pathlib import Path

import holdfast
from holdfast.core.catalogue import SMOOTHING
from holdfast.core.errors import Placeholder, Remedy, UsageError
from holdfast.core.names import did_you_mean
from holdfast.core.threat import ThreatModel
from holdfast.io.files import existing
from holdfast.threats.domains import TEXT

_MODELS = (
    ".pt", ".pth", ".th", ".ts", ".jit", ".pt2", ".onnx", ".safetensors", ".skops", ".json", ".ubj", ".txt", ".py",
)  # fmt: skip
_DATA = (".npz", ".csv", ".gz", ".parquet")


def refuse_swapped(model: str | None, data: str | None) -> None:
    """Raise `UsageError` if MODEL is data, and DATA is a model: each a name or a file of the other kind."""
    from holdfast.io.data_catalogue import CATALOGUE, GENERATED

    if model is None or data is None:
        return
    is_data = model.endswith(_DATA) or model in (*bundled("*.npz"), *GENERATED, *CATALOGUE)
    is_model = _without_function(data).endswith(_MODELS) or data in bundled("*.safetensors")
    if is_data and is_model:
        raise UsageError(
            f"MODEL is {model!r}, which are data, and DATA is {data!r}, which is a model; they seem to be swapped: "
            "give the model first and then the data"
        )


def refuse_missing_file(address: str | None) -> None:
    """Raise `TargetError` if the address of a model or data set has the form of a path, and no file or folder exists
    there.
    """
    if address is None:
        return
    path = address.removeprefix("rotating:")
    path = _without_function(path)
    looks_like_a_file = path.endswith((*_MODELS, *_DATA, ".yaml", ".yml")) or "/" in path
    if looks_like_a_file and "://" not in path:
        existing(Path(path), "file or folder")


def _without_function(address: str) -> str:
    """Return the path in an address such as `file.py:factory`, and other addresses unchanged."""
    return address.rsplit(":", 1)[0] if ".py:" in address else address


def refuse_unknown_model(address: str, *, generators: bool = False) -> None:
    """Raise `UsageError` if the address of a model is a plain word that is neither the name of a bundled model nor a
    file. With `generators`, the names of bundled generators are accepted as well.
    """
    names = bundled("*.safetensors") + (bundled("generators/*.safetensors") if generators else [])
    if _is_word(address) and address not in names:
        raise UsageError(
            f"there is no bundled model {address!r}{_offered(address, names)} "
            "give file.py:factory, a .safetensors, .pt, .pt2, .onnx, .skops, .json, .ubj or .txt file, a folder of "
            "transformers, or a URL"
        )


def refuse_unknown_data(address: str) -> None:
    """Raise `UsageError` if the address of a data set is a plain word that is neither a known data set nor a file."""
    from holdfast.io.data_catalogue import CATALOGUE, GENERATED, refuse_environment

    names = [*bundled("*.npz"), *GENERATED, *CATALOGUE]
    if _is_word(address) and address not in names:
        refuse_environment(address)
        raise UsageError(
            f"there is no data set {address!r}{_offered(address, names)} "
            "give an .npz, .csv or .parquet file, or a folder with one folder of images for each class"
        )


def refuse_foreign_server(address: str, hosts: Iterable[str]) -> None:
    """Raise `UsageError` if the address of a model is the URL of a server to which the user has not permitted requests
    (`hosts`).
    """
    from holdfast.io.remote.remote import SCHEMES, allowed_address

    if address.partition(":")[0] in SCHEMES:
        allowed_address(address, hosts)


def refuse_server_to_certify(address: str, threat: ThreatModel) -> None:
    """Raise `UsageError` if the model to certify is given as the URL of a server, whose operations are not known."""
    from holdfast.io.remote.remote import SCHEMES

    of_texts = threat.change.domain is TEXT  # then the error about a model of numbers has another way out
    if address.partition(":")[0] in SCHEMES and not of_texts:
        raise UsageError(
            f"{address!r} is a server, and bounds are computed from the operations of a network; give the network "
            "itself, as in file.py:factory",
            Remedy(
                "method",
                SMOOTHING,
                also=(
                    *(() if threat.name == "l2" else (Remedy("threat", Placeholder("l2:EPS")),)),
                    Remedy("sigma", Placeholder("SIGMA")),
                ),
                reason="to certify the smoothed classifier, for which predictions suffice",
            ),
        )


def refuse_server_to_train(address: str) -> None:
    """Raise `UsageError` if the model to train is given as the URL of a server, because its weights are
    not accessible.
    """
    from holdfast.io.remote.remote import SCHEMES

    if address.partition(":")[0] in SCHEMES:
        raise UsageError(
            f"{address!r} is a server, whose weights cannot be trained; give the network itself: file.py:factory, or a "
            ".safetensors or .pt file"
        )


def refuse_reports(outputs: Iterable[str]) -> None:
    """Raise an error if a report cannot be written to one of the paths in `outputs`, for example because its format is
    unknown.

    An output `-` is stdout and is not checked.
    """
    from holdfast.reports.write import check_destination

    for output in outputs:
        if output != "-":
            check_destination(Path(output))


def _offered(address: str, names: Iterable[str]) -> str:
    suggestion = did_you_mean(address, names)
    return f"{suggestion} Or" if suggestion.endswith("?") else f"{suggestion}; or"


def bundled(pattern: str) -> list[str]:
    """Return the names of the models or data sets in the package whose files match `pattern`, without file suffixes."""
    return sorted(path.stem for path in (Path(holdfast.__file__).parent / "bundled").glob(pattern))


def _is_word(address: str) -> bool:
    """Return whether an address is a plain name, without the syntax of a path, a factory or a URL."""
    return not set(address) & set("./\\:") and not Path(address).exists()
