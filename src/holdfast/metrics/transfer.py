"""Metrics of the transfer of adversarial examples between models: the transfer matrix, and the success on the target.

Examples are computed in a fixed number of steps that does not end at success, so a row does not favour its source model
beyond the effect of its gradients.
"""

from dataclasses import dataclass

from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Evidence
from holdfast.core.remedies import SURROGATE
from holdfast.metrics.columns import Absent
from holdfast.statistics.intervals import proportion

ALL = "all surrogates"
"""name of the row of examples that were computed on the mean of all surrogates"""


@dataclass(frozen=True)
class TransferRow:
    """Row of the transfer matrix: the success rate on each model of adversarial examples that were computed on one
    model.
    """

    maker: str
    of: int | None
    """index of the model on which the examples were computed; None for all surrogates together"""
    shares: tuple[Estimate | None, ...]
    """for each model, the share of its correctly classified inputs that the examples break; None if there are no such
    inputs"""


def model_names(evidence: Evidence) -> tuple[str, ...]:
    """Return the names of the models in the transfer matrix: the target, followed by the surrogates."""
    return tuple(str(card.get("name", "model")) for card in (evidence.model, *evidence.surrogates))


def matrix(evidence: Evidence) -> tuple[TransferRow, ...]:
    """Return the transfer matrix, with one row for each model on which adversarial examples were computed.

    Raises `Absent` if no surrogate was given or time ran out.
    """
    if "wrong" not in evidence.transfer:
        raise Absent("transfer was not measured", SURROGATE)
    names, right, wrong = model_names(evidence), evidence.transfer["right"], evidence.transfer["wrong"]
    target_row = [0] if evidence.threat.gives("gradients") else []
    sources: list[int | None] = [*target_row, *range(1, len(names))]
    sources += [None] * (wrong.shape[1] - len(sources))
    return tuple(
        TransferRow(
            ALL if of is None else names[of],
            of,
            tuple(
                proportion(wrong[right[:, j], i, j]) if right[:, j].any() else None for j in range(len(names))
            ),
        )
        for i, of in enumerate(sources)
    )


def accuracies(evidence: Evidence) -> tuple[Estimate, ...]:
    """Return the clean accuracy of each model of the transfer matrix, on the examples of the matrix."""
    return tuple(proportion(column) for column in evidence.transfer["right"].T)


def transfer_success(evidence: Evidence) -> Estimate:
    """Return the share of the inputs classified correctly by the target that adversarial examples computed on the
    surrogates break.

    The examples are those computed on all surrogates at once.
    """
    share = matrix(evidence)[-1].shares[0]
    if share is None:
        raise Absent("the model classifies no input of the transfer matrix correctly")
    return share
