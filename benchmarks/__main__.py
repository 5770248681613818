"""Measure side by side and write dated records: `make bench`, or

    python -m benchmarks [--only ROW]... [--peers FOLDER] [--afresh] [--list]

A row whose peer or network is absent is skipped, and the reason is printed. The parts of a long row are kept in
`benchmarks/cache/parts` as they are done, so that it goes on where it was stopped.
"""

import argparse
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

# Before torch is imported: one thread, for all contestants alike.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import torch

from benchmarks import parts, peers, record
from benchmarks.absent import Absent

ROWS = {
    "import": "imports",
    "starting": "starting",
    "odd-batches": "odd_batches",
    "box-precision": "box_precision",
    "regression": "regression",
    "dense-attacks": "dense_attacks",
    "soundness": "soundness",
    "certified-operations": "certified_operations",
    "certification": "certification",
    "smooth-networks": "smooth_networks",
    "certified-transformer": "certified_transformer",
    "tables": "tables",
    "trees": "trees",
    "audit-poison": "audit_poison",
    "planting": "planting",
    "attributes": "attributes",
    "reconstruct": "reconstruct",
    "membership": "membership",
    "privacy": "privacy",
    "generator-quality": "generator_quality",
    "generator-tables": "generator_tables",
    "generator-inference": "generator_inference",
    "generator-backdoor": "generator_backdoor",
    "gan-backdoor": "gan_backdoor",
    "robust-gan": "robust_gan",
    "explain": "explain",
    "control": "control",
    "control-hardened": "control_hardened",
    "control-speed": "control_speed",
    "repair": "repair",
    "ui": "ui",
    "forged-findings": "forged_findings",
    "onnx-files": "onnx_files",
    "auto-lirpa": "auto_lirpa",
    "vnncomp-2021": "vnncomp_2021",
    "field": "field",
    "served-models": "served_models",
    "serving": "serving",
    "serving-small": "serving_small",
    "serving-monitor": "serving_monitor",
    "serving-soak": "soak",
    "cluster": "cluster",
    "reading-files": "reading_files",
    "pgd-cost": "pgd_cost",
    "pgd-dropping": "pgd_dropping",
    "pgd-batch-norm": "batch_norm",
    "pgd-sizes": "pgd_sizes",
    "half-precision": "half_precision",
    "large-inputs": "large_inputs",
    "pgd-strength": "pgd_strength",
    "defaults": "defaults",
    "minimum-norm": "minimum_norm",
    "square": "square",
    "benign": "benign",
    "query-detector": "query_detector",
    "query-patterns": "query_patterns",
    "monitor": "monitor",
    "adapt": "adapt",
    "canary-clients": "canary_clients",
    "odd-servers": "odd_servers",
    "decisions": "decisions",
    "scores": "scores",
    "transfer": "transfer",
    "resume": "resume",
    "baseline": "baseline",
    "swaps": "swaps",
    "draws": "draws",
    "sound": "sound",
    "sound-queries": "sound_queries",
    "sound-air": "sound_air",
    "sound-packages": "sound_packages",
    "sound-hardened": "sound_hardened",
    "smoothing": "smoothing",
    "rotation": "rotation",
    "new-basins": "new_basins",
    "generated-protection": "generated_protection",
    "rotation-robust": "rotation_robust",
    "rotation-unguarded": "rotation_unguarded",
    "rotation-cifar": "rotation_cifar",
    "harden-cost": "harden_cost",
    "harden-budget": "harden_budget",
    "harden-loop": "harden_loop",
    "recipes": "recipes",
    "regularisers": "regularisers",
    "ladder": "ladder",
    "best-recipes": "best_recipes",
    "seed-tables": "seed_tables",
    "policy": "policy",
    "league": "league",
    "generated": "generated",
    "hardening": "hardening",
    "cifar-hardening": "cifar_hardening",
    "certified-training": "certified_training",
    "partitions": "partitions",
    "distil-robust": "distil_robust",
    "compression": "compression",
    "ensembles": "ensembles",
    "hybrid": "hybrid",
    "fast-choice": "fast_choice",
    "fast-small": "fast_small",
    "until": "until",
    "expected-time": "expected_time",
    "fast": "fast",
    "trades": "trades",
    "standard": "standard",
    "standard-cost": "standard_cost",
    "universal-seeds": "universal_seeds",
    "patches": "patches",
    "pneumonia": "pneumonia",
    "transformations": "transformations",
    "bends": "bends",
    "image-patches": "image_patches",
    "colours": "colours",
    "detectors": "detectors",
    "guard": "guard",
    "perfect-estimators": "perfect_estimators",
    "text": "texts",
    "text-networks": "text_networks",
    "text-masking": "text_masking",
    "patch-masks": "patch_masks",
    "fitting-doubts": "fitting_doubts",
    "loss-spread": "loss_spread",
    "doubts": "doubts",
    "gallery": "gallery",
    "masked-unknown": "masked_unknown",
    "guided-denoiser": "guided_denoiser",
    "purifier": "purifier",
    "extraction": "extraction",
    "ownership": "ownership",
    "audit-controls": "audit_controls",
    "audit-backdoor": "audit_backdoor",
}
"""Name of a row and its module, in the order they run: cheap ones first."""


def _module(row: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.rows.{ROWS[row]}")


def main() -> int:
    """0 if every claim that could be measured is met, 1 if one is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", metavar="ROW", choices=ROWS, help="a row; may be repeated")
    parser.add_argument("--peers", type=Path, help="folder of checkouts; see benchmarks/peers.py")
    parser.add_argument("--afresh", action="store_true", help="measure parts that are kept again")
    parser.add_argument("--list", action="store_true", help="print the rows and what each shows")
    chosen = parser.parse_args()
    if chosen.list:
        for name in ROWS:
            print(f"{name:16} {_module(name).WHAT}")
        return 0
    torch.set_num_threads(1)
    missed = False
    try:
        peers.use(chosen.peers)
    except Absent as why:
        print(why, file=sys.stderr)
        return 2
    for name in chosen.only or ROWS:
        row = _module(name)
        if chosen.afresh:
            parts.forget(name)
        try:
            outcome: record.Outcome = row.measured()
        except Absent as why:
            print(f"{name}: skipped: {why}", flush=True)
            continue
        at = record.write(name, row.WHAT, outcome)
        print(f"{name}: {at.relative_to(Path.cwd()) if at.is_relative_to(Path.cwd()) else at}")
        for claim in outcome.claims:
            print(f"  {'met   ' if claim.met else 'MISSED'} {claim.text}: {claim.value:.4g}", flush=True)
            missed |= not claim.met
    return int(missed)


if __name__ == "__main__":
    raise SystemExit(main())
