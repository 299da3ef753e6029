"""The sharded base: what each rank holds, bit-exact gathering, and training that equals ddp."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import on_ranks, outcome, run_command
from helpers.tiny_models import random_batch, save_model, tiny_model
from helpers.tiny_run import changed, config_of, digests_of, losses_of, make_inputs, metrics_of, write_config

from qlora_dist.errors import UserError
from qlora_dist.model import (
    base_checksum,
    base_weights,
    check_gathered_layer,
    check_head,
    check_sharding,
    decoder_layers,
    held_bytes,
    hidden_states,
    load_base,
    num_weights,
    output_head,
    quantize_model,
    set_recompute,
)
from qlora_dist.model.base_weights import own_part
from qlora_dist.model.forward import gathered

BF16 = torch.bfloat16


def load(folder: Any, shards: Any, device: torch.device | None = None, **changes: Any) -> Any:
    options = {"quantization": "nf4", "double_quant": True, "compute_dtype": BF16, "attention": "auto", **changes}
    return load_base(str(folder), device=device or torch.device("cpu"), shards=shards, **options)


def world_and_shards() -> tuple[Any, Any]:
    from qlora_dist.cluster.world import World

    world = World.init()
    return world, world.shard_group()


# --- what ranks hold --------------------------------------------------------------------------------------------------


def _compare_with_one_process(folder: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Loads the base whole and sharded on each rank, gathers every weight, and compares all bits."""
    world, shards = world_and_shards()
    whole, sharded = load(folder, None, **changes), load(folder, shards, **changes)
    check_head(sharded)
    check_gathered_layer(sharded)
    expected = {name: tensor for name, tensor in base_weights(whole) if "bitsandbytes__" not in name}
    found = dict(base_weights(sharded))
    modules = dict(sharded.named_modules())
    for module in [*decoder_layers(sharded), sharded.get_input_embeddings()]:
        module.unshard()
    bits = {}
    for name, tensor in expected.items():
        owner, _, attribute = name.rpartition(".")
        if name.endswith(".weight.absmax"):
            tensor = tensor.view(torch.uint8)
            ours = modules[name.removesuffix(".weight.absmax")].absmax.view(-1)
        elif ".weight." in name:
            layer = modules[name.split(".weight.")[0]]
            ours = {"nested_absmax": "nested_absmax", "quant_map": "code", "nested_quant_map": "nested_code"}
            ours = getattr(layer, ours[attribute])
        else:
            ours = getattr(modules[owner], attribute)
            if name.endswith("lm_head.weight"):
                ours = gathered(ours)
        bits[name] = torch.equal(ours.reshape(tensor.shape), tensor)
        if name.endswith("nested_absmax"):
            layer_whole = dict(whole.named_modules())[name.split(".weight.")[0]]
            bits[f"{name} offset"] = torch.equal(layer.nested_offset, layer_whole.weight.quant_state.offset)
    for module in [*decoder_layers(sharded), sharded.get_input_embeddings()]:
        module.reshard()
    batch = random_batch((9, 5))
    with torch.no_grad():
        same_output = torch.equal(hidden_states(whole, batch), hidden_states(sharded, batch))
    large = sum(
        tensor.nbytes
        for name, tensor in expected.items()
        if (tensor.ndim > 1 and not name.endswith("wpe.weight")) or name.endswith("weight.absmax")
    )
    result = {
        "wrong": [name for name, is_equal in bits.items() if not is_equal],
        "compared": len(bits),
        "same_output": same_output,
        "held": held_bytes(sharded),
        "whole": held_bytes(whole),
        "large": large,
        "dtypes": {str(tensor.dtype) for name, tensor in found.items() if "proj.weight" in name},
        "weights": sum(num_weights(one) for one in sharded.parameters()),
        "expected_weights": sum(num_weights(one) for one in whole.parameters()),
    }
    world.close()
    return result


