"""Opens the model and the data of `holdfast doctor`, and checks them."""

from holdfast.core.batch import Data
from holdfast.io.doctor import Checkup, Finding, examine
from holdfast.io.remote.served_model import inspection_counter
from holdfast.runs.assess.request import DescribedModel
from holdfast.threats.domains import SIGNAL
from holdfast.verbs.opening.arguments import gradients
from holdfast.verbs.opening.declared import is_of_clips, notes_of
from holdfast.verbs.opening.resolve import open_examples, open_subject
from holdfast.verbs.settings import Doctor


def opened(settings: Doctor) -> tuple[DescribedModel, Data]:
    """Open the model and the data, and return them. Data that do not fit the model are opened as well."""
    subject = open_subject(settings)
    inspection_counter(subject.model)
    return subject, open_examples(settings, subject.model, lenient=True)


@gradients()
def checked(settings: Doctor) -> Checkup:
    """Check the model and the data for common mistakes, and return the findings."""
    subject, data = settings.open()
    domain = settings.threat.change.domain or (SIGNAL if is_of_clips(settings) else None)
    findings = examine(subject.model, data, domain=domain)
    return Checkup((*(Finding("data", "note", note) for note in notes_of(data)), *findings))
