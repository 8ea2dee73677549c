"""Log probabilities of given continuations, to compare candidates.

R continuations, P longest sequence, n ids of one continuation, U ids that the grammars allow.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmtrain.generate.grammar import END, IMAGE, Automaton
from mmtrain.generate.sampling import Prompt, chunks
from mmtrain.models import Decoder
from mmtrain.objective import NO_CELL


@torch.inference_mode()
def score(model: Decoder, prompts: Sequence[Prompt], continuations: Sequence[np.ndarray]) -> list[np.ndarray]:
    """(n,) float32 log probability of each id of each continuation, as `Sampled.log_probability` has them.

    continuations: (n,) ids, one array per prompt. Raises ValueError for an id that the grammar forbids.
    """
    scores: list[np.ndarray] = []
    lengths = [len(p.streams[-1]) + len(c) for p, c in zip(prompts, continuations, strict=True)]
    for rows in chunks(lengths):
        scores += _score_chunk(model, prompts[rows], continuations[rows])
    return scores


def _score_chunk(
    model: Decoder, prompts: Sequence[Prompt], continuations: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """The same for as many as one forward pass takes."""
    device = next(model.parameters()).device
    automaton, start_R = Automaton.of([prompt.grammar for prompt in prompts], device)
    walks = [_walk(automaton, int(s), c) for s, c in zip(start_R, continuations, strict=True)]
    ids = [np.concatenate([p.streams[-1], c]) for p, c in zip(prompts, continuations, strict=True)]
    cells = [np.concatenate([p.cells[-1], cell]) for p, (_, cell) in zip(prompts, walks, strict=True)]
    tokens_RP = _padded(ids, 0, device)
    position_RP = torch.arange(tokens_RP.shape[1], device=device).expand_as(tokens_RP)
    cache = model.new_cache(*tokens_RP.shape)
    hidden_RPD = model.extend(tokens_RP, position_RP, _padded(cells, NO_CELL, device), cache)
    head_UD = model.head.weight[automaton.low : automaton.high]
    scores = []
    for row, (prompt, continuation, (states, _)) in enumerate(zip(prompts, continuations, walks, strict=True)):
        first, n = len(prompt.streams[-1]) - 1, len(continuation)
        logits_nU = F.linear(hidden_RPD[row, first : first + n], head_UD).float()
        left_n = prompt.grammar.max_length - torch.arange(n, device=device)
        logits_nU = logits_nU.masked_fill(~automaton.allowed(states, left_n), float("-inf"))
        chosen_n = torch.as_tensor(continuation.astype(np.int64), device=device) - automaton.low
        score_n = logits_nU.log_softmax(dim=-1).gather(1, chosen_n[:, None])[:, 0]
        if n and not bool(score_n.isfinite().all()):
            raise ValueError(f"the grammar forbids id {int(continuation[int(score_n.isfinite().long().argmin())])}")
        scores.append(score_n.cpu().numpy())
    return scores


def _walk(automaton: Automaton, state: int, continuation: np.ndarray) -> tuple[Tensor, np.ndarray]:
    """The state (n,) before each id of a continuation, and the cell (n,) of each."""
    class_of, following, cell = (x.cpu().numpy() for x in (automaton.class_of, automaton.next, automaton.cell))
    states, cells = [], []
    for id in continuation.tolist():
        column = id - automaton.low
        if state == END or not 0 <= column < len(class_of):
            raise ValueError(f"the grammar forbids id {id}")
        states.append(state)
        cells.append(cell[state] if class_of[column] == IMAGE else NO_CELL)
        state = following[state, class_of[column]]
    return torch.tensor(states, dtype=torch.int64, device=automaton.next.device), np.array(cells, dtype=np.int64)


def _padded(rows: Sequence[np.ndarray], value: int, device: torch.device) -> Tensor:
    """(R, P) int64, padded on the right, where causal attention does not see it."""
    padded = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return torch.as_tensor(padded, device=device)
