"""Every fenced block of README and docs is checked, and what is cheap is run.

Run, in this process, in a folder where the hub's names are folders with a tiny model and small data, and where the
blocks with a title are files:  qlora-dist doctor, init, import, schema, data, plan, report, evaluate, generate, merge,
quantize as they are written (of answers four tokens; not with --ranks, which starts processes); `train` of the
quickstart on the CPU; blocks of Python.

Parsed, by the real parsers with all options and the config by the schema:  `train` elsewhere, verify, torchrun,
accelerate launch, sbatch (its scripts' arguments), python -m benchmarks..., scripts. Of make: targets and variables
exist. Files of the repository that a command names exist.

YAML is read as a config, or as a part of one, or by `import`. Records are read in their format. `text` is output.
"""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.ranks import ROOT
from helpers.snippets import LANGUAGES, SMALLEST, Block, blocks, check, pages, shell_lines, words_of
from helpers.tiny_models import tiny_model
from helpers.tiny_tokenizers import byte_level_tokenizer

from qlora_dist.commands import cli, invoke
from qlora_dist.config import load_config, parse_config
from qlora_dist.config.foreign.translate import translate_file
from qlora_dist.data.formats import FORMATS, convert, detect_format, read_file
from qlora_dist.memory.read_shapes import read_shapes

RUN = ("doctor", "init", "import", "schema", "data", "plan", "report", "evaluate", "generate", "merge", "quantize")
FOREIGN = {"axolotl.yaml", "my_axolotl.yaml", "my_llama_factory.yaml", "my_trl.yaml", "my_torchtune.yaml"}
LARGE = {  # layers, hidden, inner width, heads, key heads, vocabulary
    "huggyllama/llama-65b": (80, 8192, 22016, 64, 64, 32000),
    "meta-llama/Llama-2-70b-hf": (80, 8192, 28672, 64, 8, 32000),
}
RECORD = {"instruction": "Name a colour.", "output": "Green."}


def _named(title: str) -> list[Block]:
    return [one for one in blocks() if one.title == title]


# --- blocks -----------------------------------------------------------------------------------------------------------


def test_every_block_says_what_it_is_and_output_has_no_command():
    assert len(blocks()) > 60
    for one in blocks():
        assert one.language in LANGUAGES, f"{one}: {one.language or 'no language'}"
        if one.language == "text" and "[OPTIONS]" not in one.text:
            assert not re.search(r"^(qlora-dist|make|python|accelerate|sbatch|torchrun) ", one.text, re.MULTILINE), one
    fences = sum(len(re.findall(r"^ *```", text, re.MULTILINE)) for text in pages().values())
    assert fences == 2 * len(blocks()), "a fence within a list, or one that is not closed"


@pytest.mark.parametrize("page", [page for page in pages() if shell_lines(page)])
def test_a_command_is_one_that_the_real_parsers_take(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for line in shell_lines(page):
        for words in words_of(line):
            try:
                check(words)
            except Exception as error:
                raise AssertionError(f"{page}: {line}: {error}") from error


@pytest.mark.parametrize(
    "line",
    [
        "qlora-dist train launch/recipes/alpaca-7b.yaml --rank 2",
        "qlora-dist train launch/recipes/alpaca-7b.yaml --set lora.rnak=2",
        "qlora-dist plan launch/recipes/nothing.yaml",
        "qlora-dist fly launch/recipes/alpaca-7b.yaml",
        "accelerate launch --config_file launch/accelerate/ddp.yaml -m qlora_dist train CONFIG --set lora.rank=-1",
        "torchrun --standalone --nproc-per-nodes 8 -m qlora_dist train CONFIG",
        "qlora-dist torchrun 10.0.0.1:29500 --nnodes 4 -m qlora_dist tain CONFIG",
        "sbatch --node=2 slurm/train.sbatch CONFIG",
        "sbatch slurm/bench.sbatch -m benchmarks.throughput --preset none --out out",
        "python -m benchmarks.faults --aut FILE",
        "python -m benchmarks.nothing",
        "make nothing",
        "make env TORCK=torch",
    ],
)
def test_a_mistake_in_a_command_would_be_found(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, Exception)):
        for words in words_of(line):
            check(words)


