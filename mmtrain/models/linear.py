"""Linear maps without bias that are also fast for a single token on a CPU.

D in, E out, N vectors.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_VECTORS = 8  # for maps that widen, 2 for others: where the two ways crossed on an AMD EPYC, float32


class Linear(nn.Linear):
    """`nn.Linear` without bias."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


def linear(x: Tensor, weight_ED: Tensor) -> Tensor:
    """x weight^T, (…, D) to (…, E).

    Few float32 vectors on a CPU, without gradients: as weight x^T with at least two columns, which took a half to a
    quarter of the time of torch's own choice.
    """
    E, D = weight_ED.shape
    N = x.numel() // D
    is_few = (FEW_VECTORS if E >= D else 2) >= N
    if not is_few or x.device.type != "cpu" or weight_ED.dtype != torch.float32 or torch.is_grad_enabled():
        return F.linear(x, weight_ED)
    x_ND = x.reshape(N, D)
    if N == 1:
        x_ND = torch.cat([x_ND, x_ND])
    return (weight_ED @ x_ND.t())[:, :N].t().reshape(*x.shape[:-1], E)
