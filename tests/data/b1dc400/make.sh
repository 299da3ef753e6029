#!/usr/bin/env bash
# Made the files beside this one. Runs in an empty folder; CHECKOUT is a checkout of commit b1dc400.
set -euo pipefail
: "${CHECKOUT:?}"
export PYTHONPATH="$CHECKOUT:$CHECKOUT/tests" PYTHONDONTWRITEBYTECODE=1 CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
export HF_HUB_OFFLINE=1
qlora_dist() { python -m qlora_dist "$@"; }

python - <<'PY'
import json
import random
from pathlib import Path

import torch
from helpers.tiny_models import save_model, tiny_model

save_model(Path("base"), tiny_model(attention=None, intermediate_size=64).to(torch.bfloat16))
rng = random.Random(0)
words = [f"w{i}" for i in range(6, 100)]
with open("data.jsonl", "w") as file:
    for _ in range(24):
        question = " ".join(rng.choices(words, k=rng.randint(2, 9)))
        answer = " ".join(["w6", "w7", "w8", "w9", "w10", "w11"][: rng.randint(1, 6)])
        file.write(json.dumps({"input": question, "output": answer}) + "\n")
PY

cat > config.yaml <<'YAML'
run_dir: run
seed: 0
model: {name: base, quantization: nf4, compute_dtype: float32, cache_4bit: cache-4bit}
lora: {rank: 4, alpha: 8}
data:
  train: [{path: data.jsonl, format: input-output, hold_out: 4}]
  row_tokens: 32
  cache_dir: cache
batch: {rows_per_step: 2}
optim: {name: paged_adamw_32bit, lr: 1.0e-2}
train: {steps: 4, save_every: 2}
strategy: {name: ddp}
logging: {trackers: []}
YAML

mkdir recorded
qlora_dist train config.yaml
qlora_dist evaluate run --json > recorded/evaluate.json
qlora_dist generate run --prompt "w6 w7 w20" --max-new-tokens 8 > recorded/generate.txt
rm cache/.*.lock cache-4bit/.*.lock # of no use to a reader, and they name a machine
