"""Every shipped file that a launcher or the command reads is one that they accept."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from qlora_dist.config import dump_yaml, load_config

REPOSITORY = Path(__file__).parents[1]
RECIPES = sorted((REPOSITORY / "launch" / "recipes").glob("*.yaml"))
LAUNCH_CONFIGS = sorted((REPOSITORY / "launch" / "accelerate").glob("*.yaml"))


def name(path: Path) -> str:
    return path.stem


def launch_words(recipe: Path) -> list[str]:
    """The command in the first line of a recipe, word by word."""
    first = recipe.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# To launch: ")
    return shlex.split(first.removeprefix("# To launch: "))


def test_there_are_recipes_and_launch_configs() -> None:
    assert {"demo", "alpaca-7b", "guanaco-7b"} <= {path.stem for path in RECIPES}
    assert {"ddp", "single"} <= {path.stem for path in LAUNCH_CONFIGS}


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_recipe_parses_and_its_resolved_form_gives_the_same_config(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    resolved = tmp_path / "config.yaml"
    resolved.write_text(dump_yaml(config), encoding="utf-8")
    assert load_config(resolved) == config


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_recipe_runs_in_a_folder_of_its_own_name(path: Path) -> None:
    assert load_config(path).run_dir == f"runs/{path.stem}"


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_the_launch_line_of_a_recipe_names_files_that_exist(path: Path) -> None:
    words = launch_words(path)
    assert words[:3] == ["accelerate", "launch", "--config_file"]
    assert REPOSITORY / words[3] in LAUNCH_CONFIGS
    assert words[-4:-1] == ["-m", "qlora_dist", "train"]
    assert REPOSITORY / words[-1] == path


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_the_processes_of_the_launch_line_share_the_rows_of_a_step(path: Path) -> None:
    words = launch_words(path)
    num_processes = yaml.safe_load((REPOSITORY / words[3]).read_text(encoding="utf-8"))["num_processes"]
    if "--num_processes" in words:
        num_processes = int(words[words.index("--num_processes") + 1])
    batch = load_config(path).batch
    assert batch.rows_per_step % (num_processes * batch.micro_rows) == 0


def test_the_overrides_in_the_alpaca_recipe_give_the_batch_of_the_paper() -> None:
    """The comment offers them; they must be accepted as they stand."""
    path = REPOSITORY / "launch" / "recipes" / "alpaca-7b.yaml"
    (line,) = [line for line in path.read_text(encoding="utf-8").splitlines() if "data.packing=false" in line]
    config = load_config(path, tuple(line.removeprefix("#").split()))
    # QLoRA, Table 9, column "All": 16 examples a step, 10,000 steps, 384 tokens of source and 128 of target
    assert (config.batch.rows_per_step, config.train.steps, config.data.row_tokens) == (16, 10_000, 512)
    assert not config.data.packing


@pytest.mark.parametrize("path", LAUNCH_CONFIGS, ids=name)
def test_accelerate_reads_a_launch_config_and_knows_all_of_its_keys(path: Path) -> None:
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    assert config.mixed_precision == "no"
    assert config.num_machines == (2 if path.stem.startswith("nodes-2") else 1)


def test_ddp_starts_several_processes_and_single_one() -> None:
    ddp, single = (
        yaml.safe_load((REPOSITORY / "launch" / "accelerate" / f"{stem}.yaml").read_text(encoding="utf-8"))
        for stem in ("ddp", "single")
    )
    # MULTI_CPU would start one process: accelerate's launcher has no branch for it
    assert (ddp["distributed_type"], ddp["num_processes"]) == ("MULTI_GPU", 2)
    assert (single["distributed_type"], single["num_processes"]) == ("NO", 1)
    assert ddp["main_process_port"] == 0
