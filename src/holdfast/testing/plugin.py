"""The pytest plugin: `assert_robust`, as a fixture and as a function.

    def test_holds(assert_robust):
        assert_robust(model, (x, y), "robust_accuracy >= 0.4", threat="linf:8/255", suite="quick")

Everything is imported when a test asks for it: a test run that does not pays nothing.
"""

from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from holdfast.runs.result import Result


class AssertRobust(Protocol):
    """`assert_robust` as a test receives it."""

    def __call__(self, model: object, data: object, *gates: str, **settings: Any) -> "Result":
        """Assess, and fail the test unless every gate passes."""


def assert_robust(model: object, data: object, *gates: str, **settings: Any) -> "Result":
    """Assess `model` on `data` as `holdfast.assess` does; `AssertionError` unless every gate passes.

    `settings` are those of `holdfast.assess`. An unclear gate fails the test too, and says what would settle it.
    """
    from holdfast.api import assess
    from holdfast.core.errors import UsageError

    if not gates:
        raise UsageError('assert_robust was given no gate; name at least one, as in "robust_accuracy >= 0.4"')
    result = assess(model, data, gates=gates, **settings)  # type: ignore[arg-type]
    unmet = [gate for gate in result.gates if gate.verdict != "pass"]
    if unmet:
        said = "\n".join(f"  {gate.verdict}: {gate.claim.text}: {gate.because}" for gate in unmet)
        raise AssertionError(f"{len(unmet)} of {len(gates)} gates do not pass\n{said}\n\n{result.table}")
    return result


@pytest.fixture(name="assert_robust")
def _assert_robust() -> AssertRobust:
    """`assert_robust(model, data, "robust_accuracy >= 0.4", threat="linf:8/255")`."""
    return assert_robust
