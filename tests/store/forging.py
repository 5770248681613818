"""Chains that are computed again, as a forger would."""

from holdfast.io.files import canonical
from holdfast.runs.store.append_log import Link


def line_of(link):
    """A record of a hash chain as a line of its file."""
    return canonical({"previous": link.previous, "content": link.content, "digest": link.digest}) + b"\n"


def chained(previous, contents):
    """Records of these contents as lines of a file, and the digest of the last one."""
    lines = []
    for content in contents:
        link = Link(previous, content)
        lines.append(line_of(link))
        previous = link.digest
    return b"".join(lines), previous
