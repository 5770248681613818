"""Every law on every attack."""

import pytest

import cases
from holdfast.testing import laws


@pytest.mark.parametrize("law", laws.ATTACK_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("case", cases.ATTACKS, ids=repr)
def test_law(case, law):
    law(case)
