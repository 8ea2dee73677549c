"""Generation: requests go in, text and pictures come out, always well-formed.

A task is a prompt of the training layout with a grammar, which decides which ids each position may take, so that an
image block has exactly the right number of codes. Each sample draws from its own random stream: the same seed gives
the same sample alone and in a batch.
"""

from mmtrain.generate.grammar import Grammar
from mmtrain.generate.guidance import SamplingSettings, check
from mmtrain.generate.pictures import PictureSampler
from mmtrain.generate.pipeline import Sample, Sampler
from mmtrain.generate.sampling import Prompt, Sampled, sample
from mmtrain.generate.scoring import score
from mmtrain.generate.tasks import DRAWING_TASKS, MASK, Request, Task, TaskBuilder

__all__ = [
    "DRAWING_TASKS",
    "MASK",
    "Grammar",
    "PictureSampler",
    "Prompt",
    "Request",
    "Sample",
    "Sampled",
    "Sampler",
    "SamplingSettings",
    "Task",
    "TaskBuilder",
    "check",
    "sample",
    "score",
]
