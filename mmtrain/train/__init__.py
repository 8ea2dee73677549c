"""Training: a frozen config in a run directory goes in; checkpoints, metrics and a compute ledger come out.

The loop never waits for tracking, and no step is ever lost or repeated in silence.
"""

from mmtrain.train.checkpoint import latest_checkpoint, load_model, read_checkpoint
from mmtrain.train.launch import launch

__all__ = ["latest_checkpoint", "launch", "load_model", "read_checkpoint"]
