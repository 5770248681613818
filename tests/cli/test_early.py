"""What the command line refuses before torch is there: in the words of the floors below."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from holdfast.cli.early import refuse_missing_file
from holdfast.core.errors import TargetError


@pytest.mark.parametrize("address", ["gone.npz", "gone.py:net", "folder/gone", "holdfast.yml"])
def test_a_missing_file_is_refused(address, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TargetError, match=rf"file or folder '{address.partition(':')[0]}' does not exist"):
        refuse_missing_file(address)


def test_the_nearest_file_is_offered(tmp_path: Path) -> None:
    (tmp_path / "digits.npz").touch()
    with pytest.raises(TargetError, match=r"did you mean '.*digits\.npz'"):
        refuse_missing_file(str(tmp_path / "digit.npz"))


@pytest.mark.parametrize("address", [None, "mnist-cnn", "https://host/model.pt", "."])
def test_existing_paths_and_names_that_are_no_files_are_passed_on(address) -> None:
    refuse_missing_file(address)


@pytest.mark.parametrize("set_by_the_user, stands", [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_waiting_threads_sleep_and_the_setting_precedes_torch(set_by_the_user, stands) -> None:
    code = (
        "import atexit, os, sys; from holdfast.cli import main; "
        "atexit.register(lambda: print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)); main(['--version'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if set_by_the_user:
        environment["OMP_WAIT_POLICY"] = set_by_the_user
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == f"{stands} False"


def test_the_help_of_every_command_imports_no_torch() -> None:
    code = (
        "import sys, click; from holdfast.cli.app import verbs; context = click.Context(verbs)\n"
        "for name in verbs.list_commands(context): verbs.get_command(context, name).get_help(context)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
