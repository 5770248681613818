"""The risks and the similarity of `holdfast audit generator` for planted synthetic tables of Adult."""

import time

import torch
from torch import Tensor

from benchmarks.record import Cells, Claim, Outcome
from holdfast.audits.generator.copies import copies
from holdfast.core.draws import Draws
from holdfast.io.data.mixed_tables import MixedTables, TableFile, open_mixed
from holdfast.io.data_catalogue import data_folder
from holdfast.statistics.intervals import bonferroni
from holdfast.statistics.synthetic_tables import (
    Rows,
    column_shapes,
    inference,
    linkability,
    pair_trends,
    risk,
    singling_out,
)

WHAT = "synthetic tables of Adult: training rows, new rows, and columns that are resampled independently"
TRAIN, N, ATTEMPTS = 8_000, 4_000, 1_000
"""numbers of training rows, of synthetic and of held-out rows, and of attempts of each attack"""


def measured() -> Outcome:
    random = Draws(0).at("generator-tables")
    started = time.process_time()
    place = data_folder() / "adult.csv.gz"
    opened = open_mixed([TableFile(place, "train"), TableFile(place, "test")], ())
    rows, test = (
        part[random.at(name).bits(torch.arange(len(part))).argsort()]
        for name, part in zip(("train", "test"), opened.rows, strict=True)
    )
    training, held_out = rows[:TRAIN], test[:N]
    columns = [
        column[random.at("independent", c).bits(torch.arange(N)).argsort()]
        for c, column in enumerate(training[:N].T)
    ]
    tables = {
        "training rows": training[:N],
        "new rows": rows[TRAIN : TRAIN + N],
        "independent columns": torch.stack(columns, 1),
    }
    found = {name: _audited(opened, table, training, held_out) for name, table in tables.items()}
    copied, new, independent = found.values()
    claims = [
        Claim("share of copies among training rows >= 0.99", copied["copies"], 0.99, least=True),
        Claim(
            "lower end of the risk of linking of training rows >= 0.25",
            copied["linking low"],
            0.25,
            least=True,
        ),
        Claim("share of copies among new rows <= 0.02", new["copies"], 0.02),
        Claim("risks of new rows whose interval excludes 0 <= 0", new["risks above 0"], 0),
        Claim("risks of independent columns whose interval excludes 0 <= 0", independent["risks above 0"], 0),
        Claim(
            "similarity of pairs of new rows above that of independent columns >= 0.02",
            new["pairs"] - independent["pairs"],
            0.02,
            least=True,
        ),
    ]
    seconds = time.process_time() - started
    notes = [
        f"{seconds:.0f} CPU seconds.",
        "Half of the training rows are in the table of training rows, so that its risks are about 0.5 at most.",
        "Intervals of all risks of a table hold together with 95 %.",
    ]
    table: list[Cells] = [
        {"table": name, **{key: round(value, 4) for key, value in each.items()}}
        for name, each in found.items()
    ]
    config: Cells = {"training rows": TRAIN, "synthetic rows": N, "attempts": ATTEMPTS, "seed": 0}
    return Outcome(table, claims, config, notes=notes)


def _audited(opened: MixedTables, samples: Tensor, training: Tensor, held_out: Tensor) -> dict[str, float]:
    tables = MixedTables(opened.columns, (training, samples, held_out))
    rows, random = Rows(samples, training, held_out, tables.numeric), Draws(0).at("attacks")
    attacks = [
        singling_out(rows, ATTEMPTS, random.at("singling-out")),
        linkability(rows, ATTEMPTS, random.at("linking")),
        *inference(rows, ATTEMPTS, random.at("inference")),
    ]
    risks = [risk(each, bonferroni(0.95, len(attacks))) for each in attacks]
    of_training, of_samples, of_held_out = tables.encoded(0)
    copied = copies(of_samples, of_training, of_held_out)
    return {
        "copies": copied.rate.value + copied.near.value,
        "singling out": risks[0].value,
        "linking": risks[1].value,
        "linking low": risks[1].low,
        "largest inference": max(each.value for each in risks[2:]),
        "risks above 0": float(sum(each.low > 0 for each in risks)),
        "columns": float(column_shapes(samples, training, tables.numeric).nanmean()),
        "pairs": float(pair_trends(samples, training, tables.numeric).nanmean()),
    }
