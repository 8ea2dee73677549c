"""Learning rate as a pure function of the step."""

import math

from mmtrain.config import OptimConfig


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """Rate of optimizer step `step` (0-based): linear warm-up, then decay to `final_fraction` of the peak."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.decay == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, total_steps - 1 - config.warmup_steps)
    shape = 1 - progress if config.decay == "linear" else 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.final_fraction + (1 - config.final_fraction) * max(0.0, shape))
