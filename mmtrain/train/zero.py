"""DeepSpeed ZeRO, stage 0 to 3 with offload to host memory, behind the interface of `Engine`."""

import contextlib
import io
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmtrain.config import Config
from mmtrain.models import LossSums
from mmtrain.train.distributed import World
from mmtrain.train.fragments import Fragment, shared_out, whole
from mmtrain.train.optimizers import MOMENTS, adamw, clip_gradients, skip_unless_finite
from mmtrain.train.zero_config import check_effective, deepspeed_config, expected, read_back


class DeepSpeedEngine:
    """ZeRO stage 0 to 3, an int.

    Raises UserError where DeepSpeed made something else of a setting than was asked.
    """

    def __init__(self, model: nn.Module, config: Config, world: World, accumulation: int):
        import deepspeed  # noqa: PLC0415  (slow to import)

        # On CPU DeepSpeed compiles a shared-memory reduction at the first start: a minute, and a hang forever
        # behind its lock file when that compilation was once killed. gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.world, self.clip = world, config.optim.clip
        asked = deepspeed_config(config, config.stream.global_batch // world.size // accumulation, accumulation)
        # It prints its memory at every stage of the set-up, whatever the log level.
        with contextlib.redirect_stdout(io.StringIO()):
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=model,
                optimizer=adamw(list(model.parameters()), config),
                config=asked,
                dist_init_required=False,
            )
        self.parameters = dict(self.engine.module.named_parameters())
        check_effective(expected(asked, config), self.effective())

    def effective(self) -> dict[str, Any]:
        return read_back(self.engine, self._inner(), self._flat_masters())

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
            # With offload in bf16, stages 1 and 2 keep the gradients of a skipped update, and no later one would ever
            # be finite (0.19.8).
            for group in getattr(self.optimizer, "averaged_gradients", {}) if self.optimizer.overflow else ():
                self.optimizer.averaged_gradients[group] = None
            return self.engine.get_global_grad_norm()
        # Stage 0 knows no overflow check.
        norm = clip_gradients(self.parameters, self.clip)
        skip_unless_finite(self.optimizer, norm)
        self.engine.step()
        return norm

    def set_training(self, is_training: bool) -> None:
        self.engine.module.train(is_training)

    def owned(self) -> list[Fragment]:
        return shared_out(self.held(), self.world.rank, self.world.size) if self._plain() else self.held()

    def held(self) -> list[Fragment]:
        self._create_moments()
        if self._plain():
            return whole({name: {"parameter": p, **self._moments(p)} for name, p in self.parameters.items()})
        masters, fragments = self._flat_masters(), []
        for name, parameter in self.parameters.items():
            if hasattr(parameter, "ds_id"):  # stage 3: every rank has an equal part, the last of them padded
                group, offset, size = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
                start = self.world.rank * size
                length = min(size, parameter.ds_numel - start)
            elif mapping := parameter._hp_mapping:
                group, offset = mapping.param_group_index, mapping.hp_fragment_address.start
                start, length = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
            else:
                continue
            if length > 0:
                flat = {"parameter": masters[group].detach(), **self._moments(masters[group])}
                tensors = {kind: tensor.view(-1)[offset : offset + length] for kind, tensor in flat.items()}
                fragments.append(Fragment(name, start, tensors))
        return fragments

    def updates(self) -> int:
        self._create_moments()
        return int(next(iter(self._inner().state.values()))["step"])

    def restored(self, updates: int) -> None:
        for state in self._inner().state.values():
            state["step"].fill_(float(updates))
        self._refresh_compute_copies()

    def _moments(self, master: Tensor) -> dict[str, Tensor]:
        return {key: self._inner().state[master][key] for key in MOMENTS}

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
            # The small parameters that stay gathered between steps would keep their old values.
            self.optimizer._partition_all_parameters()
            for index in range(len(self.optimizer.fp32_partitioned_groups_flat)):
                self.optimizer._reassign_or_swap_out_partitioned_parameters(index)
