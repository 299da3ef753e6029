"""Whether two cells do the same work: constants of the update, documents, first loss and first gradients."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

# for every engine: AdamW with torch's defaults and fp32 states, constant learning rate, no weight decay
LR, MAX_GRAD_NORM = 2e-4, 0.3
SAME_COSINE = 0.999
SAME_LOSS = 0.02  # relative: bf16 logits and sums differ between engines; different tokens would differ by far more


def read_documents(folder: Path) -> list[dict[str, list[int]]]:
    """The lines of tokens.jsonl."""
    with (folder / "tokens.jsonl").open() as file:
        return [json.loads(line) for line in file]


def sample_gradients(parameters: dict[str, torch.nn.Parameter], per_tensor: int = 4096) -> dict[str, torch.Tensor]:
    """Evenly spaced elements of each gradient, fp32 on the host: enough for a cosine, small for any model."""
    found = {}
    for name, parameter in parameters.items():
        if parameter.grad is None:
            continue
        flat = parameter.grad.detach().reshape(-1)
        found[name] = flat[:: max(1, flat.numel() // per_tensor)].to("cpu", torch.float32, copy=True)
    return found


def cosine(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Cosine of all gradients as one vector, fp64. NaN if the tensors differ in names or shapes, or all are zero."""
    if left.keys() != right.keys() or any(left[name].shape != right[name].shape for name in left):
        return math.nan
    dot = a = b = 0.0
    for name in left:
        x, y = left[name].double(), right[name].double()
        dot += float(x @ y)
        a += float(x @ x)
        b += float(y @ y)
    return dot / math.sqrt(a * b) if a > 0 and b > 0 else math.nan


def compare(
    reference: dict[str, Any],
    result: dict[str, Any],
    reference_gradients: dict[str, torch.Tensor],
    gradients: dict[str, torch.Tensor],
) -> dict[str, Any]:
    """Whether a cell did the reference's work, by loss and gradients of the first step."""
    if not reference_gradients or not gradients:  # from an earlier run, whose gradients are gone
        return {
            "reference": reference["name"],
            "gradient_cosine": None,
            "relative_loss_difference": None,
            "is_same": None,
        }
    similarity = cosine(reference_gradients, gradients)
    ours, theirs = reference["first_loss"], result["first_loss"]
    difference = abs(theirs - ours) / abs(ours) if ours and theirs is not None else math.nan
    return {
        "reference": reference["name"],
        "gradient_cosine": None if math.isnan(similarity) else similarity,
        "relative_loss_difference": None if math.isnan(difference) else difference,
        "is_same": similarity > SAME_COSINE and difference < SAME_LOSS,
    }
