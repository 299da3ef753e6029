"""The demo's task family: short instructions on sequences of letters, such as `reverse: k d a b ->`.

The base model is trained on KNOWN_TASKS; NEW_TASK appears in its vocabulary but in none of its training texts.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BASE_DIR = Path("build/demo/base")
DATA_DIR = Path("build/demo/data")
MERGED_DIR = Path("build/demo/merged")
RUN_DIR = Path("runs/demo")

LETTERS = "abcdefghijklmnop"
TASKS: dict[str, Callable[[list[str]], list[str]]] = {
    "copy": lambda word: word,
    "reverse": lambda word: word[::-1],
    "upper": lambda word: [letter.upper() for letter in word],
    "first": lambda word: word[:1],
    "last": lambda word: word[-1:],
    "rotate": lambda word: word[1:] + word[:1],
    "sort": sorted,
}
NEW_TASK = "sort"
KNOWN_TASKS = tuple(name for name in TASKS if name != NEW_TASK)


def sample(task: str, rng: random.Random) -> dict[str, str]:
    """One record in the `input-output` data format."""
    word = rng.choices(LETTERS, k=rng.randint(4, 6))
    return {"input": f"{task}: {' '.join(word)} -> ", "output": " ".join(TASKS[task](word))}


def samples(task: str, count: int, rng: random.Random, without: frozenset[str] = frozenset()) -> list[dict[str, str]]:
    """`count` records whose prompts differ from each other and from those in `without`."""
    records: dict[str, dict[str, str]] = {}
    while len(records) < count:
        record = sample(task, rng)
        if record["input"] not in without:
            records[record["input"]] = record
    return list(records.values())


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; no chat template, so that an answer directly follows its prompt."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "->", *(f"{task}:" for task in TASKS), *LETTERS, *LETTERS.upper()]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
