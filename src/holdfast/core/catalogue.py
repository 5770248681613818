"""Catalogue of attacks, recipes, doubts, detectors, methods of certification and formats of reports. It does not import
torch.

It is the only list of them. `holdfast.attacks`, `holdfast.recipes` and `holdfast.certifiers` import a class when it is
first used; settings, help, completion and documentation read the names here. `names` and `load` include what other
packages register in entry-point groups.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, Final, Literal, TypeVar

from holdfast.core.errors import UsageError
from holdfast.core.names import TaskName

T = TypeVar("T")


@dataclass(frozen=True)
class AttackEntry:
    """Entry of the catalogue for one attack of `holdfast.attacks`."""

    name: str
    """name of the class, which suites, configuration files and the command line accept"""
    module: str
    """name of the module in `holdfast.attacks`"""
    needs: Literal["none", "labels", "scores", "gradients"]
    """access to the model that the attack needs"""
    paper: str = ""
    """name in the paper, if it differs from `name` and is not the name of another attack of the catalogue"""
    short: tuple[str, ...] = ()
    """common short names of the attack"""


@dataclass(frozen=True)
class RecipeEntry:
    """Entry of the catalogue for one recipe of `holdfast.recipes`, which the option `--recipe` selects by its name."""

    name: str
    cls: str
    """name of the class in `holdfast.recipes`"""
    module: str
    """name of the module in `holdfast.recipes`"""
    settings: Mapping[str, float | bool] = field(default_factory=dict)
    """settings whose defaults under this name differ from those of the class"""


GENERATOR_RECIPES: Final[Mapping[str, Mapping[str, float]]] = {
    "robust-gan": {},
    "distil": {"eps": 0.0, "smoothness": 0.0, "r1": 0.0, "class_head": 0.0, "teacher": 1.0},
}
"""Recipes for generators, with their settings that differ from the defaults of
`holdfast.recipes.training.gans.RobustLosses`."""


POLICY_RECIPES: Final = ("robust-policy",)
"""Recipes for policies in environments."""
ENVIRONMENTS: Final = ("cartpole", "lqr")
"""Names of the bundled environments."""


@dataclass(frozen=True)
class AuditEntry:
    """Entry of the catalogue for one audit."""

    name: str
    """name of the command after `holdfast audit`; that of `hardened-generator` is `holdfast harden`"""
    gate: str
    """gate that passes if the verdict is `not flagged`; empty for an audit without one"""
    conclusion: str
    """module in `holdfast.audits` whose function `concluded` computes the finding from the settings and stored steps"""
    settings: str = ""
    """class of the settings in `holdfast.verbs.audit`; empty for `hardened-generator`"""
    metrics: tuple[str, ...] = ()
    """names of the metrics on which gates can be set"""
    verb: str = ""
    """verb of the command whose run contains the audit; empty for `audit`"""
    noun: str = ""
    """name of such a run in reports; empty for that of an audit"""
    words: Mapping[str, str] = field(default_factory=dict)
    """words of reports for the verdicts, if they are others than the verdicts themselves"""
    judges: bool = True
    """whether the verdict judges what was measured; if not, gates alone do"""


_NOT_FLAGGED = "not-flagged"
TABLE_METRICS: Final = (
    "singling_out_risk",
    "linkability_risk",
    "inference_risk",
    "column_shapes",
    "pair_trends",
)
"""Metrics of an audit of a synthetic table."""
GENERATOR_METRICS: Final = (
    "frechet",
    "copy_rate",
    "near_copy_rate",
    "latent_sensitivity",
    "membership_tpr_at_1_percent",
)
"""Metrics of an audit of a generator."""

_RETURNS = ("worst_return", "clean_return")
_OF_RETURNS: Final = {"flagged": "vulnerable", "not flagged": "no significant loss"}
AUDITS: Final[Mapping[str, AuditEntry]] = {
    entry.name: entry
    for entry in (
        AuditEntry(
            "attributes",
            _NOT_FLAGGED,
            "attributes",
            "AuditAttributes",
            ("attribute_accuracy_gain", "attribute_tpr_gain_at_1_percent"),
        ),
        AuditEntry("backdoor", "no-backdoor", "backdoor", "AuditBackdoor"),
        AuditEntry(
            "extraction",
            _NOT_FLAGGED,
            "extraction",
            "AuditExtraction",
            ("copy_agreement", "robust_accuracy_under_copy"),
        ),
        AuditEntry("poison", "no-poison", "poison", "AuditPoison"),
        AuditEntry("privacy", _NOT_FLAGGED, "privacy", "AuditPrivacy", ("epsilon_lower",)),
        AuditEntry(
            "reconstruct",
            _NOT_FLAGGED,
            "reconstruct",
            "AuditReconstruct",
            ("exactly_reconstructed", "psnr_above_mean_image"),
        ),
        AuditEntry(
            "membership",
            _NOT_FLAGGED,
            "membership",
            "AuditMembership",
            ("membership_tpr_at_1_percent",),
        ),
        AuditEntry(
            "generator",
            _NOT_FLAGGED,
            "generator.audit",
            "AuditGenerator",
            (*GENERATOR_METRICS, *TABLE_METRICS),
        ),
        AuditEntry(
            "hardened-generator",
            "",
            "generator.hardening",
            metrics=GENERATOR_METRICS,
            verb="harden",
            noun="hardening",
        ),
        AuditEntry(
            "control",
            "",
            "control",
            metrics=_RETURNS,
            verb="assess",
            noun="assessment",
            words=_OF_RETURNS,
        ),
        AuditEntry(
            "certified-actions",
            "",
            "certified_actions",
            metrics=("certified_actions",),
            verb="certify",
            noun="certification",
            words={"not flagged": "certificates"},
            judges=False,
        ),
        AuditEntry(
            "hardened-policy",
            "",
            "hardened_policy",
            metrics=_RETURNS,
            verb="harden",
            noun="hardening",
            words=_OF_RETURNS,
        ),
    )
}
"""The audits by name."""

ATTACKS: Final[Mapping[str, AttackEntry]] = {
    entry.name: entry
    for entry in (
        AttackEntry("AdversarialPatch", "adversarial_patch", "gradients", paper="Adversarial Patch"),
        AttackEntry("ALMA", "alma", "gradients"),
        AttackEntry("APGD", "apgd", "gradients", paper="Auto-PGD"),
        AttackEntry("Bandits", "bandits", "scores", paper="Bandits-TD"),
        AttackEntry("BIM", "bim", "gradients", paper="I-FGSM"),
        AttackEntry("Boundary", "boundary", "labels", paper="Boundary Attack"),
        AttackEntry("ByteSearch", "byte_search", "labels"),
        AttackEntry("CAPGD", "capgd", "gradients"),
        AttackEntry("CarliniWagner", "carlini_wagner", "gradients", paper="C&W", short=("cw", "carlini")),
        AttackEntry("ColumnSearch", "column_search", "scores"),
        AttackEntry("Corruption", "corruption", "none"),
        AttackEntry("DDN", "ddn", "gradients"),
        AttackEntry("DeepFool", "deepfool", "gradients"),
        AttackEntry("EAD", "ead", "gradients", short=("elastic-net",)),
        AttackEntry("FAB", "fab", "gradients"),
        AttackEntry("FeatureTransfer", "feature_transfer", "gradients"),
        AttackEntry("FGSM", "fgsm", "gradients", short=("fgm",)),
        AttackEntry("Flow", "flow", "gradients", paper="stAdv"),
        AttackEntry("FMN", "fmn", "gradients"),
        AttackEntry("GeneticSearch", "genetic_search", "scores", paper="MOEVA"),
        AttackEntry("GeoDA", "geoda", "labels"),
        AttackEntry("GridSearch", "grid_search", "scores"),
        AttackEntry(
            "HopSkipJump", "hop_skip_jump", "labels", paper="HopSkipJumpAttack", short=("hsj", "hsja")
        ),
        AttackEntry("JSMA", "jsma", "gradients"),
        AttackEntry("MomentumPGD", "momentum_pgd", "gradients", short=("mim",)),
        AttackEntry("NES", "nes", "scores"),
        AttackEntry("PatchAttack", "patch_attack", "gradients", paper="LaVAN"),
        AttackEntry("PDPGD", "pdpgd", "gradients"),
        AttackEntry("PGD", "pgd", "gradients"),
        AttackEntry("RayS", "rays", "labels"),
        AttackEntry("Relay", "relay", "gradients"),
        AttackEntry("SigmaZero", "sigma_zero", "gradients", paper="σ-zero"),
        AttackEntry("SignOPT", "sign_opt", "labels", paper="Sign-OPT"),
        AttackEntry("SimBA", "simba", "scores"),
        AttackEntry("SparseRS", "sparse_rs", "scores", paper="Sparse-RS"),
        AttackEntry("SPSA", "spsa", "scores"),
        AttackEntry("Square", "square", "scores", paper="Square Attack"),
        AttackEntry("StandIn", "stand_in", "scores"),
        AttackEntry("SuperDeepFool", "super_deepfool", "gradients", short=("sdf",)),
        AttackEntry("SurFree", "surfree", "labels"),
        AttackEntry("TextSearch", "text_search", "scores"),
        AttackEntry("Thresholds", "thresholds", "scores"),
        AttackEntry("Transfer", "transfer", "none"),
        AttackEntry("TransformPGD", "transform_pgd", "gradients"),
        AttackEntry("TriggerStamp", "trigger_stamp", "none"),
        AttackEntry("Universal", "universal", "gradients", paper="UAP"),
        AttackEntry("UniversalDeepFool", "universal_deepfool", "gradients"),
        AttackEntry("ZOO", "zoo", "scores"),
    )
}
RECIPES: Final[Mapping[str, RecipeEntry]] = {
    entry.name: entry
    for entry in (
        RecipeEntry("atta", "ATTA", "atta"),
        RecipeEntry("augment-policy", "AugmentPolicy", "augment_policy"),
        RecipeEntry("cure", "CURE", "cure"),
        RecipeEntry("curriculum", "CurriculumTraining", "curriculum"),
        RecipeEntry("denoised", "Denoising", "denoising"),
        RecipeEntry("dp-sgd", "DPSGD", "dp_sgd"),
        RecipeEntry("ensemble", "EnsembleTraining", "ensemble"),
        RecipeEntry("fgsm", "SingleStep", "single_step", {"noise": 0.0, "step": 1.0, "clip": True}),
        RecipeEntry("fgsm-rs", "SingleStep", "single_step", {"noise": 1.0, "step": 1.25, "clip": True}),
        RecipeEntry("free", "FreeTraining", "free"),
        RecipeEntry("ft-sam", "FTSAM", "ft_sam"),
        RecipeEntry("gaussian-noise", "GaussianNoise", "gaussian_noise"),
        RecipeEntry("generated", "GeneratedData", "generated"),
        RecipeEntry("gradient-regularisation", "GradientRegularisation", "gradient_regularisation"),
        RecipeEntry("hat", "HAT", "hat"),
        RecipeEntry("hybrid", "Hybrid", "hybrid"),
        RecipeEntry("ibp", "IBPTraining", "ibp"),
        RecipeEntry("ikl", "IKL", "ikl"),
        RecipeEntry("int8", "Int8", "int8"),
        RecipeEntry("jacobian", "JacobianRegularisation", "jacobian"),
        RecipeEntry("league", "LeagueTraining", "league"),
        RecipeEntry("lipschitz", "LipschitzConstraint", "lipschitz"),
        RecipeEntry("llr", "LLR", "llr"),
        RecipeEntry("margin", "MarginTraining", "margin"),
        RecipeEntry("mart", "MART", "mart"),
        RecipeEntry("masked-patches", "MaskedPatches", "masked_patches"),
        RecipeEntry("masked-words", "MaskedWords", "masked_words"),
        RecipeEntry("multi-norm", "MultiNormTraining", "multi_norm"),
        RecipeEntry("n-fgsm", "SingleStep", "single_step"),
        RecipeEntry("partitions", "Partitions", "partitions"),
        RecipeEntry("pgd", "PGDTraining", "pgd_training"),
        RecipeEntry("policy", "PolicyTraining", "policy"),
        RecipeEntry("prune", "Prune", "prune"),
        RecipeEntry("repair", "Repair", "repair"),
        RecipeEntry("rslad", "RSLAD", "rslad"),
        RecipeEntry("sabr", "SABR", "sabr"),
        RecipeEntry("score", "SCORE", "score"),
        RecipeEntry("standard", "Standard", "standard"),
        RecipeEntry("trades", "TRADES", "trades"),
        RecipeEntry("tune", "Tuning", "tuning"),
        RecipeEntry("vat", "VAT", "vat"),
    )
}
SMOOTHING: Final = "smoothing"
"""method that certifies another model than the given one: the smoothed classifier"""
SUBSTITUTIONS: Final = "substitutions"
"""method for models of texts under synonyms, which `auto` chooses for texts"""
MASKING: Final = "masking"
"""method that certifies another model of texts than the given one: the most frequent class under random masks"""
PATCH_MASKS: Final = "patch-masks"
"""method that certifies another model than the given one: the vote over masks, which `auto` chooses for patches"""
TREES: Final = "trees"
"""method for ensembles of trees, which `auto` chooses for them"""
PARTITIONS: Final = "partitions"
"""method, and recipe, for changes of the training set"""
PROVERS: Final[Mapping[str, str]] = {
    "ibp": "provers:IBP",
    "crown-ibp": "provers:CrownIBP",
    "crown": "provers:Crown",
    "lipschitz": "bounds.lipschitz:Lipschitz",
    SMOOTHING: "smoothing:Smoothing",
    SUBSTITUTIONS: "substitutions:Substitutions",
    MASKING: "masking:Masking",
    PATCH_MASKS: "patch_masks:PatchMasks",
    TREES: "tree_ensembles:Trees",
    PARTITIONS: "partitions:PartitionVotes",
    "alpha-crown": "branching:AlphaCrown",
    "branch-and-bound": "branching:BranchAndBound",
}
"""module and class in `holdfast.certifiers` of each method of certification, which the option `--method` selects"""
LATE: Final = ("alpha-crown", "branch-and-bound")
"""methods that are run on the examples that survive the attacks; the others are run before the attacks"""
CASCADE: Final = ("ibp", "crown", "branch-and-bound")
"""methods that `auto` runs, in their order; the attacks are run after the quick ones. Branch and bound begins with
optimised slopes, as alpha-CROWN does, and respects the time limit"""

DOUBTS: Final = (
    "zero-gradient", "probabilities", "scale", "one-step", "black-box", "noise", "not-exhausted", "transfer",
    "whole-box", "randomness", "state", "loss-spread", "shattered", "nan", "chance", "constant", "input",
    "fine-tuning", "odd-gradients",
)  # fmt: skip
"""names of the doubts, in the order of reports; each has a module in `holdfast.doubts`"""

DRIFT_TESTS: Final[Mapping[str, str]] = {
    "martingale": "stream_tests:ConformalMartingale",
    "ks": "stream_tests:KolmogorovSmirnov",
    "mmd": "stream_tests:MMD",
    "adwin": "stream_tests:AdwinTest",
    "page-hinkley": "stream_tests:PageHinkleyTest",
}
"""module and class in `holdfast.monitoring` of each test of a stream, in the order of reports"""

SAMPLE_TESTS: Final = ("copies", "repeats")
"""further tests of a stream of generated samples, in `holdfast.monitoring.stream_tests`"""

Arithmetic = Literal["exact", "float32"]
"""arithmetic about which a certificate is: `exact` for the network in exact arithmetic with its stored weights, or
`float32` for the network as it is computed in float32, in any order of summation"""
BY_OPERATIONS: Final = ("ibp", "crown-ibp", "crown", "alpha-crown", "branch-and-bound")
"""methods that bound the operations of a network one after another"""
PROVERS_OF_TASKS: Final[Mapping[TaskName, tuple[str, ...]]] = {
    "segmentation": ("ibp", "crown-ibp", "crown"),
    "detection": (),
    "regression": BY_OPERATIONS,
    "multilabel": BY_OPERATIONS,
}
"""methods that certify models with another task than classes; `auto` runs those that it runs for classes, without
`ibp`, whose intervals of numbers are wide"""

BUNDLED: Final[Mapping[str, Mapping[str, str]]] = {
    "attacks": {name: f"holdfast.attacks.{entry.module}:{name}" for name, entry in ATTACKS.items()},
    "certifiers": {name: f"holdfast.certifiers.{path}" for name, path in PROVERS.items()},
    "detectors": {
        "energy": "holdfast.guard.detectors.outputs:Energy",
        "squeezing": "holdfast.guard.detectors.outputs:FeatureSqueezing",
        "mahalanobis": "holdfast.guard.detectors.outputs:Mahalanobis",
        "stability": "holdfast.guard.detectors.outputs:NoiseStability",
    },
    "doubts": {name: f"holdfast.doubts.{name.replace('-', '_')}:TEST" for name in DOUBTS},
    "recipes": {name: f"holdfast.recipes.{entry.module}:{entry.cls}" for name, entry in RECIPES.items()},
    # each module is named after a file suffix
    "reports": {
        f".{module.name}": f"holdfast.reports.formats.{module.name}:render"
        for module in iter_modules([str(Path(__file__).parents[1] / "reports" / "formats")])
    },
}
"""objects of Holdfast by kind and name, each with its module and attribute; detectors are in the order in which a guard
evaluates them"""


REPORT_FILE: Final = (
    f"Report file, in the format of its suffix: {' '.join(BUNDLED['reports'])}; - for JSON on stdout."
)
"""help of the option for the files of reports"""


def names(kind: str) -> tuple[str, ...]:
    """Return the names of all attacks, doubts or objects of another kind: those of Holdfast, followed by those of other
    packages in the entry-point group `holdfast.KIND`. No other package can replace one of Holdfast.
    """
    return (*BUNDLED[kind], *_added(kind))


def load(kind: str, name: str, cls: type[T]) -> T:
    """Import and return the object with a name that `names` lists.

    Raises `UsageError` if an object of another package cannot be imported, or is not an instance of `cls`.
    """
    if name in BUNDLED[kind]:
        module, _, attribute = BUNDLED[kind][name].partition(":")
        bundled: T = getattr(import_module(module), attribute)
        return bundled
    point = _added(kind)[name]
    try:
        added = point.load()
    except Exception as error:  # code of another package may raise anything
        raise foreign(kind, name, f"cannot be imported ({type(error).__name__}: {error})") from error
    if not isinstance(added, cls):
        expected = f"{cls.__module__}.{cls.__qualname__}"
        raise foreign(kind, name, f"is {added!r}; expected an instance of {expected}")
    return added


def foreign(kind: str, name: str, fault: str) -> UsageError:
    """Return the error for an entry point of another package."""
    return UsageError(
        f"the entry point {name!r} of the group holdfast.{kind} {fault}; correct or uninstall the package that "
        "registers it"
    )


def _added(kind: str) -> dict[str, EntryPoint]:
    points = _installed(tuple(sys.path))
    return {
        point.name: point
        for point in points
        if point.group == f"holdfast.{kind}" and point.name not in BUNDLED[kind]
    }


@lru_cache(1)
def _installed(path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    # read once for a search path, because the files of all installed packages are opened
    points = entry_points()
    return tuple(point for kind in BUNDLED for point in points.select(group=f"holdfast.{kind}"))


def load_class(package: str, modules: Mapping[str, str], name: str) -> type[Any]:
    """Import the class `name` of a package when it is first used, and return it. `modules` maps class names to module
    names.

    Raises `AttributeError` if the name is unknown.
    """
    if name not in modules:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    loaded: type[Any] = getattr(import_module(f"{package}.{modules[name]}"), name)
    return loaded
