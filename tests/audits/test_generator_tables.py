"""The audit of synthetic tables: risks and similarities beside exact values and SDMetrics, copies, and errors."""

import csv
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

import holdfast
from benchmarks.forging import accepted_fields
from benchmarks.table_similarities import NUMERIC, PLACE, tables
from holdfast.cli.app import run
from holdfast.core.draws import Draws
from holdfast.core.errors import NoSplit, TargetError, UsageError
from holdfast.io.data.mixed_tables import TableFile, open_mixed
from holdfast.statistics.synthetic_tables import (
    Attacked,
    Rows,
    column_shapes,
    inference,
    linkability,
    pair_trends,
    risk,
    singling_out,
)

COLUMNS = ("age", "work", "income", "city", "hours")
WORK, CITY = ("farm", "office", "school", ""), ("Aachen", "Bonn", "Celle")


def people(n: int, seed: int) -> torch.Tensor:
    """Rows (n, 5) of numbers and positions of categories, whose columns depend on each other."""
    rng = np.random.default_rng(seed)
    age, work = rng.uniform(18, 80, n).round(1), rng.integers(0, 4, n)
    income = (10 * work + age + rng.normal(0, 3, n)).round(2)
    return torch.from_numpy(np.column_stack([age, work, income, rng.integers(0, 3, n), rng.normal(40, 5, n)]))


def rows(samples: torch.Tensor) -> Rows:
    return Rows(samples, people(500, 0), people(500, 1), torch.tensor([True, False, True, False, True]))


def write(path: Path, table: torch.Tensor) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for age, work, income, city, hours in table.tolist():
            writer.writerow([age, WORK[int(work)], income, CITY[int(city)], round(hours, 2)])
    return str(path)


def test_similarities_are_those_of_sdmetrics():
    stored = json.loads(PLACE.read_text(encoding="utf-8"))
    samples, reference = map(torch.from_numpy, tables())
    numeric = torch.tensor(NUMERIC)
    assert column_shapes(samples, reference, numeric).tolist() == pytest.approx(stored["shapes"], abs=1e-9)
    assert pair_trends(samples, reference, numeric).tolist() == pytest.approx(stored["trends"], abs=1e-9)


def test_a_constant_number_has_no_correlation_and_large_integers_are_counted():
    numeric = torch.tensor([True, True])
    table = torch.tensor([[1.0, 0.0], [1.0, 2.0], [1.0, 5.0]])
    assert pair_trends(table, table, numeric).isnan().all()
    wide = torch.tensor([[0.0, 0.0], [1500.0, 1500.0]])
    categories = torch.tensor([False, False])
    assert pair_trends(wide, wide, categories).tolist() == [1.0]
    assert pair_trends(wide, wide[[0, 0]], categories).tolist() == [0.5]


def test_the_risk_is_the_excess_over_the_control():
    def successes(k: int, n: int = 100_000) -> torch.Tensor:
        return torch.arange(n) < k

    found = risk(Attacked(successes(60_000), successes(0), successes(20_000)))
    assert found.value == pytest.approx(0.5, abs=1e-4)  # (0.6 - 0.2) / (1 - 0.2)
    error = 1.959964 * (0.6 * 0.4 / 0.8**2 + 0.2 * 0.8 * 0.4**2 / 0.8**4) ** 0.5 / 100_000**0.5
    assert found.high - found.value == pytest.approx(error, rel=1e-3)
    assert found.low == pytest.approx(found.value - error, rel=1e-3)
    none = risk(Attacked(successes(10, 100), successes(0, 100), successes(20, 100)))
    assert (none.value, none.low) == (0.0, 0.0) and none.high > 0


def test_copies_of_training_rows_are_at_risk_and_new_rows_are_not():
    copied, new = rows(people(500, 0)), rows(people(500, 2))
    for attack in (singling_out, linkability):
        assert risk(attack(copied, 200, Draws(0))).low > 0.5
        assert risk(attack(new, 200, Draws(0))).low == 0
    for each in inference(copied, 200, Draws(0)):
        assert each.main.all() and risk(each).low > 0.2
    assert all(risk(each, 0.99).low == 0 for each in inference(new, 200, Draws(0)))


def test_a_predicate_isolates_one_row_of_the_synthetic_table():
    # no two rows differ, so that no predicate isolates one
    constant = people(1, 0).repeat(50, 1)
    assert len(singling_out(rows(constant), 20, Draws(0)).main) == 0


@pytest.fixture
def paths(tmp_path):
    rng = np.random.default_rng(5)
    mixed = people(300, 0).clone()
    for column in range(5):
        mixed[:, column] = mixed[torch.from_numpy(rng.permutation(300)), column]
    return {
        "train": write(tmp_path / "train.csv", people(400, 0)),
        "test": write(tmp_path / "test.csv", people(300, 1)),
        "copies": write(tmp_path / "copies.csv", people(400, 0)[:300]),
        "mixed": write(tmp_path / "mixed.csv", mixed),
    }


def audited(paths, name, **settings):
    return holdfast.audit.generator(paths[name], paths["train"], held_out=paths["test"], **settings)


