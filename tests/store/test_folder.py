"""Run folders, their leases and their verification."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import nullcontext

import pytest
import torch

from disk import failing
from holdfast.core.chain import Link, canonical
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.evidence import Seconds
from holdfast.runs.store.folder import differences, open_run_folder, parsed
from holdfast.runs.store.leases import FOREIGN_LEASE_S, Owner, ShardTimes, leased, spent_in, start_time
from holdfast.runs.store.verify import verify

MANIFEST = {
    "digests": {"config": "c", "data": "d", "model": "m", "code": "k"},
    "config": {"seed": 0, "stages": [{"name": "clean"}, {"name": "1-pgd"}], "eps": 0.3},
}
SHARDS = [{"id": torch.arange(3), "success": torch.tensor([True, False, True])}, {"id": torch.arange(3, 5)}]


def finished(run):
    with open_run_folder(run, MANIFEST, {"created": "now"}, resume=False) as folder:
        for stage in ("clean", "1-pgd"):
            folder.keep_shard(stage, 0, SHARDS[0])
            folder.complete(stage, SHARDS[0])
        folder.add_split("2-fab", 1, 20, 8)
        folder.record("doubts", {"doubts": []})
        folder.record("verdict", {"exit_code": 0})
        folder.keep_shard("2-fab", 1, SHARDS[0])
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("store") / "run")


def test_a_finished_folder_verifies(whole):
    found = verify(whole)
    assert found.complete
    assert found.files == found.records == 5
    assert len(found.head) == 64


def test_equal_runs_have_equal_heads(whole, tmp_path):
    assert verify(finished(tmp_path / "other")).head == verify(whole).head


def test_a_run_that_is_refused_before_a_measurement_leaves_no_folder(tmp_path):
    def refused(run, *, after):
        with open_run_folder(run, MANIFEST, {"created": "now"}, resume=run.exists()) as folder:
            if after:
                folder.keep_shard("clean", 0, SHARDS[0])
            raise UsageError("the time is too short")

    for after in (False, True):
        with pytest.raises(UsageError):
            refused(tmp_path / "run", after=after)
        assert (tmp_path / "run").exists() == after
    with pytest.raises(UsageError):  # of a resumed run, everything is kept
        refused(tmp_path / "run", after=False)
    assert (tmp_path / "run" / "clean" / "00000.safetensors").exists()


PROTECTED = [
    "run.json",
    "clean.safetensors",
    "1-pgd.safetensors",
    "doubts.json",
    "verdict.json",
    "chain.jsonl",
]


@pytest.mark.parametrize("name", [*PROTECTED, "2-fab/00001.safetensors"])
@pytest.mark.parametrize("how", ["flipped", "cut", "emptied", "removed"])
def test_tampering_with_any_file_is_found(whole, tmp_path, name, how):
    run = shutil.copytree(whole, tmp_path / "run")
    path = run / name
    data = bytearray(path.read_bytes())
    if how == "removed":
        path.unlink()
        if name.startswith("2-fab"):
            return  # a shard that is not there is measured again
    else:
        data[-5] ^= 1
        path.write_bytes({"flipped": data, "cut": data[:-7], "emptied": b""}[how])
    with pytest.raises(TargetError, match=name.removesuffix(".jsonl")):
        verify(run)


@pytest.mark.parametrize("line", range(5))
def test_every_record_of_the_chain_is_protected(whole, tmp_path, line):
    run = shutil.copytree(whole, tmp_path / "run")
    records = [json.loads(text) for text in (run / "chain.jsonl").read_text().splitlines()]
    records[line]["content"]["kind"] += "!"
    (run / "chain.jsonl").write_text("".join(canonical(record).decode() + "\n" for record in records))
    with pytest.raises(TargetError, match=f"record {line + 1} of .*chain.jsonl' was changed"):
        verify(run)


@pytest.mark.parametrize(
    "old, new",
    [
        (b'"content":', b'"content":{},"content":'),
        (b'"kind":', b'"kind":"x","kind":'),
        (b":", b": "),
        (b"\n", b"\r\n"),
        (b'"previous":', b'"more":1,"previous":'),
    ],
)
def test_only_the_canonical_text_of_a_record_is_valid(whole, tmp_path, old, new):
    run = shutil.copytree(whole, tmp_path / "run")
    lines = (run / "chain.jsonl").read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(old, new, 1)
    (run / "chain.jsonl").write_bytes(b"".join(lines))
    with pytest.raises(TargetError, match="record 2 of .*chain.jsonl' was changed"):
        verify(run)


def test_a_document_in_which_a_key_is_repeated_is_refused(tmp_path):
    for text, key in (('{"a": 1, "a": 1}', "a"), ('{"x": [{"b": {}, "c": 1, "b": 2}]}', "b")):
        with pytest.raises(TargetError, match=f"the key '{key}' is repeated"):
            parsed(tmp_path / "x.json", text.encode())


def test_a_record_that_was_taken_out_or_moved_is_found(whole, tmp_path):
    lines = (whole / "chain.jsonl").read_text().splitlines(keepends=True)
    for kept in ([0, 2, 3, 4], [1, 0, 2, 3, 4], [0, 1, 1, 2, 3, 4]):
        run = shutil.copytree(whole, tmp_path / str(kept))
        (run / "chain.jsonl").write_text("".join(lines[k] for k in kept))
        with pytest.raises(TargetError, match="does not contain the digest of the one before it"):
            verify(run)


@pytest.mark.parametrize("file", ["/etc/hostname", "../elsewhere.json", ".."])
def test_a_record_that_leads_out_of_the_folder_is_refused(whole, tmp_path, file):
    run = shutil.copytree(whole, tmp_path / "run")
    first = json.loads((run / "chain.jsonl").read_text().splitlines()[0])
    link = Link(first["previous"], first["content"] | {"file": file})
    record = {"previous": link.previous, "content": link.content, "digest": link.digest}
    (run / "chain.jsonl").write_bytes(canonical(record) + b"\n")
    with pytest.raises(TargetError, match="record 1 of"):
        verify(run)


def test_a_stage_without_a_record_is_found(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    shutil.copy(run / "clean.safetensors", run / "9-made-up.safetensors")
    with pytest.raises(TargetError, match="9-made-up.safetensors' is in no record"):
        verify(run)
    (run / "9-made-up.safetensors").unlink()
    lines = (run / "chain.jsonl").read_text().splitlines(keepends=True)
    (run / "chain.jsonl").write_text("".join(lines[:2]))
    with pytest.raises(TargetError, match="1-pgd.safetensors' is in no record"):
        verify(run)


def test_changed_splits_of_a_finished_stage_are_found(tmp_path):
    with open_run_folder(tmp_path / "run", MANIFEST, {}, resume=False) as folder:
        folder.add_split("clean", 0, 0, 8)
        folder.complete("clean", SHARDS[0])
    path = tmp_path / "run" / "splits.json"
    path.write_text(path.read_text().replace("8", "4"))
    with pytest.raises(TargetError, match="splits.json' was changed: the chain has other splits for clean"):
        verify(tmp_path / "run")


def test_another_stage_cannot_take_the_place_of_one(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    (run / "clean.safetensors").write_bytes((run / "1-pgd.safetensors").read_bytes())
    with (
        pytest.raises(TargetError, match="is not the clean that the chain recorded"),
        open_run_folder(run, MANIFEST, {}, resume=True) as folder,
    ):
        folder.stage("clean")


def test_an_incomplete_record_is_removed_by_the_next_process_and_reported_to_readers(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    with (run / "chain.jsonl").open("ab") as file:
        file.write(b'{"previous":"torn')
    with pytest.raises(TargetError, match="is truncated; .*resume=True"):
        verify(run)
    with open_run_folder(run, MANIFEST, {}, resume=True):
        pass
    assert verify(run).head == verify(whole).head


def test_the_same_verdict_again_adds_no_record(tmp_path):
    run = tmp_path / "run"
    with open_run_folder(run, MANIFEST, {}, resume=False) as folder:
        for code in (0, 0, 1, 0):
            folder.record("verdict", {"exit_code": code})
        assert [link.content["kind"] for link in folder.chain.links] == [
            "run",
            "verdict",
            "verdict",
            "verdict",
        ]
        assert folder.document("verdict") == {"exit_code": 0}
    assert verify(run).complete


def test_what_differs_is_named(whole):
    digests = {**MANIFEST["digests"], "config": "x", "model": "y"}
    other = {"digests": digests, "config": {**MANIFEST["config"], "eps": 0.1}}
    with (
        pytest.raises(UsageError, match=r"another configuration and another model \(eps: 0.3 → 0.1\)"),
        open_run_folder(whole, other, {}, resume=True),
    ):
        pass


def test_changed_functions_and_other_data_are_described_in_words(whole):
    def functions(**digests):
        names = {name: f"optim.py:{name}" for name in digests}
        own = {f"pgd.training.{name}": digest * 64 for name, digest in digests.items()}
        return {"settings": {"pgd": {"training": names}}, "functions": own}

    stored, changed = functions(optimizer="a", augment="c"), functions(optimizer="b", augment="c")
    assert differences(stored, changed) == "the function optimizer has changed (optim.py:optimizer)"
    none = {"settings": {"pgd": {"training": {}}}}
    assert differences(stored, none).startswith(
        "the functions augment and optimizer were given before and are not given now; settings."
    )
    assert differences(none, functions(optimizer="a")).startswith(
        "the function optimizer was not given before and is given now; settings."
    )
    digests = {**MANIFEST["digests"], "config": "x", "data": "y"}
    other = {"digests": digests, "config": {**MANIFEST["config"], "functions": {"pgd.training.augment": "c"}}}
    with (
        pytest.raises(
            UsageError, match="another configuration and other data .*with its functions restored$"
        ),
        open_run_folder(whole, other, {}, resume=True),
    ):
        pass


def test_a_manifest_of_another_version_is_refused(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    path = run / "run.json"
    path.write_text(path.read_text().replace('"schema_version": 2', '"schema_version": 7'))
    with (
        pytest.raises(TargetError, match="has schema version 7; this version reads 2"),
        open_run_folder(run, MANIFEST, {}, resume=True),
    ):
        pass


HOLDER = """
    import sys, time
    from pathlib import Path
    from holdfast.runs.store.leases import leased
    with leased(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(60)
"""


def test_a_lease_of_a_living_process_holds_and_of_a_dead_one_does_not(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match=f"is in use by process {holder.pid} on"), leased(tmp_path):
            pass
        holder.send_signal(signal.SIGKILL)
        while start_time(holder.pid) is not None:  # a zombie is dead
            time.sleep(0.01)
        with (
            leased(tmp_path),
            pytest.raises(UsageError, match=f"is in use by process {os.getpid()} on"),
            leased(tmp_path),
        ):
            pass
    assert not (tmp_path / "lease.json").exists()


@pytest.mark.parametrize("other", [None, {"host": "elsewhere", "pid": 7, "started": "then"}])
def test_a_process_that_lost_its_lease_writes_nothing_more(tmp_path, other):
    run = tmp_path / "run"
    with open_run_folder(run, MANIFEST, {}, resume=False) as folder:
        folder.lease.begin("clean", 0)
        (run / "lease.json").unlink()
        if other is not None:
            (run / "lease.json").write_text(json.dumps(other))
        before = sorted(path.name for path in run.rglob("*"))
        for write in (
            lambda: folder.lease.begin("clean", 1),
            lambda: folder.lease.spend("clean", 0, Seconds(1.0, 1.0)),
            lambda: folder.keep_shard("clean", 0, SHARDS[0]),
            lambda: folder.complete("clean", SHARDS[0]),
            lambda: folder.record("doubts", {"doubts": []}),
            lambda: folder.add_split("clean", 0, 1, 1),
        ):
            with pytest.raises(
                TargetError,
                match=f"lost the lease of .*{'' if other is None else ', which process 7 on elsewhere'}.*resume=True",
            ):
                write()
        assert sorted(path.name for path in run.rglob("*")) == before
        assert spent_in(run)["clean"].cpu_s == 0
    assert (run / "lease.json").exists() == (other is not None), "the lease of another process remains"


@pytest.mark.parametrize("name", ["other", "\u00b2", "7", "-0001"])
def test_a_file_that_is_no_shard_is_named_and_left(tmp_path, name):
    run, stray = tmp_path / "run", tmp_path / "run" / "clean" / f"{name}.safetensors"
    with open_run_folder(run, MANIFEST, {}, resume=False) as folder:
        folder.keep_shard("clean", 0, SHARDS[0])
        shutil.copy(run / "clean" / "00000.safetensors", stray)
        with pytest.raises(TargetError, match=f"{name}.safetensors' is not a shard of this run.*remove it"):
            folder.shards("clean")
        stray.unlink()
        assert folder.shards("clean").keys() == {0}


def test_a_process_number_that_was_used_again_is_another_process():
    me = Owner.myself()
    assert me.alive()
    if me.started:
        assert not Owner(me.host, me.pid, "another boot:1").alive()
    assert not Owner(me.host, 2**22 + 1, "").alive()


@pytest.mark.parametrize("age, free", [(FOREIGN_LEASE_S - 60, False), (FOREIGN_LEASE_S + 60, True)])
def test_a_lease_of_another_host_ends_after_its_last_renewal(tmp_path, age, free):
    lease = tmp_path / "lease.json"
    lease.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": ""}))
    os.utime(lease, (time.time() - age,) * 2)
    refused = pytest.raises(UsageError, match="is in use by process 1 on elsewhere")
    with nullcontext() if free else refused, leased(tmp_path) as taken:
        taken.refuse_lost()
    assert lease.exists() is not free


def test_a_process_that_measures_renews_its_lease(tmp_path):
    with leased(tmp_path) as lease:
        os.utime(tmp_path / "lease.json", (0, 0))
        lease.spend("clean", 0, Seconds(1.0, 1.0))
        assert (tmp_path / "lease.json").stat().st_mtime > time.time() - FOREIGN_LEASE_S / 2


@pytest.mark.parametrize("content", ["", "[]", "{", '{"host": 7, "pid": 1, "started": ""}', "[" * 100_000])
def test_a_file_that_is_no_lease_is_replaced(tmp_path, content):
    (tmp_path / "lease.json").write_text(content)
    with leased(tmp_path) as lease:
        lease.refuse_lost()


def test_time_of_every_attempt_is_added_up(tmp_path):
    with leased(tmp_path) as lease:
        for _ in range(2):
            lease.begin("clean", 0)
            lease.spend("clean", 0, Seconds(1.5, 2.0))
        lease.spend("clean", 1, Seconds(0.5, 1.0))
        lease.begin("other", 0)
    assert spent_in(tmp_path)["clean"] == ShardTimes(3.5, 5.0, 2)
    assert spent_in(tmp_path)["other"] == ShardTimes(0.0, 0.0, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lease.lock", "times.jsonl"]


def test_an_incomplete_time_is_ignored_and_the_next_one_is_not(tmp_path):
    with leased(tmp_path) as lease:
        lease.spend("clean", 0, Seconds(1.0, 1.0))
        lease.spend("clean", 1, Seconds(1.0, 1.0))
    times = tmp_path / "times.jsonl"
    times.write_bytes(times.read_bytes()[:-3])
    with leased(tmp_path) as lease:
        lease.spend("clean", 1, Seconds(2.0, 2.0))
    assert spent_in(tmp_path)["clean"].cpu_s == 3


def test_a_full_disk_under_the_times_is_stated(tmp_path, monkeypatch):
    with leased(tmp_path) as lease, monkeypatch.context() as patch:
        failing(patch, 1, ("write",))
        with pytest.raises(TargetError, match="disk is full: .*times.jsonl.*resume=True"):
            lease.begin("clean", 0)


def fill(run):
    with open_run_folder(run, MANIFEST, {}, resume=False) as folder:
        for shard in range(100):
            folder.keep_shard("clean", shard, {"id": torch.arange(500)})


def test_a_tiny_disk_loses_nothing(tiny):
    with pytest.raises(TargetError, match="disk is full|cannot be written"):
        fill(tiny / "run")
    kept = sorted((tiny / "run" / "clean").glob("*.safetensors"))
    subprocess.run(["mount", "-o", "remount,size=4m", str(tiny)], check=True)
    with open_run_folder(tiny / "run", MANIFEST, {}, resume=True) as folder:
        assert len(folder.shards("clean")) == len(kept) > 0
