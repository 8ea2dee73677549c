"""Published throughput tables, from their tokens per second and their own conventions, to the printed digits."""

import pytest

from mmtrain.config import ModelConfig
from mmtrain.flops import step_flops

# mosaicml/llm-foundry scripts/train/benchmarking/README.md@061f2c7: layers, width, parameters, length, peak, tokens/s
# on all GPUs, GPUs, recomputation, MFU, HFU. The peaks are those of that repository.
H100, A100 = 989.5e12, 312e12
MPT = {
    "7b h100": (32, 4096, 6658859008, 2048, H100, 85144, 8, False, 46.44, 46.44),
    "7b h100 4096": (32, 4096, 6667247616, 4096, H100, 68893, 8, True, 40.42, 53.9),
    "1b h100 64": (24, 2048, 1315950592, 2048, H100, 2841754, 64, False, 40.85, 40.85),
    "13b h100": (40, 5120, 12853954560, 2048, H100, 38336, 8, False, 39.79, 39.79),
    "7b a100": (32, 4096, 6658859008, 2048, A100, 37130, 8, False, 64.23, 64.23),
    "7b a100 65536": (32, 4096, 6918905856, 65536, A100, 8108, 8, True, 46.97, 62.63),
    "1b a100": (24, 2048, 1315950592, 2048, A100, 164109, 8, False, 59.86, 59.86),
    "125m a100": (12, 768, 125311488, 2048, A100, 1142641, 8, False, 44.79, 44.79),
}


def attention_per_token(layers: int, width: int, length: int) -> float:
    """Full attention, forward and backward, by our closed form."""
    step = step_flops(ModelConfig(layers=layers, width=width, heads=width // 64), 0, [length], 1, length)
    return 2 * (step.model_palm - step.model_causal) / length


@pytest.mark.parametrize("row", MPT)
def test_llm_foundry_is_reproduced_to_the_printed_digits(row):
    layers, width, parameters, length, peak, tokens, gpus, recomputed, mfu, hfu = MPT[row]
    flops = 6 * parameters + attention_per_token(layers, width, length)
    ours = 100 * flops * tokens / gpus / peak
    assert ours == pytest.approx(mfu, abs=0.0101)
    assert ours * (4 / 3 if recomputed else 1) == pytest.approx(hfu, abs=0.0151)


# Megatron-LM README (MFU and HFU of arXiv:2205.05198): layers, width, MFU, HFU in percent; 2048 tokens, 51,200 ids.
MEGATRON = {
    "22B": (48, 6144, 41.5, 43.7),
    "175B": (96, 12288, 51.4, 52.8),
    "530B": (105, 20480, 56.0, 57.0),
    "1T": (128, 25600, 56.3, 57.0),
}


@pytest.mark.parametrize("size", MEGATRON)
def test_megatron_hfu_follows_from_its_mfu(size):
    layers, width, mfu, hfu = MEGATRON[size]
    model = ModelConfig(layers=layers, width=width, heads=width // 64)
    palm = step_flops(model, 51_200, [2048], 1, 2048).model_palm / 2048
    # The paper's formula, 72BLsh^2 (1 + s/3h + ...) against s/6h, books selective recomputation of the scores as
    # forward and backward, three times what one more forward pass is.
    again = attention_per_token(layers, width, 2048)
    assert mfu * (1 + again / palm) == pytest.approx(hfu, abs=0.11)


# Seconds of a step, sequences in it = GPUs (22B: 8 GPUs): table 5 of the paper from memory, not read again in a source.
MEGATRON_STEPS = {"22B": (1.10, 4, 8), "175B": (13.75, 64, 64), "530B": (37.83, 280, 280), "1T": (71.49, 512, 512)}


@pytest.mark.parametrize("size", MEGATRON_STEPS)
def test_megatron_mfu_follows_from_its_seconds_per_step(size):
    layers, width, mfu, _ = MEGATRON[size]
    seconds, sequences, gpus = MEGATRON_STEPS[size]
    model = ModelConfig(layers=layers, width=width, heads=width // 128)
    flops = step_flops(model, 51_200, [2048] * sequences, sequences, 2048).model_palm
    rounding = mfu * 0.005 / seconds  # of the seconds, as printed
    assert 100 * flops / seconds / gpus / A100 == pytest.approx(mfu, abs=0.051 + rounding)
