"""A further kind of stage needs one class and its registration, and is then stored, costed and part of the evidence."""

import pytest
import torch

from holdfast.core.evidence import Cost, Table
from holdfast.core.meter import in_pieces
from holdfast.runs.assess.assess import assess
from holdfast.runs.harness.kinds import KINDS
from holdfast.runs.harness.measure import measure_plan
from holdfast.runs.harness.stage import Stage, StageKind
from runs.fakes import N, data, order, settled, subject


class Radius(StageKind):
    """A stand-in for a certificate: half the margin of each example is its radius."""

    name = "radius"
    lost = "the radii are"

    def stages(self, plan):
        return [Stage("radius", self)]

    def due(self, stage, plan, by_stage):
        return by_stage["clean"]["correct"]

    def run(self, stage, work):
        columns = self.columns(work.clean)

        def piece(batch):
            logits = work.target.logits(batch.x)
            right = logits.gather(1, batch.y[:, None])[:, 0]
            others = logits.scatter(1, batch.y[:, None], -torch.inf)
            return {"radius": ((right - others.amax(1)) / 2).cpu()}

        chosen = work.chosen
        if chosen.any():
            columns["radius"][chosen] = in_pieces(piece, work.batch.take(chosen), work.room)["radius"]
        return columns

    def columns(self, clean):
        n = len(clean["id"])
        return {
            "id": clean["id"].clone(),
            "ran": clean["correct"].clone(),
            "radius": torch.zeros(n, dtype=torch.float64),
        }

    def cost(self, columns, *, randomised):
        return Cost(int(columns["ran"].sum()))

    def tables(self, by_stage):
        columns = by_stage["radius"]
        return {"certificates": Table("example", {name: columns[name] for name in ("id", "radius")})}


@pytest.fixture
def _radius(monkeypatch):
    monkeypatch.setitem(KINDS, Radius.name, Radius())


@pytest.mark.slow
@pytest.mark.usefixtures("_radius")
def test_a_further_kind_is_measured_in_memory_in_shards_and_on_disk(tmp_path):
    whole = assess(subject(), data(), order(gates=()))
    table = whole.evidence.tables["certificates"]
    clean = whole.evidence["margin"].clamp(min=0) / 2
    assert len(table) == N
    torch.testing.assert_close(table.columns["radius"], clean, rtol=1e-5, atol=1e-6)
    parts = assess(subject(), data(), order(gates=(), shard_size=7, batch_size=3))
    torch.testing.assert_close(
        parts.evidence.tables["certificates"].columns["radius"], table.columns["radius"]
    )
    stored = assess(subject(), data(), order(gates=()), run=tmp_path / "run")
    assert torch.equal(stored.evidence.tables["certificates"].columns["radius"], table.columns["radius"])
    before = settled(tmp_path / "run")
    assert (tmp_path / "run" / "radius.safetensors").is_file()
    assess(subject(), data(), order(gates=()), run=tmp_path / "run", resume=True)
    assert settled(tmp_path / "run") == before


@pytest.mark.usefixtures("_radius")
def test_its_passes_are_in_the_total_cost():
    request = order(gates=())
    model, examples = subject().model, data()
    batch = examples.read(0, len(examples))
    evidence = measure_plan(model, [batch], request.plan)
    alone = sum(record.cost.forwards for record in evidence.attacks)
    assert evidence.cost.forwards >= alone + int(evidence["correct"].sum())


def test_columns_of_a_table_have_equal_lengths():
    with pytest.raises(ValueError, match="different lengths"):
        Table("example", {"id": torch.arange(3), "radius": torch.zeros(2)})
