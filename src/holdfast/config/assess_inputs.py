"""Opens the inputs of an assessment and makes its request, for the command line and for Python."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from holdfast.config.attacked import attackers
from holdfast.config.planning import assess_request
from holdfast.config.references import DataLike, Sources
from holdfast.config.resolve import device_of_model, open_all, open_fit, open_others
from holdfast.config.settings import AssessSettings
from holdfast.core.batch import Data
from holdfast.core.evidence import Evidence
from holdfast.harness import Member
from holdfast.verbs.request import AssessRequest, Opening, Subject
from holdfast.verbs.served import journaled


@dataclass(frozen=True)
class AssessInputs:
    """The inputs of an assessment before they are opened."""

    settings: AssessSettings
    sources: Sources
    surrogates: Sequence[Any]
    fit: DataLike | None
    across: Sequence[DataLike]
    members: tuple[Member, ...] | None
    """the attacks, if they were given as objects"""
    baseline: Evidence | None
    command: str = ""

    @property
    def open_all(self) -> Opening:
        """Function that opens model, data and surrogates, which worker processes call too."""
        settings = self.settings
        return partial(
            open_all,
            self.sources,
            self.surrogates,
            transform=settings.options.transform,
            adaptive=settings.suite.adaptive,
        )


@contextmanager
def opened_for_assess(
    inputs: AssessInputs, run: Path | None, *, resume: bool
) -> Iterator[tuple[Subject, Data, AssessRequest]]:
    """Open the inputs of an assessment, and make its request.

    Answers of servers are stored in the folder of the run.
    """
    settings, sources = inputs.settings, inputs.sources
    with journaled(run, resume=resume, keep=sources.model.limits.keep_answers):
        subject, data, surrogates = inputs.open_all()
        device = settings.device.device
        request = assess_request(
            settings,
            members=inputs.members,
            baseline=inputs.baseline,
            device=device_of_model(sources, subject, device),
            target=subject.model.access,
            command=inputs.command,
        )
        request = replace(
            request,
            fit=open_fit(sources, inputs.fit, subject.model, request.plan),
            surrogates=surrogates,
            across=open_others(inputs.across, sources, subject.model),
            attackers=attackers(sources, device, adaptive=settings.suite.adaptive),
        )
        yield subject, data, request
