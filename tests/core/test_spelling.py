"""What a misspelt name was meant to be."""

import subprocess
import sys

import pytest

from holdfast.core.names import suggestion

NAMES = ("robust_accuracy", "clean_accuracy", "linf", "apgd-t", "PGD", "FAB")


@pytest.mark.parametrize("name", NAMES)
def test_case_and_dashes_do_not_matter(name):
    for written in (name, name.upper(), name.lower(), name.replace("_", "-"), name.replace("-", "_")):
        assert suggestion(written, NAMES) == f"did you mean {name!r}?"


@pytest.mark.parametrize("name", NAMES)
def test_one_letter_too_few_or_too_many_is_a_slip(name):
    for written in (name[1:], name[:-1], name + "x"):
        assert suggestion(written, NAMES) == f"did you mean {name!r}?"


def test_no_name_is_suggested_if_none_is_similar():
    assert suggestion("zebra", NAMES) == suggestion("", NAMES) == suggestion("linf", ()) == ""


def test_the_order_of_the_names_does_not_matter():
    assert suggestion("pgdx", NAMES) == suggestion("pgdx", NAMES[::-1])


def test_it_does_without_torch():
    code = "import sys, holdfast.core.names; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
