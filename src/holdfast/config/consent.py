"""The setting `trust_code`, which is the user's consent to run code from files. It is accepted only on the command line
and in Python.
"""

from collections.abc import Collection

from holdfast.core.errors import UsageError

CONSENT = "trust_code"


def refuse_consent(keys: Collection[str], where: str) -> None:
    """Raise `UsageError` if a configuration file or a `--set` contains the setting `trust_code`, the consent to run
    code, whatever its value.
    """
    if CONSENT in keys:
        raise UsageError(
            f"{where} contains {CONSENT}, which is not a key of a configuration: only a person may allow code to run. "
            f"Remove it; if you trust the files, add --trust-code to the command line, or in Python give "
            f"holdfast.open_model(…, {CONSENT}=True)"
        )
