"""Sealed files: they open under their own name with their own key, and anything else is told apart and said."""

import os
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.core.errors import TargetError, UsageError
from holdfast.runs.store import encryption
from holdfast.runs.store.encryption import KEY_VARIABLE, Seal, existing_seal, key_file, new_seal
from holdfast.runs.store.files import create_private

SEAL, OTHER = Seal(bytes(range(32))), Seal(bytes(32))
HEX = "0123456789abcdefABCDEF0123456789" * 2
HEADER = len(b"HOLDFAST") + 1 + len(bytes.fromhex(SEAL.id))


@given(data=st.binary(max_size=200), name=st.text(max_size=20))
def test_an_encrypted_file_opens_with_its_key_and_shows_no_content(data, name):
    sealed = SEAL.seal(data, name)
    assert SEAL.open(sealed, name) == data
    assert len(data) < 4 or data not in sealed[HEADER:]
    assert SEAL.seal(data, name) != sealed


@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_changed_bit_is_noticed(place, bit):
    data = bytearray(SEAL.seal(b"some weights", "a"))
    data[place % len(data)] ^= 1 << bit
    with pytest.raises(TargetError, match="'a' .*restore|'a' .*Install"):
        SEAL.open(bytes(data), "a")


@given(cut=st.integers(0, 10**6))
def test_a_file_that_is_cut_short_is_noticed(cut):
    data = SEAL.seal(b"some weights", "a")
    with pytest.raises(TargetError, match="'a' .*truncated.*restore"):
        SEAL.open(data[: cut % len(data)], "a")


def test_a_file_opens_under_its_own_name_only():
    with pytest.raises(TargetError, match="'b' .*is a copy of another file"):
        SEAL.open(SEAL.seal(b"some weights", "a"), "b")


def test_another_key_is_distinguished_from_a_corrupt_file(tmp_path):
    with pytest.raises(
        TargetError,
        match=f"{re.escape(str(tmp_path / 'x'))}' was encrypted with key {OTHER.id}, .* is {SEAL.id}",
    ):
        SEAL.open(OTHER.seal(b"", "x"), "x", tmp_path / "x")


def test_a_file_of_another_version_or_kind_is_refused(monkeypatch, set_limit):
    with pytest.raises(TargetError, match="'x' is not an encrypted file"):
        SEAL.open(b"PK\x03\x04 a zip, for once" * 5, "x")
    set_limit("holdfast.runs.store.encryption._VERSION", 2)
    newer = SEAL.seal(b"", "x")
    monkeypatch.undo()
    with pytest.raises(TargetError, match="version 2; this version reads 1"):
        SEAL.open(newer, "x")


def test_what_one_file_cannot_hold_is_refused(set_limit):
    set_limit("holdfast.runs.store.encryption._MOST_BYTES", 3)
    assert SEAL.open(SEAL.seal(b"123", "x"), "x") == b"123"
    with pytest.raises(UsageError, match="'x' has 4 bytes; at most 3"):
        SEAL.seal(b"1234", "x")


def test_no_error_and_no_text_shows_a_key():
    assert "01" not in repr(Seal(b"01" * 16))
    assert len(SEAL.id) == 16 and SEAL.id not in SEAL.key.hex()
    with pytest.raises(UsageError, match="the key has 16 bytes; AES-256 needs 32"):
        Seal(b"0" * 16)


def test_a_key_file_is_made_once_beside_the_folder_for_its_owner_alone(tmp_path, monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    folder = tmp_path / "pool"
    folder.mkdir()
    seal = new_seal(folder)
    assert key_file(folder) == tmp_path / "pool.key" and seal.source == str(tmp_path / "pool.key")
    assert key_file(folder).stat().st_mode & 0o777 == 0o600
    assert new_seal(folder) == existing_seal(folder) == seal
    (tmp_path / "link").symlink_to(folder)
    assert existing_seal(tmp_path / "link").key == seal.key
    other = tmp_path / "other"
    other.mkdir()
    assert new_seal(other).key != seal.key


def test_the_environment_comes_before_the_key_file(tmp_path, monkeypatch):
    folder = tmp_path / "pool"
    folder.mkdir()
    monkeypatch.setenv(KEY_VARIABLE, HEX)
    assert new_seal(folder) == existing_seal(folder) == Seal(bytes.fromhex(HEX), KEY_VARIABLE)
    assert not key_file(folder).exists()


@pytest.mark.parametrize("text", ["", "abc", HEX[:-1] + "g", HEX[:-2] + " 1", HEX + "00"])
def test_an_environment_without_a_key_in_it_is_refused_and_not_shown(tmp_path, monkeypatch, text):
    monkeypatch.setenv(KEY_VARIABLE, text)
    for ask in (new_seal, existing_seal):
        with pytest.raises(
            UsageError, match=f"{KEY_VARIABLE} contains {len(text)} .*64 hex digits"
        ) as caught:
            ask(tmp_path)
        assert not text or text not in str(caught.value)


@pytest.mark.skipif(sys.platform == "win32", reason="modes are of POSIX")
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620])
def test_a_key_file_that_others_can_read_is_refused(tmp_path, monkeypatch, mode):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    folder = tmp_path / "pool"
    folder.mkdir()
    new_seal(folder)
    key_file(folder).chmod(mode)
    for ask in (new_seal, existing_seal):
        with pytest.raises(TargetError, match=f"pool.key' has mode {mode:04o}.*chmod 600"):
            ask(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="links and owners are of POSIX")
def test_a_key_is_not_written_through_a_link_or_into_an_existing_file(tmp_path, monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    folder, precious = tmp_path / "pool", tmp_path / "precious.txt"
    folder.mkdir()
    precious.write_text("precious\n")
    (tmp_path / ".pool.key.part").symlink_to(precious)
    new_seal(folder)
    assert precious.read_text() == "precious\n" and not key_file(folder).is_symlink()
    key_file(folder).unlink()
    key_file(folder).symlink_to(tmp_path / "nowhere")
    with pytest.raises(
        TargetError, match="pool.key' is a link to .*nowhere', which does not exist.*remove the link"
    ):
        new_seal(folder)
    with pytest.raises(FileExistsError):
        create_private(key_file(folder), b"key")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="links and owners are of POSIX")
def test_a_key_of_another_user_is_refused(tmp_path, monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    folder = tmp_path / "pool"
    folder.mkdir()
    new_seal(folder)
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    for ask in (new_seal, existing_seal):
        with pytest.raises(
            TargetError, match=f"pool.key' belongs to user {own}, .* as user {own + 1}; run as"
        ):
            ask(folder)


def test_a_missing_or_damaged_key_is_reported(tmp_path, monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    folder = tmp_path / "pool"
    folder.mkdir()
    with pytest.raises(TargetError, match=f"{KEY_VARIABLE} is not set, and .*pool.key' does not exist"):
        existing_seal(folder)
    new_seal(folder)
    key_file(folder).write_text("short\n")
    with pytest.raises(TargetError, match="pool.key' contains 5 characters .*64 hex digits were expected"):
        existing_seal(folder)


def test_without_the_library_the_extra_is_named(monkeypatch):
    sealed = SEAL.seal(b"", "x")
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    for ask in (encryption.refuse_unready, lambda: SEAL.seal(b"", "x"), lambda: SEAL.open(sealed, "x")):
        with pytest.raises(UsageError, match=r'pip install "holdfast-ml\[crypto\]"'):
            ask()


def test_the_store_imports_no_library():
    code = "import sys, holdfast.runs.store.encryption; print(any(m.startswith('cryptography') for m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
