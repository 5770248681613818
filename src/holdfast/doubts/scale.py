"""The doubt `scale` is raised if the same attack breaks more if the logits are scaled down, because they saturate
(exact McNemar p < 0.01 and at least 3 points).
"""

from holdfast.attacks.parts.losses import cross_entropy
from holdfast.core.batch import Batch
from holdfast.core.evidence import Doubt
from holdfast.core.types import Logits, PerExample
from holdfast.doubts.protocol import DISCORDANT, P_BY_RIVAL, Case, DoubtTest, Probe, share
from holdfast.doubts.short_attacks import CROSS_ENTROPY, SETTLING, STEPS, missed_by, short_pgd_on
from holdfast.statistics.intervals import mcnemar

POINTS_BY_SCALE = 0.03
"""fraction of examples that the attack on scaled-down logits must break in addition to that on the original logits"""
SMALL = 0.01
"""factor by which logits are multiplied"""


def small_cross_entropy(logits: Logits, batch: Batch) -> PerExample:
    """Return the cross-entropy of logits that are multiplied by 0.01, so that a saturated softmax does not cause zero
    gradients.
    """
    return cross_entropy(SMALL * logits, batch)


SMALL_CROSS_ENTROPY = Probe(
    "small-cross-entropy", "gradients", short_pgd_on(small_cross_entropy), queries=STEPS + 1, order=3
)


def conclude(case: Case) -> Doubt:
    """Return the doubt from the same attack on the logits and on scaled-down logits."""
    unscaled, scaled_down = case.broken(CROSS_ENTROPY), case.broken(SMALL_CROSS_ENTROPY)
    if unscaled is None or scaled_down is None:
        return case.absent(CROSS_ENTROPY, SMALL_CROSS_ENTROPY)
    test, n = mcnemar(scaled_down, unscaled), len(unscaled)
    text = (
        f"PGD-20 on the cross-entropy breaks {share(unscaled)}, and with logits scaled to 1 % "
        f"{share(scaled_down)} (exact McNemar p = {test.p:.2g})"
    )
    ahead = (test.only_first - test.only_second) / n
    return case.judged(ahead, POINTS_BY_SCALE, n, text, more=test.p < P_BY_RIVAL)


def settled(case: Case) -> Doubt | None:
    """Return the doubt as clear if the suite breaks too few examples more than the attack on the unscaled logits."""
    missed = missed_by(CROSS_ENTROPY, case)
    if missed is None or int(missed.sum()) >= DISCORDANT:
        return None
    text = (
        f"the suite breaks {int(missed.sum())} of {len(missed)} examples that PGD-20 on the cross-entropy does not; a "
        f"difference needs {DISCORDANT}, so scaled-down logits were not attacked"
    )
    return case.judged(float(missed.double().mean()), POINTS_BY_SCALE, len(missed), text, more=False)


TEST = DoubtTest(
    title="Large logits mask the gradient",
    meaning="The same attack breaks more examples when the logits are scaled down, so saturation made the attacks "
    "weaker.",
    advice="Use the smaller robust accuracy, or evaluate the model with its logits divided by the temperature of its "
    "training.",
    conclude=conclude,
    settled=settled,
    probes=(SETTLING, CROSS_ENTROPY, SMALL_CROSS_ENTROPY),
    thresholds=(POINTS_BY_SCALE,),
    of_strength=True,
    answered_by=("bypass",),
)
