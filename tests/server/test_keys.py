"""API keys: only hashes are stored, and wrong, expired, revoked and foreign keys are refused."""

import json
import math
import os
import re
import stat

import pytest
from click.testing import CliRunner

from holdfast.cli.app import verbs
from holdfast.core.errors import TargetError, UsageError
from holdfast.guard.state_in_memory import MemoryState
from holdfast.guard.state_in_sqlite import SQLiteState
from holdfast.server.audit_chain import AuditKey
from holdfast.server.keys import ApiKey, KeyFile, Quotas, add_key, burst_of, read_keys, revoke_key
from holdfast.server.requests import Refused
from holdfast.settings.grammar import per_second


@pytest.fixture
def place(tmp_path):
    return tmp_path / "keys.json"


def bearer(key):
    return f"Bearer {key}".encode()


def refusal(keys, header, scope="infer"):
    with pytest.raises(Refused) as refused:
        keys.authenticated(header, scope)
    return refused.value.status, refused.value.reason


def test_only_the_hash_is_stored_and_only_the_owner_may_read_it(place):
    key = add_key(place, "alice", ["infer"])
    assert key not in place.read_text() and len(key) > 40
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    place.chmod(0o640)
    with pytest.raises(TargetError, match="0640.*chmod 600"):
        read_keys(place)


def test_a_key_is_accepted_for_its_scopes_and_nothing_else_is(place):
    key, admin = add_key(place, "alice", ["infer"]), add_key(place, "root", ["admin", "infer"])
    expired = add_key(place, "old", ["infer"], expires="2020-01-01T00:00:00+00:00")
    keys = KeyFile(place)
    assert keys.authenticated(bearer(key), "infer").name == "alice"
    assert keys.authenticated(b"bearer  " + admin.encode(), "admin").name == "root"
    assert refusal(keys, bearer(key), "admin") == (403, "the key does not permit admin")
    assert refusal(keys, bearer(expired)) == (401, "the key has expired")
    for header in (bearer(key[:-1]), bearer(key + "\0"), b"Bearer \xff\xfe"):
        assert refusal(keys, header) == (401, "the key is not valid")
    for header in (None, b"", b"Basic abc", key.encode()):
        assert refusal(keys, header)[0] == 401


def test_a_running_server_notices_a_revoked_key_and_keeps_its_keys_if_the_file_breaks(place, caplog):
    clock = [0.0]
    key, other = add_key(place, "alice", ["infer"]), add_key(place, "bob", ["infer"])
    keys = KeyFile(place, clock=lambda: clock[0])
    revoke_key(place, "alice")
    assert keys.authenticated(bearer(key), "infer")  # for at most a second
    clock[0] = 2.0
    assert refusal(keys, bearer(key)) == (401, "the key is not valid")
    place.write_text("{")
    clock[0] = 4.0
    assert keys.authenticated(bearer(other), "infer") and "not valid JSON" in keys.failure
    assert "not valid JSON" in caplog.text


def test_names_are_unique_until_they_are_revoked(place):
    add_key(place, "alice", ["infer"])
    with pytest.raises(UsageError, match="contains a key with the name 'alice'"):
        add_key(place, "alice", ["infer"])
    revoke_key(place, "alice")
    with pytest.raises(UsageError, match="no key 'alice' that is not revoked"):
        revoke_key(place, "alice")
    assert add_key(place, "alice", ["infer"])
    assert [key.state for key in read_keys(place)] == ["revoked", "valid"]


def test_the_list_of_keys_shows_the_principals_of_an_audit_folder_and_creates_no_key(place, tmp_path):
    add_key(place, "alice", ["infer"])
    words = ["keys", "list", "--file", str(place), "--audit", str(tmp_path / "audit")]
    missing = CliRunner().invoke(verbs, words)
    assert "audit.key', the key of the audit folder, does not exist" in str(missing.exception)
    assert not (tmp_path / "audit.key").exists()
    pseudonym = AuditKey.of(tmp_path / "audit").pseudonym("alice")
    assert pseudonym in CliRunner().invoke(verbs, words, env={"COLUMNS": "200"}).output


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 101])
def test_a_name_is_printable(place, name):
    with pytest.raises(UsageError, match="1 to 100 printable"):
        add_key(place, name, ["infer"])


def test_an_unknown_scope_and_a_foreign_file_are_refused(place):
    with pytest.raises(
        UsageError, match="expected one or more of infer, metrics, labels, adapt, approve, admin"
    ):
        add_key(place, "alice", ["all"])
    for content in ({}, {"schema": 1, "keys": [{"name": "x"}]}):
        place.write_text(json.dumps(content))
        place.chmod(0o600)
        with pytest.raises(TargetError, match="another format"):
            read_keys(place)


def test_a_file_with_one_hash_under_two_names_is_refused_as_revoking_one_would_not_suffice(place):
    add_key(place, "alice", ["infer"])
    content = json.loads(place.read_bytes())
    content["keys"].append({**content["keys"][0], "name": "bob"})
    place.write_text(json.dumps(content))
    with pytest.raises(TargetError, match="keys with distinct hashes"):
        read_keys(place)


@pytest.mark.parametrize("field", ["expires", "rate", "budget", "revoked"])
def test_a_key_without_the_field_of_a_limit_is_refused(field, place):
    add_key(place, "alice", ["infer"])
    content = json.loads(place.read_bytes())
    del content["keys"][0][field]
    place.write_text(json.dumps(content))
    with pytest.raises(TargetError, match=f"an object with '{field}' was expected"):
        read_keys(place)


