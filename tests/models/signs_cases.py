"""The warning signs of one batch by every engine, for test_signs.py.

torchrun --nproc_per_node 2 signs_cases.py OUT   writes the sums over two ranks and two micro-batches as JSON
"""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from mmtrain.train.distributed import start_world
from mmtrain.train.engine import build_engine
from tests.train.engine_cases import BF16, FP32, batch, configure, new_model


def main(out: Path) -> None:
    world = start_world()
    model = new_model(configure("ddp"))
    model.watch(True)
    model(**batch(0))
    sums: dict[str, Tensor] = {"bare": model.take_signs().sums}
    for name in FP32 | BF16:
        config = configure(name)
        config.model.activation_checkpointing = True
        model = new_model(config)
        engine = build_engine(model, config, world, 2)
        model.watch(True)
        share = {field: tensor[world.rank :: world.size] for field, tensor in batch(0).items()}
        for part in range(2):
            losses = engine.forward({field: tensor.chunk(2)[part] for field, tensor in share.items()})
            engine.backward(losses.total, torch.tensor(100.0))
        engine.step(1e-3)
        sums[name] = world.sum(model.take_signs().sums)
    if world.rank == 0:
        out.write_text(json.dumps({name: values.tolist() for name, values in sums.items()}))
    # Threads of the group that live on while Python ends may abort the process.
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
