"""The guided denoiser of the gallery: the number of its own evaluation, and the adaptive one."""

from benchmarks.record import Cells, Claim, Outcome
from holdfast.doubts.gallery import EPS
from holdfast.verbs.exhibition import exhibition

WHAT = "the guided denoiser of the gallery: robust accuracy without its gradient, and under adaptive attacks"
NAME, N, UNFINISHED = "guided-denoiser", 200, "not-exhausted"


def measured() -> Outcome:
    (found,) = exhibition(n=N, only=(NAME,))
    table: list[Cells] = [
        {
            "masked model": found.name,
            "clean": found.clean_accuracy,
            "naive": found.naive_robust_accuracy,
            "twin": found.twin_robust_accuracy,
            "adaptive": found.adaptive_robust_accuracy,
            "raised": ", ".join(found.doubts),
            "adaptive attacks": ", ".join(found.adaptive),
            "CPU s": found.cpu_s,
        }
    ]
    doubts = set(found.doubts) - {UNFINISHED}
    naive, adaptive, twin = (
        found.naive_robust_accuracy, found.adaptive_robust_accuracy, found.twin_robust_accuracy,
    )  # fmt: skip
    claims = [
        Claim(f"doubts raised beside `{UNFINISHED}` >= 1", len(doubts), 1, least=True),
        Claim("naive - adaptive >= 0.20", naive - adaptive, 0.20, least=True),
        Claim("adaptive - twin <= 0.05", adaptive - twin, 0.05),
    ]
    config: Cells = {
        "n": N,
        "eps": EPS,
        "naive": "PGD-40, cross-entropy, gradient without the denoiser",
        "seed": 0,
    }
    return Outcome(table, claims, config, {"ways": found.bypassed})
