"""The roofline: FLOPs of traced steps by formula, kernels and bytes of small functions by hand, rates, the raw file."""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types

import pytest
import torch
import torch.nn.attention.varlen
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import provenance, report, roofline
from benchmarks.shapes import shape_of
from qlora_dist.commands.plan import launches
from qlora_dist.commands.plan.launches import (
    ATTENTION,
    DEQUANTIZATION,
    KINDS,
    MEMORY_BOUND,
    PRODUCTS,
    Kernel,
    attention_flops,
    real_bytes,
)
from qlora_dist.commands.plan.roofline import RATES, Rates, Roofline
from qlora_dist.config.joint_products import padded_columns
from qlora_dist.errors import UserError

SHAPE, TOKENS, DOCUMENT, RANK = shape_of("tiny"), 64, 16, 4
ROUND = Rates(1e12, 1e11, 1e12, 1e12, 1e12, launch_seconds=1e-9)  # in which times are easy to read


@pytest.fixture(scope="module")
def cells():
    found = roofline.run(
        SHAPE, tokens=TOKENS, document=DOCUMENT, rank=RANK, rates=RATES["h100"], methods=["ours", "peft", "trl"]
    )
    return {(cell["method"], cell["recompute"]): cell for cell in found}


def traced(function, *tensors, lengths=()):
    """The sums over what a function does with fake copies of these tensors."""
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in tensors]
        with Roofline(ROUND, lengths) as found:
            function(*fakes)
    return found


# --- whole steps ------------------------------------------------------------------------------------------------------


def groups() -> list[tuple[int, int, int]]:
    """(outputs N, inputs K, adapters' columns R) of the products of a block, in their order."""
    found = []
    for names in (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)):
        shapes = [shape for name, shape in SHAPE.matrices().items() if name.endswith(names)]
        found.append((sum(o for o, _ in shapes), shapes[0][1], padded_columns([RANK] * len(names))))
    return found


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_flops_of_a_block_are_those_of_the_formula(cells, recompute):
    attention = attention_flops(SHAPE.heads, SHAPE.head_dim, [DOCUMENT]) / DOCUMENT
    # base: 2 forward, 2 backward; columns of adapters: x A and with B forward, g B, A, dA and dB backward
    expected = sum(4 * n * k + 6 * r * (n + k) for n, k, r in groups()) + 3.5 * attention
    # inside of kernels: g B and dB, and dA of down, with r columns each, not those of all adapters; and dA of gate and
    # up without the columns that pad theirs
    (_, gate_inputs, gate_columns), (_, down_inputs, down_columns) = groups()[2:]
    expected -= 2 * (gate_columns - 2 * RANK) * gate_inputs + 2 * (down_columns - RANK) * down_inputs
    expected -= sum(4 * (columns - RANK) * outputs for outputs, _, columns in groups())
    if recompute == "full":
        # once more forward without the last product
        expected += sum(2 * n * k + 2 * r * (n + k) for n, k, r in groups()) + attention
        last_outputs, last_inputs, columns = groups()[-1]
        expected -= 2 * last_outputs * (last_inputs + columns)
    assert cells["ours", recompute]["flops_per_token"] == expected


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("method", ["peft", "trl"])
def test_flops_of_a_stock_layer_are_those_of_the_formula(cells, method, recompute):
    matrices = SHAPE.matrices()
    weights = sum(o * i for o, i in matrices.values())
    attention = attention_flops(SHAPE.heads, SHAPE.head_dim, [DOCUMENT]) / DOCUMENT
    # base: 2 forward, 2 backward; A and B: 2 forward, 4 backward; attention: forward, 2.5 times that backward
    expected = 4 * weights + 6 * RANK * sum(o + i for o, i in matrices.values()) + 3.5 * attention
    if recompute == "full":
        # once more forward, but no further than what the backward pass needs: not the last layer's B
        last_outputs, _ = matrices["mlp.down_proj"]
        expected += 2 * weights + 2 * RANK * (sum(o + i for o, i in matrices.values()) - last_outputs) + attention
    assert cells[method, recompute]["flops_per_token"] == expected


def test_attention_counts_pairs_of_a_token_and_those_before_it():
    # 3 tokens: 1 + 2 + 3 pairs, 2 x 5 for the score and as much for the value, 7 heads
    assert attention_flops(7, 5, [3]) == 6 * (2 * 5 + 2 * 5) * 7
    assert attention_flops(7, 5, [3, 3]) == 2 * attention_flops(7, 5, [3])


