"""The estimate against what torch really allocates, and what is said with it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from mmtrain.config import Config, ModelConfig, UserError
from mmtrain.models import build_model, count_parameters
from mmtrain.train.activations import Precision, kept_by_block
from mmtrain.train.distributed import World
from mmtrain.train.memory import (
    BUCKET,
    GATHERED,
    PREFETCHED,
    available_bytes,
    choose_stage,
    estimate,
    is_out_of_memory,
    out_of_memory,
)
from mmtrain.train.zero_config import deepspeed_config
from tests.train.memory_cases import STAGES, VOCABULARY, batch, configure, measured

SIZES = (65536, 4096)  # vocabulary, positions
GIB = 2**30
FAMILIES = {
    "cm3leon": {},
    "cm3leon, gelu, dropout": {"activation": "gelu", "dropout": 0.1},
    "llama, grouped": {"family": "llama", "kv_heads": 2},
    "chameleon, dropout": {"family": "chameleon", "dropout": 0.1},
    "chameleon, norms after": {"family": "chameleon", "norm_after": True},
}


def kept(config: Config, is_ddp: bool) -> int:
    """Bytes of all storages that autograd saves in a forward pass, parameters and inputs left out."""
    model = build_model(config.model, VOCABULARY, 256)
    model.initialize(0)
    if config.engine.dtype == "bf16" and not is_ddp:
        model.bfloat16()
    inputs, saved = batch(4, 256), []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.untyped_storage())
        return tensor

    is_autocast = config.engine.dtype == "bf16" and is_ddp
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", enabled=is_autocast):
        sums = model(**inputs)
    others = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *inputs.values()]}
    found = {storage.data_ptr(): storage.nbytes() for storage in saved if storage.data_ptr() not in others}
    del sums
    return sum(found.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("is_ddp", "dtype"), [(False, "fp32"), (False, "bf16"), (True, "bf16")])
def test_a_block_keeps_for_its_backward_pass_what_is_counted(family: str, is_ddp: bool, dtype: str) -> None:
    config = configure(None, dtype, 4, 256, 1, **FAMILIES[family])
    config.model.layers = 1
    matrices = sum(p.numel() for p in build_model(config.model, VOCABULARY, 256).blocks.parameters() if p.ndim == 2)
    precision = Precision.of(config, is_ddp)
    one = kept(config, is_ddp)
    config.model.layers = 2
    found = kept(config, is_ddp) - one - (2 * matrices if precision.is_autocast else 0)
    assert kept_by_block(config, 4, precision, "cpu") == pytest.approx(found, rel=0.005)


@pytest.mark.parametrize(
    ("dtype", "checkpointing", "length"),
    [("fp32", False, 256), ("fp32", True, 256), ("fp32", False, 1024), ("fp32", True, 1024), ("bf16", False, 256)],
)
def test_a_training_step_takes_what_is_estimated(dtype: str, checkpointing: bool, length: int) -> None:
    config = configure(None, dtype, 1024 // length, length, 1, activation_checkpointing=checkpointing)
    expected = estimate(config, VOCABULARY, length, 1, None, device="cpu")
    found = measured(config, World(0, 1, torch.device("cpu")))
    assert 0.95 * found < expected.device_total < 1.1 * found


def test_the_buckets_are_those_that_deepspeed_is_told() -> None:
    settings = deepspeed_config(configure(3, "bf16", 4, 256, 2), 4, 2)["zero_optimization"]
    assert settings["reduce_bucket_size"] == BUCKET
    assert settings["stage3_prefetch_bucket_size"] == PREFETCHED
    assert settings["stage3_max_live_parameters"] == GATHERED


@pytest.mark.slow
@pytest.mark.timeout(600)  # a processor without bf16 emulates it
def test_zero_takes_and_sends_what_is_estimated(tmp_path: Path) -> None:
    root, out = Path(__file__).parents[2], tmp_path / "memory.json"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    script = str(Path(__file__).with_name("memory_cases.py"))
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, script, str(out)], env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(out.read_text())
    cases = found["memory"]
    assert len(cases) == len(STAGES)
    # Stage 3 gathers ahead, now more and now less: its peak differs by a tenth from run to run.
    wrong = {name: pair for name, pair in cases.items() if not 0.88 * pair[0] < pair[1] < 1.15 * pair[0]}
    assert not wrong
    assert len(found["sent"]) == len(STAGES) + 2
    assert not {name: pair for name, pair in found["sent"].items() if not 0.96 * pair[0] < pair[1] < 1.04 * pair[0]}


def seven_billion(**changes: object) -> Config:
    """Chameleon-7B in rows of 4096 tokens."""
    config = Config()
    config.model = ModelConfig(family="chameleon", layers=32, width=4096, heads=32)
    config.stream.sequence_length, config.stream.global_batch, config.engine.micro_batch = 4096, 512, 1
    return replace(config, engine=replace(config.engine, **changes))


def test_states_are_those_of_the_zero_paper() -> None:
    """Table 1, with gradients accumulated in float32; BF16_Optimizer keeps all of them, in both types."""
    config = seven_billion()
    P = count_parameters(config.model, *SIZES)
    found = {stage: estimate(config, *SIZES, 64, stage) for stage in (1, 2, 3)}
    assert [found[stage].masters_and_moments for stage in (1, 2, 3)] == [12 * P // 64] * 3
    assert [found[1].gradients, found[1].parameters, found[2].parameters] == [6 * P, 2 * P, 2 * P]
    assert [found[3].gradients, found[3].parameters] == [4 * P // 64, 2 * P // 64 + 2 * 10**9]
    assert found[3].checkpoint_snapshot == 12 * P // 64 and found[3].host_total == 12 * P // 64


def test_the_cheapest_stage_that_fits_is_chosen_with_the_reason() -> None:
    config = seven_billion()
    needed = {stage: estimate(config, *SIZES, 8, stage).device_total for stage in (1, 2, 3)}
    assert needed[1] > needed[2] > needed[3]
    for stage in (1, 2, 3):
        assert choose_stage(config, *SIZES, 8, int(needed[stage] / 0.9) + 1)[0] == stage
    stage, why = choose_stage(config, *SIZES, 8, 80 * GIB)
    found, other = (f"{needed[stage] / GIB:.1f} GiB" for stage in (2, 1))
    assert why == f"stage 2: {found} of 80.0 GiB per rank; stage 1 would need {other}"
    fp32 = configure(0, "fp32", 4, 256, 2)
    assert choose_stage(fp32, VOCABULARY, 256, 2, 80 * GIB)[0] == 0
    assert choose_stage(fp32, VOCABULARY, 256, 2, 80 * GIB, offload_optimizer=True)[0] == 1
    assert choose_stage(fp32, VOCABULARY, 256, 2, 80 * GIB, offload_parameters=True)[0] == 3


def test_the_rank_with_least_memory_decides() -> None:
    world = World(0, 1, torch.device("cpu"))
    assert 0 < available_bytes(world) <= psutil.virtual_memory().total
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(World, "gather", lambda self, value: [value, 7, 9])
        assert available_bytes(world) == 7


def test_where_no_stage_fits_the_sentence_names_what_would() -> None:
    config = seven_billion(micro_batch=4)
    with pytest.raises(UserError, match=r"^no ZeRO stage fits in 90% of 80\.0 GiB per rank: stage 3 needs ") as error:
        choose_stage(config, *SIZES, 8, 80 * GIB)
    assert "GiB per rank, activations " in str(error.value)
    assert "model.activation_checkpointing=true (" in str(error.value) and "engine.micro_batch=2 (" in str(error.value)


def test_what_is_advised_is_what_the_estimate_says() -> None:
    config = seven_billion(micro_batch=4)
    sentence = out_of_memory(torch.OutOfMemoryError("Tried to allocate 2.00 GiB."), config, *SIZES, 8, 2)
    fewer = estimate(seven_billion(micro_batch=2), *SIZES, 8, 2).device_total / GIB
    assert sentence.startswith("out of memory when it asked for 2.00 GiB more; ")
    assert f"engine.micro_batch=2 ({fewer:.1f} GiB)" in sentence and "engine.stage=3 (" in sentence
    assert "engine.stage=1" not in sentence and "model.loss_chunk" not in sentence  # which would save next to nothing


def test_offloading_moves_states_to_the_host() -> None:
    config = seven_billion()
    P = count_parameters(config.model, *SIZES)
    for stage in (1, 2, 3):
        there, moved = (estimate(config, *SIZES, 8, stage, offload) for offload in (False, True))
        assert moved.masters_and_moments == 0 and moved.offloaded == 16 * P // 8
        assert moved.device_total < there.device_total
    moved = estimate(config, *SIZES, 8, 3, True, True)
    assert moved.offloaded == 16 * P // 8 + 2 * P // 8


def test_out_of_memory_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(10**15)
    assert is_out_of_memory(error.value) and is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_out_of_memory(RuntimeError("shapes differ")) and not is_out_of_memory(ValueError("out of memory"))
