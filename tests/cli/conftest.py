"""Fixtures of the command line's tests."""

from places import collections_from_one_place, draws_by_count  # noqa: F401 (fixtures)
