"""What tests of files share."""

from collections.abc import Callable

import pytest

from holdfast.core.errors import TargetError


@pytest.fixture
def accepted_up_to(
    set_limit: Callable[[str, object], None],
) -> Callable[[str, int, Callable[[], object], str], None]:
    """A function that compares that a file is opened at a limit, and refused if the limit is one lower."""

    def compare(limit: str, most: int, opened: Callable[[], object], message: str) -> None:
        set_limit(f"holdfast.io.{limit}", most)
        opened()
        set_limit(f"holdfast.io.{limit}", most - 1)
        with pytest.raises(TargetError, match=message):
            opened()

    return compare
