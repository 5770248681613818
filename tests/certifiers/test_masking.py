"""Randomised masking against exact enumeration: no certificate is wrong, and the masks do not depend on words or
batches.
"""

from itertools import combinations, product
from math import comb

import pytest
import torch

from holdfast.certifiers.masking import Masking, miss_limit
from holdfast.certifiers.protocol import Proofs, StatisticalProver
from holdfast.certifiers.smoothing import Counting
from holdfast.core.batch import Batch, encoded
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import EVERY, Classifier
from holdfast.core.threat import ThreatModel
from holdfast.io.models.adapting import TextFunction
from holdfast.threats.text_edits import TextEdits

WORDS = 8


def scores(texts):
    """Class 1 if a text has more words with an "a" than with a "b"."""
    return [[0.0, text.count("a") - text.count("b") - 0.5] for text in texts]


def classifier(function=scores):
    return Classifier(TextFunction(function), access="scores", batches=EVERY)


def batch_of(texts, labels=None, width=64):
    labels = [1] * len(texts) if labels is None else labels
    return Batch(encoded(texts, width), torch.tensor(labels), torch.arange(len(texts)))


def share(text, label, kept):
    """The exact probability of a label under the masks."""
    words, votes = text.split(), 0
    for places in combinations(range(len(words)), kept):
        masked = " ".join(word if place in places else "_" for place, word in enumerate(words))
        (row,) = scores([masked])
        votes += (row[1] > row[0]) == label
    return votes / comb(len(words), kept)


HOW = Masking(keep=0.25, mask="_", draws=2_000, failure_probability=0.01)
TEXTS = [" ".join("a" * k + "b" * (WORDS - k)) for k in range(WORDS + 1)]


def proofs(texts=TEXTS, changes=1, how=HOW, **kwargs):
    threat = ThreatModel(TextEdits(edits=1, words=changes))
    batch = batch_of(texts, **kwargs)
    return how.ready(classifier(), batch, threat)(batch)


def test_certified_texts_keep_their_class_after_every_change_of_a_word():
    found = proofs()
    for text, certified in zip(TEXTS, found.certified.tolist(), strict=True):
        exact = share(text, 1, 2)
        if certified:
            assert exact > 0.5 + comb(WORDS - 1, 1) / comb(WORDS, 2) - 1e-9
            for place, new in product(range(WORDS), "abc"):
                words = text.split()
                words[place] = new
                assert share(" ".join(words), 1, 2) > 0.5
        assert certified == (exact > 1 - miss_limit(WORDS, 2, 1))
    assert found.certified.any() and not found.certified.all()
    assert torch.equal(found.certified, found.radius >= 1)
    assert (found.bound[found.certified] >= 0).all()


def test_the_bound_is_the_exact_probability_that_a_changed_word_is_kept():
    kept = [places for places in combinations(range(WORDS), 2) if set(places) & {1, 5}]
    assert miss_limit(WORDS, 2, 2) == pytest.approx(0.5 - len(kept) / comb(WORDS, 2))
    assert miss_limit(20, 2, 1) <= 0.4 and miss_limit(4, 2, 3) < 0 and miss_limit(2, 1, 5) < 0


def test_a_wrong_text_is_broken_and_a_short_one_is_not_examined():
    found = proofs(["b b b b b b b b", "a a", "a a a a a a a a"])
    assert found.broken.tolist() == [True, False, False]
    assert found.certified.tolist() == [False, False, True]
    assert found.work[1] == 0 and not found.abstained.any()


def test_verdicts_do_not_depend_on_the_batch():
    texts = [*TEXTS, "a a a", "a a a a a a a a a a b"]
    batch, threat = batch_of(texts), ThreatModel(TextEdits(edits=1, words=1))
    ready = HOW.ready(classifier(), batch, threat)
    whole, parts = ready(batch), Proofs.joined([ready(part) for part in batch.split(2)])
    for name in ("certified", "bound", "work", "broken", "radius", "abstained"):
        assert torch.equal(getattr(whole, name), getattr(parts, name)), name
    assert len(ready(batch.take(torch.arange(0))).certified) == 0


def test_masks_depend_on_the_number_of_words_only_and_are_uniform():
    seen = []

    def recorded(texts):
        seen.extend(texts)
        return scores(texts)

    model, rng, ids = classifier(recorded), Draws(0).at("masks"), torch.tensor([3])
    for text in ("a a\ta a a", "x y\tz u v"):
        HOW.votes(model, encoded([text], 16), ids, range(2_000), rng=rng)
    kept = [[place for place, word in enumerate(text.split()) if word != "_"] for text in seen]
    assert kept[:2_000] == kept[2_000:] and all(len(places) == 1 for places in kept)
    assert all("\t" in text for text in seen)
    counts = torch.bincount(torch.tensor(kept[:2_000])[:, 0], minlength=5)
    assert (counts - 400).abs().max() < 80  # 4.5 standard deviations


def test_deleted_words_leave_the_whitespace():
    (text,) = {
        *Masking(keep=0.4, mask="")._masked(["a", " ", "b"], Draws(0), torch.tensor([7])),
    }
    assert text in ("a ", " b")


def test_an_attacked_text_is_refuted_exactly_if_the_smoothed_classifier_is_wrong_there():
    refuted = Counting(HOW, classifier()).refuted(batch_of(TEXTS))
    assert refuted.tolist() == [share(text, 1, 2) < 0.5 for text in TEXTS]


def test_it_is_a_statistical_method_that_refuses_what_it_does_not_cover():
    assert isinstance(HOW, StatisticalProver)
    inserts = TextEdits(inserts=1, file="words.json", content='{"insert": ["a"]}')
    for threat, message in (
        (ThreatModel(inserts), "whose number stays"),
        (ThreatModel(TextEdits(edits=1, words=1), goal=1), "leave goal= out"),
        (ThreatModel(TextEdits(edits=1, words=7)), "allow fewer changed words"),
    ):
        with pytest.raises(UsageError, match=message):
            HOW.ready(classifier(), batch_of(TEXTS), threat)
