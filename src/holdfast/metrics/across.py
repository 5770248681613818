"""How far changes made for inputs of one data set turn those of another, beside the same changes in another order."""

from dataclasses import dataclass

from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Evidence
from holdfast.metrics.columns import Absent
from holdfast.ops.statistics import proportion


@dataclass(frozen=True)
class Row:
    """Changes made on one data set, and what they did to the inputs of each."""

    made_on: str
    turned: tuple[Estimate, ...]
    """of each data set the share of the inputs of which the model says another thing than of the clean one"""
    control: tuple[Estimate, ...]
    """the same for the same changes with their places in random order"""


def sets(evidence: Evidence) -> tuple[str, ...]:
    """The data set of the run and the others by name."""
    return tuple(str(card.get("name", "data")) for card in (evidence.data, *evidence.others))


def across(evidence: Evidence, confidence: float = 0.95) -> tuple[Row, ...]:
    """A row for each data set; raises `Absent` where no other was given or time ran out."""
    if "turned" not in evidence.across:
        raise Absent(
            "nothing was carried across data sets; name one of inputs of the same shape with --across DATA"
        )
    shares = {
        name: [
            [proportion(found, confidence) for found in row] for row in evidence.across[name].permute(1, 2, 0)
        ]
        for name in ("turned", "control")
    }
    return tuple(
        Row(name, tuple(shares["turned"][k]), tuple(shares["control"][k]))
        for k, name in enumerate(sets(evidence))
    )
