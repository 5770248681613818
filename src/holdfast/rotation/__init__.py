"""Generate to Defend: train parameter sets, learn their distribution, generate new sets, immunise them and swap the
serving set.

A name is imported when it is first used, so that a step that reads only the ledger of a pool does not import torch.
"""

from typing import TYPE_CHECKING, Any

from holdfast.core.catalogue import load_class

if TYPE_CHECKING:
    from holdfast.rotation.collecting import Basins as Basins
    from holdfast.rotation.collecting import LowRank as LowRank
    from holdfast.rotation.collecting import Members as Members
    from holdfast.rotation.collecting import Seeds as Seeds
    from holdfast.rotation.collecting import Source as Source
    from holdfast.rotation.collecting import Subset as Subset
    from holdfast.rotation.collecting import Task as Task
    from holdfast.rotation.collecting import collect as collect
    from holdfast.rotation.collecting import put as put
    from holdfast.rotation.collecting import weights_of as weights_of
    from holdfast.rotation.generating import Codec as Codec
    from holdfast.rotation.generating import Embedding as Embedding
    from holdfast.rotation.generating import Generator as Generator
    from holdfast.rotation.generating import LatentDiffusion as LatentDiffusion
    from holdfast.rotation.immunising import Crafting as Crafting
    from holdfast.rotation.immunising import Distilled as Distilled
    from holdfast.rotation.immunising import Immunise as Immunise
    from holdfast.rotation.immunising import chain as chain
    from holdfast.rotation.rotating_model import Answers as Answers
    from holdfast.rotation.rotating_model import AnswersPerPrincipal as AnswersPerPrincipal
    from holdfast.rotation.rotating_model import Elapsed as Elapsed
    from holdfast.rotation.rotating_model import Live as Live
    from holdfast.rotation.rotating_model import RotatingModel as RotatingModel
    from holdfast.rotation.rotating_model import Watch as Watch
    from holdfast.rotation.rotating_model import canary as canary
    from holdfast.rotation.rotating_model import churn as churn
    from holdfast.rotation.rotating_model import loaded as loaded
    from holdfast.rotation.rotating_model import refuse_faster as refuse_faster
    from holdfast.rotation.steps.serving_set import next_set as next_set

_MODULES = {
    **dict.fromkeys(("Basins", "LowRank", "Seeds", "Source", "Subset", "Task", "collect"), "collecting"),
    "Distilled": "immunising",
    **dict.fromkeys(("Codec", "Embedding", "Generator", "LatentDiffusion"), "generating"),
    **dict.fromkeys(("Crafting", "Immunise", "chain"), "immunising"),
    **dict.fromkeys(("Members", "put", "weights_of"), "collecting"),
    **dict.fromkeys(("Answers", "Live", "RotatingModel", "canary", "churn", "loaded"), "rotating_model"),
    "next_set": "steps.serving_set",
    **dict.fromkeys(("AnswersPerPrincipal", "Elapsed", "Watch", "refuse_faster"), "rotating_model"),
}
__all__ = sorted(_MODULES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    return load_class(__name__, _MODULES, name)


def __dir__() -> list[str]:
    return __all__
