"""Column files: the same columns are the same bytes, and anything else is noticed."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast.core.chain import digest
from holdfast.core.errors import TargetError
from holdfast.runs.store import columns

EXAMPLE = {
    "flag": torch.tensor([True, False, True]),
    "count": torch.tensor([1, -2, 2**40]),
    "far": torch.tensor([torch.inf, torch.nan, -0.0]),
    "wide": torch.rand(3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
    "digest": torch.arange(96, dtype=torch.uint8).view(3, 32),
    "none": torch.empty(0, 1, 4),
}


def same(one, other):
    assert one.keys() == other.keys()
    for name, values in one.items():
        assert values.dtype == other[name].dtype and values.shape == other[name].shape
        assert values.numpy().tobytes() == other[name].numpy().tobytes()


def test_written_files_are_read_back(tmp_path):
    written = columns.write(tmp_path / "a.safetensors", EXAMPLE, {"stage": "clean"})
    found = columns.read(tmp_path / "a.safetensors")
    same(found.columns, EXAMPLE)
    assert found.about == {"stage": "clean"}
    assert found.digest == written == digest((tmp_path / "a.safetensors").read_bytes())
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@given(order=st.permutations(sorted(EXAMPLE)), turned=st.booleans())
def test_order_and_layout_leave_the_bytes_alone(order, turned):
    shuffled = {name: EXAMPLE[name] for name in order}
    if turned:
        shuffled["wide"] = shuffled["wide"].transpose(1, 2).contiguous().transpose(1, 2)
    assert columns.encode(shuffled, {"a": 1, "b": 2}) == columns.encode(EXAMPLE, {"b": 2, "a": 1})


def test_columns_that_share_memory_are_written_apart():
    values = torch.arange(4.0)
    same(
        columns.decode(columns.encode({"a": values, "b": values}, {}), "x").columns,
        {"a": values, "b": values},
    )


def test_the_metadata_is_one_key_of_sorted_json():
    data = columns.encode(EXAMPLE, {"stage": "clean", "rows": 3})
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    (said,) = header["__metadata__"].values()
    assert said == json.dumps(json.loads(said), sort_keys=True, separators=(",", ":"))


@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_changed_value_is_noticed(place, bit):
    data = bytearray(columns.encode(EXAMPLE, {}))
    payload = 8 + int.from_bytes(data[:8], "little")
    data[payload + place % (len(data) - payload)] ^= 1 << bit
    with pytest.raises(TargetError, match="'x' was changed after it was written"):
        columns.decode(bytes(data), "x")


@given(cut=st.integers(0, 10**6))
def test_a_file_that_is_cut_short_is_noticed(cut):
    data = columns.encode(EXAMPLE, {})
    with pytest.raises(TargetError, match="'x' is not a column file, or is truncated"):
        columns.decode(data[: cut % len(data)], "x")


def test_a_file_of_another_version_or_kind_is_refused(monkeypatch, set_limit):
    with pytest.raises(TargetError, match="not a column file"):
        columns.decode(b"PK\x03\x04 a zip, for once", "x")
    set_limit("holdfast.runs.store.columns._VERSION", 2)
    newer = columns.encode(EXAMPLE, {})
    monkeypatch.undo()
    with pytest.raises(TargetError, match="schema version 2; this version reads 1"):
        columns.decode(newer, "x")
