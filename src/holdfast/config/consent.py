"""The consent to run code from files, which can only be given on the command line or in Python."""

from collections.abc import Collection

from holdfast.core.errors import UsageError

CONSENT = "trust_code"


def refuse_consent(keys: Collection[str], where: str) -> None:
    """Raise `UsageError` if a configuration file or a `--set` contains the consent to run code, whatever its value."""
    if CONSENT in keys:
        raise UsageError(
            f"{where} contains {CONSENT}, which is not a key of a configuration: only a person may allow code to run. "
            f"Remove it; if you trust the files, add --trust-code to the command line, or in Python give "
            f"holdfast.open_model(…, {CONSENT}=True)"
        )
