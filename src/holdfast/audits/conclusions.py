"""The functions that compute the findings of audits, by kind."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from holdfast.audits.backdoor import conclusion as backdoor
from holdfast.audits.finding import Finding
from holdfast.audits.generator import audit as generator
from holdfast.audits.generator import hardening
from holdfast.audits.membership import audit as membership
from holdfast.audits.poison import conclusion as poison
from holdfast.audits.privacy import audit as privacy
from holdfast.audits.stored_steps import StoredSteps

Conclude = Callable[[StoredSteps], Finding]
"""Type of a function from the settings and the stored steps of an audit to its finding. It raises `TargetError` if
steps are missing, have another form, or contradict each other."""

CONCLUSIONS: Mapping[str, Conclude] = MappingProxyType(
    {
        "backdoor": backdoor.concluded,
        "poison": poison.concluded,
        "privacy": privacy.concluded,
        "membership": membership.concluded,
        "generator": generator.concluded,
        "hardened-generator": hardening.concluded,
    }
)
"""The function of each kind in `holdfast.core.catalogue.AUDITS`."""
