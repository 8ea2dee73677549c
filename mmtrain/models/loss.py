"""Output head and cross entropy in chunks, so that the (tokens, V) logits never exist at once.

N tokens of a batch, D width, V vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

NUM_MODALITIES = 3


class LossSums(NamedTuple):
    """Sums over the tokens of a batch; divide by global counts, never average averages.

    total: scalar float32, sum of weight x loss (with z-loss), to differentiate.
    by_modality: (3, 2) float32 without gradient: for special, text, image targets the sum of the plain
    cross entropy in nats over targets with weight > 0, and their number.
    """

    total: Tensor
    by_modality: Tensor


class Head(nn.Module):
    """Linear map to the vocabulary, and the loss on it."""

    def __init__(self, width: int, vocabulary_size: int, chunk: int, z_loss: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary_size, width))
        self.chunk = chunk
        self.z_loss = z_loss

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
        x_ND, targets_N = x_BSD.flatten(0, 1), targets_BS.flatten()
        weight_N, modality_N = weight_BS.flatten(), modality_BS.flatten()
        total = x_ND.new_zeros((), dtype=torch.float32)
        cross_entropies = []
        for start in range(0, x_ND.shape[0], self.chunk):
            part = slice(start, start + self.chunk)
            if self.chunk < x_ND.shape[0]:
                chunk_total, chunk_loss = checkpoint(
                    self._chunk_loss, x_ND[part], targets_N[part], weight_N[part], use_reentrant=False
                )
            else:
                chunk_total, chunk_loss = self._chunk_loss(x_ND, targets_N, weight_N)
            total = total + chunk_total
            cross_entropies.append(chunk_loss.detach())
        counted_N = (weight_N > 0).float()
        pairs_N2 = torch.stack([torch.cat(cross_entropies) * counted_N, counted_N], dim=1)
        by_modality = pairs_N2.new_zeros(NUM_MODALITIES, 2).index_add_(0, modality_N, pairs_N2)
        return LossSums(total, by_modality)

    def _chunk_loss(self, x_ND: Tensor, targets_N: Tensor, weight_N: Tensor) -> tuple[Tensor, Tensor]:
        logits_NV = F.linear(x_ND, self.weight).float()
        loss_N = F.cross_entropy(logits_NV, targets_N, reduction="none")
        if self.z_loss > 0:
            objective_N = loss_N + self.z_loss * torch.logsumexp(logits_NV, dim=-1).square()
        else:
            objective_N = loss_N
        return (objective_N * weight_N).sum(), loss_N
