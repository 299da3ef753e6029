"""`qlora-dist plan`: fast, readable, open about what it does not know; and the plan against the real code."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import FAMILIES, MIXTURES, save_model, tiny_config, tiny_model
from helpers.tiny_run import changed, make_inputs, write_config
from transformers import AutoConfig

from qlora_dist import model as base_model
from qlora_dist.commands import invoke
from qlora_dist.commands.plan import simulate as simulation
from qlora_dist.commands.plan.simulate import measure, simulate
from qlora_dist.config import RunConfig, parse_config
from qlora_dist.memory import plan_memory, shapes_from_config
from qlora_dist.memory.gpus import GPUS
from qlora_dist.memory.live_bytes import LiveBytes
from qlora_dist.memory.read_shapes import read_shapes
from qlora_dist.model.lora import attach_lora, count_parameters
from qlora_dist.train.checks.base import promised_base_bytes

LLAMA_65B = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 8192, "intermediate_size": 22016,
    "num_hidden_layers": 80, "num_attention_heads": 64, "max_position_embeddings": 2048,
}  # fmt: skip


LINEAR_NAMES = [
    *(f"self_attn.{name}_proj" for name in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
]  # fmt: skip


@pytest.fixture
def big(tmp_path) -> dict[str, Any]:
    """A config of a 65B model of which only config.json exists."""
    folder = tmp_path / "llama-65b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_65B))
    return {
        "run_dir": str(tmp_path / "run"),
        "model": {"name": str(folder)},
        "data": {"train": [{"path": "unused.json"}], "row_tokens": 512},
        "train": {"steps": 1},
    }


# --- the command ------------------------------------------------------------------------------------------------------


def test_plan_takes_about_a_second_of_cpu_time_and_does_not_import_torch(big, tmp_path):
    path = write_config(tmp_path / "run.yaml", big)
    code = (
        "import sys, resource\n"
        "from qlora_dist.commands import invoke\n"
        f"code = invoke(['plan', {str(path)!r}, '--gpu', 'a6000', '--json'])\n"
        "usage = resource.getrusage(resource.RUSAGE_SELF)\n"
        "heavy = [name for name in ('torch', 'transformers', 'numpy', 'bitsandbytes') if name in sys.modules]\n"
        "print(heavy, usage.ru_utime + usage.ru_stime, file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    heavy, _, seconds = done.stderr.strip().splitlines()[-1].rpartition(" ")
    assert heavy == "[]"
    assert float(seconds) < 5.0  # about one on an idle machine, more on a loaded one
    plan = json.loads(done.stdout)
    assert plan["base_parameters"] == 65_285_660_672 and plan["trainable_parameters"] == 799_539_200
    assert plan["fits"] is True and plan["device_bytes"] == GPUS["a6000"].device_bytes
    assert plan["peak_bytes"] == sum(plan["items"].values())
    assert {"host_peak_bytes", "recompute", "micro_rows", "largest_row_tokens"} <= plan.keys()
    assert 512 < plan["largest_row_tokens"] < 8192 and plan["tokens_per_second_estimate"] > 0


def test_the_table_has_a_bar_per_item_and_a_verdict(big, tmp_path, capsys):
    path = str(write_config(tmp_path / "run.yaml", big))
    assert invoke(["plan", path, "--gpu", "a6000"]) == 0
    text = capsys.readouterr().out
    for name in ("base", "quantization constants", "adapters", "optimizer, pageable", "CUDA context", "checkpoint"):
        line = next(line for line in text.splitlines() if line.strip().startswith(name))
        assert "█" in line or "·" in line
    assert "Fits in 47.54 GiB" in text and "Longest rows that fit" in text and "estimate" in text
    assert "layers recomputed" in text and "\x1b" not in text

    assert invoke(["plan", path, "--gpu", "rtx3090", "--ranks", "4"]) == 0
    text = capsys.readouterr().out
    assert "Does not fit: " in text and " available. To make it fit:\n" in text and "strategy.name=fsdp" in text

    assert invoke(["plan", path]) == 0
    assert "Fits on: l40s, a40, " in capsys.readouterr().out


def test_what_cannot_be_planned_is_a_user_error(big, tmp_path, capsys, monkeypatch):
    def error_of(*arguments: str, **changes: Any) -> str:
        path = write_config(tmp_path / "run.yaml", big, **changes)
        assert invoke(["plan", str(path), *arguments]) == 2
        return capsys.readouterr().err

    assert "--gpu 'big': expected an amount such as 48GiB, or one of" in error_of("--gpu", "big")
    assert "there is no such folder" in error_of(model__name="./nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "the folder has no config.json; expected the folder of a model" in error_of(model__name=str(empty))
    (empty / "config.json").write_text("{")
    assert "cannot be read" in error_of(model__name=str(empty))
    (empty / "config.json").write_text("[]")
    assert "is not a JSON object" in error_of(model__name=str(empty))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "not in the hub's cache and could not be downloaded" in error_of(model__name="nobody/nothing")
    for message, changes in (
        ("int8 cannot be simulated", {"model__quantization": "int8"}),
        ("offload_activations cannot be simulated", {"memory__offload_activations": True}),
        ("dora cannot be simulated", {"lora__variant": "dora"}),
    ):
        assert message in error_of("--simulate", **changes)
    full = {"model__quantization": "none", "lora": None}
    assert "full fine-tuning (lora: null) cannot be simulated" in error_of("--simulate", **full)


def test_an_unlisted_family_is_measured_and_reported_as_such(tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("stablelm", vocab_size=128, num_key_value_heads=4, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    folder = save_model(tmp_path / "stablelm", model, tokenizer=False)
    shapes = read_shapes(str(folder))
    assert not shapes.is_exact
    assert shapes.base_parameters == sum(parameter.numel() for parameter in model.parameters())
    made = plan_memory(_config(32), shapes, world_size=1, device_bytes=None)
    assert made.remarks and "stablelm is not a known family" in made.remarks[0]


@pytest.mark.parametrize("family", [name for name in MIXTURES if name not in ("qwen3_moe", "mixtral")])
def test_layers_of_several_kinds_are_counted_one_by_one(family, tmp_path):
    """Experts in all layers but the first, a shared expert: every weight is planned, of its kind."""
    model = tiny_model(family, attention=None)
    shapes = read_shapes(str(save_model(tmp_path, model, tokenizer=False)))
    assert not shapes.is_exact and not shapes.unknown
    assert shapes.base_parameters == sum(parameter.numel() for parameter in model.parameters())
    stacked = sum(value.numel() for name, value in model.named_parameters() if value.ndim == 3)
    assert shapes.expert_weights == stacked > 0
    assert shapes.linear_weights == sum(one.weight.numel() for one in base_model.linear_layers(model).values())
    assert bool(shapes.layers) == (family in ("glm4_moe", "dots1", "ernie4_5_moe"))  # whose first layer is dense
    targets = ("q_proj", "k_proj", "v_proj", "o_proj")  # PEFT takes other names in some of them for experts'
    changes = {"model__compute_dtype": "float32", "lora__target_modules": list(targets)}
    made = plan_memory(_config(32, **changes), shapes, world_size=1, device_bytes=None)
    adapted = attach_lora(model, rank=8, alpha=8, target_modules=targets)
    assert made.trainable_parameters == count_parameters(adapted)[1]
    promised = promised_base_bytes(str(tmp_path), quantization="nf4", double_quant=True, dtype=torch.float32)
    planned = sum(made.items[key].size for key in ("base", "quantization constants", "embeddings, head, norms"))
    tables = made.items["quantization constants"].size - promised.constants - promised.nested
    assert planned - tables == promised.on_each_rank()


@pytest.mark.parametrize("recompute", [0, 1, 2])
@pytest.mark.parametrize(
    ("family", "sizes", "changes"),
    [
        ("qwen3_moe", {}, {}),
        ("qwen3_moe", {"num_experts": 64, "num_experts_per_tok": 4}, {"lora__target_modules": ["q_proj", "o_proj"]}),
        ("mixtral", {}, {"model__double_quant": False}),
        ("mixtral", {"intermediate_size": 1024}, {"model__compute_dtype": "float32"}),
        ("qwen3_moe", {}, {"lora__experts": "all"}),
        ("qwen3_moe", {"num_experts": 64}, {"lora__experts": "all", "lora__rank": 32}),
        ("mixtral", {"num_experts_per_tok": 1}, {"lora__experts": "all", "lora__target_modules": ["v_proj"]}),
        ("mixtral", {}, {"lora__experts": "all", "model__compute_dtype": "float32"}),
    ],
)
def test_plan_and_simulation_agree_to_half_a_percent_for_experts(family, sizes, changes, recompute):
    """A small vocabulary: the peak is among the experts, not in the loss."""
    width = {"moe_intermediate_size": 256} if family == "qwen3_moe" else {"intermediate_size": 512}
    pretrained = _medium(family, **(width | {"vocab_size": 128} | sizes))
    trace = _compare(pretrained, _config(512, **changes), recompute)
    assert abs(trace.error) < 0.005 and "backward" in trace.peak_at, trace
    assert trace.categories["base"] > 0


def test_a_chunk_of_experts_is_planned_as_it_is_dequantized(monkeypatch):
    pretrained = _medium("qwen3_moe", vocab_size=128, moe_intermediate_size=256)
    whole = _compare(pretrained, _config(32), 2)
    for module in ("qlora_dist.memory.expert_layer", "qlora_dist.model.experts"):
        monkeypatch.setattr(f"{module}.LARGEST_MATRIX", 2 * 512 * 256)  # two experts' gate and up
    trace = _compare(pretrained, _config(32), 2)
    assert abs(trace.error) < 0.005 and trace.peak_bytes < whole.peak_bytes, trace


def test_simulate_prints_the_simulated_peak_and_the_plans_error(tmp_path, capsys):
    raw = make_inputs(tmp_path)
    path = write_config(tmp_path / "run.yaml", raw)
    assert invoke(["plan", str(path), "--simulate", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    trace = result["simulation"]
    assert trace["peak_bytes"] == sum(trace["categories"].values())
    assert abs(trace["error"]) < 0.03
    assert invoke(["plan", str(path), "--simulate"]) == 0
    text = capsys.readouterr().out
    assert "Simulated peak of all tensors" in text and "planned for them: " in text


# --- the plan against the real code -----------------------------------------------------------------------------------


def _config(row_tokens: int, **changes: Any) -> RunConfig:
    raw: dict[str, Any] = {
        "run_dir": "unused", "model": {"name": "unused"}, "train": {"steps": 1}, "lora": {"rank": 8},
        "data": {"train": [{"path": "unused"}], "row_tokens": row_tokens},
    }  # fmt: skip
    return parse_config(changed(raw, **changes))


def _medium(family: str, **changes: Any) -> Any:
    """A model whose activations outweigh what is too small to plan."""
    sizes: dict[str, Any] = {
        "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2, "vocab_size": 1024,
        "num_attention_heads": 8, "max_position_embeddings": 1024,
    }  # fmt: skip
    given = (FAMILIES | MIXTURES)[family]
    if family == "gpt2":
        sizes = {"n_embd": 256, "n_layer": 2, "n_head": 8, "n_positions": 1024, "vocab_size": 1024}
    sizes |= {"head_dim": 32} if "head_dim" in given else {}
    sizes |= {"num_key_value_heads": 4} if "num_key_value_heads" in given else {}
    return tiny_config(family, **(sizes | changes))


def _compare(pretrained: Any, config: RunConfig, recompute: int) -> simulation.Trace:
    shapes = shapes_from_config(pretrained.to_dict())
    assert shapes is not None
    made = plan_memory(config, shapes, world_size=1, device_bytes=None, recompute=recompute)
    return simulate(config, made, pretrained)


@pytest.mark.parametrize(
    ("family", "recompute"),
    [
        ("llama", 0), ("llama", 2), ("qwen3", 0), ("gemma2", 2), ("olmo2", 2), ("cohere", 0), ("gpt2", 2),
        ("gpt_neox", 0), ("phi", 0),
    ],
)  # fmt: skip
def test_plan_and_simulation_agree_for_every_kind_of_layer(family, recompute):
    """Within 3 %: what the plan leaves out is scalars and tables of a few kilobytes."""
    changes = {"model__attention": "sdpa"} if family == "gemma2" else {}  # computes its capped scores by plain math
    trace = _compare(_medium(family), _config(512, **changes), recompute)
    assert abs(trace.error) < 0.03, trace
    assert trace.categories["backward" if "backward" in trace.peak_at else "saved activations"] > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"lora__dropout": 0.1},
        {"lora__rank": 64, "lora__target_modules": ["q_proj", "v_proj"]},
        {"model__kernels": "off"},
        {"model__compute_dtype": "float32"},
        {"model__attention": "sdpa", "model__double_quant": False},
        {"model__quantization": "none", "optim__name": "adamw"},
        {"model__quantization": "fp4", "optim__name": "paged_adamw_8bit"},
        {"batch__micro_rows": 2},
    ],
    ids=lambda changes: "-".join(f"{key.split('__')[1]}={value}" for key, value in changes.items()),
)
def test_plan_and_simulation_agree_for_every_relevant_setting(changes):
    trace = _compare(_medium("llama"), _config(512, **changes), recompute=1)
    assert abs(trace.error) < 0.03, trace


@pytest.mark.parametrize("recompute", [0, 1, 2])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("qwen3", {}),
        ("granite", {}),  # its gradients are scaled, and have no room
        ("llama", {"lora__target_modules": ["q_proj", "down_proj"]}),
        ("llama", {"lora__target_modules": ["o_proj"], "model__attention": "sdpa"}),
        ("llama", {"model__compute_dtype": "float32", "model__quantization": "none", "optim__name": "adamw"}),
    ],
)
def test_plan_and_simulation_agree_to_a_tenth_of_a_percent_for_blocks(family, changes, recompute):
    """A small vocabulary: the peak is in a layer; with few adapters, that need little backward, it may be elsewhere."""
    trace = _compare(_medium(family, vocab_size=128), _config(512, **changes), recompute)
    assert abs(trace.error) < 0.001, trace
    assert "backward" in trace.peak_at or "lora__target_modules" in changes, trace


@pytest.mark.parametrize(
    ("family", "sizes", "changes"),
    [
        ("llama", {"hidden_act": "gelu"}, {}),  # planned as it is computed: not as a block
        ("llama", {}, {"model__kernels": "reference"}),
        ("llama", {}, {"lora__dropout": 0.1}),
        ("cohere", {}, {}),
    ],
)
def test_the_last_norms_gradient_in_fp32_can_be_the_peak(family, sizes, changes):
    trace = _compare(_medium(family, vocab_size=128, **sizes), _config(512, **changes), 0)
    assert "mul" in trace.peak_at and abs(trace.error) < 0.001, trace


def test_large_matrices_are_planned_one_at_a_time(monkeypatch):
    """Gate and up together exceed the limit of one product."""
    monkeypatch.setattr("qlora_dist.config.joint_products.LARGEST_MATRIX", 256 * 704)
    trace = _compare(_medium("llama", vocab_size=128), _config(64), 2)
    assert abs(trace.error) < 0.001, trace
    monkeypatch.undo()
    assert _compare(_medium("llama", vocab_size=128), _config(64), 2).peak_bytes > trace.peak_bytes


@pytest.mark.parametrize(
    ("family", "sizes", "changes", "recompute", "moment"),
    [
        # eight query heads to one of keys, and a thin MLP: attention's own gradients are the largest
        (
            "llama",
            {"num_key_value_heads": 1, "intermediate_size": 64, "vocab_size": 64, "head_dim": 128},
            {},
            2,
            "backward",
        ),
        # capped logits also keep the derivative of the cap
        ("gemma2", {"vocab_size": 60_000}, {"model__attention": "sdpa"}, 2, "loss"),
        ("llama", {"vocab_size": 60_000}, {}, 2, "loss"),
        # few logits: the hidden states, those with labels and their gradient count as much
        ("llama", {"num_key_value_heads": 1, "intermediate_size": 64}, {}, 2, "loss"),
        # many layers that keep everything: what each of them saves is counted once, no more and no less
        ("gpt_neox", {"num_hidden_layers": 10, "intermediate_size": 64}, {}, 0, ""),
        ("llama", {"num_hidden_layers": 10}, {"lora__dropout": 0.1}, 0, ""),
        # a recomputed layer with adapters takes more than the last one, which has none and is not recomputed
        (
            "llama",
            {"num_hidden_layers": 3, "vocab_size": 64},
            {"lora__target_modules": [f"layers.1.{name}" for name in LINEAR_NAMES], "lora__dropout": 0.1},
            2,
            "backward",
        ),
    ],
)
def test_plan_and_simulation_agree_wherever_the_peak_lies(family, sizes, changes, recompute, moment):
    trace = _compare(_medium(family, **sizes), _config(512, **changes), recompute)
    assert moment in trace.peak_at and abs(trace.error) < 0.03, trace


def test_large_vocabularies_in_several_chunks_agree():
    """A chunk of logits is freed before the next is computed."""
    trace = _compare(_medium("llama", vocab_size=600_000), _config(512), recompute=2)
    assert "loss" in trace.peak_at and abs(trace.error) < 0.03, trace


@pytest.mark.parametrize("kernels", ["reference", "off"])
def test_fake_tensors_give_the_peak_of_real_tensors(kernels):
    """The same step with real tensors on this machine, counted by the same code. Not with kernels auto: the simulation
    has a GPU's operations, which on a CPU are several each."""
    config = _config(256, model__attention="sdpa", model__kernels=kernels)
    pretrained = _medium("llama")
    shapes = shapes_from_config(pretrained.to_dict())
    assert shapes is not None
    for recompute in (0, 2):
        made = plan_memory(config, shapes, world_size=1, device_bytes=None, recompute=recompute)
        fake = simulate(config, made, pretrained)
        real = measure(config, made, pretrained, torch.device("cpu"))
        assert fake.peak_bytes == pytest.approx(real.peak_bytes, rel=0.01)  # real autograd adds more in place


