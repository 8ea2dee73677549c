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
from mmtrain.objective import NO_CELL


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
    cells: Sequence[np.ndarray] | None = None,
    draws_picture: bool = False,
) -> np.ndarray:
    """(B, length) int64 ids continuing each prompt; after `stop` a row repeats `stop`.

    prompts: B id arrays; unconditional: their counterparts for guidance, or None; allowed: (V,) bool, ids the
    grammar admits; seeds: one random key per prompt; cells: for each prompt, then for each unconditional one,
    `picture_cells` of its ids (default: no image tokens); draws_picture: the new ids are a whole picture.
    Raises UserError when prompt + length exceeds the model's positions.
    """
    guided = unconditional is not None and settings.guidance != 1.0
    rows = [*prompts, *unconditional] if guided and unconditional is not None else list(prompts)
    longest = max(len(row) for row in rows)
    if longest + length > model.max_positions:
        raise UserError(
            f"a prompt of {longest} tokens and {length} new ones exceed the model's {model.max_positions} positions; "
            "shorten the prompt or retrieve fewer documents"
        )
    device = next(model.parameters()).device
    B = len(prompts)
    tokens_RP, position_RP, cell_RP, valid_RP = _left_pad(rows, cells, longest, device)
    mask = (valid_RP[:, None, :] & torch.ones(longest, longest, dtype=torch.bool, device=device).tril())[:, None]
    # A padded query position would have no key at all: let it see itself.
    mask |= torch.eye(longest, dtype=torch.bool, device=device)
    cache = model.new_cache(len(rows), longest + length)
    allowed_V = torch.as_tensor(allowed, device=device)
    uniform_BN = torch.tensor(np.stack([random_stream(*seed).random(length) for seed in seeds]), device=device)
    seen_RT = torch.cat([valid_RP, torch.ones(len(rows), length, dtype=torch.bool, device=device)], dim=1)
    next_position_R1 = torch.tensor([[len(row)] for row in rows], device=device)
    finished_B = torch.zeros(B, dtype=torch.bool, device=device)
    output_BN = torch.empty(B, length, dtype=torch.int64, device=device)

    logits_RV = model.decode(tokens_RP, position_RP, cell_RP, mask, cache)
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
        cell_R1 = torch.full_like(tokens_R1, step if draws_picture else NO_CELL)
        logits_RV = model.decode(tokens_R1, next_position_R1 + step, cell_R1, mask, cache)
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
    rows: Sequence[np.ndarray], cells: Sequence[np.ndarray] | None, longest: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, positions, cells (R, P) int64 and validity (R, P) bool, prompts flush right so that all end together."""
    tokens = np.zeros((len(rows), longest), dtype=np.int64)
    position = np.zeros((len(rows), longest), dtype=np.int64)
    cell = np.full((len(rows), longest), NO_CELL, dtype=np.int64)
    valid = np.zeros((len(rows), longest), dtype=bool)
    for index, row in enumerate(rows):
        filled = slice(longest - len(row), longest)
        tokens[index, filled] = row
        position[index, filled] = np.arange(len(row))
        valid[index, filled] = True
        if cells is not None:
            cell[index, filled] = cells[index]
    tokens_RP, position_RP, cell_RP, valid_RP = (
        torch.as_tensor(array, device=device) for array in (tokens, position, cell, valid)
    )
    return tokens_RP, position_RP, cell_RP, valid_RP
