"""Sampling: prompts of token ids go in, text and pictures come out, always well-formed.

A grammar decides which ids each position may take, so that an image block has exactly the right number of
codes. Each sample draws from its own random stream: the same seed gives the same sample alone and in a batch.
"""

from mmtrain.generate.pipeline import Drawn, Sampler, Written
from mmtrain.generate.sampling import SamplingSettings, sample_tokens

__all__ = ["Drawn", "Sampler", "SamplingSettings", "Written", "sample_tokens"]
