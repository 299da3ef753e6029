"""The plan of a run whose saved activations are in host memory: what is on the device all the same."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qlora_dist.config import parse_config
from qlora_dist.files import MIB
from qlora_dist.memory import plan_memory, shapes_from_config
from qlora_dist.memory.block import layer_bytes
from qlora_dist.memory.constants import OFFLOAD_AHEAD_BYTES, OFFLOAD_IN_FLIGHT, OFFLOAD_LEAST_BYTES
from qlora_dist.memory.layers import LayerSettings
from qlora_dist.memory.step_peak import Kept, held_at_loss, held_in_layer, prefetched
from qlora_dist.memory.tape import Tape
from qlora_dist.model import activation_offload

LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
SHAPES = shapes_from_config(LLAMA_8B)
LAYER = Kept((4 * MIB, 1000, 8 * MIB), 4 * MIB)


def test_the_limits_are_those_of_the_offload():
    assert activation_offload.MIN_BYTES["cuda"] == OFFLOAD_LEAST_BYTES
    assert activation_offload.IN_FLIGHT == OFFLOAD_IN_FLIGHT == 2  # the last norm's and one more: `held_at_loss`


@pytest.mark.parametrize(
    "settings",
    [LayerSettings(512, rank=16), LayerSettings(512, rank=8, dropout=0.1), LayerSettings(512, rank=16, is_block=True)],
)
def test_the_sizes_of_saved_tensors_add_up_to_what_a_layer_saves(settings):
    settings = replace(settings, adapted=frozenset(linear.name for linear in SHAPES.linears))
    layer = layer_bytes(SHAPES, settings, has_grad_input=True)
    assert len(layer.saved_sizes) > 8 and sum(layer.saved_sizes) == layer.saved.activations


def test_at_the_loss_small_tensors_and_the_last_copy_are_on_the_device():
    assert held_at_loss([LAYER, LAYER, LAYER]) == 3 * 1000 + 8 * MIB
    assert held_at_loss([Kept((10, 20), 10)] * 2) == 60  # nothing is moved


def test_a_recomputed_layer_keeps_its_input_until_the_recomputation_ends():
    row = Kept((4 * MIB,), 4 * MIB)
    held = held_in_layer([row] * 3, row, is_recomputed=True)
    assert (held.forward, held.backward) == (16 * MIB, 12 * MIB)


def test_a_layer_that_keeps_its_tensors_has_only_the_nearest_on_the_device():
    own = Kept((0, *[100 * MIB] * 5, 1000), 0)
    held = held_in_layer([LAYER], own, is_recomputed=False)
    # its peak counts 500 MiB; the one that is read and those prefetched are there
    assert held.backward == 1000 + 100 * MIB + OFFLOAD_AHEAD_BYTES and held.on_host == 500 * MIB
    assert held.forward == 1000


def test_prefetching_stops_at_its_limit_but_takes_one_tensor():
    assert prefetched([100 * MIB] * 5) == 200 * MIB
    assert prefetched([100 * MIB, 300 * MIB]) == 300 * MIB
    assert prefetched([100 * MIB, 56 * MIB, 200 * MIB]) == 256 * MIB
    assert prefetched([]) == 0


def test_a_forward_pass_keeps_only_the_last_two_copies():
    tape = Tape(is_offloaded=True)
    x = tape.input(MIB)
    for _ in range(5):
        y = tape.op([x], MIB, saves_output=True)
        tape.drop(y)
    small = tape.op([x], 100, saves_output=True)
    tape.drop(small)
    assert tape.live.activations == 2 * MIB + 100 and tape.peak.activations == 3 * MIB


@pytest.mark.parametrize("recompute", ["none", "full", 16])
@pytest.mark.parametrize("tokens", [512, 4096])
def test_offload_needs_less_on_the_device_and_the_same_activations_on_the_host(recompute, tokens):
    def plan(offload):
        raw = {
            "run_dir": "unused", "model": {"name": "unused"}, "train": {"steps": 1},
            "data": {"train": [{"path": "unused"}], "row_tokens": tokens},
            "memory": {"recompute": recompute, "offload_activations": offload},
        }  # fmt: skip
        return plan_memory(parse_config(raw), SHAPES, world_size=1, device_bytes=None)

    without, with_offload = plan(False), plan(True)
    assert with_offload.tensor_bytes < without.tensor_bytes
    assert with_offload.host_items["saved activations"].size > 0
