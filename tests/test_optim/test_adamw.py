"""Learning rate schedules as a table; optimizer states that survive a save, for every optimizer."""

import copy

import pytest
import torch

from qlora_dist.memory.live_bytes import LiveBytes
from qlora_dist.optim.adamw import build_optimizer, decays, load_optimizer_state, lr_at, optimizer_state, step_optimizer
from qlora_dist.optim.flat import FlatParameters, digest_of

NAMES = ["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"]


def _flat(seed: int = 0) -> FlatParameters:
    generator = torch.Generator().manual_seed(seed)
    # the first ends within a block of 256
    shapes = {"a.weight": (64, 33), "b.weight": (96, 64), "b.bias": (64,)}
    return FlatParameters(
        {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}, decays
    )


def _optimizer(flat: FlatParameters, name: str, weight_decay: float = 0.1) -> torch.optim.Optimizer:
    return build_optimizer(flat, name=name, lr=1e-2, weight_decay=weight_decay, betas=(0.9, 0.999), eps=1e-8)


def _step(flat: FlatParameters, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for grad in flat.grads:
        grad.copy_(torch.randn(grad.shape, generator=generator))
    step_optimizer(optimizer, 1e-2)
    flat.zero_grad()


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.775, 0.55, 0.325]),
        ("cosine", [0.5, 1.0, 1.0, 0.868198, 0.55, 0.231802]),
    ],
)
def test_learning_rate_table(schedule, expected):
    found = [lr_at(step, lr=1.0, schedule=schedule, warmup_steps=2, num_steps=6, min_lr_ratio=0.1) for step in range(6)]
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("share", "num_steps", "steps"), [(0.25, 8, 2), (0.3, 8, 3), (1e-9, 8, 1), (0.0, 8, 0)])
def test_a_warm_up_below_one_is_that_share_of_the_steps_rounded_up(share, num_steps, steps):
    settings = {"lr": 1.0, "schedule": "cosine", "num_steps": num_steps, "min_lr_ratio": 0.1}
    found = [lr_at(step, warmup_steps=share, **settings) for step in range(num_steps)]
    assert found == [lr_at(step, warmup_steps=steps, **settings) for step in range(num_steps)]


