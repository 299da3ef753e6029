"""fsdp on several nodes: the base is sharded within a node and held alike by each. Here: two nodes of two ranks."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.ranks import on_ranks, outcome
from helpers.tiny_run import changed, config_of, digests_of, losses_of, make_inputs, train_here

from qlora_dist.commands import invoke
from qlora_dist.config import load_config
from qlora_dist.errors import UserError
from qlora_dist.files import GIB
from qlora_dist.memory import plan_memory, shapes_from_config, with_shards

REPOSITORY = Path(__file__).parents[2]
LAST = "checkpoints/step-00000004"


def on_nodes(sizes: tuple[int, ...]) -> None:
    """Gives this rank its place on nodes of so many ranks, as their launcher would."""
    rank, first = int(os.environ["RANK"]), 0
    for size in sizes:
        if rank < first + size:
            os.environ |= {"LOCAL_RANK": str(rank - first), "LOCAL_WORLD_SIZE": str(size)}
            return
        first += size


def _train(raw: dict[str, Any], sizes: tuple[int, ...] = (2, 2)) -> dict[str, Any]:
    """Trains, and returns what FSDP gathered over: the ranks of this one's group, and its part of a weight."""
    from torch.distributed.fsdp import FSDPModule

    from qlora_dist.train import setup_model

    on_nodes(sizes)
    found: dict[str, Any] = {}
    by_loading = setup_model.load_base

    def load(*given: Any, **options: Any) -> Any:
        model = by_loading(*given, **options)
        weight = model.model.layers[0].mlp.up_proj.weight
        assert isinstance(model.model.layers[0], FSDPModule)
        found["group"] = weight.device_mesh.mesh.tolist()
        found["share"] = weight.to_local().numel() / weight.numel()
        return model

    setup_model.load_base = load
    train_here(raw)
    return found


def _refused(raw: dict[str, Any], sizes: tuple[int, ...]) -> tuple[str, str]:
    on_nodes(sizes)
    return outcome(train_here, raw)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("nodes")
    raw = make_inputs(folder)
    held_out = [{"path": str(folder / "held_out.json"), "format": "input-output"}]
    return changed(raw, strategy__name="fsdp", train__steps=4, train__save_every=2, data__eval=held_out)


