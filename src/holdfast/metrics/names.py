"""Names and definitions of all metrics. The module does not import torch, so that an unknown metric in a gate is
refused immediately.
"""

from typing import Final, get_args

from holdfast.core.names import CorruptionName, TaskName

CORRUPTIONS: Final[tuple[CorruptionName, ...]] = get_args(CorruptionName)[:15]
"""names of the common corruptions that are measured, as in their paper"""

PERCENTS: Final = ("5", "1", "0.1")
"""false positive rates in percent at which a detector is measured"""


def at_percent(name: str, percent: str) -> str:
    """Return the name of a metric at a false positive rate in percent, as in `detection_rate_at_0_1_percent`."""
    return f"{name}_at_{percent.replace('.', '_')}_percent"


DETECTION: Final[dict[str, str]] = {
    "detection_auroc": (
        "probability that an attacked input has a higher score than a clean one, for attacks that know the "
        "detector"
    ),
    **{
        at_percent("detection_rate", percent): (
            f"share of attacked inputs that the detector rejects at a threshold at which it rejects {percent} % of "
            "the clean ones, for attacks that know the detector"
        )
        for percent in PERCENTS
    },
    "oblivious_detection_auroc": "the same probability, for attacks that do not know the detector",
    **{
        at_percent("oblivious_detection_rate", percent): (
            f"share of attacked inputs that the detector rejects at a threshold at which it rejects {percent} % of "
            "the clean ones, for attacks that do not know the detector"
        )
        for percent in PERCENTS
    },
    **{
        at_percent("accepted_right", percent): (
            "share accepted and correct when clean, and under attack never accepted and wrong, at a threshold "
            f"that rejects {percent} % of the clean inputs"
        )
        for percent in PERCENTS
    },
    **{
        at_percent("accepted_wrong", percent): (
            f"share accepted and wrong, clean or attacked, at a threshold that rejects {percent} % of the clean "
            "inputs"
        )
        for percent in PERCENTS
    },
}
"""descriptions of the metrics for the detector of a model that rejects inputs, by name"""

TASKS: Final[dict[TaskName, dict[str, str]]] = {
    "segmentation": {
        "miou": "mean intersection over union of the classes over all pixels, on the worst case of each image",
        "clean_miou": "the same on clean images",
        "pixel_accuracy": "share of all pixels with the right class, on the worst case of each image",
        "clean_pixel_accuracy": "the same on clean images",
        "worst_class_iou": "smallest IoU over the classes on the worst case, with Bonferroni's correction",
        "image_iou": "mean over the images of the mean IoU of their classes, on the worst case",
        "certified_pixel_accuracy": (
            "share of all pixels of which it is proved that they have the right class for every input of the threat "
            "model, a lower bound of the pixel accuracy"
        ),
    },
    "detection": {
        "ap50": "average precision at IoU 0.5, mean over the classes, on the worst case of each image (COCO)",
        "clean_ap50": "the same on clean images",
        "ap": "mean of the average precisions at IoU 0.5, 0.55, …, 0.95, on the worst case of each image (COCO)",
        "clean_ap": "the same on clean images",
        "object_recall": (
            "share of the objects found with a score and an IoU of at least 0.5, on the worst case of each image; "
            "object_recall@32 counts objects of at least 32 x 32 pixels"
        ),
        "clean_object_recall": "the same on clean images",
        "worst_class_recall": "smallest object recall over the classes on the worst case, with Bonferroni's correction",
    },
    "regression": {
        "within_tolerance": "share of examples within the tolerance when clean and under every attack",
        "mean_absolute_error": "mean absolute error in the units of the targets, on the worst case of each example",
        "clean_mean_absolute_error": "the same on clean inputs",
        "certified_mean_absolute_error": (
            "mean of the largest error that the proved interval of each output allows, an upper bound of the mean "
            "absolute error for every input of the threat model; infinite if nothing is proved about an example"
        ),
    },
    "multilabel": {
        "label_accuracy": "share of the labels of all examples that are right, on the worst case of each example",
        "clean_label_accuracy": "the same on clean inputs",
        "certified_label_accuracy": (
            "share of the labels of all examples of which it is proved that they are right for every input of the "
            "threat model"
        ),
        "label_recall": "mean over the labels of the share of their examples that get them, on the worst case",
        "clean_label_recall": "the same on clean inputs",
        "worst_label_recall": "smallest recall over the labels on the worst case, with Bonferroni's correction",
    },
}
"""descriptions of the metrics of models with another task than classes, by task and name"""

