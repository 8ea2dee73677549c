"""engine.dtype=auto: bf16 where it is worth it."""

from mmtrain.config import Config
from mmtrain.tokens import has_fast_bf16
from mmtrain.train.distributed import World


def choose_dtype(config: Config, world: World, before: str | None = None) -> str:
    """bf16 or fp32 for a run whose configuration says auto; all ranks must call.

    before: of the checkpoint that the run goes on from, which stays. Otherwise bf16 where the other settings need it
    or the devices of all ranks have it; never at ZeRO stage 0, which would accumulate gradients in it.
    """
    e = config.engine
    if before:
        return before
    if e.kind == "deepspeed" and e.stage == 0:
        return "fp32"
    if config.model.attention == "varlen" or e.reduce_dtype == "bf16":
        return "bf16"
    return "bf16" if all(world.gather(has_fast_bf16(world.device))) else "fp32"
