"""Encrypts files with AES-256-GCM. The name of a file is authenticated as well, so that files can be neither altered
nor exchanged.

An encrypted file consists of a header (magic bytes, version, id of the key), a random nonce, and the ciphertext with
its tag. The header and the name are authenticated together with the content. NIST SP 800-38D allows 2**32 random nonces
for one key.
"""

import hashlib
import hmac
import os
import re
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.core.errors import Install, TargetError, UsageError
from holdfast.io.files import open_regular
from holdfast.runs.store.files import create_private, refusal_in_pool, usable

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_VARIABLE = "HOLDFAST_POOL_KEY"
"""Environment variable with the key of a pool; it takes precedence over the key file."""
KEY_BYTES = 32  # AES-256
PSEUDONYM_DIGITS = 32  # 128 bits, so that two clients do not get the same pseudonym

_MAGIC = b"HOLDFAST"
_VERSION = 1
_ID_BYTES, _NONCE_BYTES, _TAG_BYTES = 8, 12, 16  # nonce and tag have the usual sizes of GCM
_HEADER_BYTES = len(_MAGIC) + 1 + _ID_BYTES
_MOST_BYTES = 2**31 - 1 - _TAG_BYTES
"""Largest number of bytes that the library encrypts in one call."""
_MOST_KEY_BYTES = 1024
"""number of bytes that are read from a key file; a longer file is no key"""
_HEX = re.compile(f"[0-9a-fA-F]{{{2 * KEY_BYTES}}}")


@dataclass(frozen=True)
class Seal:
    """The key of a pool, with the functions that encrypt and decrypt its files."""

    key: bytes = field(repr=False)
    source: str = ""
    """origin of the key: the environment variable or the key file"""

    def __post_init__(self) -> None:
        if len(self.key) != KEY_BYTES:
            raise UsageError(f"the key has {len(self.key)} bytes; AES-256 needs {KEY_BYTES}")

    @property
    def id(self) -> str:
        """Identifier of the encryption key. The key cannot be computed from it."""
        return hashlib.sha256(b"holdfast pool key id\0" + self.key).digest()[:_ID_BYTES].hex()

    def seal(self, data: bytes, name: str) -> bytes:
        """Return `data` encrypted as the content of a file. It can only be decrypted under the same `name`. Each call
        uses a new nonce.
        """
        if len(data) > _MOST_BYTES:
            raise UsageError(
                f"{name!r} has {len(data)} bytes; at most {_MOST_BYTES} can be encrypted in one file; split it"
            )
        # The id of the key is in the header, so that a wrong key is reported as such and not as an altered file.
        header = _MAGIC + bytes([_VERSION]) + bytes.fromhex(self.id)
        nonce = os.urandom(_NONCE_BYTES)
        return header + nonce + _cipher(self.key).encrypt(nonce, data, header + name.encode())

    def open(self, data: bytes, name: str, path: Path | None = None) -> bytes:
        """Return the decrypted content of a file that was encrypted under `name`.

        Raises `TargetError` with `path` if the bytes are invalid.
        """
        file_text = repr(name if path is None else str(path))
        if len(data) < _HEADER_BYTES + _NONCE_BYTES + _TAG_BYTES or not data.startswith(_MAGIC):
            raise TargetError(
                f"{file_text} is not an encrypted file, or is truncated; restore it from a copy"
            )
        header, nonce = data[:_HEADER_BYTES], data[_HEADER_BYTES:][:_NONCE_BYTES]
        version, key_id = header[len(_MAGIC)], header[-_ID_BYTES:].hex()
        if version != _VERSION:
            raise TargetError(
                f"{file_text} is an encrypted file of version {version}; this version reads {_VERSION}. Install the "
                "holdfast that wrote it"
            )
        if key_id != self.id:
            raise TargetError(
                f"{file_text} was encrypted with key {key_id}, but the given key is {self.id}{self._source_text}; set "
                f"{KEY_VARIABLE} to the key of the file, or restore the file from a copy"
            )
        cipher, sealed = _cipher(self.key), memoryview(data)[_HEADER_BYTES + _NONCE_BYTES :]
        from cryptography.exceptions import InvalidTag

        try:
            return cipher.decrypt(nonce, sealed, header + name.encode())
        except InvalidTag:
            raise TargetError(
                f"{file_text} was changed or truncated after it was encrypted, or is a copy of another file; restore "
                "it from a copy"
            ) from None

    def pseudonym(self, text: str, name: str) -> str:
        """Return the pseudonym of a text, an HMAC-SHA-256 in hex. It depends only on the key, the text and `name`, and
        does not reveal the text.
        """
        if not isinstance(text, str):
            raise UsageError(f"{text!r} is not the name of a {name.rpartition('/')[2]}; text was expected")
        # The zero byte separates both parts, so that different pairs never give the same message.
        message = f"{name}\0{text}".encode("utf-8", "surrogatepass")
        return hmac.new(self.key, message, hashlib.sha256).hexdigest()[:PSEUDONYM_DIGITS]

    def derived(self, purpose: str, salt: str) -> bytes:
        """Derive a key of 32 bytes for one purpose from the encryption key. It reveals neither the encryption key nor
        keys for other purposes.

        It is derived by HKDF-SHA-256 (RFC 5869). `salt` gives different keys for pools with the same key.
        """
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        return HKDF(SHA256(), KEY_BYTES, salt.encode(), f"holdfast {purpose}".encode()).derive(self.key)

    def refuse_other(self, key_id: str, manifest: Path) -> None:
        """Raise `TargetError` if a pool was encrypted with another key than this one, i.e. if `key_id` differs from the
        id of this key.
        """
        if key_id != self.id:
            raise TargetError(
                f"the pool of {str(manifest)!r} is encrypted with key {key_id}, but the given key is "
                f"{self.id}{self._source_text}; set {KEY_VARIABLE} to the key of the pool, or restore its key file"
            )

    @property
    def _source_text(self) -> str:
        return f" (from {self.source})" if self.source else ""


