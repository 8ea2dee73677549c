"""FLOPs of a training step of every size in conf/model: closed form, torch's counter, DeepSpeed's profiler.

    OMP_NUM_THREADS=1 python tests/bench/flops.py [--length 4096] [--profile-below 100e6]

One row that is one document; hardware convention: full attention, forward and backward, recomputation included. torch's
FlopCounterMode runs on the meta device, from one layer and two. DeepSpeed's profiler runs one real forward pass of
the smaller models on this machine; its figure is 3 times that. It also counts norms and activations, so it is a little
above 1. Its known gaps: kernels that are no torch product (the flash-attn package, varlen, flex) are invisible to it, a
product whose second operand is broadcast is under-counted, and with ZeRO-3 it sees the parameters of its own rank.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).parents[2]))

from mmtrain.config import ModelConfig
from mmtrain.flops import step_flops
from mmtrain.flops.counter import BATCH_KEYS, count_of_depth
from mmtrain.models import build_model, count_parameters

VOCABULARY, PROFILED_LENGTH = 65_536, 256


def profiled(model: ModelConfig) -> float:
    """Three times the forward FLOPs that DeepSpeed's profiler sees, over those of the closed form."""
    from deepspeed.profiling.flops_profiler import FlopsProfiler

    model = replace(model, loss_chunk=PROFILED_LENGTH, activation_checkpointing=False)
    decoder = build_model(model, VOCABULARY, PROFILED_LENGTH).eval()
    decoder.initialize(0)
    batch = {key: torch.zeros(1, PROFILED_LENGTH, dtype=torch.long) for key in BATCH_KEYS}
    batch["loss_weight"] = torch.ones(1, PROFILED_LENGTH)
    profiler = FlopsProfiler(decoder)
    profiler.start_profile()
    with torch.no_grad():
        decoder(**batch)
    seen = profiler.get_total_flops()
    profiler.end_profile()
    return 3 * seen / step_flops(model, VOCABULARY, [PROFILED_LENGTH], 1, PROFILED_LENGTH).hardware


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--profile-below", type=float, default=100e6, help="parameters")
    given = parser.parse_args()
    print("| size | family | parameters | closed form | counted | difference | DeepSpeed / closed form, length 256 |")
    print("|---|---|---|---|---|---|---|")
    for file in sorted((Path(__file__).parents[2] / "conf" / "model").glob("*.yaml")):
        content = OmegaConf.to_container(OmegaConf.load(file))
        if "defaults" in content or content["family"] == "dit":
            continue
        model = ModelConfig(**content)
        parameters = count_parameters(model, VOCABULARY, given.length)
        closed = step_flops(model, VOCABULARY, [given.length], 1, given.length).hardware
        counted = count_of_depth(model, VOCABULARY, given.length)["all"]
        ratio = f"{profiled(model):.4f}" if parameters < given.profile_below else ""
        difference = f"{100 * (closed / counted - 1):.4f} %"
        cells = (file.stem, model.family, f"{parameters:,}", f"{closed:.6e}", f"{counted:.6e}", difference, ratio)
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
