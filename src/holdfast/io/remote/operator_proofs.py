"""Proofs between a client with an API key and the operator's port of a server that has only the hash of the key.

They follow SCRAM (Newman et al., "Salted Challenge Response Authentication Mechanism", RFC 5802, 2010). The server
proves first that it has the hash. Each request then contains the key, veiled by a pad that depends on the hash and on
the request, so that neither the hash nor recorded messages suffice to write another request. Each answer is
authenticated together with its request.

Differs from the RFC: the stored key is the SHA-256 of a random key of 256 bits, so that there are no passwords, salts
and iterations; a session has several requests with increasing numbers; requests and answers are authenticated with
their contents.
"""

import hashlib
import hmac
import json
import secrets
from dataclasses import dataclass

SCHEME = "Holdfast"
"""scheme of the header Authorization of a request with a proof"""
ANSWER_HEADER = "holdfast-proof"
"""header of an answer with its proof"""
NO_SESSION = 412
"""status of an authenticated answer to a request of a session that the server does not have, as after a restart"""
NONCE_BYTES = 16
_ID_DIGITS = 16


def hash_of(key: bytes) -> bytes:
    """Return the hash of an API key, which the file of a server contains."""
    return hashlib.sha256(key).digest()


def key_id(stored: bytes) -> str:
    """Return the name of a key in messages, from which neither the key nor its hash can be computed."""
    return hashlib.sha256(b"holdfast key id" + stored).hexdigest()[:_ID_DIGITS]


def new_nonce() -> str:
    """Return a random number that is used once."""
    return secrets.token_hex(NONCE_BYTES)


@dataclass(frozen=True)
class OperatorSession:
    """A session: what was agreed on before the first request."""

    key: str
    """name of the key, see `key_id`"""
    client: str
    """nonce of the client"""
    server: str
    """nonce of the server, by which it finds the session"""
    authority: str
    """header `Host` of the client"""

    def server_proof(self, stored: bytes) -> str:
        """Return the proof of the server that it has the hash of the key."""
        return _mac(stored, "server", *vars(self).values()).hex()

    def request(self, number: int, method: str, path: str, body: bytes, content_type: str) -> "ProvenRequest":
        """Return a request of the session. `path` includes the query."""
        digest = hashlib.sha256(body).hexdigest()
        return ProvenRequest((*vars(self).values(), number, method, path, digest, content_type))


@dataclass(frozen=True)
class ProvenRequest:
    """A request, of which each part is authenticated."""

    parts: tuple[str | int, ...]

    def veiled(self, key: bytes, stored: bytes) -> bytes:
        """Return the exclusive or of a key with the pad of the request, or the key again if it was veiled."""
        pad = hashlib.shake_256(_mac(stored, "request", *self.parts)).digest(len(key))
        return bytes(a ^ b for a, b in zip(key, pad, strict=True))

    def answer_proof(self, stored: bytes, status: int, content: bytes) -> str:
        """Return the proof of the server that an answer is that to this request."""
        return _mac(stored, "answer", *self.parts, status, hashlib.sha256(content).hexdigest()).hex()


def _mac(stored: bytes, *parts: str | int) -> bytes:
    return hmac.digest(stored, json.dumps(parts).encode(), "sha512")
