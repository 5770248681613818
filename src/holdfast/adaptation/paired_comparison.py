"""Compares a candidate with the served model on the same live inputs, so that no single client decides.

For each input it is known whether either model is at fault, for example because its guard flags the input. The test is
the one-sided sign test on the inputs where the models differ (McNemar, Psychometrika 12, 1947, in its exact form), so
that inputs on which both are right or both are wrong have no effect, however many there are.

With at least three principals (clients), the candidate is worse only if the test rejects at the level for a set of
principals and for the same set without any one of them. The set contains all principals or all but one. A principal can
therefore neither cause this result alone nor prevent it. With one or two principals, no majority exists: the candidate
is worse if the test rejects for all of them or for any one of them. The levels are divided by the number of sets
(Bonferroni), so that a candidate that is not worse is refused with a probability of at most `ERROR`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

ERROR = 0.01
"""probability with which a candidate is found to be worse by chance, for each kind of fault"""
SHARE = 0.5
"""largest share of the inputs that one of at least three principals counts"""
FEW = 3
"""number of principals from which on a single one decides nothing"""
_MOST = 500
"""number of principals that are compared: those with the most inputs"""

Mask = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Compared:
    """How often each model is at fault on the inputs that count."""

    n: int
    candidate: int
    served: int
    worse: bool
    alone: tuple[str, ...] = ()
    """principals on whose inputs alone the candidate is worse; empty if `worse`"""


def compared(
    principals: Sequence[str], candidate: Mask, served: Mask, *, rows: Mask | None = None
) -> Compared:
    """Compare two models on the same inputs (n), the newest of each principal last. `candidate` and `served` state on
    which inputs the models are at fault.

    Only the inputs in `rows`, such as those with a label, are compared. The principals of the others count as
    principals, so that one whose inputs alone have labels does not decide.
    """
    rows = np.ones(len(principals), bool) if rows is None else rows
    if not rows.any():
        return Compared(0, 0, 0, worse=False)
    names, of = np.unique(np.array(principals), return_inverse=True)
    counts = _counted(of, rows)
    only_candidate, only_served = (
        np.bincount(of[counts & each], minlength=len(names)).astype(np.int64)
        for each in (candidate & ~served, served & ~candidate)
    )
    numbers = np.bincount(of[rows], minlength=len(names))
    # those without compared inputs have no effect, except that there may be so many that a single one decides nothing
    n_present = max(int(np.count_nonzero(numbers)), min(FEW, len(names)))
    present = numbers.argsort(kind="stable")[::-1][: min(n_present, _MOST)]
    worse = _worse(only_candidate[present], only_served[present])
    single = _p_values(only_candidate, only_served) <= ERROR / n_present
    alone = () if worse else tuple(str(name) for name in names[single])
    return Compared(
        int(counts.sum()),
        int(candidate[counts].sum()),
        int(served[counts].sum()),
        worse,
        alone,
    )


def _counted(of: npt.NDArray[np.intp], rows: Mask) -> Mask:
    """Which of the inputs in `rows` count: of a principal that has more than `SHARE` of them, only the newest ones. All
    inputs of fewer than three principals count.
    """
    counts, numbers = rows.copy(), np.bincount(of[rows])
    largest = int(numbers.argmax())
    own = np.flatnonzero(rows & (of == largest))
    most = int(SHARE / (1 - SHARE) * (rows.sum() - len(own)))
    if np.count_nonzero(numbers) >= FEW and len(own) > most:
        counts[own[: len(own) - most]] = False
    return counts


def _worse(only_candidate: Counts, only_served: Counts) -> bool:
    """Whether the candidate is at fault more often, by the numbers of inputs of each principal on which one model
    alone is at fault.
    """
    n = len(only_candidate)
    totals = only_candidate.sum(), only_served.sum()
    if n < FEW:
        sets = [
            np.append(each, total) for each, total in zip((only_candidate, only_served), totals, strict=True)
        ]
        return bool((_p_values(*sets) <= ERROR / (n + 1 if n > 1 else 1)).any())
    # a row for each set: all principals, and all without one; a column for each further principal that is left out
    left = [
        total - np.append(0, each) for each, total in zip((only_candidate, only_served), totals, strict=True)
    ]
    rest = [sums[:, None] - each for sums, each in zip(left, (only_candidate, only_served), strict=True)]
    rejected = _p_values(*rest) <= ERROR / (n + 1)
    rejected[np.arange(n) + 1, np.arange(n)] = True  # it is not in the set
    return bool(rejected.all(1).any())


def _p_values(only_candidate: Counts, only_served: Counts) -> npt.NDArray[np.float64]:
    """Probability of so many faults of the candidate alone, or more, if both models are as often at fault alone."""
    from scipy.special import betainc

    tail = betainc(np.maximum(only_candidate, 1), only_served + 1, 0.5)
    values: npt.NDArray[np.float64] = np.where(only_candidate > 0, tail, 1.0)
    return values
