"""Calls to the disk that fail."""

import errno
import itertools
import os


def failing(monkeypatch, at, names, code=errno.ENOSPC):
    """Make the `at`-th call to the functions `names` of `os` fail, and return the counter of the calls.

    A write that fails has written half of its content.
    """
    calls, write = itertools.count(1), os.write

    def counted(real):
        def call(*args, **kwargs):
            if next(calls) == at:
                if real is write:
                    write(args[0], args[1][: len(args[1]) // 2])
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        return call

    for name in names:
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    return calls
