"""Flushing to the disk guards against power cuts, which no test makes; without it the runs of a test are quick."""

import os

import pytest

from places import collections_from_one_place, draws_by_count  # noqa: F401 (fixtures)
from runs.collected_pool import collected, pool  # noqa: F401 (fixtures)


@pytest.fixture(autouse=True)
def unflushed(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)
