"""Opens folders of transformers, and finds out by a few calls how a model of texts treats them."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from holdfast.attacks.parts.images import edited
from holdfast.core.batch import Data, decoded, encoded
from holdfast.core.errors import TargetError, UsageError, importing
from holdfast.core.model import Classifier
from holdfast.io.data.clips import SIGNAL_BOUNDS
from holdfast.io.files import names_of
from holdfast.io.models.adapting import TextFunction
from holdfast.io.models.estimators import Adapted, Estimator
from holdfast.io.models.weights import Weights, empty_network, read_once, read_state_dict, refuse_not_finite
from holdfast.io.remote.probing import ProbedClassifier
from holdfast.threats.signals import sound_of
from holdfast.threats.text_edits import TextEdits

_LARGEST_SIDE = 4096
"""Largest number in the settings of a processor. An image of it has 200 MB, and known models take smaller ones."""
_MODES = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}
"""Interpolations of torch by the number of the one of Pillow."""
_TRIED = (20, 24)
"""Height and width of the images to which the processor is applied."""
_ROUNDING = 2.5 / 255
"""Largest difference of a resized value: Pillow rounds after each of two directions, and torch does not."""


class ProcessedImages(nn.Module):
    """A network of transformers that is called with images (n, channels, height, width) with values from 0 to 1."""

    colours: Tensor
    offset: Tensor

    def __init__(
        self,
        model: nn.Module,
        colours: Tensor,
        offset: Tensor,
        size: tuple[int, int] | None,
        mode: str | None,
    ) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("colours", colours)
        self.register_buffer("offset", offset)
        self.size = size
        """height and width of the inputs of the network; None if the processor does not change the size"""
        self.mode = mode
        """interpolation with which images of another size are resized; None if they are refused"""

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the images."""
        logits: Tensor = self.model(pixel_values=self.processed(x)).logits
        return logits

    def processed(self, x: Tensor) -> Tensor:
        """Return the images as the network expects them. Raises `TargetError` for images of another size if the
        processor crops such images.
        """
        if self.size is not None and tuple(x.shape[2:]) != self.size:
            if self.mode is None:
                expected = " x ".join(map(str, self.size))
                raise TargetError(
                    f"an image has the shape {tuple(x.shape[1:])}, and the network takes {expected}; resize or crop "
                    f"the images to {expected} before, because the processor of the folder crops images of other sizes"
                )
            smooth = {} if self.mode == "nearest-exact" else {"antialias": True, "align_corners": False}
            x = F.interpolate(x, self.size, mode=self.mode, **smooth).clamp(0, 1)
        return F.conv2d(x, self.colours[:, :, None, None], self.offset)


