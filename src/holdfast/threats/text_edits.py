"""Edits of texts as a constraint, such as `text:edits=2,words=3` in threat models.

Inputs are texts as rows of code points (`core/batch.py`). Words are what whitespace separates. The operations are those
of Pruthi, Dhingra & Lipton, "Combating Adversarial Misspellings with Robust Word Recognition", ACL 2019,
arXiv:1905.11268, Li et al., "TextBugger", NDSS 2019, arXiv:1812.05271, and Boucher et al., "Bad Characters:
Imperceptible NLP Attacks", IEEE S&P 2022, arXiv:2106.09898.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch

from holdfast.core.batch import decoded
from holdfast.core.errors import UsageError
from holdfast.core.types import Inputs, PerExample
from holdfast.threats.domains import TEXT, Domain
from holdfast.threats.parsing import refuse_text_limits
from holdfast.threats.transformations import Whole

INVISIBLE = "\u200b"
"""Character that an edit may insert anywhere: the zero-width space."""
_KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_ROWS = {(row, column): key for row, keys in enumerate(_KEYS) for column, key in enumerate(keys)}
_BESIDE = ((0, -1), (0, 1), (-1, 0), (-1, 1), (1, 0), (1, -1))
"""Offsets of the neighbours of a key; each row of a keyboard is shifted to the right by a part of a key."""
_LOWER = {
    key: "".join(_ROWS.get((row + down, column + right), "") for down, right in _BESIDE)
    for (row, column), key in _ROWS.items()
}
NEIGHBOURS: Mapping[str, str] = {**_LOWER, **{key.upper(): keys.upper() for key, keys in _LOWER.items()}}
"""Neighbouring letters of each letter on a QWERTY keyboard."""
HOMOGLYPHS: Mapping[str, str] = {
    **dict(
        zip(
            "acehijopsuxy",
            "\u0430\u0441\u0435\u04bb\u0456\u0458\u043e\u0440\u0455\u057d\u0445\u0443",
            strict=True,
        )
    ),
    **dict(
        zip(
            "ABCEHIJKMOPSTXY",
            "\u0410\u0412\u0421\u0415\u041d\u0406\u0408\u041a\u041c\u041e\u0420\u0405\u0422\u0425\u04ae",
            strict=True,
        )
    ),
}
"""Letter of another alphabet that looks like each letter."""
_SECOND_LEVELS = frozenset(
    ("ac", "co", "com", "edu", "go", "gov", "ltd", "me", "ne", "net", "or", "org", "plc")
)
"""Labels before the code of a country that form a suffix with it, as in `co.uk`."""


@dataclass(frozen=True)
class TextEdits(Whole):
    """Constraint that allows changes of a text: edits of characters in some words, replacements of words by synonyms,
    or further words at the end.

    Exactly one of `edits`, `synonyms` and `inserts` is positive. Whitespace never changes. One edit deletes a
    character, swaps two neighbouring characters, replaces a letter by a neighbouring key or by a homoglyph, repeats a
    character, or inserts a zero-width space. A word keeps at least one character. Words that match a protected pattern
    do not change, and the registered domains of URLs do not change.
    """

    name: ClassVar[str] = "text"
    provers: ClassVar[tuple[str, ...]] = ("substitutions",)
    domain: ClassVar[Domain | None] = TEXT

    edits: int = 0
    """largest number of edits of each changed word (optimal string alignment distance)"""
    words: int = 0
    """largest number of words with edits"""
    synonyms: int = 0
    """largest number of words that are replaced by a synonym in the file"""
    inserts: int = 0
    """largest number of words of the file that are appended, each after one space"""
    file: str = ""
    """path of the JSON file with synonyms, words and protected patterns, or of a folder with embeddings of words"""
    similarity: float = 0.0
    """smallest cosine similarity of the embeddings of synonyms, if `file` is a folder; otherwise 0"""
    content: str = field(default="", repr=False)
    """content of the file: a JSON object with `synonyms`, `insert` and `protect`"""

    def __post_init__(self) -> None:
        refuse_text_limits(self.limits)
        if not self.file and self.content:
            raise UsageError(
                "the constraint has the content of a file, and no name of it; give file=FILE.json"
            )

    @property
    def limits(self) -> Mapping[str, float | str]:
        """Limits of the changes by their names in the threat string, without those that are 0, and the file with its
        content.
        """
        named = {
            name: getattr(self, name)
            for name in ("edits", "words", "synonyms", "inserts", "file", "similarity", "content")
        }
        return {name: limit for name, limit in named.items() if limit}

    @property
    def changes(self) -> int:
        """Largest number of changed or appended words."""
        return self.words or self.synonyms or self.inserts

    @cached_property
    def lists(self) -> Mapping[str, Any]:
        """Content of the file; empty without a file."""
        content: Mapping[str, Any] = json.loads(self.content) if self.content else {}
        return content

    @cached_property
    def protected(self) -> tuple[re.Pattern[str], ...]:
        """Patterns of the words that must not change."""
        return tuple(re.compile(pattern) for pattern in self.lists.get("protect", ()))

    @property
    def room(self) -> tuple[int, int]:
        """Number of words that may become longer, and the largest number of characters that each may gain. Appended
        words include the space before them.
        """
        if self.inserts:
            return self.inserts, 1 + max(map(len, self.lists.get("insert", ("",))))
        if self.edits:
            return self.words, self.edits
        entries = self.lists.get("synonyms", {}).items()
        # one more, because a few letters are two in upper case
        growth = (len(new) - len(old) + 1 for old, news in entries for new in news)
        return self.synonyms, max(growth, default=0)

    def distance(self, x_adv: Inputs, x: Inputs) -> PerExample:
        """Return for each text the number of its changed or appended words divided by the largest allowed one, which is
        at most 1, and infinity for a text that the constraint does not allow.
        """
        pairs = zip(decoded(x_adv), decoded(x), strict=True)
        # torch.tensor of an empty list has the default type
        return torch.tensor([self._changed(new, old) for new, old in pairs]).to(x)

    def _changed(self, new: str, old: str) -> float:
        if new == old:
            return 0.0
        if self.inserts:
            return self._appended(new, old) / self.inserts
        parts, new_parts = (re.findall(r"\s+|\S+", text) for text in (old, new))
        if len(parts) != len(new_parts):
            return torch.inf
        changed = [(before, after) for before, after in zip(parts, new_parts, strict=True) if before != after]
        if not all(self._allows(before, after) for before, after in changed):
            return torch.inf
        share = len(changed) / self.changes
        return share if share <= 1 else torch.inf

    def _appended(self, new: str, old: str) -> float:
        """Return the number of listed words that `new` has after `old`, or infinity if anything else differs."""
        if not new.startswith(f"{old} "):
            return torch.inf
        words, listed = new[len(old) + 1 :].split(" "), frozenset(self.lists.get("insert", ()))
        return len(words) if len(words) <= self.inserts and listed.issuperset(words) else torch.inf

    def _allows(self, old: str, new: str) -> bool:
        """Return whether the word `old` may become `new`."""
        if old.isspace() or new.isspace() or registered_domains(old) != registered_domains(new):
            return False
        if any(pattern.search(old) for pattern in self.protected):
            return False
        return within_edits(old, new, self.edits) if self.edits else self._is_synonym(old, new)

    def _is_synonym(self, old: str, new: str) -> bool:
        """Return whether the file lists a replacement of the word. Punctuation around the word stays. A word that is
        not listed itself is looked up in lower case, and a capital first letter stays one.
        """
        core = old.strip(PUNCTUATION)
        start = old.find(core)
        before, after = old[:start], old[start + len(core) :]
        if not (
            core and new.startswith(before) and new.endswith(after) and len(new) > len(before) + len(after)
        ):
            return False
        listed, replacement = self.lists.get("synonyms", {}), new[len(before) : len(new) - len(after)]
        if core in listed:
            return replacement in listed[core]
        capital = core[0].isupper()
        return any(
            replacement == (entry[:1].upper() + entry[1:] if capital else entry)
            for entry in listed.get(core.lower(), ())
        )

    def substitutes(self, word: str) -> tuple[str, ...]:
        """Return the other words that may replace a word by the synonyms of the file."""
        core, listed = word.strip(PUNCTUATION), self.lists.get("synonyms", {})
        if not core:
            return ()
        before, _, after = word.partition(core)
        entries = listed.get(core, listed.get(core.lower(), ()))
        raised = core not in listed and core[:1].isupper()
        words = (before + (new[:1].upper() + new[1:] if raised else new) + after for new in entries)
        return tuple(dict.fromkeys(new for new in words if new != word and self._allows(word, new)))

    def refusal(self) -> UsageError:
        """Return the error for an attack that cannot be used under this constraint."""
        return UsageError(
            f"under {self} an attack changes words of texts, but this attack changes numbers; choose TextSearch, or a "
            "threat such as linf:8/255 for inputs that are numbers"
        )

    def resized(self, eps: float) -> "TextEdits":
        """Return the constraint with `eps` times as many changed words, rounded down, but at least one."""
        fewer = {
            name: max(1, int(getattr(self, name) * eps))
            for name in ("words", "synonyms", "inserts")
            if getattr(self, name)
        }
        return replace(self, **fewer)  # type: ignore[arg-type]  # the names are those of whole numbers


PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~\u2018\u2019\u201c\u201d\u2026"
"""Characters that are no part of a word when its synonyms are looked up."""


def registered_domains(word: str) -> tuple[str, ...]:
    """Return the registered domains of the URLs in a word, in lower case, in their order.

    A URL begins with a scheme or with `www.`, possibly after punctuation. Its registered domain is the last two labels
    of its host, or three after a suffix such as `co.uk`. For a number of a machine it is the host with its port.

    >>> [registered_domains(word) for word in ("(http://me@a.shop.co.uk:80/x", "www.example.com", "a.b")]
    [('shop.co.uk',), ('example.com',), ()]
    >>> registered_domains("http://a.com/?to=https://b.org/x")
    ('a.com', 'b.org')
    """
    _, *after_schemes = word.split("://")
    without_scheme = word.lstrip(PUNCTUATION)
    if not after_schemes and without_scheme.lower().startswith("www."):
        after_schemes = [without_scheme]
    return tuple(map(_registered_domain, after_schemes))


def _registered_domain(rest: str) -> str:
    """Return the registered domain of a URL from the text after its scheme."""
    host = re.split(r"[/?#]", rest, maxsplit=1)[0].rpartition("@")[2].partition(":")[0].lower()
    labels = host.rstrip(PUNCTUATION).split(".")
    if labels[-1].isdigit() or rest.startswith("["):  # the address of a machine
        return re.split(r"[/?#]", rest, maxsplit=1)[0].lower()
    two_part = len(labels[-1]) == 2 and len(labels) > 2 and labels[-2] in _SECOND_LEVELS
    return ".".join(labels[-3:] if two_part else labels[-2:])


def within_edits(old: str, new: str, edits: int) -> bool:
    """Return whether at most `edits` allowed operations change one word into another, by optimal string alignment: no
    character takes part in two operations.

    >>> within_edits("free", "fre", 1), within_edits("free", "frse", 1), within_edits("free", "firee", 2)
    (True, True, False)
    """
    if abs(len(old) - len(new)) > edits:
        return False
    costs = {(0, 0): 0}  # of the first i and j characters, in a band around the diagonal
    for i in range(len(old) + 1):
        for j in range(max(0, i - edits), min(len(new), i + edits) + 1):
            if i or j:
                costs[i, j] = min(_steps(old, new, i, j, costs), default=edits + 1)
        for j in range(i - 2 - edits, i - 1 + edits):  # the next row needs only the last two
            costs.pop((i - 2, j), None)
    return costs[len(old), len(new)] <= edits


def _steps(old: str, new: str, i: int, j: int, costs: Mapping[tuple[int, int], int]) -> list[int]:
    """Return the costs of the ways to align the first `i` and `j` characters."""
    far = len(old) + len(new)
    steps = []
    if i and j:
        before, after = old[i - 1], new[j - 1]
        if before == after:
            steps.append(costs.get((i - 1, j - 1), far))
        elif after in NEIGHBOURS.get(before, "") or after == HOMOGLYPHS.get(before):
            steps.append(costs.get((i - 1, j - 1), far) + 1)
    if i:
        steps.append(costs.get((i - 1, j), far) + 1)
    if j and (new[j - 1] == INVISIBLE or new[j - 1] in old[max(0, i - 1) : i + 1]):
        steps.append(costs.get((i, j - 1), far) + 1)
    if i > 1 and j > 1 and old[i - 2 : i] == new[j - 1] + new[j - 2]:
        steps.append(costs.get((i - 2, j - 2), far) + 1)
    return steps