@pytest.mark.parametrize(
    ("num_ranks", "family", "changes"),
    [
        (2, "llama", {}),
        (4, "llama", {"double_quant": False}),
        (2, "gemma2", {"quantization": "fp4", "offload": True}),  # tied embedding and head
        (3, "gpt2", {}),  # rows and blocks that three ranks cannot split evenly; weights stored transposed
        (2, "phi", {"quantization": "none"}),  # biases, also on the head
        (3, "llama", {"weights": "random", "seed": 3}),
    ],
)
def test_a_sharded_base_has_the_bits_of_one_process_and_a_rank_holds_its_shard(
    num_ranks: int, family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    save_model(tmp_path, tiny_model(family, attention=None), tokenizer=False)
    results = on_ranks(_compare_with_one_process, num_ranks, str(tmp_path), changes)
    for result in results:
        assert result["wrong"] == [] and result["same_output"], result
        assert result["compared"] > 15
        assert result["weights"] == result["expected_weights"]
        if changes.get("quantization") != "none":
            assert result["dtypes"] <= {"torch.uint8"}  # codes never have a float type
    # large tensors: one shard each, up to a row or block of rounding per tensor; the rest (norms, biases, positions,
    # second-level constants) on every rank
    total, whole, large = sum(result["held"] for result in results), results[0]["whole"], results[0]["large"]
    small = whole - large
    assert total <= whole + (num_ranks - 1) * small + 4 * 1024, (total, whole, small)
    assert max(result["held"] for result in results) <= large / num_ranks + small + 4 * 1024 < whole


def _load_stored(folders: tuple[str, str]) -> list[bool]:
    world, shards = world_and_shards()
    checksums = [base_checksum(load(folder, shards)) for folder in folders]
    world.close()
    return checksums


def test_a_4_bit_checkpoint_is_sharded_to_the_same_bits_as_the_16_bit_model(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source")
    quantize_model(str(source), tmp_path / "packed")
    for first, second in on_ranks(_load_stored, 2, (str(source), str(tmp_path / "packed"))):
        assert first == second


def _bytes_read(folder: str) -> tuple[int, int]:
    from qlora_dist.model.weights.safetensors_files import WeightFiles

    world, shards = world_and_shards()
    sizes: list[int] = []
    original = WeightFiles.read

    def counting(self: WeightFiles, *arguments: Any) -> torch.Tensor:
        piece = original(self, *arguments)
        sizes.append(piece.nbytes)
        return piece

    WeightFiles.read = counting  # type: ignore[method-assign]
    load(folder, shards)
    world.close()
    return sum(sizes), max(sizes)


def test_a_rank_reads_only_its_part_of_the_files(tmp_path: Path) -> None:
    save_model(tmp_path, tokenizer=False)
    size = (tmp_path / "model.safetensors").stat().st_size
    for read, largest in on_ranks(_bytes_read, 4, str(tmp_path)):
        assert 0.24 * size < read < 0.27 * size  # norms are read by all
        assert largest <= 128 * 64 * 4 // 4  # a quarter of the largest tensor, fp32


# --- bit-exact gathering ----------------------------------------------------------------------------------------------


def canonical_nan(tensor: torch.Tensor) -> torch.Tensor:
    """A 16-bit float tensor after a conversion through float on CUDA: every NaN gets the same bit pattern."""
    return torch.where(tensor.isnan(), torch.tensor(float("nan"), dtype=tensor.dtype), tensor)


def emulate_cuda_copies() -> list[int]:
    """From here on, copies of float types in FSDP2's gather rewrite NaN patterns, as on CUDA. Returns a counter."""
    rewritten = [0]
    foreach_copy, split_copy = torch._foreach_copy_, torch.split_with_sizes_copy

    def through_float(tensors: Any) -> list[torch.Tensor]:
        out = []
        for tensor in tensors:
            if tensor.is_floating_point():
                rewritten[0] += int(tensor.isnan().sum())
                tensor = canonical_nan(tensor)
            out.append(tensor)
        return out

    torch._foreach_copy_ = lambda to, tensors, *rest: foreach_copy(to, through_float(tensors), *rest)
    torch.split_with_sizes_copy = lambda tensor, *a, **k: split_copy(through_float([tensor])[0], *a, **k)
    return rewritten


def _gather_float_storage() -> tuple[int, int]:
    """The usual recipe: packed codes stored as bfloat16 under fully_shard. (words that changed, words)."""
    from torch.distributed.fsdp import fully_shard

    world, shards = world_and_shards()
    emulate_cuda_copies()
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (64, 4096), generator=generator, dtype=torch.uint8)
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight = torch.nn.Parameter(codes.view(BF16), requires_grad=False)
    fully_shard(layer, mesh=shards.mesh)
    layer.unshard()
    changed_words = layer.weight.data.view(torch.int16) != codes.view(torch.int16)
    world.close()
    return int(changed_words.sum()), changed_words.numel()


def _gather_under_cuda_copies(folder: str) -> list[str]:
    rewritten = emulate_cuda_copies()
    world, shards = world_and_shards()
    wrong = []
    for double_quant in (True, False):
        model = load(folder, shards, double_quant=double_quant)
        check_head(model)
        wrong.append(outcome(check_gathered_layer, model)[1])
    world.close()
    assert rewritten == [0]
    return wrong


def test_copies_through_float_change_codes_stored_as_bf16_but_not_ours(tmp_path: Path) -> None:
    for changed_words, words in on_ranks(_gather_float_storage, 2):
        # the guard: the emulated fault occurs. 254 of 65,536 patterns are NaN, two of them the canonical one
        assert 0.003 < changed_words / words < 0.005
    save_model(tmp_path, tokenizer=False)
    assert on_ranks(_gather_under_cuda_copies, 2, str(tmp_path)) == [["", ""], ["", ""]]


def save_model_with_512_columns(folder: Path) -> str:
    """A model whose 512 x 512 matrices have enough codes to contain all 65,536 16-bit words."""
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 1}
    return str(save_model(folder, tiny_model(attention=None, **sizes), tokenizer=False))


