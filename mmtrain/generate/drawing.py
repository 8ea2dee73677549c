"""One id per row from its scores: temperature, the k most probable, the nucleus, then inverse transform sampling.

B sequences, U ids.
"""

import numpy as np
import torch
from torch import Tensor

from mmtrain.generate.guidance import SamplingSettings


def draw(scores_BU: Tensor, uniform_B: Tensor, settings: SamplingSettings) -> Tensor:
    """(B,) int64 columns; scores_BU: float32 logits, -inf for ids that may not be taken; uniform_B: in [0, 1) float64.

    The draw goes through the ids in their order, not by probability: then two ids of nearly equal probability cannot
    change places by rounding, and a sample is the same alone and in a batch.
    """
    if settings.temperature == 0:
        return scores_BU.argmax(dim=-1)
    if 0 < settings.top_k < scores_BU.shape[-1]:
        kth_B1 = scores_BU.topk(settings.top_k, dim=-1).values[:, -1:]
        scores_BU = scores_BU.masked_fill(scores_BU < kth_B1, float("-inf"))
    probability_BU = torch.softmax(scores_BU / settings.temperature, dim=-1)
    if settings.top_p < 1:
        probability_BU = probability_BU.masked_fill(probability_BU < nucleus(probability_BU, settings.top_p), 0.0)
    cumulative_BU = probability_BU.cumsum(dim=-1, dtype=torch.float64)
    # uniform_B is at most 1 - 2^-53: the product stays below the sum, also rounded.
    drawn_B1 = uniform_B[:, None] * cumulative_BU[:, -1:]
    return torch.searchsorted(cumulative_BU, drawn_B1, right=True)[:, 0]


def nucleus(probability_BU: Tensor, top_p: float) -> Tensor:
    """(B, 1) the smallest probability in the smallest set of most probable ids that holds `top_p`.

    Holtzman et al. 2020, sec. 3.1. Ids as probable as the last of the set count to it as well.
    """
    # numpy sorts float32 four times as fast as torch does on a CPU.
    on_cpu = probability_BU.device.type == "cpu"
    rising_BU = torch.from_numpy(np.sort(probability_BU.numpy())) if on_cpu else probability_BU.sort(dim=-1).values
    cumulative_BU = rising_BU.cumsum(dim=-1, dtype=torch.float64)
    left_out_B1 = cumulative_BU[:, -1:] - top_p
    first_B1 = torch.searchsorted(cumulative_BU, left_out_B1, right=True).clamp_(max=rising_BU.shape[-1] - 1)
    return rising_BU.gather(1, first_B1)