def test_a_step_of_the_full_depth_is_its_layers_and_what_is_outside_of_them(cells):
    cell = cells["ours", "none"]
    step, layer = cell["predicted_step"], cell["per_layer_by_kind"]
    head = 4 * SHAPE.vocabulary * SHAPE.hidden  # logits, and their gradient's product with the head; frozen
    # the first layer's input needs no gradient: not through the base's q, k, v, nor through their A
    outputs, inputs, columns = groups()[0]
    first = 2 * (outputs + columns) * inputs
    expected = SHAPE.layers * cell["flops_per_token"] + head - first
    # some versions of transformers compute the rotary angles as an outer product
    assert step["flops"] - TOKENS * expected in (0, TOKENS * SHAPE.head_dim)
    assert step["layers"] == SHAPE.layers and step["tokens_per_second"] == pytest.approx(1e3 * TOKENS / step["ms"])
    assert sum(layer[kind]["seconds"] for kind in KINDS) == pytest.approx(cell["ms_per_layer"] / 1e3)
    assert sum(layer[kind]["kernels"] for kind in KINDS) == cell["kernels_per_layer"] > 50
    assert all(layer[kind]["seconds"] > 0 for kind in KINDS)


def test_the_depth_does_not_change_a_layers_figures(monkeypatch, cells):
    monkeypatch.setattr(roofline, "DEPTHS", (2, 3))
    (again, _) = roofline.run(SHAPE, tokens=TOKENS, document=DOCUMENT, rank=RANK, rates=RATES["h100"], methods=["ours"])
    for name in ("kernels_per_layer", "bytes_per_token", "flops_per_token"):
        assert again[name] == cells["ours", "none"][name]


def test_figures_do_not_depend_on_the_machine(monkeypatch, cells):
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    torch.set_num_threads(threads + 1)
    try:
        again = roofline.run(SHAPE, tokens=TOKENS, document=DOCUMENT, rank=RANK, rates=RATES["h100"], methods=["trl"])
    finally:
        torch.set_num_threads(threads)
    assert again == [cells["trl", "none"], cells["trl", "full"]]


def test_types_are_those_of_the_recipe(cells):
    """fp32 adapters: PEFT casts and multiplies in fp32, whatever the base computes in."""
    assert cells["peft", "none"]["bytes_per_token"] > 1.2 * cells["trl", "none"]["bytes_per_token"]
    assert cells["peft", "none"]["flops_per_token"] == cells["trl", "none"]["flops_per_token"]


def test_documents_that_do_not_divide_the_tokens_are_refused():
    options = {"rank": RANK, "rates": RATES["h100"], "methods": ["ours"]}
    with pytest.raises(UserError, match="--tokens 64 is no multiple of --document 48; give whole documents"):
        roofline.run(SHAPE, tokens=64, document=48, **options)
    with pytest.raises(UserError, match="--document is 16384; expected at most the model's 8192 positions"):
        roofline.run(SHAPE, tokens=16384, document=16384, **options)


# --- kernels and bytes by hand ----------------------------------------------------------------------------------------


def test_kernels_of_a_small_function():
    def small(x, w):
        free = torch.empty_like(x).view(-1)[1:].unsqueeze(0).expand(3, -1).detach()
        assert free.t().shape[1] == 3
        x.t_()
        x.t_()
        torch.zeros(0), torch.empty(3), x.new_empty(3), torch.empty_strided((2,), (1,))
        y = x @ w  # 1
        y.add_(1)  # 2
        y.to(y.dtype).contiguous()
        z = torch.zeros_like(y)  # 3
        z.copy_(y)  # 4
        both = torch.cat([y, z])  # 5
        both.t().contiguous()  # 6
        both.to(torch.float64).sum()  # 7, 8
        both.new_full((3,), 1.0)  # 9
        torch.logsumexp(both, -1)  # 10 to 18: amax, subtraction, exp, sum, and five on a value per row

    found = traced(small, torch.zeros(4, 8), torch.zeros(8, 2))
    assert found.total().kernels == 18
    assert found.total(PRODUCTS).kernels == 1
    assert found.total(PRODUCTS).flops == found.total().flops == 2 * 4 * 8 * 2


F = torch.zeros(4, 8)  # 128 bytes
ROW = torch.zeros(1, 8)  # 32 bytes
INDEX = torch.zeros(3, dtype=torch.int64)  # 24 bytes


