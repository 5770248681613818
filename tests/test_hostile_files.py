"""Damaged files of every format: opened or refused, without an internal error and within their limit of memory."""

import sys

import pytest
from hypothesis import HealthCheck, given, settings

from fuzzing.files import FORMATS, good
from fuzzing.mutations import mutations

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are limited and measured on Linux")


FILES = {"pt2": 60, "run": 80, "yaml": 120}
"""how many are damaged of the formats that take long; of others 160"""


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_a_damaged_file_is_opened_or_refused_within_its_limits(form, tmp_path):
    """The exit code is 0, 2 or 3, no code of a file runs, and `make fuzz` tries more of them."""
    try:
        good(form)
    except ImportError as error:
        pytest.skip(f"{error.name} is not installed")
    from fuzzing.opening import Opener

    with Opener(form, tmp_path) as opener:

        @settings(max_examples=FILES.get(form, 160), suppress_health_check=list(HealthCheck))
        @given(mutations(form))
        def each(file):
            outcome = opener(file)
            assert not outcome.fault, outcome.fault

        each()
