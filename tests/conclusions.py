"""Conclusions of audits that are given, and not computed from steps that would have to be measured."""

from contextlib import contextmanager

import pytest


@contextmanager
def concluding(conclusion):
    """Let each kind of audit end with the finding that `conclusion` returns for its steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("holdfast.audits.audit.conclusion_of", lambda kind: conclusion)
        yield
