"""What is asked of DeepSpeed, and what it made of it.

Its defaults move between versions, and it routes to another optimizer by the combination of settings. So every setting
that has moved, or has shipped a silent fault, is written explicitly, and read back after the start.
"""

import sys
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from mmtrain.config import Config, EngineConfig, UserError

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def deepspeed_config(config: Config, micro_batch: int, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's JSON, every setting that matters explicit."""
    e = config.engine
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "managed_gradient_accumulation": True,
        # At stage 0 we clip: DeepSpeed does not tell the norm there, and fails where a step has no gradients.
        "gradient_clipping": float(config.optim.clip) if e.stage else 0.0,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "zero_allow_untested_optimizer": True,
        # DeepSpeed's own CPU AdamW is compiled at the first start; torch's fused one is there, and equal everywhere.
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {
            "enabled": e.dtype == "bf16",
            "check_grad_overflow": True,
            "immediate_grad_update": False,
            "bf16_master_weights_and_grads": False,
            "bf16_optimizer_states": False,
        },
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": e.reduce_dtype,
        "zero_optimization": _zero_section(e),
        "checkpoint": {"tag_validation": "Fail"},
        "wall_clock_breakdown": False,
        "steps_per_print": 10**9,
    }


def _zero_section(e: EngineConfig) -> dict[str, Any]:
    section: dict[str, Any] = {
        "stage": e.stage,
        "overlap_comm": False,  # on by default at stage 3; races in several versions
        "reduce_scatter": True,
        "contiguous_gradients": True,
        "round_robin_gradients": False,
        "use_multi_rank_bucket_allreduce": True,
        "allgather_partitions": True,
        "compute_grad_norm": True,
        "ignore_unused_parameters": True,
        "elastic_checkpoint": False,
        "zero_hpz_partition_size": 1,
        "zero_quantized_weights": False,
        "zero_quantized_gradients": False,
        "reduce_bucket_size": 50_000_000,
        "allgather_bucket_size": 50_000_000,
    }
    if e.stage == 3:
        section |= {
            "sub_group_size": 1_000_000_000,
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_param_persistence_threshold": 100_000,
            "stage3_model_persistence_threshold": sys.maxsize,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            "stage3_module_granularity_threshold": 0,
            "stage3_use_all_reduce_for_fetch_params": False,
            "stage3_allgather_sequential": False,
            "stage3_gather_16bit_weights_on_model_save": False,
            "memory_efficient_linear": True,
        }
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if e.offload_optimizer:
        section["offload_optimizer"] = host | {"ratio": 1.0, "super_offload": False}
    if e.offload_parameters:
        section["offload_param"] = host
    return section


def expected(asked: dict[str, Any], config: Config) -> dict[str, Any]:
    """What must come back for DeepSpeed's JSON `asked`: its settings, and under "runs" what works with them."""
    e, zero = config.engine, asked["zero_optimization"]
    if e.stage == 0:
        return asked | {"runs": {"optimizer": "AdamW", "update": "AdamW", "parameters": e.dtype, "masters": "fp32"}}
    plain = e.dtype == "bf16" and e.stage == 1 and not e.offload_optimizer
    runs = {
        "optimizer": "BF16_Optimizer" if plain else "DeepSpeedZeroOptimizer" + ("_Stage3" if e.stage == 3 else ""),
        "update": "AdamW",
        "parameters": e.dtype,
        "masters": "fp32",
        "accumulation": "fp32",
        "clip": asked["gradient_clipping"],
    }
    if not plain:  # which reduces by the engine, and has no settings of its own for it
        runs |= {"reduction": e.reduce_dtype, "reduce_scatter": True, "reduce_bucket": zero["reduce_bucket_size"]}
    if e.stage < 3 and not plain:
        runs["partition_gradients"] = e.stage == 2
    if e.offload_optimizer:
        runs["masters_on"] = "cpu"
    return asked | {"runs": runs}


def read_back(engine: Any, inner: torch.optim.Optimizer, masters: list[Tensor]) -> dict[str, Any]:
    """What a DeepSpeed engine parsed and built, under the same keys as `expected`."""
    c, optimizer = engine._config, engine.optimizer
    runs = {
        "optimizer": type(optimizer).__name__,
        "update": type(inner).__name__,
        "parameters": NAMES.get(next(engine.module.parameters()).dtype),
        "masters": NAMES.get(masters[0].dtype),
        "masters_on": masters[0].device.type,
    }
    for name, attributes in {
        "accumulation": ("gradient_accumulation_dtype", "grad_acc_dtype"),
        "reduction": ("communication_data_type",),
        "clip": ("clip_grad",),
        "reduce_scatter": ("reduce_scatter",),
        "reduce_bucket": ("reduce_bucket_size",),
        "partition_gradients": ("partition_gradients",),
    }.items():
        found = [getattr(optimizer, attribute) for attribute in attributes if hasattr(optimizer, attribute)]
        if found:
            runs[name] = NAMES.get(found[0], str(found[0])) if isinstance(found[0], torch.dtype) else found[0]
    return {
        "train_micro_batch_size_per_gpu": engine.train_micro_batch_size_per_gpu(),
        "gradient_accumulation_steps": engine.gradient_accumulation_steps(),
        "managed_gradient_accumulation": c.managed_gradient_accumulation,
        "gradient_clipping": engine.gradient_clipping(),
        "prescale_gradients": c.prescale_gradients,
        "gradient_predivide_factor": c.gradient_predivide_factor,
        "zero_allow_untested_optimizer": c.zero_allow_untested_optimizer,
        "zero_force_ds_cpu_optimizer": c.zero_force_ds_cpu_optimizer,
        "bf16": c.bfloat16_config.model_dump(mode="json"),
        "data_types": {"grad_accum_dtype": NAMES.get(engine.get_data_types()[1])},
        "communication_data_type": NAMES.get(engine.communication_data_type),
        "zero_optimization": c.zero_config.model_dump(mode="json", by_alias=True),
        "checkpoint": {"tag_validation": "Fail" if c.checkpoint_tag_validation_fail else "Warn"},
        "wall_clock_breakdown": engine.wall_clock_breakdown(),
        "steps_per_print": engine.steps_per_print(),
        "runs": runs,
    }


def check_effective(asked: dict[str, Any], got: dict[str, Any]) -> None:
    """Raise UserError for the first setting of `asked` that `got` has otherwise."""
    there = dict(_leaves(got))
    for key, value in _leaves(asked):
        if key not in there or there[key] != value:
            raise UserError(
                f"DeepSpeed {version('deepspeed')} was asked for {key}={value} and took {there.get(key)}; install a "
                "version that docs/dependencies.md names, or train with engine=ddp"
            )


def _leaves(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
