"""The run's own checks: each failure that is silent elsewhere ends a run here, with its name."""

from __future__ import annotations

import torch

from .errors import RunFailed


def check_first_update(model: torch.nn.Module) -> None:
    """After the first update every LoRA B has left zero. Raises RunFailed naming those that have not.

    A B that stays zero gets no gradient: its layer is not in the graph (frozen by mistake, skipped, detached), and
    would be saved as an adapter that does nothing. Experts of a mixture may rightly be without tokens in one step.
    """
    # one sync for all of them
    names = [name for name, _ in model.named_parameters() if "lora_B" in name and "expert" not in name]
    if not names:
        return
    parameters = dict(model.named_parameters())
    moved = torch.stack([parameters[name].detach().any() for name in names]).tolist()
    dead = [name for name, has_moved in zip(names, moved) if not has_moved]
    if dead:
        raise RunFailed(
            f"after the first update {len(dead)} of {len(names)} LoRA B matrices are still zero, such as {dead[0]}: "
            "these layers got no gradient. Leave them out of lora.target_modules, or report the model family"
        )
