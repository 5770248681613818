"""Fixtures of rotations."""

from places import (  # noqa: F401 (fixtures)
    another_secret,
    collections_from_one_place,
    draws_by_count,
    replace_step,
)
from runs.collected_pool import collected, pool  # noqa: F401 (fixtures)
