"""Copies of a process in place of new ones: what they share with new ones, and that users get new ones."""

import os
import subprocess
import sys

import pytest
import torch

import holdfast
from fork_server import ForkServer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are copied on Linux only")
SHOWN = (
    "import os, sys; print(sys.argv[1:], os.getcwd(), os.environ.get('SHOWN'), file=sys.stderr); sys.exit(3)"
)
IN_SESSION = """
import os, sys
print(os.getsid(0) == os.getpid(), os.read(int(sys.argv[1]), 5), flush=True)
for line in sys.stdin:
    print("received", line, end="", flush=True)
"""


@pytest.fixture
def server():
    server = ForkServer()
    yield server
    server.close()


PIPES = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}


@pytest.mark.slow
def test_a_copy_has_the_arguments_the_folder_the_environment_and_the_exit_code_of_a_new_process(
    server, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    environment = {**os.environ, "SHOWN": "one"}
    for code in (SHOWN, "import sys; sys.exit('a reason')", "import os; os.kill(os.getpid(), 9)", "pass"):
        command = [sys.executable, "-P", "-c", code, "a", "b"]
        options = {"input": b"", "env": environment, "timeout": 60, **PIPES}
        one, other = [run(command, check=False, **options) for run in (subprocess.run, server.run)]
        assert (one.returncode, one.stderr) == (other.returncode, other.stderr)


@pytest.mark.slow
def test_a_copy_has_its_pipes_its_open_files_and_its_session_and_can_be_killed(server):
    reading, writing = os.pipe()
    os.write(writing, b"hello")
    command = [sys.executable, "-P", "-c", IN_SESSION, str(reading)]
    process = server.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, pass_fds=(reading,)
    )
    with process.stdin, process.stdout:
        assert process.stdout.readline() == b"True b'hello'\n"
        process.stdin.write(b"a line\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"received a line\n"
        assert process.poll() is None
        process.kill()
        assert process.wait(60) == process.poll() == -9
    for end in (reading, writing):
        os.close(end)


@pytest.mark.slow
def test_a_copy_that_takes_too_long_is_killed(server):
    command = [sys.executable, "-P", "-c", "import time; time.sleep(600)"]
    with pytest.raises(subprocess.TimeoutExpired):
        server.run(command, input=b"", env={}, timeout=0.2, check=False, **PIPES)


@pytest.mark.slow
def test_users_get_a_new_process_for_a_file(tmp_path, monkeypatch, new_processes):
    commands = []
    started = subprocess.Popen.__init__

    def recorded(self, command, *rest, **options):
        commands.append(command)
        started(self, command, *rest, **options)

    monkeypatch.setattr(subprocess.Popen, "__init__", recorded)
    torch.save({"weight": torch.eye(2), "bias": torch.zeros(2)}, tmp_path / "net.pt")
    (tmp_path / "net.py").write_text("from torch import nn\ndef make():\n    return nn.Linear(2, 2)\n")
    address = str(tmp_path / "net.pt")
    model = holdfast.open_model(address, arch=f"{tmp_path / 'net.py'}:make", trust_code=True)
    holdfast.assess(model, (torch.rand(4, 2), torch.zeros(4).long()), "linf:0.1", "fgsm", doubts=False)
    assert any(command[:3] == [sys.executable, "-P", "-c"] for command in commands)
