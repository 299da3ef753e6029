"""One tokenized data set on disk that every method of a run reads, and the documents of each of its steps.

Real instructions (an Alpaca file and a real tokenizer of the model's vocabulary size) where available; otherwise random
ids with Alpaca-like lengths, or rows that one document fills. tokens.jsonl has `input_ids` and `labels` on each line.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qlora_dist.config import SourceConfig
from qlora_dist.data.documents import build_documents
from qlora_dist.data.loader import Loader
from qlora_dist.data.packing import Rows, pack_best_fit
from qlora_dist.data.tokenizer import load_tokenizer

from .provenance import ROOT

NUM_DOCUMENTS = 2000


@dataclass(frozen=True)
class DatasetFacts:
    """Facts about the data. `fill`: share of slots that hold a token, packed, or with each document padded to a row."""

    kind: str
    num_documents: int
    num_tokens: int
    num_labels: int
    row_tokens: int
    packed_fill: float
    padded_to_row_fill: float


def shared_data() -> Path | None:
    """Folder of real samples: QLORA_DIST_SHARED, or a folder `shared` next to the checkout."""
    folder = Path(os.environ.get("QLORA_DIST_SHARED", ROOT.parent / "shared")) / "data"
    return folder if folder.is_dir() else None


def write_tokenizer(folder: Path, vocabulary: int) -> bool:
    """Writes a tokenizer of this vocabulary size to a model folder. Returns whether it is a real one."""
    real = shared_data()
    if vocabulary == 4096 and real is not None and (real / "models" / "tinybase6m" / "tokenizer.json").exists():
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(real / "models" / "tinybase6m" / name, folder / name)
        return True
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, vocabulary)}}
    core = Tokenizer(models.WordLevel(words, unk_token="w3"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="w3"
    ).save_pretrained(folder)
    return False


def write_dataset(folder: Path, model: Path, *, kind: str, row_tokens: int, vocabulary: int) -> DatasetFacts:
    """Writes tokens.jsonl. kind: alpaca (real, or random ids of the same lengths), drawn (random), or full (rows)."""
    folder.mkdir(parents=True, exist_ok=True)
    facts_file = folder / "facts.json"
    if facts_file.exists():
        return DatasetFacts(**json.loads(facts_file.read_text()))
    documents = _real_documents(folder, model, row_tokens, vocabulary) if kind == "alpaca" else None
    if documents is None:
        kind = "full rows of random ids" if kind == "full" else "random ids, Alpaca-like lengths"
        end = load_tokenizer(str(model)).eos_token_id
        documents = _drawn_documents(row_tokens, vocabulary, end, is_full=kind.startswith("full"))
    else:
        kind = "Stanford Alpaca"
    with (folder / "tokens.jsonl").open("w") as file:
        for ids, labels in documents:
            file.write(json.dumps({"input_ids": ids, "labels": labels}) + "\n")
    lengths = np.array([len(ids) for ids, _ in documents], dtype=np.int32)
    rows = pack_best_fit(lengths, row_tokens, 0)
    facts = DatasetFacts(
        kind=kind,
        num_documents=len(documents),
        num_tokens=int(lengths.sum()),
        num_labels=sum(label != -100 for _, labels in documents for label in labels),
        row_tokens=row_tokens,
        packed_fill=rows.efficiency,
        padded_to_row_fill=float(lengths.mean() / row_tokens),
    )
    facts_file.write_text(json.dumps(asdict(facts)))
    return facts


def _real_documents(folder: Path, model: Path, row_tokens: int, vocabulary: int) -> list[Any] | None:
    real = shared_data()
    path = None if real is None else real / "instruct" / "alpaca_3500.json"
    if path is None or not path.exists() or vocabulary != 4096:
        return None
    source = SourceConfig(path=str(path), format="alpaca", max_examples=NUM_DOCUMENTS)
    documents = build_documents(
        [source],
        load_tokenizer(str(model)),
        row_tokens=row_tokens,
        template="alpaca",
        cache_dir=folder / "source",
        num_workers=1,
    )
    found = []
    for index in range(len(documents)):
        example = documents[index]
        labels = np.where(example.is_label, example.input_ids, -100)
        found.append((example.input_ids.tolist(), labels.tolist()))
    return found


def _drawn_documents(row_tokens: int, vocabulary: int, end: int, is_full: bool) -> list[Any]:
    """(ids, labels) of each. All end in the end token, as the trainer requires."""
    generator = np.random.default_rng(0)
    lengths = np.exp(generator.normal(4.6, 0.7, NUM_DOCUMENTS))  # median 100 tokens
    if is_full:
        lengths = np.full(min(NUM_DOCUMENTS, 512), row_tokens)
    documents = []
    for length in np.clip(lengths, 8, row_tokens).astype(int):
        ids = generator.integers(3, vocabulary, length)
        ids[-1] = end
        labels = ids.copy()
        labels[: 1 if is_full else max(1, length // 3)] = -100  # the question is not learned
        documents.append((ids.tolist(), labels.tolist()))
    return documents


def documents_of_steps(loader: Loader, rows: Rows, num_steps: int) -> list[list[list[int]]]:
    """Step -> micro-step -> documents, as this package's loader assigns them to one rank.

    Peers get the same documents in the same steps, so that only the computation differs.
    """
    steps = []
    for step in range(num_steps):
        indices = loader.rows_of_step(step).tolist()
        micro = [indices[begin : begin + loader.micro_rows] for begin in range(0, len(indices), loader.micro_rows)]
        steps.append([[document for row in group for document in rows[row].documents] for group in micro])
    return steps
