"""DeepSpeed ZeRO and plain DDP behind one small interface.

Every DeepSpeed setting that has changed its default, or has shipped a silent fault, is written explicitly.
Parameters and AdamW moments leave and enter as full float32 tensors by name, so that a checkpoint does not
know about stages or world sizes.
"""

import contextlib
import io
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmtrain.config import Config
from mmtrain.models import LossSums
from mmtrain.train.distributed import World

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, by parameter
MUON_MOMENTS = ("momentum_buffer",)
TensorDict = dict[str, Tensor]


class Engine(Protocol):
    """What the loop needs of a training backend."""

    def forward(self, batch: dict[str, Tensor]) -> LossSums:
        """Loss sums of a micro-batch."""
        ...

    def backward(self, total: Tensor, global_weight: Tensor) -> None:
        """Accumulate the gradient of total / global_weight, summed over ranks and micro-batches."""
        ...

    def step(self, lr: float) -> Tensor | float | None:
        """Reduce, clip, update; returns the gradient norm before clipping (None when unknown)."""
        ...

    def set_training(self, is_training: bool) -> None:
        """Switch what differs between training and evaluation (dropout)."""
        ...

    def state(self) -> tuple[TensorDict, TensorDict]:
        """Float32 parameters by name and moments by `exp_avg.NAME`; filled on rank 0, all ranks must call."""
        ...

    def updates(self) -> int:
        """Updates that AdamW made: steps less those skipped for a gradient that was not finite."""
        ...

    def load(self, parameters: TensorDict, moments: TensorDict, updates: int) -> None:
        """Restore what `state` returned after `updates` updates; all ranks must call."""
        ...


def build_engine(model: nn.Module, config: Config, world: World, accumulation: int) -> Engine:
    """The engine of `config.engine` around an initialized model; `accumulation` micro-batches per step."""
    if config.engine.kind == "ddp":
        return DdpEngine(model, config, world, accumulation)
    return DeepSpeedEngine(model, config, world, accumulation)


def parameter_groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay, vectors without."""
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def adamw(parameters: list[nn.Parameter], config: Config) -> torch.optim.AdamW:
    """AdamW with this run's settings; the loop sets the learning rate before each step."""
    o = config.optim
    groups = parameter_groups(parameters, o.weight_decay)
    return torch.optim.AdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, fused=torch.cuda.is_available())


class SharedMuon(torch.optim.Muon):
    """torch's Muon with its work shared: each rank updates its part of the matrices and sends them to all others.

    The updates are scaled to the size of AdamW's (Liu et al. 2025, arXiv 2502.16982, sec. 2.2), so that one learning
    rate and one weight decay serve both. Only its owner keeps a matrix's momentum; `share_state` copies it to all.
    """

    def __init__(self, matrices: list[nn.Parameter], config: Config, world: World):
        o = config.optim
        super().__init__(
            matrices, lr=o.lr, weight_decay=o.weight_decay, momentum=o.momentum, adjust_lr_fn="match_rms_adamw"
        )
        self.world = world
        self.parts: list[list[nn.Parameter]] = [[] for _ in range(world.size)]
        for matrix in sorted(matrices, key=nn.Parameter.numel, reverse=True):
            min(self.parts, key=lambda part: sum(p.numel() for p in part)).append(matrix)

    def step(self, closure: Any = None) -> None:
        """Update this rank's matrices, then take the others from their owners."""
        for part in self.parts[: self.world.rank] + self.parts[self.world.rank + 1 :]:
            for parameter in part:
                parameter.grad = None  # torch leaves what has no gradient alone
        super().step(closure)
        self._share([[p.data for p in part] for part in self.parts])

    def share_state(self) -> None:
        """Give every rank the momentum of all matrices; all ranks must call."""
        self._share([[self.state[p][key] for p in part for key in MUON_MOMENTS] for part in self.parts])

    def _share(self, parts: list[list[Tensor]]) -> None:
        """Copy the tensors of part r from rank r to all ranks, in place."""
        for owner, tensors in enumerate(parts if self.world.size > 1 else []):
            if tensors:
                flat = torch.cat([tensor.flatten() for tensor in tensors])
                dist.broadcast(flat, owner)
                for tensor, values in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                    tensor.copy_(values.view_as(tensor))


