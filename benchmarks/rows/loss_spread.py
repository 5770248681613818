"""The statistic of the doubt `loss-spread` on the gallery of masked models and on honest networks, beside its
threshold.
"""

from benchmarks import controls
from benchmarks.networks import images
from benchmarks.record import Cells, Claim, Outcome
from holdfast.doubts.gallery import ITEMS, undefended
from holdfast.doubts.loss_spread import LOSS_SPREAD
from holdfast.doubts.protocol import SAMPLE
from holdfast.io.data.data import open_data
from holdfast.io.data.loaders import as_data
from holdfast.runs.assess.result import Result
from holdfast.runs.harness.kinds.passes import FIXED
from holdfast.verbs.exhibition import assessed_net

WHAT = "the statistic of the doubt loss-spread on masked and on honest networks"
DOUBT = "loss-spread"


def measured() -> Outcome:
    digits = open_data("mnist-mini", split="train")
    training = digits.read(0, len(digits))
    twin, judged = undefended(training), open_data("mnist-mini", n=SAMPLE)
    table: list[Cells] = [
        _row(
            "masked",
            item.name,
            assessed_net(item.build(training, twin), judged, item.eps, (FIXED,), doubts="all"),
        )
        for item in ITEMS
    ]
    for control in controls.HONEST:
        x, y = images(control.data, SAMPLE)
        net = controls.trained(control)
        table.append(
            _row(
                "honest", control.name, assessed_net(net, as_data(x, y), control.eps, (FIXED,), doubts="all")
            )
        )
    honest = [row["spread"] for row in table if row["kind"] == "honest"]
    # a masked model whose losses agree is found by another doubt
    missed = [row["network"] for row in table if row["kind"] == "masked" and not row["raised"]]
    claims = [
        Claim("honest networks >= 20", len(honest), 20, least=True),
        Claim(f"largest spread of an honest network <= {LOSS_SPREAD:g}", max(honest), LOSS_SPREAD),
        Claim("masked models that raise no doubt at all <= 0", len(missed), 0),
    ]
    return Outcome(table, claims, {"n": SAMPLE, "threshold": LOSS_SPREAD, "attack": "PGD-40, cross-entropy"})


def _row(kind: str, name: str, result: Result) -> Cells:
    (spread,) = (doubt for doubt in result.doubts if doubt.name == DOUBT)
    others = [d.name for d in result.doubts if d.state in ("raised", "answered") and d.name != DOUBT]
    return {
        "kind": kind,
        "network": name,
        "spread": 0.0 if spread.statistic is None else float(spread.statistic),
        "raised": spread.state == "raised" or bool(others),
        "other doubts": ", ".join(others),
    }
