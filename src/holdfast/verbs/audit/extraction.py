"""The settings of `holdfast audit extraction`. The module imports no torch."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from holdfast.core.errors import Remedy, UsageError
from holdfast.settings import groups, values
from holdfast.settings.groups import Flag
from holdfast.verbs.settings import AuditVerb


class AuditExtraction(groups.ServerLimits, groups.InferenceSource, groups.ThreatSource, AuditVerb):
    """All settings of the command `holdfast audit extraction`. `data` are examples on which copies are compared with
    the model, or the training examples of the model if there is a `suspect`.

    Copies are trained on the answers to the first queries of each budget (Orekondy et al., "Knockoff Nets", CVPR 2019,
    arXiv:1812.02766). The pools are the train split of `data`, or those of its examples that are not compared; `pool`;
    and uniform noise. For each pool a copy is trained on all scores and one on labels alone, and for the first pool
    also on the three largest scores, on scores of two digits, and on the answers to queries that are chosen by
    k-centre. The result is flagged if the copy on all scores of the first pool agrees with the model on at least 90 %
    of the examples. Without `data`, copies are compared on a fifth of `pool`. `threat` is that of examples that are
    made on the copies, and that the model then classifies.

    With a `suspect`, the audit is dataset inference (Maini et al., ICLR 2021, arXiv:2104.10706): `pool`, or the test
    split of `data`, are examples of the same kind that the model was not trained on. `controls` are at least 20
    independent networks of the architecture of the model; `train_controls` trains them on examples of `pool`, and both
    exclude each other. Without them the result is unclear.

    `metrics` of the result are `copy_agreement` and `robust_accuracy_under_copy`, and `facts["p"]` is the p-value of a
    `suspect`.
    """

    verb = "audit-extraction"
    kind = "extraction"
    summary = "measure how well a model can be copied by its answers, or whether another is a copy"
    about = (
        "Measure how well a copy agrees with MODEL that is trained on its answers alone, by the number of queries.\n\n"
        "With --suspect, test instead whether another model is a copy of MODEL, whose training examples are DATA. A "
        "model is accused only beside independent networks (--controls, or --train-controls). Send queries only to "
        "servers whose owner permits it."
    )
    opening = "holdfast.verbs.audit.opening_extraction:prepared_extraction"
    example = "mnist-cnn mnist-mini --queries 200,1000"
    files = ("pool", "controls")
    needs_data = False
    queries: Annotated[values.Counts, Flag("N,…", common=True)] = Field(
        default=(500, 2000, 20000),
        description="Numbers of queries after which a copy is trained (default: 500,2000,20000).",
    )
    pool: Annotated[values.Given | None, Flag("DATA", completion="DATA", common=True)] = Field(
        default=None,
        description="Inputs of the attacker that are sent to the model, without labels. With a suspect: examples that "
        "the model was not trained on.",
    )
    suspect: Annotated[values.Given | None, Flag("MODEL[,arch=A]", completion="MODEL", common=True)] = Field(
        default=None,
        description="Model that may be a copy, as weights of the architecture of MODEL or with its own.",
    )
    controls: Annotated[values.Given | None, Flag("FOLDER", completion="PATH", common=True)] = Field(
        default=None,
        description="Folder with the weights of at least 20 networks of the architecture of MODEL that were trained "
        "without it on other examples of the same kind.",
    )
    train_controls: Annotated[values.Duration | None, Flag("TIME", common=True)] = Field(
        default=None,
        description="Train the control networks on examples of --pool, at most for this time together, as in 20min.",
    )
    guard: Annotated[values.PathText | None, Flag("FILE")] = Field(
        default=None,
        description="Guard (guard.yaml) to which the queries are shown: when it recognises them, for one API key and "
        "for ten.",
    )

    def refuse_contradictions(self, prefix: str, written: Mapping[str, str]) -> None:
        """Raise `UsageError` for settings of the other measurement, and for a gate on copies beside a suspect."""
        if self.controls is not None and self.train_controls is not None:
            raise UsageError("give controls, or train_controls, and not both", Remedy("train_controls"))
        if self.suspect is None:
            for name in ("controls", "train_controls"):
                if getattr(self, name) is not None:
                    raise UsageError(
                        f"{name} are networks with which a suspect is compared, and there is none",
                        Remedy(name),
                    )
            return
        if self.guard is not None:
            raise UsageError(
                "guard sees the queries of an extraction, and a suspect is compared without", Remedy("guard")
            )
        for gate in self.gates:
            if gate.strip() != "not-flagged":
                raise UsageError(
                    f"{prefix}gate {gate!r} is on copies that are trained, and not on a suspect: not-flagged"
                )
