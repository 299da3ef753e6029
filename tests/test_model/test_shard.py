"""The sharded base: what each rank holds, and for how long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import on_ranks, outcome
from helpers.shards import load, world_and_shards
from helpers.tiny_models import random_batch, save_model, tiny_model
from torch.distributed.tensor import DTensor, Replicate

from qlora_dist.model import (
    base_checksum,
    base_weights,
    check_gathered_layer,
    check_head,
    check_sharding,
    decoder_layers,
    held_bytes,
    hidden_states,
    num_weights,
    output_head,
    quantize_model,
    set_recompute,
)
from qlora_dist.model.base_weights import own_part
from qlora_dist.model.forward import gathered

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


def _check_with_a_whole_weight(folder: str, name: str, is_replicated: bool) -> tuple[str, str]:
    world, shards = world_and_shards()
    model = load(folder, shards)
    check_sharding(model)
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    whole = gathered(getattr(module, attribute))
    if is_replicated:  # a DTensor, whose local part is all of it
        whole = DTensor.from_local(whole, shards.mesh, [Replicate()], run_check=False)
    module._parameters[attribute] = torch.nn.Parameter(whole, requires_grad=False)
    result = outcome(check_sharding, model)
    world.close()
    return result


@pytest.mark.parametrize("is_replicated", [False, True])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_a_weight_that_is_whole_on_a_rank_is_an_error_naming_it(name: str, is_replicated: bool, tmp_path: Path) -> None:
    save_model(tmp_path, tokenizer=False)
    for kind, text in on_ranks(_check_with_a_whole_weight, 2, str(tmp_path), name, is_replicated):
        assert kind == "RunFailed"
        assert (
            f"1 large weights are whole on rank {'0' if 'rank 0' in text else '1'} instead of sharded over 2 ranks"
            in text
        )
        assert f"such as {name} with" in text


# --- refusals ---------------------------------------------------------------------------------------------------------


def _refusals(folders: dict[str, str]) -> list[tuple[str, str]]:
    from qlora_dist.model.weights import sources

    world, shards = world_and_shards()
    sources._stacks = lambda converter: False  # as of a family that is stacked in another way
    found = [
        outcome(lambda: load(folders["experts"], shards, quantization="none")),
        outcome(lambda: load(folders["plain"], shards, quantization="int8")),
    ]
    world.close()
    return found


def test_the_loader_rejects_what_cannot_be_sharded(tmp_path: Path) -> None:
    experts = tiny_model("mixtral", attention=None)
    folders = {
        "experts": str(save_model(tmp_path / "experts", experts, tokenizer=False)),
        "plain": str(save_model(tmp_path / "plain", tokenizer=False)),
    }
    for converted, int8 in on_ranks(_refusals, 2, folders):
        for name, text in (converted, int8):
            assert name == "UserError" and "reads each rank's part of the files" in text and "use strategy ddp" in text


def test_the_head_is_not_kept_gathered(tmp_path: Path) -> None:
    """The head is this rank's part: a whole one would stay in memory for the run."""
    save_model(tmp_path, tokenizer=False)
    assert on_ranks(_head_rows, 2, str(tmp_path)) == [(64, 128), (64, 128)]


def _head_rows(folder: str) -> tuple[int, int]:
    world, shards = world_and_shards()
    head: Any = output_head(load(folder, shards))
    world.close()
    return len(head.weight.to_local()), len(head.weight)