def test_commands_within_the_text_exist():
    makefile = (ROOT / "Makefile").read_text()
    for page, text in pages().items():
        for span in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
            words = span.split()
            if words[0] == "qlora-dist" and len(words) > 1 and not words[1].startswith("-"):
                assert words[1] in cli.commands, f"{page}: {span}"
            if words[0] == "make" and len(words) > 1:
                assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), f"{page}: {span}"
            if words[0].startswith("--"):
                known = {name for one in cli.commands.values() for option in one.params for name in option.opts}
                assert words[0].split("=")[0] in known | OTHERS, f"{page}: {span}"


OTHERS = {"--version", "--debug", "--help", "--machine_rank", "--preset", "--profile", "--nnodes", "--rdzv-id"}


@pytest.mark.parametrize("one", [one for one in blocks() if one.language == "yaml"], ids=str)
def test_yaml_is_a_config_or_a_part_of_one(one, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw = yaml.safe_load(one.text)
    if one.title in FOREIGN:
        _files(tmp_path)
        assert translate_file(one.title, trainer="trl" if "trl" in one.title else None, gpus=4).settings
        return
    parse_config(raw if "run_dir" in raw else _added(SMALLEST, raw))


def _added(raw: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """A config with a part replaced; of `epochs` and `steps` only what the part has."""
    result = {**raw}
    for key, value in part.items():
        result[key] = _added(raw[key], value) if isinstance(value, dict) and isinstance(raw.get(key), dict) else value
    return result


def _records(one: Block, tmp_path: Path) -> list[dict[str, Any]]:
    path = tmp_path / Path(one.title).name
    path.write_text(one.text)
    found = [raw.fields for raw in read_file(path)]
    assert found and None not in found, one
    return found  # type: ignore[return-value]


def test_each_format_has_its_smallest_example_which_is_read_and_detected(tmp_path):
    aliases = {"alpaca-cleaned", "alpaca-gpt4"}
    for name in FORMATS.keys() - aliases:
        (one,) = _named(f"{name}.jsonl")
        path = tmp_path / one.title
        path.write_text(one.text)
        raws = list(read_file(path))
        assert len(raws) == one.text.count("\n")
        for raw in raws:
            documents, unread = convert(name, raw, {})
            assert documents and not unread - {"rejected", "source", "subset"}, (name, unread)
            assert detect_format(raw.fields, "x")[0] == name
    assert "alpaca-cleaned" in pages()["docs/data.md"] and "alpaca-gpt4" in pages()["docs/data.md"]


@pytest.mark.parametrize("one", [one for one in blocks() if one.language == "json"], ids=str)
def test_json_is_json_and_a_file(one):
    assert one.title
    for text in one.text.splitlines() if one.title.endswith("jsonl") else [one.text]:
        json.loads(text)


# --- running ----------------------------------------------------------------------------------------------------------


def _files(folder: Path) -> None:
    """The blocks with a title, as files, and a file of held-out questions for MMLU."""
    for one in blocks():
        if one.title:
            (folder / one.title).parent.mkdir(parents=True, exist_ok=True)
            (folder / one.title).write_text(one.text)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Models and data by the names that the pages use, and two runs of the recipe alpaca-7b."""
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = byte_level_tokenizer()
    base = folder / "Qwen/Qwen2.5-0.5B"
    tiny_model("llama", attention=None, vocab_size=len(tokenizer), max_position_embeddings=8192).save_pretrained(base)
    tokenizer.save_pretrained(base)
    (folder / "meta-llama").mkdir()
    (folder / "meta-llama/Llama-2-7b-hf").symlink_to(base)
    (folder / "tatsu-lab/alpaca").mkdir(parents=True)
    many = [{**RECORD, "output": f"Green {i}."} for i in range(1040)]
    (folder / "tatsu-lab/alpaca/train.json").write_text(json.dumps(many))
    keys = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    for name, sizes in LARGE.items():
        (folder / name).mkdir(parents=True)
        content = {"model_type": "llama", "max_position_embeddings": 2048, "tie_word_embeddings": False}
        content |= dict(zip((*keys, "vocab_size"), sizes, strict=True))
        (folder / name / "config.json").write_text(json.dumps(content))
    for name in ("launch", "slurm"):
        (folder / name).symlink_to(ROOT / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        cheap = ["device=cpu", "model.compute_dtype=float32", "data.cache_dir=cache", "logging.trackers=[]"]
        cheap += ["train.epochs=null", "train.steps=2", "train.eval_every=null", "data.row_tokens=64"]
        few = "{path: tatsu-lab/alpaca, format: alpaca, max_examples: 12, hold_out: 4}"
        cheap += [f"data.train=[{few}]", "data.eval=[]"]
        for run in ("alpaca-7b", "alpaca-7b-r16"):
            rank = "lora.rank=16" if run.endswith("r16") else "lora.rank=8"
            words = [f"--set={one}" for one in (*cheap, rank, f"run_dir=runs/{run}")]
            assert invoke(["train", "launch/recipes/alpaca-7b.yaml", *words]) == 0
    for name in ("guanaco-7b", "llama3.3-70b-fsdp"):
        (folder / "runs" / name).symlink_to("alpaca-7b")
    return folder


@pytest.fixture
def here(inputs, tmp_path, monkeypatch) -> Path:
    """A working directory for a page: its own results, the inputs of all."""
    shutil.copytree(inputs / "runs", tmp_path / "runs", symlinks=True)
    for path in inputs.iterdir():
        if path.name not in ("runs", "cache"):
            (tmp_path / path.name).symlink_to(path)
    _files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    return tmp_path


def _to_run() -> dict[str, list[list[str]]]:
    """The commands of each page that are run there: each once, where it stands first."""
    seen: set[str] = set()
    result: dict[str, list[list[str]]] = {}
    for page in pages():
        for line in shell_lines(page):
            for words in words_of(line):
                name = next((word for word in words[1:] if not word.startswith("-")), "")
                starts_ranks = "--ranks" in words and name in ("evaluate", "generate")  # in place of this process
                is_run = (name in RUN and not starts_ranks) or (name == "train" and page == "docs/quickstart.md")
                if words[0] == "qlora-dist" and is_run and "mmlu" not in line and " ".join(words) not in seen:
                    seen.add(" ".join(words))
                    result.setdefault(page, []).append(words[1:])
    return result


@pytest.mark.parametrize("page", _to_run())
def test_the_commands_of_a_page_run(page, here, capsys):
    for words in _to_run()[page]:
        extra = []
        if words[0] == "train":
            extra = [f"--set={one}" for one in ("device=cpu", "model.compute_dtype=float32", "data.cache_dir=cache")]
        if "launch/recipes" not in " ".join(words) and words[0] in ("data", "plan") and not Path(words[1]).exists():
            shutil.copy("first.yaml", words[1])
        if words[0] == "generate" and "--max-new-tokens" not in words:
            extra = ["--max-new-tokens", "4"]
        code = invoke([*words, *extra])
        said = capsys.readouterr()
        assert code == 0, f"{page}: qlora-dist {' '.join(words)}: {said.err}"
        assert said.out.strip(), words


@pytest.mark.parametrize("file", sorted(FOREIGN))
def test_the_example_of_each_trainer_is_its_own_and_becomes_a_config(file, here, capsys):
    assert invoke(["import", file, "--gpus", "4", "--out", "out.yaml"]) == 0
    said = capsys.readouterr().out
    assert "not known here" not in said and load_config("out.yaml").model.name == str(here / "Qwen/Qwen2.5-0.5B")
    assert said.startswith("A config of") and said.split()[3].lower().replace("-", "_").strip(",") in file


@pytest.mark.parametrize("one", [one for one in blocks() if one.language == "python"], ids=str)
def test_python_runs(one, here):
    config = yaml.safe_load(Path("first.yaml").read_text())
    config |= {"device": "cpu", "model": config["model"] | {"compute_dtype": "float32"}}
    Path("run.yaml").write_text(yaml.safe_dump(config))
    names: dict[str, Any] = {}
    exec(compile(one.text, str(one), "exec"), names)
    assert names


def test_the_plan_that_the_memory_guide_shows_is_the_plan(here, capsys):
    assert invoke(["plan", "launch/recipes/repro_65b_48gb.yaml", "--gpu", "a6000"]) == 0
    said = capsys.readouterr().out
    of_page = [one.text for one in blocks() if one.page == "docs/memory.md" and one.language == "text"]
    (shown,) = [text for text in of_page if text.startswith("65,285")]
    assert said.startswith(shown.rstrip())
    assert "46.57 GiB" in said and read_shapes("huggyllama/llama-65b")
