"""Robust accuracy by class on chest X-rays: the headline of the report states the worst class."""

import holdfast
from benchmarks.chest_xrays import CLASSES, FILE, make, xrays
from benchmarks.record import Cells, Claim, Outcome

WHAT = "PneumoniaMNIST under linf attacks: the headline of a run with `--groups label` states the worst class"
EPS, SUITE = (1, 2, 4), "fast"


def measured() -> Outcome:
    net, (x, y) = holdfast.open_model(make(), class_names=CLASSES), xrays("test")
    table: list[Cells] = []
    headlines: list[str] = []
    for eps in EPS:
        result = holdfast.assess(
            net,
            (x, y),
            threat=f"linf:{eps}/255",
            suite=SUITE,
            groups="label",
            doubts=False,
        )
        summary = result.summary()
        rows = {row["name"]: row for row in summary["groups"]["rows"]}
        table.append(
            {
                "eps, 1/255": eps,
                "clean, %": 100 * summary["metrics"]["clean_accuracy"]["value"],
                "robust, %": 100 * summary["metrics"]["robust_accuracy"]["value"],
                **{f"{name}, %": 100 * row["robust_accuracy"]["value"] for name, row in rows.items()},
            }
        )
        headlines.append(summary["headline"])
    last, named = table[-1], sum("of class normal, the worst of 2 classes" in each for each in headlines)
    claims = [
        Claim("robust accuracy of the normal class at 4/255, % <= 26", last["normal, %"], 26),
        Claim("headlines that name the normal class as the worst", named, len(EPS), least=True),
    ]
    return Outcome(
        table, claims, {"eps": EPS, "suite": SUITE, "network": FILE.name}, {"headlines": headlines}
    )
