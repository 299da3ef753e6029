"""`qlora-dist init`: a first config whose sizes fit by the plan, and the recipes that come with the package."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.ranks import ROOT, clean_environment, python_path, run_python
from helpers.tiny_run import losses_of, make_inputs

from qlora_dist.commands import invoke
from qlora_dist.commands.init import ROW_TOKENS, Wanted, draft
from qlora_dist.commands.recipes import recipes
from qlora_dist.config import load_config
from qlora_dist.errors import UserError
from qlora_dist.memory import choose, plan_memory
from qlora_dist.memory.choosing import changed_config
from qlora_dist.memory.gpus import GPUS
from qlora_dist.memory.read_shapes import read_shapes

SHAPES = {  # layers, hidden, inner width, heads, key heads
    "1b": (16, 2048, 8192, 32, 8), "8b": (32, 4096, 14336, 32, 8), "70b": (80, 8192, 28672, 64, 8),
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def here(inputs, tmp_path, monkeypatch):
    """A working directory with a model and data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(inputs["model"]["name"])
    (tmp_path / "mine.json").symlink_to(inputs["data"]["train"][0]["path"])
    return tmp_path


def _base(folder: Path, size: str, positions: int = 131072) -> str:
    keys = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    (folder / size).mkdir(exist_ok=True)
    content = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": positions}
    (folder / size / "config.json").write_text(json.dumps(content | dict(zip(keys, SHAPES[size], strict=True))))
    return f"./{size}"


@pytest.mark.parametrize("gpu", ["t4", "l4", "a100-80"])
@pytest.mark.parametrize("size", ["1b", "8b"])
def test_rows_are_the_longest_that_fit_by_the_plan(here, size, gpu):
    drafted = draft(Wanted(_base(here, size), ("mine.json",), "cuda", gpu, 1), "run")
    assert drafted.plan is not None and drafted.plan.fits
    rows, rank = drafted.config.data.row_tokens, drafted.config.lora.rank
    shapes, device_bytes = read_shapes(f"./{size}"), GPUS[gpu].device_bytes
    assert rows in ROW_TOKENS and (rank == 64 or rows == ROW_TOKENS[0])
    if rows < ROW_TOKENS[0]:
        longer = changed_config(drafted.config, data={"row_tokens": ROW_TOKENS[ROW_TOKENS.index(rows) - 1]})
        assert not choose(longer, shapes, world_size=1, device_bytes=device_bytes).fits
    if rank < 64:
        larger = changed_config(drafted.config, lora={"rank": 64}, data={"row_tokens": ROW_TOKENS[-1]})
        assert not choose(larger, shapes, world_size=1, device_bytes=device_bytes).fits


def test_a_larger_gpu_gets_longer_rows_and_a_model_without_positions_for_them_does_not(here):
    lengths = [draft(Wanted(_base(here, "8b"), ("mine.json",), "cuda", gpu, 1), "r") for gpu in ("9GiB", "a100-80")]
    assert lengths[0].config.data.row_tokens < lengths[1].config.data.row_tokens == 4096
    short = draft(Wanted(_base(here, "1b", positions=1000), ("mine.json",), "cuda", "a100-80", 1), "r")
    assert short.config.data.row_tokens == 1000


@pytest.mark.parametrize("gpu", [name for name in GPUS if not GPUS[name].has_bfloat16])
def test_a_gpu_without_bfloat16_gets_a_plan_in_float32_and_plan_says_so_of_bfloat16(here, gpu, capsys):
    drafted = draft(Wanted(_base(here, "1b"), ("mine.json",), "cuda", gpu, 1), "run")
    assert drafted.config.model.compute_dtype == "float32" and drafted.plan is not None and drafted.plan.fits
    assert f"# a {gpu} has no bfloat16" in drafted.text(Path("run.yaml"))
    Path("run.yaml").write_text(drafted.text(Path("run.yaml")))
    assert invoke(["plan", "run.yaml", "--gpu", gpu]) == 0
    assert "bfloat16" not in capsys.readouterr().out
    assert invoke(["plan", "run.yaml", "--gpu", gpu, "--set", "model.compute_dtype=bfloat16"]) == 0
    assert f"Note: a {gpu} computes no bfloat16" in capsys.readouterr().out
    assert invoke(["plan", "run.yaml", "--set", "model.compute_dtype=bfloat16"]) == 0
    assert f"{gpu} (which has no bfloat16)" in capsys.readouterr().out
    assert {"t4", "v100-32"} == {name for name in GPUS if not GPUS[name].has_bfloat16}


