"""The verb certify: an assessment whose plan contains proofs.

A certification takes the steps of an assessment (`holdfast.verbs.assess`). This module contains what proofs add to
them: the request, the refusal of models that cannot be certified, and the test of the certificates.
"""

from collections.abc import Sequence
from dataclasses import replace

from holdfast.certifiers.protocol import Prover
from holdfast.core.batch import Batch
from holdfast.core.errors import UnsoundProof, UsageError
from holdfast.core.evidence import Evidence
from holdfast.harness import Plan, Target, prepared_prover
from holdfast.verbs.request import AssessRequest

_NAMED = 10
"""Largest number of examples that the message about wrong certificates names."""


def certify_request(
    request: AssessRequest, proofs: Sequence[Prover], late_proofs: Sequence[Prover]
) -> AssessRequest:
    """Return the request of a certification, created from that of an assessment with the attacks that refute.

    `proofs` are run before the attacks, and `late_proofs` after them. The fixed PGD-40 pass and the probes of doubts
    are left out, because they are run on examples that are decided already.
    """
    plan = replace(
        request.plan, proofs=tuple(proofs), late_proofs=tuple(late_proofs), attacked=False, doubts="free"
    )
    return replace(request, plan=plan, verb="certify")


def refuse_unprovable(plan: Plan, target: Target, sample: Batch) -> None:
    """Raise `UsageError` for a model about which the methods of a plan prove nothing, such as a randomised one, or one
    with an operation without sound bounds. Nothing is refused if the plan contains no proofs.

    The methods are prepared for the model, and remain prepared for the run.
    """
    stages = [stage for stage in plan.stages() if stage.prover is not None]
    if not stages:
        return
    if target.bare.remote or target.bare.access != "gradients":
        gives = "is behind a server" if target.bare.remote else f"gives {target.bare.access} only"
        raise UsageError(
            f"bounds are computed from the operations of a network in torch, and the model {gives}; give the network "
            "itself, as in file.py:factory"
        )
    if target.rejects:
        raise UsageError(
            "the model has a detector that rejects inputs, about which nothing is proved; give the network without "
            "its detector"
        )
    if target.randomised:
        raise UsageError(
            "the outputs of the model are random, and bounds are computed for a fixed function; remove the source of "
            "randomness, such as dropout in eval mode"
        )
    for stage in stages:
        assert stage.prover is not None
        prepared_prover(target, stage.prover, sample, plan.threat)


def refuse_unsound(evidence: Evidence) -> None:
    """Raise `UnsoundProof` if an attack or another pass broke an example that is certified, as judged by the original
    model. Evidence without certificates is not refused.
    """
    if "certified" not in evidence:
        return
    wrong = evidence["certified"] & evidence["success"]
    rows = wrong.nonzero()[:, 0].tolist()
    if not rows:
        return
    breakers = [*(record.name for record in evidence.attacks), *(record.name for record in evidence.passes)]
    named = ", ".join(
        f"{int(evidence['id'][row])} (certified by {evidence.proofs[int(evidence['certified_by'][row])].name}, broken "
        f"by {breakers[int(evidence['broken_by'][row])]})"
        for row in rows[:_NAMED]
    )
    more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    tested = int((evidence["certified"] & evidence["attacked"]).sum())
    raise UnsoundProof(
        f"the test of the certificates failed: {len(rows)} of {tested} attacked certified examples are broken: {named}"
        f"{more}. No certificate is issued; report it as a bug of the method, or leave that method out with --method"
    )
