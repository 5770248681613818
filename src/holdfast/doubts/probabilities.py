"""The doubt `probabilities` is raised if the outputs are probabilities instead of logits."""

from holdfast.core.evidence import Doubt, DoubtState
from holdfast.doubts.protocol import Case, DoubtTest, limit


def conclude(case: Case) -> Doubt:
    """Return the doubt from the clean outputs."""
    rows, threat = case.columns["is_probability"], case.context.threat
    if not threat.gives("scores"):
        lacking = limit(threat, case.context.access, "scores")
        return case.inapplicable(f"{lacking}, so the attacker sees no scores")
    text = f"{int(rows.sum())} of {len(rows)} rows of the output are probabilities: they sum to 1 and none is negative"
    state: DoubtState = "raised" if bool(rows.all()) else "clear"
    return Doubt(case.name, state, float(rows.double().mean()), 1.0, len(rows), text)


TEST = DoubtTest(
    title="The model returns probabilities",
    meaning="Outputs that sum to one come from a softmax. Where it saturates, the gradient of every loss is close to "
    "zero.",
    advice="Return the logits: remove the softmax (or sigmoid) at the end of the model.",
    conclude=conclude,
    free=True,
    of_strength=True,
    answered_by=("bypass",),
)
