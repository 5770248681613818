"""The settings of `holdfast audit generator`. The module imports no torch."""

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field

from holdfast.core.catalogue import AUDITS
from holdfast.core.errors import UsageError
from holdfast.gates.grammar import parse
from holdfast.settings import values
from holdfast.settings.groups import Flag
from holdfast.verbs.settings import AuditVerb


class AuditGenerator(AuditVerb):
    """All settings of the command `holdfast audit generator`. `model` is a generator or a file of its samples, and
    `data` are its training examples.

    `model` is an object with a method `sample(n, seed)`, which returns n samples as a tensor or an array (n, …),
    the address of a function that returns such an object, as in "gen.py:make", or a file of samples. `held_out` is
    required, and has the shape and the range of values of `data`. Samples in bytes are divided by 255. Without
    `features`, the labels of `data` are needed, for the training of a network whose features are compared. Files of
    tables are compared column by column instead.

    `metrics` of the result contains `frechet`, the Fréchet distance of the features, and `copy_rate` and
    `near_copy_rate`, the shares of the samples that equal a training example or are nearer to one than 99 % of the
    held-out examples.
    """

    verb = "audit-generator"
    kind = "generator"
    summary = "measure the quality of generated samples, and copies among them"
    about = (
        "Measure how well the samples of GENERATOR match examples that it was not trained on (--held-out), "
        "and how many of them are copies of its training examples DATA.\n\n"
        "GENERATOR is a function in a Python file that returns an object with sample(n, seed), or a file of "
        "samples. It is flagged if more samples than held-out examples are copies, or if it has collapsed: "
        "its samples are like few training examples. Changes of the latent vector, of the inputs of an "
        "autoencoder and of those of a discriminator are searched for (--latent)."
    )
    arguments: ClassVar[Mapping[str, str]] = {"model": "GENERATOR", "data": "DATA"}
    opening = "holdfast.verbs.audit.opening_generators:prepared_generator"
    example = "mnist-gan mnist-mini --held-out mnist-mini"
    files = ("held_out",)
    of_generators = True
    model: values.Given | None = Field(
        default=None,
        description="Function of a Python file that returns an object with sample(n, seed), as in gen.py:make, or a "
        "file of samples.",
    )
    held_out: Annotated[values.Given | None, Flag("DATA", completion="DATA", common=True)] = Field(
        default=None,
        description="Examples of the same source that the generator was not trained on, with which its samples are "
        "compared.",
    )
    samples: Annotated[values.Positive, Flag("N", common=True)] = Field(
        default=2000, description="Number of samples (default: 2000)."
    )
    features: Annotated[str | None, Flag("MODEL[,K=V]", completion="MODEL", common=True)] = Field(
        default=None,
        description="Network whose features are compared, as in net.pt,arch=net.py:make (default: a small network that "
        "is trained on the labels of the training examples).",
    )
    latent: Annotated[values.Amount, Flag("EPS")] = Field(
        default=0.1,
        description="Root mean square of the changes for which the largest change of the output is searched, in "
        "standard deviations of the elements of a latent vector or of the features; 0 skips the search (default: 0.1).",
    )
    condition: Annotated[values.Whole | None, Flag("CLASS")] = Field(
        default=None,
        description="Class to which the samples of a conditional generator are restricted; they are compared with the "
        "examples of this label (default: all classes).",
    )

    def refuse_contradictions(self, prefix: str, written: Mapping[str, str]) -> None:
        """Raise `UsageError` for a gate on the sensitivity without the search that measures it."""
        metrics = [gate for gate in self.gates if gate.strip() != AUDITS[self.kind].gate]
        for gate in metrics:
            if not self.latent and parse(gate, AUDITS[self.kind].metrics).metric == "latent_sensitivity":
                raise UsageError(
                    f"{prefix}gate {gate!r} needs the largest change of the output, and latent is 0, which skips its "
                    "search; leave latent out"
                )
