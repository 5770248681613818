"""Shards on a Ray cluster leave the bytes of a run on one machine, whatever workers and nodes do."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

ray = pytest.importorskip("ray", reason='Ray is not installed: pip install "holdfast-ml[scale]"')

import torch  # noqa: E402 - after the skip

import holdfast  # noqa: E402
from benchmarks.rows.cluster import Fatal, repeated  # noqa: E402
from holdfast.core.errors import TargetError, UsageError  # noqa: E402
from holdfast.io.models.factories import build_from_file  # noqa: E402
from holdfast.recipes import PGDTraining  # noqa: E402
from holdfast.recipes.training.fit import Training  # noqa: E402
from holdfast.runs.assess.assess import assess  # noqa: E402
from holdfast.runs.documents.stored_runs import open_run  # noqa: E402
from holdfast.runs.engine import ray_cluster  # noqa: E402
from holdfast.runs.engine.ray_cluster import (  # noqa: E402
    Cluster,
    RayOptions,
    imported_ray,
    local_cluster,
)
from holdfast.runs.store.verify import verify  # noqa: E402
from runs.fakes import data, network, settled, subject  # noqa: E402
from runs.test_workers import Broken, Deadly, Greedy, asked  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
LOCAL = RayOptions(timeout_s=180.0)
pytestmark = [
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning"
    ),
    pytest.mark.long,
]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """One cluster for all tests, on this machine, without a token.

    Ray decides once in a process whether it has one, so that no test of another file may start a cluster in this
    process.
    """
    from ray.cluster_utils import Cluster as Nodes

    imported_ray()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / name) for name in ("src", "tests", "")]))
        nodes = Nodes()
        # how soon a dead node is noticed
        health = {f"health_check_{name}": 1000 for name in ("initial_delay_ms", "period_ms", "timeout_ms")}
        head = {"include_dashboard": False, "_system_config": health}
        try:
            nodes.add_node(num_cpus=2, object_store_memory=80_000_000, **head)
            ray.init(nodes.address, log_to_driver=False, logging_level="ERROR")
            nodes.wait_for_nodes()
            yield nodes
        finally:
            ray.shutdown()
            nodes.shutdown()


def on_ray(**changes):
    """The order of the tests of workers, on the cluster."""
    options = changes.pop("options", LOCAL)
    return replace(asked(**{"doubts": "all", "workers": 2, **changes}), ray=options)


@pytest.fixture(scope="session")
def one(tmp_path_factory):
    """A run with one worker process of this machine."""
    run = tmp_path_factory.mktemp("one") / "run"
    assess(subject(), data(), asked(doubts="all", workers=1), run=run)
    return run


@pytest.mark.slow
def test_a_cluster_leaves_the_bytes_of_one_machine(cluster, one, tmp_path):
    lines = []
    assess(subject(), data(), on_ray(), run=tmp_path / "run", detail=lines.append)
    assert settled(tmp_path / "run") == settled(one)
    assert verify(tmp_path / "run").complete
    assert any("1-pgd: 2 shards done, 0 running, 0 failed" in line for line in lines), lines


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced(cluster, one, tmp_path):
    run = tmp_path / "run"
    assess(subject(Deadly(tmp_path / "killed")), data(), on_ray(), run=run)
    assert list(tmp_path.glob("killed-*"))
    assert settled(run) == settled(one)


@pytest.mark.slow
def test_what_the_model_raises_is_reported_with_the_shard_and_not_tried_again(cluster, tmp_path):
    broken = subject(Broken(tmp_path / "raised", times=99))
    with pytest.raises(
        TargetError,
        match=r"shard \d of 1-pgd \(examples \d+ to \d+\), on node .*: the model raised ValueError .*no such thing",
    ):
        assess(broken, data(), on_ray(), run=tmp_path / "run")
    assert len(list(tmp_path.glob("raised-*"))) <= 2  # once in each worker


@pytest.mark.slow
def test_a_split_in_a_worker_is_recorded(cluster, tmp_path):
    run = tmp_path / "run"
    assess(subject(Greedy(tmp_path / "spent")), data(), on_ray(workers=1), run=run)
    (split,) = json.loads((run / "splits.json").read_text())
    assert split["stage"] == "1-pgd"
    assert 0 < split["size"] < 15


class Unfetched(torch.nn.Module):
    """A model that a worker cannot fetch at first."""

    def __init__(self, net, flag):
        super().__init__()
        self.net, self.flag, self.here = net, flag, os.getpid()

    def forward(self, x):
        return self.net(x)

    def __setstate__(self, state):
        super().__setstate__(state)
        if os.getpid() != self.here and not self.flag.exists():
            self.flag.touch()
            raise ray.exceptions.OwnerDiedError("ab" * 28, b"", "")


@pytest.mark.slow
def test_a_setup_that_a_worker_cannot_fetch_is_stored_again(cluster, tmp_path):
    run, one = tmp_path / "run", replace(on_ray(), ray=None, workers=None)
    net = Unfetched(network(), tmp_path / "tried")
    assess(subject(net), data(), on_ray(), run=run)
    assess(subject(net), data(), one, run=tmp_path / "alone")
    assert settled(run) == settled(tmp_path / "alone")
    assert repeated(run) >= 1  # once in each worker that tried before the flag was there


def raising():
    """Raise an exception."""
    raise ValueError("no")


@pytest.mark.slow
def test_a_task_that_raises_is_reported(cluster):
    here = Cluster(ray, local=False)
    reference = here.submit(raising, [], num_cpus=1)
    assert here.finished([reference], 60.0) == [reference]
    assert here.result(reference) == "error"


@pytest.fixture
def third(cluster):
    """A third CPU on a node of its own, which is gone afterwards, also from the resources that the cluster reports."""
    before = ray.cluster_resources()["CPU"]
    node = cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
    cluster.wait_for_nodes()
    yield node
    cluster.remove_node(node, allow_graceful=False)
    until = time.monotonic() + 60
    while ray.cluster_resources()["CPU"] > before and time.monotonic() < until:
        time.sleep(0.1)


@pytest.mark.slow
def test_a_node_that_is_killed_leaves_the_same_bytes(cluster, third, tmp_path):
    net = Fatal(network(), third.all_processes["raylet"][0].process.pid, tmp_path)
    run, sizes = tmp_path / "run", {"shard_size": 10}

    def arm(line):
        if line.startswith("clean: 4 shards done"):
            (tmp_path / "armed").touch()

    assess(subject(net), data(), on_ray(workers=3, **sizes), run=run, detail=arm)
    assert (tmp_path / "killed").read_text() == "1"  # the shard that it was measuring
    assess(subject(net), data(), replace(on_ray(**sizes), ray=None, workers=None), run=tmp_path / "alone")
    assert settled(run) == settled(tmp_path / "alone")
    assert repeated(run) >= 1


NET = """
import torch
from layers import Scaled

