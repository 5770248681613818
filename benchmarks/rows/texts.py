"""TextSearch on linear models of words, for which the exact worst case of each text is a sum of the largest gains."""

import csv
import gzip
import itertools
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import holdfast
from benchmarks.absent import Absent
from benchmarks.networks import folder
from benchmarks.record import Cells, Claim, Outcome
from holdfast.attacks import TextSearch
from holdfast.threats.text_edits import HOMOGLYPHS, INVISIBLE, NEIGHBOURS

WHAT = "`TextSearch` on linear models: recall of spam after inserted words and accuracy after edited words"
ATTACK = TextSearch(queries=50_000)
"""More queries than the texts have changes of single words, so that all of them are tried."""
INSERTS, WORDS, LISTED = (1, 5, 10), (1, 2, 3), 50


def measured() -> Outcome:
    try:
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
    except ImportError as why:
        raise Absent("scikit-learn is not installed: pip install -e '.[sklearn]'") from why

    def fitted(x: Sequence[str], y: Sequence[int], *, binary: bool) -> Any:
        return make_pipeline(CountVectorizer(binary=binary), LogisticRegression(max_iter=1000)).fit(x, y)

    table: list[Cells] = []
    (x, y), (x_test, y_test) = texts_of("sms_spam.csv.gz", "spam")
    spam = [text for text, label in zip(x_test, y_test, strict=True) if label]
    model = fitted(x, y, binary=True)
    table += [_inserted(model, spam, inserts) for inserts in INSERTS]
    (x, y), (x_test, y_test) = texts_of("sst2_sentences.csv.gz", "1")
    model = fitted(x, y, binary=False)
    table += [_edited(model, x_test, y_test, words) for words in WORDS]
    claims = [
        Claim(
            f"{row['data']}, {row['threat']}: texts whose result is not the exact one <= 0",
            row["different"],
            0,
        )
        for row in table
    ]
    config: Cells = {"queries": ATTACK.queries, "beam": ATTACK.beam, "listed": LISTED, "seed": 0}
    return Outcome(table, claims, config)


def texts_of(name: str, positive: str) -> Iterator[tuple[list[str], list[int]]]:
    """The texts and labels of the train and the test split of a file."""
    path = folder("HOLDFAST_DATA", "data") / name
    if not path.exists():
        raise Absent(f"{name} is not at hand; HOLDFAST_DATA names its folder")
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["text"].strip()]
    for split in ("train", "test"):
        chosen = [row for row in rows if row["split"] == split]
        yield [row["text"] for row in chosen], [int(row["label"] == positive) for row in chosen]


def _weights(model: Any) -> dict[str, float]:
    words = model[0].get_feature_names_out()
    return dict(zip(words, model[1].coef_[0].tolist(), strict=True))


def _inserted(model: Any, spam: list[str], inserts: int) -> Cells:
    """Recall after words of a list were appended, by the attack and exactly: the sum of the lowest weights of listed
    words that the text does not contain.
    """
    weights = _weights(model)
    good = sorted(weights, key=weights.__getitem__)[:LISTED]
    analyse = model[0].build_analyzer()
    exact = []
    for text, logit in zip(spam, model.decision_function(spam).tolist(), strict=True):
        gains = [weights[word] for word in good if word not in {*analyse(text)}]
        exact.append(logit + sum(min(gain, 0.0) for gain in gains[:inserts]))
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "words.json"
        path.write_text(json.dumps({"insert": good}))
        threat = f"text:inserts={inserts},file={path}"
        cells = _compared(model, spam, [1] * len(spam), np.array(exact) > 0, threat)
    return {
        "data": "SMS spam, recall",
        "threat": f"inserts={inserts}",
        **cells,
        "unknown words only, %": None,
    }


def _edited(model: Any, texts: list[str], labels: list[int], words: int) -> Cells:
    """Accuracy after one edit of some words, by the attack and exactly: the sum of the largest gains of the words,
    because each word adds its own weights.
    """
    weights, analyse = _weights(model), model[0].build_analyzer()

    def score(word: str) -> float:
        return sum(weights.get(token, 0.0) for token in analyse(word))

    exact, unknown = [], []
    for text, label, logit in zip(texts, labels, model.decision_function(texts).tolist(), strict=True):
        sign = 1 if label else -1
        parts = text.split()
        gains = [
            max(sign * (score(word) - score(new)) for new in {word, *_one_edit(word)} if new)
            for word in parts
        ]
        alone = [max(sign * score(word), 0.0) for word in parts]
        for found, margins in ((gains, exact), (alone, unknown)):
            margins.append(sign * logit - sum(sorted(found, reverse=True)[:words]))
    cells = _compared(model, texts, labels, np.array(exact) > 0, f"text:edits=1,words={words}")
    share = 100 * float(np.mean(np.array(unknown) > 0))
    return {
        "data": "SST-2, accuracy",
        "threat": f"edits=1,words={words}",
        **cells,
        "unknown words only, %": share,
    }


def _one_edit(word: str) -> Iterator[str]:
    """The words that one edit makes of a word."""
    for place in range(len(word) + 1):
        for new in (INVISIBLE, *word[max(0, place - 1) : place + 1]):
            yield word[:place] + new + word[place:]
    for place, character in enumerate(word):
        yield word[:place] + word[place : place + 2][::-1] + word[place + 2 :]
        for new in itertools.chain([""], NEIGHBOURS.get(character, ""), HOMOGLYPHS.get(character, "")):
            yield word[:place] + new + word[place + 1 :]


def _compared(model: Any, texts: list[str], labels: list[int], exact: Any, threat: str) -> Cells:
    """The share of texts that are right after the attack, and the number of texts on which it is not exact."""
    start = time.process_time()
    result = holdfast.attack(model, texts, labels, ATTACK, threat)
    right = result.clean_correct & ~result.success
    return {
        "n": len(texts),
        "clean, %": 100 * float(np.mean(result.clean_correct)),
        "attack, %": 100 * float(np.mean(right)),
        "exact, %": 100 * float(np.mean(exact)),
        "different": int((right != exact).sum()),
        "queries": float(np.mean(result.queries[result.clean_correct])),
        "CPU s": time.process_time() - start,
    }
