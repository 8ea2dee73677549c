"""The chunked head against the plain formula."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mmtrain.models.loss import Head, LossSums, linear_cross_entropy
from tests.models.test_decoder import build, packed_batch, small

N, D, V = 56, 24, 90
CHUNKS = (1, 7, 25, 55, 56, 1000)  # 25 and 55 leave a rest


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, W, targets, and weights of which a quarter is 0."""
    generator = torch.Generator().manual_seed(seed)
    x, weight = (2 * torch.randn(rows, D, generator=generator) for rows in (N, V))
    weights = torch.tensor([0.0, 0.5, 1.0, 2.0])[torch.randint(4, (N,), generator=generator)]
    return x, weight, torch.randint(V, (N,), generator=generator), weights


def plain(x: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, z_loss: float) -> list[Tensor]:
    """Sum, loss of each token and gradients by the formula, in float64."""
    x, weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    log_z = (x @ weight.T).logsumexp(1)
    loss = log_z - (x @ weight.T)[torch.arange(len(targets)), targets]
    total = ((loss + z_loss * log_z**2) * weights).sum()
    return [total, loss, *torch.autograd.grad(total, (x, weight))]


def chunked(
    x: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, chunk: int, z_loss: float = 0.0
) -> list[Tensor]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    total, of_tokens = linear_cross_entropy(x, weight, targets, weights, chunk, z_loss)
    return [total, of_tokens.loss_N, *torch.autograd.grad(total, (x, weight))]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest entry."""
    return float((found.detach().double() - expected.detach()).abs().max() / expected.detach().abs().max())


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_sum_losses_and_gradients_are_those_of_the_plain_formula(chunk: int, z_loss: float) -> None:
    expected = plain(*inputs(), z_loss)
    for found, right in zip(chunked(*inputs(), chunk, z_loss), expected, strict=True):
        assert found.dtype == torch.float32
        assert relative_error(found, right) < 1e-6


def test_a_target_that_weighs_nothing_gives_no_gradient() -> None:
    x, weight, targets, weights = inputs()
    _, _, grad_x, _ = chunked(x, weight, targets, weights, 25)
    assert torch.equal(grad_x.any(1), weights > 0)


def test_logits_of_a_thousand_overflow_nothing() -> None:
    x, weight, targets, weights = inputs()
    given = x * 1000, weight, targets, weights
    for found, right in zip(chunked(*given, 25), plain(*given, 0), strict=True):
        assert relative_error(found, right) < 1e-5


@pytest.mark.parametrize("scale", [torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float64)])
def test_the_gradient_of_what_is_made_of_the_sum_is_scaled_once(scale: Tensor) -> None:
    x, weight, targets, weights = inputs()
    x.requires_grad_()
    total, _ = linear_cross_entropy(x, weight.requires_grad_(), targets, weights, 25)
    (total * scale).backward(retain_graph=True)
    _, _, grad_x, grad_weight = plain(x, weight, targets, weights, 0.0)
    assert relative_error(x.grad, grad_x / 4) < 1e-6 and relative_error(weight.grad, grad_weight / 4) < 1e-6
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (total * scale).backward()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("chunk", [4, 1000])
def test_bf16_is_as_near_to_float64_as_the_plain_loss_in_bf16(chunk: int, autocast: bool) -> None:
    """Under autocast (float32 in, float32 out) and with bf16 parameters; many chunks are no worse than one."""
    x, weight, targets, weights = inputs()
    x, weight = x.bfloat16(), weight.bfloat16()
    expected = plain(x, weight, targets, weights, 0.0)
    if autocast:
        x, weight = x.float(), weight.float()
    with torch.autocast("cpu", torch.bfloat16, autocast):
        found = chunked(x, weight, targets, weights, chunk)
        leaves = x.detach().requires_grad_(), weight.detach().requires_grad_()
        logits = torch.nn.functional.linear(*leaves).float()
        total = (torch.nn.functional.cross_entropy(logits, targets, reduction="none") * weights).sum()
    peer = torch.autograd.grad(total, leaves)
    assert found[0].dtype == found[1].dtype == torch.float32
    assert relative_error(found[0], expected[0]) < 1e-3
    for gradient, theirs, right in zip(found[2:], peer, expected[2:], strict=True):
        assert gradient.dtype == x.dtype
        assert relative_error(gradient, right) < max(1.2 * relative_error(theirs, right), 2**-8)


def test_a_sum_over_hundreds_of_chunks_keeps_its_digits_in_bf16() -> None:
    x, weight, targets, weights = inputs()
    given = x.bfloat16().repeat(32, 1), weight.bfloat16(), targets.repeat(32), weights.repeat(32)
    assert relative_error(chunked(*given, 8)[3], chunked(*given, 10_000)[3].double()) < 2**-7


def products(*, gradients: bool, x_learns: bool = True, weight_learns: bool = True) -> float:
    """Products of N x D x V that one step of a head in 4 chunks takes."""
    x, weight, targets, weights = inputs()
    x.requires_grad_(x_learns), weight.requires_grad_(weight_learns)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(gradients):
        total, _ = linear_cross_entropy(x, weight, targets, weights, N // 4)
        if total.requires_grad:
            total.backward()
    assert total.requires_grad == (gradients and (x_learns or weight_learns))
    return counter.get_total_flops() / (2 * N * D * V)


def test_three_products_in_training_and_one_where_nothing_learns() -> None:
    assert products(gradients=True) == 3
    assert products(gradients=False) == 1
    assert products(gradients=True, weight_learns=False) == products(gradients=True, x_learns=False) == 2
    assert products(gradients=True, x_learns=False, weight_learns=False) == 1


@pytest.mark.parametrize("target", [-100, -1, V])
def test_a_target_outside_the_vocabulary_is_an_error(target: int) -> None:
    x, weight, targets, weights = inputs()
    targets[30] = target
    with pytest.raises(RuntimeError, match=f"index {target} is out of bounds"):
        linear_cross_entropy(x, weight, targets, weights, 25)


def test_the_head_sums_by_modality_what_counts() -> None:
    x, weight, targets, weights = inputs()
    head = Head(D, V, chunk=25, z_loss=0.1)
    head.weight.data = weight
    modality = torch.arange(N) % 3
    sums = head(*(tensor.unflatten(0, (2, N // 2)) for tensor in (x, targets, weights, modality)))
    assert isinstance(sums, LossSums) and not sums.by_modality.requires_grad
    _, loss, *_ = plain(x, weight, targets, weights, 0.0)
    for number, (total, count) in enumerate(sums.by_modality):
        counts = (modality == number) & (weights > 0)
        assert count == counts.sum() and total.item() == pytest.approx(loss[counts].sum().item(), rel=1e-5)
    assert sums.total.item() == pytest.approx(plain(x, weight, targets, weights, 0.1)[0].item(), rel=1e-6)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_decoder_gets_the_gradients_of_the_plain_loss_of_its_logits(tie: bool, checkpointing: bool) -> None:
    """In two micro-batches of a row each, whose gradients accumulate."""
    model = build(small(loss_chunk=10, z_loss=0.01, tie_embeddings=tie, activation_checkpointing=checkpointing))
    batch = packed_batch()
    for row in range(2):
        (model(**{name: tensor[row : row + 1] for name, tensor in batch.items()}).total / 50).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    logits = model.logits(*(batch[name] for name in ("tokens", "document", "position", "cell")))
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["targets"], reduction="none")
    ((loss + 0.01 * logits.logsumexp(-1) ** 2) * batch["loss_weight"] / 50).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_cuda_it_is_the_same_and_waits_for_nothing(dtype: torch.dtype) -> None:
    given = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in inputs()[:2]] + [*inputs()[2:]]
    on_device = [tensor.cuda() for tensor in given]
    chunked(*on_device, 25, 0.1)  # the first call sets up cuBLAS
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = chunked(*on_device, 25, 0.1)
        again = chunked(*on_device, 25, 0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    for tensor, right in zip(found, plain(*given, 0.1), strict=True):
        assert relative_error(tensor.cpu(), right) < (1e-4 if dtype == torch.float32 else 2e-2)
