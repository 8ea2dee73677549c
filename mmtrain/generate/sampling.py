"""Batched sampling with a key-value cache: every prompt with its own grammar, seed and streams of guidance.

B sequences sampled together, S streams, R rows of the model (all streams of all sequences), P longest prompt,
N most new tokens, D width, U ids from the first to the last that any of the grammars allows.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmtrain.config import UserError
from mmtrain.config.randomness import random_stream
from mmtrain.generate.drawing import draw
from mmtrain.generate.grammar import END, Automaton, Grammar
from mmtrain.generate.guidance import SamplingSettings, check, contrasted, guided
from mmtrain.models import Decoder, KVCache
from mmtrain.models.linear import linear
from mmtrain.objective import NO_CELL, picture_cells

ENDED = -1  # stands in the rows that have ended
STOP_TEST_STEPS = 8  # on a GPU the test whether rows have ended waits for it
PREFILL_TOKENS = 16_384  # of one forward pass over prompts: bounds its memory


@dataclass(frozen=True, eq=False)
class Prompt:
    """What one sample continues.

    streams: (n,) ids each, the least conditional first, the fully conditional one last; a single one is no guidance.
    grammar: what may follow. seed: key of the sample's random stream. cells: of each stream; default `picture_cells`.
    """

    streams: tuple[np.ndarray, ...]
    grammar: Grammar
    seed: tuple[int | str, ...]
    cells: tuple[np.ndarray, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= len(self.streams) <= 3 or not all(len(stream) for stream in self.streams):
            raise ValueError("a prompt has one to three streams, and each has a token")
        if not self.cells:
            cells = tuple(picture_cells(stream, self.grammar.vocabulary) for stream in self.streams)
            object.__setattr__(self, "cells", cells)


@dataclass(frozen=True, eq=False)
class Sampled:
    """A continuation.

    tokens: (n,) int64, the id that ends them included. log_probability: (n,) float32 of each given the fully
    conditional stream: softmax at temperature 1 over the ids that the grammar allows.
    """

    tokens: np.ndarray
    log_probability: np.ndarray


@torch.inference_mode()
def sample(
    model: Decoder,
    prompts: Sequence[Prompt],
    settings: SamplingSettings,
    on_token: Callable[[int, np.ndarray], None] | None = None,
) -> list[Sampled]:
    """A continuation of each prompt; the same alone, in a batch, and with or without others' padding.

    on_token: called with the step and the (B,) new ids, ENDED in rows that have ended.
    Raises UserError when the settings contradict each other or the prompts, or a prompt and what may follow exceed
    the model's positions.
    """
    if not prompts:
        return []
    check(settings)
    batch = _Batch.of(model, prompts, settings)
    device, N = batch.state_B.device, max(prompt.grammar.max_length for prompt in prompts)
    tokens_BN = torch.full((len(prompts), N), ENDED, device=device)
    log_probability_BN = torch.zeros(len(prompts), N, device=device)
    every = 1 if device.type == "cpu" else STOP_TEST_STEPS
    hidden_RD = batch.read_prompts(model)
    for step in range(N):
        place_B, chosen_B, log_probability_B = batch.write(model, hidden_RD, step, settings)
        tokens_BN[place_B, step] = chosen_B
        log_probability_BN[place_B, step] = log_probability_B
        if on_token:
            on_token(step, tokens_BN[:, step].cpu().numpy())
        if step + 1 == N or (step % every == every - 1 and not batch.drop_ended()):
            break
        hidden_RD = batch.read(model, step)
    tokens, log_probability = tokens_BN.cpu().numpy(), log_probability_BN.cpu().numpy()
    lengths = (tokens != ENDED).sum(axis=1)
    return [Sampled(tokens[i, :n], log_probability[i, :n]) for i, n in enumerate(lengths)]


@dataclass
class _Batch:
    """The sequences that are still being written, longest prompt first, and the rows of the model that read them.

    place_B: index of the prompt. most_B: its most new tokens. state_B, token_B, cell_B: state of the grammar, last id
    and its cell. row_SB: the row of each stream; a prompt of fewer streams repeats its first. owner_R: the sequence
    that a row belongs to. length_R: tokens of its prompt.
    """

    automaton: Automaton
    prompts: list[tuple[np.ndarray, np.ndarray]]
    place_B: Tensor
    most_B: Tensor
    uniform_BN: Tensor
    state_B: Tensor
    token_B: Tensor
    cell_B: Tensor
    row_SB: Tensor
    owner_R: Tensor
    length_R: Tensor
    cache: KVCache

    @classmethod
    def of(cls, model: Decoder, prompts: Sequence[Prompt], settings: SamplingSettings) -> "_Batch":
        """Rows stream by stream, so that prompts of one form and length stand together."""
        device = next(model.parameters()).device
        for prompt in prompts:
            _check_length(model, prompt)
        streams = [_streams(prompt, settings) for prompt in prompts]
        place = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].streams[-1]))
        S, B, N = max(map(len, streams)), len(prompts), max(prompt.grammar.max_length for prompt in prompts)
        row_SB = np.zeros((S, B), dtype=np.int64)
        rows: list[tuple[np.ndarray, np.ndarray]] = []
        owner = []
        for s in range(S):
            for b, i in enumerate(place):
                own = s - (S - len(streams[i]))
                if own < 0:
                    continue
                row_SB[: s + 1 if own == 0 else 0, b] = row_SB[s, b] = len(rows)
                rows.append(streams[i][own])
                owner.append(b)
        ordered = [prompts[i] for i in place]
        automaton, state_B = Automaton.of([prompt.grammar for prompt in ordered], device)
        uniform = np.zeros((B, N))
        for row, prompt in zip(uniform, ordered, strict=True):
            row[: prompt.grammar.max_length] = random_stream(*prompt.seed).random(prompt.grammar.max_length)
        lengths = np.array([len(tokens) for tokens, _ in rows])
        most = np.array([prompt.grammar.max_length for prompt in ordered])
        place_B, most_B, uniform_BN, row_SB_, owner_R, length_R = (
            torch.as_tensor(array, device=device)
            for array in (np.array(place), most, uniform, row_SB, np.array(owner), lengths)
        )
        cache = model.new_cache(len(rows), int(lengths.max()) + N)
        none_B = torch.zeros_like(place_B)
        return cls(
            automaton, rows, place_B, most_B, uniform_BN, state_B, none_B, none_B, row_SB_, owner_R, length_R, cache
        )

    def read_prompts(self, model: Decoder) -> Tensor:
        """(R, D) after the last token of each prompt; fills the cache.

        Rows are padded on the right, where causal attention does not see it; the cache hides it from later positions.
        """
        lengths = [len(tokens) for tokens, _ in self.prompts]
        longest = max(lengths)
        hidden = []
        for rows in chunks(lengths):
            width = max(lengths[rows])
            tokens_RP = torch.zeros(len(lengths[rows]), width, dtype=torch.int64)
            cell_RP = torch.full_like(tokens_RP, NO_CELL)
            for row, (tokens, cells) in enumerate(self.prompts[rows]):
                tokens_RP[row, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
                cell_RP[row, : len(tokens)] = torch.from_numpy(cells.astype(np.int64))
            tokens_RP, cell_RP = tokens_RP.to(self.length_R.device), cell_RP.to(self.length_R.device)
            position_RP = torch.arange(width, device=tokens_RP.device).expand_as(tokens_RP)
            hidden_RPD = model.extend(tokens_RP, position_RP, cell_RP, self.cache.rows(rows))
            last_R = self.length_R[rows] - 1
            hidden.append(hidden_RPD[torch.arange(len(last_R), device=last_R.device), last_R])
        self.cache.length = longest
        if min(lengths) < longest:
            slot = torch.arange(self.cache.capacity, device=self.length_R.device)
            padding_RT = (slot >= self.length_R[:, None]) & (slot < longest)
            bias_RT = torch.zeros(padding_RT.shape, dtype=hidden[0].dtype, device=slot.device)
            self.cache.bias_B1T = bias_RT.masked_fill_(padding_RT, float("-inf"))[:, None]
        return torch.cat(hidden)

    def write(
        self, model: Decoder, hidden_RD: Tensor, step: int, settings: SamplingSettings
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One id per sequence: (B,) places, ids (ENDED after the end) and log probabilities."""
        a = self.automaton
        logits_SBU = linear(hidden_RD, model.head.weight[a.low : a.high]).float()[self.row_SB]
        full_BU = logits_SBU[-1]
        forbidden_BU = None if a.always else ~a.allowed(self.state_B, self.most_B - step)
        if forbidden_BU is not None:
            full_BU = full_BU.masked_fill(forbidden_BU, float("-inf"))
        scores_BU = full_BU
        if len(logits_SBU) > 1:
            if settings.contrastive_k:
                scores_BU = contrasted(logits_SBU, full_BU, settings)
            else:
                scores_BU = guided(logits_SBU, a.progress[self.state_B], settings)
                if forbidden_BU is not None:
                    scores_BU = scores_BU.masked_fill_(forbidden_BU, float("-inf"))
            is_guided_B = a.is_drawing[self.state_B] & (self.row_SB[0] != self.row_SB[-1])
            scores_BU = torch.where(is_guided_B[:, None], scores_BU, full_BU)
        column_B = draw(scores_BU, self.uniform_BN[:, step], settings)
        log_probability_B = full_BU.gather(1, column_B[:, None])[:, 0] - full_BU.logsumexp(dim=-1)
        has_ended_B = self.state_B == END
        self.token_B = column_B + a.low
        self.state_B, self.cell_B = a.step(self.state_B, column_B)
        return self.place_B, torch.where(has_ended_B, ENDED, self.token_B), log_probability_B

    def read(self, model: Decoder, step: int) -> Tensor:
        """(R, D) after the ids that were written at `step`."""
        token_R1, cell_R1 = self.token_B[self.owner_R][:, None], self.cell_B[self.owner_R][:, None]
        # A row that has ended goes on beside the others and may leave the positions that the model has.
        position_R1 = (self.length_R + step).clamp(max=model.max_positions - 1)[:, None]
        return model.extend(token_R1, position_R1, cell_R1, self.cache)[:, -1]

    def drop_ended(self) -> bool:
        """Go on without ended sequences once they are half of the batch; False when all have ended."""
        running_B = self.state_B != END
        num_running = int(running_B.sum())
        if num_running and 2 * num_running <= len(running_B):
            keep_B = running_B.nonzero()[:, 0]
            keep_R = running_B[self.owner_R].nonzero()[:, 0]
            for name in ("place_B", "most_B", "uniform_BN", "state_B", "token_B", "cell_B"):
                setattr(self, name, getattr(self, name)[keep_B])
            self.row_SB = torch.searchsorted(keep_R, self.row_SB[:, keep_B])
            self.owner_R = torch.searchsorted(keep_B, self.owner_R[keep_R])
            self.length_R = self.length_R[keep_R]
            self.cache = self.cache.keep(keep_R)
        return num_running > 0


