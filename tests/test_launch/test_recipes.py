"""Launchers and the command accept every shipped file that they read."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from helpers.shared_data import shared_file

from qlora_dist.config import RunConfig, dump_yaml, load_config
from qlora_dist.data.from_config import documents_of
from qlora_dist.memory import MemoryPlan, choose, shapes_from_config
from qlora_dist.memory.gpus import GPUS, parse_gpu

REPOSITORY = Path(__file__).parents[2]
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
def test_a_recipes_run_directory_has_its_name(path: Path) -> None:
    assert load_config(path).run_dir == str(Path.cwd() / "runs" / path.stem)


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_recipe_for_gpus_does_not_train_on_a_cpu_in_silence(path: Path) -> None:
    on_cpu = {"demo": "auto", "smollm2-135m-cpu": "cpu", "distilgpt2-alpaca-1000": "cpu"}
    assert load_config(path).device == on_cpu.get(path.stem, "cuda")


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_the_launch_line_of_a_recipe_refers_to_existing_files(path: Path) -> None:
    words = launch_words(path)
    assert words[:3] == ["accelerate", "launch", "--config_file"]
    assert REPOSITORY / words[3] in LAUNCH_CONFIGS
    assert words[-4:-1] == ["-m", "qlora_dist", "train"]
    assert REPOSITORY / words[-1] == path


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_the_rows_of_a_step_divide_evenly_over_the_processes_of_the_launch_line(path: Path) -> None:
    words = launch_words(path)
    num_processes = yaml.safe_load((REPOSITORY / words[3]).read_text(encoding="utf-8"))["num_processes"]
    if "--num_processes" in words:
        num_processes = int(words[words.index("--num_processes") + 1])
    batch = load_config(path).batch
    assert batch.rows_per_step % (num_processes * batch.micro_rows) == 0


def test_the_overrides_in_the_alpaca_recipe_give_the_batch_of_the_paper() -> None:
    """They are in a comment; they must be accepted unchanged."""
    path = REPOSITORY / "launch" / "recipes" / "alpaca-7b.yaml"
    (line,) = [line for line in path.read_text(encoding="utf-8").splitlines() if "data.packing=false" in line]
    config = load_config(path, tuple(line.removeprefix("#").split()))
    # QLoRA, Table 9, column "All": 16 examples per step, 10,000 steps, 384 tokens of source and 128 of target
    assert (config.batch.rows_per_step, config.train.steps, config.data.row_tokens) == (16, 10_000, 512)
    assert not config.data.packing


# --- the recipes of the paper -----------------------------------------------------------------------------------------

GUANACO = {"guanaco-7b": "7b", "guanaco-13b": "13b", "guanaco-33b": "33b", "repro_65b_48gb": "65b"}
# layers, hidden, inner width, heads, key heads, vocabulary: config.json of the models that the recipes name
SHAPES = {
    "7b": (32, 4096, 11008, 32, 32, 32000),
    "13b": (40, 5120, 13824, 40, 40, 32000),
    "33b": (60, 6656, 17920, 52, 52, 32000),
    "65b": (80, 8192, 22016, 64, 64, 32000),
    "meta-llama/Llama-2-70b-hf": (80, 8192, 28672, 64, 8, 32000),
    "meta-llama/Llama-3.1-70B": (80, 8192, 28672, 64, 8, 128256),
}


def planned(config: RunConfig, size: str, device_bytes: int) -> MemoryPlan:
    keys = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
            "vocab_size")  # fmt: skip
    shapes = shapes_from_config({"model_type": "llama", **dict(zip(keys, SHAPES[size], strict=True))})
    assert shapes is not None
    return choose(config, shapes, world_size=1, device_bytes=device_bytes)


def recipe(stem: str, overrides: tuple[str, ...] = ()) -> RunConfig:
    return load_config(REPOSITORY / "launch" / "recipes" / f"{stem}.yaml", overrides)


@pytest.mark.parametrize("stem", GUANACO)
def test_a_guanaco_recipe_has_the_hyper_parameters_of_the_paper(stem: str) -> None:
    """QLoRA, Table 9, column OASST1, and section B.2: half the learning rate and dropout above 13B."""
    config = recipe(stem)
    is_large = GUANACO[stem] in ("33b", "65b")
    assert (config.batch.rows_per_step, config.train.steps, config.data.row_tokens) == (16, 1875, 512)
    assert not config.data.packing and config.data.learn == "all"
    assert config.optim.lr == (1e-4 if is_large else 2e-4)
    assert (config.optim.schedule, config.optim.max_grad_norm, config.optim.betas) == ("constant", 0.3, (0.9, 0.999))
    assert config.optim.name == "paged_adamw_32bit"
    assert config.lora is not None
    assert (config.lora.rank, config.lora.alpha, config.lora.target_modules) == (64, 16, "all-linear")
    assert config.lora.dropout == (0.05 if is_large else 0.1)
    assert (config.model.quantization, config.model.double_quant, config.model.compute_dtype) == (
        "nf4", True, "bfloat16"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("stem", "gpu"),
    [("guanaco-7b", "l4"), ("guanaco-13b", "rtx3090"), ("guanaco-33b", "rtx4090"), ("repro_65b_48gb", "a6000")],
)
def test_a_guanaco_recipe_fits_on_one_card(stem: str, gpu: str) -> None:
    plan = planned(recipe(stem), GUANACO[stem], GPUS[gpu].device_bytes)
    assert plan.fits, plan.advice
    assert plan.micro_rows == 1
    # counter-check: a card that holds the weights alone is too small for training
    assert not planned(recipe(stem), GUANACO[stem], plan.items["base"].size + 2**30).fits


def test_65b_fits_in_48681_mib_with_all_optimizer_states_on_the_card() -> None:
    plan = planned(recipe("repro_65b_48gb"), "65b", 48_681 * 2**20)
    assert plan.recompute == plan.num_layers == 80 and plan.paged_out_bytes == 0
    assert plan.trainable_parameters == 799_539_200  # QLoRA reproduction, rank 64 on all linear layers
    assert abs(plan.base_parameters - 65.286e9) < 1e6
    assert plan.headroom_bytes is not None and plan.headroom_bytes > 2**29


def variants() -> dict[str, tuple[str, ...]]:
    """The variants listed at the head of the 65B recipe: name -> overrides."""
    text = (REPOSITORY / "launch" / "recipes" / "repro_65b_48gb.yaml").read_text(encoding="utf-8")
    _, _, listed = text.partition("each fits according to the plan:\n")
    found = {}
    for line in listed.splitlines():
        if not line.startswith("#   "):
            break
        found[line[4:24].strip()] = tuple(line[24:].split())
    return found


@pytest.mark.parametrize("variant", variants())
def test_the_variants_in_the_65b_recipe_are_accepted_and_fit(variant: str) -> None:
    config = recipe("repro_65b_48gb", variants()[variant])
    assert config != recipe("repro_65b_48gb")
    size = config.model.name if config.model.name in SHAPES else "65b"
    gpu = GPUS["a100-40" if variant.startswith("40 GB") else "a6000"]
    assert planned(config, size, gpu.device_bytes).fits
    # a step learns from as many tokens as in the paper
    assert config.batch.rows_per_step * config.data.row_tokens == 16 * 512


def test_the_65b_recipe_lists_variants_beyond_the_paper_and_40_gb_needs_one() -> None:
    assert {"Llama-2 70B", "Llama-3.1 70B", "rows of 2,048", "40 GB, rank 64"} <= set(variants())
    plan = planned(recipe("repro_65b_48gb"), "65b", GPUS["a100-40"].device_bytes)
    assert plan.fits is False and plan.headroom_bytes is not None
    assert round(-plan.headroom_bytes / 2**30, 1) in (1.1, 1.2, 1.3)  # the recipe states 1.2 GiB
    assert any("strategy.name=zero2_offload with optim.name=adamw" in line for line in plan.advice)


# --- the recipes of today ---------------------------------------------------------------------------------------------

# config.json of the models that they name, as far as a plan reads it; defaults of Gemma's class are written out
MODELS = json.loads((REPOSITORY / "tests" / "data" / "recipe_models.json").read_text(encoding="utf-8"))
TODAY = [path for path in RECIPES if load_config(path).model.name in MODELS]
PLANNED = re.compile(
    r"^# Planned, not measured: ([\d.]+) GiB on (\d+) x (\S+), (\d+) of (\d+) layers recomputed\.$", re.M
)
ALSO = re.compile(r"^# Also fits, (\d+) x (\S+): (.+)$", re.M)


def plan_of(path: Path, num_gpus: str, gpu: str, overrides: tuple[str, ...] = ()) -> MemoryPlan:
    config = load_config(path, overrides)
    shapes = shapes_from_config(MODELS[config.model.name])
    assert shapes is not None, "a family that has to be measured"
    return choose(config, shapes, world_size=int(num_gpus), device_bytes=parse_gpu(gpu).device_bytes)


def test_every_model_of_the_list_has_a_recipe_that_says_hardware_memory_and_data() -> None:
    assert {load_config(path).model.name for path in TODAY} == set(MODELS)
    for path in TODAY:
        text = path.read_text(encoding="utf-8")
        for line in ("# Hardware: ", "# Planned, not measured: ", "# Data: "):
            assert line in text, path


@pytest.mark.parametrize("path", [path for path in TODAY if load_config(path).device == "cuda"], ids=name)
def test_a_recipe_takes_the_memory_that_its_header_states_and_fits_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    (stated,) = PLANNED.findall(text)
    plan = plan_of(path, stated[1], stated[2])
    assert plan.fits and plan.micro_rows == 1
    found = (f"{(plan.peak_bytes - plan.paged_out_bytes) / 2**30:.1f}", str(plan.recompute), str(plan.num_layers))
    assert found == (stated[0], stated[3], stated[4])
    for num_gpus, gpu, overrides in ALSO.findall(text):
        assert plan_of(path, num_gpus, gpu, tuple(overrides.split())).fits, (path, gpu, overrides)


@pytest.mark.parametrize("path", [path for path in TODAY if load_config(path).device == "cpu"], ids=name)
def test_the_tensors_of_a_recipe_for_a_cpu_are_those_of_the_plan(path: Path) -> None:
    (stated,) = re.findall(r"^# Planned, not measured: ([\d.]+) GiB of tensors", path.read_text(encoding="utf-8"), re.M)
    assert f"{plan_of(path, '1', '8GB', ('device=cuda',)).tensor_bytes / 2**30:.1f}" == stated


def test_each_of_a_header_s_other_settings_changes_the_run() -> None:
    found = [(path, line.split()) for path in TODAY for *_, line in ALSO.findall(path.read_text(encoding="utf-8"))]
    assert len(found) >= 5
    for path, overrides in found:
        assert load_config(path, tuple(overrides)) != load_config(path)


def test_llama_3_3_with_its_shards_on_two_24_gb_cards_does_not_fit_and_its_header_says_so() -> None:
    path = REPOSITORY / "launch" / "recipes" / "llama3.3-70b-fsdp.yaml"
    plan = plan_of(path, "2", "rtx4090", ("strategy.offload=false", "data.row_tokens=512"))
    assert not plan.fits
    assert "rows of more than 256 tokens do not fit" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_distilgpt2_trains_589_824_of_82_502_400_parameters(quantization: str) -> None:
    path = REPOSITORY / "launch" / "recipes" / "distilgpt2-alpaca-1000.yaml"
    plan = plan_of(path, "1", "8GB", ("device=cuda", f"model.quantization={quantization}"))
    assert plan.trainable_parameters == 589_824
    assert plan.base_parameters + plan.trainable_parameters == 82_502_400


def test_the_experts_of_a_mixture_are_frozen_and_its_attention_layers_are_adapted() -> None:
    config = recipe("qwen3-30b-a3b")
    shapes = shapes_from_config(MODELS[config.model.name])
    assert shapes is not None and shapes.expert_weights > 0.9 * (shapes.expert_weights + shapes.linear_weights)
    plan = choose(config, shapes, world_size=1, device_bytes=GPUS["rtx4090"].device_bytes)
    # q, k, v, o of 48 layers: rank x (inputs + outputs)
    assert plan.trainable_parameters == 48 * 32 * ((2048 + 4096) + 2 * (2048 + 512) + (4096 + 2048))


def learned_of(stem: str, sample: str, tokenizer: str, tmp_path: Path, *more: str) -> tuple[list[str], list[str]]:
    """The whole texts and the learned parts of 40 records of `sample`, by the data section of a recipe."""
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(shared_file(tokenizer))
    source = f"data.train.0.path={shared_file(sample)}"
    overrides = (source, "data.train.0.max_examples=40", "data.train.0.hold_out=4", f"data.cache_dir={tmp_path}", *more)
    config = recipe(stem, overrides)
    documents = documents_of(config.data, config.data.train, words, config.seed)
    assert len(documents) >= 30
    examples = [documents[i] for i in range(len(documents))]
    assert all(example.is_label.any() and not example.is_label.all() for example in examples)
    texts = [words.decode(example.input_ids) for example in examples]
    return texts, [words.decode(example.input_ids[example.is_label]) for example in examples]


def test_tool_calls_are_learned_and_what_tools_return_is_not(tmp_path: Path) -> None:
    template = f"data.template={shared_file('templates/qwen2_5.jinja')}"  # the recipe's base has it in its tokenizer
    texts, learned = learned_of(
        "qwen2.5-7b-tools", "instruct/glaive_toolcall_sharegpt.json", "tokenizers/gpt2_hf", tmp_path, template
    )
    assert sum("<tools>" in text for text in texts) > 15 and not any("<tools>" in text for text in learned)
    assert sum("<tool_response>" in text for text in texts) > 10 and not any("<tool_response>" in t for t in learned)
    assert sum("<tool_call>" in text for text in learned) > 10


def test_every_answer_of_a_sharegpt_conversation_is_learned_in_mistrals_form(tmp_path: Path) -> None:
    texts, learned = learned_of(
        "mistral-7b-sharegpt", "instruct/sharegpt_dummy_conversation.json", "tokenizers/mistral_v3_hf", tmp_path
    )
    assert all("[INST]" in text for text in texts) and not any("[INST]" in text for text in learned)
    assert all(text.count("[/INST]") == answers.count("</s>") for text, answers in zip(texts, learned, strict=True))


@pytest.mark.parametrize("path", LAUNCH_CONFIGS, ids=name)
def test_accelerate_loads_each_launch_config_and_knows_all_its_keys(path: Path) -> None:
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    assert config.mixed_precision == "no"
    assert config.num_machines == (2 if path.stem.startswith("nodes-2") else 1)


def test_ddp_starts_several_processes_and_single_starts_one() -> None:
    ddp, single = (
        yaml.safe_load((REPOSITORY / "launch" / "accelerate" / f"{stem}.yaml").read_text(encoding="utf-8"))
        for stem in ("ddp", "single")
    )
    # MULTI_CPU would start one process: accelerate's launcher has no branch for it
    assert (ddp["distributed_type"], ddp["num_processes"]) == ("MULTI_GPU", 2)
    assert (single["distributed_type"], single["num_processes"]) == ("NO", 1)
    assert ddp["main_process_port"] == 0