def gather_every_pattern(model: Any, shards: Any) -> dict[str, int]:
    """Writes all bit patterns to one matrix's codes and constants, gathers them: {name: bytes that changed}."""
    layer = decoder_layers(model)[0]
    matrix = layer.mlp.up_proj
    words = torch.arange(2**16).to(torch.int16)
    if matrix.is_nested:
        constants = torch.arange(4096).to(torch.uint8)  # each byte 16 times
    else:  # 16 fp32 NaNs for every upper half that can be one
        upper = torch.cat([torch.arange(0x7F80, 0x8000), torch.arange(0xFF80, 0x10000)])
        constants = (upper[:, None] * 2**16 + torch.arange(1, 17)).flatten().to(torch.int32)
        assert constants.view(torch.float32).isnan().all() and len(constants.unique()) == 4096
    changed_bytes = {}
    for attribute, values in (("weight", words), ("absmax", constants)):
        sharded = getattr(matrix, attribute)
        rows, own = values.view(torch.uint8).view(sharded.shape), sharded.to_local()
        first = shards.rank * -(-len(rows) // shards.size)
        own.copy_(rows[first : first + len(own)])
        assert sharded.dtype == sharded._spec.tensor_meta.dtype == torch.uint8  # bytes in every view
        layer.unshard()
        whole = getattr(matrix, attribute).data
        assert whole.dtype == torch.uint8
        changed_bytes[attribute] = int((whole.cpu() != rows).sum())
        layer.reshard()
        assert whole.untyped_storage().size() == 0
    return changed_bytes


def _gather_every_pattern(folder: str, changes: dict[str, Any]) -> dict[str, int]:
    rewritten = emulate_cuda_copies()
    world, shards = world_and_shards()
    model = load(folder, shards, **changes)
    check_head(model)
    changed_bytes = gather_every_pattern(model, shards)
    world.close()
    assert rewritten == [0]
    return changed_bytes


@pytest.mark.parametrize(("num_ranks", "changes"), [(2, {}), (3, {"double_quant": False}), (2, {"offload": True})])
def test_every_bit_pattern_in_codes_and_constants_is_gathered_unchanged(
    num_ranks: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_model_with_512_columns(tmp_path)
    for changed_bytes in on_ranks(_gather_every_pattern, num_ranks, folder, changes):
        assert changed_bytes == {"weight": 0, "absmax": 0}


def _gathered_while_layers_run(folder: str) -> tuple[list[int], int]:
    """A forward and a backward pass with recomputation: layers that are whole while each runs, bytes left."""
    world, shards = world_and_shards()
    model = load(folder, shards)
    layers = decoder_layers(model)
    whole: list[int] = []
    seen: dict[int, torch.Tensor] = {}

    def record(matrix: Any, *_: Any) -> None:
        weights = [layer.mlp.up_proj.weight for layer in layers]
        whole.append(sum(weight is own_part(weight) for weight in weights))
        seen[id(matrix)] = matrix.weight.data

    for layer in layers:
        layer.mlp.up_proj.register_forward_hook(record)
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, hidden: hidden.requires_grad_())
    set_recompute(model, "full")
    model.train()
    hidden_states(model, random_batch((9, 5))).sum().backward()
    world.close()
    assert len(seen) == len(layers)
    return whole, sum(tensor.untyped_storage().size() for tensor in seen.values())


def test_a_layer_is_whole_only_while_it_runs_or_is_recomputed(tmp_path: Path) -> None:
    save_model(tmp_path, tiny_model(attention=None, num_hidden_layers=4), tokenizer=False)
    for whole, bytes_left in on_ranks(_gathered_while_layers_run, 2, str(tmp_path)):
        assert whole == [1] * 8 and bytes_left == 0  # four layers forward, and again backward


def _check_with_a_changed_bit(folder: str, what: str) -> tuple[str, str]:
    world, shards = world_and_shards()
    model = load(folder, shards, quantization="none" if what == "plain" else "nf4")
    check_head(model)
    layer = decoder_layers(model)[0].mlp.up_proj
    if world.rank == 1:
        if what == "plain":
            layer.weight.to_local()[3, 5] += 1
        else:
            getattr(layer, what).to_local()[7, 0] ^= 1
    result = outcome(check_gathered_layer, model)
    world.close()
    return result


@pytest.mark.parametrize("what", ["weight", "absmax", "plain"])
def test_one_changed_bit_on_one_rank_stops_all_ranks_naming_the_weight(what: str, tmp_path: Path) -> None:
    save_model(tmp_path, tokenizer=False)
    for name, text in on_ranks(_check_with_a_changed_bit, 2, str(tmp_path), what):
        assert name == "RunFailed"
        assert "the gathered weight model.layers.0.mlp.up_proj.weight differs from its source (1 weights" in text


def _check_with_a_whole_weight(folder: str, name: str) -> tuple[str, str]:
    world, shards = world_and_shards()
    model = load(folder, shards)
    check_sharding(model)
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    module._parameters[attribute] = torch.nn.Parameter(gathered(getattr(module, attribute)), requires_grad=False)
    result = outcome(check_sharding, model)
    world.close()
    return result


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_a_weight_that_is_whole_on_a_rank_is_an_error_naming_it(name: str, tmp_path: Path) -> None:
    save_model(tmp_path, tokenizer=False)
    for kind, text in on_ranks(_check_with_a_whole_weight, 2, str(tmp_path), name):
        assert kind == "RunFailed"
        assert (
            f"1 large weights are whole on rank {'0' if 'rank 0' in text else '1'} instead of sharded over 2 ranks"
            in text
        )
        assert f"such as {name} with" in text


# --- training ---------------------------------------------------------------------------------------------------------


def _train(raw: dict[str, Any]) -> dict[str, Any]:
    """A run; returns facts about the model that it leaves in memory."""
    import qlora_dist.train as trainer
    from qlora_dist.train import setup_model

    seen: dict[str, Any] = {}
    build = setup_model.build_model

    def recording(config: Any, world: Any) -> Any:
        model = build(config, world)
        seen.update(model=model, before=base_checksum(model.module))
        return model

    trainer.build_model = recording
    trainer.train(config_of(raw))
    if not seen:
        return {}
    model = seen["model"].module
    return {
        "unchanged": base_checksum(model) == seen["before"],
        "held": held_bytes(model),
        "counts": (seen["model"].num_base_parameters, seen["model"].num_trainable_parameters),
    }


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def losses_and_norms(run_dir: Any) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in metrics_of(run_dir)]


