import json

import numpy as np
import pytest
import torch
from torch import nn

from mmtrain.config import ImageTokenizerConfig, UserError
from mmtrain.tokens import ImageTokenizer
from mmtrain.tokens.image import to_pixels, to_signal

QUANTIZERS = {
    "fsq": ImageTokenizerConfig(levels=[5, 3], width=4),
    "vq": ImageTokenizerConfig(quantizer="vq", codebook_size=16, latent_dim=4, width=4),
    "lfq": ImageTokenizerConfig(quantizer="lfq", codebook_size=16, latent_dim=6, width=4),
}


def pictures(count=3, size=16):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.fixture(params=QUANTIZERS)
def tokenizer(request):
    torch.manual_seed(0)
    return ImageTokenizer(QUANTIZERS[request.param], 16)


def test_decoding_codes_equals_the_reconstruction_of_forward(tokenizer):
    tokenizer.train()(to_signal(pictures(), torch.device("cpu")))  # vq draws its codebook at its first batch
    tokenizer.eval()
    with torch.no_grad():
        reconstruction, codes, _ = tokenizer(to_signal(pictures(), torch.device("cpu")))
    assert np.array_equal(codes.numpy(), tokenizer.encode(pictures()))
    assert np.array_equal(tokenizer.decode(codes.numpy()), to_pixels(reconstruction))


def test_codes_have_the_promised_shape_and_range(tokenizer):
    codes = tokenizer.encode(pictures())
    assert codes.shape == (3, tokenizer.tokens_per_image) == (3, 4) and codes.dtype == np.int64
    assert codes.min() >= 0 and codes.max() < tokenizer.num_codes
    assert tokenizer.decode(codes).shape == (3, 16, 16, 3)
    assert tokenizer.encode(pictures()[:0]).shape == (0, 4) and tokenizer.decode(codes[:0]).shape == (0, 16, 16, 3)


def test_saved_tokenizer_gives_the_same_codes(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = ImageTokenizer.load(tmp_path)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert np.array_equal(loaded.encode(pictures()), tokenizer.encode(pictures()))
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


def test_codes_do_not_depend_on_the_batch(monkeypatch):
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(QUANTIZERS["fsq"], 16)
    whole = tokenizer.encode(pictures(5))
    monkeypatch.setattr("mmtrain.tokens.image.INFERENCE_BATCH", 2)
    assert np.array_equal(tokenizer.encode(pictures(5)), whole)


def test_exchanged_or_damaged_weights_are_refused(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        torch.manual_seed(seed)
        ImageTokenizer(QUANTIZERS["fsq"], 16).save(tmp_path / name)
    weights = tmp_path / "a" / "model.safetensors"
    weights.write_bytes((tmp_path / "b" / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="not those"):
        ImageTokenizer.load(tmp_path / "a")
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot read"):
        ImageTokenizer.load(tmp_path / "a")
    (tmp_path / "b" / "config.json").write_text(json.dumps({"version": 99}))
    with pytest.raises(UserError, match="version 99"):
        ImageTokenizer.load(tmp_path / "b")


def test_wrong_sizes_and_codes_are_user_errors():
    tokenizer = ImageTokenizer(QUANTIZERS["fsq"], 16)
    with pytest.raises(UserError, match="16x16"):
        tokenizer.encode(pictures(size=24))
    with pytest.raises(UserError, match="outside"):
        tokenizer.decode(np.full((1, 4), 15))
    with pytest.raises(UserError, match="not a multiple"):
        ImageTokenizer(QUANTIZERS["fsq"], 20)
    with pytest.raises(UserError, match="power of two"):
        ImageTokenizer(ImageTokenizerConfig(quantizer="lfq", codebook_size=1000), 16)
    with pytest.raises(UserError, match="levels"):
        ImageTokenizer(ImageTokenizerConfig(levels=[2, 2]), 16)


@pytest.mark.parametrize("downsample", [2, 4, 8, 16])
def test_flops_equal_the_sum_over_convolutions(downsample):
    tokenizer = ImageTokenizer(ImageTokenizerConfig(width=4, downsample=downsample, levels=[5, 5]), 32)
    total = 0

    def count(module, inputs, output):
        nonlocal total
        total += 2 * module.weight.numel() * output.shape[2] * output.shape[3]

    for module in tokenizer.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    tokenizer.encode(pictures(1, 32))
    assert tokenizer.encode_flops_per_image == total
    total = 0
    tokenizer.eval()(to_signal(pictures(1, 32), torch.device("cpu")))
    assert tokenizer.train_flops_per_image == 3 * total


@pytest.mark.parametrize(("encoder", "stays_local"), [("patch", True), ("conv", False)])
def test_a_code_of_the_patch_encoder_sees_its_own_patch_alone(encoder, stays_local):
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(ImageTokenizerConfig(width=4, levels=[8, 8, 8, 8], encoder=encoder), 32)
    for parameter in tokenizer.parameters():  # its residual branches start at zero
        nn.init.normal_(parameter, std=0.3)
    before = pictures(4, 32)
    after = before.copy()
    after[:, :8, :8] = 255 - after[:, :8, :8]
    changed = (tokenizer.encode(before) != tokenizer.encode(after)).any(axis=0)
    assert changed[0] and bool(changed[1:].any()) != stays_local
