"""Faults for the mutation check: which lines are changed, and where they are found after code has moved."""

import pytest

from benchmarks.faults.__main__ import found_in
from benchmarks.faults.choosing import KINDS, Fault, faults

SOURCE = '''"""A module."""


class Counter:
    """Counts."""

    def add(self, values: list[int], *, most: int = 3, strict: bool = False) -> int:
        """Add values."""
        if len(values) > most:
            raise ValueError(values)
        self.notes.append("added")
        for value in values[1:]:
            self.total = self.total + value
        return max(self.total, 0)
'''


@pytest.fixture
def tree(tmp_path):
    folder = tmp_path / "src" / "holdfast"
    folder.mkdir(parents=True)
    (folder / "counting.py").write_text(SOURCE)
    return tmp_path


def test_there_are_faults_of_each_kind_and_each_changes_one_line_into_valid_code(tree):
    places = faults(tree)
    assert {place.fault.kind for place in places} == set(KINDS)
    changed = {(place.fault.line, place.fault.replacement) for place in places}
    assert ("if len(values) > most:", "if len(values) >= most:") in changed
    assert ("if len(values) > most:", "if False:") in changed
    assert ('self.notes.append("added")', "pass") in changed
    assert ("for value in values[1:]:", "for value in values[2:]:") in changed
    assert ("self.total = self.total + value", "self.total = self.total - value") in changed
    assert ("return max(self.total, 0)", "return max(self.total, 1)") in changed
    lines = SOURCE.splitlines(keepends=True)
    for place in places:
        path, number, replacement = found_in(tree, place.fault, 0)
        assert path.read_text().splitlines()[number].strip() == place.fault.line
        indentation = lines[number][: len(lines[number]) - len(lines[number].lstrip())]
        compile(
            "".join([*lines[:number], f"{indentation}{replacement}\n", *lines[number + 1 :]]), "a.py", "exec"
        )


def test_a_fault_is_found_in_the_file_to_which_its_function_has_moved(tree):
    fault = Fault(
        "missing call", "src/holdfast/counting.py", "Counter.add", 'self.notes.append("added")', "pass", 0
    )
    (tree / "src/holdfast/counting.py").rename(tree / "src/holdfast/sums.py")
    path, number, _ = found_in(tree, fault, 0)
    assert (path.name, SOURCE.splitlines()[number].strip()) == ("sums.py", fault.line)
    path.write_text(SOURCE.replace("def add(", "def other("))
    assert found_in(tree, fault, 0) is None
