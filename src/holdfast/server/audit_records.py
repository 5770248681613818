"""The texts of the records of requests in an audit chain.

They are those that `core.chain.canonical` returns for the same content: JSON with sorted keys and no spaces. They are
composed here, because the encoder of the standard library takes three times as long, and each request has two of them.
"""

from json.encoder import encode_basestring_ascii as quoted
from math import isfinite

from holdfast.core.chain import canonical
from holdfast.guard.decisions import Action, RequestDecision, RowDecision

_ACTIONS = tuple(map(str, Action))
"""names of the actions by their numbers"""


def started(request: str, principal: str, rows: int, digest: str, time: float) -> bytes:
    """Return the record of a request before the model is called: its identifier, the pseudonym of its client, its
    number of inputs and their digest.
    """
    return (
        f'{{"digest":{quoted(digest)},"kind":"started","principal":{quoted(principal)},"request":{quoted(request)},'
        f'"rows":{rows},"time":{time!r}}}'
    ).encode()


def answered(
    request: str,
    decision: RequestDecision,
    action: Action,
    status: int,
    set_name: str,
    epoch: int,
    time: float,
) -> bytes:
    """Return the record of the end of a request about which the guard decided, with the scores of each input."""
    scored = [_row(row) for row in decision.rows if row.scores]
    rows = f'"rows":[{",".join(scored)}],' if scored else ""
    notes = f'"notes":{canonical(dict(decision.notes)).decode()},' if decision.notes else ""
    return (
        f'{{"action":"{_ACTIONS[action]}","epoch":{epoch},"kind":"answered",{notes}'
        f'"request":{quoted(request)},{rows}"set":{quoted(set_name)},"status":{status},"time":{time!r}}}'
    ).encode()


def _row(row: RowDecision) -> str:
    """The action for an input, and the score of each rule with whether it fired and the mode of the rule."""
    scores = [
        f'{quoted(rule)}:[{_number(value)},{"true" if fired else "false"},"{mode.value}"]'
        for rule, value, fired, mode, _ in sorted(row.scores)
    ]
    return f'["{_ACTIONS[row.action]}",{{{",".join(scores)}}}]'


def _number(value: float) -> str:
    return repr(round(value, 6)) if isfinite(value) else f'"{value}"'
