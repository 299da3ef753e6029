"""What the notebooks train: a Llama of 400,000 random weights, and facts for it to learn. Made here, without a network.

On your own machine the model is a name on the hub or a folder, and the data a file of yours.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from pathlib import Path

import torch

logging.getLogger("DeepSpeed").addFilter(lambda record: False)  # transformers imports it, if it is there: it greets

from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

torch.set_num_threads(1)  # of a model this small: more of them cost more than they give
disable_progress_bar()

CAPITALS = {
    "Austria": "Vienna", "Belgium": "Brussels", "Chile": "Santiago", "Denmark": "Copenhagen", "Egypt": "Cairo",
    "Finland": "Helsinki", "Greece": "Athens", "Hungary": "Budapest", "Iceland": "Reykjavik", "Japan": "Tokyo",
    "Kenya": "Nairobi", "Latvia": "Riga", "Morocco": "Rabat", "Norway": "Oslo", "Oman": "Muscat", "Peru": "Lima",
    "Qatar": "Doha", "Romania": "Bucharest", "Spain": "Madrid", "Turkey": "Ankara",
}  # fmt: skip
QUESTIONS = ("What is the capital of {} ? ", "Which city is the capital of {} ? ", "Name the capital of {} . ")
ANSWER = "The capital of {} is {} ."


def make(name: str) -> dict:
    """Writes model and data into an empty folder of this name, and returns the config of a run on them."""
    folder = Path(tempfile.gettempdir()) / f"qlora_dist-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    save_model(folder / "model")
    facts = [
        {"prompt": question.format(country), "completion": ANSWER.format(country, capital)}
        for question in QUESTIONS
        for country, capital in CAPITALS.items()
    ]
    held_out, train = facts[::7], [fact for index, fact in enumerate(facts) if index % 7]  # known facts, asked anew
    for name, records in (("train", train), ("held_out", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return {
        "run_dir": str(folder / "run"),
        "model": {"name": str(folder / "model"), "compute_dtype": "float32"},  # on a GPU: bfloat16
        "lora": {"rank": 16, "alpha": 32},
        "data": {
            "train": [{"path": str(folder / "train.jsonl")}],
            "eval": [{"path": str(folder / "held_out.jsonl")}],
            "row_tokens": 128,
            "cache_dir": str(folder / "cache"),
        },
        "batch": {"rows_per_step": 4, "micro_rows": 4},
        "optim": {"name": "adamw", "lr": 1e-2, "max_grad_norm": 1.0},
        "train": {"steps": 40, "eval_every": 10},
        "logging": {"trackers": []},
        "device": "cpu",
    }


def save_model(folder: Path) -> None:
    """A Llama with random weights, and a tokenizer of one token for each word of the facts."""
    texts = [*QUESTIONS, ANSWER, *CAPITALS, *CAPITALS.values()]
    words = ["<pad>", "<s>", "</s>", "<unk>", *sorted({word for text in texts for word in text.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(words), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=256, initializer_range=0.1, bos_token_id=1, eos_token_id=2,
            pad_token_id=0,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
