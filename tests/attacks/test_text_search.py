"""TextSearch finds the exact worst case on linear models of words, and returns only allowed texts."""

import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from holdfast.attacks import TextSearch
from holdfast.core.batch import LARGEST, Batch, decoded, encoded
from holdfast.core.constraints import allowed
from holdfast.core.draws import Draws
from holdfast.core.meter import Metered, margin
from holdfast.core.model import Bounds, Classifier
from holdfast.core.threat import ThreatModel
from holdfast.io.texts_of_users import text_edits
from holdfast.threats.parsing import parse_threat
from holdfast.threats.text_edits import HOMOGLYPHS, INVISIBLE, NEIGHBOURS

WEIGHTS = {
    "win": 1.5,
    "cash": 1.0,
    "free": 0.7,
    "wni": 0.4,
    "casy": -2.0,
    "home": -1.2,
    "ok": -0.4,
    "you": -0.1,
}
TEXTS = ["win free cash", "win you cash\tcash now", "see you home ok", "free  http://win.com/a ok", "cash"]
LABELS = torch.tensor([1, 1, 0, 1, 1])


class Words(nn.Module):
    """Sum of the weights of the words, or of the distinct words, as the logit of class 1."""

    def __init__(self, *, binary=False):
        super().__init__()
        self.binary = binary

    def forward(self, x):
        words = [text.split() for text in decoded(x)]
        counted = [set(each) if self.binary else each for each in words]
        logit = torch.tensor([sum(WEIGHTS.get(word, 0.0) for word in each) - 0.5 for each in counted])
        return torch.stack((torch.zeros_like(logit), logit), 1)


def attacked(constraint, *, binary=False, attack=None, queries=None):
    width = max(map(len, TEXTS)) + constraint.room[0] * constraint.room[1]
    batch = Batch(encoded(TEXTS, width), LABELS, torch.arange(len(TEXTS)))
    model = Classifier(Words(binary=binary), bounds=Bounds(0.0, float(LARGEST)), classes=2, access="scores")
    threat = ThreatModel(constraint, access="scores", queries=queries)
    meter = Metered(model, batch, threat)
    x_adv = (attack or TextSearch())(meter, batch, threat, rng=Draws(0))
    assert allowed(constraint, x_adv, batch.x, model.bounds).all()
    return decoded(x_adv), margin(model(x_adv), batch), meter.spent, batch, model


def one_edit(word):
    """All words that one operation makes of a word."""
    for place, character in itertools.product(range(len(word) + 1), (INVISIBLE, *word)):
        new = word[:place] + character + word[place:]
        if character == INVISIBLE or character in word[max(0, place - 1) : place + 1]:
            yield new
    for place, character in enumerate(word):
        yield word[:place] + word[place + 1 :]
        yield word[:place] + word[place : place + 2][::-1] + word[place + 2 :]
        for new in (*NEIGHBOURS.get(character, ""), *HOMOGLYPHS.get(character, "")):
            yield word[:place] + new + word[place + 1 :]


def lowest(texts, batch, row, model):
    """The lowest margin of a text among all allowed ones."""
    rows = batch.take(torch.full((len(texts),), row))
    return float(margin(model(encoded(texts, batch.x.shape[1])), rows).min())


def worst_after_edits(text, words, protected=()):
    """All texts with one edit in at most `words` words."""
    parts = text.split(" ")
    editable = [
        place for place, part in enumerate(parts) if part and part not in protected and "\t" not in part
    ]
    for places in itertools.combinations(editable, min(words, len(editable))):
        news = [[new for new in one_edit(parts[place]) if new] + [parts[place]] for place in places]
        for chosen in itertools.product(*news):
            changed = dict(zip(places, chosen, strict=True))
            yield " ".join(changed.get(place, part) for place, part in enumerate(parts))