def test_what_does_not_fit_is_sharded_over_several_gpus_or_refused_with_what_would_fit(here):
    base = _base(here, "70b")
    with pytest.raises(UserError, match=r"does not fit on 1 x l4 \(22\.16 GiB\), not even with rows of 512 .* rank 16"):
        draft(Wanted(base, ("mine.json",), "cuda", "l4", 1), "run")
    drafted = draft(Wanted(base, ("mine.json",), "cuda", "l4", 4), "run")
    assert drafted.plan is not None and drafted.plan.fits and drafted.config.strategy.name == "fsdp"
    assert drafted.config.batch.rows_per_step % 4 == 0
    assert drafted.config.optim.lr == 1e-4  # as in QLoRA above 13B
    small = draft(Wanted(_base(here, "8b"), ("mine.json",), "cuda", "a100-80", 4), "run")
    assert (small.config.strategy.name, small.config.optim.lr) == ("ddp", 2e-4)


def test_a_first_config_is_commented_checked_and_trains(here, capsys):
    words = ["init", "--base", "./model", "--data", "mine.json", "--device", "cpu", "--out", "first/mine.yaml"]
    assert invoke(words) == 0
    said = capsys.readouterr().out
    assert "packing: " in said and "Next: qlora-dist train first/mine.yaml --ranks 1" in said
    text = Path("first/mine.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=qlora_dist.schema.json\n")
    assert json.loads(Path("first/qlora_dist.schema.json").read_text())["title"] == "RunConfig"
    assert "format: input-output                # detected: columns input, output" in text
    config = load_config("first/mine.yaml")
    assert (config.device, config.model.compute_dtype, config.optim.name) == ("cpu", "float32", "adamw")
    length = ["--set", "train.steps=2", "--set", "train.epochs=null", "--set", "logging.trackers=[]"]
    assert invoke(["train", "first/mine.yaml", *length]) == 0
    assert len(losses_of(config.run_dir)) == 2
    assert invoke(words) == 2
    assert "first/mine.yaml: exists already, and is not replaced" in capsys.readouterr().err
    assert Path("first/mine.yaml").read_text() == text


def test_what_is_missing_is_asked_on_a_terminal_only(here, capsys, monkeypatch):
    assert invoke(["init", "--data", "mine.json"]) == 2
    assert "expected --base NAME, as there is no terminal to ask on" in capsys.readouterr().err

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("./model\nmine.json\n24GiB\n"))
    assert invoke(["init", "--no-check"]) == 0
    config = load_config("run.yaml")
    assert (config.device, config.data.train[0].name, config.data.train[0].format) == (
        "cuda",
        "mine.json",
        "input-output",
    )
    assert "planned per GPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--base", "./no", "--data", "mine.json"], "there is no such folder"),
        (["--base", "./model", "--data", "no.json"], "data source no.json: no such file or folder"),
        (["--base", "./model", "--data", "mine.json", "--gpu", "abacus"], "--gpu 'abacus': expected an amount"),
        (["--base", "./model", "--data", "mine.json", "--gpu", "l4", "--device", "cpu"], "give one of the two"),
        (["--recipe", "nope"], "--recipe nope: there is no such recipe; there are alpaca-7b, "),
        (["--recipe", "demo", "--base", "./model"], "--recipe writes a file as it is"),
    ],
)
def test_a_mistake_is_named_and_nothing_is_written(here, capsys, words, message):
    before = sorted(here.iterdir())
    assert invoke(["init", *words]) == 2
    assert message in capsys.readouterr().err
    assert sorted(here.iterdir()) == before


def test_data_that_cannot_be_learned_from_are_named_with_the_file_to_correct(here, capsys):
    Path("odd.jsonl").write_text('{"colour": "red"}\n')
    assert invoke(["init", "--base", "./model", "--data", "odd.jsonl"]) == 2
    assert "cannot detect the format from the columns: colour" in capsys.readouterr().err
    Path("bad.jsonl").write_text('{"input": "w6", "output": "w7"}\n{"input": 5, "output": "w7"}\n' * 9)
    assert invoke(["init", "--base", "./model", "--data", "bad.jsonl", "--device", "cpu", "--out", "b.yaml"]) == 2
    assert "b.yaml is written: change it there, then qlora-dist data b.yaml" in capsys.readouterr().err
    assert load_config("b.yaml").data.train[0].format == "input-output"


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_is_written_as_it_is_with_the_paths_of_this_machine(here, name, capsys):
    assert invoke(["init", "--recipe", name, "--out", "mine"]) == 0
    assert invoke(["init", "--recipe", name, "--out", "mine"]) == 2
    path, text = recipes()[name], Path("mine").read_text()
    if "/" in name:
        assert text == path.read_text()
        return
    assert load_config("mine") == load_config(path)
    words = text.splitlines()[0].split()
    assert Path(words[words.index("--config_file") + 1]).is_file() and words[-1] == "mine"
    assert "Next: qlora-dist train mine --ranks auto" in capsys.readouterr().out