def optimizers(model: nn.Module, config: Config, world: World) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters; or Muon for the matrices of the blocks, and AdamW for the rest."""
    named = dict(model.named_parameters())
    if config.optim.kind == "adamw":
        return [adamw(list(named.values()), config)]
    matrices = {name: p for name, p in named.items() if name.startswith("blocks.") and p.ndim == 2}
    others = [p for name, p in named.items() if name not in matrices]
    return [adamw(others, config), SharedMuon(list(matrices.values()), config, world)]


def clip_gradients(parameters: TensorDict, clip: float) -> Tensor:
    """Scale the gradients down to the norm `clip` (0: never); returns their norm before."""
    return nn.utils.clip_grad_norm_(parameters.values(), clip if clip > 0 else float("inf"))


def deepspeed_config(config: Config, micro_batch: int, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's JSON, every setting that matters explicit."""
    bf16 = config.engine.dtype == "bf16"
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        # At stage 0 we clip: DeepSpeed does not tell the norm there, and fails where a step has no gradients.
        "gradient_clipping": config.optim.clip if config.engine.stage else 0.0,
        "prescale_gradients": False,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": config.engine.stage,
            "overlap_comm": False,
            "reduce_scatter": True,
            "contiguous_gradients": True,
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
        },
        "checkpoint": {"tag_validation": "Fail"},
        "wall_clock_breakdown": False,
        "steps_per_print": 10**9,
    }


class DeepSpeedEngine:
    """ZeRO stage 0 to 3."""

    def __init__(self, model: nn.Module, config: Config, world: World, accumulation: int):
        import deepspeed  # noqa: PLC0415  (slow to import)

        # On CPU DeepSpeed compiles a shared-memory reduction at the first start: a minute, and a hang forever
        # behind its lock file when that compilation was once killed. gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.world, self.clip = world, config.optim.clip
        micro_batch = config.stream.global_batch // world.size // accumulation
        # It prints its memory at every stage of the set-up, whatever the log level.
        with contextlib.redirect_stdout(io.StringIO()):
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=model,
                optimizer=adamw(list(model.parameters()), config),
                config=deepspeed_config(config, micro_batch, accumulation),
                dist_init_required=False,
            )
        self.parameters = dict(self.engine.module.named_parameters())

    def forward(self, batch: dict[str, Tensor]) -> LossSums:
        return self.engine(**batch)

    def backward(self, total: Tensor, global_weight: Tensor) -> None:
        # DeepSpeed averages over ranks; our normalization is over the global weight, so undo the average.
        self.engine.backward(total * (self.world.size / global_weight), scale_wrt_gas=False)
        # Moves DeepSpeed's micro-batch counter; the update happens at the accumulation boundary.
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()

    def step(self, lr: float) -> Tensor | float | None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if not self._plain():
            self.engine.step()
            return self.engine.get_global_grad_norm()
        # Stage 0 knows no overflow check: without gradients the update changes nothing.
        norm = clip_gradients(self.parameters, self.clip)
        if not torch.isfinite(norm):
            self.optimizer.zero_grad(set_to_none=True)
        self.engine.step()
        return norm

    def set_training(self, is_training: bool) -> None:
        self.engine.module.train(is_training)

    def state(self) -> tuple[TensorDict, TensorDict]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state  # noqa: PLC0415

        self._create_moments()
        parameters: TensorDict = {}
        moments: TensorDict = {}
        for name, parameter in self.parameters.items():
            if self._plain():
                full = parameter.detach().float()
                full_moments = {key: self._inner().state[parameter][key] for key in MOMENTS}
            else:
                full = safe_get_full_fp32_param(parameter)
                full_moments = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
            if self.world.rank == 0:
                parameters[name] = full.detach().cpu().clone()
                for key, value in full_moments.items():
                    moments[f"{key}.{name}"] = value.detach().float().cpu().clone().reshape(full.shape)
        return parameters, moments

    def updates(self) -> int:
        self._create_moments()
        return int(next(iter(self._inner().state.values()))["step"])

    def load(self, parameters: TensorDict, moments: TensorDict, updates: int) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state  # noqa: PLC0415

        self._create_moments()
        for name, parameter in self.parameters.items():
            full = parameters[name].to(self.world.device)
            full_moments = {key: moments[f"{key}.{name}"].to(self.world.device) for key in MOMENTS}
            if self._plain():
                parameter.data.copy_(full)
                for key, value in full_moments.items():
                    self._inner().state[parameter][key].copy_(value)
            else:
                safe_set_full_fp32_param(parameter, full)
                for key, value in full_moments.items():
                    safe_set_full_optimizer_state(parameter, value, key)
        for state in self._inner().state.values():
            state["step"].fill_(float(updates))
        self._refresh_compute_copies()

    def _plain(self) -> bool:
        """Stage 0 in float32: no ZeRO optimizer, parameters are their own masters."""
        return not hasattr(self.optimizer, "optimizer")

    def _inner(self) -> torch.optim.AdamW:
        return self.optimizer if self._plain() else self.optimizer.optimizer

    def _flat_masters(self) -> list[Tensor]:
        """The float32 tensors that AdamW really updates on this rank."""
        for attribute in ("fp32_groups_flat_partition", "single_partition_of_fp32_groups"):
            if hasattr(self.optimizer, attribute):
                return list(getattr(self.optimizer, attribute))
        if hasattr(self.optimizer, "fp32_partitioned_groups_flat"):
            return list(self.optimizer.fp32_partitioned_groups_flat)
        return [p for group in self._inner().param_groups for p in group["params"]]

    def _create_moments(self) -> None:
        """AdamW makes its state at the first update; make it now, so that it can be read or restored before."""
        inner = self._inner()
        for master in self._flat_masters():
            if not inner.state[master]:
                device = master.device if inner.defaults.get("fused") else torch.device("cpu")
                inner.state[master]["step"] = torch.zeros((), dtype=torch.float32, device=device)
                for key in MOMENTS:
                    inner.state[master][key] = torch.zeros_like(master, memory_format=torch.preserve_format)
        if hasattr(self.optimizer, "_lazy_init_hp_params_optimizer_state"):
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _refresh_compute_copies(self) -> None:
        """Copy the restored masters into the parameters that the forward pass uses."""
        if hasattr(self.optimizer, "update_lp_params"):
            self.optimizer.update_lp_params()
        elif hasattr(self.optimizer, "single_partition_of_fp32_groups"):
            from deepspeed.runtime.utils import all_gather_dp_groups  # noqa: PLC0415

            zero = self.optimizer
            for index, master in enumerate(zero.single_partition_of_fp32_groups):
                group = zero.real_dp_process_group[index]
                zero.parallel_partitioned_bit16_groups[index][dist.get_rank(group)].data.copy_(master.data)
            all_gather_dp_groups(
                groups_flat=zero.bit16_groups_flat,
                partitioned_param_groups=zero.parallel_partitioned_bit16_groups,
                dp_process_group=zero.real_dp_process_group,
                start_alignment_factor=zero.nccl_start_alignment_factor,
                allgather_bucket_size=zero.allgather_bucket_size,
            )
        elif not self._plain():
            for index in range(len(self.optimizer.fp32_partitioned_groups_flat)):
                self.optimizer._reassign_or_swap_out_partitioned_parameters(index)


