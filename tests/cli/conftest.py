"""Fixtures of the command line's tests."""

from places import (  # noqa: F401 (fixtures)
    another_secret,
    collections_from_one_place,
    draws_by_count,
    replace_step,
)
