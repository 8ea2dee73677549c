"""The estimate of a training step against what torch allocates on a CUDA device. Skipped where there is none."""

import gc
from collections.abc import Iterator

import pytest
import torch

from mmtrain.train.distributed import World, start_world
from mmtrain.train.launch import free_port
from mmtrain.train.memory import estimate
from tests.train.memory_cases import VOCABULARY, configure, train

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """A process group of this process alone, on NCCL."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
            patch.setenv(name, value)
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        patch.setenv("MASTER_PORT", str(free_port()))
        yield start_world()
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("family", ["cm3leon", "chameleon"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("stage", "dtype"), [(None, "fp32"), (None, "bf16"), (1, "bf16"), (2, "bf16"), (3, "bf16"), (1, "fp32")]
)
def test_a_training_step_takes_what_is_estimated(
    stage: int | None, dtype: str, checkpointing: bool, family: str, world: World
) -> None:
    model = {"family": family, "width": 1024, "heads": 16, "activation_checkpointing": checkpointing}
    config = configure(stage, dtype, 4, 1024, 1, **model)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    train(config, world)
    found = torch.cuda.max_memory_allocated() - before
    expected = estimate(config, VOCABULARY, 1024, 1, stage).device_total
    assert 0.8 * found < expected < 1.2 * found