def test_all_shipped_files_are_listed_and_part_of_the_distribution(capsys):
    import tomllib

    assert invoke(["init", "--list-recipes"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    files = [*ROOT.glob("launch/recipes/*"), *ROOT.glob("launch/accelerate/*"), *ROOT.glob("slurm/*")]
    assert len(listed) == len(files) and {"alpaca-7b", "accelerate/ddp", "slurm/train"} <= set(listed)
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["data-files"]
    shipped = {file for found in patterns.values() for pattern in found for file in ROOT.glob(pattern)}
    assert shipped >= set(files)
    assert {f"share/qlora_dist/{file.parent.relative_to(ROOT)}" for file in shipped} == set(patterns)


def test_an_installed_package_finds_its_files_beside_the_environment(here, monkeypatch):
    """Without a checkout: where pip puts data files."""
    from qlora_dist.config import shipped

    folder = here / "prefix" / "share" / "qlora_dist" / "launch" / "recipes"
    folder.mkdir(parents=True)
    (folder / "own.yaml").write_text("run_dir: x\n")
    monkeypatch.setattr(shipped, "__file__", str(here / "site-packages" / "qlora_dist" / "config" / "shipped.py"))
    monkeypatch.setattr(shipped.sys, "prefix", str(here / "prefix"))
    assert recipes() == {"own": folder / "own.yaml"}


def test_the_plan_of_the_file_is_the_one_that_sizes_were_chosen_by(here):
    drafted = draft(Wanted(_base(here, "8b"), ("mine.json",), "cuda", "l4", 1), "run")
    again = plan_memory(
        drafted.config, read_shapes("./8b"), world_size=1, device_bytes=GPUS["l4"].device_bytes,
        recompute=drafted.plan.recompute, micro_rows=1,
    )  # fmt: skip
    assert again.peak_bytes == drafted.plan.peak_bytes


def test_commands_start_without_what_they_do_not_need(here, capsys):
    """No help needs more than click; a config is written or translated without torch."""
    Path("theirs.yaml").write_text(
        "base_model: a/b\nadapter: lora\ndatasets: [{path: c/d}]\nlora_target_linear: true\nlora_r: 8\n"
        "learning_rate: 1e-4\nmicro_batch_size: 1\n"
    )
    run_python(
        f"""
        import os, sys
        from qlora_dist.commands import cli, invoke

        for words in ([], *([name] for name in cli.commands)):
            assert invoke([*words, "--help"]) == 0, words
        assert invoke(["--version"]) == 0
        late = {{"pydantic", "yaml", "rich", "numpy", "torch", "transformers", "datasets", "huggingface_hub"}}
        assert not late & set(sys.modules), late & set(sys.modules)

        os.chdir({str(here)!r})
        assert invoke(["import", "theirs.yaml", "--out", "a.yaml"]) == 0
        words = ["--base", "./model", "--data", "mine.json", "--gpu", "l4", "--no-check", "--out", "b.yaml"]
        assert invoke(["init", *words]) == 0
        assert invoke(["init", "--list-recipes"]) == 0
        heavy = {{"torch", "transformers", "bitsandbytes", "accelerate", "peft", "datasets"}} & set(sys.modules)
        assert not heavy, heavy
        """
    )


def test_a_shell_completes_commands_and_options(here):
    code = "import sys; sys.argv = ['qlora-dist']; from qlora_dist.commands import main; main()"
    for typed, expected in (("qlora-dist im", "plain,import"), ("qlora-dist init --list", "plain,--list-recipes")):
        environment = clean_environment() | {
            "_QLORA_DIST_COMPLETE": "bash_complete", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" ")),
            "PYTHONPATH": python_path(),
        }  # fmt: skip
        found = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
        )
        assert found.stdout.split() == [expected], found.stderr
