"""Kernels, each against a reference of higher precision or the CPU's bits: attention, 4-bit codes, loss, low-rank
update, CUDA graphs, and the gather of a sharded base."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_dist.errors import UserError
from qlora_dist.model.attention import AttentionNeeds, PackedDocuments, packed_attention, resolve_backend
from qlora_dist.model.lora_forward import lowrank_forward
from qlora_dist.model.loss import OutputHead, nll_sum

from ..quantization import quantize_dequantize
from .smoke_checks import BF16, Bench, Case, Check, Skip, relative_error

LENGTHS = (37, 1, 90)  # of documents: not multiples of a kernel's block size
HEADS, KEY_HEADS, WIDTH = 4, 2, 64
FORWARD = (2 * BF16, "bf16: the result, and the probabilities before their product, are each rounded, by up to 2^-8")
BACKWARD = (4 * BF16, "bf16: twice as many successive roundings as in the forward pass")


# --- attention --------------------------------------------------------------------------------------------------------


def attention(bench: Bench, backend: str) -> list[Check]:
    """One packed row, forward and backward, against fp32 softmax with an explicit mask."""
    needs = AttentionNeeds(torch.bfloat16, WIDTH)
    try:
        resolve_backend(backend, bench.device, needs)
    except UserError as error:
        raise Skip(str(error).partition("cannot be used here: ")[2] or str(error)) from None
    generator = torch.Generator().manual_seed(0)
    random = [torch.randn(1, n, sum(LENGTHS), WIDTH, generator=generator) for n in (HEADS, KEY_HEADS, KEY_HEADS)]
    upstream = torch.randn(1, sum(LENGTHS), HEADS, WIDTH, generator=generator).bfloat16()
    inputs = [tensor.bfloat16().to(bench.device).requires_grad_() for tensor in random]
    boundaries = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32, device=bench.device)
    packed = PackedDocuments(backend, LENGTHS, boundaries, max(LENGTHS))
    found, _ = packed_attention(torch.nn.Identity(), *inputs, None, packed=packed)
    found.backward(upstream.to(bench.device))

    plain = [tensor.bfloat16().float().requires_grad_() for tensor in random]
    expected = _masked_attention(*plain)
    expected.backward(upstream.float())
    checks = [Check("output", relative_error(found, expected), *FORWARD)]
    for name, ours, theirs in zip(("query", "key", "value"), inputs, plain):
        assert ours.grad is not None and theirs.grad is not None
        checks.append(Check(f"gradient of the {name}", relative_error(ours.grad, theirs.grad), *BACKWARD))
    return checks


def _masked_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(1, T, Hq, D) fp32."""
    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    place = torch.arange(len(document))
    allowed = (document[:, None] == document[None, :]) & (place[None, :] <= place[:, None])
    key, value = (tensor.repeat_interleave(HEADS // KEY_HEADS, 1) for tensor in (key, value))
    scores = (query @ key.transpose(2, 3) * WIDTH**-0.5).masked_fill(~allowed, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


# --- 4-bit codes ------------------------------------------------------------------------------------------------------


def codes(bench: Bench, kind: str, is_nested: bool) -> list[Check]:
    """Quantized and dequantized here, against the CPU's bits and a reference in plain torch."""
    import bitsandbytes.functional as bnb

    weight = (torch.randn(256, 384, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    quantize = partial(bnb.quantize_4bit, quant_type=kind, compress_statistics=is_nested)
    theirs, theirs_state = quantize(weight)
    ours, ours_state = quantize(weight.to(bench.device))
    bits = theirs ^ ours.cpu()  # two codes per byte
    differing = int(((bits & 15) != 0).sum() + ((bits >> 4) != 0).sum())
    back = bnb.dequantize_4bit(ours, ours_state).cpu()
    moved = _moved(theirs_state, bench.device)
    same_codes = bnb.dequantize_4bit(theirs.to(bench.device), moved).cpu()
    expected = bnb.dequantize_4bit(theirs, theirs_state)
    values = int((same_codes != expected).sum())
    checks = [
        Check("4-bit codes that differ from the CPU's", differing, weight.numel() * 1e-4,
              "a weight midway between two codes may take either: w / absmax and w * (1 / absmax) round differently"),
        Check("dequantized values of the same codes that differ", values, weight.numel() * 1e-3 if is_nested else 0,
              "nested constants: code x scale + mean, rounded once or twice" if is_nested else
              "one fp32 product, rounded to bf16 once: the same bits everywhere"),
        Check("where they differ, relative", _largest(same_codes, expected), 2 * BF16, "neighbours in bf16"),
    ]  # fmt: skip
    reference = {("nf4", False): "nf4", ("nf4", True): "nf4-dq", ("fp4", False): "fp4-bitsandbytes"}.get(
        (kind, is_nested)
    )
    if reference is not None:
        plain = quantize_dequantize(weight.float(), reference, 64)
        checks.append(Check("dequantized, against plain torch", relative_error(back, plain), 4 * BF16,
                            "rounded to bf16, and one code in ten thousand is off by one"))  # fmt: skip
    return checks


def _moved(state: object, device: torch.device) -> object:
    """A copy of a quantization state on a device."""
    import bitsandbytes.functional as bnb

    return bnb.QuantState.from_dict(state.as_dict(packed=True), device)  # type: ignore[attr-defined]


def _largest(left: Tensor, right: Tensor) -> float:
    return float(((left.float() - right.float()).abs() / right.float().abs().clamp_min(1e-30)).max())


# --- the package's own functions --------------------------------------------------------------------------------------


def loss(bench: Bench) -> list[Check]:
    """The chunked loss of bf16 hidden states, forward and backward, against fp64 on the same values."""
    tokens, hidden, vocabulary = 96, 128, 2048
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(tokens, hidden, generator=generator).bfloat16()
    weight = (torch.randn(vocabulary, hidden, generator=generator) * 0.1).bfloat16()
    labels = torch.randint(0, vocabulary, (tokens - 1,), generator=generator)
    here = states.to(bench.device, copy=True).requires_grad_()
    places = torch.arange(tokens - 1, device=bench.device)
    total = nll_sum(here, OutputHead(weight.to(bench.device)), places, labels.to(bench.device), chunk=40)
    total.backward()
    exact = states.double().requires_grad_()
    expected = F.cross_entropy(exact[:-1] @ weight.double().t(), labels, reduction="sum")
    expected.backward()
    assert here.grad is not None and exact.grad is not None
    # on CUDA the product returns fp32 logits; a CPU rounds them to bf16
    tolerance = (1e-4, "fp32 sums of products of bf16") if bench.is_cuda else (BF16, "logits rounded to bf16")
    return [
        Check("sum of losses", relative_error(total, expected), *tolerance),
        Check("gradient of the hidden states", relative_error(here.grad, exact.grad), 2 * BF16,
              "bf16: the gradient of the logits, and the result"),
    ]  # fmt: skip


def lowrank(bench: Bench) -> list[Check]:
    """The low-rank update of one bf16 layer, forward and backward, against fp64 on the same values."""
    tokens, inputs, outputs, rank, scale = 96, 256, 192, 8, 2.0
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(tokens, n, generator=generator).bfloat16() for n in (inputs, outputs))
    w = (torch.randn(outputs, inputs, generator=generator) * 0.05).bfloat16()
    a, b = torch.randn(rank, inputs, generator=generator) * 0.05, torch.randn(outputs, rank, generator=generator) * 0.05
    here = [tensor.to(bench.device, copy=True).requires_grad_() for tensor in (x, a, b)]
    weight = w.to(bench.device)
    found = lowrank_forward(lambda value: F.linear(value, weight), here[0], [(here[0], here[1], here[2], scale)])
    found.backward(upstream.to(bench.device))
    exact = [tensor.double().requires_grad_() for tensor in (x, a, b)]
    expected = exact[0] @ w.double().t() + scale * (exact[0] @ exact[1].t()) @ exact[2].t()
    expected.backward(upstream.double())
    checks = [Check("output", relative_error(found, expected), *FORWARD)]
    for name, ours, theirs in zip(("input", "A", "B"), here, exact):
        assert ours.grad is not None and theirs.grad is not None
        checks.append(Check(f"gradient of {name}", relative_error(ours.grad, theirs.grad), *BACKWARD))
    return checks


def graph(bench: Bench) -> list[Check]:
    """A small forward pass, captured once and replayed on different values."""
    if not bench.is_cuda:
        raise Skip("needs CUDA")
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(128, 256), torch.nn.SiLU(), torch.nn.Linear(256, 128))
    layers = layers.to(bench.device, torch.bfloat16)
    static = torch.randn(64, 128, device=bench.device).bfloat16()
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # warm-up: initialization at first use must not be captured
            layers(static)
        torch.cuda.current_stream().wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            out = layers(static)
        fresh = torch.randn(64, 128, device=bench.device).bfloat16()
        static.copy_(fresh)
        captured.replay()
        return [Check("replayed, against eager", relative_error(out, layers(fresh)), 2 * BF16,
                      "bf16: the library may choose another kernel under capture")]  # fmt: skip


def gather(bench: Bench) -> list[Check]:
    """A base sharded over a group of one rank: the gathered first layer has the bits of its source."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from qlora_dist.cluster.shard_group import ShardGroup
    from qlora_dist.errors import RunFailed
    from qlora_dist.model import check_gathered_layer, check_head, load_base

    from .smoke_runs import inputs

    model_folder = str(inputs(bench) / "model")
    if not dist.is_initialized():
        store = Path(tempfile.mkdtemp(dir=bench.work)) / "store"
        kind = "nccl" if bench.is_cuda else "gloo"
        dist.init_process_group(kind, init_method=f"file://{store}", rank=0, world_size=1)
    shards = ShardGroup(init_device_mesh(bench.device.type, (1,)), 0, 1, bench.device)
    model = load_base(
        model_folder, quantization="nf4", double_quant=True, compute_dtype=torch.bfloat16, attention="auto",
        device=bench.device, shards=shards,
    )  # fmt: skip
    check_head(model)
    try:
        check_gathered_layer(model)
    except RunFailed as error:
        return [Check(str(error), 1, 0, "bits")]
    return [Check("weights of the first layer whose gathered bits differ", 0, 0, "bits are copied")]


CASES: dict[str, Case] = {
    **{f"attention-{name}": partial(attention, backend=name) for name in ("flash", "varlen", "sdpa")},
    **{
        f"codes-{kind}{'-nested' if is_nested else ''}": partial(codes, kind=kind, is_nested=is_nested)
        for kind in ("nf4", "fp4")
        for is_nested in (False, True)
    },
    "loss": loss,
    "lowrank": lowrank,
    "graph": graph,
}
GROUPS: dict[str, Case] = {"fsdp-gather": gather}  # last: it leaves a process group behind
