"""Train the `dual` encoder: captions and pictures that belong together are nearer than those that do not."""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmtrain.config import RetrievalConfig, UserError, write_text_atomic
from mmtrain.config.randomness import random_stream
from mmtrain.documents import Document
from mmtrain.retrieval.dual import HIGHEST_SCALE, DualNetwork, DualSizes, save_dual
from mmtrain.retrieval.encode import decoded
from mmtrain.retrieval.hashed import PICTURE_SIZE, picture_features, text_features
from mmtrain.retrieval.windows import windows_of

Progress = Callable[[int, dict[str, Any]], object]

METRICS = "metrics.json"
HELD_OUT = 1000
FEWEST_PAIRS = 8
# Of a text's features, and of a picture's hidden units: a thousand pairs are soon known by heart.
FEATURE_DROPOUT, HIDDEN_DROPOUT = 0.5, 0.5
WEIGHT_DECAY, WARMUP_FRACTION, CLIP = 0.05, 0.1, 1.0
REPORT_EVERY = 20
RANKS = (1, 5)


@dataclass(frozen=True)
class Pairs:
    """n texts and pictures that belong together: buckets of each text, (n, F) float32 features of pictures, and the
    near-duplicate cluster (n,) of their documents, hashed to int64."""

    texts: list[np.ndarray]
    pictures: np.ndarray
    cluster: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)

    @classmethod
    def of(cls, documents: Iterable[Document], limit: int) -> "Pairs":
        """The first `limit` windows with both words and a picture."""
        texts, pictures, clusters = [], [], []
        for window in islice((w for d in documents for w in windows_of(d) if w.images and w.texts), limit):
            features = text_features("\n".join(window.texts))
            if len(features):
                texts.append(features)
                pictures.append(picture_features(decoded(window, PICTURE_SIZE)))
                clusters.append(str(window.meta.get("cluster", f"id {window.id}")))
        return cls(texts, np.array(pictures, np.float32), np.unique(clusters, return_inverse=True)[1])

    def same(self, rows: np.ndarray) -> Tensor:
        """(b, b) bool: others of the same cluster, which are no negatives."""
        of_rows = self.cluster[rows]
        return torch.from_numpy((of_rows[:, None] == of_rows) & ~np.eye(len(rows), dtype=bool))


def train_dual(
    documents: Iterable[Document],
    held_out: Iterable[Document],
    config: RetrievalConfig,
    out: Path,
    seed: int,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train on the pairs of `documents`, measure on those of `held_out`, save into `out`; returns the metrics.

    Symmetric InfoNCE with a learned temperature (Radford et al. 2021, sec. 2.3). One seed and one machine give one
    encoder. metrics: pairs, held_out, r@1 and r@5 (share of held-out captions whose picture is among so many nearest of
    all held-out pictures), seconds, flops (3 x forward of the matrices). progress(step, {"loss", "scale"}).
    Raises UserError for fewer than 8 pairs of either kind and for a loss that is not finite.
    """
    started = time.perf_counter()
    pairs, measured = Pairs.of(documents, config.dual_pairs), Pairs.of(held_out, HELD_OUT)
    for kind, found in (("training", pairs), ("held-out", measured)):
        if len(found) < FEWEST_PAIRS:
            raise UserError(
                f"the corpus has {len(found)} {kind} documents with both words and a picture, and an encoder learns "
                f"from at least {FEWEST_PAIRS}; use retrieval.encoder=hashed"
            )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = DualNetwork(DualSizes(config.dimension), HIDDEN_DROPOUT)
        flops = _fit(network, pairs, config, seed, progress)
    network.eval()
    metrics = {
        "pairs": len(pairs),
        "held_out": len(measured),
        **accuracy(network, measured),
        "steps": config.dual_steps,
        "seconds": time.perf_counter() - started,
        "flops": flops,
    }
    save_dual(network, out)
    write_text_atomic(out / METRICS, json.dumps(metrics, indent=1) + "\n")
    return metrics


def _fit(network: DualNetwork, pairs: Pairs, config: RetrievalConfig, seed: int, progress: Progress | None) -> int:
    """AdamW, one-cycle learning rate; returns the FLOPs."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.dual_lr, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.dual_lr, total_steps=config.dual_steps + 1, pct_start=WARMUP_FRACTION, cycle_momentum=False
    )
    batch = min(config.dual_batch, len(pairs))
    network.train()
    for step in range(config.dual_steps):
        stream = random_stream("dual encoder", seed, step)
        rows = stream.choice(len(pairs), batch, replace=False)
        texts = network.encode_texts([_thinned(pairs.texts[row], stream) for row in rows.tolist()])
        pictures = network.encode_pictures(torch.from_numpy(pairs.pictures[rows]))
        loss = contrastive_loss(texts, pictures, network.log_scale, pairs.same(rows))
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss of the dual encoder was not finite at step {step + 1}; lower retrieval.dual_lr="
                f"{config.dual_lr:g}, and train it again"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        if progress and ((step + 1) % REPORT_EVERY == 0 or step + 1 == config.dual_steps):
            progress(step + 1, {"loss": loss.item(), "scale": network.log_scale.exp().item()})
    return 3 * config.dual_steps * batch * (sum(network.flops) + 2 * batch * config.dimension)


def _thinned(features: np.ndarray, stream: np.random.Generator) -> np.ndarray:
    """A text's features without some of them; never without all."""
    kept = features[stream.random(len(features)) >= FEATURE_DROPOUT]
    return kept if len(kept) else features


def contrastive_loss(texts: Tensor, pictures: Tensor, log_scale: Tensor, same: Tensor) -> Tensor:
    """Symmetric InfoNCE of (b, d) unit vectors, of which row i belongs to row i; `same` (b, b): no negatives."""
    logits = (texts @ pictures.T * log_scale.exp().clamp(max=HIGHEST_SCALE)).masked_fill(same, float("-inf"))
    own = torch.arange(len(logits))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


@torch.inference_mode()
def accuracy(network: DualNetwork, pairs: Pairs) -> dict[str, float]:
    """r@1 and r@5 of the pictures for their captions, among all pictures of other clusters."""
    scores = network.encode_texts(pairs.texts) @ network.encode_pictures(torch.from_numpy(pairs.pictures)).T
    scores = scores.masked_fill(pairs.same(np.arange(len(pairs))), float("-inf"))
    better = (scores > scores.diag()[:, None]).sum(dim=1)
    return {f"r@{rank}": float((better < rank).float().mean()) for rank in RANKS}
