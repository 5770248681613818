"""Calls to the disk that fail."""

import errno
import itertools
import os


def failing(monkeypatch, at, names, code=errno.ENOSPC):
    """Make the `at`-th call to the functions `names` of `os` fail, and return the counter of the calls."""
    calls = itertools.count(1)

    def counted(real):
        def call(*args, **kwargs):
            if next(calls) == at:
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        return call

    for name in names:
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    return calls
