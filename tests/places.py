"""Fixtures that fix what comes from the operating system in a rotation: where collections and draws are drawn."""

import itertools
import secrets
from types import SimpleNamespace

import pytest

from holdfast.rotation.steps import contents, draw


@pytest.fixture(scope="session", autouse=True)
def collections_from_one_place():
    """Every pool is collected from the same secret, in whatever order tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contents, "secrets", SimpleNamespace(randbits=lambda bits: 7))
        yield


@pytest.fixture(autouse=True)
def draws_by_count(monkeypatch):
    """The drawings of a test are from the places 1, 2, 3 …"""
    count = itertools.count(1)
    known = SimpleNamespace(randbits=lambda bits: next(count), token_hex=secrets.token_hex)
    monkeypatch.setattr(draw, "secrets", known)
