"""The content of the page `/ui`: state, traffic, alarms, flagged inputs, clients, model and adaptation."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from holdfast.adaptation.adapted import clock, facts_text
from holdfast.core.errors import HoldfastError
from holdfast.reports.formats.html import filled
from holdfast.reports.gallery import png, shrunk
from holdfast.reports.numbers import plain
from holdfast.server.flagged_inputs import FlaggedInput, FlaggedInputs
from holdfast.server.keys import ADMIN, KeyFile
from holdfast.server.supervisor import Supervisor
from holdfast.server.traffic import KEPT_S, REFUSED, SAMPLE_S, Interval
from holdfast.server.ui_sessions import Operator
from holdfast.threats.domains import is_image

Json = dict[str, Any]

_PICTURES, _VALUES = 24, 12
"""number of flagged inputs, and of the values of an input that is no image"""
_CLIENTS = 100
"""number of clients in the table"""
_RUNS = 5
"""number of adaptation runs"""
_WIDTH, _HEIGHT = 600, 120
"""size of a chart"""


def login_page(token: str, error: str = "") -> str:
    """Return the page with the form for the key of an operator."""
    return filled("ui-login.html.j2", token=token, error=error)


def operator_page(
    supervisor: Supervisor,
    keys: KeyFile | None,
    operator: Operator,
    token: str,
    *,
    done: str = "",
    error: str = "",
) -> str:
    """Return the page for an operator, with the parts that the operator may read. `done` and `error` are the result of
    the last form.
    """
    live, adaptations, setup = supervisor.live, supervisor.adaptations, supervisor.setup
    stored, approving = operator.may("adapt"), operator.may("adapt", "approve")
    flagged, flagged_error = _pictures(setup.flagged if stored else None)
    intervals, status = supervisor.traffic.intervals(), supervisor.status()
    return filled(
        "ui.html.j2",
        token=token,
        operator=operator.name,
        may={
            "read_numbers": operator.may("metrics", "adapt"),
            "read_inputs": stored,
            "read_runs": approving,
            "approve": operator.may("approve"),
            "swap": operator.may(ADMIN),
        },
        logged_in=keys is not None,
        done=done,
        error=error,
        now=_time(datetime.now(UTC).timestamp()),
        name=setup.worker.name,
        swappable=setup.pool is not None or setup.reloadable,
        status=status,
        served=_served(status["model"]) if setup.pool is None else status.get("pool", {"set": ""}),
        recent=supervisor.traffic.recent(),
        requests_chart=_chart(intervals, ("requests_per_s", "refused_per_s")),
        latency_chart=_chart(intervals, ("p50_s", "p95_s")),
        refusals=supervisor.traffic.by_label(REFUSED),
        rules=supervisor.traffic.by_label("holdfast_rule_fired_total"),
        monitor=None if live is None else live.summary(),
        stores=setup.flagged is not None,
        flagged=flagged,
        flagged_error=flagged_error,
        clients=_clients(setup.flagged, keys) if stored else [],
        ledger=_ledger(supervisor),
        runs=[_run(each) for each in adaptations.runs()[:_RUNS]] if approving else [],
    )


@dataclass(frozen=True)
class Chart:
    """Lines of a chart over the last 15 minutes, in its coordinates, and the largest value."""

    width: int
    height: int
    paths: tuple[str, ...]
    largest: float


def _chart(intervals: Sequence[Interval], names: tuple[str, str]) -> Chart:
    """The chart of two values; an interval without a value interrupts its line."""
    series = [[getattr(interval, name) for interval in intervals] for name in names]
    largest = max((value for values in series for value in values if value is not None), default=0.0)
    step = _WIDTH / (KEPT_S / SAMPLE_S - 1)
    left = _WIDTH - step * (len(intervals) - 1)
    paths = []
    for values in series:
        path, pen = [], "M"
        for place, value in enumerate(values):
            if value is None:
                pen = "M"
                continue
            x, y = left + step * place, _HEIGHT * (1 - value / (largest or 1.0))
            path.append(f"{pen}{x:.1f},{y:.1f}" + ("h.1" if pen == "M" else ""))
            pen = "L"
        paths.append("".join(path))
    return Chart(_WIDTH, _HEIGHT, tuple(paths), largest)


def _pictures(flagged: FlaggedInputs | None) -> tuple[list[Json], str]:
    """The newest flagged inputs, and why they cannot be read."""
    if flagged is None:
        return [], ""
    try:
        return [_picture(each, flagged) for each in flagged.newest(_PICTURES)], ""
    except (HoldfastError, OSError) as error:
        return [], str(error)


def _picture(flagged: FlaggedInput, range_of: FlaggedInputs) -> Json:
    x, picture, values = flagged.x.float(), "", ""
    if is_image(x.shape):
        width = range_of.high - range_of.low
        width = width if math.isfinite(width) and width > 0 else 1.0
        picture = png(shrunk((x - range_of.low) / width))
    else:
        numbers = x.flatten()
        values = ", ".join(plain(value) for value in numbers[:_VALUES].tolist())
        values += f" and {len(numbers) - _VALUES} more" if len(numbers) > _VALUES else ""
    return {
        "request": flagged.request,
        "row": flagged.row,
        "time": _time(flagged.time_s),
        "scores": {rule: plain(score) for rule, score in flagged.scores.items()},
        "picture": picture,
        "values": values,
    }


def _clients(flagged: FlaggedInputs | None, keys: KeyFile | None) -> list[Json]:
    """The clients that have a key or stored inputs, those with most flagged requests first."""
    counts = Counter[str]() if flagged is None else flagged.by_principal()
    rows: list[Json] = []
    for key in () if keys is None else keys.entries:
        pseudonym = "" if flagged is None else flagged.stored.pseudonym(key.name)
        rows.append(
            {
                "name": key.name,
                "pseudonym": pseudonym,
                "scopes": ", ".join(key.scopes),
                "state": key.state,
                "flagged": counts.pop(pseudonym, 0),
            }
        )
    unnamed = "" if flagged is None else flagged.stored.pseudonym("")
    for pseudonym, n in counts.items():
        name = "clients without a key" if pseudonym == unnamed else "unknown"
        rows.append({"name": name, "pseudonym": pseudonym, "scopes": "", "state": "", "flagged": n})
    return sorted(rows, key=lambda row: (-row["flagged"], row["name"]))[:_CLIENTS]


def _served(model: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of the served model: no settings, and only facts with a value."""
    return {key: value for key, value in model.items() if key != "settings" and value not in ("", None)}


def _run(run: Mapping[str, Any]) -> dict[str, Any]:
    """A run of an adaptation with its times and facts as text."""
    steps = [
        {"step": each["step"], "time": clock(each["time"]), "facts": facts_text(each["step"], each["facts"])}
        for each in run["steps"]
    ]
    return {**run, "steps": steps}


def _ledger(supervisor: Supervisor) -> Json | None:
    """The number of sets of a pool by state, and of its epochs and stolen sets; None without a pool."""
    if supervisor.setup.pool is None:
        return None
    ledger = supervisor.setup.pool.pool.ledger
    try:
        states = Counter(str(state) for state in ledger.states.values())
        return {
            **states,
            "entries": ledger.entries,
            "epochs": len(ledger.terms),
            "stolen": len(ledger.exposed()),
        }
    except (HoldfastError, OSError) as error:
        return {"error": str(error)}


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
