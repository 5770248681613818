"""A Redis server on the loopback interface, for tests."""

import shutil
import socket
import subprocess
from contextlib import contextmanager

import pytest

from waiting import until


@contextmanager
def redis_server(folder):
    """Start a Redis server that stores nothing on disk; yields its URL and functions that stop and restart it."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("the program redis-server is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    running = []

    def start():
        running.append(subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL))

        def answers():
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        until(answers)

    def stop():
        while running:
            server = running.pop()
            server.terminate()
            server.wait()

    try:
        start()
        yield f"redis://127.0.0.1:{port}/0", start, stop
    finally:
        stop()
