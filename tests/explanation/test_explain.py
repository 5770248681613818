"""`holdfast explain`: the interface of Python, the command, and bad input."""

import csv
import io
import json
import re
import shutil

import pytest
import torch
from torch import nn

import holdfast
from holdfast.attacks import FGSM
from holdfast.cli.app import run
from holdfast.core.batch import Batch
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Classifier
from holdfast.explanation import case
from holdfast.explanation.case import Explained, Figure, bars
from holdfast.explanation.example import tracin
from store.test_foreign import rewritten


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A run of the bundled network that stores its adversarial inputs."""
    folder = tmp_path_factory.mktemp("explained") / "run"
    result = holdfast.assess(
        "mnist-cnn", holdfast.open_data("mnist-mini"), "linf:0.1", "quick", n=20, doubts=False,
        save_adversarial=True, run=folder,
    )  # fmt: skip
    return folder, result


def test_an_example_is_explained_with_its_figures():
    explained = holdfast.Explain(
        model="mnist-cnn", data="mnist-mini", threat="linf:0.2", index=3, n=20, train="mnist-mini"
    ).run()
    assert {"change", "attributions", "stability", "slice", "neighbours"} <= {*explained.names}
    assert " becomes " in explained.sentence
    assert "linf:0.2 allows 0.2" in explained.sentence
    assert any("same size" in reason for reason in explained.reasons)
    assert "of the smallest change lies in" in explained["change"].note
    page = explained.page()
    assert "<script" not in page
    for figure in explained.figures:
        assert figure.title in page.replace("&#39;", "'")
        assert figure.alternative
        rows = list(csv.reader(io.StringIO(figure.csv)))
        assert tuple(rows[0]) == figure.headings
        assert len(rows) == len(figure.rows) + 1
    assert json.loads(explained.to_json())["title"] == explained.title
    assert "nodes" in explained["attributions"].note
    with pytest.raises(KeyError, match="has change"):
        explained["other"]


def test_a_model_is_explained(stored):
    folder, result = stored
    explained = result.explain()
    assert {"margins", "classes", "confusion", "frequencies", "regions", "surface", "layers"} <= {
        *explained.names
    }
    weakest = re.match(r"The class (\S+) is the weakest", explained["classes"].title)
    lowest = min(row[3] for row in explained["classes"].rows)
    tied = {row[0]: row[1] for row in explained["classes"].rows if row[3] == lowest}
    assert len(tied) > 2 and tied[weakest[1]] == max(tied.values())
    assert f"{len(tied) - 1} others have the same share" in explained["classes"].title
    survivors = int((result.evidence["broken_by"] < 0).sum())
    missed = survivors - int(explained.sentence.split()[0])
    assert missed == 0 or f"{missed} that survived the run" in explained.sentence
    assert holdfast.report(folder).explain().sentence == explained.sentence
    assert holdfast.report(folder).explain(3).title == result.explain(3).title


@pytest.mark.slow
def test_a_run_with_random_transformations_is_explained_by_their_mean(tmp_path):
    result = holdfast.assess(
        "mnist-cnn", "mnist-mini", "linf:0.1", "quick", n=10, doubts=False, transform="rotate=15", run=tmp_path / "a"
    )  # fmt: skip
    first, second = (holdfast.report(tmp_path / "a").explain(3) for _ in range(2))
    assert first.to_json() == second.to_json() == result.explain(3).to_json()
    assert "8 random transformations" in " ".join(first.notes)


def run_of_several(name, run):
    model = holdfast.open_model(name, members=["mnist-cnn", "mnist-cnn-hardened"])
    holdfast.assess(model, "mnist-mini", "linf:0.1", FGSM(), n=5, doubts=False, run=run)
    return run


@pytest.fixture
def composed(shelf):
    """A run of an ensemble."""
    return shelf.folder("ensemble", lambda folder: run_of_several("ensemble:mean", folder / "run")) / "run"


def test_an_ensemble_is_opened_from_its_run(composed):
    explained = holdfast.explain(composed, index=3)
    assert explained.title.startswith("example 3") and "attributions" in explained.names


@pytest.mark.slow
def test_a_mix_is_opened_from_its_run(tmp_path):
    explained = holdfast.explain(run_of_several("mixed:", tmp_path / "run"), index=3)
    assert explained.title.startswith("example 3") and "attributions" in explained.names


@pytest.mark.parametrize(
    ("change", "code", "reason"),
    [
        (lambda model: model.pop("members"), 3, "ensemble:mean has 0 members"),
        (lambda model: model["members"].pop(), 3, "ensemble:mean has 1 member"),
        (lambda model: model["members"].reverse(), 3, "the model opened now"),
        (lambda model: model.update(name="mixed:"), 3, "the model opened now"),
        (lambda model: model["members"][1].update(name="evil.py:make"), 2, "code would be executed"),
        (lambda model: model["members"][1].update(name="mnist-cnn,arch=evil.py:make"), 2, "code would be"),
        (lambda model: model["members"][1].update(name="http://127.0.0.1:1/m"), 2, "behind a server"),
        (lambda model: model["members"][1].update(name="\ud800"), 2, "no bundled model"),
    ],
)
def test_a_strangers_run_of_several_models_runs_no_code(composed, tmp_path, capsys, change, code, reason):
    folder = shutil.copytree(composed, tmp_path / "run")
    rewritten(folder, "run.json", lambda content: change(content["model"]))
    assert run(["explain", str(folder), "--index", "3"]) == code
    assert reason in capsys.readouterr().err


@pytest.mark.slow
def test_a_hardened_model_is_explained_from_its_run(tmp_path):
    holdfast.harden(
        "mnist-cnn", "mnist-mini", "linf:0.1", recipe={"use": "fgsm-rs", "training": {"epochs": 1}}, n=20,
        run=tmp_path / "a",
    )  # fmt: skip
    explained = holdfast.report(tmp_path / "a").explain(3)
    assert explained.sentence == holdfast.explain(str(tmp_path / "a"), index=3).sentence
    with pytest.raises(TargetError, match="the model opened now"):
        holdfast.Explain(model="mnist-cnn", data="mnist-mini", n=20, from_run=str(tmp_path / "a")).run()


def test_integrated_gradients_of_tables_keep_categories(tmp_path):
    rules = tmp_path / "rules.json"
    columns = {
        "amount": {"type": "number", "min": 0, "max": 10},
        "kind": {"type": "category", "values": ["a", "b", "c"]},
    }
    rules.write_text(json.dumps({"columns": columns, "budget": {"norm": "l1", "eps": 2.0}}))

    class Net(nn.Module):
        def forward(self, x):
            score = x[:, 0] * 0.3 + torch.tensor([5.0, -4.0, 1.0])[x[:, 1].long()]
            return torch.stack((score, -score), 1)

    x = torch.stack((torch.linspace(0, 10, 30), torch.arange(30) % 3), 1)
    explained = holdfast.explain(Net(), x, Net()(x).argmax(1), f"table:{rules}", index=1)
    gap = float(re.search(r"([\d.e-]+) % of the difference is not", explained["attributions"].note)[1])
    assert gap < 0.1


def test_the_command_writes_the_files(stored, tmp_path, capsys):
    folder, _ = stored
    page = tmp_path / "why.html"
    assert run(["explain", str(folder), "--index", "3", "-o", str(page)]) == 0
    assert "example 3 of" in capsys.readouterr().out
    assert page.read_text().startswith("<!doctype html>")
    assert run(["explain", str(folder), "-o", "why.pdf"]) == 2
    assert run(["explain", str(folder), "--index", "500"]) == 2
    error = capsys.readouterr().err
    assert "index is 500" in error and "from 0 to 19; give --index 19" in error
    assert run(["explain", str(tmp_path), "-o", str(page)]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err


def test_another_model_than_that_of_the_run_is_refused(stored):
    folder, _ = stored
    with pytest.raises(TargetError, match="the model opened now"):
        holdfast.Explain(model="mnist-cnn-hardened", data="mnist-mini", n=20, from_run=str(folder)).run()
    with pytest.raises(TargetError, match="the data opened now"):
        holdfast.Explain(model="mnist-cnn", data="mnist-mini", n=19, from_run=str(folder)).run()


def test_a_model_that_runs_code_is_not_opened_from_a_run(tmp_path):
    x, y = torch.rand(30, 4), torch.arange(30) % 3
    result = holdfast.assess(nn.Linear(4, 3), (x, y), "linf:0.1", "quick", doubts=False, run=tmp_path / "run")
    assert result.explain(0).title.startswith("example 0")
    with pytest.raises(UsageError, match="code would be executed.*--from-run on the"):
        holdfast.report(tmp_path / "run").explain(0)


def test_without_gradients_occlusion_is_shown():
    model = holdfast.open_model(lambda x: torch.stack((x.detach().sum(1), 2 - x.detach().sum(1)), 1))
    x = torch.rand(10, 4, generator=torch.Generator().manual_seed(0))
    explained = holdfast.explain(model, x, (x.sum(1) < 1).long(), "linf:0.5,access=scores", index=2)
    assert any("no gradients" in note for note in explained.notes)
    assert explained["attributions"].headings[1].startswith("occlusion")


def test_training_examples_with_the_features_of_an_error_support_it():
    torch.manual_seed(0)
    net = nn.Linear(2, 2)
    train = Batch(
        torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]), torch.tensor([1, 1, 0]), torch.arange(3)
    )
    influence = tracin([Classifier(net)], torch.tensor([[1.0, 0.0]]), torch.tensor([1]), train)
    assert int(influence.argmax()) == 0
    grads = []
    for x, y in (
        (torch.tensor([[1.0, 0.0]]), torch.tensor([1])),
        *((train.x[k : k + 1], train.y[k : k + 1]) for k in range(3)),
    ):
        net.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        grads.append(torch.cat((net.weight.grad.flatten(), net.bias.grad)).clone())
    expected = torch.stack([grads[0] @ grad for grad in grads[1:]])
    assert torch.allclose(influence, expected.double(), atol=1e-6)


def test_values_are_written_as_text_and_not_as_markup():
    figure = Figure(
        "a", "<b>&", "a", ("x",), (("<script>",),), tabular=True, bars=bars(["<i>"], [1.0], ["1"])
    )
    page = Explained("<u>", "<s>", (figure,)).page()
    assert "<script>" not in page
    assert "<u>" not in page


def test_noise_keeps_the_categories_of_a_table(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.kind = nn.Embedding(3, 2)
            self.amount = nn.Linear(1, 2)

        def forward(self, x):
            return self.kind(x[:, 1].long()) + self.amount(x[:, :1] / 50)

    columns = {
        "amount": {"type": "number", "min": 0, "max": 1000},
        "kind": {"type": "category", "values": ["a", "b", "c"]},
    }
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps({"columns": columns, "budget": {"norm": "l1", "eps": 2.0}}))
    torch.manual_seed(0)
    x = torch.stack((torch.linspace(0, 1000, 30), torch.arange(30) % 3), 1)
    net = Net()
    y = net(x).argmax(1)
    shown = [holdfast.explain(net, x, y, f"table:{rules}", index=row) for row in (1, 14)]
    assert all("attributions" in each.names for each in shown)
    assert any("stability" in each.names for each in shown)


def test_the_folder_of_a_run_states_how_its_model_and_data_are_opened(tmp_path):
    x = torch.rand(40, 3, generator=torch.Generator().manual_seed(0))
    lines = [",".join(f"{value:.4f}" for value in row) for row in x.tolist()]
    labelled = [f"{line},{int(row[0] > row[1])}" for line, row in zip(lines, x, strict=True)]
    table = tmp_path / "d.csv"
    table.write_text("\n".join(("a,b,c,sold", *labelled)))
    net = nn.Linear(3, 2)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[-4.0, 4.0, 0.0], [4.0, -4.0, 0.0]]))
        net.bias.zero_()
    torch.save(net.state_dict(), tmp_path / "w.pt")
    (tmp_path / "net.py").write_text("import torch\n\ndef build():\n    return torch.nn.Linear(3, 2)\n")
    how = {"arch": f"{tmp_path}/net.py:build", "label": "sold"}
    folder = tmp_path / "run"
    opened = {"model": str(tmp_path / "w.pt"), "data": str(table), **how}
    holdfast.Assess(threat="linf:0.05", suite="fgsm", doubts=False, n=9, **opened).run(folder)
    with pytest.raises(UsageError, match="weights but no architecture"):  # code of a folder is not run
        holdfast.Explain(model=str(folder), index=2).run()
    from_folder = holdfast.Explain(model=str(folder), index=2, arch=how["arch"]).run()
    given = holdfast.Explain(**opened, threat="linf:0.05", index=2, n=9, from_run=str(folder)).run()
    assert from_folder.figures == given.figures


def test_an_example_that_the_run_broke_breaks_inside_its_threat(tmp_path, monkeypatch):
    """The run stored no inputs, and the search of the explanation finds larger changes only."""
    given = {"model": "mnist-cnn", "data": "mnist-mini", "n": 10}
    run = holdfast.assess(**given, threat="linf:0.3", suite=FGSM(), doubts=False, run=tmp_path / "run")
    assert run.metrics["robust_accuracy"].value < 0.4
    monkeypatch.setattr(
        case, "_smallest", lambda target, batch, *rest: (1 - batch.x, torch.full((len(batch),), 0.9))
    )
    margins = holdfast.Explain(**given, from_run=str(tmp_path / "run")).run()["margins"]
    assert margins.title.startswith("Half of the correctly classified examples break within 0.3;"), (
        margins.title
    )


def test_a_run_about_votes_states_the_command_that_explains_the_model_itself(tmp_path):
    folder = tmp_path / "run"
    holdfast.certify("mnist-cnn", "mnist-mini", "patch:4x4", n=1, masks=2, run=folder)
    said = "votes are not explained; .*: holdfast explain mnist-cnn mnist-mini -t patch:4x4$"
    for opened in (
        {"model": str(folder)},
        {"model": "mnist-cnn", "data": "mnist-mini", "from_run": str(folder)},
    ):
        with pytest.raises(UsageError, match=said):
            holdfast.Explain(**opened).run()
