"""The privacy budget of a training for one row, and for a person who has several equal rows."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

_LARGEST_EXPONENT = 700.0  # beyond which exp is infinite in float64


@dataclass(frozen=True)
class RowBudget:
    """A privacy budget, which is for adding or removing one row of the training data."""

    epsilon: float
    delta: float
    equal_rows: int
    """largest number of rows with equal inputs"""

    @property
    def group_epsilon(self) -> float:
        """Epsilon for adding or removing all rows of the largest group of equal ones, up to which it can be."""
        return self.equal_rows * self.epsilon

    @property
    def group_delta(self) -> float:
        """Delta that belongs to `group_epsilon`; 1 if the budget guarantees nothing for these rows.

        For k rows it is delta * (1 + e^epsilon + ... + e^((k - 1) epsilon)), at most k e^((k - 1) epsilon) delta.
        """
        if (self.equal_rows - 1) * self.epsilon > _LARGEST_EXPONENT:
            return 1.0
        return min(1.0, self.delta * sum(math.exp(k * self.epsilon) for k in range(self.equal_rows)))

    def entry(self) -> dict[str, float | int]:
        """Return the numbers by name."""
        return {**vars(self), "group_epsilon": self.group_epsilon, "group_delta": self.group_delta}

    def sentence(self) -> str:
        """Return what the budget means for rows and for persons, without a full stop."""
        budget = (
            f"epsilon = {self.epsilon:g} and delta = {self.delta:g} are for each row of the training data"
        )
        if self.equal_rows == 1:
            return (
                f"{budget}, and no two rows are equal. For a person with k rows, epsilon is up to k times as large, "
                "and delta grows with it"
            )
        nothing = ", so that the budget guarantees nothing for such a person" if self.group_delta == 1 else ""
        return (
            f"{budget}, and not for each person. The largest number of equal rows is {self.equal_rows:,}: for a person "
            f"with these rows, epsilon is up to {self.group_epsilon:g} and delta up to {self.group_delta:.2g}{nothing}"
        )


def row_budget(epsilon: float, delta: float, fingerprints: Sequence[bytes]) -> RowBudget:
    """Return the budget of a training on rows with the `fingerprints` of their inputs."""
    return RowBudget(epsilon, delta, max(Counter(fingerprints).values(), default=1))
