"""Typical mistakes of a first hour: each ends with exit code 2 and one paragraph that says what was found, what was
expected and what to do, at once and without torch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.ranks import run_python
from helpers.tiny_run import changed, make_inputs

from qlora_dist.commands import invoke

MOST_SECONDS = 2.0  # of the processor: the machine may be busy
HEAVY = ("torch", "transformers", "bitsandbytes", "accelerate", "peft", "datasets", "deepspeed", "triton")
TRAIN = ["train", "run.yaml"]


def setting(*values: str, command: str = "train") -> list[str]:
    return [command, "run.yaml", *(word for one in values for word in ("--set", one))]


# name -> (command line, parts of what is said: what was found, what was expected, what to do)
MISTAKES: dict[str, tuple[list[str], tuple[str, ...]]] = {
    # the command line
    "a command that does not exist": (["trian", "run.yaml"], ("'trian'", "did you mean train?", "see qlora-")),
    "an option that does not exist": ([*TRAIN, "--rank", "2"], ("--rank", "--ranks", "see qlora-dist train --help")),
    "no config": (["train"], ("Missing argument 'CONFIG'", "see qlora-dist train --help")),
    "a config that is not there": (["train", "rnu.yaml"], ("rnu.yaml", "No such file", "qlora-dist init")),
    "a folder as the config": (["train", "model"], ("config model", "not a regular file", "expected a YAML file")),
    "an override without a value": (setting("optim.lr"), ("--set 'optim.lr'", "expected section.key=value")),
    "an override of a list that is too short": (setting("data.train.3.path=x"), ("list of length 1", "found '3'")),
    "ranks in words": ([*TRAIN, "--ranks", "two"], ("--ranks two", "expected auto or a number of processes")),
    "ranks that the batch does not divide by": (
        [*TRAIN, "--ranks", "3"],
        ("batch.rows_per_step is 4", "not a multiple of batch.micro_rows 1 x 3 ranks", "nearest multiples: 3 or 6"),
    ),
    "a checkpoint that is none": (
        [*TRAIN, "--resume", "run/checkpoints/step-7"], ("no checkpoint in", "--resume auto for the newest good")
    ),
    "fresh and resume": ([*TRAIN, "--fresh", "--resume", "x"], ("--fresh starts over", "give one of the two")),
    "a GPU nobody knows": (["plan", "run.yaml", "--gpu", "rtx9999"], ("'rtx9999'", "an amount such as 48GiB", "h100")),
    "no ranks at all": (["plan", "run.yaml", "--ranks", "0"], ("0 is not in the range x>=1", "see qlora-dist plan")),
    # YAML
    "a tab": (["train", "tab.yaml"], ("line 3, column 1", "'\\t'", "indent with spaces")),
    "a key twice": (["train", "twice.yaml"], ("'run_dir' appears twice, again on line 2", "keep one")),
    "another indentation": (["train", "indented.yaml"], ("line 3, column 2", "is it indented like the lines")),
    "a colon without a space": (["train", "colon.yaml"], ("line 3", "a key needs a space after its colon")),
    "an empty config": (["train", "empty.yaml"], ("expected a mapping of sections", "the file is empty")),
    "no data section": (["train", "no_data.yaml"], ("data: missing", "expected a section of keys, such as train")),
    "a list as a config": (["train", "mine.json"], ("expected a mapping of sections",)),
    # keys and values
    "a typing error in a key": (setting("lora.rnak=8"), ("lora.rnak: unknown key", "did you mean rank?")),
    "a key of another trainer": (setting("learning_rate=1e-4"), ("learning_rate: unknown key", "set optim.lr: 0.0001")),
    "a key in the wrong section": (setting("train.lr=1e-4"), ("train.lr: unknown key", "did you mean optim.lr?")),
    "a word for a number": (setting("lora.rank=eight"), ("lora.rank: expected a whole number from 1", "found 'eight'")),
    "a negative rank": (setting("lora.rank=-8"), ("lora.rank: expected a whole number from 1", "found -8")),
    "half a rank": (setting("lora.rank=8.5"), ("expected a whole number", "found 8.5")),
    "a learning rate of 0": (setting("optim.lr=0"), ("optim.lr: expected a number > 0", "found 0")),
    "a learning rate that is too large": (setting("optim.lr=2e4"), ("expected a number > 0 and <= 1,000", "20000")),
    "a percentage": (setting("lora.dropout=5%"), ("expected a number >= 0 and < 1", "found '5%'")),
    "float16": (setting("model.compute_dtype=float16"), ("expected bfloat16 or float32", "found 'float16'")),
    "an optimizer by another name": (setting("optim.name=adamw_torch"), ("adamw, adamw_8bit", "did you mean adamw?")),
    "4bit as a quantization": (setting("model.quantization=4bit"), ("expected nf4, fp4, int8, or none", "'4bit'")),
    "some evaluation rows": (setting("train.eval_rows=al"), ("expected a whole number >= 1, or all (found 'al'",)),
    "steps and epochs": (setting("train.epochs=3"), ("exactly one of train.steps and train.epochs", "found steps: 5")),
    "full fine-tuning of a 4-bit base": (setting("lora=null"), ("cannot be trained", "set model.quantization=none")),
    "evaluations without data": (setting("train.eval_every=2"), ("data.eval is empty", "give held-out data")),
    "a path in place of a list": (setting("data.train=mine.json"), ("expected a list of sections", "write [{path: ")),
    "a date that does not exist": (setting("data.date='2024-02-31'"), ("expected a date of the calendar",)),
    "a format that does not exist": (setting("data.train.0.format=alpaka"), ("alpaca", "did you mean alpaca?")),
    # paths and models
    "data that are not there": (setting("data.train.0.path=./no.json"), ("no.json: no such file or folder",)),
    "a folder without data": (setting("data.train.0.path=./nothing"), ("nothing", "json")),
    "a model that is not there": (setting("model.name=./no"), ("model.name", "there is no such folder (looked in /")),
    "a folder without a model": (setting("model.name=./nothing"), ("no config.json", "expected the folder of a model")),
    "a GGUF file": (setting("model.name=./m.gguf"), ("m.gguf: this is a file", "give the model that it was made from")),
    "an adapter as the base": (
        setting("model.name=./adapter"), ("it holds an adapter", "Set model.name to the adapter's base (org/base)")
    ),
    "a model that is not in the cache, offline": (
        setting("model.name=some-org/some-model"), ("not in the hub's cache", "HF_HUB_OFFLINE is set", "hf download")
    ),
    "modules that do not exist": (
        setting("lora.target_modules=[q_prj]"), ("q_prj matches no linear layer", "available: down_proj")
    ),
    "a template that is not there": (setting("data.template=./c.jinja"), ("there is no file /", "give a .jinja file")),
    "an adapter to start from that is not there": (setting("lora.init_from=./no"), ("give the folder of a PEFT",)),
    "a DeepSpeed config that is not there": (
        setting("strategy.name=zero2", "strategy.ds_config=./no.json"), ("there is no file /", "or leave it out")
    ),
    # the machine
    "a GPU where there is none": (setting("device=cuda"), ("device is cuda", "CUDA_VISIBLE_DEVICES is ''", "doctor")),
    "flash attention without a GPU": (setting("model.attention=flash"), ("a CUDA device", "model.attention=auto")),
    "attention that does not exist": (setting("model.attention=flash2"), ("auto, flash, varlen, or sdpa", "'flash2'")),
    "a tracker that is not installed": (setting("logging.trackers=[wandb2]"), ("'wandb2'; expected some of",)),
    # run directories
    "a run of another config": (setting("run_dir=other", "lora.rank=2"), ("lora.rank: was 4, now 2", "--fresh")),
    "a run directory with something else": (setting("run_dir=thesis"), ("is not empty but holds no run",)),
    "a run directory below a file": (setting("run_dir=mine.json/run"), ("mine.json is not a folder",)),
    # what was trained
    "an answer of a run that is not there": (["generate", "rnu", "--prompt", "x"], ("rnu: there is no such folder",)),
    "an answer of a run that has not begun": (["generate", "other", "--prompt", "x"], ("no adapter", "train first")),
    "an answer of a folder that is no run": (["generate", "model", "--prompt", "x"], ("neither a run", "give one")),
    "prompts that are not there": (["generate", "done", "--prompts", "p.txt"], ("p.txt: there is no such file",)),
    "a prompt and prompts": (["generate", "done", "--prompt", "x", "--prompts", "p"], ("give one of them",)),
    "an evaluation without data": (["evaluate", "done"], ("data.eval is empty", "name held-out data with --config")),
    "a task that does not exist": (["evaluate", "done", "--tasks", "mlmu"], ("--tasks mlmu", "expected perplexity")),
    "MMLU without its questions": (["evaluate", "done", "--tasks", "mmlu"], ("--mmlu DIR",)),
    "a merge into a folder in use": (["merge", "done", "model"], ("exists and is not empty", "name a new folder")),
    "a merge onto something else": (["merge", "done", "out", "--onto", "dequant"], ("'dequant'", "'auto', 'base', ")),
    "a merge of a run that is not there": (["merge", "rnu", "out"], ("rnu: there is no such folder",)),
    "a quantized model over a file": (["quantize", "model", "mine.json"], ("exists and is not empty",)),
    "a page of a folder that is no run": (["report", "model"], ("holds no run", "name a run directory")),
    # the first config
    "a config that is there already": (["init", "--out", "run.yaml"], ("exists already", "name a new file")),
    "a config of nothing": (["init", "--out", "n.yaml"], ("expected --base NAME and --data PATH",)),
    "a recipe that does not exist": (["init", "--recipe", "alpaca"], ("there is no such recipe", "alpaca-7b")),
    "a config of no known trainer": (["import", "no_data.yaml"], ("config of qlora-dist already",)),
}  # fmt: skip


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as after some minutes of trying."""
    folder = tmp_path_factory.mktemp("hour")
    raw = make_inputs(folder)
    (folder / "mine.json").write_bytes((folder / "train.json").read_bytes())
    raw = changed(raw, run_dir="run", model__name="./model", device="cpu", data__cache_dir="cache")
    raw["data"]["train"][0]["path"] = "mine.json"
    (folder / "run.yaml").write_text(yaml.safe_dump(raw))
    (folder / "tab.yaml").write_text("run_dir: run\nmodel:\n\tname: ./model\n")
    (folder / "twice.yaml").write_text("run_dir: run\nrun_dir: walk\n")
    (folder / "indented.yaml").write_text("run_dir: run\nmodel: {name: ./model}\n data: {}\n")
    (folder / "colon.yaml").write_text("model:\n  name:./model\n  attention: auto\n")
    (folder / "empty.yaml").write_text("# nothing yet\n")
    (folder / "no_data.yaml").write_text(yaml.safe_dump({key: value for key, value in raw.items() if key != "data"}))
    (folder / "m.gguf").write_bytes(b"GGUF")
    for name in ("nothing", "adapter", "thesis", "other", "done/adapter"):
        (folder / name).mkdir(parents=True)
    (folder / "thesis" / "thesis.tex").touch()
    (folder / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    (folder / "done" / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "./model"}')
    for name in ("other", "done"):
        absolute = changed(raw, run_dir=str(folder / name), model__name=str(folder / "model"))
        absolute["data"] = {**absolute["data"], "cache_dir": str(folder / "cache"), "date": "2024-07-06"}
        absolute["data"]["train"] = [{"path": str(folder / "mine.json"), "format": "input-output", "name": "mine.json"}]
        (folder / name / "config.yaml").write_text(yaml.safe_dump(absolute))
    (folder / "other" / "metrics.jsonl").write_text('{"step": 1}\n')
    return folder


@pytest.fixture(scope="module")
def said(here: Path) -> dict[str, list[Any]]:
    """Of each mistake: exit code, stdout, stderr, CPU seconds, and the heavy modules imported by then. All are made in
    one new process, one after the other."""
    (here / "lines.json").write_text(json.dumps({name: words for name, (words, _) in MISTAKES.items()}))
    run_python(
        f"""
        import contextlib, io, json, os, sys, time
        os.environ |= {{"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}}
        os.chdir({str(here)!r})
        from qlora_dist.commands import invoke

        found = {{}}
        for name, words in json.load(open("lines.json")).items():
            out, err, began = io.StringIO(), io.StringIO(), time.process_time()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = invoke(words)
            seconds = time.process_time() - began
            found[name] = [code, out.getvalue(), err.getvalue(), seconds, sorted(set({HEAVY!r}) & set(sys.modules))]
        json.dump(found, open("said.json", "w"))
        """
    )
    found: dict[str, list[Any]] = json.loads((here / "said.json").read_text())
    return found


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_paragraph_at_once(name: str, said: dict[str, list[Any]]) -> None:
    code, out, err, seconds, heavy = said[name]
    assert code == 2, err
    assert out == ""
    assert err.startswith("error: ") and "\n\n" not in err and "Traceback" not in err
    assert len(err) < 1500 and "internal error" not in err and "Errno" not in err
    for part in MISTAKES[name][1]:
        assert part in err, err
    assert seconds < MOST_SECONDS and not heavy, (seconds, heavy)


def test_nothing_was_written(here: Path, said: dict[str, list[Any]]) -> None:
    assert not {"run", "out", "cache", "n.yaml"} & {path.name for path in here.iterdir()}
    assert not re.search("lock", " ".join(str(path) for path in here.rglob("*")))


# --- what is found when data are read ---------------------------------------------------------------------------------

GOOD = '{"input": "w6", "output": "w7"}\n'
DATA: dict[str, tuple[str, str, dict[str, Any], tuple[str, ...]]] = {  # file, content, keys of the source, what is said
    "an empty file": ("d.jsonl", "", {}, ("d.jsonl is empty", "expected at least one record")),
    "a file of empty lines": ("d.jsonl", "\n\n", {}, ("d.jsonl is empty",)),
    "a line that is no JSON": ("d.jsonl", GOOD + "{'input': 1}\n", {}, ("line 2", "not valid JSON", "on_bad")),
    "a list that is cut off": ("d.json", '[{"input": "w6", "output": "w7"}, {"inp', {}, ("invalid JSON in record 2",)),
    "JSON lines in a .json file": ("d.json", GOOD + GOOD[:-3], {}, ("d.json", "not valid JSON")),
    "another column": ("d.jsonl", '{"question": "w6", "answer": "w7"}\n', {}, ("columns: question", "columns: {")),
    "a column that is not there": (
        "d.jsonl", GOOD, {"columns": {"input": "question"}}, ("called 'question'", "leave input out")
    ),
    "another format": ("d.jsonl", GOOD, {"format": "messages"}, ("messages", "input")),
    "an answer that is a number": ("d.jsonl", '{"input": "w6", "output": 7}\n', {}, ("output is a number", "text")),
    "a role that does not exist": (
        "d.jsonl", '{"messages": [{"role": "bot", "content": "w6"}]}\n', {}, ("bot", "user", "assistant")
    ),
    "a part that does not exist": ("d.jsonl", GOOD, {"split": "test"}, ("this file is the split train",)),
    "a table with a column twice": ("d.csv", "input,input\na,b\n", {}, ("two columns are named 'input'", "rename")),
    "text of another encoding": ("d.jsonl", b'{"input": "\xe9", "output": "w7"}\n', {}, ("d.jsonl", "UTF-8")),
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_a_mistake_in_data_names_the_file_and_the_place(
    name: str, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, content, keys, parts = DATA[name]
    monkeypatch.chdir(here)
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    source = json.dumps([{"path": str(tmp_path / file), **keys}])
    words = setting(f"data.train={source}", f"data.cache_dir={tmp_path / 'cache'}", command="data")
    assert invoke(words) == 2
    said = capsys.readouterr().err.replace("\n", " ")
    assert said.startswith("error: ") and "Traceback" not in said and len(said) < 1500
    for part in parts:
        assert part in said, said
