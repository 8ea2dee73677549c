"""Linear maps without bias that are also fast for a single token on a CPU.

D in, E out, N vectors.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_VECTORS = 8  # below the crossing measured with float32 on an AMD EPYC (docs/log.md)


class Linear(nn.Linear):
    """`nn.Linear` without bias."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


def linear(x: Tensor, weight_ED: Tensor) -> Tensor:
    """x weight^T, (…, D) to (…, E).

    For few float32 vectors on a CPU as weight x^T with at least two columns: torch hands a single one to a slow
    matrix-vector product and pads no others, and the time is that of reading the weights. Only without gradients.
    """
    N = x.numel() // x.shape[-1]
    if N > FEW_VECTORS or x.device.type != "cpu" or weight_ED.dtype != torch.float32 or torch.is_grad_enabled():
        return F.linear(x, weight_ED)
    x_ND = x.reshape(N, -1)
    if N == 1:
        x_ND = x_ND.expand(2, -1)
    return (weight_ED @ x_ND.t())[:, :N].t().reshape(*x.shape[:-1], -1)
