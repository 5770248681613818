"""What a shell offers for the values of options and arguments."""

import pytest
from click.shell_completion import ShellComplete

from holdfast.cli.app import verbs


@pytest.mark.parametrize(
    "words, begun, offered",
    [
        (["assess"], "mnist-cnn-h", ["mnist-cnn-hardened"]),
        (["assess", "mnist-cnn"], "mnist-m", ["mnist-mini"]),
        (["assess", "mnist-cnn", "mnist-mini", "--suite"], "bl", ["black-box"]),
        (["assess", "mnist-cnn", "mnist-mini", "--suite"], "pgd,squ", ["pgd,Square"]),
        (["assess", "mnist-cnn", "mnist-mini", "--only"], "apgd-c", ["APGD-CE"]),
        (["assess", "mnist-cnn", "mnist-mini", "-t"], "lin", ["linf:"]),
        (["assess", "mnist-cnn", "mnist-mini", "--layout"], "h", ["hwc"]),
        (["harden", "mnist-cnn", "mnist-mini", "--recipe"], "tra", ["trades"]),
        (["rotate", "collect", "--source"], "ba", ["basins"]),
        (["attacks"], "carl", ["CarliniWagner"]),
        (["data", "show"], "gts", ["gtsrb"]),
    ],
)
def test_values_are_completed(words: list[str], begun: str, offered: list[str]) -> None:
    found = ShellComplete(verbs, {}, "holdfast", "_HOLDFAST_COMPLETE").get_completions(words, begun)
    assert [(item.type, item.value) for item in found] == [("plain", value) for value in offered]


def test_files_are_left_to_the_shell() -> None:
    complete = ShellComplete(verbs, {}, "holdfast", "_HOLDFAST_COMPLETE").get_completions
    assert [item.type for item in complete(["assess"], "./net")] == ["file"]
    assert [item.type for item in complete(["assess", "m", "d", "-o"], "")] == ["file"]
