"""Fixtures of rotations: fixed random places in place of those of the operating system, and replaced steps."""

import itertools
import secrets
from types import SimpleNamespace

import pytest

from holdfast.rotation.steps import draw, rotation_request

SECRET = {"place": 7}
"""secret random number from which pools are collected"""


@pytest.fixture
def another_secret():
    """Pools are collected from another secret."""
    SECRET["place"] = 8
    yield
    SECRET["place"] = 7


@pytest.fixture
def replace_step(monkeypatch):
    """A function that replaces a step of a rotation, such as `collect`, `train`, `draw` or `admit`."""

    def replace_step(name, step):
        monkeypatch.setattr(f"holdfast.rotation.steps.rotation_run.{name}", step)

    return replace_step


@pytest.fixture(scope="session", autouse=True)
def collections_from_one_place():
    """Every pool is collected from the same secret, in whatever order tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rotation_request, "secrets", SimpleNamespace(randbits=lambda bits: SECRET["place"]))
        yield


@pytest.fixture(autouse=True)
def draws_by_count(monkeypatch):
    """The drawings of a test are from the places 1, 2, 3 …"""
    count = itertools.count(1)
    known = SimpleNamespace(randbits=lambda bits: next(count), token_hex=secrets.token_hex)
    monkeypatch.setattr(draw, "secrets", known)