class ProcessedClips(nn.Module):
    """A network of transformers that is called with clips (n, samples) with values from -1 to 1."""

    def __init__(self, model: nn.Module, extractor: Any) -> None:
        super().__init__()
        self.model = model
        self.sampling_rate = int(extractor.sampling_rate)
        """sampling rate in Hz of the clips on which the network was trained"""
        self.normalises, self.masks = bool(extractor.do_normalize), bool(extractor.return_attention_mask)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the clips."""
        mask = {"attention_mask": sound_of(x).long()} if self.masks else {}
        logits: Tensor = self.model(input_values=self.processed(x), **mask).logits
        return logits

    def processed(self, x: Tensor) -> Tensor:
        """Return the clips as the network expects them: the sound of each has mean 0 and variance 1 if the extractor
        normalises, and padding is zero.
        """
        if not self.normalises:
            return x
        sound = sound_of(x)
        n = sound.sum(-1, keepdim=True)
        centred = (x - x.sum(-1, keepdim=True) / n) * sound
        return centred / (centred.square().sum(-1, keepdim=True) / n + 1e-7).sqrt()


def refuse_large_sizes(settings: Mapping[str, Any], path: str) -> None:
    """Raise `TargetError` for a number in the settings of a processor that is no size of an image: applying the
    processor could use any amount of memory.
    """
    for value in _numbers(settings):
        if not abs(value) <= _LARGEST_SIDE:
            raise TargetError(
                f"{path!r} contains the number {value:g}; sizes of images of at most {_LARGEST_SIDE:,} were expected: "
                "save the processor again"
            )


def _numbers(value: Any) -> list[float]:
    if isinstance(value, Mapping):
        return [number for inner in value.values() for number in _numbers(inner)]
    if isinstance(value, list):
        return [number for inner in value for number in _numbers(inner)]
    return [value] if isinstance(value, int | float) else []


def processed_images(net: nn.Module, processor: Any, source: str) -> tuple[ProcessedImages, tuple[str, ...]]:
    """Return a network behind the image processor of its folder, and notes. `source` names the folder in errors.

    Raises `TargetError` for a processor that changes images in another way than by size, scale, mean and std.
    """
    channels = int(getattr(net.config, "num_channels", 3))
    colours, offset = _colours(processor, channels, source)
    size, resizes = _size(processor)
    mode = _MODES.get(int(processor.resample)) if resizes and processor.resample is not None else None
    images = ProcessedImages(net, colours, offset, size, mode)
    if mode is not None and not _alike(images, processor, channels):
        images.mode = None
    return images, () if size is None else (_note(images),)


def _note(images: ProcessedImages) -> str:
    height, width = images.size or (0, 0)
    other = "others are refused" if images.mode is None else "others are resized to it inside the model"
    return f"the network takes images of {height} x {width}, with the values of the processor of the folder; {other}"


def _size(processor: Any) -> tuple[tuple[int, int] | None, bool]:
    """Return height and width of a processed square image, or None if the processor does not change the size, and
    whether other images are resized to it as a whole.
    """
    crops, resizes = (bool(getattr(processor, name, False)) for name in ("do_center_crop", "do_resize"))
    named = processor.crop_size if crops else processor.size if resizes else None
    sides = {} if named is None else dict(named)
    if sides.get("height") and sides.get("width"):
        return (int(sides["height"]), int(sides["width"])), resizes and not crops
    if sides.get("shortest_edge"):
        return (int(sides["shortest_edge"]), int(sides["shortest_edge"])), False
    return None, False


def _colours(processor: Any, channels: int, source: str) -> tuple[Tensor, Tensor]:
    """Return the colour matrix (channels, channels) and the offset (channels,) by which a processor changes values from
    0 to 1.
    """
    images = np.zeros((channels + 2, channels, *_TRIED), np.uint8)
    images[np.arange(channels), np.arange(channels)] = 255
    images[-1] = np.random.default_rng(0).integers(0, 256, images.shape[1:])
    outputs = _applied(processor, images, do_resize=False, do_center_crop=False)
    if outputs is not None and outputs.shape == images.shape:
        offset = outputs[channels, :, 0, 0]
        colours = (outputs[:channels, :, 0, 0] - offset).T.contiguous()
        x = torch.from_numpy(images).double() / 255
        computed = F.conv2d(x, colours[:, :, None, None], offset)
        if bool((computed - outputs).abs().max() <= 1e-4 * colours.abs().max()):
            return colours.float(), offset.float()
    raise TargetError(
        f"the image processor of {source}, {type(processor).__name__}, changes images in another way than by size, "
        "scale, mean and std; build the model with this step in a file of yours, and give file.py:factory"
    )


def _alike(images: ProcessedImages, processor: Any, channels: int) -> bool:
    """Return whether the resized images are those of the processor, up to rounding."""
    # Pillow clamps after each of two directions, which nothing does to moderate values
    pixels = np.random.default_rng(1).integers(64, 192, (1, channels, *_TRIED)).astype(np.uint8)
    outputs = _applied(processor, pixels)
    if outputs is None:
        return False
    processed = images.processed(torch.from_numpy(pixels).float() / 255)
    allowed = _ROUNDING * float(images.colours.abs().sum(1).max())
    return processed.shape == outputs.shape and bool((processed - outputs).abs().max() <= allowed)


def _applied(processor: Any, images: NDArray[np.uint8], **steps: bool) -> Tensor | None:
    """Return the outputs of a processor for images (n, channels, height, width), or None if it returns another form."""
    try:
        outputs = processor([*images], return_tensors="pt", input_data_format="channels_first", **steps)[
            "pixel_values"
        ]
    except (TypeError, ValueError, KeyError, RuntimeError, IndexError):
        return None
    return outputs.double() if isinstance(outputs, Tensor) and outputs.dim() == 4 else None


CONFIG, WEIGHTS, PROCESSOR = "config.json", "model.safetensors", "preprocessor_config.json"
_TEXT_HEAD, _IMAGE_HEAD = "ForSequenceClassification", "ForImageClassification"
_CLIP_HEAD, _EXTRACTOR = "ForAudioClassification", "Wav2Vec2FeatureExtractor"
_TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")
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
_SPARE_VALUES = 2**24
"""numbers that buffers may have which are not in the file, such as positions of patches"""


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


def open_folder(folder: Path, *, texts: bool) -> OpenedFolder:
    """Return the model of a folder, of texts, images or clips by its files. `texts` is whether the threat is on
    texts.

    Raises `UsageError` without transformers and for a threat on other inputs than those of the model, and `TargetError`
    with the reason for a folder that is not as expected.
    """
    present = sorted(path.name for path in folder.iterdir())
    if CONFIG not in present:
        raise TargetError(
            f"the folder {str(folder)!r} has no {CONFIG}, but {names_of(present)}; a folder of transformers with "
            f"{CONFIG}, {WEIGHTS}, and a tokenizer or {PROCESSOR} was expected"
        )
    read = partial(read_once, what="model file", max_bytes=_MOST_BYTES)
    content = {CONFIG: read(folder / CONFIG)}
    heads = [str(head) for head in _object(folder, CONFIG, content).get("architectures") or []]
    of_images = any(_IMAGE_HEAD in head for head in heads)
    of_clips = not of_images and (PROCESSOR in present or any(_CLIP_HEAD in head for head in heads))
    _refuse_incomplete(folder, present, processed=of_images or of_clips)
    if (of_images or of_clips) == texts:
        inputs, example = ("images", "linf:8/255") if of_images else ("clips", "snr:40dB")
        raise UsageError(
            f"{str(folder)!r} is a model of {inputs}, and the threat is on texts; give one on {inputs}, such as "
            f"{example}"
            if texts
            else f"{str(folder)!r} is a folder, whose model is called with texts, and there is no threat on texts such "
            "as text:edits=2,words=3; assess it with one, or give the file of another model"
        )
    missing = f"{str(folder)!r} is a model of transformers, which is not installed"
    transformers = importing("transformers", missing, "text")
    names = (PROCESSOR,) if of_images or of_clips else _TOKENIZER_FILES
    content |= {name: read(folder / name) for name in names if name in present}
    settings = _settings(folder, content, heads)
    path = folder / WEIGHTS
    weights, _ = read_state_dict(path, read_once(path, "weights file"))
    if of_images:
        kinds = (transformers.AutoImageProcessor, transformers.AutoModelForImageClassification)
    elif of_clips:
        _refuse_other_extractor(folder, content)
        kinds = (transformers.Wav2Vec2FeatureExtractor, transformers.AutoModelForAudioClassification)
    else:
        kinds = (transformers.AutoTokenizer, transformers.AutoModelForSequenceClassification)
    with _quiet(transformers):
        config, preparing = _opened(content, transformers.AutoConfig, kinds[0])
        net = _network(kinds[1], config, weights, folder)
    classes = int(config.num_labels)
    labels = _labels(folder, settings, classes)
    notes = weights.notes
    if of_images:
        images, more = processed_images(net, preparing, repr(str(folder)))
        notes += more
        adapted = Adapted(images, classes=classes, class_names=labels, output="logit")
    elif of_clips:
        clips = ProcessedClips(net, preparing)
        adapted = Adapted(clips, classes=classes, class_names=labels, output="logit", bounds=SIGNAL_BOUNDS)
    else:
        hidden = f"{type(net).__name__} is called with texts, which have no gradients"
        tokenised = _tokenised(net, preparing, folder, weights.digest)
        adapted = Adapted(tokenised, "scores", hidden, classes, labels, output="logit")
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
    return OpenedFolder(adapted, digests | {WEIGHTS: weights.digest}, notes)


def _opened(content: Mapping[str, bytes], *kinds: Any) -> list[Any]:
    """Return the objects of classes of transformers, such as a tokenizer, that are in the files with this content."""
    os.environ.setdefault(
        "TOKENIZERS_PARALLELISM", "false"
    )  # worker processes are forked after the first call
    with TemporaryDirectory() as copy:
        for name, data in content.items():
            (Path(copy) / name).write_bytes(data)
        return [kind.from_pretrained(copy, local_files_only=True, trust_remote_code=False) for kind in kinds]


def _tokenised(net: Any, tokenizer: Any, folder: Path, digest: str) -> TokenisedTexts:
    if tokenizer.pad_token is None:
        raise TargetError(
            f"the tokenizer in {str(folder)!r} has no pad_token, which batches of texts need; set one, and save it "
            "again"
        )
    return TokenisedTexts(net, tokenizer, min(tokenizer.model_max_length, _positions(net)), digest)


def _refuse_other_extractor(folder: Path, content: Mapping[str, bytes]) -> None:
    """Raise `TargetError` for a feature extractor that does more than normalise clips."""
    kind = _object(folder, PROCESSOR, content).get("feature_extractor_type")
    if kind != _EXTRACTOR:
        raise TargetError(
            f"{PROCESSOR} in {str(folder)!r} has the feature extractor {kind!r}, and {_EXTRACTOR} was expected: others "
            "compute spectrograms outside of the model, through which no gradient passes; build the model with this "
            "step in torch in a file of yours, and give file.py:factory"
        )


def _refuse_incomplete(folder: Path, present: Sequence[str], *, processed: bool) -> None:
    """Raise `TargetError` if the folder lacks a file, or if its weights are pickled or in several files."""
    expected = f"{CONFIG}, {WEIGHTS} and {PROCESSOR if processed else 'a tokenizer'}"
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
    if processed and PROCESSOR not in present:
        raise TargetError(
            f"the folder {str(folder)!r} has no {PROCESSOR}, which states the normalisation of the inputs, and the "
            "size of images or the sampling rate of clips; add it with processor.save_pretrained(FOLDER)"
        )
    if not processed and not any(name in present for name in _TOKENIZERS):
        raise TargetError(
            f"the folder {str(folder)!r} has no tokenizer, which is one of {', '.join(_TOKENIZERS)}; add it with "
            f"tokenizer.save_pretrained(FOLDER), or {PROCESSOR} of a model of clips with "
            "feature_extractor.save_pretrained(FOLDER)"
        )


def _object(folder: Path, name: str, content: Mapping[str, bytes]) -> Mapping[str, Any]:
    """Return the content of a JSON file of the folder. Raises `TargetError` unless it is an object."""
    try:
        value = json.loads(content[name])
    except ValueError as error:
        raise TargetError(f"{name} in {str(folder)!r} is not JSON ({error}); save the model again") from error
    if not isinstance(value, dict):
        raise TargetError(f"{name} in {str(folder)!r} is not a JSON object; save the model again")
    return value


def _settings(folder: Path, content: Mapping[str, bytes], heads: Sequence[str]) -> Mapping[str, Any]:
    """Return the content of `config.json`. Raises `TargetError` unless it is of a classifier of transformers itself."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    for name in (CONFIG, "tokenizer_config.json", PROCESSOR):
        if name in content and _object(folder, name, content).get("auto_map"):
            raise TargetError(
                f"{name} in {str(folder)!r} has auto_map, which requires code from a hub, and such code is not run; "
                "build the model in a file of yours, and give file.py:factory"
            )
    if PROCESSOR in content and any(_IMAGE_HEAD in head for head in heads):
        refuse_large_sizes(_object(folder, PROCESSOR, content), str(folder / PROCESSOR))
    settings = _object(folder, CONFIG, content)
    kind = settings.get("model_type")
    if kind not in CONFIG_MAPPING_NAMES:
        raise TargetError(
            f"the model_type in {str(folder / CONFIG)!r} is {kind!r}, which the installed transformers does not have; "
            "build the model in a file of yours, and give file.py:factory"
        )
    if not any(_IMAGE_HEAD in head or _CLIP_HEAD in head or head.endswith(_TEXT_HEAD) for head in heads):
        raise TargetError(
            f"the model in {str(folder)!r} is {names_of(list(heads))}, which has no classification head; "
            f"one such as Bert{_TEXT_HEAD}, ViT{_IMAGE_HEAD} or Wav2Vec2{_TEXT_HEAD} was expected: train and save one"
        )
    return settings


