"""Success of perturbations that were computed on one data set, on the inputs of another data set.

The control is the success of the same perturbations with their values in random order.
"""

from dataclasses import dataclass

from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Evidence
from holdfast.metrics.columns import Absent
from holdfast.ops.statistics import proportion


@dataclass(frozen=True)
class AcrossRow:
    """Row of a table: perturbations computed on one data set, and their effect on the inputs of each data set."""

    made_on: str
    turned: tuple[Estimate, ...]
    """for each data set, the share of its inputs whose prediction changes from that of the clean input"""
    control: tuple[Estimate, ...]
    """the same shares for the perturbations with their coordinates in random order"""


def sets(evidence: Evidence) -> tuple[str, ...]:
    """Return the names of the data set of the run and of the other data sets."""
    return tuple(str(card.get("name", "data")) for card in (evidence.data, *evidence.others))


def across_rows(evidence: Evidence, confidence: float = 0.95) -> tuple[AcrossRow, ...]:
    """Return a row for each data set on which perturbations were computed.

    Raises `Absent` if no other data set was given or time ran out.
    """
    if "turned" not in evidence.across:
        raise Absent(
            "transfer across data sets was not measured; name a data set with inputs of the same shape with "
            "--across DATA"
        )
    shares = {
        name: [
            [proportion(found, confidence) for found in row] for row in evidence.across[name].permute(1, 2, 0)
        ]
        for name in ("turned", "control")
    }
    return tuple(
        AcrossRow(name, tuple(shares["turned"][k]), tuple(shares["control"][k]))
        for k, name in enumerate(sets(evidence))
    )
