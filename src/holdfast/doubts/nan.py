"""The doubt `nan` is raised if an output is not a number."""

import torch

from holdfast.core.evidence import Doubt
from holdfast.doubts.protocol import Case, DoubtTest


def conclude(case: Case) -> Doubt:
    """Return the doubt from the clean outputs and those of the probes."""
    rows = case.columns["nan"]
    n = int(rows.sum())
    text = f"the model returned NaN for {n} of {len(rows)} clean inputs"
    for name, probed in case.results.items():
        # probes store a margin of NaN as -inf
        is_nan = probed.columns.get("margin", torch.empty(0)) == -torch.inf
        if is_nan.any():
            n += int(is_nan.sum())
            text += f", and for {int(is_nan.sum())} inputs of the probe {name}"
    return case.judged(float(n), 0.0, len(rows), text)


TEST = DoubtTest(
    title="Some outputs are not a number",
    meaning="An example with a NaN output counts as broken. NaN usually means an overflow in the model.",
    advice="Find the inputs that cause NaN: they are marked in the evidence.",
    conclude=conclude,
    thresholds=(0.0,),
    free=True,
)
