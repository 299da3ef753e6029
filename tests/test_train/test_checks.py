"""Each failure that is silent elsewhere is injected here, and ends a run with its own name and exit code."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from helpers.ranks import on_ranks, outcome
from helpers.tiny_models import FAMILIES, save_model, tiny_model
from helpers.tiny_run import config_of, write_config
from torch.utils._python_dispatch import TorchDispatchMode

import qlora_dist
from qlora_dist import commands as cli
from qlora_dist.errors import RunFailed, UserError
from qlora_dist.model import base_checksum, held_bytes, load_base, own_part, unwrap
from qlora_dist.train import train
from qlora_dist.train.checks.base import check_base_bytes, check_base_unchanged, check_source_bits, promised_base_bytes
from qlora_dist.train.trained_weights import restore_trained, save_trained, verify_trained

CPU = torch.device("cpu")
PACKAGE = Path(qlora_dist.__file__).parent


def base_of(folder: Path, quantization: str = "nf4", double_quant: bool = True):
    return load_base(
        str(folder),
        quantization=quantization,
        double_quant=double_quant,
        compute_dtype=torch.float32,
        attention="auto",
        device=CPU,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("base"))


# --- the base ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])  # separate, Conv1D, tied head
@pytest.mark.parametrize(
    ("quantization", "double_quant"), [("nf4", True), ("nf4", False), ("int8", True), ("none", True)]
)
def test_the_bytes_in_memory_are_those_that_the_shapes_promise(family, quantization, double_quant, tmp_path):
    assert family in FAMILIES
    save_model(tmp_path, tiny_model(family, attention=None))
    model = base_of(tmp_path, quantization, double_quant)
    promised = promised_base_bytes(
        str(tmp_path), quantization=quantization, double_quant=double_quant, dtype=torch.float32
    )
    assert held_bytes(model) == promised.on_each_rank()  # exactly: storages of one rank, nothing is estimated
    assert promised.matrices > 0
    cut = promised.matrices + promised.constants
    assert promised.on_each_rank("fsdp", 2) == -(-cut // 2) + promised.vectors + promised.nested


def test_a_base_that_is_not_quantized_or_not_sharded_is_named_with_rank_and_host(folder):
    promised = promised_base_bytes(str(folder), quantization="nf4", double_quant=True, dtype=torch.float32)
    whole = held_bytes(base_of(folder))
    check_base_bytes([("a", whole), ("b", whole)], promised.on_each_rank(), "ddp")
    plain = held_bytes(base_of(folder, "none"))
    with pytest.raises(
        RunFailed, match=r"strategy ddp promises [\d.]+ KiB .* rank 1 \(b\) holds [\d.]+ KiB: the base is not"
    ):
        check_base_bytes([("a", whole), ("b", plain)], promised.on_each_rank(), "ddp")
    # a rank of two that holds everything
    with pytest.raises(RunFailed, match=r"strategy fsdp promises .* rank 0 \(a\) holds .*; rank 1 \(b\) holds"):
        check_base_bytes([("a", whole), ("b", whole)], promised.on_each_rank("fsdp", 2), "fsdp")


@pytest.mark.parametrize("promised", [2**30, 70 * 2**30])
def test_one_layer_of_a_hundred_left_in_16_bits_is_noticed(promised):
    """It adds 3 % in nf4; what no shape tells (alignment, a few buffers) is less than one."""
    for share in (0.991, 1.0, 1.009):
        check_base_bytes([("a", promised), ("b", int(share * promised))], promised, "ddp")
    for share in (0.98, 1.02):
        with pytest.raises(RunFailed, match=r"but rank 1 \(b\) holds"):
            check_base_bytes([("a", promised), ("b", int(share * promised))], promised, "ddp")


def test_a_run_with_a_wrong_kernel_ends_before_its_first_step(raw, monkeypatch):
    from qlora_dist.model import decoder_block

    def halved(gate_up, rows, low, joined):
        right(gate_up, rows, low, joined)
        joined[:, ::2] *= 0.5

    right = decoder_block.swiglu_lower
    monkeypatch.setattr(decoder_block, "swiglu_lower", halved)
    with pytest.raises(RunFailed, match="kernels of a decoder layer give wrong results"):
        train(config_of(raw))
    assert not (Path(raw["run_dir"]) / "metrics.jsonl").exists()
    train(config_of(raw, model__kernels="reference"))


def _shared_base(raw, strategy):
    from qlora_dist.cluster.world import World
    from qlora_dist.train import fit_memory as fitting
    from qlora_dist.train import setup_model

    world = World.init()
    config = fitting.resolve_auto(config_of(raw, strategy__name=strategy), world).config
    model = setup_model.build_model(config, world)
    said = setup_model.check_base(config, world, model)
    kept, model.base_checksum = model.base_checksum, None
    if world.rank == 1:  # one byte of this rank's part
        own_part(next(p for p in model.module.parameters() if p.dtype == torch.uint8)).view(-1)[0] ^= 1
    is_changed = base_checksum(model.module) != kept
    unwrap(model.module).waste = torch.nn.Parameter(torch.ones(2**16))
    return said, is_changed, outcome(setup_model.check_base, config, world, model)


@pytest.mark.parametrize(
    ("strategy", "compared"), [("fsdp", "is bit-equal to its"), ("zero3", "is not compared with its")]
)
def test_ranks_that_share_a_base_hold_half_each_and_see_a_change_of_their_part(raw, strategy, compared):
    for rank, (said, is_changed, failure) in enumerate(on_ranks(_shared_base, 2, raw, strategy)):
        assert f"as {strategy} promises; a gathered layer {compared}" in said
        assert is_changed is (rank == 1)
        assert failure[0] == "RunFailed" and f"strategy {strategy} promises" in failure[1]


def test_a_small_view_of_a_large_buffer_costs_the_buffer(folder):
    model = base_of(folder)
    before = held_bytes(model)
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = torch.cat([weight.data, weight.data])[: len(weight.data)]
    assert held_bytes(model) == before + weight.data.numel()


@pytest.mark.parametrize("seed", [0, 5])
def test_a_layer_in_memory_has_the_bits_of_its_quantized_file_or_the_run_ends(folder, seed):
    model = base_of(folder)
    said = check_source_bits(model, str(folder), compute_dtype=torch.float32, seed=seed)
    name = said.removesuffix(" is bit-equal to its quantized source")
    assert name != said
    weight = model.get_parameter(name)
    weight.data[0, 0] ^= 1
    with pytest.raises(RunFailed, match=f"{name}: its codes in memory differ from those of its quantized source"):
        check_source_bits(model, str(folder), compute_dtype=torch.float32, seed=seed)
    weight.data[0, 0] ^= 1
    weight.quant_state.absmax[0] ^= 1
    with pytest.raises(RunFailed, match="its constants in memory differ from"):
        check_source_bits(model, str(folder), compute_dtype=torch.float32, seed=seed)


def test_the_checksum_sees_one_changed_bit_anywhere_and_the_same_base_gives_the_same(folder):
    model = base_of(folder)
    before = base_checksum(model)
    assert base_checksum(base_of(folder)) == before
    layer = model.model.layers[1].self_attn.q_proj.weight
    places = [
        layer.data,
        layer.quant_state.absmax,
        layer.quant_state.state2.absmax,
        model.model.norm.weight.data,
        model.model.embed_tokens.weight.data,
    ]
    for place in places:
        flat = place.view(-1).view(torch.uint8)
        for index in (0, len(flat) - 1):  # also of the tail that is no whole row of the checksum
            flat[index] ^= 1
            assert base_checksum(model) != before
            flat[index] ^= 1
    assert base_checksum(model) == before
    layer.data.copy_(layer.data.flip(0))  # the same bytes in another order
    assert base_checksum(model) != before


def test_a_base_that_changes_while_it_trains_ends_the_run_before_the_save(raw, monkeypatch, capsys, tmp_path):
    from qlora_dist.train import step as step_module

    original = step_module.train_step

    def writing(world, model, rows, **options):
        if options["step"] == 3:
            model.module.get_submodule("base_model.model.model.layers.1.mlp.up_proj").base_layer.weight.data[3] ^= 1
        return original(world, model, rows, **options)

    monkeypatch.setattr("qlora_dist.train.train_step", writing)
    config = write_config(tmp_path / "c.yaml", raw, train__steps=6, train__save_every=2)
    assert cli.invoke(["train", str(config)]) == 1
    assert "after step 4: the frozen base has changed since it was loaded on rank 0 (" in capsys.readouterr().err
    assert [path.name for path in (Path(raw["run_dir"]) / "checkpoints").iterdir()] == ["step-00000002"]
    with pytest.raises(RunFailed, match=r"rank 1 \(b\)"):
        check_base_unchanged([("a", False), ("b", True)], "after step 4")


def test_a_base_left_in_another_type_ends_the_run_before_the_first_step(raw, monkeypatch, capsys, tmp_path):
    original = load_base

    def unquantized(name, **options):
        return original(name, **{**options, "quantization": "none"})

    monkeypatch.setattr("qlora_dist.train.setup_model.load_base", unquantized)
    assert cli.invoke(["train", str(write_config(tmp_path / "c.yaml", raw))]) == 1
    assert "strategy ddp promises" in capsys.readouterr().err
    assert not (Path(raw["run_dir"]) / "metrics.jsonl").exists()


def test_a_rank_whose_base_differs_ends_all_ranks(raw):
    # gathered: what one rank finds, all ranks say, and none waits for another
    results = on_ranks(_flips_after_load, 2, raw)
    assert {name for name, _ in results} == {"RunFailed"}
    assert all(
        "after step 2: the frozen base has changed since it was loaded on rank 1 (" in text for _, text in results
    )


def _flips_after_load(raw):
    from qlora_dist.train import save_and_resume

    original = save_and_resume.base_checksum
    save_and_resume.base_checksum = lambda model: "other" if _rank() == 1 else original(model)
    return outcome(train, config_of(raw))


def _rank():
    import os

    return int(os.environ["RANK"])


# --- what is saved ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("defect", ["wrong names", "another value"])
def test_an_adapter_that_does_not_reload_ends_the_run_and_no_checkpoint_is_lost(
    raw, monkeypatch, capsys, tmp_path, defect
):
    from safetensors.torch import load_file, save_file

    from qlora_dist.train import save_and_resume

    original = save_and_resume.save_trained
    saves = []

    def broken(model, folder, base_name, is_full):
        original(model, folder, base_name, is_full)
        saves.append(folder)
        if len(saves) == 2:
            state = load_file(folder / "adapter_model.safetensors")
            if defect == "wrong names":  # what saving a compiled model gives
                state = {key.replace("model.layers", "_orig_mod.layers"): value for key, value in state.items()}
            else:
                next(iter(state.values()))[0, 0] += 1e-7
            save_file(state, folder / "adapter_model.safetensors")

    monkeypatch.setattr(save_and_resume, "save_trained", broken)
    config = write_config(tmp_path / "c.yaml", raw, train__steps=4, train__save_every=2, train__keep=1)
    assert cli.invoke(["train", str(config)]) == 1
    assert "differs from the one in memory" in capsys.readouterr().err
    # keep is 1: the earlier checkpoint goes only when the later one is good
    kept = [path.name for path in (Path(raw["run_dir"]) / "checkpoints").glob("step-*")]
    assert kept == ["step-00000002"]


def test_all_weights_are_read_back_bit_by_bit(tmp_path):
    from safetensors.torch import load_file, save_file

    model = tiny_model()
    save_trained(model, tmp_path, "base", is_full=True)
    verify_trained(model, tmp_path, is_full=True)
    stored = load_file(tmp_path / "weights.safetensors")
    for name in (next(iter(stored)), list(stored)[-1]):
        changed_weight = stored[name].clone()
        changed_weight.view(-1)[-1] += 1e-6
        save_file({**stored, name: changed_weight}, tmp_path / "weights.safetensors")
        with pytest.raises(RunFailed, match=f"differs from what is in memory: 1 tensors, first {name}"):
            verify_trained(model, tmp_path, is_full=True)
    save_file(stored | {"more": torch.ones(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="its weights belong to another model"):
        restore_trained(model, tmp_path, is_full=True)


# --- the checks cost a step nothing -----------------------------------------------------------------------------------


class _CountSyncs(TorchDispatchMode):
    """Counts reads of single values: what makes the host wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return function(*args, **(kwargs or {}))