@pytest.mark.parametrize(
    ("function", "tensors", "expected"),
    [
        (lambda x: x + 1, [F], 128 + 128),
        (lambda x: x * x, [F], 128 + 128),  # the same elements are read once
        (lambda x: x.add_(1), [F], 128 + 128),
        (lambda x, y: x.add_(y), [F, F.clone()], 128 + 128 + 128),
        (lambda x, y: x + y, [F, ROW], 128 + 32 + 128),
        (lambda x, y: x + y.expand(4, 8), [F, ROW], 128 + 32 + 128),  # what expand repeats is read once
        (lambda x, y: x + y, [F, torch.zeros(())], 128 + 4 + 128),
        (lambda x: x[:2] + 1, [F], 64 + 64),
        (lambda x: x.zero_(), [F], 128),
        (lambda x: torch.zeros_like(x), [F], 128),
        (lambda x, y: x.copy_(y), [F, F.bfloat16()], 64 + 128),  # the old values are not read
        (lambda x: x.to(torch.bfloat16), [F], 128 + 64),
        (lambda x, y: torch.cat([x, y]), [F, ROW], 160 + 160),
        (lambda x, y, z: torch.mm(x, y, out=z), [F, torch.zeros(8, 2), torch.zeros(4, 2)], 128 + 64 + 32),
        (lambda x, y, z: x.addmm_(y, z), [F, torch.zeros(4, 2), torch.zeros(2, 8)], 2 * 128 + 32 + 64),
        (lambda x, i: torch.nn.functional.embedding(i, x), [F, INDEX], 24 + 96 + 96),
        (lambda x, i: x.index_select(0, i), [F, INDEX], 24 + 96 + 96),
        (lambda x, i: x[i], [F, INDEX], 24 + 96 + 96),
        (lambda x, i: x.gather(1, i[:, None]), [F, INDEX], 24 + 12 + 12),
        (lambda x, i, y: x.scatter_add_(1, i[:, None], y), [F, INDEX, torch.zeros(3, 1)], 24 + 12 + 2 * 12),
        (lambda x: torch.ops.aten.slice_backward(x, [8, 8], 0, 0, 4, 1), [F], 256 + 2 * 128),
    ],
)
def test_bytes_of_one_operation(function, tensors, expected):
    assert traced(function, *tensors).total().num_bytes == expected


def test_time_is_the_largest_of_computing_moving_and_launching():
    assert ROUND.seconds(Kernel(PRODUCTS, 5e3, 7e3)) == 7e-9
    assert ROUND.seconds(Kernel(PRODUCTS, 5e3, 7e3, "wide_product_flops")) == 7e-8
    assert ROUND.seconds(Kernel(MEMORY_BOUND, 5e3)) == 5e-9
    assert ROUND.seconds(Kernel(DEQUANTIZATION, 6e3, memory="dequantization_bandwidth")) == pytest.approx(1e-8)
    assert ROUND.seconds(Kernel(MEMORY_BOUND, 1)) == 1e-9
    found = traced(lambda x: (x + 1, x.new_zeros(1)), torch.zeros(1000))
    assert found.total().seconds == pytest.approx(8e-9 + 1e-9)  # kernels do not overlap


@pytest.mark.parametrize(
    ("product", "tensors", "flops"),
    [
        (torch.mm, [F, torch.zeros(8, 2)], 2 * 4 * 8 * 2),
        (torch.addmm, [torch.zeros(2), F, torch.zeros(8, 2)], 2 * 4 * 8 * 2),  # a layer's bias
        (torch.bmm, [torch.zeros(3, 4, 8), torch.zeros(3, 8, 2)], 3 * 2 * 4 * 8 * 2),
        (torch.baddbmm, [torch.zeros(1, 1, 2), torch.zeros(3, 4, 8), torch.zeros(3, 8, 2)], 3 * 2 * 4 * 8 * 2),
        (
            lambda x, y: torch.mm(x, y, out_dtype=torch.float32),
            [F.bfloat16(), torch.zeros(8, 2).bfloat16()],
            2 * 4 * 8 * 2,
        ),
        (torch.add, [F, F], 0),
    ],
)
def test_flops_of_products(product, tensors, flops):
    assert traced(product, *tensors).total().flops == flops


