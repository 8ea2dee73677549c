"""Losses of held-out documents one by one: nothing is masked, and of retrieved documents no token counts."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from mmtrain.models import Decoder
from mmtrain.stream import Recipe, Source, collate
from mmtrain.tokens import MODALITIES
from mmtrain.train.token_learner import model_inputs


@dataclass(frozen=True)
class DocumentLosses:
    """Of n documents: ids, nats (n, 3) float64 and number of targets (n, 3) by `MODALITIES`, tokens of retrieved
    documents (n,); lengths: of all sequences, for the ledger."""

    ids: list[str]
    nats: np.ndarray
    targets: np.ndarray
    retrieved: np.ndarray
    lengths: list[int]

    def mean(self, modality: str) -> float | None:
        """Nats per target, None without any."""
        column = MODALITIES.index(modality)
        count = self.targets[:, column].sum()
        return float(self.nats[:, column].sum() / count) if count else None


@torch.inference_mode()
def measure_documents(
    model: Decoder, source: Source, recipe: Recipe, limit: int, advance: Callable[[int], object] = lambda done: None
) -> DocumentLosses:
    """Cross entropy of the first `limit` documents of a source behind what is retrieved for them.

    The order of segments and the retrieved documents are drawn as in training (epoch 0), but none is dropped, there
    are no masks, and every token of the document itself counts 1 whatever its weight in training.
    """
    objective = replace(recipe.objective, masks="none")
    retrieval = replace(recipe.retrieval, dropout=0.0) if recipe.retrieval else None
    recipe = replace(recipe, objective=objective, retrieval=retrieval)
    vocabulary, device = source.tokens.vocabulary, next(model.parameters()).device
    count = min(limit, len(source.tokens))
    sums, retrieved, lengths = np.zeros((count, len(MODALITIES), 2)), np.zeros(count, np.int64), []
    for index in range(count):
        # One at a time: the model sums over a batch, and a batch of one document is that document.
        for sequence in recipe.sequences(source, 0, index):
            batch, _ = collate([[sequence]], [[0]], 1, len(sequence), vocabulary)
            counts = torch.zeros(1, len(sequence))
            counts[0, :-1] = torch.from_numpy(~sequence.is_retrieved[1:])
            batch["loss_weight"] = counts
            sums[index] += model(**model_inputs(batch, vocabulary, device)).by_modality.double().cpu().numpy()
            retrieved[index] += sequence.retrieved
            lengths.append(len(sequence))
        advance(index + 1)
    ids = [source.tokens.id(index) for index in range(count)]
    return DocumentLosses(ids, sums[..., 0], sums[..., 1].astype(np.int64), retrieved, lengths)
