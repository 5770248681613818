"""The settings of `holdfast audit privacy`. The module imports no torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import Field

from holdfast.core.errors import Placeholder, Remedy, UsageError
from holdfast.settings import values
from holdfast.settings.groups import Flag
from holdfast.verbs.settings import AuditVerb, TrainingFunctionSource

if TYPE_CHECKING:
    from holdfast.audits.audit import AuditStart, PreparedAudit
    from holdfast.verbs.audit.opening_trainings import Training


class AuditPrivacy(TrainingFunctionSource, AuditVerb):
    """All settings of the command `holdfast audit privacy`. `data` are the training examples, and `model` is a network
    of the architecture that is trained on them.

    `train` is a function `fit(x, y, seed)`, which gets `x` (n, …) after the preprocessing of `model` and `y` (n,)
    as tensors, and returns the trained network, or a folder that `harden` wrote. The bound follows from guesses
    about which canaries were in one training (Steinke et al., NeurIPS 2023, arXiv:2305.08846). Equal rows of `data`
    are counted, because the claim is for one row.

    `metrics["epsilon_lower"]` of the result is the lower bound for one row, at the claimed `delta`.
    """

    verb = "audit-privacy"
    kind = "privacy"
    summary = "test the epsilon that a private training claims"
    about = (
        "Measure a lower bound of the epsilon of a differentially private training (--train), and compare it "
        "with the claimed one (--epsilon).\n\n"
        "One network of the architecture of MODEL is trained on DATA with canaries. The training is flagged "
        "if the bound at 95 % confidence exceeds the claim; a bound below it is no proof of privacy."
    )
    example = "net.py:make data.npz --train net.py:fit --epsilon 8"
    epsilon: Annotated[Annotated[float, Gt(0)] | None, Flag("X", common=True)] = Field(
        default=None,
        description="The epsilon that the training claims, as in 2 (default: that of a card of dp-sgd in --train).",
    )
    delta: Annotated[float, Gt(0), Lt(1), Flag("X", common=True)] = Field(
        default=1e-5,
        description="The delta that the training claims (default: that of a card of dp-sgd in --train, else 1e-5).",
    )
    canaries: Annotated[values.Positive, Ge(8), Flag("N", common=True)] = Field(
        default=200, description="Number of canaries, each trained on with probability 1/2 (default: 200)."
    )
    canary: Annotated[Literal["mislabelled", "random"], Flag("KIND")] = Field(
        default="mislabelled",
        description="What the canaries are: examples with a wrong label (mislabelled, the default), or random inputs "
        "with a random label (random).",
    )
    guesses: Annotated[float, Gt(0), Le(1), Flag("SHARE")] = Field(
        default=2 / 3,
        description="Share of the canaries about which a guess is made, those with extreme losses (default: 2/3).",
    )

    @contextmanager
    def prepared(self, start: "AuditStart") -> Iterator["PreparedAudit"]:
        """Open the model, the data and the training function of an audit, and yield it."""
        import torch

        from holdfast.audits.audit import AuditRequest, PreparedAudit
        from holdfast.audits.privacy import LOSSES, PrivacyAudit, measure
        from holdfast.statistics.privacy_budget import row_budget
        from holdfast.verbs.audit.opening_trainings import open_any_training, trained_like
        from holdfast.verbs.opening import declared, resolve
        from holdfast.verbs.opening.plans import device_of

        if self.train is None:
            raise UsageError(
                "train is missing: the audit trains a network with canaries, and needs the function that trains it",
                Remedy("train", Placeholder("FILE.py:F", "fit")),
            )
        training = open_any_training(self.train)
        epsilon, delta = self._claimed(training)
        subject = resolve.open_seeded(self)
        examples, split_notes = resolve.open_training_examples(self, subject.model)
        subject = declared.with_found_properties(subject, (), examples)
        device = torch.device(device_of(self.device))
        data = examples.read(0, len(examples)).to(device)
        model = subject.model.to(device)
        if model.classes is None:
            model.classes = model(data.first(1).x).shape[1]
        equal_rows = row_budget(epsilon, delta, data.fingerprints()).equal_rows
        how = PrivacyAudit(epsilon, delta, self.canaries, self.canary, self.guesses, equal_rows, self.seed)
        how.refuse_unable(len(data), model.classes)
        request = AuditRequest(
            "privacy",
            {
                **{name: value for name, value in vars(how).items() if name != "seed"},
                "train": {"name": training.name, "digest": training.digest},
            },
            {**subject.card, "digest": subject.digest},
            {"name": examples.name, "digest": examples.digest, "n": len(data), "shape": data.example_shape},
            (LOSSES,),
            seed=self.seed,
            device=str(device),
            notes=(*subject.notes, *split_notes),
        )
        train = partial(trained_like, training, model)
        yield PreparedAudit(request, lambda run: measure(run, train, data, model, how))

    def _claimed(self, training: "Training") -> tuple[float, float]:
        """Return the epsilon and the delta of the settings, and otherwise those in the card of a private training."""
        from holdfast.recipes.dp_sgd import DPSGD
        from holdfast.verbs.audit.opening_trainings import CardTraining

        epsilon, delta = self.epsilon, self.delta
        if isinstance(training, CardTraining) and isinstance(training.recipe, DPSGD):
            epsilon = training.recipe.epsilon if epsilon is None else epsilon
            delta = delta if "delta" in self.model_fields_set else training.recipe.delta
        if epsilon is None:
            raise UsageError(
                "epsilon is missing: the audit compares its bound with the epsilon that the training claims",
                Remedy("epsilon", Placeholder("X")),
            )
        return epsilon, delta
