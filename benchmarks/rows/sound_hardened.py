"""Spoken digits hardened for five minutes of CPU time under snr:40dB."""

from benchmarks.hardened import made, percent, spent
from benchmarks.record import Cells, Claim, Outcome
from benchmarks.spoken_digits import clips, trained

WHAT = "spoken digits hardened for 5 minutes of CPU time under snr:40dB, judged by `fast` on 300 clips"
ROW, THREAT, BUDGET, N = "sound-hardened", "snr:40dB", "5min", 300


def measured() -> Outcome:
    splits = clips()
    training, test = splits["train"][:2], splits["test"][:2]
    card: Cells = made(
        ROW, "pgd", trained(0), test, THREAT, "pgd", BUDGET,
        suite="fast", n=N, by_cpu=True, fit=training, doubts=False, assess_budget="1h", sampling_rate=8000,
    )["measured"]  # fmt: skip
    before = {
        name: 100 * float(card["before"]["metrics"][name]["value"])
        for name in ("clean_accuracy", "suite_robust_accuracy")
    }
    table = [
        {
            "network": "given",
            "clean, %": before["clean_accuracy"],
            "left, %": before["suite_robust_accuracy"],
        },
        {
            "network": "hardened",
            "clean, %": percent(card, "clean_accuracy"),
            "left, %": percent(card, "suite_robust_accuracy"),
            **spent(card, by_cpu=True),
        },
    ]
    gain = table[1]["left, %"] - table[0]["left, %"]
    claims = [
        Claim("gain under fast, points >= 30", gain, 30, least=True),
        Claim("loss of clean accuracy, points <= 3", table[0]["clean, %"] - table[1]["clean, %"], 3),
    ]
    return Outcome(
        table, claims, {"threat": THREAT, "budget": BUDGET, "recipe": card["recipe"], "n": N}, card
    )