LAST = "checkpoints/step-00000010"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"strategy__offload": True, "memory__recompute": "none", "model__double_quant": False},
        {"model__quantization": "none", "memory__recompute": 1, "lora__dropout": 0.1},
    ],
)
def test_fsdp_matches_ddp_bit_for_bit_over_ten_steps(
    inputs: dict[str, Any], tmp_path: Path, changes: dict[str, Any]
) -> None:
    raw = changed(inputs, train__steps=10, data__eval=inputs["data"]["train"], train__eval_every=5, **changes)
    found = {}
    for strategy in ("ddp", "fsdp"):
        own = {"run_dir": str(tmp_path / strategy), "strategy__name": strategy}
        if strategy == "ddp":
            own["strategy__offload"] = False
        found[strategy] = on_ranks(_train, 2, changed(raw, **own))
    # the same numbers in the same kernels, wherever they were stored: no tolerance
    assert losses_and_norms(tmp_path / "fsdp") == losses_and_norms(tmp_path / "ddp")
    assert len(losses_of(tmp_path / "ddp")) == 10
    assert losses_of(tmp_path / "fsdp")[-1] < losses_of(tmp_path / "fsdp")[0]
    assert digests_of(tmp_path / "fsdp" / LAST) == digests_of(tmp_path / "ddp" / LAST)
    assert [m["eval_loss"] for m in metrics_of(tmp_path / "fsdp")[4::5]] == [
        m["eval_loss"] for m in metrics_of(tmp_path / "ddp")[4::5]
    ]
    for ddp, fsdp in zip(found["ddp"], found["fsdp"]):
        assert fsdp["unchanged"] and fsdp["counts"] == ddp["counts"]
        assert fsdp["held"] < 0.62 * ddp["held"]  # half, plus what every rank holds: code books and norms matter here


