"""Tracking: rows of numbers in; metrics.jsonl, console, W&B and the HTML report out.

metrics.jsonl is the truth; everything else can be lost. Nothing here may stop or stall training, and no
secret may reach a file, the console or a server.
"""

from mmtrain.track.console import Console, closing_box
from mmtrain.track.goodput import Goodput, end_segment, goodput, start_segment
from mmtrain.track.metrics import MetricsWriter, read_metrics
from mmtrain.track.secrets import redact
from mmtrain.track.tracker import Tracker
from mmtrain.track.wandb_sink import WandbSink

__all__ = [
    "Console",
    "Goodput",
    "MetricsWriter",
    "Tracker",
    "WandbSink",
    "closing_box",
    "end_segment",
    "goodput",
    "read_metrics",
    "redact",
    "start_segment",
]
