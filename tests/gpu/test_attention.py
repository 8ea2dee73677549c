"""On a CUDA device: the kernels of flex and varlen against the naive attention, forward and backward."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmtrain.config import ModelConfig
from mmtrain.models import Packing, build_model, check_attention, document_mask, document_starts, pack_documents
from mmtrain.models.attention import attend
from mmtrain.train.loop import seed_dropout
from tests.models.test_attention import HEADS, documents, naive_attention, random_qkv

pytestmark = pytest.mark.gpu
LENGTH, SIZE, VOCABULARY = 320, 32, 512
PACKINGS = {
    "one per row": [[LENGTH], [LENGTH]],
    "several": [[100, 1, 130, 0], [160, 160]],
    "many": [[5] * 64, [31] * 10],
    "a row of padding": [[0], [7, 200]],
}
# Sums of up to 320 products in bfloat16, which has 8 bits.
TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 3e-2}


def packing_of(backend: str, document: Tensor) -> Packing:
    """As the training step makes it: the starts come from the batch before it moves."""
    starts = document_starts(document).cuda() if backend == "varlen" else None
    packing = pack_documents(document.cuda(), backend, starts)
    assert (packing.blocks is not None) == (backend == "flex") and (packing.bounds is not None) == (backend == "varlen")
    return packing


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("backend", ["sdpa", "flex", "varlen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_backend_is_the_naive_attention(dtype: torch.dtype, backend: str, heads: str, packing: str) -> None:
    if backend == "varlen" and dtype == torch.float32:
        pytest.skip("varlen computes in bf16 alone and is refused in float32")
    document = documents(PACKINGS[packing], LENGTH)
    query_heads, kv_heads = HEADS[heads]
    qkv = random_qkv(document, query_heads, kv_heads, SIZE).to("cuda", dtype).requires_grad_()
    is_token = document >= 0
    y = attend(qkv, kv_heads, packing_of(backend, document))
    rounded = qkv.detach().double().cpu()
    expected = naive_attention(rounded.numpy(), query_heads, document.numpy())
    np.testing.assert_allclose(
        y.detach().double().cpu().numpy()[is_token], expected[is_token], rtol=0, atol=TOLERANCE[dtype]
    )

    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)) * is_token[:, :, None, None]
    (y * weight.to(y)).sum().backward()
    exact = rounded.requires_grad_()
    q, k, v = exact.transpose(1, 2).split((query_heads, kv_heads, kv_heads), dim=1)
    mask = document_mask(document)
    reference = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=query_heads != kv_heads)
    (reference.transpose(1, 2) * weight.double()).sum().backward()
    difference = (qkv.grad.double().cpu() - exact.grad)[is_token].norm() / exact.grad[is_token].norm()
    assert difference < TOLERANCE[dtype]
    assert qkv.grad.isfinite().all()


@pytest.mark.parametrize("backend", ["sdpa", "flex", "varlen"])
def test_packed_documents_never_see_each_other(backend: str) -> None:
    document = documents(PACKINGS["several"], LENGTH)
    packing = packing_of(backend, document)
    qkv = random_qkv(document, 4, 2, SIZE).to("cuda", torch.bfloat16)
    before = attend(qkv, 2, packing)
    for number in range(3):
        inside = (document == number).cuda()
        after = attend(torch.where(inside[:, :, None, None], qkv, qkv + 1), 2, packing)
        assert torch.equal(after[inside], before[inside]) and not torch.equal(after, before)


def gradients(changes: dict, seed_masks: Callable[[], None] = lambda: None) -> tuple[float, Tensor]:
    """Loss and gradient of a training step in bf16 by autocast."""
    config = ModelConfig(
        family="chameleon", layers=2, width=128, heads=4, kv_heads=2, init_std=0.05, zero_init_outputs=False
    )
    for name, value in changes.items():
        setattr(config, name, value)
    model = build_model(config, VOCABULARY, LENGTH)
    model.initialize(0)
    model.to("cuda")
    document = documents(PACKINGS["several"], LENGTH)
    tokens = torch.randint(0, VOCABULARY, document.shape, generator=torch.Generator().manual_seed(0))
    inputs = {
        "tokens": tokens,
        "document": document,
        "position": torch.arange(LENGTH).expand_as(tokens),
        "cell": torch.full_like(tokens, -1),
        "targets": tokens.roll(-1, 1),
        "loss_weight": (document >= 0).float(),
        "modality": tokens % 3,
    }
    if config.attention == "varlen":
        inputs["starts"] = document_starts(document)
    seed_masks()
    with torch.autocast("cuda", torch.bfloat16):
        total = model(**{name: tensor.cuda() for name, tensor in inputs.items()}).total / (document >= 0).sum()
    total.backward()
    return total.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("backend", ["flex", "varlen"])
def test_a_training_step_is_that_of_the_dense_mask(backend: str, checkpointing: bool) -> None:
    check_attention(backend, torch.device("cuda", 0))
    loss, gradient = gradients({"attention": "sdpa"})
    found, found_gradient = gradients({"attention": backend, "activation_checkpointing": checkpointing})
    assert found == pytest.approx(loss, rel=2e-3)
    assert (found_gradient - gradient).norm() / gradient.norm() < 3e-2


def test_dropout_masks_come_from_the_key_and_recomputation_sees_them_again() -> None:
    def masks() -> None:
        seed_dropout(0, 5, 0, 1)

    loss, gradient = gradients({"dropout": 0.2}, masks)
    torch.cuda.manual_seed(77)
    again, again_gradient = gradients({"dropout": 0.2, "activation_checkpointing": True}, masks)
    assert again == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(again_gradient, gradient, rtol=1e-2, atol=1e-5)
    assert gradients({"dropout": 0.2}, lambda: seed_dropout(0, 6, 0, 1))[0] != loss


def test_the_training_step_waits_for_nothing_on_the_device() -> None:
    document = documents(PACKINGS["several"], LENGTH)
    starts, moved = document_starts(document).cuda(), document.cuda()
    qkv = random_qkv(document, 4, 2, SIZE).to("cuda", torch.bfloat16)
    attend(qkv, 2, pack_documents(moved, "varlen", starts))
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(qkv, 2, pack_documents(moved, "varlen", starts))
        seed_dropout(0, 1, 2, 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
