"""Batched sampling with a key-value cache, nucleus and classifier-free guidance.

B sequences sampled together, P longest prompt, N new tokens, V vocabulary. With guidance the model runs on
2B rows: B conditional prompts, then B unconditional ones that receive the same sampled tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmtrain.config import UserError
from mmtrain.config.randomness import random_stream
from mmtrain.models import Decoder


@dataclass(frozen=True)
class SamplingSettings:
    """temperature 0 is greedy; guidance 1 is none (logits = uncond + guidance * (cond - uncond))."""

    temperature: float = 1.0
    top_p: float = 0.95
    guidance: float = 1.0


@torch.inference_mode()
def sample_tokens(
    model: Decoder,
    prompts: Sequence[np.ndarray],
    unconditional: Sequence[np.ndarray] | None,
    allowed: np.ndarray,
    length: int,
    stop: int | None,
    seeds: Sequence[tuple[int | str, ...]],
    settings: SamplingSettings,
    positions: Sequence[np.ndarray] | None = None,
) -> np.ndarray:
    """(B, length) int64 ids continuing each prompt; after `stop` a row repeats `stop`.

    prompts: B id arrays; unconditional: their counterparts for guidance, or None; allowed: (V,) bool, ids the
    grammar admits; seeds: one random key per prompt; positions: for each prompt, then for each unconditional one,
    the positions of its ids and of the first new one (default: 0, 1, 2 ...).
    Raises UserError when prompt + length exceeds the model's positions.
    """
    guided = unconditional is not None and settings.guidance != 1.0
    rows = [*prompts, *unconditional] if guided and unconditional is not None else list(prompts)
    longest = max(len(row) for row in rows)
    if positions is None:
        positions = [np.arange(len(row) + 1) for row in rows]
    if max(int(row[-1]) for row in positions) + length > model.max_positions:
        raise UserError(
            f"a prompt of {longest} tokens and {length} new ones exceed the model's {model.max_positions} positions; "
            "shorten the prompt or retrieve fewer documents"
        )
    device = next(model.parameters()).device
    B = len(prompts)
    tokens_RP, position_RP, valid_RP = _left_pad(rows, positions, longest, device)
    mask = (valid_RP[:, None, :] & torch.ones(longest, longest, dtype=torch.bool, device=device).tril())[:, None]
    # A padded query position would have no key at all: let it see itself.
    mask |= torch.eye(longest, dtype=torch.bool, device=device)
    cache = model.new_cache(len(rows), longest + length)
    allowed_V = torch.as_tensor(allowed, device=device)
    uniform_BN = torch.tensor(np.stack([random_stream(*seed).random(length) for seed in seeds]), device=device)
    seen_RT = torch.cat([valid_RP, torch.ones(len(rows), length, dtype=torch.bool, device=device)], dim=1)
    next_position_R1 = torch.tensor([[int(row[-1])] for row in positions[: len(rows)]], device=device)
    finished_B = torch.zeros(B, dtype=torch.bool, device=device)
    output_BN = torch.empty(B, length, dtype=torch.int64, device=device)

    logits_RV = model.decode(tokens_RP, position_RP, mask, cache)
    for step in range(length):
        logits_BV = logits_RV[:B].float()
        if guided:
            unconditional_BV = logits_RV[B:].float()
            logits_BV = unconditional_BV + settings.guidance * (logits_BV - unconditional_BV)
        chosen_B = choose(logits_BV, allowed_V, uniform_BN[:, step], settings)
        if stop is not None:
            chosen_B = torch.where(finished_B, stop, chosen_B)
            finished_B |= chosen_B == stop
        output_BN[:, step] = chosen_B
        if step + 1 == length or (stop is not None and bool(finished_B.all())):
            output_BN[:, step + 1 :] = stop if stop is not None else 0
            break
        tokens_R1 = (chosen_B.repeat(2) if guided else chosen_B)[:, None]
        mask = seen_RT[:, None, None, : cache.length + 1]
        logits_RV = model.decode(tokens_R1, next_position_R1 + step, mask, cache)
    return output_BN.cpu().numpy()


def choose(logits_BV: Tensor, allowed_V: Tensor, uniform_B: Tensor, settings: SamplingSettings) -> Tensor:
    """(B,) ids by inverse transform sampling from the allowed nucleus; uniform_B in [0, 1) float64."""
    logits_BV = logits_BV.masked_fill(~allowed_V, float("-inf"))
    if settings.temperature == 0:
        return logits_BV.argmax(dim=-1)
    probability_BV = torch.softmax(logits_BV.double() / settings.temperature, dim=-1)
    sorted_BV, ids_BV = probability_BV.sort(dim=-1, descending=True, stable=True)
    before_BV = sorted_BV.cumsum(dim=-1) - sorted_BV
    sorted_BV = sorted_BV.masked_fill(before_BV >= max(settings.top_p, 1e-9), 0.0)
    cumulative_BV = sorted_BV.cumsum(dim=-1)
    threshold_B1 = (uniform_B * cumulative_BV[:, -1])[:, None]
    # A draw at the very end may round past the last kept id.
    last_B1 = (sorted_BV > 0).sum(dim=-1, keepdim=True) - 1
    index_B1 = torch.minimum(torch.searchsorted(cumulative_BV, threshold_B1, right=True), last_B1)
    return ids_BV.gather(1, index_B1)[:, 0]


def _left_pad(
    rows: Sequence[np.ndarray], positions: Sequence[np.ndarray], longest: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, positions (R, P) int64 and validity (R, P) bool, prompts flush right so that all end together."""
    tokens = np.zeros((len(rows), longest), dtype=np.int64)
    valid = np.zeros((len(rows), longest), dtype=bool)
    position = np.zeros((len(rows), longest), dtype=np.int64)
    for index, row in enumerate(rows):
        tokens[index, longest - len(row) :] = row
        valid[index, longest - len(row) :] = True
        position[index, longest - len(row) :] = positions[index][:-1]
    to = torch.as_tensor
    return to(tokens, device=device), to(position, device=device), to(valid, device=device)
