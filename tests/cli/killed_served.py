"""A run on a served model that is killed again and again: `killed_served.py PORT KILLS SEED`, in an empty folder.

Each life is forked from a process that has imported everything. Prints JSON: the rows that the server answered in all.
"""

import json
import os
import random
import signal
import sys
import time

import holdfast.cli.running  # noqa: F401
from holdfast.cli.app import run
from servers import Server


def words(server, *more):
    threat = ("--threat", "linf:0.05,queries=60", "--suite", "black-box", "--no-doubts", "-q")
    return ["assess", server, "data.npz", "--allow-host", "127.0.0.1", *threat, *more]


def life(port, more):
    """The process of one attempt, which begins when a byte comes through the pipe."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(reading)
        return pid, writing
    os.close(writing)
    os.read(reading, 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os._exit(run(words(f"http://127.0.0.1:{port}/v2/models/small", "--run", "cut", *more)))


def main(port, kills, seed):
    draw, rows, most = random.Random(seed), 0, 0
    for attempt in range(kills + 1):
        pid, writing = life(port, ("--resume",) if attempt else ())
        # a server has threads, and a process that has threads is not forked
        with Server(port=port, delay=0.002) as server:
            os.write(writing, b".")
            os.close(writing)
            wanted = draw.randrange(1, 12)
            while attempt < kills and len(server.sizes) < wanted and os.waitpid(pid, os.WNOHANG) == (0, 0):
                time.sleep(draw.random() * 0.003)
            if attempt < kills:
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            rows, most = rows + len(server.rows), max(most, *server.sizes)
    print(json.dumps({"rows": rows, "most": most}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
