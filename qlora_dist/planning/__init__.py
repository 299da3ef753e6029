"""`qlora-dist plan`: what a run needs, before it starts. config -> config.json -> plan -> table, JSON, simulation.

    source    where config.json comes from; shapes by arithmetic, or measured for families that are not listed
    table     the plan as text
    simulate  the same step by the real code under fake tensors
    live      bytes alive by category

Imports torch only for `--simulate` and for families that `memory.shapes` does not list.
"""

from .command import run_plan_command
from .source import read_shapes

__all__ = ["read_shapes", "run_plan_command"]
