"""Digests and the canonical text of records."""

import hashlib
import json

import pytest

from holdfast.io.files import canonical, digest
from holdfast.runs.store.append_log import GENESIS, Link


def test_the_digest_is_sha_256_of_canonical_json():
    link = Link(GENESIS, {"b": 1, "a": [1.5, "é"]})
    text = json.dumps(
        {"content": {"a": [1.5, "é"], "b": 1}, "previous": GENESIS}, sort_keys=True, separators=(",", ":")
    )
    assert link.digest == hashlib.sha256(text.encode()).hexdigest() == digest(text.encode())


def test_equal_content_is_equal_bytes_and_no_number_is_refused():
    assert canonical({"b": 1, "a": 2}) == canonical({"a": 2, "b": 1}) == b'{"a":2,"b":1}'
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            canonical({"x": value})
