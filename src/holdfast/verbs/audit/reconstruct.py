"""The settings of `holdfast audit reconstruct`. The module imports no torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt
from pydantic import Field

from holdfast.core.errors import Placeholder, Remedy, UsageError
from holdfast.settings import values
from holdfast.settings.groups import Flag
from holdfast.verbs.settings import AuditVerb

if TYPE_CHECKING:
    from holdfast.audits.audit import AuditStart, PreparedAudit
    from holdfast.audits.reconstruct import ReconstructionAudit


class AuditReconstruct(AuditVerb):
    """All settings of the command `holdfast audit reconstruct`. `data` are examples of which batches are drawn, and
    `model` is a network with gradients.

    Gradients are inverted by Phong et al. (IEEE TIFS 2018), Geiping et al. (NeurIPS 2020, arXiv:2003.14053), with
    protection Balunović et al. (ICLR 2022, arXiv:2111.04706), and labels by Wainakh et al. (PETS 2022,
    arXiv:2105.09369).

    `metrics["exactly_reconstructed"]` of the result is the share of the examples that are recovered up to half a level
    of 8 bits, and `metrics["psnr_above_mean_image"]` is in dB; both of the batches that give away most.
    """

    verb = "audit-reconstruct"
    kind = "reconstruct"
    summary = "measure what a shared gradient gives away"
    about = (
        "Measure how much of a batch an attacker reconstructs from its gradient, which federated learning shares.\n\n"
        "Batches of DATA are drawn (--batch-size), and the gradient of MODEL on each is inverted: exactly if a dense "
        "layer sees the input, and otherwise by optimisation. With --clip and --noise, gradients that are protected as "
        "in DP-SGD are attacked as well. Untrained and trained weights give away different amounts."
    )
    example = "net.py:make batch.npz --batch-size 1,4,8"
    files = ("gradient",)
    batch_size: Annotated[values.Counts, Flag("N,…", common=True)] = Field(
        default=(1, 4, 8), description="Numbers of examples in a batch, as in 1,4,8 (the default)."
    )
    batches: Annotated[values.Positive, Flag("N", common=True)] = Field(
        default=10, description="Largest number of batches of each size (default: 10)."
    )
    steps: Annotated[values.Positive, Flag("N")] = Field(
        default=300, description="Steps of the optimisation (default: 300)."
    )
    batch_norm: Annotated[Literal["train", "eval"], Flag("MODE")] = Field(
        default="train",
        description="Mode of batch normalisation while the gradient is computed: train (the default) or eval.",
    )
    clip: Annotated[Annotated[float, Gt(0)] | None, Flag("X", common=True)] = Field(
        default=None, description="Norm to which a client clips the gradient of each example, as in 1."
    )
    noise: Annotated[Annotated[float, Ge(0)] | None, Flag("X", common=True)] = Field(
        default=None,
        description="Standard deviation of the noise that a client adds to the sum, in multiples of --clip, as in 1.1.",
    )
    judge: Annotated[str | None, Flag("MODEL[,K=V]", completion="MODEL")] = Field(
        default=None,
        description="Independent network that classifies the reconstructions, as in other.pt,arch=net.py:make.",
    )
    inversion: Annotated[bool, Flag()] = Field(
        default=False,
        description="Invert each class as well: the input with its highest probability, and the nearest example.",
    )
    gradient: Annotated[values.Given | None, Flag("FILE")] = Field(
        default=None,
        description="A gradient that was shared (.safetensors, a tensor for each parameter) of the batch DATA.",
    )

    @contextmanager
    def prepared(self, start: "AuditStart") -> Iterator["PreparedAudit"]:
        """Open the model and the data of an audit, and yield it."""
        import torch

        from holdfast.audits import reconstruct
        from holdfast.audits.audit import AuditRequest, PreparedAudit
        from holdfast.core.model import evaluating
        from holdfast.runs.harden.attempt_training import refuse_untrainable
        from holdfast.verbs.opening import declared, resolve
        from holdfast.verbs.opening.plans import device_of

        self._refuse_contradictions()
        subject = resolve.open_seeded(self)
        refuse_untrainable(subject.model)
        data = resolve.open_examples(self, subject.model)
        subject = declared.with_found_properties(subject, (), data)
        device = torch.device(device_of(self.device))
        model, examples = subject.model.to(device), data.read(0, len(data)).to(device)
        with torch.no_grad(), evaluating(model):
            n_classes = model(examples.first(1).x).shape[1]
            exact_layer = reconstruct.first_dense(model, examples.first(1).x) is not None
        judge = None if self.judge is None else resolve.open_named(self.judge, self, "judge")
        if judge is not None:
            if judge.digest == subject.digest:
                raise UsageError(f"the judge {self.judge} is the model itself; give an independent network")
            resolve.refuse_other_bounds(judge, model, "judge")
            resolve.refuse_other_classes(judge, n_classes, examples.first(1).x, "judge")
        given = None if self.gradient is None else reconstruct.open_gradient(str(self.gradient), model)
        how = self._planned(len(examples), n_classes)
        how.refuse_unusable(model, len(examples), given=given is not None)
        notes = () if given is None else reconstruct.notes_on(given, model, examples, self.batch_norm)
        request = AuditRequest(
            "reconstruct",
            {
                "sizes": list(how.sizes),
                "batches": how.batches,
                "steps": how.steps,
                "batch_norm": how.batch_norm,
                "clip": self.clip,
                "noise": self.noise,
                "inversion": how.inversion,
                "judge": judge is not None,
                "exact_layer": exact_layer,
                "n_classes": n_classes,
                **({} if judge is None else {"judge_digest": judge.digest}),
                **({} if given is None else {"gradient_digest": reconstruct.digest_of(given)}),
            },
            {**subject.card, "digest": subject.digest},
            {"name": data.name, "digest": data.digest, "n": len(examples), "shape": examples.example_shape},
            tuple(how.steps_of_run()),
            seed=self.seed,
            device=str(device),
            notes=(*subject.notes, *declared.notes_of(data), *notes),
        )
        other = None if judge is None else judge.model.to(device).eval()
        yield PreparedAudit(request, lambda run: reconstruct.measure(run, model, examples, other, how, given))

    def _refuse_contradictions(self) -> None:
        if (self.clip is None) != (self.noise is None):
            missing, other = ("clip", "noise") if self.clip is None else ("noise", "clip")
            raise UsageError(
                f"{other} is given without {missing}; DP-SGD clips gradients and adds noise",
                Remedy(missing, Placeholder("X", "1")),
                Remedy(other),
            )
        if self.gradient is not None and self.clip is not None:
            raise UsageError(
                "clip protects gradients that the audit computes, and a gradient is given",
                Remedy("clip", also=(Remedy("noise"),)),
            )

    def _planned(self, n: int, n_classes: int) -> "ReconstructionAudit":
        """The settings of the audit of `n` examples."""
        from holdfast.audits import reconstruct

        return reconstruct.ReconstructionAudit(
            (n,) if self.gradient is not None else self.batch_size,
            1 if self.gradient is not None else self.batches,
            self.steps,
            self.batch_norm,
            None if self.clip is None else reconstruct.Protection(self.clip, self.noise or 0.0),
            n_classes,
            self.inversion,
            reconstruct.SHOWN if self.examples else 0,
            self.seed,
        )
