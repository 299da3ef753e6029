"""Is there something to learn, and was it learned? Labels and end tokens before the model is read, adapters after."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from ...data.documents import Documents
from ...data.packing import Rows, hashed_order
from ...data.templates import control_tokens
from ...errors import RunFailed, UserError, printable
from ...model.lora import is_own_expert

INSPECTED = 1000  # documents of each source whose end tokens are looked for


def check_every_step_has_labels(
    documents: Documents, rows: Rows, rows_of_step: Callable[[int], np.ndarray], num_steps: int
) -> None:
    """Raises UserError when a step of the run has no label: nothing would be learned from it."""
    labels = rows.sum_by_row(documents.num_labels)  # (R,)
    if labels.min() > 0:
        return
    if not labels.any():
        raise UserError(
            f"none of the {len(documents):,} training documents has a label: nothing would be learned. Inspect them "
            "with qlora-dist data CONFIG, and set data.learn or the labels of your token files"
        )
    for step in range(num_steps):
        if not labels[rows_of_step(step)].any():
            raise UserError(
                f"the rows of step {step + 1} have no label ({int((labels == 0).sum()):,} of {len(rows):,} rows have "
                "none): that step would learn nothing. Drop documents without labels, or raise batch.rows_per_step"
            )


def check_ends_are_learned(documents: Documents, tokenizer: Any, seed: int = 0) -> None:
    """Raises UserError when no answer of a source ends in a learned end token: the model would not learn to stop.

    An end token is a special or added token of the tokenizer (EOS, <|im_end|>, <|eot_id|>) at the end of learned
    tokens, perhaps with a line break after it. Plain text is exempt: `data.documents` appends its EOS, and a text that
    is split at data.row_tokens correctly has none.
    """
    control = control_tokens(tokenizer)
    order = hashed_order(len(documents), seed)
    lacking = []
    for index, source in enumerate(documents.stats.sources):
        inspected = order[documents.source_of[order] == index][:INSPECTED]
        if source.format == "text" or not len(inspected):
            continue
        examples = (documents[int(document)] for document in inspected)
        if not any(any(control.learned_ends(one.input_ids, one.is_label)) for one in examples):
            cut = f" ({source.truncated:,} are truncated at data.row_tokens)" if source.truncated else ""
            lacking.append(f"  {source.path}: none of {len(inspected):,} documents inspected{cut}")
    if lacking:
        raise UserError(
            "an end token (EOS, end of turn) is never a label, so the model would not learn to stop:\n"
            + "\n".join(lacking)
            + f"\nexpected a special token of the tokenizer, such as {tokenizer.eos_token}, at the end of an answer. "
            "Use a data.template whose end of turn is a token of this tokenizer (alpaca, vicuna, zephyr end in EOS), "
            "raise data.row_tokens where documents are truncated, or set data.require_eos=false if this is intended"
        )


def check_ids(documents: Documents, tokenizer: Any, vocab_size: int) -> None:
    """Raises UserError when the data hold ids that the model has no row for in its embedding.

    `vocab_size`: rows of the embedding. The tokens are read only where the tokenizer knows such ids at all.
    """
    if max(tokenizer.get_vocab().values(), default=0) < vocab_size or (largest := documents.largest_id) < vocab_size:
        return
    raise UserError(
        f"the training data hold token {largest} ({printable(str(tokenizer.convert_ids_to_tokens(largest)))}), but the "
        f"model's embedding has {vocab_size:,} rows (vocab_size in config.json): the tokenizer was extended and the "
        "model was not. Use the tokenizer that belongs to this model, or a model whose embedding was resized for it"
    )


def check_first_update(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """After the first update no LoRA B may be zero. Raises RunFailed naming those that are.

    A B that stays zero gets no gradient: its layer is not in the graph (frozen by mistake, skipped, detached), and
    would be saved as an adapter without effect. Experts of a mixture that are layers of their own are exempt: one step
    may bring them no tokens. Stacked ones have one B, which some token reaches in any step.
    """
    found = {name: weight.detach().any() for name, weight in weights if "lora_B" in name and not is_own_expert(name)}
    if not found:
        return
    names, moved = list(found), torch.stack(list(found.values())).tolist()  # one device sync for all of them
    dead = [name for name, has_moved in zip(names, moved) if not has_moved]
    if dead:
        raise RunFailed(
            f"after the first update {len(dead)} of {len(names)} LoRA B matrices are still zero, such as {dead[0]}: "
            "these layers got no gradient. Leave them out of lora.target_modules, or report the model family"
        )
