"""The last norm and the loss."""

from __future__ import annotations

from dataclasses import dataclass

from .layers import LayerSettings, LayerTape
from .shapes import ModelShapes

CHUNK_BYTES = 512 * 2**20  # model.loss.CHUNK_BYTES["cuda"]


@dataclass(frozen=True)
class HeadBytes:
    """What stands between the last layer and the loss."""

    saved: int  # the last norm's tensors and the gradient of the hidden states, from the loss on
    peak: int  # during the loss, with what is saved
    logits: int  # of them: one chunk of fp32 logits and what is made of it


def head_bytes(shapes: ModelShapes, tokens: int, compute_size: int, chunk_bytes: int = CHUNK_BYTES) -> HeadBytes:
    """The last norm, then `model.loss.nll_sum` with every token a label (a row may hold nothing else)."""
    row = tokens * shapes.hidden * compute_size
    settings = LayerSettings(tokens, compute_size)
    writer = LayerTape(shapes, settings)
    hidden = writer._norm(writer.start)
    normed = writer.tape.saved.total - hidden.size + (row if writer.start.refs > 1 else 0)
    chunk = min(tokens, max(1, chunk_bytes // (4 * shapes.vocabulary)))
    logits = 4 * chunk * shapes.vocabulary
    # logsumexp makes one copy of the logits; a cap on them keeps its slope as well
    extra = logits * (3 if shapes.caps_logits else 2)
    # hidden states, those with a label, and their gradient
    return HeadBytes(normed + row, normed + 3 * row + extra, extra)
