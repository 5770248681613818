"""The command `holdfast keys`, which creates, lists and revokes the API keys of a server."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import click

from holdfast.cli.options import Group, Voice, plain_table, with_voice
from holdfast.core.errors import UsageError
from holdfast.settings.grammar import per_second, seconds

_FILE = click.option(
    "--file",
    "file",
    type=click.Path(path_type=Path),
    default=Path("holdfast-keys.json"),
    metavar="FILE",
    help="File of the keys (default: holdfast-keys.json).",
)
_DAY_S = 86_400.0


@click.group(cls=Group, short_help="create, list and revoke the API keys of a server")
def keys() -> None:
    """Create, list and revoke the API keys of holdfast serve.

    The file contains only hashes of keys, and only its owner may read it. A running server reads it again when it has
    changed.
    """


@keys.command(short_help="create a key")
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    metavar="SCOPE",
    help="What the key permits: infer (the default: requests to the model), and at the operator's port metrics "
    "(numbers), labels, adapt (holdfast adapt, and stored inputs), approve (adaptations), or admin (all of these, and "
    "swaps). May be repeated.",
)
@click.option(
    "--expires", metavar="T", help="Time until the key is refused, as in 90d or 12h (default: never)."
)
@click.option(
    "--rate",
    metavar="N/T",
    help="Largest number of inputs in a time, as in 100/min (default: no limit). A burst or a request may have those "
    "of ten seconds, and at least one.",
)
@click.option(
    "--budget", type=int, metavar="N", help="Largest number of inputs in total (default: no limit)."
)
@_FILE
@with_voice
def add(
    voice: Voice,
    name: str,
    scopes: tuple[str, ...],
    expires: str | None,
    rate: str | None,
    budget: int | None,
    file: Path,
) -> None:
    """Create a key for the client NAME, and print it. It cannot be printed again.

    The name is that of the principal in the audit chain, in the metrics of a pool, and of the limits: a new key with
    the name of a revoked one continues with the budget that is left.
    """
    if budget is not None and budget < 1:
        raise UsageError(f"--budget is {budget}; a number of inputs from 1 on was expected")
    moment = None if expires is None else _moment(expires)
    number = None if rate is None else per_second(rate, "--rate")
    from holdfast.server.keys import add_key, burst_of

    key = add_key(file, name, scopes or ("infer",), expires=moment, rate=number, budget=budget)
    voice.say(f"{file} contains the hash of this key; store the key itself in a safe place:")
    click.echo(key)
    if number is not None:
        n = burst_of(number)
        inputs = f"{n:,} input{'s' * (n > 1)}"
        voice.say(f"the rate allows {inputs} at once after a pause, which is also the limit of one request")


@keys.command("list", short_help="list the keys")
@_FILE
@click.option(
    "--audit",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Audit folder of a server: the pseudonym of each key in it is also shown.",
)
@with_voice
def list_keys(voice: Voice, file: Path, audit: Path | None) -> None:
    """List the keys with their scopes, their limits and their state. The keys themselves are not stored.

    With --audit, a principal in the audit, in the log and in alarms can be matched to a key. This needs the file
    DIR.key beside the audit folder.
    """
    from holdfast.reports.terminal import cell
    from holdfast.server.keys import read_keys

    pseudonym = None
    if audit is not None:
        from holdfast.server.audit_chain import AuditKey

        pseudonym = AuditKey.of(audit, create=False).pseudonym
    table = plain_table()
    headings = ("name", "scopes", "state", "expires", "rate", "budget", "created")
    for heading in headings if pseudonym is None else ("name", "principal", *headings[1:]):
        table.add_column(heading, no_wrap=True)
    for key in read_keys(file):
        rate = "" if key.rate is None else f"{key.rate:g}/s"
        budget = "" if key.budget is None else f"{key.budget:,}"
        principal = () if pseudonym is None else (pseudonym(key.name),)
        limits = (key.state, key.expires or "never", rate, budget, key.created)
        table.add_row(*map(cell, (key.name, *principal, ", ".join(key.scopes), *limits)))
    voice.console().print(table)


@keys.command(short_help="revoke a key")
@click.argument("name")
@_FILE
@with_voice
def revoke(voice: Voice, name: str, file: Path) -> None:
    """Revoke the key of the client NAME. A running server refuses it within two seconds."""
    from holdfast.server.keys import revoke_key

    revoke_key(file, name)
    voice.say(f"the key {name} is revoked")


def _moment(text: str) -> str:
    """Return the time at which a key expires, in ISO 8601."""
    number = text.strip().removesuffix("d")
    if text.strip().endswith("d") and number.isdecimal() and int(number) > 0:
        duration_s = int(number) * _DAY_S
    else:
        try:
            duration_s = seconds(text, "--expires")
        except UsageError:
            raise UsageError(f"--expires is {text!r}; expected a duration such as 90d or 12h") from None
    try:
        moment = datetime.now(UTC) + timedelta(seconds=duration_s)
    except OverflowError:
        raise UsageError(f"--expires is {text!r}; expected a duration such as 90d or 12h") from None
    return moment.isoformat(timespec="seconds")
