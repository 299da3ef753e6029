"""The trained model's logits on a few samples, kept with its adapter: what a merged model is compared with.

They are computed when training ends, by the run's own model: a base that was sharded over ranks need not fit onto the
one device that merges it later.

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError
from ..files import sha256
from .forward import packed_documents
from .lora_files import read_adapter_config, require_weights, scale_of

log = logging.getLogger(__name__)

NUM_SAMPLES, SAMPLE_TOKENS = 4, 32  # 65 MB for a vocabulary of 128k
ADAPTER = "adapter"  # in the file's metadata: whose logits they are


@dataclass(frozen=True)
class Reference:
    """Samples and the trained model's logits for each, (T, V) fp32 on the CPU."""

    samples: list[list[int]]
    logits: list[Tensor]

    def save(self, path: Path, adapter: Path) -> None:
        """Writes them as those of the adapter in the folder `adapter`."""
        tensors = {f"logits.{index}": one for index, one in enumerate(self.logits)}
        tensors |= {f"ids.{index}": torch.tensor(one) for index, one in enumerate(self.samples)}
        save_file(tensors, path, metadata={ADAPTER: _digest(adapter)})

    @classmethod
    def load(cls, path: Path, adapter: Path) -> Reference | None:
        """None, which is logged, when the file is damaged or of another adapter than the one in the folder."""
        try:
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get(ADAPTER) != _digest(adapter):
                    log.info("%s: the logits of another adapter than %s", path, adapter)
                    return None
                count = sum(key.startswith("ids.") for key in file.keys())  # noqa: SIM118  (no mapping)
                found = [[file.get_tensor(f"{kind}.{index}") for index in range(count)] for kind in ("ids", "logits")]
        except (SafetensorError, OSError, UserError) as error:
            log.warning("%s cannot be read (%s): the trained model is loaded to compute its logits", path, error)
            return None
        ids, logits = found
        if not ids or any(a.ndim != 1 or b.ndim != 2 or len(a) != len(b) for a, b in zip(ids, logits, strict=True)):
            log.warning("%s has another form than expected: the trained model is loaded to compute its logits", path)
            return None
        return cls([one.tolist() for one in ids], [one.float() for one in logits])


def _digest(adapter: Path) -> str:
    """Of what the adapter in a folder adds to its base."""
    return f"{sha256(require_weights(adapter))} {scale_of(read_adapter_config(adapter))}"


@torch.no_grad()
def compute_reference(
    samples: Sequence[Sequence[int]], logits: Callable[..., Tensor], device: torch.device
) -> Reference:
    """`logits`: a packed batch -> (T, V). Called by all ranks together, with the same samples."""
    batches = [packed_documents(torch.tensor(one, device=device), (len(one),)) for one in samples]
    return Reference([list(one) for one in samples], [logits(batch).float().cpu() for batch in batches])
