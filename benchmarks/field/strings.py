"""Compares an assessment of a model of texts with exhaustive search over all texts with one edit of one word.

python -m benchmarks.field.strings MODEL.onnx TEXTS.csv       # texts in the first column; 50 texts take a minute
"""

import csv
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import holdfast
from holdfast.core.batch import encoded
from holdfast.io.models.models import Declared, open_model
from holdfast.threats.text_edits import HOMOGLYPHS, INVISIBLE, NEIGHBOURS

THREAT = "text:edits=1,words=1"


def one_edit(word: str) -> Iterator[str]:
    """Yield all words that one allowed operation makes of a word, without the empty one, some of them repeatedly."""
    for place, character in itertools.product(range(len(word) + 1), (INVISIBLE, *word)):
        if character == INVISIBLE or character in word[max(0, place - 1) : place + 1]:
            yield word[:place] + character + word[place:]
    for place, character in enumerate(word):
        if len(word) > 1:
            yield word[:place] + word[place + 1 :]
            yield word[:place] + word[place : place + 2][::-1] + word[place + 2 :]
        for new in (*NEIGHBOURS.get(character, ""), *HOMOGLYPHS.get(character, "")):
            yield word[:place] + new + word[place + 1 :]


def allowed_texts(text: str) -> list[str]:
    """Return the text, and all texts with one edit in one word. The text has no URL and no protected word."""
    parts = re.split(r"(\s+)", text)
    changed = (
        "".join((*parts[:place], new, *parts[place + 1 :]))
        for place in range(0, len(parts), 2)
        for new in one_edit(parts[place])
    )
    return list(dict.fromkeys((text, *changed)))


def exhaustive(model: Callable[[list[str]], Sequence[int]], texts: Sequence[str]) -> list[bool]:
    """Return for each text whether the class stays the same for all allowed texts. `model` returns the class numbers of
    texts.
    """
    return [len(set(model(allowed_texts(text)))) == 1 for text in texts]


def classes_of(path: str) -> Callable[[list[str]], list[int]]:
    """Return the function from texts to the class numbers that an ONNX file of texts returns."""
    model = open_model(path, declared=Declared(texts=True)).model

    def classes(texts: list[str]) -> list[int]:
        found: list[int] = model(encoded(texts, max(map(len, texts)))).argmax(1).tolist()
        return found

    return classes


def compared(path: str, texts: Sequence[str]) -> tuple[list[bool], list[bool]]:
    """Return for each text whether it survives every attack of an assessment, and whether it survives exhaustive
    search. The labels are the classes that the model predicts.
    """
    model = classes_of(path)
    result = holdfast.assess(path, (list(texts), model(list(texts))), threat=THREAT)
    surviving = (~result.evidence["success"].bool()).tolist()
    return surviving, exhaustive(model, texts)


if __name__ == "__main__":
    with Path(sys.argv[2]).open(newline="") as file:
        rows = [row[0] for row in csv.reader(file)][1:51]
    survivors, robust = compared(sys.argv[1], rows)
    print(
        f"{len(rows)} texts, {THREAT}: {sum(survivors)} survive the assessment, {sum(robust)} exhaustive search, "
        f"{sum(a == b for a, b in zip(survivors, robust, strict=True))} verdicts are equal"
    )
