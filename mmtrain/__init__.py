"""mmtrain: pretrain multimodal token models on DeepSpeed, from shards to samples, with every FLOP booked."""

__version__ = "0.1.0"
