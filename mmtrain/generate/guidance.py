"""How several conditions become one distribution: classifier-free guidance and contrastive decoding.

S streams of a prompt, the least conditional first; B sequences, U ids.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmtrain.config import UserError


@dataclass(frozen=True)
class SamplingSettings:
    """How ids are drawn; the fields are those of `config.GenerateConfig`.

    temperature 0 is greedy; top_k 0 keeps all; guidance 1 and contrastive_k 0 are none.
    """

    temperature: float = 1.0
    top_p: float = 0.95
    guidance: float = 1.0
    top_k: int = 0
    guidance_schedule: str = "constant"
    retrieval_guidance: float = 0.0
    contrastive_k: int = 0
    contrastive_alpha: float = 0.5

    @property
    def is_guided(self) -> bool:
        """Whether other streams than the fully conditional one count."""
        return self.contrastive_k > 0 or self.guidance != 1 or self.retrieval_guidance not in (0, 1)


def check(settings: SamplingSettings) -> None:
    """Raises UserError, one sentence, for settings that contradict each other or mean nothing."""
    s = settings
    if not 0 <= s.temperature < float("inf"):
        raise UserError(f"temperature={s.temperature} is no temperature; use 0 (greedy) or more")
    if not 0 < s.top_p <= 1:
        raise UserError(f"top_p={s.top_p} keeps no token; use more than 0, up to 1, or temperature=0 for the likeliest")
    if s.top_k < 0 or s.contrastive_k < 0:
        raise UserError("top_k and contrastive_k are counts of tokens; use 0 (off) or more")
    if not (0 <= s.guidance < float("inf") and 0 <= s.retrieval_guidance < float("inf")):
        raise UserError("guidance and retrieval_guidance are weights; use finite numbers of 0 or more")
    if s.guidance_schedule not in SCHEDULES:
        raise UserError(f"guidance_schedule={s.guidance_schedule} is unknown; use one of {', '.join(SCHEDULES)}")
    if not 0 <= s.contrastive_alpha <= 1:
        raise UserError(f"contrastive_alpha={s.contrastive_alpha} is no share of a probability; use 0 to 1")
    if s.contrastive_k and s.retrieval_guidance:
        raise UserError("contrastive_k takes the place of guidance; set retrieval_guidance=0 or contrastive_k=0")
    if s.contrastive_k and s.guidance_schedule != "constant":
        raise UserError("contrastive_k has no weight to schedule; set guidance_schedule=constant or contrastive_k=0")


def _constant(progress: Tensor) -> Tensor:
    return torch.ones_like(progress)


def _linear(progress: Tensor) -> Tensor:
    return progress


def _cosine(progress: Tensor) -> Tensor:
    return (1 - torch.cos(torch.pi * progress)) / 2


SCHEDULES = {"constant": _constant, "linear": _linear, "cosine": _cosine}


def guided(logits_SBU: Tensor, progress_B: Tensor, settings: SamplingSettings) -> Tensor:
    """(B, U) s_0 + sum of w_i (s_i - s_{i-1}) (CM3leon sec. 3.1; three streams as in Chameleon's decoding).

    w is guidance for two streams, (retrieval_guidance, guidance) for three; on a schedule it goes from 1, which is
    no guidance, to these values over the codes of a picture (progress_B: 0 to 1).
    """
    weights = (settings.retrieval_guidance, settings.guidance)[3 - len(logits_SBU) :]
    ramp_B1 = SCHEDULES[settings.guidance_schedule](progress_B)[:, None]
    scores_BU = logits_SBU[0]
    for weight, less, more in zip(weights, logits_SBU[:-1], logits_SBU[1:], strict=True):
        scores_BU = scores_BU + (1 + (weight - 1) * ramp_B1) * (more - less)
    return scores_BU


def contrasted(logits_SBU: Tensor, full_BU: Tensor, settings: SamplingSettings) -> Tensor:
    """(B, U) log p_cond - log p_uncond up to a constant of each row, -inf where p_cond is too small (CD-K, sec. 3.1).

    full_BU: the logits of the conditional stream, -inf for ids that may not be taken. Both softmaxes' sums fall away:
    in the difference as a constant, in p_cond >= alpha p_k as a factor of both sides.
    """
    k = min(settings.contrastive_k, full_BU.shape[-1])
    kth_B1 = full_BU.topk(k, dim=-1).values[:, -1:]
    log_alpha = math.log(settings.contrastive_alpha) if settings.contrastive_alpha else -math.inf
    too_small_BU = full_BU < kth_B1 + log_alpha
    return (full_BU - logits_SBU[0]).masked_fill(too_small_BU, float("-inf"))
