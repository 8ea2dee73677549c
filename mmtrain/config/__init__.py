"""Configuration: command-line overrides in, one validated and frozen `Config` out.

Also holds what every package needs and nothing more: the user's error, artifacts, fingerprints, randomness.
It must never import torch or anything slow: `mmtrain --help` passes through here.
"""

from mmtrain.config.artifact import build_artifact, fingerprint, sync_folder, sync_tree, write_text_atomic
from mmtrain.config.errors import UserError
from mmtrain.config.schema import (
    CleanConfig,
    Config,
    CorpusConfig,
    DataConfig,
    DedupeConfig,
    DiffusionConfig,
    EngineConfig,
    GenerateConfig,
    HealthConfig,
    ImageTokenizerConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RetrievalConfig,
    StoreConfig,
    StreamConfig,
    SweepConfig,
    TaskConfig,
    TextTokenizerConfig,
    TrackConfig,
    TrainConfig,
)

__all__ = [
    "CleanConfig",
    "Config",
    "CorpusConfig",
    "DataConfig",
    "DedupeConfig",
    "DiffusionConfig",
    "EngineConfig",
    "GenerateConfig",
    "HealthConfig",
    "ImageTokenizerConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "RetrievalConfig",
    "StoreConfig",
    "StreamConfig",
    "SweepConfig",
    "TaskConfig",
    "TextTokenizerConfig",
    "TrackConfig",
    "TrainConfig",
    "UserError",
    "build_artifact",
    "fingerprint",
    "sync_folder",
    "sync_tree",
    "write_text_atomic",
]
