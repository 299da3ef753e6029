"""The chunked loss equals F.cross_entropy in value and gradient, and never holds all logits."""

import pytest
import torch
import torch.nn.functional as F

from qlora_dist.model.loss import OutputHead, nll_sum


def _case(dtype=torch.float64, tokens=40, hidden=24, vocabulary=97):
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, hidden, generator=generator, dtype=torch.float64) / 3).to(dtype).requires_grad_()
    bias = torch.randn(vocabulary, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    positions = torch.randperm(tokens, generator=generator)[: tokens // 2].sort().values
    labels = torch.randint(vocabulary, (len(positions),), generator=generator)
    return h, weight, bias, positions, labels


def _reference(h, weight, bias, positions, labels, scale, softcap):
    logits = scale * (h[positions] @ weight.T + (0 if bias is None else bias))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels, reduction="sum")


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 5.0), (2.0, 5.0)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_chunked_loss_equals_cross_entropy_in_value_and_gradient(chunk, scale, softcap, has_bias):
    h, weight, bias, positions, labels = _case()
    bias = bias if has_bias else None
    inputs = [h, weight] + ([bias] if has_bias else [])
    expected = _reference(h, weight, bias, positions, labels, scale, softcap)
    expected_grads = torch.autograd.grad(expected, inputs)
    found = nll_sum(h, OutputHead(weight, bias, softcap, scale), positions, labels, chunk=chunk)
    found_grads = torch.autograd.grad(found, inputs, retain_graph=True)
    # fp64: only the summation order differs
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for found_grad, expected_grad in zip(found_grads, expected_grads):
        torch.testing.assert_close(found_grad, expected_grad, rtol=1e-10, atol=1e-12)
    # what the loss is divided by later multiplies every gradient
    for scaled, expected_grad in zip(torch.autograd.grad(found / 7, inputs), expected_grads):
        torch.testing.assert_close(scaled, expected_grad / 7, rtol=1e-10, atol=1e-12)


def test_the_loss_uses_the_heads_logits():
    h, weight, bias, positions, labels = _case()
    head = OutputHead(weight, bias, softcap=4.0, scale=0.5)
    from_logits = F.cross_entropy(head.logits(h[positions]), labels, reduction="sum")
    torch.testing.assert_close(nll_sum(h, head, positions, labels), from_logits, rtol=1e-12, atol=0)


def test_a_batch_without_labels_gives_zero_with_a_graph():
    h, weight, _, _, _ = _case(torch.float32)
    empty = torch.empty(0, dtype=torch.int64)
    loss = nll_sum(h, OutputHead(weight), empty, empty)
    assert loss.item() == 0.0
    loss.backward()
    assert h.grad is not None and not h.grad.any()
    assert weight.grad is not None and not weight.grad.any()


def test_sixteen_bit_inputs_give_a_sum_in_fp32():
    h, weight, _, positions, labels = _case(torch.bfloat16, tokens=2000)
    exact = _reference(h.double(), weight.double(), None, positions, labels, 1.0, None)
    loss = nll_sum(h, OutputHead(weight), positions, labels)
    assert loss.dtype == torch.float32
    # logits are rounded to bf16 (2^-9 each, both signs); their errors average out over 1,000 labels
    torch.testing.assert_close(loss.double(), exact, rtol=1e-3, atol=0)
    assert nll_sum(h.detach(), OutputHead(weight.detach()), positions, labels).requires_grad is False


def test_the_gradient_of_a_sixteen_bit_head_is_summed_over_chunks_in_fp32():
    h, weight, _, positions, labels = _case(torch.bfloat16, tokens=2000, vocabulary=5)
    nll_sum(h, OutputHead(weight), positions, labels, chunk=1).backward()
    exact = weight.detach().double().requires_grad_()
    _reference(h.detach().double(), exact, None, positions, labels, 1.0, None).backward()
    assert weight.grad is not None and exact.grad is not None and weight.grad.dtype == torch.bfloat16
    # each of 1,000 terms is rounded to bf16, the sum once: 2^-9 each; a sum in bf16 would stand still at 2^8 terms
    torch.testing.assert_close(weight.grad.double(), exact.grad, rtol=1e-2, atol=1e-2 * exact.grad.abs().max().item())


def test_a_frozen_head_gets_no_gradient():
    h, weight, _, positions, labels = _case(torch.float32)
    nll_sum(h, OutputHead(weight.detach()), positions, labels).backward()
    assert h.grad is not None and weight.grad is None


def test_the_loss_never_holds_all_logits():
    tokens, hidden, vocabulary = 2048, 32, 8192
    h = torch.randn(tokens, hidden, requires_grad=True)
    weight = torch.randn(vocabulary, hidden)
    positions, labels = torch.arange(tokens), torch.randint(vocabulary, (tokens,))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        nll_sum(h, OutputHead(weight), positions, labels, chunk=64).backward()
    assert 64 * vocabulary <= largest < tokens * vocabulary / 8