def _streams(prompt: Prompt, settings: SamplingSettings) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids and cells of the streams that count: the last one alone where nothing is guided."""
    streams = list(zip(prompt.streams, prompt.cells, strict=True))
    if not (settings.is_guided and prompt.grammar.is_drawing.any()):
        return streams[-1:]
    if settings.contrastive_k and len(streams) == 1:
        raise UserError("contrastive_k needs an unconditional stream beside the prompt; set contrastive_k=0")
    if len(streams) == 3 and not (settings.contrastive_k or settings.retrieval_guidance):
        raise ValueError("three streams need retrieval_guidance")
    return streams


def _check_length(model: Decoder, prompt: Prompt) -> None:
    longest, length = max(len(stream) for stream in prompt.streams), prompt.grammar.max_length
    if longest + length > model.max_positions:
        raise UserError(
            f"a prompt of {longest} tokens and {length} new ones exceed the model's {model.max_positions} positions; "
            "shorten the prompt or retrieve fewer documents"
        )


def chunks(lengths: list[int]) -> Iterator[slice]:
    """Rows in their order, at most PREFILL_TOKENS with their padding, at least one."""
    start = 0
    for end in range(1, len(lengths) + 1):
        if end == len(lengths) or max(lengths[start : end + 1]) * (end + 1 - start) > PREFILL_TOKENS:
            yield slice(start, end)
            start = end