def _network(kind: Any, config: Any, weights: Weights, folder: Path) -> torch.nn.Module:
    """Return the network in evaluation mode. Its size is compared with the weights before it is built.

    transformers loads the weights, because it renames the tensors of files that older versions have written.
    """
    # positions of tokens were stored as a buffer by old versions
    tensors = {name: value for name, value in weights.tensors.items() if not name.endswith("position_ids")}
    make = partial(kind.from_config, config, trust_remote_code=False, dtype=torch.float32)
    empty = empty_network(make, Weights(tensors), repr(str(folder)), spare=_SPARE)
    n_stored, n_needed = (sum(map(torch.numel, each)) for each in (tensors.values(), empty.parameters()))
    if n_needed > n_stored or sum(map(torch.numel, empty.buffers())) > n_stored + _SPARE_VALUES:
        raise TargetError(
            f"the weights of {str(folder)!r} do not fit: it has {n_stored:,} numbers, but its architecture has more; "
            "train or save it again"
        )
    with torch.random.fork_rng(devices=()):  # the initial weights are drawn, and then replaced
        network: Any = type(empty)
        net, info = network.from_pretrained(
            None, config=config, state_dict=tensors, dtype=torch.float32, output_loading_info=True
        )
    problems = [
        f"{name.removesuffix('_keys')} {names_of(sorted(map(str, info[name])))}"
        for name in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info[name]
    ]
    if problems:
        raise TargetError(
            f"the weights of {str(folder)!r} do not fit {type(net).__name__}: {'; '.join(problems)}; train or save it "
            "again"
        )
    refuse_not_finite(net, repr(str(folder)))
    evaluated: torch.nn.Module = net.eval()
    return evaluated


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Context manager in which transformers writes neither warnings nor progress."""
    logging = transformers.utils.logging
    level, shows = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shows:
            logging.enable_progress_bar()


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


_N_ROWS = 512
"""Number of texts of which the longest is examined."""
_LONG, _IGNORED = 48, 16
"""Smallest number of words of a text that is examined, and of words at its end that change nothing."""


def truncation_notes(model: Classifier, data: Data) -> tuple[str, ...]:
    """Return a note for the report if the scores of the longest text do not depend on its last words.

    The words after a position are replaced by the first words of the text, and by themselves in reverse order. The
    smallest position at which the scores of both stay equal is found by bisection. Cost: about ten forward passes of
    two texts.
    """
    rows = data.read(0, min(_N_ROWS, len(data))).x
    text = max(decoded(rows), key=lambda each: len(each.split()))
    words = re.findall(r"\S+\s*", text)
    if len(words) < _LONG:
        return ()
    probe = ProbedClassifier(model)

    def scores(kept: int) -> torch.Tensor | None:
        others = words[: len(words) - kept], words[kept:][::-1]
        changed = ["".join((*words[:kept], *other)) for other in others]
        return probe.outputs(encoded(changed, max(*map(len, changed), rows.shape[1])).to(rows))

    whole, low, high = scores(len(words)), 0, len(words)
    if whole is None:
        return ()
    while low < high:
        middle = (low + high) // 2
        found = scores(middle)
        if found is not None and torch.equal(found, whole):
            high = middle
        else:
            low = middle + 1
    if not 0 < high <= len(words) - _IGNORED:
        return ()
    ignored = f"the scores of a text of {len(words)} words do not depend on the words after the first {high}"
    return (f"{ignored}: the model probably truncates texts, and changes of later words have no effect",)


_N_TEXTS, _WORDS = 64, 50
"""Number of texts that are read, and of their words that are edited."""


def unknown_notes(model: Classifier, data: Data, edits: TextEdits) -> tuple[str, ...]:
    """Return a note for the report on edited words that the model does not know, with an example.

    Words are known or unknown to the tokenizer of a folder of transformers, and to a pipeline of scikit-learn that
    begins with a vectoriser of words. Nothing is stated about other models, whose words are not known here.
    """
    is_unknown = _is_unknown(model)
    if is_unknown is None or not edits.edits:
        return ()
    texts = decoded(data.read(0, min(_N_TEXTS, len(data))).x)
    distinct = dict.fromkeys(word for text in texts for word in text.split())
    known = [word for word in distinct if not is_unknown(word)][:_WORDS]
    changed = [(word, new) for word in known for new in edited(word)]
    unknown = [(word, new) for word, new in changed if is_unknown(new)]
    if not unknown:
        return ()
    word, new = unknown[0]
    share = (
        f"{100 * len(unknown) / len(changed):.0f} % of the words that one edit makes of {len(known)} words"
    )
    return (
        f"the model does not know {share} it knows, such as {new!a} instead of {word!r}: the edit hides the word",
    )


def _is_unknown(model: Classifier) -> Callable[[str], bool] | None:
    """Return a function that states whether a model does not know a word; None if this cannot be found out."""
    if isinstance(model.net, TokenisedTexts):
        tokenizer = model.net.tokenizer
        unknown_id = tokenizer.unk_token_id
        if unknown_id is None:
            return None
        return lambda word: unknown_id in tokenizer(word, add_special_tokens=False)["input_ids"]
    source: Any = model.net.interface.source if isinstance(model.net, Estimator) else None
    vectoriser: Any = source.steps[0][1] if type(source).__name__ == "Pipeline" else None
    places = getattr(vectoriser, "vocabulary_", None)
    if places is None or getattr(vectoriser, "analyzer", "") != "word":
        return None
    analyse = vectoriser.build_analyzer()
    return lambda word: not any(term in places for term in analyse(word))