@pytest.fixture(scope="module")
def alone(inputs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one rank."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    train_here(changed(inputs, run_dir=str(run_dir)))
    return run_dir


@pytest.fixture(scope="module")
def nodes(inputs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run of two nodes, `shard_over` left at auto."""
    raw = changed(inputs, run_dir=str(tmp_path_factory.mktemp("nodes") / "run"))
    return {"raw": raw, "found": on_ranks(_train, 4, raw)}


def test_a_node_holds_a_whole_base_and_losses_are_those_of_one_rank(nodes: dict[str, Any], alone: Path) -> None:
    assert nodes["found"] == [{"group": group, "share": 0.5} for group in ([0, 1], [0, 1], [2, 3], [2, 3])]
    run_dir = Path(nodes["raw"]["run_dir"])
    assert losses_of(run_dir) == pytest.approx(losses_of(alone), abs=1e-5)
    assert losses_of(run_dir)[-1] < losses_of(run_dir)[0] - 0.1
    summary, expected = (json.loads((one / "summary.json").read_text()) for one in (run_dir, alone))
    assert summary["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-5)


def test_over_all_ranks_it_is_the_same_run_bit_for_bit(nodes: dict[str, Any], tmp_path: Path) -> None:
    """Gradients are summed over all ranks either way, and a gathered layer has the bits of its source."""
    run_dir = tmp_path / "run"
    raw = changed(nodes["raw"], run_dir=str(run_dir), strategy__shard_over="all")
    assert on_ranks(_train, 4, raw) == [{"group": [0, 1, 2, 3], "share": 0.25}] * 4
    assert digests_of(run_dir / LAST) == digests_of(Path(nodes["raw"]["run_dir"]) / LAST)


def _interrupted(run_dir: str, folder: Path) -> Path:
    """The run as it was after its second step."""
    copy = Path(shutil.copytree(run_dir, folder / "run"))
    shutil.rmtree(copy / LAST)
    for file in ("completed", "summary.json"):
        (copy / file).unlink()
    return copy


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(nodes: dict[str, Any], tmp_path: Path) -> None:
    run_dir = _interrupted(nodes["raw"]["run_dir"], tmp_path)
    assert on_ranks(_train, 4, changed(nodes["raw"], run_dir=str(run_dir))) == nodes["found"]
    assert digests_of(run_dir / LAST) == digests_of(Path(nodes["raw"]["run_dir"]) / LAST)


@pytest.mark.parametrize("changes", [{"strategy__name": "ddp"}, {}], ids=["ddp", "fsdp-of-one-rank"])
def test_its_checkpoints_go_on_on_one_rank_and_those_of_one_rank_here(
    nodes: dict[str, Any], alone: Path, changes: dict[str, Any], tmp_path: Path
) -> None:
    run_dir = _interrupted(nodes["raw"]["run_dir"], tmp_path)
    train_here(changed(nodes["raw"], run_dir=str(run_dir), **changes))
    assert losses_of(run_dir) == pytest.approx(losses_of(alone), abs=1e-5) and len(losses_of(run_dir)) == 4
    if not changes:
        back = _interrupted(str(alone), tmp_path / "back")
        on_ranks(_train, 4, changed(nodes["raw"], run_dir=str(back)))
        assert losses_of(back) == pytest.approx(losses_of(alone), abs=1e-5) and len(losses_of(back)) == 4


def test_nodes_of_different_sizes_are_refused_or_shard_over_all(nodes: dict[str, Any], tmp_path: Path) -> None:
    """Before anything is read: by `node` with words, by auto with the groups that are possible."""
    raw = changed(nodes["raw"], run_dir=str(tmp_path / "run"), batch__rows_per_step=3)
    for kind, text in on_ranks(_refused, 3, changed(raw, strategy__shard_over="node"), (2, 1)):
        assert kind == "UserError" and "nodes have different numbers of ranks" in text
        assert "start the same number on every node, or set strategy.shard_over=all" in text
    assert not (tmp_path / "run").exists()
    assert [one["group"] for one in on_ranks(_train, 3, raw, (2, 1))] == [[0, 1, 2]] * 3


def _with_a_wrong_gather(raw: dict[str, Any]) -> tuple[str, str]:
    from qlora_dist.model.weights import shard

    on_nodes((2, 2))
    if os.environ["RANK"] == "3":
        shard._equals_source = lambda *_: False
    return outcome(train_here, raw)


def test_a_wrong_gather_on_one_node_ends_all(nodes: dict[str, Any], tmp_path: Path) -> None:
    found = on_ranks(_with_a_wrong_gather, 4, changed(nodes["raw"], run_dir=str(tmp_path / "run")))
    assert [kind for kind, _ in found] == ["RunFailed"] * 4
    # those of the other node hear of it, or of a rank that has ended already
    assert all("differs from its source" in text for _, text in found[2:]), found


# --- by the plan ------------------------------------------------------------------------------------------------------

_70B = {"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000, "tie_word_embeddings": False,
        }  # fmt: skip


def _shards(over: Any, node_ranks: int | None, world_size: int, device_bytes: int | None = None) -> Any:
    config = load_config(REPOSITORY / "launch/recipes/llama2-70b-fsdp.yaml", [f"strategy.shard_over={over}"])
    shapes = shapes_from_config(_70B)
    assert shapes is not None
    found = with_shards(config, shapes, world_size=world_size, node_ranks=node_ranks, device_bytes=device_bytes)
    return found.strategy.shard_over


def test_auto_is_a_node_where_that_fits_by_the_plan_else_all_ranks() -> None:
    """70B in 4 bits: 35 GB, which two cards of 24 GB hold, and one does not."""
    card = 24 * GIB
    assert _shards("auto", 8, 16, card) == 8 and _shards("auto", 4, 16, card) == 4
    assert _shards("auto", 2, 16, 16 * GIB) == "all" and _shards("auto", 8, 16, 16 * GIB) == 8
    assert _shards("auto", 8, 16) == 8  # nothing is planned on a CPU
    assert _shards("auto", 16, 16, card) == _shards("auto", 1, 16, card) == _shards("auto", None, 16, card) == "all"
    assert _shards("node", 2, 16, GIB) == 2 and _shards("all", 8, 16, card) == "all"
    assert _shards(4, 8, 16) == 4 and _shards(16, 8, 16) == 16
    for over, node_ranks, message in (
        (3, 8, r"shard_over is 3, which does not divide the number of ranks on a node \(8\)"),
        (4, None, "not the same on all nodes"),
        ("node", 1, "a node has one rank, over which nothing is sharded"),
        ("node", None, "different numbers of ranks"),
    ):
        with pytest.raises(UserError, match=message):
            _shards(over, node_ranks, 16)


def test_the_plan_counts_a_nodes_shards() -> None:
    config = load_config(REPOSITORY / "launch/recipes/llama2-70b-fsdp.yaml")
    shapes = shapes_from_config(_70B)
    assert shapes is not None

    def base(world_size: int, over: Any) -> int:
        changed_config = config.model_copy(update={"strategy": config.strategy.model_copy(update={"shard_over": over})})
        return plan_memory(changed_config, shapes, world_size=world_size, device_bytes=None).items["base"].size

    assert base(16, 8) == base(8, "all") == pytest.approx(base(1, "all") / 8, rel=1e-6)
    assert base(16, "all") == pytest.approx(base(16, 8) / 2, rel=1e-6)


def test_plan_of_nodes(inputs: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(inputs))

    def base(*words: str) -> int:
        assert invoke(["plan", str(tmp_path / "c.yaml"), "--json", *words]) == 0
        return json.loads(capsys.readouterr().out)["items"]["base"]

    whole = base()
    assert base("--ranks", "4") == whole // 4 and base("--ranks", "4", "--nodes", "2") == whole // 2
    assert invoke(["plan", str(tmp_path / "c.yaml"), "--ranks", "4", "--nodes", "3"]) == 2
    assert "4 ranks on 3 nodes: expected the same number on each" in capsys.readouterr().err


def test_only_fsdp_reads_it(inputs: dict[str, Any], tmp_path: Path) -> None:
    raw = changed(inputs, run_dir=str(tmp_path / "run"), strategy__name="ddp", strategy__shard_over="node")
    with pytest.raises(UserError, match=r"strategy\.shard_over is node, which only strategy fsdp reads"):
        train_here(raw)
    for wrong in (1, True, "rack", 2.5):
        with pytest.raises(UserError, match=r"strategy\.shard_over"):
            config_of(inputs, strategy__shard_over=wrong)