class DdpEngine:
    """torch DistributedDataParallel: float32 masters, bf16 by autocast; every rank updates all parameters."""

    def __init__(self, model: nn.Module, config: Config, world: World, accumulation: int):
        self.world, self.accumulation, self.clip = world, accumulation, config.optim.clip
        self.autocast = config.engine.dtype == "bf16"
        self.model = nn.parallel.DistributedDataParallel(model) if world.size > 1 else model
        self.optimizers = optimizers(model, config, world)
        self.parameters = dict(model.named_parameters())
        self.micro_step = 0

    def forward(self, batch: dict[str, Tensor]) -> LossSums:
        # DDP learns in the forward pass whether the next backward will reduce.
        with self._local_unless_last(), torch.autocast(self.world.device.type, torch.bfloat16, self.autocast):
            return self.model(**batch)

    def backward(self, total: Tensor, global_weight: Tensor) -> None:
        with self._local_unless_last():
            (total * (self.world.size / global_weight)).backward()
        self.micro_step += 1

    def step(self, lr: float) -> Tensor | float | None:
        norm = clip_gradients(self.parameters, self.clip)
        finite = torch.isfinite(norm)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            if finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.micro_step = 0
        return norm

    def set_training(self, is_training: bool) -> None:
        self.model.train(is_training)

    def state(self) -> tuple[TensorDict, TensorDict]:
        states = self._states()
        for optimizer in self.optimizers:
            if isinstance(optimizer, SharedMuon):
                optimizer.share_state()
        if self.world.rank != 0:
            return {}, {}
        parameters = {name: p.detach().cpu().clone() for name, p in self.parameters.items()}
        moments = {
            f"{key}.{name}": moment.cpu().clone()
            for name, state in states.items()
            for key, moment in state.items()
            if key != "step"
        }
        return parameters, moments

    def updates(self) -> int:
        return next(int(state["step"]) for state in self._states().values() if "step" in state)

    def load(self, parameters: TensorDict, moments: TensorDict, updates: int) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(parameters[name])
            for name, state in self._states().items():
                for key, value in state.items():
                    if key == "step":
                        value.fill_(float(updates))
                    else:
                        value.copy_(moments[f"{key}.{name}"])

    def _states(self) -> dict[str, TensorDict]:
        """The optimizer state of every parameter by name, made now where no update has made it yet."""
        names = {id(p): name for name, p in self.parameters.items()}
        states = {}
        for optimizer in self.optimizers:
            is_muon = isinstance(optimizer, torch.optim.Muon)
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                state = states[names[id(parameter)]] = optimizer.state[parameter]
                if not state:
                    state |= {key: torch.zeros_like(parameter) for key in (MUON_MOMENTS if is_muon else MOMENTS)}
                    if not is_muon:
                        device = parameter.device if optimizer.defaults.get("fused") else torch.device("cpu")
                        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        return states

    def _local_unless_last(self) -> contextlib.AbstractContextManager[Any]:
        last = self.micro_step == self.accumulation - 1
        return contextlib.nullcontext() if last or self.world.size == 1 else self.model.no_sync()
