"""The doubt `fine-tuning` is raised if the parameter sets of a model with [rotation](rotation.md) were never trained
against attacks, and the same time of adversarial training leaves less to an attacker than rotation does.

It is measured by `rotation/steps/alternatives.py`.
"""

from holdfast.doubts.protocol import DoubtTest

TEST = DoubtTest(
    title="Adversarial fine-tuning for the same time does more",
    meaning="The parameter sets were not trained against attacks, and rotation does not protect against an attacker "
    "who has the serving set.",
    advice="Harden the model first (holdfast harden), and collect the pool from the hardened model.",
)
