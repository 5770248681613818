"""The executor of a cluster, with a fake cluster whose tasks run in this process when they are waited for."""

import json
import pickle
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pytest

from holdfast.core.errors import TargetError, UsageError
from holdfast.runs.assess.assess import assess
from holdfast.runs.documents.stored_runs import open_run
from holdfast.runs.engine import ray_node, ray_worker
from holdfast.runs.engine.ray_cluster import RayOptions
from holdfast.runs.store.folder import open_run_folder
from holdfast.runs.store.verify import verify
from runs.fakes import data, settled, subject
from runs.test_workers import asked


class Reference:
    """A reference to an object of the fake cluster."""

    def __init__(self, content=None):
        self.content = content

    def hex(self):
        return str(id(self))


@dataclass
class Fake:
    """A cluster with one node. Each answer in `faults` takes the place of the result of a measured shard."""

    faults: list = field(default_factory=list)
    cpus: float = 2.0
    ray = type("module", (), {"cloudpickle": pickle})
    local = True
    dashboard = ""
    most = 0
    open: int = 0
    cancelled: list = field(default_factory=list)
    change: dict = field(default_factory=dict)
    """properties that the node reports in place of its own"""
    silent: list = field(default_factory=list)
    """failures of the task that reports the versions"""

    def submit(self, function, arguments, **options):
        self.open += 1
        self.most = max(self.most, self.open)
        return Reference((function, arguments))

    def put(self, content):
        return Reference(content)

    def finished(self, references, timeout_s):
        return references[:1]

    def result(self, reference):
        self.open -= 1
        function, arguments = reference.content
        if function is ray_node.measured and self.faults and (fault := self.faults.pop(0)):
            return fault
        if function is ray_node.report_as_bytes and self.silent:
            return self.silent.pop(0)
        return function(*arguments)

    def cancel(self, references):
        self.cancelled.extend(references)

    def nodes(self):
        return [{"NodeID": "0" * 56, "NodeManagerHostname": "quiet"}]

    def total(self, resource):
        return self.cpus


@pytest.fixture
def fake(monkeypatch):
    """A fake cluster in place of the connection."""
    made, report = Fake(), ray_node.report

    @contextmanager
    def connected(options, workers, *, detail):
        yield made

    def reported(paths, device, threads=None):
        return {**report((), device, threads), **(made.change if threads else {})}

    replacements = {
        "holdfast.runs.engine.ray_tasks.connected": connected,
        "holdfast.runs.engine.ray_tasks.on_node": lambda node: None,
        "holdfast.runs.engine.ray_node.fetched": lambda reference: reference.content,
        "holdfast.runs.engine.ray_node.report": reported,
        "time.sleep": lambda seconds: None,
    }
    for name, replacement in replacements.items():
        monkeypatch.setattr(name, replacement)
    yield made
    ray_worker.CURRENT.close()


def on_fake(**changes):
    options = RayOptions(timeout_s=changes.pop("timeout_s", 5.0), mixed_nodes=changes.pop("mixed", False))
    return replace(asked(workers=2, **changes), ray=options)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    run = tmp_path_factory.mktemp("one") / "run"
    assess(subject(), data(), asked(workers=1), run=run)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("faults", [[], ["lost"], [None, "lost", "lost", None, "lost"]])
def test_lost_shards_are_measured_again_with_the_same_bytes(fake, one, faults, tmp_path):
    fake.faults[:] = faults
    lines = []
    assess(subject(), data(), on_fake(), run=tmp_path / "run", detail=lines.append)
    assert settled(tmp_path / "run") == settled(one)
    assert fake.most == 2  # at most one shard for each worker is in flight
    assert lines[-1].endswith(f"0 running, {len([fault for fault in faults if fault])} failed and repeated")


@pytest.mark.slow
def test_a_worker_that_is_killed_for_memory_gets_half_the_batch(fake, tmp_path):
    fake.faults[:] = [None, None, "memory", "memory"]  # after the clean pass: shard 0, then 1
    assess(subject(), data(), on_fake(), run=tmp_path / "run")
    splits = json.loads((tmp_path / "run" / "splits.json").read_text())
    assert [(split["stage"], split["at"], split["size"]) for split in splits] == [("1-pgd", 0, 10)] * 2
    assert {split["shard"] for split in splits} == {0, 1}
    assert any("memory ran out" in note for note in open_run(tmp_path / "run").evidence.notes)


def test_memory_that_is_too_small_for_one_example_ends_the_run(fake):
    fake.faults[:] = ["memory"] * 99
    with pytest.raises(TargetError, match="with one example at a time; give the nodes more memory"):
        assess(subject(), data(), on_fake())


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("lost", r"a worker was lost 3 times on shard \d of clean \(examples \d+ to \d+\)"),
        ("full", "the object store of Ray is full"),
        ("error", "with an error; look for it in the logs of Ray"),
        ("cancelled", "cancelled"),
        (b"C", "something else than a result of Holdfast"),
        (b"C" + bytes(40), "something else than a result of Holdfast"),
        (b"C\x02\0\0\0{}" + bytes(8), "something else than a result of Holdfast"),
    ],
)
def test_a_shard_that_cannot_be_measured_ends_the_run_and_cancels_the_others(fake, fault, said):
    fake.faults[:] = [fault] * 99
    with pytest.raises(TargetError, match=said):
        assess(subject(), data(), on_fake())
    assert fake.cancelled


