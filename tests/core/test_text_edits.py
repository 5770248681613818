"""The judge of changed texts against an enumeration of what is allowed, and violations made by hand."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast.core.batch import LARGEST, decoded, encoded
from holdfast.core.errors import UsageError
from holdfast.io.texts_of_users import text_edits
from holdfast.threats.text_edits import (
    HOMOGLYPHS,
    INVISIBLE,
    NEIGHBOURS,
    TextEdits,
    registered_domains,
    within_edits,
)

INSIDE = 1.0


def reachable(word, edits, before=""):
    """All words that at most `edits` operations on separate characters make of the rest of a word."""
    found = {""} if not word else {word[0] + rest for rest in reachable(word[1:], edits, word[0])}
    if not edits:
        return found
    inserted = {INVISIBLE, before, word[:1]} - {""}
    found |= {character + rest for character in inserted for rest in reachable(word, edits - 1, before)}
    if word:
        replaced = {"", *NEIGHBOURS.get(word[0], ""), HOMOGLYPHS.get(word[0], "")}
        found |= {new + rest for new in replaced for rest in reachable(word[1:], edits - 1, word[0])}
    if len(word) > 1:
        found |= {word[1] + word[0] + rest for rest in reachable(word[2:], edits - 1, word[1])}
    return found


def distance(constraint, new, old):
    width = max(len(new), len(old), 1)
    return float(constraint.distance(encoded([new], width), encoded([old], width)))


@given(
    st.lists(
        st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=9), max_size=4
    )
)
def test_texts_are_rows_of_code_points(texts):
    assert decoded(encoded(texts, 9)) == texts
    assert decoded(torch.full((1, 2), float(LARGEST))) == ["\U0010ffff" * 2]


@pytest.mark.parametrize("word", ["a", "aa", "we", "spa", "loot", "Ab1"])
@pytest.mark.parametrize("edits", [1, 2])
def test_the_judge_accepts_exactly_the_words_that_the_operations_reach(word, edits):
    allowed = reachable(word, edits)
    candidates = reachable(word, edits + 1) if len(word) < 3 else allowed | {w + "z" for w in allowed}
    assert {new for new in candidates if within_edits(word, new, edits)} == allowed & candidates


def test_the_number_of_changed_words_and_their_edits_are_limited():
    constraint = TextEdits(edits=1, words=2)
    assert distance(constraint, "fre cahs now", "free cash now") == INSIDE
    assert distance(constraint, "fre cash now", "free cash now") == 0.5
    assert distance(constraint, "free cash now", "free cash now") == 0
    for wrong in (
        "fre cahs nw",  # three words
        "fe cash now",  # two edits
        "frie cash now",  # another letter
        "free  cash now",  # whitespace
        "free cash",  # a word less
        "free cash now x",  # a word more
        "free\tcash now",
    ):
        assert distance(constraint, wrong, "free cash now") > INSIDE, wrong
    assert distance(constraint, "a b", "a c b") > INSIDE
    assert distance(constraint, " b", "a b") > INSIDE  # the word is deleted


def test_the_domain_of_a_url_and_protected_words_do_not_change(tmp_path):
    (tmp_path / "words.json").write_text(json.dumps({"protect": [r"^\d+$"]}))
    constraint = text_edits(edits=1, words=1, file=str(tmp_path / "words.json"))
    old = "win 100 at http://a.shop.co.uk/free www.bank.com"
    assert distance(constraint, old.replace("/free", "/fre"), old) == INSIDE
    assert distance(constraint, old.replace("//a.", "//s."), old) == INSIDE
    assert distance(constraint, old.replace("100", "10"), old) > INSIDE
    assert distance(constraint, old.replace("shop", "shp"), old) > INSIDE
    assert distance(constraint, old.replace("bank", "bamk"), old) > INSIDE
    assert distance(constraint, old.replace("http:", "http"), old) > INSIDE
    assert registered_domains("(WWW.Bank.com),") == ("bank.com",)
    two = "https://a.com/?to=http://bank.com"
    assert distance(constraint, two.replace("bank", "bamk"), two) > INSIDE


def test_synonyms_and_appended_words_are_those_of_the_file(tmp_path):
    file = tmp_path / "words.json"
    file.write_text(json.dumps({"synonyms": {"good": ["fine"], "UK": ["GB"]}, "insert": ["home", "ok"]}))
    synonyms = text_edits(synonyms=1, file=str(file))
    assert distance(synonyms, "(Fine), good", "(Good), good") == INSIDE
    assert distance(synonyms, "in GB!", "in UK!") == INSIDE
    for wrong in ("(fine), good", "(Fine) good", "(Fine), fine", "(Great), good"):
        assert distance(synonyms, wrong, "(Good), good") > INSIDE, wrong
    inserts = text_edits(inserts=2, file=str(file))
    assert distance(inserts, "good home ok", "good") == INSIDE
    assert distance(inserts, "good ok", "good") == 0.5
    for wrong in ("good home ok ok", "goodhome", "good  ok", "ok good", "good fine", "good "):
        assert distance(inserts, wrong, "good") > INSIDE, wrong


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({}, "allows no change"),
        ({"edits": 1}, "no number of words"),
        ({"synonyms": 1, "words": 1, "file": "a"}, "has words"),
        ({"synonyms": 1, "inserts": 1, "file": "a"}, "combines synonyms and inserts"),
        ({"inserts": 1}, "has no file"),
    ],
)
def test_limits_that_do_not_fit_together_are_refused(limits, message):
    with pytest.raises(UsageError, match=message):
        TextEdits(**limits)


def test_substitutes_are_the_words_that_the_judge_accepts():
    content = json.dumps(
        {"synonyms": {"cash": ["money", "cash"], "Win": ["gain"], "www.a.com": ["b"]}, "protect": ["^7"]}
    )
    edits = TextEdits(synonyms=1, file="words.json", content=content)
    words = ["cash", "(Cash!", "Win", "win", "...", "7cash", "www.a.com", "cash-cash"]
    expected = [("money",), ("(Money!",), ("gain",), (), (), (), (), ()]
    assert [edits.substitutes(word) for word in words] == expected
    for word, new in zip(words, expected, strict=True):
        for each in new:
            assert edits.distance(encoded([each], 20), encoded([word], 20)) == 1