OF_TASKS: Final = {name: about for metrics in TASKS.values() for name, about in metrics.items()}
"""descriptions of these metrics by name"""

METRICS: Final[dict[str, str]] = {
    **OF_TASKS,
    "clean_accuracy": "share of examples classified correctly when clean",
    "clean_error_rate": "one minus the clean accuracy",
    "rejection_rate": "share of clean inputs that a model with a detector rejects",
    **DETECTION,
    "robust_accuracy": "share of all examples that are correct when clean and under every attack and pass",
    "suite_robust_accuracy": "the same under the attacks of the suite only, for comparison with published numbers",
    "certified_accuracy": (
        "share of all examples for which it is proved that no input of the threat model is misclassified, a lower "
        "bound of the robust accuracy"
    ),
    "robust_error_rate": "one minus the robust accuracy",
    "robustness_score": "harmonic mean of clean and robust accuracy",
    "worst_class": "smallest robust accuracy over the classes, with Bonferroni's correction",
    "worst_group": (
        "smallest robust accuracy over the groups of at least 30 examples, with Bonferroni's correction; the interval "
        "begins at 0 if a group is smaller"
    ),
    "attack_success_rate": "share of the examples correct when clean that an attack broke",
    "targeted_success_rate": "share of eligible examples that an attack changed to the target class",
    "trigger_success_rate": (
        "share of the examples of other classes that are assigned to the target class of a trigger, or without a "
        "target share of all examples whose class the trigger changes"
    ),
    "transfer_success": "share of the examples correct when clean that examples computed on the surrogates break",
    "perturbed_share": "share of all examples that an attack broke (those that the mean perturbations are over)",
    "perturbation_linf": "median over all examples of the largest change found, infinite if none was found",
    "perturbation_l2": "median over all examples of the Euclidean length found, infinite if none was found",
    "perturbation_l1": "median over all examples of the summed change found, infinite if none was found",
    "perturbation_l0": (
        "median over all examples of the number of changed values found, infinite if none was found; of changed "
        "pixels if the threat model counts pixels (l0:2px, patch)"
    ),
    "mean_perturbation_linf": "mean largest change over the broken examples",
    "mean_perturbation_l2": "mean Euclidean length over the broken examples",
    "mean_perturbation_l1": "mean summed change over the broken examples",
    "mean_perturbation_l0": (
        "mean number of changed values over the broken examples; of changed pixels if the threat model counts "
        "pixels (l0:2px, patch)"
    ),
    "robust_margin": "median of the smallest perturbation found by minimum-norm attacks, an upper bound",
    "adversarial_radius": "largest eps at which robust accuracy is at least half of clean accuracy",
    "precision": "macro precision on clean inputs",
    "recall": "macro recall on clean inputs",
    "f1": "macro F1 on clean inputs",
    "attacked_precision": "macro precision on attacked inputs",
    "attacked_recall": "macro recall on attacked inputs",
    "attacked_f1": "macro F1 on attacked inputs",
    "defensive_entropy": "mean predictive entropy on attacked inputs, in nats",
    "defensive_entropy_rise": "mean increase of the predictive entropy from clean to attacked inputs, in nats",
    "defensive_margin": "mean decrease of the margin in probability from clean to attacked inputs",
    "calibration_error": "expected calibration error on clean inputs",
    "attacked_calibration_error": "expected calibration error on attacked inputs",
    "corruption_error_rate": "mean error rate over the common corruptions",
    "worst_corruption": "smallest accuracy over the common corruptions, with Bonferroni's correction",
    **{f"{name}_accuracy": f"share correct under {name.replace('_', ' ')}" for name in CORRUPTIONS},
    "mce": "mean corruption error (mCE): mean over the common corruptions of the error rate over the baseline's",
    "regression": "robust accuracy of the baseline minus this one, on the same examples",
    "clean_accuracy_drop": "clean accuracy of the baseline minus this one, on the same examples",
}
"""description of every metric of runs, by name"""

