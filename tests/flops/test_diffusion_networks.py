"""Exact counts of published diffusion networks through diffusers, pinned: torch's meta device, no weights."""

import pytest

from mmtrain.config import UserError
from mmtrain.flops.diffusion_networks import NETWORKS, T5_XXL, count_network, count_vae
from mmtrain.flops.registry import load_registry

pytest.importorskip("diffusers")

# name, pixels: parameters, forward FLOPs, FLOPs of attention (torch 2.13, diffusers 0.42)
FAST = {
    ("sd15", 512): (859_520_964, 803_273_441_280, 126_052_270_080),
    ("dit_xl2", 256): (749_826_464, 237_333_676_032, 8_455_716_864),
    ("pixart_alpha", 256): (610_856_096, 298_109_140_992, 12_419_334_144),
    ("sd3_medium", 1024): (2_028_328_000, 8_437_355_053_056, 2_663_424_000_000),
    ("sana_1600m", 1024): (1_604_462_752, 2_966_661_160_960, 61_105_766_400),
}
SLOW = {
    ("sd15", 256): (859_520_964, 180_106_444_800, 8_545_320_960),
    ("sd21", 512): (865_910_724, 804_257_464_320, 126_052_270_080),
    ("sd21", 768): (865_910_724, 2_149_105_745_920, 628_133_806_080),
    ("ldm_t2i", 256): (872_300_484, 182_074_490_880, 8_545_320_960),
    ("sdxl", 512): (2_567_463_684, 1_588_778_762_240, 55_050_240_000),
    ("sdxl", 1024): (2_567_463_684, 6_761_236_398_080, 783_915_417_600),
    ("dit_s2", 256): (39_805_088, 12_117_245_952, 1_207_959_552),
    ("dit_b2", 256): (147_439_904, 46_029_078_528, 2_415_919_104),
    ("dit_l2", 256): (511_609_888, 161_458_159_616, 6_442_450_944),
    ("dit_xl2", 512): (749_826_464, 1_049_167_429_632, 135_291_469_824),
    ("pixart_alpha", 1024): (610_856_096, 6_509_522_092_032, 2_228_081_393_664),
    ("pixart_sigma", 256): (610_856_096, 332_985_434_112, 18_364_760_064),
    ("sd3_8b", 1024): (8_056_617_792, 29_596_766_900_224, 6_677_056_000_000),
    ("sana_600m", 512): (591_747_872, 315_621_015_552, 10_999_037_952),
    ("flux_dev", 1024): (11_901_408_320, 74_384_653_418_496, 14_872_398_004_224),
}
CASES = [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]


@pytest.mark.parametrize(("name", "pixels"), CASES)
def test_network_is_counted_to_the_last_flop(name, pixels, monkeypatch):
    monkeypatch.setattr("mmtrain.flops.diffusion_networks.count_vae", lambda *_: (0, 0, 0))  # has its own test
    counted = count_network(name, pixels)
    assert (counted.parameters, counted.forward, counted.attention) == (FAST | SLOW)[name, pixels]


def test_vae_is_counted_to_the_last_flop():
    assert count_vae(512) == (1_116_658_466_816, 2_514_518_933_504, 83_653_863)


def test_registry_has_what_is_counted_here():
    registry = {baseline.id: baseline.quantities for baseline in load_registry()}
    forward = registry["sd-1.5"]["compute.unet_forward_512"].number
    assert forward == pytest.approx(FAST["sd15", 512][1], rel=1e-4)
    assert registry["sd-1.5"]["params.unet"].value == FAST["sd15", 512][0]
    assert registry["dit-xl2-512"]["compute.forward"].number == pytest.approx(SLOW["dit_xl2", 512][1], rel=1e-3)
    # the paper prints multiply-adds as Gflops
    printed = registry["dit-xl2-512"]["compute.forward_published"].number
    assert 2e9 * printed == pytest.approx(SLOW["dit_xl2", 512][1], rel=1e-3)


def test_closed_form_of_t5_is_what_transformers_executes():
    transformers = pytest.importorskip("transformers")
    import torch

    from mmtrain.flops.diffusion_networks import forward_flops_of

    config = transformers.T5Config(d_model=4096, d_kv=64, d_ff=10240, num_layers=2, num_heads=64, is_gated_act=True,
                                   feed_forward_proj="gated-gelu", vocab_size=100)  # fmt: skip
    with torch.device("meta"):
        encoder = transformers.T5EncoderModel(config)
        tokens = torch.zeros(1, 120, dtype=torch.long)
    flops, _ = forward_flops_of(encoder, tokens)
    assert flops * 12 == T5_XXL.forward_flops(120)


def test_unknown_networks_and_sizes_are_refused():
    assert "sdxl" in NETWORKS
    with pytest.raises(UserError, match="sd15"):
        count_network("sd9", 512)
    with pytest.raises(UserError, match="multiple of 16"):
        count_network("sd15", 500)