def make():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), Scaled(), torch.nn.Linear(12, 4)).double().eval()
"""
LAYERS = """
import torch

class Scaled(torch.nn.Module):
    def forward(self, x):
        return 2 * x
"""


@pytest.mark.slow
def test_code_of_the_user_is_sent_and_more_with_ship(cluster, tmp_path):
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "layers.py").write_text(LAYERS)
    opened = subject(build_from_file(f"{tmp_path / 'net.py'}:make", {}).net)
    (tmp_path / "net.py").write_text("raise ImportError('not the bytes that were loaded')")
    with pytest.raises(UsageError, match="cannot import layers, .*ship="):
        assess(opened, data(), on_ray())
    said = []
    shipping = replace(LOCAL, ship=(tmp_path / "layers.py",))
    assess(opened, data(), on_ray(options=shipping), run=tmp_path / "run", notify=said.append)
    assert said[0] == "sent to the nodes with --ship: layers.py"
    assess(opened, data(), asked(doubts="all"), run=tmp_path / "here")
    here, there = open_run(tmp_path / "here").evidence, open_run(tmp_path / "run").evidence
    for name, values in here.columns.items():
        assert torch.equal(values, there[name]), name


@pytest.mark.slow
def test_too_few_cpus_are_waited_for_and_then_refused(cluster):
    said = []
    with pytest.raises(
        TargetError, match=r"has 2 of 5 CPUs that 5 workers need, after 1 s; use fewer workers"
    ):
        assess(subject(), data(), on_ray(workers=5, options=RayOptions(timeout_s=1.0)), notify=said.append)
    assert said == ["the Ray cluster has 2 of 5 CPUs that 5 workers need; waiting for more, at most 1 s"]


@pytest.mark.slow
def test_harden_measures_on_the_cluster_and_trains_here(cluster):
    g = torch.Generator().manual_seed(0)
    x = torch.rand(632, 1, 6, 6, generator=g)
    y = (x[:, 0, :3].sum((1, 2)) > x[:, 0, 3:].sum((1, 2))).long()
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 2))
    recipe = PGDTraining(steps=1, training=Training(epochs=1, batch=100))
    how = {"suite": "quick", "doubts": False, "batch_size": 16, "fit": (x[32:], y[32:])}
    hardened = holdfast.harden(net, (x[:32], y[:32]), "linf:0.05", recipe, on="ray", workers=2, **how)
    alone = holdfast.harden(net, (x[:32], y[:32]), "linf:0.05", recipe, **how)
    for one, other in ((hardened.before, alone.before), (hardened.after, alone.after)):
        assert torch.equal(one.evidence["success"], other.evidence["success"])


WORDS = ["assess", "mnist-cnn", "mnist-mini", "-n", "60", "-t", "linf:0.2", "-s", "pgd", "--no-doubts"]
WORDS += ["--batch-size", "10", "--workers", "1"]


def started(words, folder, home, **settings):
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PYTHONPATH": str(ROOT / "src"),
        "HOME": str(home),
    }
    command = [sys.executable, "-P", "-m", "holdfast", *words]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True, **settings
    )


@pytest.mark.slow
def test_the_command_starts_a_cluster_stops_it_at_a_signal_and_resumes_without_it(tmp_path):
    """The current folder has modules that must not be imported, and the home folder must stay empty."""
    here, home, run = tmp_path / "here", tmp_path / "home", tmp_path / "run"
    here.mkdir()
    home.mkdir()
    for name in ("torch.py", "random.py", "pickle.py", "holdfast.py", "sitecustomize.py"):
        (here / name).write_text("from pathlib import Path\nPath('RAN').touch()\nraise ImportError\n")
    words = [*WORDS, "--run", str(run)]
    first = started([*words, "--on", "ray", "-v"], here, home)
    for line in first.stderr:
        if "shards done" in line:
            first.send_signal(signal.SIGINT)
            break
    rest = first.stderr.read()
    assert first.wait() == 130, rest
    assert "stopped by SIGINT" in rest
    assert "--resume" in rest
    assert not list(home.iterdir())
    assert not (here / "RAN").exists()
    rest = f"""
