"""What attacks under the threat of a patch share."""

from holdfast.core.constraints import Constraint
from holdfast.core.errors import UsageError
from holdfast.core.patches import Patch


def expect_patch(constraint: Constraint, attack: object) -> Patch:
    """The constraint, if it is a patch; `UsageError` otherwise."""
    if isinstance(constraint, Patch):
        return constraint
    raise UsageError(
        f"{type(attack).__name__} fills a rectangle of an image; the threat model is {constraint}. "
        f"Choose a threat such as patch:5x5, or leave the attack out with --skip"
    )
