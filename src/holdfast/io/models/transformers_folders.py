"""Opens folders of transformers with a model for the classification of texts: `config.json`, `model.safetensors` and a
tokenizer.

Nothing is downloaded, and no code of the folder is run. The files are read once: the tokenizer is opened from a copy,
so that the digests are those of the bytes that were used.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from holdfast.core.errors import TargetError, UsageError
from holdfast.core.remedies import Install
from holdfast.core.texts import decoded
from holdfast.io.files import names_of
from holdfast.io.models.adapted import Adapted
from holdfast.io.models.archive import Weights, read_once
from holdfast.io.models.text_models import TextFunction
from holdfast.io.models.weights import fit_weights, read_state_dict, refuse_misfit

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_TOKENIZERS = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_TOKENIZER_FILES = (
    *_TOKENIZERS,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_MOST_BYTES = 64_000_000  # the largest vocabularies, of 250,000 words, have 17 MB
_TOKENS = 8192  # of one forward pass, with padding
_SPARE = (
    8  # parameters that the network may have beyond the tensors of the file, so that the error can list them
)


@dataclass(frozen=True)
class OpenedFolder:
    """Model of a folder, with the digests of its files."""

    adapted: Adapted
    files: Mapping[str, str]
    """SHA-256 of every file that was read, by its name"""
    notes: tuple[str, ...]
    """notes for the report"""


class TokenisedTexts(TextFunction):
    """A model for the classification of texts, with its tokenizer: logits of texts as rows of code points."""

    model: Any
    """the network of transformers"""

    def __init__(self, net: Any, tokenizer: Any, longest: int, digest: str) -> None:
        super().__init__(net, digest)
        self.tokenizer = tokenizer
        self.longest = longest
        """largest number of tokens of a text; further tokens are not read"""

    def __deepcopy__(self, memo: dict[int, object]) -> "TokenisedTexts":
        """Return a copy with a copy of the network, since copies are converted to double precision."""
        return TokenisedTexts(deepcopy(self.model, memo), self.tokenizer, self.longest, self.digest)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the texts in the rows of `x`, in batches of texts of similar length."""
        rows = self.tokenizer(decoded(x), truncation=True, max_length=self.longest)
        lengths = [len(tokens) for tokens in rows["input_ids"]]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        logits: dict[int, Tensor] = {}
        while order:
            # the longest of a batch is its last text, and the shortest text of all is the first
            count = max(1, _TOKENS // max(1, lengths[order[-1]]))
            batch, order = order[-count:], order[:-count]
            padded = self.tokenizer.pad(
                {name: [values[place] for place in batch] for name, values in rows.items()},
                return_tensors="pt",
            ).to(x.device)
            logits |= zip(batch, self.model(**padded).logits, strict=True)
        return torch.stack([logits[place] for place in range(len(lengths))])


def open_folder(folder: Path) -> OpenedFolder:
    """Return the model of a folder. Raises `UsageError` without transformers, and `TargetError` with the reason for a
    folder that is not as expected.
    """
    _refuse_incomplete(folder)
    try:
        import transformers
    except ImportError as error:
        raise UsageError(
            f"{str(folder)!r} is a model of transformers, which is not installed", Install("text")
        ) from error
    os.environ.setdefault(
        "TOKENIZERS_PARALLELISM", "false"
    )  # worker processes are forked after the first call
    names = (CONFIG, *(name for name in _TOKENIZER_FILES if (folder / name).exists()))
    content = {name: read_once(folder / name, "model file", max_bytes=_MOST_BYTES) for name in names}
    settings = _settings(folder, content)
    with TemporaryDirectory() as copy:
        for name, data in content.items():
            (Path(copy) / name).write_bytes(data)
        offline = {"local_files_only": True, "trust_remote_code": False}
        config = transformers.AutoConfig.from_pretrained(copy, **offline)
        tokenizer = transformers.AutoTokenizer.from_pretrained(copy, **offline)
    if tokenizer.pad_token is None:
        raise TargetError(
            f"the tokenizer in {str(folder)!r} has no pad_token, which batches of texts need; set one, and save it "
            "again"
        )
    path = folder / WEIGHTS
    weights, _ = read_state_dict(path, read_once(path, "weights file"))
    net, notes = _network(transformers, config, weights, folder)
    longest = min(tokenizer.model_max_length, _positions(net))
    texts = TokenisedTexts(net, tokenizer, longest, weights.digest)
    classes = int(config.num_labels)
    labels = _labels(folder, settings, classes)
    hidden = f"{type(net).__name__} is called with texts, which have no gradients"
    adapted = Adapted(texts, "scores", hidden, classes, labels, output="logit")
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
    return OpenedFolder(adapted, digests | {WEIGHTS: weights.digest}, notes)


def _refuse_incomplete(folder: Path) -> None:
    """Raise `TargetError` if the folder lacks a file, or if its weights are pickled or in several files."""
    present = sorted(path.name for path in folder.iterdir())
    expected = f"{CONFIG}, {WEIGHTS} and a tokenizer"
    if CONFIG not in present:
        raise TargetError(
            f"the folder {str(folder)!r} has no {CONFIG}, but {names_of(present)}; a folder of transformers with "
            f"{expected} was expected"
        )
    if WEIGHTS not in present:
        split = f"{WEIGHTS}.index.json" in present
        pickled = "pytorch_model.bin" in present
        problem = (
            "weights in several files" if split else "only pickled weights" if pickled else f"no {WEIGHTS}"
        )
        advice = '; save it again with model.save_pretrained(FOLDER, max_shard_size="100GB")'
        raise TargetError(
            f"the folder {str(folder)!r} has {problem}; {expected} were expected{advice}"
            f"{', which writes safetensors' if pickled else ''}"
        )
    if not any(name in present for name in _TOKENIZERS):
        raise TargetError(
            f"the folder {str(folder)!r} has no tokenizer, which is one of {', '.join(_TOKENIZERS)}; add it with "
            "tokenizer.save_pretrained(FOLDER)"
        )


def _settings(folder: Path, content: Mapping[str, bytes]) -> Mapping[str, Any]:
    """Return the content of `config.json`. Raises `TargetError` unless it is of a sequence classifier of transformers
    itself.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    objects = {
        name: json.loads(content[name]) for name in (CONFIG, "tokenizer_config.json") if name in content
    }
    for name, value in objects.items():
        if not isinstance(value, dict):
            raise TargetError(f"{name} in {str(folder)!r} is not a JSON object; save the model again")
        if value.get("auto_map"):
            raise TargetError(
                f"{name} in {str(folder)!r} has auto_map, which requires code from a hub, and such code is not run; "
                "build the model in a file of yours, and give file.py:factory"
            )
    settings: Mapping[str, Any] = objects[CONFIG]
    kind, heads = settings.get("model_type"), settings.get("architectures") or []
    if kind not in CONFIG_MAPPING_NAMES:
        raise TargetError(
            f"the model_type in {str(folder / CONFIG)!r} is {kind!r}, which the installed transformers does not have; "
            "build the model in a file of yours, and give file.py:factory"
        )
    if not any(str(head).endswith("ForSequenceClassification") for head in heads):
        raise TargetError(
            f"the model in {str(folder)!r} is {names_of(list(map(str, heads)))}, which has no classification head; "
            "one such as BertForSequenceClassification was expected: train and save one"
        )
    return settings


def _network(
    transformers: Any, config: Any, weights: Weights, folder: Path
) -> tuple[torch.nn.Module, tuple[str, ...]]:
    """Return the network in evaluation mode, and notes. Its size is compared with the weights before it is built."""
    # positions of tokens were stored as a buffer by old versions
    tensors = {name: value for name, value in weights.tensors.items() if not name.endswith("position_ids")}
    kept = Weights(tensors, weights.notes, weights.digest)
    make = partial(
        transformers.AutoModelForSequenceClassification.from_config,
        config,
        trust_remote_code=False,
        dtype=torch.float32,
    )
    refuse_misfit(make, kept, repr(str(folder)), spare=_SPARE)
    with torch.random.fork_rng(devices=()):  # the initial weights are drawn, and then replaced
        net: torch.nn.Module = make()
    notes = fit_weights(net, kept, repr(str(folder)))
    return net.eval(), notes


def _positions(net: torch.nn.Module) -> int:
    """Return the number of tokens for which the network has embeddings of positions; a large number without any."""
    for name, module in net.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            # RoBERTa does not use the positions up to that of padding
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return _TOKENS


def _labels(folder: Path, settings: Mapping[str, Any], classes: int) -> tuple[str, ...]:
    """Return the names of the classes in the order of the logits."""
    named = settings.get("id2label") or {str(place): f"LABEL_{place}" for place in range(classes)}
    labels = tuple(str(named.get(str(place))) for place in range(classes))
    if len(named) != classes or len({*labels}) != classes:
        raise TargetError(
            f"id2label in {str(folder / CONFIG)!r} is {names_of(list(map(str, named.items())))}; one distinct name "
            f"for each of 0 to {classes - 1} was expected"
        )
    return labels
