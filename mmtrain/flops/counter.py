"""What torch's own counter sees on the meta device: the check of the closed form. Nothing is computed or allocated.

FlopCounterMode drops scaled_dot_product_attention on CPU tensors (pytorch#195460); on meta it is decomposed and exact.
"""

from collections import Counter
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from mmtrain.config import ModelConfig
from mmtrain.models import build_model

BATCH_KEYS = ("tokens", "document", "position", "cell", "targets", "modality")


def count_training_step(model: ModelConfig, vocabulary_size: int, length: int) -> dict[str, int]:
    """FLOPs of forward and backward on one row that is one document of `length` tokens, by module.

    Full attention, recomputation included: the convention `hardware` of the closed form.
    """
    model = replace(model, loss_chunk=length)
    decoder = build_model(model, vocabulary_size, length, "meta").train()
    with torch.device("meta"):
        batch = {key: torch.zeros(1, length, dtype=torch.long) for key in BATCH_KEYS}
        batch["loss_weight"] = torch.ones(1, length)
    with FlopCounterMode(display=False) as counter:
        decoder(**batch).total.backward()
    found: Counter[str] = Counter()
    for name, by_operation in counter.get_flop_counts().items():
        parts = name.split(".")
        for operation, flops in by_operation.items():
            if name == "Global":
                found["all"] += flops
            elif parts[-1] == "attention" and len(parts) == 4:
                found["attention_scores" if "bmm" in str(operation) else "attention_projections"] += flops
            elif parts[-1] == "ffn" and len(parts) == 4:
                found["feed_forward"] += flops
            elif parts[-1] == "head":
                found["head"] += flops
    return dict(found)


def count_of_depth(model: ModelConfig, vocabulary_size: int, length: int) -> dict[str, int]:
    """`count_training_step`, from one layer and two: every layer costs the same, so 80 need not be run."""
    one, two = (count_training_step(replace(model, layers=n), vocabulary_size, length) for n in (1, 2))
    return {name: flops + (model.layers - 1) * (two[name] - flops) for name, flops in one.items()}
