"""Several networks that are one model: each votes for a class, or their logits or probabilities are averaged."""

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Classifier
from holdfast.core.outputs import OutputKind, of_classes
from holdfast.core.through import instead
from holdfast.core.types import Inputs
from holdfast.io.models.weights import digest_of_weights

Combination = Literal["votes", "mean", "logits"]
"""`votes`: each member votes for its most probable class; `mean`: the probabilities of the members are averaged;
`logits`: their logits are averaged"""
RULE = "blake2b of the input, modulo the number of members"
"""how the recipe `partitions` assigns a training example to a member; another rule needs another text"""
_STEP = 2.0**-20
"""relative difference between the shares of two neighbouring classes with equal votes"""


class Ensemble(nn.Module):
    """Network whose outputs are the vote shares, the mean probabilities, or the mean logits, of its members.

    Of classes with equally many votes, the smallest is predicted: the share of class c is reduced by a fraction of c ·
    2⁻²⁰. Votes have no gradient, unless `straight` is true: then the outputs are logits, the number of votes of a class
    plus its mean probability, which resolves ties, and their gradient is that of the mean log-probabilities, as of a
    straight-through estimator. `names` are those of the members in errors. `output` states what the members return, as
    for `Classifier`. An ensemble that the recipe `partitions` trained has `training_set`, the SHA-256 of its training
    set, which is zero before the training.
    """

    training_set: Tensor

    def __init__(
        self,
        members: Sequence[nn.Module],
        *,
        combine: Combination = "votes",
        output: OutputKind | None = None,
        partitioned: bool = False,
        straight: bool = False,
        names: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if not members or combine not in get_args(Combination):
            raise UsageError(
                f"an ensemble of {len(members)} members with combine={combine!r} was requested; at least one member "
                f"and one of {', '.join(get_args(Combination))} were expected"
            )
        self.members = nn.ModuleList(members)
        self.combine, self.output, self.partitioned = combine, output, partitioned
        self.straight, self.names = straight, tuple(names)
        if partitioned:
            self.register_buffer("training_set", torch.zeros(32, dtype=torch.uint8))

    def logits(self, x: Inputs) -> Tensor:
        """Return the logits of the members, (members, n, classes)."""
        return torch.stack(outputs_of(self.members, x, self.output, self.names))

    def votes(self, x: Inputs) -> Tensor:
        """Return how many members vote for each class, (n, classes) int64."""
        return self._ballots(self.logits(x))

    def _ballots(self, logits: Tensor) -> Tensor:
        ballots = torch.zeros(logits.shape[1:], dtype=torch.int64, device=logits.device)
        # argmax returns the first of equal values
        chosen = logits.argmax(2).T
        return ballots.scatter_add_(1, chosen, torch.ones_like(chosen))

    def forward(self, x: Inputs) -> Tensor:
        """Return the vote shares, the votes as logits, the mean probabilities or the mean logits (n, classes)."""
        if self.combine == "logits":
            # a sum, because operations along the dimension of the members have no sound bounds
            first, *others = outputs_of(self.members, x, self.output, self.names)
            return sum(others, first) / len(self.members)
        if self.combine == "mean":
            return self.logits(x).softmax(2).mean(0)
        if self.straight:
            logits = self.logits(x)
            value = self._ballots(logits) + logits.softmax(2).mean(0)
            return instead(value, logits.log_softmax(2).mean(0))
        votes = self.votes(x)
        classes = votes.shape[1]
        if classes * len(self.members) >= 1 / _STEP:
            raise TargetError(
                f"{len(self.members)} members vote for {classes} classes, and ties are resolved for at most "
                f"{round(1 / _STEP):,} members times classes; give fewer members, or combine='mean'"
            )
        shares = votes.to(x.dtype) / len(self.members)
        return shares * (1 - _STEP * torch.arange(classes, device=x.device, dtype=x.dtype))

    def declare(self, model: Classifier) -> None:
        """Declare what a classifier of this network returns: logits, or probabilities, of which votes have no
        gradient.
        """
        if self.combine == "logits" or self.straight:
            return
        model.output = "probability"
        if self.combine == "votes":
            model.access, model.hides = "scores", "the votes of an ensemble have no gradients"

    @property
    def is_trained(self) -> bool:
        """Whether the recipe `partitions` trained the members, and their votes are counted."""
        return self.partitioned and self.combine == "votes" and bool(self.training_set.any())

    def metadata(self) -> dict[str, Any]:
        """Return what a file with the weights states about the ensemble. For partitions these are the rule, and the
        digests of the training set and of each member, which `declared_ensemble` compares.
        """
        entries: dict[str, Any] = {
            "members": len(self.members),
            "combine": self.combine,
            "output": self.output,
        }
        if self.is_trained:
            entries["partitions"] = {
                "rule": RULE,
                "training_set": bytes(self.training_set.tolist()).hex(),
                "members": [digest_of_weights(member.state_dict()) for member in self.members],
            }
        return entries


def outputs_of(
    members: Iterable[nn.Module], x: Inputs, output: OutputKind | None = None, names: Sequence[str] = ()
) -> list[Tensor]:
    """Return the logits (n, classes) of each of several networks. `names` are their names in errors. Raises
    `TargetError` if a member does not accept the inputs, or if the numbers of classes differ.
    """
    logits: list[Tensor] = []
    for k, member in enumerate(members):
        name = names[k] if k < len(names) else f"{k + 1}"
        try:
            logits.append(of_classes(member(x), output))
        except TargetError as error:
            raise error.reworded(f"the member {name}: {error.message}") from error
        if logits[k].shape != logits[0].shape:
            first, own = (values.shape[1] for values in (logits[0], logits[k]))
            raise TargetError(
                f"the member {name} has {own} classes, and the first one has {first}; give members with the same "
                "classes"
            )
    return logits


def declared_ensemble(
    net: nn.Module, model: Classifier, metadata: Mapping[str, Any], source: str
) -> tuple[str, ...]:
    """Declare what a model returns whose network is an ensemble from a weights file. Return notes for the report.

    Raises `TargetError` if the members or the training set differ from those that the metadata of the file state.
    """
    assert isinstance(net, Ensemble)
    if metadata.get("partitions") != net.metadata().get("partitions"):
        raise TargetError(
            f"the members of {source} are not those that the recipe partitions trained: the file states other digests "
            "or another rule, so that nothing is certified about it; train the model again"
        )
    net.declare(model)
    trained = metadata.get("partitions")
    of = f", trained on parts of the training set {trained['training_set'][:12]}…" if trained else ""
    return (f"the model is an ensemble of {len(net.members)} members ({net.combine}){of}",)


def ensemble_of(net: nn.Module, metadata: Mapping[str, Any]) -> Ensemble:
    """Return the untrained ensemble that the metadata of a weights file describe, whose members are copies of a
    network.
    """
    return Ensemble(
        [deepcopy(net) for _ in range(metadata["members"])],
        combine=metadata["combine"],
        output=metadata.get("output"),
        partitioned="partitions" in metadata,
    )
