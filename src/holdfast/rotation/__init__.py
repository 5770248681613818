"""Generate to Defend: train parameter sets, learn their distribution, generate new sets, immunise them and swap the
serving set.
"""

from holdfast.rotation.codec import Codec, Embedding
from holdfast.rotation.collecting import Basins, LowRank, Seeds, Source, Subset, Task, collect
from holdfast.rotation.distilling import Distilled
from holdfast.rotation.generating import Generator, LatentDiffusion
from holdfast.rotation.immunising import Crafting, Immunise, chain
from holdfast.rotation.live import Live, canary, churn, loaded, next_set
from holdfast.rotation.parameter_sets import Members, put, weights_of
from holdfast.rotation.rotating_model import Answers, RotatingModel
from holdfast.rotation.triggers import AnswersPerPrincipal, Elapsed, Watch, refuse_faster

__all__ = [
    "Answers",
    "AnswersPerPrincipal",
    "Basins",
    "Codec",
    "Crafting",
    "Distilled",
    "Elapsed",
    "Embedding",
    "Generator",
    "Immunise",
    "LatentDiffusion",
    "Live",
    "LowRank",
    "Members",
    "RotatingModel",
    "Seeds",
    "Source",
    "Subset",
    "Task",
    "Watch",
    "canary",
    "chain",
    "churn",
    "collect",
    "loaded",
    "next_set",
    "put",
    "refuse_faster",
    "weights_of",
]
