"""AdamW, and Muon with its work shared among the ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmtrain.config import Config
from mmtrain.train.distributed import World

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, by parameter
MUON_MOMENTS = ("momentum_buffer",)


def parameter_groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay, vectors without."""
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def adamw(parameters: list[nn.Parameter], config: Config) -> torch.optim.AdamW:
    """AdamW with this run's settings; the loop sets the learning rate before each step.

    Fused: one pass over memory, on a GPU and on a CPU, where the other one makes temporary copies of all masters.
    """
    o = config.optim
    groups = parameter_groups(parameters, o.weight_decay)
    return torch.optim.AdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, fused=True)


class SharedMuon(torch.optim.Muon):
    """torch's Muon with its work shared: each rank updates its part of the matrices and sends them to all others.

    The updates are scaled to the size of AdamW's (Liu et al. 2025, arXiv 2502.16982, sec. 2.2), so that one learning
    rate and one weight decay serve both. Only its owner keeps a matrix's momentum.
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

    def owners(self) -> list[tuple[nn.Parameter, int]]:
        """The rank that updates each matrix and has its momentum."""
        return [(matrix, owner) for owner, part in enumerate(self.parts) for matrix in part]

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
    matrices = {n: p for n, p in named.items() if "blocks." in n and n.endswith(".weight") and p.ndim == 2}
    others = [p for name, p in named.items() if name not in matrices]
    return [adamw(others, config), SharedMuon(list(matrices.values()), config, world)]


def clip_gradients(parameters: dict[str, Tensor], clip: float) -> Tensor:
    """Scale the gradients down to the norm `clip` (0: never); returns their norm before."""
    return nn.utils.clip_grad_norm_(parameters.values(), clip if clip > 0 else float("inf"))


def skip_unless_finite(optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
    """Make the next step of `optimizer` change nothing if the gradient norm is not finite.

    A fused optimizer is told by a flag on the device, as torch's GradScaler does, so that nobody waits for it. From
    others the gradients are taken away, without which torch leaves a parameter alone.
    """
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = (~torch.isfinite(norm)).float()
    elif not torch.isfinite(norm):
        optimizer.zero_grad(set_to_none=True)
