"""Image tokenizer: a square picture to a grid of discrete codes and back.

Shapes: N pictures, S side in pixels, C channels, G = S / downsample side of the code grid, T = G * G codes.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from vector_quantize_pytorch import FSQ, LFQ, VectorQuantize

from mmtrain.config import ImageTokenizerConfig, UserError, write_text_atomic

VERSION = 1
# Pictures per forward pass in encode and decode: bounds memory, large enough to fill the cores.
INFERENCE_BATCH = 128
# Space-to-depth of the first layer: convolutions at full resolution would cost most of the time and see no more.
STEM = 4
BLOCKS = 1
# Each cell of the last grid draws 4x4 pixels with sharp edges: a wide hidden layer there buys more than depth.
HEAD_EXPANSION = 6
PATCH_EXPANSION = 16
FSQ_EPSILON = 1e-3  # that of vector_quantize_pytorch's FSQ.bound


class Residual(nn.Module):
    """x + conv(act(conv(act(x)))); starts as the identity, so it needs no normalization (Fixup, Zhang et al. 2019)."""

    def __init__(self, channels: int, kernel: int = 3) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        self.second = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(cast(Tensor, self.second.bias))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return x_NCHW + self.second(F.silu(self.first(F.silu(x_NCHW))))


def _channels(width: int, factor: int) -> int:
    """Channels where one cell covers `factor` pixels: width, doubled at each halving, at most 4 * width."""
    return min(width * max(factor // 2, 1), 4 * width)


def build_encoder(width: int, downsample: int, latent_dim: int) -> nn.Sequential:
    """(N, 3, S, S) in [-1, 1] to (N, latent_dim, G, G)."""
    factor = min(STEM, downsample)
    channels = _channels(width, factor)
    layers: list[nn.Module] = [nn.PixelUnshuffle(factor), nn.Conv2d(3 * factor**2, channels, 3, padding=1)]
    while True:
        layers += [Residual(channels) for _ in range(BLOCKS)]
        if factor == downsample:
            break
        factor *= 2
        wider = _channels(width, factor)
        layers.append(nn.Conv2d(channels, wider, 4, stride=2, padding=1))
        channels = wider
    layers += [nn.SiLU(), nn.Conv2d(channels, latent_dim, 1)]
    return nn.Sequential(*layers)


def build_patch_encoder(width: int, downsample: int, latent_dim: int) -> nn.Sequential:
    """As `build_encoder`, but every code sees its own patch of downsample x downsample pixels and nothing else.

    What a code says then depends on no other patch: flat ground is one code wherever it is, and the sequence of codes
    is far easier to predict (docs/log.md). The decoder still sees all codes around.
    """
    channels = PATCH_EXPANSION * width
    layers: list[nn.Module] = [nn.PixelUnshuffle(downsample), nn.Conv2d(3 * downsample**2, channels, 1)]
    layers += [Residual(channels, kernel=1) for _ in range(2)]
    return nn.Sequential(*layers, nn.SiLU(), nn.Conv2d(channels, latent_dim, 1))


def build_decoder(width: int, downsample: int, latent_dim: int) -> nn.Sequential:
    """(N, latent_dim, G, G) to (N, 3, S, S), about [-1, 1]."""
    factor = downsample
    channels = _channels(width, factor)
    layers: list[nn.Module] = [nn.Conv2d(latent_dim, channels, 3, padding=1)]
    while True:
        layers += [Residual(channels) for _ in range(BLOCKS)]
        if factor <= STEM:
            break
        factor //= 2
        narrower = _channels(width, factor)
        # Sub-pixel convolution (Shi et al. 2016): convolves at the low resolution, a quarter of the cost.
        layers += [nn.Conv2d(channels, 4 * narrower, 3, padding=1), nn.PixelShuffle(2)]
        channels = narrower
    wide = HEAD_EXPANSION * channels
    layers += [nn.SiLU(), nn.Conv2d(channels, wide, 3, padding=1)]
    layers += [nn.SiLU(), nn.Conv2d(wide, 3 * factor**2, 1), nn.PixelShuffle(factor)]
    return nn.Sequential(*layers)


def build_quantizer(config: ImageTokenizerConfig) -> tuple[nn.Module, int, int]:
    """Return the quantizer, its number of codes and its input channels."""
    if config.quantizer == "fsq":
        if not config.levels or min(config.levels) < 3:
            raise UserError(f"image_tokenizer.levels={config.levels}: give at least one level, each 3 or more")
        return FSQ(list(config.levels)), int(np.prod(config.levels)), len(config.levels)
    if config.quantizer == "lfq":
        bits = config.codebook_size.bit_length() - 1
        if 1 << bits != config.codebook_size:
            raise UserError(f"image_tokenizer.codebook_size={config.codebook_size}: lfq needs a power of two")
        # On the sphere and with commitment (Zhao et al. 2024): plain LFQ was seen to diverge after 400 small steps.
        quantizer = LFQ(
            dim=config.latent_dim,
            codebook_size=config.codebook_size,
            spherical=True,
            commitment_loss_weight=0.25,
            entropy_loss_weight=0.02,
        )
        return quantizer, config.codebook_size, config.latent_dim
    if config.quantizer == "vq":
        # Codes on the unit sphere (Yu et al. 2022, ViT-VQGAN) learn faster here than Euclidean ones.
        codebook = VectorQuantize(
            config.latent_dim,
            config.codebook_size,
            use_cosine_sim=True,
            decay=0.9,
            threshold_ema_dead_code=2,
            commitment_weight=0.25,
        )
        return codebook, config.codebook_size, config.latent_dim
    raise UserError(f"image_tokenizer.quantizer={config.quantizer}: choose fsq, vq or lfq")


class ImageTokenizer(nn.Module):
    """Convolutional autoencoder with a quantizer in the middle."""

    def __init__(self, config: ImageTokenizerConfig, image_size: int) -> None:
        """Untrained weights, drawn from torch's global generator."""
        super().__init__()
        if image_size % config.downsample:
            raise UserError(
                f"corpus.image_size={image_size} is not a multiple of image_tokenizer.downsample={config.downsample}"
            )
        self.config = replace(config, path=None)
        self.image_size = image_size
        self.grid = image_size // config.downsample
        self.tokens_per_image = self.grid**2
        self.quantizer, self.num_codes, self.latent_dim = build_quantizer(config)
        build = build_patch_encoder if config.encoder == "patch" else build_encoder
        self.encoder = build(config.width, config.downsample, self.latent_dim)
        self.decoder = build_decoder(config.width, config.downsample, self.latent_dim)
        self.to(memory_format=torch.channels_last)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode, quantize, decode.

        pixels: (N, 3, S, S) float in [-1, 1]. Returns the reconstruction (N, 3, S, S), codes (N, T) int64 and the
        quantizer's auxiliary loss (scalar, 0 for fsq). In eval mode the decoder sees exactly what `decode` shows it.
        """
        latent_NCGG = self.encoder(pixels)
        # Codes are decided in float32: bfloat16 has too few digits to tell neighbouring levels apart.
        with torch.autocast(pixels.device.type, enabled=False):
            quantized_NTC, codes, *rest = self.quantizer(latent_NCGG.float().flatten(2).transpose(1, 2))
        codes = codes.long()
        auxiliary = rest[0].sum() if rest else pixels.new_zeros(())
        if not self.training:
            quantized_NTC = self._embed(codes)
        return self._decode_latent(quantized_NTC), codes, auxiliary

    def _embed(self, codes: Tensor) -> Tensor:
        """codes (N, T) to quantized vectors (N, T, C)."""
        if isinstance(self.quantizer, VectorQuantize):
            return self.quantizer.get_output_from_indices(codes)
        return self.quantizer.indices_to_codes(codes)

    def _decode_latent(self, quantized_NTC: Tensor) -> Tensor:
        grid = quantized_NTC.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return self.decoder(grid.contiguous(memory_format=torch.channels_last))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @torch.no_grad()
    def encode(self, pixels: np.ndarray | Tensor) -> np.ndarray:
        """(N, S, S, 3) uint8 to codes (N, T) int64, row by row; float32, in batches."""
        batches = []
        for latent_NCGG in self._encoded(pixels):
            _, codes, *_ = self.quantizer(latent_NCGG.flatten(2).transpose(1, 2))
            batches.append(codes.long().cpu().numpy())
        return np.concatenate(batches) if batches else np.empty((0, self.tokens_per_image), np.int64)

    @torch.no_grad()
    def latents(self, pixels: np.ndarray | Tensor) -> np.ndarray:
        """(N, S, S, 3) uint8 to (N, C, G, G) float32: what fsq rounds to codes, in the units of the decoder's input.

        Bounded as FSQ bounds it (Mentzer et al. 2023, appendix A), to half a level beyond the outer codes.
        """
        fsq = self._fsq
        half = (fsq._levels[:, None, None] - 1) * (1 + FSQ_EPSILON) / 2
        offset = torch.where(fsq._levels % 2 == 0, 0.5, 0.0)[:, None, None]
        batches = [
            ((torch.tanh(latent + torch.atanh(offset / half)) * half - offset) / self._half_width).cpu().numpy()
            for latent in self._encoded(pixels)
        ]
        shape = (0, self.latent_dim, self.grid, self.grid)
        return np.concatenate(batches) if batches else np.empty(shape, np.float32)

    @torch.no_grad()
    def decode_latents(self, latents: np.ndarray | Tensor, round_to_codes: bool = False) -> np.ndarray:
        """Latents (N, C, G, G), as `latents` gives them, to pictures (N, S, S, 3) uint8; rounded to codes on request."""
        half, levels = self._half_width, self._fsq._levels[:, None, None]
        batches = []
        for latent in torch.as_tensor(np.asarray(latents), dtype=torch.float32).split(INFERENCE_BATCH):
            steps = latent.to(self.device) * half
            steps = (steps.round() if round_to_codes else steps).clamp(-half, levels - 1 - half)
            signal = self.decoder((steps / half).contiguous(memory_format=torch.channels_last))
            batches.append(to_pixels(signal))
        return np.concatenate(batches)

    @property
    def _fsq(self) -> FSQ:
        if not isinstance(self.quantizer, FSQ):
            raise UserError(f"latents need image_tokenizer.quantizer=fsq, this one has {self.config.quantizer}")
        return self.quantizer

    @property
    def _half_width(self) -> Tensor:
        """(C, 1, 1): levels per unit of a code."""
        return (self._fsq._levels // 2)[:, None, None]

    def _encoded(self, pixels: np.ndarray | Tensor) -> Iterator[Tensor]:
        """The encoder's output (n, C, G, G), float32, batch by batch."""
        if pixels.shape[1:] != (self.image_size, self.image_size, 3):
            raise UserError(
                f"the image tokenizer takes pictures of {self.image_size}x{self.image_size} pixels, "
                f"these have shape {tuple(pixels.shape[1:])}; set corpus.image_size={self.image_size}"
            )
        self.eval()
        for start in range(0, len(pixels), INFERENCE_BATCH):
            yield self.encoder(to_signal(pixels[start : start + INFERENCE_BATCH], self.device))

    @torch.no_grad()
    def decode(self, codes: np.ndarray | Tensor) -> np.ndarray:
        """Codes (N, T) to pictures (N, S, S, 3) uint8."""
        codes = torch.as_tensor(np.asarray(codes), dtype=torch.int64)
        if codes.ndim != 2 or codes.shape[1] != self.tokens_per_image:
            raise UserError(f"a picture has {self.tokens_per_image} codes here, not shape {tuple(codes.shape[1:])}")
        if codes.numel() and not (int(codes.min()) >= 0 and int(codes.max()) < self.num_codes):
            raise UserError(
                f"codes {int(codes.min())}..{int(codes.max())} are outside the tokenizer's {self.num_codes}"
            )
        self.eval()
        batches = [
            to_pixels(self._decode_latent(self._embed(batch.to(self.device)))) for batch in codes.split(INFERENCE_BATCH)
        ]
        shape = (0, self.image_size, self.image_size, 3)
        return np.concatenate(batches) if len(codes) else np.empty(shape, np.uint8)

    def _convolution_flops(self, part: str) -> int:
        """FLOPs (multiply-add = 2) of the convolutions of one picture, counted on the meta device."""
        with torch.device("meta"):
            build = build_encoder if part == "encoder" else build_decoder
            network = build(self.config.width, self.config.downsample, self.latent_dim)
            shape = (
                (3, self.image_size, self.image_size) if part == "encoder" else (self.latent_dim, self.grid, self.grid)
            )
            counter = FlopCounterMode(display=False)
            with counter, torch.no_grad():
                network(torch.empty(1, *shape))
        return counter.get_total_flops()

    @cached_property
    def encode_flops_per_image(self) -> int:
        """FLOPs of `encode` for one picture: convolutions, and the distances to all codes for vq."""
        search = 2 * self.tokens_per_image * self.latent_dim * self.num_codes if self.config.quantizer == "vq" else 0
        return self._convolution_flops("encoder") + search

    @cached_property
    def train_flops_per_image(self) -> int:
        """FLOPs of one picture in training: forward and, twice as much, backward."""
        return 3 * (self.encode_flops_per_image + self._convolution_flops("decoder"))

    def _description(self) -> dict:
        return {"version": VERSION, "image_size": self.image_size, "config": asdict(self.config)}

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of picture size, quantizer and weights: equal fingerprints give equal codes."""
        meaning = [VERSION, self.image_size, self.config.quantizer, self.config.levels, self.config.codebook_size]
        digest = hashlib.sha256(json.dumps(meaning).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write model.safetensors and config.json into `folder`; config.json last."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors")
        content = self._description() | {"fingerprint": self.fingerprint}
        write_text_atomic(folder / "config.json", json.dumps(content, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "ImageTokenizer":
        """Read a saved tokenizer, in eval mode on the CPU.

        Raises UserError if a file is missing, damaged, of another version, or not what was written.
        """
        folder = Path(folder)
        try:
            content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if content["version"] != VERSION:
                raise UserError(
                    f"the image tokenizer {folder} has version {content['version']}, this program reads {VERSION}"
                )
            known = {field.name for field in fields(ImageTokenizerConfig)}
            config = ImageTokenizerConfig(**{key: value for key, value in content["config"].items() if key in known})
            tokenizer = cls(config, content["image_size"])
            tokenizer.load_state_dict(load_file(folder / "model.safetensors"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"cannot read the image tokenizer {folder} ({reason}); train it again") from error
        if tokenizer.fingerprint != content.get("fingerprint"):
            raise UserError(f"the weights in {folder} are not those its config.json was written for; train it again")
        return tokenizer.eval()


def to_signal(pixels: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """(N, S, S, 3) uint8 to (N, 3, S, S) float32 in [-1, 1], channels last in memory."""
    return torch.as_tensor(pixels).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pixels(signal: Tensor) -> np.ndarray:
    """(N, 3, S, S) about [-1, 1] to (N, S, S, 3) uint8, clipped."""
    scaled = (signal.float() + 1) * 127.5
    return scaled.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
