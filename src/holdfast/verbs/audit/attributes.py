"""The settings of `holdfast audit attributes`. The module imports no torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from holdfast.core.errors import Install, Placeholder, Remedy, UsageError
from holdfast.settings import groups, values
from holdfast.settings.groups import Flag
from holdfast.verbs.settings import AuditVerb

if TYPE_CHECKING:
    from holdfast.audits.attributes import AttributeAudit
    from holdfast.audits.audit import AuditStart, PreparedAudit
    from holdfast.audits.finding import Images
    from holdfast.core.batch import Batch, Data
    from holdfast.io.data.labels import Groups
    from holdfast.runs.engine.run import Run


class AuditAttributes(
    groups.SensitiveColumn, groups.Members, groups.ServerLimits, groups.InferenceSource, AuditVerb
):
    """All settings of the command `holdfast audit attributes`. `data` is a table of records, those that the model was
    trained on if there are several splits.

    The attackers are those of Fredrikson et al. (USENIX Security 2014) and Yeom et al. (CSF 2018, arXiv:1709.01604),
    as boosted trees on log-probabilities. They are compared with an imputer, as Jayaraman & Evans (CCS 2022,
    arXiv:2209.08207) require.

    `metrics["attribute_accuracy_gain"]` of the result is the share of the records of which queries to the model reveal
    the attribute, minus that of the imputer.
    """

    verb = "audit-attributes"
    kind = "attributes"
    summary = "measure whether answers reveal a sensitive attribute"
    about = (
        "Measure whether an attacker who can query MODEL infers a sensitive column (--sensitive) of records better "
        "than an imputer that was trained without the model on the same known records.\n\n"
        "Both know the other columns and the label of a record. The model is flagged if the difference in accuracy, "
        "or in the share that is found at 1 % false positives, is above 0 at 95 % confidence."
    )
    example = "model.pt table.csv --label income --sensitive sex"
    known: Annotated[values.Positive | None, Flag("N", common=True)] = Field(
        default=None,
        description="Number of records whose attribute the attacker knows, drawn at random (default: half). The others "
        "are attacked.",
    )

    @contextmanager
    def prepared(self, start: "AuditStart") -> Iterator["PreparedAudit"]:
        """Open the model and the table of an audit, and yield it."""
        import torch

        from holdfast.audits.attributes import ANSWERS, measure
        from holdfast.audits.audit import AuditRequest, PreparedAudit
        from holdfast.core.model import evaluating
        from holdfast.runs.assess.served_runs import attach, finish, journaled, served_by
        from holdfast.runs.store.columns import content_digest
        from holdfast.verbs.opening import declared, resolve
        from holdfast.verbs.opening.plans import device_of

        self._refuse_impossible()
        with journaled(start.folder, resume=start.resume, keep=self.keep_answers):
            subject = resolve.open_seeded(self)
            data, notes = resolve.open_training_examples(self, subject.model)
            shape = data.read(0, 1).example_shape
            if len(shape) != 1:
                raise UsageError(
                    f"{data.name} has inputs of the shape {shape}; expected a table, whose records have one number "
                    "for each column"
                )
            subject = declared.with_found_properties(subject, (), data)
            device = torch.device(device_of(self.device))
            model, records = subject.model.to(device), data.read(0, len(data)).to(device)
            how = self._of_table(data, records)
            served = served_by(model)
            if how.place is not None and served is None:
                how.refuse_left_out(model, str(self.sensitive))

            def audit(run: "Run") -> "Images":
                attach(served)
                with evaluating(model):
                    images = measure(run, model, how)
                if served is not None:
                    finish(served)
                return images

            request = AuditRequest(
                "attributes",
                {
                    "attribute": self.sensitive,
                    "values": list(how.values),
                    "known": how.known,
                    "is_input": how.place is not None,
                    "attribute_digest": content_digest({"attribute": how.attribute}),
                },
                {**subject.card, "digest": subject.digest},
                {"name": data.name, "digest": data.digest, "n": len(data)},
                (ANSWERS,),
                seed=self.seed,
                device=str(device),
                notes=(*subject.notes, *notes),
            )
            yield PreparedAudit(request, audit)

    def _refuse_impossible(self) -> None:
        if self.sensitive is None:
            raise UsageError(
                "sensitive is missing, the column whose values the attacker infers",
                Remedy("sensitive", Placeholder("COLUMN", "sex")),
            )
        if find_spec("sklearn") is None:
            raise UsageError(
                "the attackers are boosted trees of scikit-learn, which is not installed", Install("sklearn")
            )

    def _of_table(self, data: "Data", records: "Batch") -> "AttributeAudit":
        """The records of the data, and the sensitive attribute of each."""
        import torch

        from holdfast.audits.attributes import AttributeAudit

        groups_of_data: Groups | None = getattr(data, "groups", None)
        if groups_of_data is None:
            raise UsageError(
                f"{data.name} has no columns or arrays with names, of which sensitive could be one; expected a "
                "table, an .npz file, or a data frame"
            )
        column, features = groups_of_data.occurring(), getattr(data, "features", None) or ()
        place = features.index(self.sensitive) if self.sensitive in features else None
        how = AttributeAudit(
            records,
            torch.from_numpy(column.places),
            column.names,
            len(records) // 2 if self.known is None else self.known,
            place,
            self.seed,
        )
        how.refuse_unusable(str(self.sensitive))
        return how
