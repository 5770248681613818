"""Pools as the version before this format wrote them: a public chain, no counters, no HMACs, no typed fields."""

import json

from holdfast.core.chain import GENESIS, Link, canonical, digest
from holdfast.store.manifest import old_bound
from holdfast.store.records import document

LACKED = {"role", "against", "automatic", "unjudged"}


def chained(contents):
    """Lines of a chain without authentication."""
    lines, previous = [], GENESIS
    for content in contents:
        link = Link(previous, content)
        record = {"previous": previous, "content": content, "digest": link.digest}
        lines.append(canonical(record) + b"\n")
        previous = link.digest
    return b"".join(lines)


def aged(pool, keep=lambda content: True):
    """Rewrite a pool in the older format, with the entries that are kept."""
    manifest = {**pool.manifest, "schema_version": 1}
    (pool.path / "pool.json").write_bytes(document(manifest))
    contents = [json.loads(line)["content"] for line in pool.ledger.path.read_bytes().splitlines()]
    contents = [{k: v for k, v in one.items() if k not in LACKED} for one in contents if keep(one)]
    contents[0]["manifest"] = digest(document(manifest))
    pool.ledger.path.write_bytes(chained(contents))
    (pool.path / "ledger.head").unlink()
    for file in pool.path.rglob("*.sealed"):
        name = file.relative_to(pool.path).as_posix().removesuffix(".sealed")
        plain = pool.seal.open(file.read_bytes(), f"{pool.manifest['id']}/2/{name}", file)
        file.write_bytes(pool.seal.seal(plain, old_bound(pool.manifest["id"], name)))
    return pool.path