@pytest.mark.parametrize("name", ["python", "torch", "holdfast"])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_node_with_other_versions_is_refused_before_the_first_task(fake, name, mixed):
    fake.change[name] = "0.1"
    with pytest.raises(TargetError, match=rf"node .* differs \({name} 0.1, not .*install the same versions"):
        assess(subject(), data(), on_fake(mixed=mixed))
    assert fake.most == 1


@pytest.mark.parametrize("name", ["torch build", "threads", "device", "code"])
def test_a_node_that_differs_is_refused_or_recorded(fake, name, tmp_path):
    fake.change[name] = "another"
    with pytest.raises(TargetError, match=rf"node .* differs \({name} another, not .*mixed_nodes=True"):
        assess(subject(), data(), on_fake())
    result = assess(subject(), data(), on_fake(mixed=True), run=tmp_path / "run")
    (note,) = [note for note in result.evidence.notes if "--mixed-nodes" in note]
    assert f"{name} another" in note
    assert verify(tmp_path / "run").complete
    assert note in open_run(tmp_path / "run").evidence.notes


def test_a_node_that_joins_with_other_versions_is_refused_by_its_first_task(fake):
    fake.faults[:] = [
        None,
        b"N" + json.dumps({"node": "late", "python": "3.1", "torch": "1", "holdfast": "0"}).encode(),
    ]
    with pytest.raises(TargetError, match=r"node late differs \(python 3.1, not"):
        assess(subject(), data(), on_fake())


def test_a_node_that_is_alive_must_report_its_versions(fake, set_limit):
    fake.silent[:] = ["lost"]  # for a moment, as while a worker is started
    assess(subject(), data(), on_fake())
    assert not fake.silent
    set_limit("holdfast.runs.engine.ray_tasks._NOTICED_S", 0.0)
    fake.silent[:] = ["lost"] * 9
    with pytest.raises(
        TargetError, match=r"node quiet \(0+\) does not report its versions \(its task is lost\)"
    ):
        assess(subject(), data(), on_fake())
    assert fake.silent  # it was refused before the first shard


def test_a_node_that_cannot_fetch_objects_gets_its_task_again_for_a_while(fake, set_limit):
    set_limit("holdfast.runs.engine.ray_tasks._NOTICED_S", 0.0)
    fake.silent[:] = ["unfetched"] * 9
    fake.faults[:] = ["unfetched"] * 9  # a node that joins later
    assess(subject(), data(), on_fake())
    assert not fake.silent and not fake.faults
    set_limit("holdfast.runs.engine.ray_tasks._FETCHED_S", 0.0)
    fake.silent[:] = ["unfetched"] * 9
    with pytest.raises(
        TargetError, match=r"node quiet \(0+\) could not fetch an object of this process in 0 s; look"
    ):
        assess(subject(), data(), on_fake())
    fake.silent.clear()
    fake.faults[:] = ["unfetched"] * 9
    with pytest.raises(TargetError, match=r"could not fetch the model for shard \d of clean .* in 0 s; look"):
        assess(subject(), data(), on_fake())


@pytest.mark.slow
def test_a_node_that_died_before_its_report_is_skipped(fake, one, tmp_path):
    fake.silent[:] = ["lost"]
    asked_for = iter([fake.nodes(), []])
    fake.nodes = lambda: next(asked_for)
    assess(subject(), data(), on_fake(), run=tmp_path / "run")
    assert settled(tmp_path / "run") == settled(one)


def test_time_that_ran_out_is_reported(fake):
    result = assess(subject(), data(), on_fake(time_budget_s=1e-9))
    assert any("time ran out: PGD and PGD-again finished none" in note for note in result.evidence.notes)


def test_a_folder_that_another_run_uses_is_refused_before_the_cluster_is(fake, tmp_path):
    assess(subject(), data(), on_fake(), run=tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    fake.most = 0
    used = pytest.raises(UsageError, match="is in use by process")
    with open_run_folder(tmp_path / "run", manifest, {}, resume=True), used:
        assess(subject(), data(), on_fake(), run=tmp_path / "run", resume=True)
    assert fake.most == 0


def test_too_few_cpus_are_waited_for(fake):
    said = []
    fake.cpus = 1.0
    with pytest.raises(TargetError, match=r"has 1 of 2 CPUs that 2 workers need, after 0.1 s; use fewer"):
        assess(subject(), data(), on_fake(timeout_s=0.1), notify=said.append)
    assert said == ["the Ray cluster has 1 of 2 CPUs that 2 workers need; waiting for more, at most 1 s"]


def test_a_cluster_that_loses_all_its_cpus_is_noticed(fake, set_limit):
    set_limit("holdfast.runs.engine.ray_tasks._LOOKED_S", 0.0)
    whole = fake.finished

    def finished(references, timeout_s):
        if references[0].content[0] is not ray_node.measured:
            return whole(references, timeout_s)
        fake.cpus = 0.0
        return []

    fake.finished = finished
    with pytest.raises(TargetError, match="has 0 of 1 CPUs"):
        assess(subject(), data(), on_fake(timeout_s=0.1))
    assert len(fake.cancelled) == 2