import holdfast
how = dict(n=60, threat="linf:0.2", suite="pgd", doubts=False, batch_size=10, workers=1)
holdfast.assess("mnist-cnn", "mnist-mini", run={str(run)!r}, resume=True, **how)
holdfast.assess("mnist-cnn", "mnist-mini", run={str(tmp_path / "whole")!r}, **how)
"""
    subprocess.run([sys.executable, "-P", "-c", rest], check=True)
    assert settled(run) == settled(tmp_path / "whole")


# --- without a cluster


def test_ray_that_is_missing_is_named_with_the_extra(not_installed):
    with pytest.raises(UsageError, match=r'needs Ray.*pip install "holdfast-ml\[scale\]"'):
        imported_ray()


@pytest.mark.parametrize(
    "address", ["ray://", "ray://head", "ray://head:port", "ray://head:1/path", "http://head:1"]
)
def test_an_address_without_host_and_port_is_refused(address):
    with pytest.raises(UsageError, match="expected local, ray, or ray://HOST:PORT"):
        ray_cluster.refuse_address(RayOptions(address))


def test_a_network_that_is_neither_encrypted_nor_trusted_is_refused(monkeypatch):
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    for address in ("ray://head:10001", "ray://10.0.0.5:10001", "ray://[2001:db8::1]:10001"):
        with pytest.raises(UsageError, match="not encrypted: .*RAY_USE_TLS=1.*trust_network=True"):
            ray_cluster.refuse_address(RayOptions(address))
        ray_cluster.refuse_address(RayOptions(address, trust_network=True))
    for address in ("ray://127.0.0.1:10001", "ray://localhost:10001", "ray://[::1]:10001"):
        ray_cluster.refuse_address(RayOptions(address))
    monkeypatch.setenv("RAY_USE_TLS", "1")
    ray_cluster.refuse_address(RayOptions("ray://head:10001"))


def test_an_address_that_does_not_answer_ends_the_run(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    begun = time.monotonic()
    with pytest.raises(TargetError, match=r"ray://127.0.0.1:9 does not answer as a Ray cluster") as caught:
        assess(subject(), data(), on_ray(options=RayOptions("ray://127.0.0.1:9")))
    assert caught.value.exit_code == 3
    assert time.monotonic() - begun < 60


@pytest.mark.parametrize(("name", "is_long"), [("x" * 60, True), ("x", False)])
def test_temporary_files_in_a_path_too_long_for_sockets_are_reported_with_the_remedy(
    name, is_long, monkeypatch
):
    def refuse(**settings):
        raise OSError("AF_UNIX path length cannot exceed 107 bytes")

    failing = SimpleNamespace(init=refuse, shutdown=lambda: None)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    with tempfile.TemporaryDirectory(prefix=name, dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        with pytest.raises(TargetError, match="AF_UNIX") as caught, local_cluster(failing, 1, 0):
            pass
        assert ("set TMPDIR to a shorter one" in str(caught.value)) is is_long
        assert not list(Path(folder).iterdir())
