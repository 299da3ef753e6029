"""Step 2 of 5: trains a tiny Llama from random weights on KNOWN_TASKS and saves it as a Hugging Face model."""

from __future__ import annotations

import argparse
import math
import random
import time

import torch
import torch.nn.functional as F
from tasks import BASE_DIR, KNOWN_TASKS, build_tokenizer, sample
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

STEPS = 450
RECORDS_PER_STEP = 48
PEAK_LR = 2e-3
WARMUP_STEPS = 50


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    # every matrix has a multiple of 64 columns: the NF4 block size
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def collate(records: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, right-padded, (records, tokens) each; label -100 is ignored."""
    prompts = [tokenizer(record["input"])["input_ids"] for record in records]
    answers = [
        [*tokenizer(record["output"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        for record in records
    ]
    width = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    input_ids = torch.full((len(records), width), tokenizer.pad_token_id)
    labels = torch.full((len(records), width), -100)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        input_ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return input_ids, labels


def learning_rate(step: int) -> float:
    return PEAK_LR * min(1.0, (step + 1) / WARMUP_STEPS) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / STEPS)) / 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS, help="fewer only show that it runs")
    arguments = parser.parse_args()
    seed, steps = arguments.seed, arguments.steps
    started = time.monotonic()
    rng = random.Random(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # the same base on any number of cores
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        records = [sample(rng.choice(KNOWN_TASKS), rng) for _ in range(RECORDS_PER_STEP)]
        input_ids, labels = collate(records, tokenizer)
        logits = model(input_ids=input_ids).logits[:, :-1]  # no mask needed: padding is on the right and has no labels
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"base: step {step + 1:,} of {steps:,}, loss {loss.item():.4f}", flush=True)
    logging.disable_progress_bar()
    model.save_pretrained(BASE_DIR)
    tokenizer.save_pretrained(BASE_DIR)
    print(f"{BASE_DIR}: {model.num_parameters():,} parameters, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
