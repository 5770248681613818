"""Opens what an audit of a synthetic table needs: the table, its training rows, and held-out rows."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from holdfast.api.auditing.generator import AuditGenerator
from holdfast.api.references import beside
from holdfast.audits.audit import AuditRequest
from holdfast.audits.generator.audit import GeneratorAudit, parts_of, refuse_incomparable
from holdfast.audits.generator.tables import TablePart
from holdfast.core.batch import UNLABELLED, Batch
from holdfast.core.draws import Draws
from holdfast.io.data.arrays import selected_rows
from holdfast.io.data.mixed_tables import MixedTables, TableFile, open_mixed
from holdfast.io.data.tables import SUFFIXES
from holdfast.rotation.collecting import rows_of
from holdfast.settings.groups import DataSource

_TRAINING, _SAMPLES, _HELD_OUT = range(3)


@dataclass(frozen=True)
class OpenedTables:
    """The training rows, the synthetic table and the held-out rows."""

    names: tuple[str, ...]
    tables: MixedTables

    def about(self, place: int) -> dict[str, Any]:
        """Return the name and the digest of a table."""
        rows, columns = self.tables.rows[place], repr(self.tables.columns).encode()
        content = hashlib.sha256(columns + rows.contiguous().numpy().tobytes()).hexdigest()
        return {"name": self.names[place], "digest": content}


def tables_of(settings: AuditGenerator) -> OpenedTables | None:
    """Return the tables of an audit, or None if the samples or the data are not tables, or if the features of a network
    are compared.
    """
    sources = (
        settings,
        beside(settings, settings.model),
        beside(settings, settings.held_out),
    )
    given = [source.data for source in sources]
    if settings.features is not None or settings.x is not None:
        return None
    if not all(isinstance(data, str) and data.endswith(SUFFIXES) for data in given):
        return None
    usual = ("train", None, "test")
    files = [_file(source, split) for source, split in zip(sources, usual, strict=True)]
    return OpenedTables(tuple(map(str, given)), open_mixed(files, settings.drop))


def _file(source: DataSource, usual: str | None) -> TableFile:
    return TableFile(Path(str(source.data)), source.split, usual, source.separator, source.header)


def prepared_tables(
    settings: AuditGenerator, opened: OpenedTables, command: str
) -> tuple[AuditRequest, GeneratorAudit]:
    """Return the request of the audit of a synthetic table, and what it compares."""
    tables, rng = opened.tables.selected(_TRAINING, _chosen(settings, opened)), Draws(settings.seed)
    opened = replace(opened, tables=tables)
    training, samples, held_out = (_batch(x) for x in tables.encoded(_TRAINING))
    # a random sample, because a file may be sorted
    names = tuple(column.name for column in tables.columns)
    chosen = rows_of(samples, settings.samples, rng.at("samples"))
    others = rows_of(held_out, len(held_out), rng.at("held-out"))
    how = GeneratorAudit(
        training,
        others,
        settings.samples,
        lambda: chosen.x,
        None,
        torch.device("cpu"),
        rng.at("parts"),
        None,
        (TablePart(names, tables), *parts_of(settings.latent, settings.condition)),
        (tables.rows[_SAMPLES][chosen.ids], tables.rows[_TRAINING], tables.rows[_HELD_OUT][others.ids]),
    )
    refuse_incomparable(how)
    about = opened.about(_TRAINING) | {"n": len(training)}
    about["held_out"] = opened.about(_HELD_OUT) | {"n": len(held_out)}
    request = AuditRequest(
        "generator",
        {
            "samples": settings.samples,
            "features": None,
            "drop": list(settings.drop),
            "latent": settings.latent,
            "condition": settings.condition,
            "columns": list(names),
        },
        opened.about(_SAMPLES),
        about,
        how.steps,
        tuple(settings.gates),
        settings.seed,
        "cpu",
        command,
        (*tables.notes, *selection_notes(settings, len(training))),
    )
    return request, how


def _chosen(settings: AuditGenerator, opened: OpenedTables) -> NDArray[np.int64]:
    """Return the numbers of the training rows that the settings select."""
    n_rows, name = len(opened.tables.rows[_TRAINING]), opened.names[_TRAINING]
    return selected_rows(n_rows, n=settings.n, sample=settings.sample, seed=settings.seed, name=name)


def selection_notes(settings: AuditGenerator, n: int) -> tuple[str, ...]:
    """Return the note on an audit that knows only `n` of the training examples."""
    if not settings.selects:
        return ()
    return (f"only {n:,} training examples were selected, and copies of the other ones are not found",)


def _batch(x: torch.Tensor) -> Batch:
    return Batch(x, torch.full((len(x),), UNLABELLED), torch.arange(len(x)))