def test_live_bytes_counts_storages_once_and_forgets_freed_ones():
    with LiveBytes() as live:
        with live.category("kept"):
            kept = torch.zeros(1000)
        view = kept[:10]
        double = kept * 2
        assert live.total == 8000 and live.live["kept"] == 4000
        del double
        assert live.total == 4000
        live.reset_peak()
        (kept + 1).sum()
    assert live.peak_bytes == 8004 and view.numel() == 10
    assert live.peak["kept"] == 4000


def test_on_a_terminal_of_80_columns_no_word_of_a_plan_is_broken(big, tmp_path, capsys, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    path = str(write_config(tmp_path / "run.yaml", big))
    assert invoke(["plan", path, "--gpu", "a6000"]) == 0
    plain = capsys.readouterr().out
    assert max(map(len, plain.splitlines())) > 80, "the guard: a file's lines are whole"
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stdout", terminal := Terminal())
    assert invoke(["plan", path, "--gpu", "a6000"]) == 0
    shown = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue())
    assert max(map(len, shown.splitlines())) <= 80

    def words(text):
        return [word for word in text.split() if not set(word) <= set("█·")]

    assert words(shown) == words(plain)


# --- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_on_a_cpu_prints_no_plan_for_gpus_and_records_it_in_the_summary(tmp_path, capsys):
    raw = make_inputs(tmp_path)
    path = write_config(tmp_path / "run.yaml", raw, train__steps=1)
    assert invoke(["train", str(path)]) == 0
    said = capsys.readouterr().out
    assert "planned for" not in said and "memory   memory.recompute=full (the memory of a cpu is not planned)\n" in said
    summary = json.loads((Path(raw["run_dir"]) / "summary.json").read_text())
    assert invoke(["plan", str(path), "--json"]) == 0
    assert summary["planned_peak_bytes"] == json.loads(capsys.readouterr().out)["tensor_bytes"]
    assert summary["plan_error"] is None  # on a CPU the measured peak is the whole process's


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("level", ["none", "half", "full"])
def test_a_gpu_needs_what_was_planned(level):
    """Llama-3.2-1B's shape, r = 64, one row of 2,048 tokens: torch's own peak within 5 % of the plan."""
    pretrained = AutoConfig.for_model(
        "llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
        max_position_embeddings=8192,
    )  # fmt: skip
    config = _config(2048, lora__rank=64)
    shapes = shapes_from_config(pretrained.to_dict())
    assert shapes is not None
    recompute = {"none": 0, "half": 8, "full": 16}[level]
    made = plan_memory(config, shapes, world_size=1, device_bytes=None, recompute=recompute)
    measured = measure(config, made, pretrained, torch.device("cuda"))
    assert measured.error == pytest.approx(0, abs=0.05), measured
