"""How far examples made on one model turn another: the transfer matrix, and what of it concerns the target.

Examples are made in a fixed number of steps and never stop at success, so a row does not favour the model it was made
on beyond what its gradients give.
"""

from dataclasses import dataclass

from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Evidence
from holdfast.metrics.columns import Absent
from holdfast.ops.statistics import proportion

ALL = "all surrogates"
"""What a row is called whose examples were made on the mean of all surrogates."""


@dataclass(frozen=True)
class Row:
    """Examples of one maker, and what they did to each model."""

    maker: str
    of: int | None
    """which of the models made them; None where all surrogates did"""
    shares: tuple[Estimate | None, ...]
    """of each model the share of the inputs that it has right which they turn wrong; None where it has none right"""


def models(evidence: Evidence) -> tuple[str, ...]:
    """The target and the surrogates by name."""
    return tuple(str(card.get("name", "model")) for card in (evidence.model, *evidence.surrogates))


def matrix(evidence: Evidence, confidence: float = 0.95) -> tuple[Row, ...]:
    """A row for each maker; raises `Absent` where no surrogate was given or time ran out."""
    if "wrong" not in evidence.transfer:
        raise Absent("nothing was transferred; name a model of the same classes with --surrogate MODEL")
    names, right, wrong = models(evidence), evidence.transfer["right"], evidence.transfer["wrong"]
    own = [0] if evidence.threat.gives("gradients") else []
    made_on: list[int | None] = [*own, *range(1, len(names))]
    made_on += [None] * (wrong.shape[1] - len(made_on))
    return tuple(
        Row(
            ALL if of is None else names[of],
            of,
            tuple(
                proportion(wrong[right[:, j], i, j], confidence) if right[:, j].any() else None
                for j in range(len(names))
            ),
        )
        for i, of in enumerate(made_on)
    )


def transfer_success(evidence: Evidence, confidence: float = 0.95) -> Estimate:
    """Share of the inputs that the target has right which examples made on the surrogates, on all at once, turn."""
    found = matrix(evidence, confidence)[-1].shares[0]
    if found is None:
        raise Absent("the model is right on no input of the transfer matrix")
    return found