def test_damaged_files_are_refused_as_such(place):
    add_key(place, "alice", ["infer"], expires="2100-01-01T00:00:00+00:00", rate=1.0, budget=5)
    whole = json.loads(place.read_bytes())
    values = (..., None, 7, "", "inf", [], [1], {}, [{}], -1, 0, 2**70, "2020-01-01", {"name": {}})
    for where in (whole, whole["keys"][0]):
        for key in (*where, "further"):
            for value in values:
                changed = json.loads(json.dumps(whole))
                target = changed if where is whole else changed["keys"][0]
                target[key] = value
                if value is ...:
                    del target[key]
                place.write_text(json.dumps(changed))
                try:
                    keys = read_keys(place)
                except TargetError:
                    continue
                for each in keys:  # what is accepted can be used
                    assert each.state in ("valid", "expired", "revoked")
                    Quotas(MemoryState()).take([each.charge(1)])
    text = json.dumps(whole)
    twice = text.replace('"revoked": null', '"revoked": "2020-01-01T00:00:00+00:00", "revoked": null')
    assert twice != text
    for damaged in (
        b"",
        b"\xff\xfe\0",
        b"[" * 100_000,
        text[:-1].encode(),
        twice.encode(),
        b"9" * 5_000,
        b"NaN",
    ):
        place.write_bytes(damaged)
        for use in (
            read_keys,
            lambda path: revoke_key(path, "alice"),
            lambda path: add_key(path, "bob", ["infer"]),
        ):
            with pytest.raises(TargetError, match=re.escape(repr(str(place)))):
                use(place)
    place.unlink()
    for make in (os.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        make(place)
        with pytest.raises(TargetError, match="a regular file was expected"):
            read_keys(place)
        place.rmdir() if place.is_dir() else place.unlink()


def charge(principal, rows, rate, budget):
    return ApiKey(principal, "0" * 64, ("infer",), "", None, rate, budget, None).charge(rows)


def test_rates_and_budgets_are_shared_and_refusals_are_not_counted():
    clock, state = [0.0], MemoryState()
    first, second = (Quotas(state, lambda: clock[0]) for _ in range(2))

    def status(quotas, principal="alice", rows=4, rate=None, budget=None):
        (refusal,) = quotas.take([charge(principal, rows, rate, budget)])
        return None if refusal is None else (refusal.status, refusal.cause, *dict(refusal.headers))

    limits = {"rate": 1.0, "budget": 18}
    assert [status(quotas, **limits) for quotas in (first, second)] == [None, None]
    assert status(first, **limits) == (429, "rate", "retry-after")  # 8 of the burst of 10 are used
    clock[0] = 100.0
    spent = [status(second, rows=2, **limits) for _ in range(6)]
    assert spent == [*[None] * 5, (429, "budget")]
    assert status(first, "bob", **limits) is None and status(first, "alice") is None
    assert second.take([charge("alice", 1, None, None), charge("alice", 9, *limits.values())])[0] is None


@pytest.mark.parametrize(
    ("text", "burst"), [("2/s", 20), ("1/min", 1), ("18/min", 3), ("100/min", 16), ("200/s", 2000)]
)
def test_a_rate_allows_ten_seconds_at_once_and_no_larger_request(text, burst, tmp_path):
    rate, quotas = per_second(text), Quotas(MemoryState(), lambda: 0.0)

    def taken(rows, principal="alice", budget=None):
        return quotas.take([charge(principal, rows, rate, budget)])[0]

    assert all(taken(1) is None for _ in range(burst)) and taken(1).status == 429
    assert taken(burst, "bob") is None
    too_large = taken(burst + 1, "carol")
    assert (too_large.status, too_large.cause, too_large.headers) == (413, "rate", ())
    assert f"at most {burst} at once" in too_large.reason
    assert (
        f"budget of the key allows at most {burst - 1} at once"
        in taken(burst, "dave", budget=burst - 1).reason
    )
    added = CliRunner().invoke(
        verbs, ["keys", "add", "alice", "--rate", text, "--file", str(tmp_path / "keys.json")]
    )
    assert f"allows {burst:,} input" in added.stderr and len(added.stdout.split()) == 1


@pytest.mark.parametrize(
    "limits", [{"rate": 1e308}, {"rate": 1e-300}, {"rate": math.nan}, {"budget": 10**30}, {"budget": 0}]
)
def test_a_limit_that_could_not_be_read_again_is_not_written(limits, tmp_path):
    path = tmp_path / "keys.json"
    add_key(path, "alice", ["infer"], rate=1e9, budget=2**53)
    add_key(path, "bob", ["infer"], rate=1e-12)
    with pytest.raises(UsageError, match="expected 1"):
        add_key(path, "carol", ["infer"], **limits)
    assert [key.name for key in read_keys(path)] == ["alice", "bob"]
    assert burst_of(1e9) == 10**10


def test_lost_limits_refuse(tmp_path):
    state = SQLiteState(tmp_path / "quota")
    quotas = Quotas(state)
    assert quotas.take([charge("alice", 1, 1.0, None)]) == [None]
    state.close()
    (refusal,) = quotas.take([charge("alice", 1, 1.0, None)])
    assert (refusal.status, refusal.reason) == (503, "the limits of the key cannot be checked")
