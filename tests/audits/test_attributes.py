"""The audit of attributes: what queries reveal beyond an imputer, and its errors."""

import numpy as np
import pandas as pd
import pytest
import torch

import holdfast
from benchmarks.forging import accepted_fields
from holdfast.cli.app import run as command
from holdfast.core.errors import HoldfastError, UsageError

N = 600


@pytest.fixture(scope="module")
def frame():
    generator = np.random.default_rng(0)
    columns = {name: generator.random(N) for name in "abc"}
    sex = generator.integers(0, 2, N)
    label = (columns["a"] + 0.2 * generator.random(N) > 0.6).astype(int)
    return pd.DataFrame(columns | {"sex": np.where(sex == 1, "male", "female"), "bought": label})


class Remembering(torch.nn.Module):
    """Knows the records by their first column, and is surer of those of men."""

    def __init__(self, frame):
        super().__init__()
        self.register_buffer("records", torch.tensor(frame["a"].to_numpy(), dtype=torch.float32))
        self.register_buffer("male", torch.tensor((frame["sex"] == "male").to_numpy()))

    def forward(self, x):
        record = (x[:, :1] - self.records[None]).abs().argmin(1)
        score = torch.where(self.male[record], 4.0, 1.0) * (x[:, 0] - 0.6).sign()
        return torch.stack((torch.zeros_like(score), score), 1)


def honest(x):
    return torch.stack((torch.zeros(len(x)), 10 * (x[:, 0] - 0.6)), 1)


def audit(model, frame, **settings):
    data = holdfast.open_data(frame, label="bought")
    return holdfast.audit.attributes(model, data, **{"sensitive": "sex", "device": "cpu", **settings})


def test_a_model_that_remembers_the_attribute_of_its_records_is_flagged(frame, tmp_path):
    result = audit(Remembering(frame), frame, run=tmp_path / "run", gates=["attribute_accuracy_gain <= 0.1"])
    gain = result.metrics["attribute_accuracy_gain"]
    assert result.verdict == "flagged" and result.exit_code == 1 and gain.low > 0.3
    assert result.facts["accuracy"]["queries"] > 0.95 > 0.65 > result.facts["accuracy"]["imputer"]
    assert not accepted_fields(tmp_path / "run", 6, tmp_path / "copy")


def test_a_model_without_the_attribute_is_not_flagged(frame):
    result = audit(honest, frame)
    gain = result.metrics["attribute_accuracy_gain"]
    assert result.verdict == "not flagged" and gain.low <= 0 <= gain.high
    assert "attribute_tpr_gain_at_1_percent" not in result.metrics  # it needs 1,000 other records


def test_the_answer_to_a_record_reveals_an_attribute_that_is_an_input(frame):
    numbers = frame.assign(sex=(frame["sex"] == "male").astype(float))
    result = audit(lambda x: honest(x) + 0.01 * x[:, 3:] * torch.tensor([0.0, 1.0]), numbers)
    assert result.facts["attribute_is_input"] and result.facts["accuracy"]["seen"] == 1
    assert result.verdict == "not flagged"  # queries alone do not reveal it


@pytest.mark.parametrize(
    "change, settings, message",
    [
        ({}, {"sensitive": "gender"}, "gender"),
        ({"sex": "male"}, {}, "has the one value 'male'"),
        ({"sex": [f"v{place}" for place in range(N)]}, {}, "at most 20 were expected"),
        ({"sex": ["male"] * (N - 60) + ["female"] * 60}, {}, "at least 50 known and 50 attacked"),
        ({}, {"known": 590}, "only . of the 10 attacked records"),
        ({}, {"known": 600}, "known is 600, and there are 600 records"),
    ],
)
def test_an_attribute_that_cannot_be_compared_is_refused(frame, change, settings, message):
    with pytest.raises(UsageError, match=message):
        audit(honest, frame.assign(**change), **settings)


def test_a_sensitive_column_that_is_the_label_is_refused(frame):
    with pytest.raises(UsageError, match="is the label, which the attacker knows"):
        audit(honest, frame.assign(sex=np.where(frame["bought"] == 1, "yes", "no")))


def test_the_command_needs_a_sensitive_column(frame, tmp_path, capsys):
    frame.to_csv(tmp_path / "table.csv", index=False)
    (tmp_path / "net.py").write_text("import torch\ndef make(): return torch.nn.Linear(3, 2)\n")
    words = [f"{tmp_path}/net.py:make", f"{tmp_path}/table.csv", "--label", "bought", "--device", "cpu"]
    assert command(["audit", "attributes", *words]) == 2
    assert "sensitive is missing" in capsys.readouterr().err
    assert command(["audit", "attributes", *words, "--sensitive", "sex", "--run", str(tmp_path / "run")]) == 0
    assert "with queries to the model, sex is inferred for" in capsys.readouterr().err


def test_an_attacked_column_that_is_no_input_is_left_out_on_request(frame):
    numbers = frame.assign(sex=(frame["sex"] == "male").astype(float))
    with pytest.raises(UsageError, match=r"the model has 3 inputs.*drop=\('sex',\)"):
        audit(torch.nn.Linear(3, 2), numbers)


def test_a_run_with_another_attribute_of_the_same_records_is_not_resumed(frame, tmp_path):
    audit(honest, frame, run=tmp_path / "run")
    other = frame.assign(sex=frame["sex"].to_numpy()[::-1])
    with pytest.raises(HoldfastError, match="attribute_digest"):
        audit(honest, other, run=tmp_path / "run", resume=True)
