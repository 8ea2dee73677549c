"""Output head and cross entropy in chunks of tokens, so that the (N, V) logits never exist at once.

The gradients are computed with the loss, while a chunk's logits are there; the backward pass only scales them. So the
head costs three products, as without chunks, and nothing is computed twice.
N tokens of a batch, C of a chunk, D width, V vocabulary, K ids of a block of it.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtrain.models.signs import Signs

NUM_MODALITIES = 3
ROWS = 8192  # of the weight's gradient, that are added at a time


class LossSums(NamedTuple):
    """Sums over the tokens of a batch; divide by global counts, never average averages.

    total: scalar float32, sum of weight x loss (with z-loss), to differentiate.
    by_modality: (3, 2) float32 without gradient: for special, text, image targets the sum of the plain
    cross entropy in nats over targets with weight > 0, and their number.
    """

    total: Tensor
    by_modality: Tensor


class TokenLosses(NamedTuple):
    """Of each token, without gradient: plain cross entropy in nats and log Z; float32, (N,).

    gradient_norm_N: None, or the length of the gradient of the sum with respect to x, by request.
    """

    loss_N: Tensor
    log_z_N: Tensor
    gradient_norm_N: Tensor | None


class Head(nn.Module):
    """Linear map to the vocabulary, and the loss on it; `watched`: what collects warning signs, if asked for."""

    def __init__(self, width: int, vocabulary_size: int, chunk: int, z_loss: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary_size, width))
        self.chunk = chunk
        self.z_loss = z_loss
        self.watched: Signs | None = None

    def forward(
        self,
        x_BSD: Tensor,
        targets_BS: Tensor | None = None,
        weight_BS: Tensor | None = None,
        modality_BS: Tensor | None = None,
    ) -> Tensor | LossSums:
        """Logits (B, S, V) without targets; with them (int64, float32, int64) the loss sums."""
        if targets_BS is None or weight_BS is None or modality_BS is None:
            return F.linear(x_BSD, self.weight)
        weight_N, modality_N = weight_BS.flatten(), modality_BS.flatten()
        total, of_tokens = linear_cross_entropy(
            x_BSD.flatten(0, 1),
            self.weight,
            targets_BS.flatten(),
            weight_N,
            self.chunk,
            self.z_loss,
            wants_norms=self.watched is not None,
        )
        # Not index_add_, whose sum on CUDA differs from run to run.
        counted_3N = (modality_N == torch.arange(NUM_MODALITIES, device=x_BSD.device)[:, None]) & (weight_N > 0)
        by_modality = torch.stack([(of_tokens.loss_N * counted_3N).sum(1), counted_3N.sum(1)], dim=1)
        if self.watched is not None and of_tokens.gradient_norm_N is not None:
            self.watched.add_loss(of_tokens.log_z_N, of_tokens.gradient_norm_N, counted_3N)
        return LossSums(total, by_modality)


def linear_cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    weight_N: Tensor,
    chunk: int,
    z_loss: float = 0.0,
    *,
    wants_norms: bool = False,
) -> tuple[Tensor, TokenLosses]:
    """Sum of weight x (cross entropy + z_loss log^2 Z) of the logits x W^T, to differentiate by x and W.

    targets_N: int64; weight_N: float32, may be 0; chunk: most tokens whose logits exist at a time.
    Products are computed in the type of autocast, else of x; logits, losses and sums over chunks in float32.
    Returns the sum, and what there is of each token without gradient.
    Raises RuntimeError for a target outside the vocabulary (on CUDA the device stops the program).
    """
    if not torch.is_grad_enabled():
        x_ND, weight_VD = x_ND.detach(), weight_VD.detach()  # or the gradients would be computed all the same
    total, *of_tokens = _LinearCrossEntropy.apply(x_ND, weight_VD, targets_N, weight_N, chunk, z_loss, wants_norms)
    return total, TokenLosses(*of_tokens)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        weight_N: Tensor,
        chunk: int,
        z_loss: float,
        wants_norms: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        num_tokens, num_ids = x_ND.shape[0], weight_VD.shape[0]
        dtype = _compute_dtype(x_ND)
        exact = torch.promote_types(dtype, torch.float32)
        a_ND, w_VD = x_ND.to(dtype), weight_VD.to(dtype)
        grad_x_ND = torch.empty_like(a_ND) if wants_x else None
        grad_w_VD = torch.zeros_like(w_VD, dtype=exact) if wants_weight else None
        loss_N = torch.empty(num_tokens, dtype=exact, device=x_ND.device)
        log_z_N = torch.empty_like(loss_N)
        # Fresh memory for every chunk is slow on CPU, where the system clears each page of it.
        products_CV = a_ND.new_empty(min(chunk, num_tokens), num_ids)
        exact_CV = products_CV if dtype == exact else torch.empty_like(products_CV, dtype=exact)
        for start in range(0, num_tokens, chunk):
            part = slice(start, min(start + chunk, num_tokens))
            product_CV, logits_CV = products_CV[: part.stop - start], exact_CV[: part.stop - start]
            torch.mm(a_ND[part], w_VD.T, out=product_CV)
            if dtype != exact:
                logits_CV.copy_(product_CV)
            target_C1 = targets_N[part, None]
            target_logit_C1 = logits_CV.gather(1, target_C1)
            largest_C1 = logits_CV.amax(1, keepdim=True)
            sum_C1 = logits_CV.sub_(largest_C1).exp_().sum(1, keepdim=True)
            log_z_C1 = largest_C1 + sum_C1.log()
            loss_N[part] = (log_z_C1 - target_logit_C1)[:, 0]
            log_z_N[part] = log_z_C1[:, 0]
            if not (wants_x or wants_weight):
                continue
            # d/dlogits: weight x (softmax x (1 + 2 z log Z) - one at the target)
            weight_C1 = weight_N[part, None].to(exact)
            logits_CV.mul_(weight_C1 * (1 + 2 * z_loss * log_z_C1) / sum_C1)
            logits_CV.scatter_add_(1, target_C1, -weight_C1)
            if dtype != exact:
                product_CV.copy_(logits_CV)
            if grad_x_ND is not None:
                torch.mm(product_CV, w_VD, out=grad_x_ND[part])
            if grad_w_VD is not None and dtype == exact:
                torch.addmm(grad_w_VD, product_CV.T, a_ND[part], out=grad_w_VD)
            elif grad_w_VD is not None:
                # A sum of chunks in bf16 would lose their digits. By blocks: a sum of two types copies one of them.
                for sum_KD, product_CK in zip(grad_w_VD.split(ROWS), product_CV.split(ROWS, dim=1), strict=True):
                    sum_KD += product_CK.T @ a_ND[part]
        del products_CV, product_CV, exact_CV, logits_CV
        ctx.save_for_backward(
            None if grad_x_ND is None else grad_x_ND.to(x_ND.dtype),
            None if grad_w_VD is None else grad_w_VD.to(weight_VD.dtype),
        )
        norm_N = None
        if wants_norms and grad_x_ND is not None:
            norm_N = torch.linalg.vector_norm(grad_x_ND, dim=1, dtype=exact)
        ctx.mark_non_differentiable(*(found_N for found_N in (loss_N, log_z_N, norm_N) if found_N is not None))
        objective_N = loss_N + z_loss * log_z_N.square() if z_loss else loss_N
        return (objective_N * weight_N).sum(), loss_N, log_z_N, norm_N

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # In place: torch refuses a second backward pass through the same loss instead of scaling twice.
        grads = [None if grad is None else grad.mul_(grad_total) for grad in ctx.saved_tensors]
        return (*grads, None, None, None, None, None)


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype
