"""Generate to Defend: collect parameter sets, learn their distribution, draw fresh ones, and immunise them."""

from holdfast.rotation.alignment import all_aligned
from holdfast.rotation.codec import Codec, Embedding
from holdfast.rotation.collecting import Basins, LowRank, Seeds, Source, Subset, Task, Trajectory, collect
from holdfast.rotation.generating import Generator, LatentDiffusion
from holdfast.rotation.immunising import Crafting, Immunise, chain
from holdfast.rotation.members import Members, put, weights_of

__all__ = [
    "Basins",
    "Codec",
    "Crafting",
    "Embedding",
    "Generator",
    "Immunise",
    "LatentDiffusion",
    "LowRank",
    "Members",
    "Seeds",
    "Source",
    "Subset",
    "Task",
    "Trajectory",
    "all_aligned",
    "chain",
    "collect",
    "put",
    "weights_of",
]