def test_four_ranks_give_the_losses_of_one_even_if_some_have_no_labels(inputs: dict[str, Any], tmp_path: Path) -> None:
    # 13 rows in steps of 4: in the last step three ranks have filler, but must still gather every layer
    raw = changed(inputs, train__steps=None, train__epochs=13 / 24, batch__rows_per_step=4)
    on_ranks(_train, 4, changed(raw, run_dir=str(tmp_path / "four"), strategy__name="fsdp"))
    # with one rank there is nothing to shard: fsdp is then ddp
    on_ranks(_train, 1, changed(raw, run_dir=str(tmp_path / "one"), strategy__name="fsdp"))
    four = metrics_of(tmp_path / "four")
    assert len(four) == 4 and four[-1]["tokens"] <= 32 < four[0]["tokens"], "the last step must be one row"
    # fp32 sums in another order, over four updates
    assert losses_of(tmp_path / "four") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-5)


def test_a_run_resumes_under_another_strategy_bit_for_bit(inputs: dict[str, Any], tmp_path: Path) -> None:
    raw = changed(inputs, lora__dropout=0.1)
    on_ranks(_train, 2, changed(raw, run_dir=str(tmp_path / "whole"), train__steps=6))
    moved = changed(raw, run_dir=str(tmp_path / "moved"))
    for steps, strategy in ((2, "fsdp"), (4, "ddp"), (6, "fsdp")):
        on_ranks(_train, 2, changed(moved, train__steps=steps, strategy__name=strategy))
    assert losses_of(tmp_path / "moved") == losses_of(tmp_path / "whole")
    last = "checkpoints/step-00000006"
    assert digests_of(tmp_path / "moved" / last) == digests_of(tmp_path / "whole" / last)


