"""The commands of docs/recipes.md for 70B on two cards, on a tiny model: from data to the merged model."""

from __future__ import annotations

import json
import os
import re
import subprocess
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import ROOT, on_ranks
from helpers.snippets import words_of
from helpers.tiny_run import losses_of, make_inputs
from transformers import AutoModelForCausalLM

from qlora_dist.commands import invoke

SECTION = "## 70B on two 24 GB cards"
RUN, MERGED = "runs/llama3.3-70b-fsdp", "merged/llama3.3-70b"


def _commands() -> list[list[str]]:
    """Words of the section's first block, without the program."""
    section = (ROOT / "docs/recipes.md").read_text().split(SECTION)[1]
    block = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)[0]
    return [words[1:] for line in block.splitlines() for words in words_of(line)]


def _invoked(words: list[str], folder: str) -> tuple[int, str]:
    os.chdir(folder)
    with redirect_stdout(StringIO()) as out:
        code = invoke(words)
    return code, out.getvalue()


def _run(words: list[str], folder: Path) -> str:
    """What rank 0 prints: in this process, or on as many ranks as --ranks says."""
    if "--ranks" not in words:
        code, out = _invoked(words, str(folder))
        assert code == 0
        return out
    at = words.index("--ranks")
    found = on_ranks(_invoked, int(words[at + 1]), words[:at] + words[at + 2 :], str(folder), timeout=240)
    assert [code for code, _ in found] == [0, 0] and found[1][1] == ""
    return found[0][1]


def test_the_recipe_ends_in_a_merged_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    raw = make_inputs(tmp_path)
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w20 w21"}\n{"prompt": "w30"}\n{"prompt": "w40 w41 w42"}\n')
    sources: dict[str, Any] = {"train": raw["data"]["train"], "eval": [{**raw["data"]["train"][0]}]}
    sources["eval"][0]["path"] = str(tmp_path / "held_out.json")
    cheap = [f"model.name={raw['model']['name']}", "model.compute_dtype=float32", "device=cpu", "train.epochs=null",
             "train.steps=4", "data.row_tokens=32", "optim.name=adamw", "optim.lr=1e-2", "optim.warmup_steps=0",
             "batch.rows_per_step=4", f"data.cache_dir={tmp_path / 'cache'}", "logging.trackers=[]",
             *(f"data.{name}={json.dumps(value)}" for name, value in sources.items())]  # fmt: skip
    train, evaluate, generate, merge = _commands()
    assert [words[0] for words in (train, evaluate, generate, merge)] == ["train", "evaluate", "generate", "merge"]
    said = _run([*train, *(f"--set={one}" for one in cheap)], tmp_path)
    assert "strategy fsdp" in said and "in host memory" in said
    losses = losses_of(tmp_path / RUN)
    assert len(losses) == 4 and losses[-1] < losses[0]
    summary = json.loads((tmp_path / RUN / "summary.json").read_text())
    found = json.loads(_run([*evaluate, "--json"], tmp_path).splitlines()[-1])
    assert found["trained"]["held_out"]["loss"] == pytest.approx(summary["eval_loss"], rel=1e-5)
    answers = _run([*generate, "--max-new-tokens", "6"], tmp_path).splitlines()
    assert [json.loads(line)["messages"][0]["content"] for line in answers] == ["w20 w21", "w30", "w40 w41 w42"]
    said = _run([*merge, "--dtype", "float32"], tmp_path)
    assert "the nearer to what was trained" in said
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / MERGED, dtype=torch.float32).eval()
    ids = torch.tensor([[4, 20, 21, 5]])
    completion = json.loads(answers[0])["completion"].split()
    with torch.no_grad():
        assert f"w{int(merged(ids).logits[0, -1].argmax())}" == completion[0]  # the answer's first word


def test_the_slurm_script_runs_the_same_commands(tmp_path: Path) -> None:
    """With a stand-in for Python that writes down what it is asked to do."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "bin/python").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (tmp_path / "bin/python").chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "RANKS_PER_NODE": "2"}
    command = ["bash", str(ROOT / "slurm/use.sbatch"), "run", "out", "prompts.jsonl"]
    for words in (command, command[:-1]):
        assert subprocess.run(words, env=environment, cwd=tmp_path).returncode == 0
    merge, evaluate = "-m qlora_dist merge run out", "-m qlora_dist evaluate run --with-base --ranks 2"
    answer = "-m qlora_dist generate run --prompts prompts.jsonl --ranks 2"
    assert (tmp_path / "asked").read_text().splitlines() == [merge, answer, evaluate, merge, evaluate]
    assert (tmp_path / "run/answers.jsonl").is_file()
