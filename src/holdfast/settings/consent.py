"""The consent to run code from files, to send code, to follow links, and to trust a network, which can only be given on
the command line or in Python.
"""

from collections.abc import Collection, Mapping

from holdfast.core.errors import UsageError

CONSENT: Mapping[str, tuple[str, str]] = {
    "trust_code": (
        "allow code to run. Remove it; if you trust the files, add --trust-code to the command line",
        "holdfast.open_model(…, trust_code=True)",
    ),
    "trust_network": (
        "trust a network. Remove it; if you trust every machine of it, add --trust-network to the command line",
        "on=holdfast.Ray(…, trust_network=True)",
    ),
    "follow_links": (
        "follow links. Remove it; if you want to read what they lead to, add --follow-links to the command line",
        "holdfast.open_data(…, follow_links=True)",
    ),
    "ship": (
        "send files to other machines. Remove it; add --ship PATH to the command line",
        "on=holdfast.Ray(…, ship=[…])",
    ),
}
"""Keys that no configuration file may contain, because only a person may give these permissions.

The values are the end of an error message, with the option to use instead, and the equivalent in Python.
"""


def refuse_consent(keys: Collection[str], where: str) -> None:
    """Raise `UsageError` if a configuration file or a `--set` contains a consent of the user, whatever its value."""
    for key, (act, in_python) in CONSENT.items():
        if key in keys:
            raise UsageError(
                f"{where} contains {key}, which is not a key of a configuration: only a person may {act}, or in Python "
                f"give {in_python}"
            )