ROTATION: Final[dict[str, str]] = {
    "ensemble_transfer": (
        "share of the examples correct when clean that examples computed on several stolen sets break"
    ),
    "sibling_transfer": "the same for examples computed on other sets of the same draw",
    "churn": "share of clean examples that two parameter sets classify differently",
}
"""descriptions of the metrics of parameter sets of a pool, by name; `rotate admit` measures them, and no assessment
does"""

OF_STATIC: Final = frozenset({"transfer_success", "ensemble_transfer", "sibling_transfer"})
"""metrics whose threshold may be given relative to their value for a static model: `of static`"""

OF_ANY_TASK: Final = frozenset(
    {
        "clean_accuracy",
        "clean_error_rate",
        "robust_accuracy",
        "suite_robust_accuracy",
        "robust_error_rate",
        "robustness_score",
        "certified_accuracy",
        "worst_group",
        "attack_success_rate",
        "perturbed_share",
        *(f"perturbation_{norm}" for norm in ("linf", "l2", "l1", "l0")),
        *(f"mean_perturbation_{norm}" for norm in ("linf", "l2", "l1", "l0")),
        "robust_margin",
        "adversarial_radius",
        "regression",
        "clean_accuracy_drop",
    }
)
"""metrics of models of classes that models with another task have, too: an example counts as correct under a
condition of the task
"""

AT_EPS: Final = frozenset(
    {
        "object_recall",
        "certified_accuracy",
        "robust_accuracy",
        "robust_error_rate",
        "robustness_score",
        "worst_class",
        "worst_group",
        "attack_success_rate",
        "perturbed_share",
    }
)
"""metrics that can be computed at another eps, as in `robust_accuracy@4/255`"""

UPPER_BOUNDS: Final = frozenset(
    {
        "robust_accuracy",
        "suite_robust_accuracy",
        "robustness_score",
        "worst_class",
        "worst_group",
        *(f"perturbation_{norm}" for norm in ("linf", "l2", "l1", "l0")),
        "robust_margin",
        "adversarial_radius",
        *(name for name in OF_TASKS if not name.startswith(("clean_", "certified_"))),
    }
) - {"mean_absolute_error"}
"""metrics that stronger attacks can only decrease"""

LOWER_BOUNDS: Final = frozenset(
    {
        "robust_error_rate",
        "attack_success_rate",
        "targeted_success_rate",
        "transfer_success",
        "perturbed_share",
        "mean_absolute_error",
    }
)
"""metrics that stronger attacks can only increase"""

PROVED: Final = frozenset(
    {
        "certified_accuracy",
        "certified_pixel_accuracy",
        "certified_mean_absolute_error",
        "certified_label_accuracy",
    }
)
"""metrics that consist of proofs, which stronger attacks do not change"""

PERTURBATIONS: Final = tuple(f"perturbation_{norm}" for norm in ("linf", "l2", "l1", "l0"))
"""metrics that are medians of the smallest perturbations found"""

NOT_SHARES: Final = frozenset(
    {
        *PERTURBATIONS,
        *(f"mean_{name}" for name in PERTURBATIONS),
        "robust_margin",
        "adversarial_radius",
        "defensive_entropy",
        "defensive_entropy_rise",
        "defensive_margin",
        "mce",
        "mean_absolute_error",
        "clean_mean_absolute_error",
        "certified_mean_absolute_error",
    }
)
"""metrics that are not proportions, so that reports do not show them in percent"""

OF_EPS: Final = frozenset({"robust_margin", "adversarial_radius"})
"""metrics that are sizes of changes in the unit of eps"""

PAIRED: Final = frozenset({"regression", "clean_accuracy_drop", "mce"})
"""metrics of two runs on the same examples, as in `regression <= 0.01 vs baseline`"""

IMPROVEMENT: Final = "improvement"
"""name of the difference between the model after a training and the given one in the metric of the recipe, which is
positive if the new model is better"""

SHARES: Final = {*METRICS, *ROTATION} - NOT_SHARES - PAIRED
"""metrics between 0 and 1, for which a gate such as `robust_accuracy >= 40` is refused"""

DIFFERENCES: Final = PAIRED - {"mce"}
"""metrics of two runs that have values between -1 and 1"""