def test_flat_torch_adamw_equals_adamw_tensor_by_tensor():
    flat = _flat()
    separate = [p.detach().clone().requires_grad_() for group in flat.groups for p in group.parameters.values()]
    options = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8}
    groups = [
        {"params": [p for p in separate if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in separate if p.ndim < 2], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, **options)
    optimizer = _optimizer(flat, "adamw")
    views = [p for group in flat.groups for p in group.parameters.values()]
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        for mine, theirs in zip(views, separate):
            grad = torch.randn(mine.shape, generator=generator)
            mine.grad.copy_(grad)
            theirs.grad = grad
        step_optimizer(optimizer, 1e-2)
        reference.step()
    for mine, theirs in zip(views, separate):
        torch.testing.assert_close(mine.data, theirs.data, rtol=1e-6, atol=1e-7)  # fused against plain: rounding only


@pytest.mark.parametrize("name", ["paged_adamw_32bit", "adamw_8bit", "paged_adamw_8bit"])
def test_bitsandbytes_optimizers_follow_adamw(name):
    flat, reference = _flat(), _flat()
    optimizer, plain = _optimizer(flat, name), _optimizer(reference, "adamw")
    start = flat.groups[0].weight.detach().clone()
    for seed in range(20):
        _step(flat, optimizer, seed)
        _step(reference, plain, seed)
    moved = reference.groups[0].weight - start
    error = (flat.groups[0].weight - reference.groups[0].weight).norm() / moved.norm()
    assert moved.norm() > 1.0
    assert error < (1e-5 if "32bit" in name else 0.1)  # 8-bit states: blockwise rounding of both moments


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_states_continue_bit_identically(name):
    flat = _flat()
    optimizer = _optimizer(flat, name)
    for seed in range(3):
        _step(flat, optimizer, seed)
    tensors, numbers = optimizer_state(optimizer)
    weights = [group.weight.detach().clone() for group in flat.groups]
    before = copy.deepcopy(tensors)
    for seed in (3, 4):
        _step(flat, optimizer, seed)
    assert all(torch.equal(tensors[key], value) for key, value in before.items()), "a state changed while it is written"

    other = _flat(seed=1)
    resumed = _optimizer(other, name)
    for group, weight in zip(other.groups, weights):
        group.weight.data.copy_(weight)
    load_optimizer_state(resumed, tensors, numbers)
    for group, weight in zip(other.groups, weights):
        assert torch.equal(group.weight, weight), "loading states changed the weights"
    for seed in (3, 4):
        _step(other, resumed, seed)
    for mine, theirs in zip(other.groups, flat.groups):
        assert torch.equal(mine.weight, theirs.weight)


def test_states_of_another_optimizer_are_refused():
    flat = _flat()
    optimizer = _optimizer(flat, "adamw")
    _step(flat, optimizer, 0)
    tensors, numbers = optimizer_state(optimizer)
    with pytest.raises(ValueError, match=r"optimizer states: saved \[.*\], but this optimizer expects \["):
        load_optimizer_state(_optimizer(_flat(), "paged_adamw_8bit"), tensors, numbers)


def test_states_of_another_type_or_shape_are_refused():
    flat = _flat()
    optimizer = _optimizer(flat, "adamw")
    _step(flat, optimizer, 0)
    tensors, numbers = optimizer_state(optimizer)
    for change in (lambda value: value.half(), lambda value: value[:-1]):
        with pytest.raises(ValueError, match=r"optimizer state 0\.exp_avg: saved .*, expected \("):
            load_optimizer_state(
                _optimizer(_flat(), "adamw"), tensors | {"0.exp_avg": change(tensors["0.exp_avg"])}, numbers
            )


@pytest.mark.parametrize("name", NAMES)
def test_the_optimizer_has_every_value_of_the_config_and_steps_at_the_given_rate(name):
    options = {"lr": 0.5, "betas": (0.8, 0.95), "eps": 1e-3}
    optimizer = build_optimizer(_flat(), name=name, weight_decay=0.25, **options)
    for group, decay in zip(optimizer.param_groups, (0.25, 0.0), strict=True):
        assert {key: group[key] for key in options} == options and group["weight_decay"] == decay
    built, given = _flat(), _flat()
    at_rate, at_other = (build_optimizer(flat, name=name, weight_decay=0.1, **{**options, "lr": lr})
                         for flat, lr in ((built, 1e-2), (given, 0.5)))  # fmt: skip
    for seed in range(2):
        _step(built, at_rate, seed)  # at 1e-2
        _step(given, at_other, seed)
    assert all(torch.equal(mine.weight, other.weight) for mine, other in zip(built.groups, given.groups))


def test_a_digest_is_that_of_every_bit():
    weights = dict(_flat().each_weight())
    digests = {digest_of(weights.items())}
    for name, weight in weights.items():
        changed = weight.detach().clone()
        changed.view(-1)[-1] += 1e-6
        digests.add(digest_of((weights | {name: changed}).items()))
    assert len(digests) == 1 + len(weights)
    copied = {name: weight.detach().clone() for name, weight in weights.items()}
    assert digest_of(copied.items()) == digest_of(weights.items())


def test_building_the_flat_storages_never_needs_more_memory_than_a_step():
    """Weights move one by one and gradients are allocated last: old and new weights with gradients would be three."""
    with LiveBytes({}) as live:
        flat = FlatParameters({f"w{i}": torch.nn.Parameter(torch.ones(64, 64)) for i in range(8)}, decays)
        weights = 8 * 64 * 64 * 4
        assert live.total == 2 * weights and len(flat.groups) == 1  # weights and gradients
        assert live.peak_bytes <= 2 * weights + 64 * 64 * 4


def test_weights_and_gradients_are_views_of_one_storage_and_no_group_is_empty():
    flat = _flat()
    assert [group.decays for group in flat.groups] == [True, False]
    for group in flat.groups:
        for placement, parameter in zip(group.placements, group.parameters.values()):
            assert placement.start % 256 == 0
            assert parameter.data_ptr() == group.weight.data_ptr() + 4 * placement.start
            assert parameter.grad.data_ptr() == group.weight.grad.data_ptr() + 4 * placement.start
    only_matrices = FlatParameters({"w": torch.nn.Parameter(torch.ones(4, 4))}, decays)
    assert len(only_matrices.groups) == 1
    (only_matrices.groups[0].parameters["w"].sum()).backward()
    assert only_matrices.grads[0][:16].eq(1).all(), "autograd must add into the flat gradient"
    assert only_matrices.grad_norm().item() == pytest.approx(4.0)
