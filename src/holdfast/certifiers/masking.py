"""Randomised masking: certifies the classifier that predicts the most probable class of a text with masked words.

Zeng et al., "Certified Robustness to Text Adversarial Attacks by Randomized [MASK]", Computational Linguistics 49(2),
2023, arXiv:2105.03743. Levine & Feizi, "Robustness Certificates for Sparse Adversarial Attacks by Randomized Ablation",
AAAI 2020, arXiv:1911.09272. r of the T words of a text are kept at random. All d changed words are masked with the
probability C(T-d, r) / C(T, r), and the masked texts of both are then the same. If the base classifier predicts the
label with a probability above 3/2 - C(T-d, r) / C(T, r), the most probable class is therefore the label after any
change of d words. Differs from the papers: the class is the label and needs no draws of its own, the bound has no
estimate of the overlap (the factor β of Zeng et al.), and the draws end once the verdict is known.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, comb
from typing import Any, ClassVar

import torch
from torch import Tensor

from holdfast.certifiers import smoothing
from holdfast.certifiers.protocol import Proofs
from holdfast.core.batch import Batch, decoded, encoded
from holdfast.core.catalogue import MASKING
from holdfast.core.constraints import Constraint
from holdfast.core.draws import Draws
from holdfast.core.errors import Remedy, UsageError
from holdfast.core.model import EVERY, Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Ids, Inputs, Steps
from holdfast.statistics.intervals import fewest_draws, sequential_test
from holdfast.threats.text_edits import TextEdits

_ROWS = 512  # masked texts of one call of the model
_ROUNDED = 1 - 1e-12  # factor of a probability that is computed exactly and rounded down


@dataclass(frozen=True)
class Masking:
    """Randomised masking of words, which certifies the smoothed classifier for changed words of texts."""

    keep: float = 0.1
    """share of the words of a text that are kept, rounded down, but at least one word"""
    mask: str = "[MASK]"
    """word in the place of the others; with an empty one they are deleted"""
    draws: Steps = 10_000
    """largest number of masked copies of a text that are classified"""
    failure_probability: float = 0.001
    """probability, for each text, of a verdict that is wrong"""
    seed: int = 0
    """seed of the masks"""

    name: ClassVar[str] = "masking"
    place: ClassVar[str] = "masking"

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:
            raise UsageError(f"keep is {self.keep}; it must be between 0 and 1, such as 0.1")
        if self.mask.split() not in ([], [self.mask]) or "\0" in self.mask:
            raise UsageError(f"mask is {self.mask!r}; one word was expected, such as [MASK]")
        smoothing.refuse_impossible(self)

    @property
    def parameters(self) -> Mapping[str, float | str | bool]:
        """Settings that define the smoothed classifier, by their names."""
        return {"keep": self.keep, "mask": self.mask}

    @property
    def short(self) -> str:
        """The share of words that are kept, for the name of the smoothed classifier."""
        return f"keep = {self.keep:g}"

    @property
    def change(self) -> str:
        """The masks, as a noun for the report."""
        instead = f"replaced by {self.mask}" if self.mask else "deleted"
        return f"random masks, which keep {100 * self.keep:g} % of the words, while the others are {instead}"

    @property
    def alpha(self) -> float:
        """Failure probability of the certificate; the rest is that of the verdict that the prediction is wrong."""
        return (1 - smoothing.FOR_WRONG) * self.failure_probability

    def ready(self, model: Classifier, sample: Batch, threat: ThreatModel) -> "ReadyMasking":
        """Return the method for a frozen model in evaluation mode.

        Raises `UsageError` for another threat than changed words, for a target class, and if the sample has no text
        that can be certified with this share of words and number of draws.
        """
        edits = threat.constraint
        if not isinstance(edits, TextEdits) or edits.inserts:
            raise UsageError(
                f"the threat is {edits}, and masking certifies changes of the words of a text, whose number stays the "
                "same; give edits and words, or synonyms and a file"
            )
        if threat.goal is not None:
            raise UsageError(
                f"the goal is class {threat.goal}, and a certificate excludes all wrong classes; leave goal= out"
            )
        self._refuse_hopeless(sample, edits.changes)
        return ReadyMasking(self, model, edits.changes)

    def _refuse_hopeless(self, sample: Batch, changes: int) -> None:
        """Raise `UsageError` if agreement of all draws would certify no text of the sample."""
        counts = [len(text.split()) for text in decoded(sample.x)]
        if not counts or any(self.provable(words, self.kept(words), changes) for words in counts):
            return
        longest = max(counts)
        possible = [kept for kept in range(1, longest) if self.provable(longest, kept, changes)]
        remedies = (Remedy("keep", ceil(1e4 * max(possible) / longest) / 1e4),) if possible else ()
        raise UsageError(
            f"keep is {self.keep:g}: of the first {len(counts)} texts, with at most {longest} words, none can be "
            f"certified for {changes} changed words with {self.draws:,} draws, even if all draws agree"
            + ("" if possible else "; allow fewer changed words, or use longer texts"),
            *remedies,
        )

    def kept(self, words: int) -> int:
        """Return the number of words that are kept of a text with a number of words."""
        return max(1, int(self.keep * words))

    def provable(self, words: int, kept: int, changes: int) -> bool:
        """Return whether a text is certified if all draws agree."""
        limit = miss_limit(words, kept, changes)
        return limit > 0 and fewest_draws(limit, self.alpha) <= self.draws

    def votes(self, model: Classifier, x: Inputs, ids: Ids, draws: range, *, rng: Draws) -> Tensor:
        """Return how often each class is predicted for masked copies of each text, (n, classes + 1) int64."""
        texts = [_parts(text) for text in decoded(x)]

        def masked(rows: Tensor, numbers: Tensor) -> Inputs:
            copies: list[str] = []
            for row in sorted(set(rows.tolist())):
                here = rows == row
                copies += self._masked(
                    texts[row], rng, ids[rows[here]] * smoothing.MOST_DRAWS + numbers[here]
                )
            return encoded(copies, max(x.shape[1], *map(len, copies))).to(x)

        return smoothing.counted_votes(model, ids, draws, masked, _ROWS)

    def _masked(self, parts: list[str], rng: Draws, draws: Ids) -> list[str]:
        """Return a masked copy of a text for each draw. The masks depend on the number of words, but not on the words,
        which the certificate requires.
        """
        places = [place for place, part in enumerate(parts) if not part.isspace()]
        hidden = [part if part.isspace() else self.mask for part in parts]
        kept = rng.bits(draws, len(places)).topk(self.kept(len(places)), dim=1).indices
        copies = []
        for of_draw in kept.tolist():
            copy = hidden.copy()
            for k in of_draw:
                copy[places[k]] = parts[places[k]]
            copies.append("".join(copy))
        return copies

    def network(self, base: Classifier, draws: int) -> Classifier:
        """Return the model that attacks query: the votes on fixed masks."""
        return Classifier(smoothing.SmoothedVotes(base, self, draws), access=base.access, batches=EVERY)


@dataclass(frozen=True)
class ReadyMasking:
    """Randomised masking of a model for a number of changed words."""

    settings: Masking
    model: Classifier
    changes: int

    def __call__(self, batch: Batch) -> Proofs:
        """Return what the masks show about the smoothed classifier at the texts of a batch.

        `certified`: it predicts the label after any allowed change. `broken`: it predicts another class at the clean
        text. `radius` is the certified number of changed words divided by the allowed one, and `bound` the lower limit
        of the probability of the label less that of all other classes after the changes. Texts with too few words are
        not examined.
        """
        counts = torch.tensor([len(text.split()) for text in decoded(batch.x)], device=batch.ids.device)
        none = Proofs.none(batch.take(torch.arange(0, device=batch.ids.device)))
        parts = [Proofs(**vars(none) | {"radius": none.bound, "abstained": none.certified})]
        order = [torch.zeros_like(batch.ids[:0])]
        for words in sorted(set(counts.tolist())):
            rows = (counts == words).nonzero()[:, 0]
            order.append(rows)
            parts.append(self._of_length(batch.take(rows), words))
        joined, places = Proofs.joined(parts), torch.cat(order).argsort()
        values: dict[str, Any] = {
            name: values[places] for name, values in vars(joined).items() if isinstance(values, Tensor)
        }
        return Proofs(**values)

    def _of_length(self, batch: Batch, words: int) -> Proofs:
        """The proofs of texts with a number of words."""
        how, kept = self.settings, self.settings.kept(words)
        if not how.provable(words, kept, self.changes):
            none = Proofs.none(batch)
            return Proofs(
                **vars(none) | {"radius": torch.zeros_like(none.bound), "abstained": none.certified}
            )
        limit = miss_limit(words, kept, self.changes)

        def radius(misses: float) -> float:
            changed = 0
            while misses < miss_limit(words, kept, changed + 1):
                changed += 1
            return changed / self.changes

        def bound(misses: Tensor) -> Tensor:
            return 2 * (limit - misses)

        test = sequential_test(limit, how.draws, how.alpha)
        return smoothing.Counting(how, self.model).proofs(test, batch, 1.0, radius, bound)


def masked(
    texts: Sequence[str], *, keep: float = 0.1, mask: str = "[MASK]", rng: Draws, ids: Ids | None = None
) -> list[str]:
    """Return a randomly masked copy of each text, as `masking` classifies them: to train a model on them. The masks of
    a text depend on its id, which is its place in `texts` if there are no `ids`.

    >>> len(masked(["a b", "c d"], keep=0.5, rng=Draws(0).at("epoch", 1))[0].split())
    2
    """
    how, copies = Masking(keep, mask), []
    draws = range(len(texts)) if ids is None else ids.tolist()
    for text, draw in zip(texts, draws, strict=True):
        copies += how._masked(_parts(text), rng, torch.tensor([draw]))
    return copies


def _parts(text: str) -> list[str]:
    """Return the words of a text and the whitespace between them."""
    return re.findall(r"\s+|\S+", text)


def miss_limit(words: int, kept: int, changes: int) -> float:
    """Return the probability of other classes than the label below which a text with a number of words, some of which
    are kept, is certified for a number of changed words. It is rounded down, and at most 0 if nothing can be certified.

    >>> round(miss_limit(20, 2, 1), 6)
    0.4
    """
    unchanged = Fraction(comb(max(words - changes, 0), kept), comb(words, kept))
    return _ROUNDED * float(unchanged - Fraction(1, 2))


def by_masking(constraint: Constraint) -> tuple[Remedy, ...]:
    """Return the argument with which masking certifies changed words of texts; none if the threat appends words."""
    why = "to certify the smoothed classifier, for which predictions suffice"
    covered = isinstance(constraint, TextEdits) and not constraint.inserts
    return (Remedy("method", MASKING, reason=why),) if covered else ()
