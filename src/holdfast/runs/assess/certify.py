"""The verb certify: an assessment whose plan contains proofs.

A certification takes the steps of an assessment (`holdfast.runs.assess.assess`). This module contains what proofs add
to them: the request, the refusal of models that cannot be certified, and the test of the certificates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from holdfast.attacks.suites import suite
from holdfast.certifiers.estimator_networks import ACCEPTED, has_network
from holdfast.certifiers.patch_masks import MaskedVote
from holdfast.certifiers.protocol import HIGH, LOW, PIXELS, RANDOM, Prover, StatisticalProver, on_top_of
from holdfast.certifiers.smoothing import ATTACKED_DRAWS, JUDGING_DRAWS, SmoothedVotes, by_smoothing
from holdfast.core.batch import Batch
from holdfast.core.catalogue import BY_OPERATIONS, PARTITIONS, PATCH_MASKS, SUBSTITUTIONS, TREES
from holdfast.core.chain import canonical, digest
from holdfast.core.errors import NoBounds, Remedy, UnsoundProof, UsageError
from holdfast.core.evidence import Evidence
from holdfast.core.model import Classifier
from holdfast.core.tasks import CLEAN, MEASURED
from holdfast.io.models.composed import Ensemble
from holdfast.io.models.estimators import Estimator
from holdfast.runs.assess.request import AssessRequest, DescribedModel
from holdfast.runs.harness.kinds.proof import prepared_prover
from holdfast.runs.harness.plan import Plan
from holdfast.runs.harness.stage import Member
from holdfast.runs.harness.target import PreparedModel
from holdfast.statistics.intervals import upper_tail
from holdfast.threats.domains import TABLE
from holdfast.threats.word_embeddings import WordEmbeddings

_NAMED = 10
"""Largest number of examples that the message about wrong certificates names."""
IMPROBABLE = 1e-6
"""Probability below which the number of contradictions between statistical certificates and attacks is not chance."""


def certify_request(
    request: AssessRequest,
    proofs: Sequence[Prover],
    late_proofs: Sequence[Prover],
    geometry: int | None = None,
) -> AssessRequest:
    """Return the request of a certification, created from that of an assessment with the attacks that refute.

    `proofs` are run before the attacks, and `late_proofs` after them. The geometry of the decision boundary is measured
    around the first `geometry` examples. The fixed PGD-40 pass and the probes of doubts
    are left out, because they are run on examples that are decided already.
    """
    from holdfast.certifiers.boundary_geometry import BoundaryGeometry

    plan = replace(
        request.plan,
        proofs=tuple(proofs),
        late_proofs=tuple(late_proofs),
        geometry=None if geometry is None else BoundaryGeometry(geometry),
        attacked=False,
        doubts="free",
    )
    return replace(request, plan=plan, verb="certify")


def without_attacks(request: AssessRequest) -> AssessRequest:
    """Return the request without attacks: for a threat that changes no input, and for the votes of a classifier that
    gives no gradients, where each query of a black-box attack would be many queries of it.
    """
    return replace(request, plan=replace(request.plan, members=(), adaptive=(), suite="", doubts="none"))


def with_short_attacks(request: AssessRequest) -> AssessRequest:
    """Return the request with the attacks of the suite `quick`, unless all certified examples are attacked: each query
    of a vote over masks is many forward passes.
    """
    plan = request.plan
    if plan.full:
        return request
    short = suite("quick", plan.threat.constraint)
    return replace(request, plan=replace(plan, members=tuple(map(Member.of, short.specs)), suite=str(short)))


def smoothed_subject(subject: DescribedModel, smoothing: StatisticalProver) -> DescribedModel:
    """Return the smoothed classifier of a model, as the model of a run. All numbers of the run are about it.

    Raises `UsageError` for a model with a detector.
    """
    name = subject.card.get("name", "the model")
    return _voting(
        subject,
        SmoothedVotes(subject.model, smoothing),
        f"smoothed classifier, {smoothing.short}, on top of {name}",
        {"smoothed": {"base": name, **smoothing.parameters}},
        ["smoothed", *smoothing.parameters.values(), smoothing.seed, ATTACKED_DRAWS, JUDGING_DRAWS],
        f"all numbers are about the smoothed classifier, which predicts the most frequent class of {name} under "
        f"{smoothing.change}; predictions are those of {JUDGING_DRAWS} draws",
    )


def masked_subject(subject: DescribedModel, vote: MaskedVote) -> DescribedModel:
    """Return the vote over masks of a model, as the model of a run. All numbers of the run are about it.

    Raises `UsageError` for a model with a detector, and for a model behind a server.
    """
    name, masks = subject.card.get("name", "the model"), vote.mask_set
    n, (height, width) = len(masks.masks), masks.size
    if subject.model.remote:
        raise UsageError(
            f"the model is behind a server, and a certificate classifies up to {n * (n + 1) // 2:,} masked copies of "
            "an image; give the network itself, as in file.py:factory, or a function that queries the server"
        )
    return _voting(
        subject,
        vote,
        f"vote over {n} masks on top of {name}",
        {"masked": {"base": name, "patch": str(masks.patch), "masks": masks.per_axis}},
        ["masked", str(masks.patch), masks.per_axis],
        f"all numbers are about the vote over masks, and not about {name} alone: {n} masks of at most {height}x{width} "
        "pixels hide every place of the patch, hidden pixels get the middle of the valid range, and the vote is the "
        f"class on which the predictions of {name} for masked images agree",
    )


def _voting(
    subject: DescribedModel,
    net: nn.Module,
    name: str,
    card: Mapping[str, Any],
    identity: list[Any],
    what: str,
) -> DescribedModel:
    """The votes of a model as the model of a run, whose name, card, identity and note are given."""
    base, given = subject.model, subject.card.get("name", "the model")
    if base.rejects:
        raise UsageError(
            "the model has a detector that rejects inputs, and votes are counted for classes; give the network without "
            "its detector"
        )
    unattacked = (
        f"{given} gives {base.access} only, so that no attack is run and no doubt is examined: robust accuracy is that "
        "on clean inputs"
    )
    return replace(
        subject,
        model=on_top_of(base, net),
        digest=digest(canonical([subject.digest, *identity])),
        card={**subject.card, "name": name, **card},
        notes=(*subject.notes, what, *(() if base.access == "gradients" else (unattacked,))),
    )


def refuse_unprovable(
    plan: Plan, target: PreparedModel, sample: Batch, verb: Literal["assess", "certify"] = "certify"
) -> None:
    """Raise `UsageError` for a model about which the methods of a plan prove nothing, such as a randomised one, or one
    with an operation without sound bounds. Nothing is refused if the plan contains no proofs.

    The methods are prepared for the model, and remain prepared for the run. The remedies of the error are arguments of
    the given verb.
    """
    stages = [stage for stage in plan.stages() if stage.prover is not None]
    if not stages:
        return

    def without_bounds() -> tuple[Remedy, ...]:
        # only if a model is refused: the trial of smoothing calls the model
        if verb == "assess":
            return (Remedy("certify"),)
        if target.task is not None:
            return ()
        if not plan.threat.constraint.in_input_units:
            from holdfast.certifiers.masking import by_masking

            return by_masking(plan.threat.constraint)
        own = (Remedy("method", TREES),) if reads_trees(target.original) else ()
        return (*own, *by_smoothing(plan.threat.constraint, sample, target.original))

    of_table = plan.threat.constraint.domain is TABLE
    if of_table and any(stage.prover is not None and stage.prover.name != TREES for stage in stages):
        raise UsageError(
            "under rules of a table, only tree ensembles are certified, and the model is none",
            *((Remedy("certify"),) if verb == "assess" else (Remedy("threat", "linf:0.1"),)),
        )
    names = {stage.prover.name for stage in stages if stage.prover is not None}
    by_operations = bool(names - {PARTITIONS, PATCH_MASKS, SUBSTITUTIONS, TREES})
    own_operations = has_network(target.original) or isinstance(plan.threat.constraint, WordEmbeddings)
    if own_operations and names <= {*BY_OPERATIONS}:
        by_operations = False
    if (
        by_operations
        and target.smoothed is None
        and (target.original.remote or target.original.access != "gradients")
    ):
        raise UsageError(f"{_BOUNDS}, {_without_operations(target.original)}", *without_bounds())
    net = target.original.net
    if by_operations and target.smoothed is None and isinstance(net, Ensemble) and net.combine != "logits":
        raise UsageError(
            f"the members of the model are combined by {net.combine}, for which no bounds are known; certify the mean "
            "of their logits, as in ensemble:logits, or a member"
        )
    if target.rejects:
        raise UsageError(
            "the model has a detector that rejects inputs, about which nothing is proved; give the network without "
            "its detector"
        )
    _refuse_geometry(plan, target)
    if target.randomised:
        raise UsageError(RANDOM)
    for stage in stages:
        assert stage.prover is not None
        try:
            prepared_prover(target, stage.prover, sample, plan.threat)
        except NoBounds as error:
            raise NoBounds(error.message, *without_bounds()) from error


def _refuse_geometry(plan: Plan, target: PreparedModel) -> None:
    if plan.geometry is not None and target.original.access != "gradients":
        raise UsageError(
            f"the geometry of the boundary needs gradients, and the model gives {target.original.access} only",
            Remedy("geometry"),
        )


def reads_trees(model: Classifier) -> bool:
    """Return whether a model is an ensemble of trees that can be read."""
    if model.access != "scores":
        return False
    from holdfast.certifiers.tree_reading import has_trees

    return has_trees(model)


_BOUNDS = "bounds are computed from the operations of a network in torch"


def _without_operations(model: Classifier) -> str:
    """Return the reason why the operations of a model are not known, with what can be done about it."""
    if model.failing:
        return (
            f"and no gradients can be computed for this network: {model.hides}; correct its code. The cause is often "
            "a change in place, such as h += 1, for which h = h + 1 can be written"
        )
    gives = "is behind a server" if model.remote else f"gives {model.access} only"
    why = f" ({model.hides})" if model.hides and not model.remote else ""
    accepted = f"; {ACCEPTED}" if isinstance(model.net, Estimator) else ""
    return f"and the model {gives}{why}; give the network itself, as in file.py:factory{accepted}"


def refuse_unsound(evidence: Evidence) -> None:
    """Raise `UnsoundProof` if an attack or another pass broke an example that is certified, as judged by the original
    model. Evidence without certificates is not refused.
    """
    if "certified" not in evidence:
        return
    _refuse_outside(evidence)
    statistical = "contradicted" in evidence
    wrong = evidence["contradicted"] if statistical else evidence["certified"] & evidence["success"]
    rows = wrong.nonzero()[:, 0].tolist()
    tested = int(((evidence["certified"] | wrong) & evidence["attacked"]).sum())
    if not rows or (statistical and not improbable(len(rows), tested, evidence)):
        return
    breakers = [*(record.name for record in evidence.attacks), *(record.name for record in evidence.passes)]
    named = ", ".join(
        f"{int(evidence['id'][row])} (certified by {_certifier(evidence, row)}, broken "
        f"by {breakers[int(evidence['broken_by'][row])]})"
        for row in rows[:_NAMED]
    )
    more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    by_chance = ", more than by chance" if statistical else ""
    raise UnsoundProof(
        f"the test of the certificates failed: {len(rows)} of {tested} attacked certified examples are broken"
        f"{by_chance}: {named}{more}. No certificate is issued; report it as a bug of the method, or choose another "
        "method"
    )


def _refuse_outside(evidence: Evidence) -> None:
    """Raise `UnsoundProof` if an output, clean or attacked, is outside of its interval, or if more pixels are proved to
    be right than were right.
    """
    for of in (CLEAN, MEASURED):
        if PIXELS in evidence:
            outside = evidence[f"{of}pixels"][..., 0] < evidence[PIXELS]
        elif LOW in evidence and evidence[f"{of}output"].is_floating_point():
            output = evidence[f"{of}output"].double()
            proved = (evidence[LOW] > -torch.inf) | (evidence[HIGH] < torch.inf)
            outside = ~((output >= evidence[LOW]) & (output <= evidence[HIGH])) & proved  # NaN, too
        else:  # of several labels, with wrong ones of which `certified` is compared
            return
        rows = outside.any(1).nonzero()[:, 0]
        if len(rows):
            named = ", ".join(str(int(evidence["id"][row])) for row in rows[:_NAMED])
            raise UnsoundProof(
                f"the test of the certificates failed: the outputs of {len(rows)} of {len(evidence)} examples are "
                f"outside of what was proved, such as {named}. No certificate is issued; report it as a bug of the "
                "method, or choose another method"
            )


def improbable(contradicted: int, tested: int, evidence: Evidence) -> bool:
    """Return whether so many contradictions between certificates and attacks have a probability below `IMPROBABLE`.

    A contradiction needs a wrong certificate or a wrong verdict about one of the attacks, each of which has at most the
    failure probability of the method.
    """
    alpha = max(float(record.settings.get("failure_probability", 0.0)) for record in evidence.proofs)
    rate = min(1.0, alpha * (1 + len(evidence.attacks)))
    return upper_tail(contradicted, tested, rate) < IMPROBABLE


def _certifier(evidence: Evidence, row: int) -> str:
    """Name of the method that certified an example; of a contradicted one, the statistical method."""
    place = int(evidence["certified_by"][row])
    if place >= 0:
        return evidence.proofs[place].name
    return next(record.name for record in evidence.proofs if "failure_probability" in record.settings)
