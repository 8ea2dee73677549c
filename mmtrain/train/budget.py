"""A training budget in FLOPs: how many steps it pays for, from the batches that the run will train on."""

from dataclasses import replace
from itertools import accumulate

import torch

from mmtrain.config import Config, UserError
from mmtrain.tokens import Vocabulary
from mmtrain.train.run import Artifacts

SAMPLED_STEPS = 32


def with_budget(config: Config, artifacts: Artifacts) -> Config:
    """`config` with train.steps = the number of steps whose FLOPs come nearest to train.flops, if that is set.

    The same settings and artifacts always give the same number. Raises UserError when it is shorter than the warm-up.
    """
    budget = config.train.flops
    if not budget:
        return config
    steps = steps_for(budget, flops_per_step(config, artifacts))
    print(f"train.flops={budget:.4g} gives {steps} steps", flush=True)
    if config.optim.warmup_steps > steps:
        raise UserError(
            f"optim.warmup_steps={config.optim.warmup_steps} is longer than the {steps} steps that "
            f"train.flops={budget:.4g} gives; shorten the warm-up or raise the budget"
        )
    return replace(config, train=replace(config.train, steps=steps))


def steps_for(budget: float, first: list[int]) -> int:
    """The number of steps, at least 1, whose FLOPs come nearest to `budget`; first: FLOPs of each of the first steps.

    Those after them cost the mean of them.
    """
    sums = [0, *accumulate(first)]
    if budget > sums[-1]:
        return len(first) + round((budget - sums[-1]) / (sums[-1] / len(first)))
    return max(1, min(range(len(sums)), key=lambda steps: abs(sums[steps] - budget)))


def flops_per_step(config: Config, artifacts: Artifacts, num_steps: int = SAMPLED_STEPS) -> list[int]:
    """Model FLOPs (causal) of training on each of the first `num_steps` global batches, as the ledger will book them."""
    from mmtrain.train.learner import open_learner  # noqa: PLC0415 - they import the engines
    from mmtrain.train.worker import open_stream  # noqa: PLC0415

    vocabulary = Vocabulary.load(artifacts.tokens[artifacts.main] / "vocabulary.json")
    learner = open_learner(config, artifacts, vocabulary, torch.device("cpu"))
    stream = open_stream(config, artifacts, vocabulary, "train")
    found = []
    for step in range(num_steps):
        batch, counts = stream.prepare(step)
        _, sums = learner.inputs(batch, counts, "train")
        flops, _ = learner.flops(sums, counts.tokens, counts.rows)
        found.append(flops.model_causal)
    return found
