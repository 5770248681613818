"""Training of the reference networks of an audit of membership: in this process, in workers, or on a cluster."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from holdfast.api.audited_trainings import Training, trained_like
from holdfast.audits.membership.audit import columns_of
from holdfast.audits.membership.references import (
    MembershipAudit,
    ReferenceTraining,
    Signals,
    joined,
    signals_of,
    trained_signals,
)
from holdfast.core.batch import Batch
from holdfast.core.errors import UsageError
from holdfast.core.evidence import Columns
from holdfast.core.model import Classifier
from holdfast.core.pieces import Room
from holdfast.rotation.collecting import with_fresh_weights
from holdfast.runs.engine.executor import Measure

TOGETHER, FUNCTION_TOGETHER = 8, 2
"""numbers of networks that one shard trains: as one network with batched weights, or by a function one after another"""


@dataclass(frozen=True)
class NetworkTraining:
    """The training of the networks of an audit: by a function or the card of the user, or that of the audit."""

    model: Classifier
    how: MembershipAudit
    training: Training | None
    default: ReferenceTraining
    device: str

    @contextmanager
    def opened(self) -> Iterator[Measure]:
        """Yield the function that trains the networks of a shard, on the device."""
        here = replace(
            self,
            model=self.model.to(self.device),
            how=replace(self.how, examples=self.how.examples.to(torch.device(self.device))),
        )
        yield here.measured

    def in_memory(self) -> "NetworkTraining":
        """Return the same training with copies of the model and the examples in main memory, from which they are sent
        to workers.
        """
        examples = self.how.examples.to(torch.device("cpu"))
        return replace(self, model=deepcopy(self.model).cpu(), how=replace(self.how, examples=examples))

    def measured(self, shard: tuple[int, int], room: Room, until: float) -> Columns:
        """Train the networks of a shard, and return what they say about all examples."""
        networks, how = range(*shard), self.how
        inside = how.design.inside()[list(networks)]
        if self.training is not None:
            return columns_of(networks, self._called(self.training, networks, inside, room))
        draws = [how.design.rng.at("network").at(network) for network in networks]
        fresh = [with_fresh_weights(self.model, each.at("begin"), "own").net for each in draws]
        nets = [net for net in fresh if isinstance(net, nn.Module)]
        x, y, output = self.model.preprocess(how.examples.x), how.examples.y, self.model.output
        signals = trained_signals(nets, x, y, inside, self.default, draws, output, room.progress)
        return columns_of(networks, signals)

    def _called(self, training: Training, networks: Sequence[int], inside: Tensor, room: Room) -> Signals:
        results, how = [], self.how
        for network, mask in zip(networks, inside, strict=True):
            part = how.examples.take(mask)
            seed = how.design.rng.at("network").at(network).seed
            trained = trained_like(training, self.model, part.x, part.y, seed)
            results.append(queried(trained, how.examples))
            room.progress(1)
        return joined(results)


def queried(model: Classifier, batch: Batch) -> Signals:
    """Return what the model says about examples, in pieces. A server limits the rows of its requests itself."""
    with torch.no_grad():
        logits = torch.cat([model(piece.x) for piece in batch.split(256)])
    if (largest := int(batch.y.max())) >= logits.shape[1]:
        raise UsageError(
            f"the data have the label {largest}, and the model has {logits.shape[1]} classes; expected labels from 0 "
            f"to {logits.shape[1] - 1}"
        )
    return signals_of(logits, batch.y, labels=model.access == "labels")
