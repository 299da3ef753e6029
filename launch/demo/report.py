"""Step 5 of 5: exact match on held-out prompts before and after fine-tuning, and with the merged model.

Adds `exact_match_before` and `exact_match_after` to the run's summary.json, and samples to its page. Stock PEFT reads
the adapter and stock transformers the merged model, so the saved files load elsewhere too.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
from tasks import BASE_DIR, DATA_DIR, MERGED_DIR, NEW_TASK, RUN_DIR

from qlora_dist.files import write_json
from qlora_dist.model import INFERENCE, load_base  # before peft and transformers: it imports bitsandbytes quietly
from qlora_dist.pages import read_run, write_report

from peft import PeftModel  # isort: skip
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase  # isort: skip
from transformers.utils import logging  # isort: skip

MAX_BEFORE, MIN_AFTER = 0.20, 0.80  # the demo's pass criteria
NUM_SAMPLES = 5
NUM_PAGE_SAMPLES = 20
MAX_ANSWER_TOKENS = 8  # six letters, the end token, and one more to see that it stopped


@torch.no_grad()
def answers(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[str]:
    """Greedy answers, batched by prompt length so that nothing is padded."""
    encoded = {prompt: tuple(tokenizer(prompt)["input_ids"]) for prompt in prompts}
    answer_of: dict[str, str] = {}
    for length in sorted({len(ids) for ids in encoded.values()}):
        group = [prompt for prompt in encoded if len(encoded[prompt]) == length]
        input_ids = torch.tensor([encoded[prompt] for prompt in group])
        output = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=MAX_ANSWER_TOKENS,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts = tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
        answer_of |= dict(zip(group, texts, strict=True))
    return [answer_of[prompt] for prompt in prompts]


def exact_match(found: list[str], records: list[dict[str, str]]) -> float:
    """Share of answers that are exactly right."""
    return sum(answer == record["output"] for answer, record in zip(found, records, strict=True)) / len(records)


def main() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)  # transformers and peft about each other
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    new = read(DATA_DIR / "held_out.json")
    known = read(DATA_DIR / "held_out_known.json")
    prompts = [record["input"] for record in new + known]

    base = load_base(
        str(BASE_DIR),
        quantization="nf4",
        double_quant=True,
        compute_dtype=torch.float32,
        attention=INFERENCE,
        device=torch.device("cpu"),
    )
    answered = {"before": answers(base, tokenizer, prompts)}
    tuned = PeftModel.from_pretrained(base, str(RUN_DIR / "adapter")).eval()
    answered["after"] = answers(tuned, tokenizer, prompts)
    merged = AutoModelForCausalLM.from_pretrained(MERGED_DIR, dtype=torch.float32)
    answered["merged"] = answers(merged, tokenizer, prompts)

    scores = {name: exact_match(found[: len(new)], new) for name, found in answered.items()}
    known_scores = {name: exact_match(found[len(new) :], known) for name, found in answered.items()}
    print(f"\nExact match on held-out prompts   {'before':>9}{'after':>9}{'merged':>9}")
    for label, row in ((f"{NEW_TASK}: (the new task)", scores), ("what the base knew", known_scores)):
        print(f"  {label:<32}" + "".join(f"{100 * row[name]:>7.1f} %" for name in answered))
    print(f"\n{'prompt':<24}{'before':<16}{'after':<16}merged")
    for index in range(NUM_SAMPLES):
        print(
            f"{prompts[index]:<24}{answered['before'][index]:<16}{answered['after'][index]:<16}{answered['merged'][index]}"
        )

    summary_path = RUN_DIR / "summary.json"
    summary = json.loads(summary_path.read_text(encoding="utf-8"))
    write_json(summary_path, {**summary, "exact_match_before": scores["before"], "exact_match_after": scores["after"]})
    print(f"\n{summary_path}: exact_match_before and exact_match_after added")
    rows = zip(new, answered["before"], answered["after"], strict=False)  # `answered` goes on with what the base knew
    samples = [
        {"prompt": record["input"], "before": before, "after": after, "expected": record["output"]}
        for record, before, after in rows
    ]
    write_json(RUN_DIR / "samples.json", samples[:NUM_PAGE_SAMPLES])
    write_report([read_run(RUN_DIR)], RUN_DIR / "report.html")
    print(f"{RUN_DIR / 'report.html'}: the page of the run")
    if scores["before"] > MAX_BEFORE or min(scores["after"], scores["merged"]) < MIN_AFTER:
        sys.exit(f"expected at most {MAX_BEFORE:.0%} before and at least {MIN_AFTER:.0%} after tuning and merging")


def read(path: Path) -> list[dict[str, str]]:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