def key_file(folder: Path) -> Path:
    """Return the path of the key file of a pool. It is next to the folder of the pool, so that a copy of the folder
    does not contain the key.
    """
    absolute = folder.resolve()
    return absolute.with_name(f"{absolute.name}.key")


def has_key(folder: Path) -> bool:
    """Return whether the key of a pool is available in the environment or in its key file."""
    with usable(key_file(folder), refusal_in_pool):
        return KEY_VARIABLE in os.environ or key_file(folder).exists()


def existing_seal(folder: Path) -> Seal:
    """Return the key of an existing pool. Raises `TargetError` if there is no key, or if other users of the machine may
    read it.
    """
    from_environment, path = _seal_from_environment(), key_file(folder)
    if from_environment is not None:
        return from_environment
    with usable(path, refusal_in_pool):
        if not path.exists():
            raise TargetError(
                f"there is no key for {str(folder)!r}: {KEY_VARIABLE} is not set, and {str(path)!r} does not "
                "exist; set the variable or restore the file. Without its key a pool cannot be read"
            )
        with os.fdopen(
            open_regular(path, follow=True), "rb"
        ) as file:  # the file that is tested is the one that is read
            status = os.fstat(file.fileno())
            text = file.read(_MOST_KEY_BYTES).decode("ascii", "replace").strip()
    mode = status.st_mode & 0o777
    if os.name != "nt" and status.st_uid != os.geteuid():
        raise TargetError(
            f"{str(path)!r} belongs to user {status.st_uid}, who can read the key, but this process runs as user "
            f"{os.geteuid()}; run as its owner, or remove it if nothing was encrypted with it yet"
        )
    if os.name != "nt" and mode & 0o077:
        raise TargetError(
            f"{str(path)!r} has mode {mode:04o}, so that other users can read the key; run chmod 600 on it. If "
            "anyone may have read it, list the sets of the pool as stolen"
        )
    if not _HEX.fullmatch(text):
        raise TargetError(
            f"{str(path)!r} contains {len(text)} characters that are not a key; {2 * KEY_BYTES} hex digits were "
            "expected. Restore it from a copy, or remove it if nothing was encrypted with it yet"
        )
    return Seal(bytes.fromhex(text), str(path))


def refuse_unready() -> None:
    """Raise `UsageError` if the encryption library is missing, or the environment contains an invalid key."""
    # A key of zeros, which only tests whether the library can be imported.
    _cipher(bytes(KEY_BYTES))
    _seal_from_environment()


def new_seal(folder: Path) -> Seal:
    """Return the key of a new pool. If the environment and the key file contain no key, a new one is written to the key
    file.

    The caller must have locked the pool.
    """
    from_environment, path = _seal_from_environment(), key_file(folder)
    if from_environment is None:
        with usable(path, refusal_in_pool):
            if path.is_symlink() and not path.exists():
                raise TargetError(
                    f"{str(path)!r} is a link to {str(path.readlink())!r}, which does not exist, and a key is not "
                    "written through a link; remove the link, or restore the key file that it points to"
                )
            if not path.exists():
                create_private(path, secrets.token_hex(KEY_BYTES).encode() + b"\n")
    return existing_seal(folder) if from_environment is None else from_environment


def _seal_from_environment() -> Seal | None:
    """The key from the environment, or None; its value is never shown."""
    text = os.environ.get(KEY_VARIABLE)
    if text is None:
        return None
    if not _HEX.fullmatch(text):
        raise UsageError(
            f"{KEY_VARIABLE} contains {len(text)} characters that are not a key; {2 * KEY_BYTES} hex digits were "
            f'expected, as python -c "import secrets; print(secrets.token_hex({KEY_BYTES}))" generates them. Unset '
            "it to use a file"
        )
    return Seal(bytes.fromhex(text), KEY_VARIABLE)


def _cipher(key: bytes) -> "AESGCM":
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError as error:
        raise UsageError(
            "what is stored is encrypted, which needs cryptography, which is not installed", Install("crypto")
        ) from error
    return AESGCM(key)
