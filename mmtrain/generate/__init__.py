"""Sampling: prompts of token ids go in, text and pictures come out, always well-formed.

A grammar decides which ids each position may take, so that an image block has exactly the right number of
codes. Each sample draws from its own random stream: the same seed gives the same sample alone and in a batch.
"""

from mmtrain.generate.grammar import Grammar
from mmtrain.generate.guidance import SamplingSettings, check
from mmtrain.generate.pipeline import Drawn, Sampler, Written
from mmtrain.generate.sampling import Prompt, Sampled, sample, sample_tokens
from mmtrain.generate.scoring import score

__all__ = [
    "Drawn",
    "Grammar",
    "Prompt",
    "Sampled",
    "Sampler",
    "SamplingSettings",
    "Written",
    "check",
    "sample",
    "sample_tokens",
    "score",
]