def test_a_training_step_reads_values_once(raw, monkeypatch):
    """By one tolist, which the dispatcher does not see on a CPU: everything that it sees is one too many."""
    from qlora_dist.train import step as step_module

    original = step_module.train_step
    counts = []

    def counting(*args, **options):
        with _CountSyncs() as counter:
            stats = original(*args, **options)
        counts.append(counter.count)
        return stats

    monkeypatch.setattr("qlora_dist.train.train_step", counting)
    train(config_of(raw, train__steps=3))
    # the optimizer of the CPU reads its own step count, one a group
    assert counts[1:] == [counts[1]] * 2 and counts[1] <= 1
    tree = ast.parse((PACKAGE / "train" / "step.py").read_text())
    (step,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train_step"]
    reads = [
        node.func.attr
        for node in ast.walk(step)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("item", "tolist", "cpu", "numpy", "synchronize", "gather", "from_main", "any", "max")
    ]  # fmt: skip
    assert reads == ["tolist"]


COLLECTIVES = {"sum", "max", "any", "gather", "from_main", "require_equal", "local_main_first", "all_reduce", "barrier"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_only_rank_0_does_contains_no_collective(path):
    """Functions given to `from_main`, and those of the same file that they call: plain values of `world` only."""
    tree = ast.parse(path.read_text())
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    todo: list[ast.AST] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "from_main":
            (argument,) = node.args
            todo.append(functions[argument.id] if isinstance(argument, ast.Name) else argument)
    seen: set[int] = set()
    while todo:
        body = todo.pop()
        if id(body) in seen:
            continue
        seen.add(id(body))
        for node in ast.walk(body):
            if not isinstance(node, ast.Call):
                continue
            if isinstance(node.func, ast.Name) and node.func.id in functions:
                todo.append(functions[node.func.id])
            if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
                is_collective = node.func.value.id in ("world", "dist") and node.func.attr in COLLECTIVES
                assert not is_collective, f"{path.name}:{node.lineno} a collective that only rank 0 would enter"
