"""Dropout is a function of (row, layer, token, channel): not of the micro-batch, the rank or the pass."""

from __future__ import annotations

import pytest
import torch

from qlora_dist.model.dropout import DropoutRows, RowDropout, dropout_rows, use_row_dropout


def dropped(
    rows: tuple[tuple[int, int], ...], layer: int = 3, p: float = 0.4, tokens: int | None = None
) -> torch.Tensor:
    """What a layer of ones becomes."""
    tokens = sum(size for size, _ in rows) if tokens is None else tokens
    return RowDropout(p, layer, DropoutRows(rows))(torch.ones(1, tokens, 16))


def test_a_row_drops_the_same_alone_and_beside_others() -> None:
    together = dropped(((7, 11), (5, 22), (9, 33)))[0]
    for part, row in zip(together.split((7, 5, 9)), ((7, 11), (5, 22), (9, 33)), strict=True):
        assert torch.equal(part, dropped((row,))[0])


def test_rows_and_layers_drop_differently() -> None:
    masks = [dropped(((64, 1),)), dropped(((64, 2),)), dropped(((64, 1),), layer=4)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(masks[one], masks[other])


def test_all_layers_of_a_model_read_the_same_rows_and_each_has_a_mask_of_its_own() -> None:
    layers = {f"layer{i}": torch.nn.Module() for i in range(5)}
    for layer in layers.values():
        layer.lora_dropout = torch.nn.ModuleDict({"default": torch.nn.Dropout(0.5)})
    model = torch.nn.ModuleDict(layers)
    use_row_dropout(layers)
    dropout_rows(model).rows = ((64, 7),)
    masks = {
        tuple(layer.lora_dropout["default"](torch.ones(1, 64, 16)).flatten().tolist()) for layer in layers.values()
    }
    assert len(masks) == len(layers)


def test_what_is_kept_is_scaled_so_that_the_mean_stays_and_gradients_use_the_same_mask() -> None:
    x = torch.ones(1, 1000, 16, requires_grad=True)
    y = RowDropout(0.4, 0, DropoutRows(((1000, 5),)))(x)
    assert y.unique().tolist() == [0.0, pytest.approx(1 / 0.6)]
    assert y.detach().mean().item() == pytest.approx(
        1.0, abs=5 * (0.4 / 0.6 / 16_000) ** 0.5
    )  # five standard deviations
    y.backward(torch.ones_like(y))
    assert x.grad is not None and torch.equal(x.grad, y.detach())


def test_an_expert_that_sees_some_of_the_tokens_drops_too() -> None:
    part = dropped(((7, 11), (5, 22)), tokens=4)
    assert part.shape == (1, 4, 16) and 0 < int((part == 0).sum()) < 64


def test_it_is_off_in_evaluation_and_refuses_to_train_without_the_rows() -> None:
    module = RowDropout(0.4, 0, DropoutRows())
    x = torch.ones(1, 4, 16)
    assert module.eval()(x) is x
    with pytest.raises(RuntimeError, match="rows"):
        module.train()(x)
