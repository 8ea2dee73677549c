"""What the fork server imports once for all ranks."""

import os

os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", WANDB_MODE="disabled")

import deepspeed.runtime.zero.muon.original_muon  # noqa: E402, F401
import torch  # noqa: E402, F401

import mmtrain.train.worker  # noqa: E402, F401
