"""Files sealed at rest: AES-256-GCM, each bound to its name, so that none can be changed or stand in for another.

A sealed file is a header (what it is, its version, the id of its key), a random nonce, and the ciphertext with its tag.
The header and the name are authenticated with the content. NIST SP 800-38D allows one key 2**32 random nonces.
"""

import hashlib
import hmac
import os
import re
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.core.errors import TargetError, UsageError
from holdfast.store.files import create_private, refusal_in_pool, usable

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_VARIABLE = "HOLDFAST_POOL_KEY"
"""The environment variable that holds a pool's key; it is asked before the key file."""
KEY_BYTES = 32
PSEUDONYM_DIGITS = 32

_MAGIC = b"HOLDFAST"
_VERSION = 1
_ID_BYTES, _NONCE_BYTES, _TAG_BYTES = 8, 12, 16
_HEADER_BYTES = len(_MAGIC) + 1 + _ID_BYTES
_MOST_BYTES = 2**31 - 1 - _TAG_BYTES
"""What the library takes at once."""
_MOST_KEY_BYTES = 1024
"""read of a key file; more is no key"""
_HEX = re.compile(f"[0-9a-fA-F]{{{2 * KEY_BYTES}}}")


@dataclass(frozen=True)
class Seal:
    """A key, and what it does to files."""

    key: bytes = field(repr=False)
    source: str = ""
    """where the key came from: the environment variable or the key file"""

    def __post_init__(self) -> None:
        if len(self.key) != KEY_BYTES:
            raise UsageError(f"a key of {len(self.key)} bytes was given; AES-256 takes {KEY_BYTES}")

    @property
    def id(self) -> str:
        """Tells keys apart and says nothing of the key."""
        return hashlib.sha256(b"holdfast pool key id\0" + self.key).digest()[:_ID_BYTES].hex()

    def seal(self, data: bytes, name: str) -> bytes:
        """The bytes of a sealed file that only opens under `name`; no two are alike."""
        if len(data) > _MOST_BYTES:
            raise UsageError(
                f"{name!r} has {len(data)} bytes; at most {_MOST_BYTES} are sealed in one file: split it"
            )
        header = _MAGIC + bytes([_VERSION]) + bytes.fromhex(self.id)
        nonce = os.urandom(_NONCE_BYTES)
        return header + nonce + _cipher(self.key).encrypt(nonce, data, header + name.encode())

    def open(self, data: bytes, name: str, path: Path | None = None) -> bytes:
        """What was sealed under `name`; `TargetError`, naming the file `path`, if these bytes are not that."""
        shown = repr(name if path is None else str(path))
        if len(data) < _HEADER_BYTES + _NONCE_BYTES + _TAG_BYTES or not data.startswith(_MAGIC):
            raise TargetError(f"{shown} is no sealed file, or is cut short; restore it from a copy")
        header, nonce = data[:_HEADER_BYTES], data[_HEADER_BYTES:][:_NONCE_BYTES]
        version, other = header[len(_MAGIC)], header[-_ID_BYTES:].hex()
        if version != _VERSION:
            raise TargetError(
                f"{shown} is a sealed file of version {version}; this version reads {_VERSION}. Install the holdfast "
                f"that wrote it"
            )
        if other != self.id:
            raise TargetError(
                f"{shown} was sealed with key {other}, and the key at hand is {self.id}{self._whence}; set "
                f"{KEY_VARIABLE} to its own key, or restore the file from a copy"
            )
        cipher, sealed = _cipher(self.key), memoryview(data)[_HEADER_BYTES + _NONCE_BYTES :]
        from cryptography.exceptions import InvalidTag

        try:
            return cipher.decrypt(nonce, sealed, header + name.encode())
        except InvalidTag:
            raise TargetError(
                f"{shown} was changed or cut short after it was sealed, or stands in the place of another file; "
                f"restore it from a copy"
            ) from None

    def pseudonym(self, text: str, name: str) -> str:
        """What stands for a text under `name`, always the same, and says nothing of it: HMAC-SHA-256, in hex."""
        if not isinstance(text, str):
            raise UsageError(f"{text!r} is no name of a {name.rpartition('/')[2]}; text was expected")
        said = f"{name}\0{text}".encode("utf-8", "surrogatepass")
        return hmac.new(self.key, said, hashlib.sha256).hexdigest()[:PSEUDONYM_DIGITS]

    def derived(self, purpose: str, salt: str) -> bytes:
        """A key of 32 bytes for one purpose, which gives away neither this key nor those for others.

        HKDF-SHA-256 (RFC 5869); `salt` separates pools that share a key.
        """
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        return HKDF(SHA256(), KEY_BYTES, salt.encode(), f"holdfast {purpose}".encode()).derive(self.key)

    def refuse_other(self, key_id: str, manifest: Path) -> None:
        """Raise `TargetError` where a pool was sealed with another key."""
        if key_id != self.id:
            raise TargetError(
                f"{str(manifest)!r} says that the pool is sealed with key {key_id}, and the key at hand is "
                f"{self.id}{self._whence}; set {KEY_VARIABLE} to the pool's own key, or put its key file back"
            )

    @property
    def _whence(self) -> str:
        return f" (from {self.source})" if self.source else ""


