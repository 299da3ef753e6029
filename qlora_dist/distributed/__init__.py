"""Who this process is among the ranks, and what ranks do together: World, and the parts that it is made of.

The only module that imports accelerate and the collectives of torch.distributed, and that reads what a launcher says.
"""

from .launcher import child_environment, launched_job, require_own_strategy
from .reducer import GradientReducer
from .shards import ShardGroup
from .world import World, own_device

__all__ = [
    "GradientReducer",
    "ShardGroup",
    "World",
    "child_environment",
    "launched_job",
    "own_device",
    "require_own_strategy",
]