def test_products_in_fp32_have_their_own_rate():
    narrow, wide = (
        traced(torch.mm, torch.zeros(1000, 1000, dtype=dtype), torch.zeros(1000, 1000, dtype=dtype))
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert wide.total().seconds == pytest.approx(10 * narrow.total().seconds)


@pytest.mark.parametrize(("kv_heads", "kernels"), [(4, 3), (2, 5)])
def test_attention_and_its_backward_pass(kv_heads, kernels):
    def attend(q, k, v, borders):
        rest = (borders, borders, 8, 8, True)
        out, statistics, state = torch.ops.torch_attn._varlen_attn(q, k, v, *rest)
        torch.ops.torch_attn._varlen_attn_backward(out, q, k, v, out, statistics, *rest, state)

    q, k = torch.zeros(16, 4, 8).bfloat16(), torch.zeros(16, kv_heads, 8).bfloat16()
    tensors = (q, k, k.clone(), torch.zeros(3, dtype=torch.int32))
    found = traced(attend, *tensors, lengths=(8, 8))
    assert found.total().flops == found.total(ATTENTION).flops == 3.5 * attention_flops(4, 8, (8, 8))
    assert found.total().kernels == 2 + kernels  # two forward; grouped heads are summed, once for keys, once for values
    with pytest.raises(ValueError, match=r"attention over 16 tokens, but the documents' lengths sum to 8; give"):
        traced(attend, *tensors, lengths=(8,))


def test_a_four_bit_product_is_its_dequantization_and_a_product():
    def multiply(x, codes, constants, nested, table, offset):
        torch.ops.bitsandbytes.gemm_4bit(
            x, codes, (64, 128), constants, 64, "nf4",
            absmax_8bit=nested, absmax_code=table, absmax_offset=offset,
        )  # fmt: skip

    weights, blocks = 64 * 128, 64 * 128 // 64
    found = traced(
        multiply, torch.zeros(10, 128).bfloat16(), torch.zeros(weights // 2, 1, dtype=torch.uint8), torch.zeros(1),
        torch.zeros(blocks, dtype=torch.uint8), torch.zeros(256), torch.zeros(()),
    )  # fmt: skip
    product, dequantization = found.total(PRODUCTS), found.total(DEQUANTIZATION)
    assert (product.kernels, dequantization.kernels) == (1, 3)
    assert product.flops == 2 * 10 * weights
    assert product.num_bytes == 2 * (10 * 128 + weights + 10 * 64)
    constants = (blocks + 4 + 1024 + 4 * blocks) + 2 * 4 * blocks
    assert dequantization.num_bytes == constants + 4 * blocks + weights // 2 + 2 * weights


# --- operations that nobody has told it about -------------------------------------------------------------------------


@pytest.fixture
def library():
    found = torch.library.Library("roofline_test", "FRAGMENT")
    yield found
    found._destroy()


def test_an_unknown_operation_is_its_inputs_and_outputs(library):
    library.define("made(Tensor x, Tensor[] more) -> Tensor")
    library.impl("made", lambda x, more: x.new_empty(5), "Meta")
    library.define("told(Tensor x) -> int")
    library.impl("told", lambda x: 3, "Meta")
    library.define("changed(Tensor(a!) x) -> ()")
    library.impl("changed", lambda x: None, "Meta")
    library.define("kept(Tensor(a) x) -> Tensor(a)")
    library.impl("kept", lambda x: x.view(-1), "Meta")
    operations = torch.ops.roofline_test
    found = traced(lambda x: operations.kept(x), F)  # it looks like a view, but only torch's own are known to be free
    assert (found.total().kernels, found.total().num_bytes) == (1, 128)
    found = traced(lambda x, y: operations.made(x, [y, y]), F, ROW)
    assert (found.total(MEMORY_BOUND).kernels, found.total().num_bytes) == (1, 128 + 32 + 20)
    found = traced(lambda x: operations.told(x), F)
    assert (found.total().kernels, found.total().num_bytes) == (1, 128)
    found = traced(torch.ops.aten._assert_async, torch.ones(1))  # torch's own, which returns nothing
    assert (found.total().kernels, found.total().num_bytes) == (1, 4)
    found = traced(lambda x: operations.changed(x), F)
    assert (found.total().kernels, found.total().num_bytes) == (1, 256)


def test_a_kernel_of_this_package_is_one_kernel_that_may_know_its_bytes(monkeypatch):
    own = torch.library.Library("qlora_dist", "FRAGMENT")
    try:
        for name in ("dequantize_roofline_test", "roofline_test"):
            own.define(f"{name}(Tensor x, Tensor(a!) out, int times=3) -> ()")
            own.impl(name, lambda x, out, times=3: None, "Meta")
        operations, pair = torch.ops.qlora_dist, (F, torch.zeros(4, 8).bfloat16())
        monkeypatch.setattr(launches, "_own_traffic", lambda: None)
        found = traced(operations.roofline_test, *pair)
        assert (found.total(MEMORY_BOUND).kernels, found.total().num_bytes) == (1, 128 + 64)  # `out` is only written
        known = {"dequantize_roofline_test": lambda x, out, times: times * x.numel() + out.element_size()}
        monkeypatch.setattr(
            launches, "_own_traffic", lambda: (lambda name, given: known[name](*given), lambda name, given: 5.0)
        )
        found = traced(lambda x, out: operations.dequantize_roofline_test(x, out=out), *pair)
        assert (found.total(DEQUANTIZATION).kernels, found.total().num_bytes) == (1, 3 * 32 + 2)
        assert found.total().flops == 5
        found = traced(operations.roofline_test, *pair)
        assert found.total().num_bytes == 128 + 64  # not listed there
    finally:
        own._destroy()


def test_traffic_is_read_from_the_packages_kernels_if_they_say(monkeypatch):
    package, traffic = "qlora_dist.model.kernels", "qlora_dist.model.kernels.traffic"
    launches._own_traffic.cache_clear()
    for name in (package, traffic):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.bytes_moved, module.flops = (lambda name, args: 17), (lambda name, args: 3.0)
        monkeypatch.setitem(sys.modules, name, module)
    assert [known("anything", ()) for known in launches._own_traffic()] == [17, 3.0]
    launches._own_traffic.cache_clear()
    monkeypatch.setattr(launches.importlib.util, "find_spec", lambda name: None)
    assert launches._own_traffic() is None
    launches._own_traffic.cache_clear()


def test_real_bytes_are_those_of_the_storage():
    assert real_bytes(torch.zeros(())) == 4
    assert real_bytes(torch.zeros(0, 3)) == 0
    assert real_bytes(torch.zeros(3).expand(5, 0, 3)) == 0
    assert real_bytes(torch.zeros(1, 3).expand(5, 3)) == 12
    assert real_bytes(torch.zeros(9, 3)[:1].expand(5, 3)) == 12
    assert real_bytes(torch.zeros(6).unfold(0, 3, 1)) == 24  # windows that overlap


# --- the command ------------------------------------------------------------------------------------------------------


def test_a_rate_that_does_not_exist_or_is_no_rate_is_refused():
    assert roofline._changed(RATES["h100"], ["bandwidth=2e12"]) == RATES["h100"].changed("bandwidth", 2e12)
    assert RATES["h100"].changed("bandwidth", 2e12).dequantization_bandwidth == 1.2e12
    with pytest.raises(UserError, match="there is no rate 'speed'; expected one of product_flops, "):
        roofline._changed(RATES["h100"], ["speed=3"])
    with pytest.raises(UserError, match=r"rate bandwidth is 0\.0; expected a positive number"):
        roofline._changed(RATES["h100"], ["bandwidth=0"])
    with pytest.raises(UserError, match="--rate 'bandwidth': expected NAME=NUMBER"):
        roofline._changed(RATES["h100"], ["bandwidth"])


def test_the_raw_file_has_provenance_and_rates_and_is_reported_as_predicted(tmp_path, monkeypatch, capsys):
    path = tmp_path / "results" / "traced" / "roofline-1b.json"
    options = ["--shape", "1b", "--tokens", "64", "--document", "32", "--methods", "ours", "--gpu", "a100-80",
               "--rate", "bandwidth=1e12", "--allow-dirty"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["roofline", "--json", str(path), *options])
    roofline.main()
    assert "ours  recompute none: predicted" in capsys.readouterr().out
    content = json.loads(path.read_text())
    assert all(name in content["provenance"] for name in provenance.FIELDS)
    assert content["rates"]["bandwidth"] == 1e12
    assert content["rates"]["product_flops"] == RATES["a100-80"].product_flops
    assert [cell["is_predicted"] for cell in content["cells"]] == [True, True]
    text = report.to_markdown(report.build(tmp_path / "results"))
    assert "1b, 64 tokens in documents of 32, r = 16, a100-80: predicted, not measured" in text
    assert "Traced under fake tensors, predicted, not measured" in text
    assert "[raw](results/traced/roofline-1b.json)" in text
