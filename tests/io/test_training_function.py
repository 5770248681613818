"""The opener of training functions."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from holdfast.core.errors import TargetError, UsageError
from holdfast.io.models.factories import open_training, refuse_other_classes

_CODE = """
import torch
def fit(x, y, seed):
    return torch.nn.Linear(x.shape[1], 2)
def wrong(x, y, seed):
    raise ValueError("no examples")
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "net.py"
    file.write_text(_CODE)
    return file


def test_a_function_of_a_file_is_seeded_and_identified_by_its_code(path: Path) -> None:
    training = open_training(f"{path}:fit")
    x, y = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
    state = torch.get_rng_state()
    first, same, other = (training(x, y, seed).state_dict()["weight"] for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert training.name == "net.py:fit"
    digest = training.digest
    path.write_text(_CODE + "# changed\n")
    assert open_training(f"{path}:fit").digest != digest


def test_the_network_is_in_eval_mode() -> None:
    net = open_training(lambda x, y, seed: nn.Dropout())(torch.zeros(1, 1), torch.zeros(1), 0)
    assert not net.training


def test_other_objects_and_addresses_are_refused(path: Path) -> None:
    for train in ("net.py", "fit", 3, nn.Linear(2, 2), nn.Linear):
        with pytest.raises(UsageError, match="expected a function"):
            open_training(train)
    with pytest.raises(UsageError, match="has no function 'fits'"):
        open_training(f"{path}:fits")


def test_an_exception_of_the_function_is_shown_with_its_line(path: Path) -> None:
    with pytest.raises(
        TargetError, match=r"net\.py:wrong raised ValueError in line 6 of net\.py: no examples"
    ):
        open_training(f"{path}:wrong")(torch.zeros(1, 1), torch.zeros(1), 0)


def test_a_result_that_is_no_network_is_refused() -> None:
    def nothing(x: Tensor, y: Tensor, seed: int) -> None:
        return None

    with pytest.raises(TargetError, match="returned None; expected the trained network"):
        open_training(nothing)(torch.zeros(1, 1), torch.zeros(1), 0)


def test_a_network_with_another_number_of_classes_is_refused() -> None:
    with pytest.raises(TargetError, match="gives 3 logits for each input; expected 2"):
        refuse_other_classes("net.py:fit", torch.zeros(1, 3), 2)