def key_file(folder: Path) -> Path:
    """Where the key of a pool lies if not in the environment: beside its folder, so that a copy of that has no key."""
    whole = folder.resolve()
    return whole.with_name(f"{whole.name}.key")


def has_key(folder: Path) -> bool:
    """Whether the key of a pool is set in the environment or lies beside its folder."""
    with usable(key_file(folder), refusal_in_pool):
        return KEY_VARIABLE in os.environ or key_file(folder).exists()


def found_seal(folder: Path) -> Seal:
    """The seal of a pool that was begun; `TargetError` where its key is nowhere, or lies open to others."""
    given, path = _given(), key_file(folder)
    if given is not None:
        return given
    with usable(path, refusal_in_pool):
        if not path.exists():
            raise TargetError(
                f"there is no key for {str(folder)!r}: {KEY_VARIABLE} is not set, and {str(path)!r} does not exist; "
                f"set the one or put back the other. Without its key nothing in a pool can be read again"
            )
        with path.open("rb") as file:  # what is judged is what is read
            about = os.fstat(file.fileno())
            text = file.read(_MOST_KEY_BYTES).decode("ascii", "replace").strip()
    mode = about.st_mode & 0o777
    if os.name != "nt" and about.st_uid != os.geteuid():
        raise TargetError(
            f"{str(path)!r} belongs to user {about.st_uid}, who knows the key, and this process runs as user "
            f"{os.geteuid()}; run as its owner, or remove it if nothing was sealed with it yet"
        )
    if os.name != "nt" and mode & 0o077:
        raise TargetError(
            f"{str(path)!r} has mode {mode:04o}, so that others may use the key; chmod 600 it, and if anyone may have "
            f"read it, take the pool's sets for stolen"
        )
    if not _HEX.fullmatch(text):
        raise TargetError(
            f"{str(path)!r} holds {len(text)} characters that are no key; {2 * KEY_BYTES} hex digits were expected. "
            f"Restore it from a copy, or remove it if nothing was sealed with it yet"
        )
    return Seal(bytes.fromhex(text), str(path))


def refuse_unready() -> None:
    """Raise `UsageError` where the library is missing, or the environment holds what is no key."""
    _cipher(bytes(KEY_BYTES))
    _given()


def begun_seal(folder: Path) -> Seal:
    """The seal of a pool that is begun, under its lock: with a key that is there already, else with a new key file."""
    given, path = _given(), key_file(folder)
    if given is None:
        with usable(path, refusal_in_pool):
            if path.is_symlink() and not path.exists():
                raise TargetError(
                    f"{str(path)!r} is a link to {str(path.readlink())!r}, which does not exist, and no key is written "
                    f"through a link; remove it, or put back the key that it names"
                )
            if not path.exists():
                create_private(path, secrets.token_hex(KEY_BYTES).encode() + b"\n")
    return found_seal(folder) if given is None else given


def _given() -> Seal | None:
    """The seal of the environment; its value is never shown."""
    text = os.environ.get(KEY_VARIABLE)
    if text is None:
        return None
    if not _HEX.fullmatch(text):
        raise UsageError(
            f"{KEY_VARIABLE} holds {len(text)} characters that are no key; {2 * KEY_BYTES} hex digits were expected, "
            f'as python -c "import secrets; print(secrets.token_hex({KEY_BYTES}))" makes them. Unset it to use a file'
        )
    return Seal(bytes.fromhex(text), KEY_VARIABLE)


def _cipher(key: bytes) -> "AESGCM":
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError as error:
        raise UsageError(
            'a pool is sealed on the disk, which needs pip install "holdfast[crypto]"'
        ) from error
    return AESGCM(key)
