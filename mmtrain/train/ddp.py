"""Plain torch DistributedDataParallel behind the interface of `Engine`."""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from mmtrain.config import Config
from mmtrain.models import LossSums
from mmtrain.train.distributed import World
from mmtrain.train.fragments import Fragment, shared_out, whole
from mmtrain.train.optimizers import MOMENTS, MUON_MOMENTS, SharedMuon, clip_gradients, optimizers, skip_unless_finite


class DdpEngine:
    """torch DistributedDataParallel: float32 masters, bf16 by autocast; every rank updates all parameters."""

    def __init__(self, model: nn.Module, config: Config, world: World, accumulation: int):
        self.world, self.accumulation, self.clip = world, accumulation, config.optim.clip
        self.autocast = config.engine.dtype == "bf16"
        self.model = nn.parallel.DistributedDataParallel(model) if world.size > 1 else model
        self.optimizers = optimizers(model, config, world)
        self.parameters = dict(model.named_parameters())
        self.micro_step = 0

    def effective(self) -> dict[str, Any]:
        parameter = next(iter(self.parameters.values()))
        return {
            "wrapper": type(self.model).__name__,
            "world": self.world.size,
            "accumulation_steps": self.accumulation,
            "clip": self.clip,
            "parameters": str(parameter.dtype).removeprefix("torch."),
            "products": "bfloat16" if self.autocast else "float32",
            "device": parameter.device.type,
            "updates": [type(o).__name__ + (", fused" if o.defaults.get("fused") else "") for o in self.optimizers],
        }

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
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            skip_unless_finite(optimizer, norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.micro_step = 0
        return norm

    def set_training(self, is_training: bool) -> None:
        self.model.train(is_training)

    def owned(self) -> list[Fragment]:
        muon = {id(p): owner for o in self.optimizers if isinstance(o, SharedMuon) for p, owner in o.owners()}
        everywhere = {name: id(p) for name, p in self.parameters.items()}
        held = self.held()
        shared = shared_out([f for f in held if everywhere[f.name] not in muon], self.world.rank, self.world.size)
        return shared + [f for f in held if muon.get(everywhere[f.name]) == self.world.rank]

    def held(self) -> list[Fragment]:
        states = self._states()
        kinds = {name: {k: t for k, t in state.items() if k != "step"} for name, state in states.items()}
        return whole({name: {"parameter": p, **kinds[name]} for name, p in self.parameters.items()})

    def updates(self) -> int:
        return next(int(state["step"]) for state in self._states().values() if "step" in state)

    def restored(self, updates: int) -> None:
        for state in self._states().values():
            if "step" in state:
                state["step"].fill_(float(updates))

    def _states(self) -> dict[str, dict[str, Tensor]]:
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
