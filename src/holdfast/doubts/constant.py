"""The doubt `constant` is raised if the outputs do not depend on the input: over all examples they differ by at most
1e-6 of the largest margin. Not applicable if all examples have one label and all predictions are right.
"""

import torch

from holdfast.core.evidence import Doubt
from holdfast.doubts.protocol import Case, DoubtTest

THRESHOLD = 1e-6
"""relative spread of the outputs over all examples below which they are considered constant"""


def conclude(case: Case) -> Doubt:
    """Return the doubt from the spread of the clean outputs."""
    columns, n = case.columns, len(case.columns["id"])
    if n < 2:
        return Doubt(case.name, "not measured", message="at least two examples are needed")
    if columns["nan"].any():
        return case.inapplicable("the model returned NaN")
    # margins for one label at a time, since a margin depends on the label
    margins, y = columns["margin"].double(), columns["y"]
    groups = [margins[y == label] for label in torch.unique(y)]
    size = max(float(margins.abs().max()), 1e-12)  # no division by 0 if all are 0
    spread = max(float((group.max() - group.min()) / size) for group in groups)
    for name in ("confidence", "entropy"):
        values = columns[name].double()
        spread = max(spread, float(values.max() - values.min()))
    if len(torch.unique(columns["prediction"])) > 1:
        # where another class is predicted, the scores of the two classes differ at least by the margin of a right
        # example, or by the lead of a class with a probability above 1/2; scores may be one-hot or symmetric, with
        # equal margins for all labels
        spread = max(spread, float(margins.max() / size), float(2 * columns["confidence"].double().max() - 1))
    elif len(groups) == 1 and columns["correct"].all() and not spread > THRESHOLD:
        return case.inapplicable(
            "all examples have the same label and are classified correctly, so that their outputs may be equal"
        )
    spread = float(f"{spread:.3g}")  # the last digits depend on the batches
    text = f"the outputs of {n:,} examples are equal"
    if spread > 0:
        text = f"over {n:,} examples the outputs differ by {spread:.1g} of the largest margin"
    if not spread > THRESHOLD:
        text = f"the outputs do not depend on the input: {text}"
    return Doubt(case.name, "clear" if spread > THRESHOLD else "raised", spread, THRESHOLD, n, text)


TEST = DoubtTest(
    title="The outputs do not depend on the input",
    meaning="Every example has the same output, so no attack can change a prediction, and surviving an attack means "
    "nothing.",
    advice="Check the weights and the preprocessing: a wrong value range can make every unit of the first layers zero.",
    conclude=conclude,
    free=True,
    meaningless=1,
)
