"""A sharded base is gathered bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import on_ranks, outcome
from helpers.shards import load, world_and_shards
from helpers.tiny_models import save_model, tiny_model

from qlora_dist.model import (
    check_gathered_layer,
    check_head,
    decoder_layers,
)

BF16 = torch.bfloat16


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