def test_the_adapter_of_a_sharded_base_is_whole_and_loads_in_stock_peft(inputs: dict[str, Any], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    raw = changed(inputs, run_dir=str(tmp_path / "run"), strategy__name="fsdp")
    on_ranks(_train, 2, raw)
    base = AutoModelForCausalLM.from_pretrained(raw["model"]["name"])
    ids = torch.arange(6, 20)[None]
    with torch.no_grad():
        plain = base(ids).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
        assert (plain - adapted(ids).logits).abs().max() > 1e-2
    matrices = {name: value for name, value in adapted.named_parameters() if "lora_" in name}
    assert len(matrices) == 28 and all(value.any() for value in matrices.values())
    for name, value in matrices.items():
        layer = adapted.get_submodule(name.split(".lora_")[0]).base_layer.weight
        assert value.shape == ((4, layer.shape[1]) if "lora_A" in name else (layer.shape[0], 4))


def test_a_run_with_a_4_bit_cache_reads_the_copy_on_every_rank(inputs: dict[str, Any], tmp_path: Path) -> None:
    raw = changed(inputs, train__steps=3)
    on_ranks(_train, 2, changed(raw, run_dir=str(tmp_path / "plain")))
    own = {"model__cache_4bit": str(tmp_path / "cache"), "strategy__name": "fsdp"}
    on_ranks(_train, 2, changed(raw, run_dir=str(tmp_path / "fsdp"), **own))
    assert losses_of(tmp_path / "fsdp") == losses_of(tmp_path / "plain")
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1
    adapter = (tmp_path / "fsdp" / "adapter" / "adapter_config.json").read_text()
    assert raw["model"]["name"] in adapter and "cache" not in adapter


def test_the_ddp_launch_file_starts_fsdp_and_the_run_reports_what_is_sharded(
    inputs: dict[str, Any], tmp_path: Path
) -> None:
    config = write_config(tmp_path / "config.yaml", inputs, run_dir=str(tmp_path / "run"), train__steps=2)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/ddp.yaml"]
    done = run_command([*launch, "-m", "qlora_dist", "train", str(config), "--set", "strategy.name=fsdp"])
    assert done.returncode == 0, done.stderr
    assert "every rank holds 1/2 of the base's matrices and constants, and whole norms and adapters" in done.stdout
    assert len(losses_of(tmp_path / "run")) == 2


def test_a_dry_run_on_random_weights_needs_only_config_and_tokenizer(inputs: dict[str, Any], tmp_path: Path) -> None:
    model = Path(shutil.copytree(inputs["model"]["name"], tmp_path / "model"))
    (model / "model.safetensors").unlink()
    raw = changed(inputs, run_dir=str(tmp_path / "files"), train__steps=2, model__name=str(model))
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        _train(raw)
    _train(changed(raw, run_dir=str(tmp_path / "run"), model__weights="random"))
    assert len(losses_of(tmp_path / "run")) == 2


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__quantization": "int8"}, "strategy fsdp cannot shard int8 weights.*nf4, fp4 or none, or strategy ddp"),
        ({"lora": None, "model__quantization": "none"}, "strategy fsdp shards a frozen base.*full fine-tuning.*ddp"),
        ({"lora__variant": "dora"}, "lora.variant dora needs whole weights.*strategy ddp"),
        ({"strategy__name": "ddp", "strategy__offload": True}, "strategy.offload .*only strategy fsdp"),
        ({"strategy__offload": True}, "strategy.offload is true, but one rank shards nothing"),
    ],
)
def test_what_fsdp_does_not_support_is_rejected_before_the_model_is_read(
    inputs: dict[str, Any], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    from qlora_dist.train import train

    raw = changed(inputs, run_dir=str(tmp_path / "run"), **{"strategy__name": "fsdp", **changes})
    with pytest.raises(UserError, match=message):
        train(config_of(raw))


def _refusals(folders: dict[str, str]) -> list[tuple[str, str]]:
    world, shards = world_and_shards()
    found = [
        outcome(load, folders["experts"], shards, None),
        outcome(lambda: load(folders["plain"], shards, quantization="int8")),
    ]
    world.close()
    return found


def test_the_loader_rejects_what_cannot_be_sharded(tmp_path: Path) -> None:
    experts = tiny_model("mixtral", attention=None, num_key_value_heads=2)
    folders = {
        "experts": str(save_model(tmp_path / "experts", experts, tokenizer=False)),
        "plain": str(save_model(tmp_path / "plain", tokenizer=False)),
    }
    for converted, int8 in on_ranks(_refusals, 2, folders):
        for name, text in (converted, int8):
            assert name == "UserError" and "reads each rank's part of the files" in text and "use strategy ddp" in text


# --- on real hardware -------------------------------------------------------------------------------------------------


def _gather_on_cuda(folder: str) -> dict[str, int]:
    """Real copies in the CUDA gather: every 16-bit pattern, in our codes and stored as bfloat16."""
    from torch.distributed.fsdp import fully_shard

    world, shards = world_and_shards()
    if shards is None:  # one GPU: a group of one, whose gather makes the same copies
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh

        from qlora_dist.cluster.shard_group import ShardGroup

        if not dist.is_initialized():
            dist.init_process_group("nccl")
        shards = ShardGroup(init_device_mesh("cuda", (1,)), 0, 1, world.device)
    model = load(folder, shards, world.device)
    check_head(model)
    check_gathered_layer(model)
    changed_bytes = gather_every_pattern(model, shards)
    words = torch.arange(2**16).to(torch.int16).view(256, 256).to(world.device)
    layer = torch.nn.Linear(1, 1, bias=False, device=world.device)
    layer.weight = torch.nn.Parameter(words.view(BF16), requires_grad=False)
    fully_shard(layer, mesh=shards.mesh)
    layer.unshard()
    changed_bytes["stored as bfloat16"] = int((layer.weight.data.view(torch.int16) != words).sum())
    world.close()
    return changed_bytes


NEEDS_TWO = [
    pytest.mark.multi_gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=NEEDS_TWO)])
def test_cuda_gathers_every_bit_pattern_in_codes_and_constants_unchanged(num_ranks: int, tmp_path: Path) -> None:
    folder = save_model_with_512_columns(tmp_path)
    for changed_bytes in on_ranks(_gather_on_cuda, num_ranks, folder, timeout=300):
        assert changed_bytes["weight"] == changed_bytes["absmax"] == 0
        if changed_bytes["stored as bfloat16"] == 0:
            print("this torch and driver gather bfloat16 bit-exactly too: pytorch #159333 is gone here")


def test_the_head_is_not_kept_gathered(tmp_path: Path) -> None:
    """The head is this rank's part: a whole one would stay in memory for the run."""
    save_model(tmp_path, tokenizer=False)
    assert on_ranks(_head_rows, 2, str(tmp_path)) == [(64, 128), (64, 128)]


def _head_rows(folder: str) -> tuple[int, int]:
    world, shards = world_and_shards()
    head: Any = output_head(load(folder, shards))
    world.close()
    return len(head.weight.to_local()), len(head.weight)