@pytest.mark.parametrize("words", [1, 2])
def test_edits_reach_the_exact_worst_case_of_a_linear_model(words):
    constraint = parse_threat(f"text:edits=1,words={words}").opened().constraint
    texts, margins, _, batch, model = attacked(constraint)
    for row in (0, 2, 4):  # the texts of single spaces without a URL
        exact = lowest(list(worst_after_edits(TEXTS[row], words)), batch, row, model)
        # the attack stops at the first text that is misclassified
        assert float(margins[row]) == pytest.approx(exact) or (exact <= 0 and margins[row] <= 0)
    assert texts[3].split("/a")[0].endswith("http://win.com")


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("inserts", [1, 2, 3])
def test_inserts_reach_the_exact_worst_case_of_a_linear_model(tmp_path, inserts, binary):
    words = ["home", "ok", "you", "see"]
    (tmp_path / "w.json").write_text(json.dumps({"insert": words}))
    constraint = text_edits(inserts=inserts, file=str(tmp_path / "w.json"))
    _, margins, _, batch, model = attacked(constraint, binary=binary)
    for row, text in enumerate(TEXTS):
        tails = [
            " ".join((text, *chosen))
            for n in range(inserts + 1)
            for chosen in itertools.product(words, repeat=n)
        ]
        exact = lowest(tails, batch, row, model)
        assert float(margins[row]) == pytest.approx(exact) or (exact <= 0 and margins[row] <= 0)


def test_synonyms_are_combined_and_protected_words_stay(tmp_path):
    content = {"synonyms": {"win": ["gain", "home"], "cash": ["money", "casy"]}, "protect": ["^win$"]}
    (tmp_path / "w.json").write_text(json.dumps(content))
    texts, *_ = attacked(text_edits(synonyms=2, file=str(tmp_path / "w.json")))
    assert texts[0] == "win free casy" and texts[4] == "casy"
    del content["protect"]
    (tmp_path / "w.json").write_text(json.dumps(content))
    texts, margins, *_ = attacked(text_edits(synonyms=2, file=str(tmp_path / "w.json")))
    assert margins[0] <= 0 and texts[4] == "casy"


@pytest.mark.parametrize("queries", [1, 7, 40])
def test_queries_are_limited(queries):
    constraint = parse_threat("text:edits=2,words=3").opened().constraint
    assert int(attacked(constraint, queries=queries)[2].queries.max()) <= queries
    assert int(attacked(constraint, attack=TextSearch(queries=queries))[2].queries.max()) <= queries


def test_several_edits_of_a_word_are_allowed_ones():
    constraint = parse_threat("text:edits=3,words=2").opened().constraint
    texts, margins, *_ = attacked(constraint, attack=TextSearch(beam=2))  # `attacked` calls the judge
    assert texts != TEXTS and margins[0] <= 0


PIECES = (
    "://",
    "www.",
    "a:/b",
    "wwww.x",
    "http:/",
    "//a",
    "w.w",
    ".co",
    ".uk",
    "/p",
    "?",
    "@",
    "(",
    "Ab",
    "..",
    " ",
    "\n",
)


class Hashed(nn.Module):
    """Scores that look random, so that any change may be chosen, and no text is misclassified."""

    def forward(self, x):
        score = torch.sin(1e3 * x.mul(torch.arange(x.shape[1]) + 1.7).sum(1))
        return torch.stack((torch.full_like(score, -2.0), score), 1)


@given(
    st.lists(
        st.lists(st.sampled_from(PIECES), min_size=1, max_size=7).map("".join).filter(str.strip),
        min_size=1,
        max_size=3,
    )
)
def test_changes_of_words_that_look_like_urls_are_allowed_ones(texts):
    constraint = parse_threat("text:edits=2,words=3").opened().constraint
    batch = Batch(encoded(texts, 60), torch.ones(len(texts), dtype=torch.int64), torch.arange(len(texts)))
    model = Classifier(Hashed(), bounds=Bounds(0.0, float(LARGEST)), classes=2, access="scores")
    x_adv = TextSearch(queries=400, beam=2)(model, batch, ThreatModel(constraint), rng=Draws(0))
    assert allowed(constraint, x_adv, batch.x, model.bounds).all(), decoded(x_adv)