@pytest.mark.slow
def test_a_flagged_audit_without_a_gate_names_a_command_that_fails(paths, tmp_path, capsys, command_line):
    words = ["audit", "generator", paths["copies"], paths["train"], "--held-out", paths["test"]]
    words += ["--latent", "0", "--run", str(tmp_path / "run")]
    command_line(["holdfast", *words])
    assert run(words) == 0
    shown = capsys.readouterr().err
    note = next(line for line in shown.splitlines() if line.startswith("note: no gate was set"))
    assert "with --gate not-flagged it is 1" in note
    assert run(shlex.split(note[note.index("holdfast audit") :])[1:]) == 1
    shown = capsys.readouterr().err
    assert "no gate was set" not in shown and "Flagged: " in shown


def test_an_audit_flags_copies_and_finds_that_pairs_of_independent_columns_differ(paths):
    copied = audited(paths, "copies", gates=["linkability_risk <= 0.1", "pair_trends >= 0.5"])
    assert copied.verdict == "flagged" and copied.exit_code == 1
    assert copied.metrics["copy_rate"].value == 1.0
    assert copied.metrics["linkability_risk"].low > 0.3
    assert copied.metrics["inference_risk"].value > 0.3
    mixed = audited(paths, "mixed")
    assert mixed.verdict == "not flagged"
    assert mixed.metrics["copy_rate"].value <= 0.02
    assert mixed.metrics["singling_out_risk"].low == 0
    floor = mixed.content["facts"]["tables"]["floor"]
    assert mixed.metrics["column_shapes"].value > floor["column_shapes"] - 0.03
    assert mixed.metrics["pair_trends"].value < floor["pair_trends"] - 0.03
    assert copied.metrics["pair_trends"].value > mixed.metrics["pair_trends"].high


def test_an_audit_of_tables_continues_to_the_same_bytes(paths, tmp_path):
    first = audited(paths, "mixed", run=tmp_path / "run")
    again = audited(paths, "mixed", run=tmp_path / "run", resume=True)
    assert first.content == again.content
    assert not accepted_fields(tmp_path / "run", 6, tmp_path / "copy")


def test_columns_are_numbers_only_if_they_are_in_all_tables(tmp_path):
    (tmp_path / "a.csv").write_text("n,c,split\n1,2,train\n3,4,test\n", encoding="utf-8")
    (tmp_path / "b.csv").write_text("c,n\nx,5\n,6\n", encoding="utf-8")
    files = [TableFile(tmp_path / "a.csv", usual="train"), TableFile(tmp_path / "b.csv", usual="test")]
    opened = open_mixed(files, ())
    assert [column.name for column in opened.columns] == ["n", "c"]
    assert opened.columns[1].values == ("", "2", "4", "x") and opened.numeric.tolist() == [True, False]
    assert [part.tolist() for part in opened.rows] == [[[1, 1]], [[5, 3], [6, 0]]]
    with pytest.raises(NoSplit, match=r"has no column 'split'"):
        open_mixed([files[0], TableFile(tmp_path / "b.csv", split="test")], ())
    with pytest.raises(NoSplit, match=r"no split 'val'"):
        open_mixed([TableFile(tmp_path / "a.csv", split="val")], ())


def test_categories_of_tables_are_compared_without_spaces_at_their_ends(tmp_path):
    (tmp_path / "a.csv").write_text("c\n x\n y\n", encoding="utf-8")
    (tmp_path / "b.csv").write_text("c\ny\nx\n", encoding="utf-8")
    opened = open_mixed([TableFile(tmp_path / name) for name in ("a.csv", "b.csv")], ())
    assert opened.columns[0].values == ("x", "y")
    assert [part.tolist() for part in opened.rows] == [[[0], [1]], [[1], [0]]]
    assert "' x' as 'x'" in opened.notes[0]


def test_the_distance_of_two_categories_is_that_of_the_ends_of_a_number(tmp_path):
    (tmp_path / "a.csv").write_text("n,c\n1,x\n3,y\n", encoding="utf-8")
    (features,) = open_mixed([TableFile(tmp_path / "a.csv")], ()).encoded(0)
    assert features.tolist() == [[0, 0.5, 0], [1, 0, 0.5]]


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("age,work\n30,farm\n", UsageError, "lacks income, city, hours"),
        ("age,work,income,city,hours,id\n30,farm,1,Bonn,2,3\n", UsageError, "has other columns: id"),
        ("age,work,income,city,hours\n,farm,1,Bonn,2\n", TargetError, "'age' in row 0"),
    ],
)
def test_tables_that_cannot_be_compared_are_refused(paths, tmp_path, text, kind, message):
    (tmp_path / "bad.csv").write_text(text, encoding="utf-8")
    with pytest.raises(kind, match=message):
        audited({**paths, "bad": str(tmp_path / "bad.csv")}, "bad")


def test_a_column_of_names_and_equal_tables_are_refused(paths, tmp_path):
    names = tmp_path / "names.csv"
    names.write_text("name\n" + "".join(f"person {k}\n" for k in range(1001)), encoding="utf-8")
    with pytest.raises(UsageError, match="1,001 different texts"):
        open_mixed([TableFile(names)], ())
    with pytest.raises(UsageError, match="has no column 'nme' to drop"):
        open_mixed([TableFile(names)], ("nme",))
    with pytest.raises(UsageError, match="no column besides"):
        open_mixed([TableFile(names)], ("name",))
    with pytest.raises(UsageError, match="are among the training examples"):
        audited({**paths, "test": paths["train"]}, "mixed")
