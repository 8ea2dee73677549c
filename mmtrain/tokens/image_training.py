"""Train an image tokenizer and measure it on pictures it has not seen."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image as PillowImage
from torch import Tensor

from mmtrain.config import ImageTokenizerConfig, UserError, write_text_atomic
from mmtrain.config.randomness import random_stream
from mmtrain.tokens.image import ImageTokenizer, to_signal
from mmtrain.tokens.precision import has_fast_bf16
from mmtrain.tokens.quality import psnr, ssim

Progress = Callable[[int, dict], None]

WARMUP_FRACTION = 0.05
L2_WEIGHT = 1.0
EDGE_WEIGHT = 0.5
DETAIL_WEIGHT = 16.0
DETAIL_WINDOW, DETAIL_STRIDE = 8, 4  # pixels
AUXILIARY_WEIGHT = 1.0
CLIP = 1.0
REPORT_EVERY = 20
SHOWN_PICTURES = 12
SHOWN_SIDE = 128


def train_image_tokenizer(
    images: np.ndarray,
    held_out: np.ndarray,
    config: ImageTokenizerConfig,
    out: Path,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train on `images`, measure on `held_out`, save into `out`; one seed and one device give one tokenizer.

    images, held_out: (N, S, S, 3) uint8. progress(step, {"loss", "lr", "images_per_second"}) is called now and then.
    Writes model.safetensors, config.json, metrics.json and reconstructions.png; returns the metrics.
    Raises UserError when there is no picture to train on or to measure on.
    """
    images = images[: config.max_images]
    if not len(images) or not len(held_out):
        raise UserError(
            f"the image tokenizer needs pictures to train on and held-out ones; "
            f"{len(images)} and {len(held_out)} given, check the corpus"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started = time.perf_counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(config.seed)
            tokenizer = ImageTokenizer(config, images.shape[1]).to(device)
            _fit(tokenizer, images, config, progress)
    finally:
        torch.set_num_threads(threads)
    seconds = time.perf_counter() - started
    tokenizer.eval()
    metrics = measure(tokenizer, held_out) | {
        "steps": config.steps,
        "seconds": seconds,
        "images": len(images),
        "flops": tokenizer.train_flops_per_image * config.batch_size * config.steps,
    }
    tokenizer.save(out)
    write_text_atomic(Path(out) / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    reconstruction_grid(tokenizer, held_out).save(Path(out) / "reconstructions.png")
    return metrics


def _fit(
    tokenizer: ImageTokenizer, images: np.ndarray, config: ImageTokenizerConfig, progress: Progress | None
) -> None:
    """The training loop: AdamW, one-cycle learning rate, bfloat16 convolutions where they are faster (twice)."""
    device = tokenizer.device
    is_bf16 = has_fast_bf16(device)
    optimizer = torch.optim.AdamW(
        tokenizer.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=1e-4, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=config.lr, total_steps=config.steps + 1, pct_start=WARMUP_FRACTION, cycle_momentum=False
    )
    pictures = torch.from_numpy(images)
    tokenizer.train()
    clock = time.perf_counter()
    for step, rows in enumerate(_batches(len(images), config), start=1):
        target = to_signal(pictures[torch.from_numpy(rows)], device)
        with torch.autocast(device.type, torch.bfloat16, is_bf16):
            reconstruction, _, auxiliary = tokenizer(target)
        loss = reconstruction_loss(reconstruction.float(), target) + AUXILIARY_WEIGHT * auxiliary
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        if progress and (step % REPORT_EVERY == 0 or step == config.steps):
            pace = step * config.batch_size / (time.perf_counter() - clock)
            progress(step, {"loss": loss.item(), "lr": schedule.get_last_lr()[0], "images_per_second": pace})


def _batches(num_images: int, config: ImageTokenizerConfig) -> Iterator[np.ndarray]:
    """`config.steps` arrays of `config.batch_size` indices: each epoch in another seeded order, none left out."""
    order = np.empty(0, np.int64)
    epoch = 0
    for _ in range(config.steps):
        while len(order) < config.batch_size:
            shuffled = random_stream(config.seed, "image tokenizer", epoch).permutation(num_images)
            order = np.concatenate([order, shuffled])
            epoch += 1
        yield order[: config.batch_size]
        order = order[config.batch_size :]


def reconstruction_loss(reconstruction: Tensor, target: Tensor) -> Tensor:
    """L1 + squared error + L1 of the horizontal and vertical differences (edges), weighted by local detail.

    Both (N, 3, S, S) float32 in [-1, 1]; returns a scalar.
    """
    weight = detail_weight(target)
    error = reconstruction - target
    rows = (error.diff(dim=2).abs() * weight[:, :, 1:]).mean()
    columns = (error.diff(dim=3).abs() * weight[:, :, :, 1:]).mean()
    pixels = ((error.abs() + L2_WEIGHT * error.square()) * weight).mean()
    return pixels + EDGE_WEIGHT * (rows + columns)


def detail_weight(target: Tensor) -> Tensor:
    """(N, 1, S, S) float32 with mean 1: high where the picture varies, so that flat ground does not set the pace.

    1 + DETAIL_WEIGHT x the standard deviation of the colors in a window around the pixel, on a coarse grid: a
    window at every pixel would cost more than the network. target as above.
    """
    means, squares = (
        F.avg_pool2d(x, DETAIL_WINDOW, DETAIL_STRIDE, padding=DETAIL_STRIDE // 2, count_include_pad=False)
        for x in (target, target.square())
    )
    deviation = (squares - means.square()).clamp_min(0).sum(dim=1, keepdim=True).sqrt()
    weight = 1 + DETAIL_WEIGHT * F.interpolate(deviation, size=target.shape[-2:])
    return weight / weight.mean()


def measure(tokenizer: ImageTokenizer, held_out: np.ndarray) -> dict[str, Any]:
    """Quality on pictures (N, S, S, 3) uint8: mean PSNR (dB) and SSIM, number of codes in use, their perplexity."""
    codes = tokenizer.encode(held_out)
    reconstruction = tokenizer.decode(codes)
    counts = np.bincount(codes.ravel(), minlength=tokenizer.num_codes)
    share = counts[counts > 0] / counts.sum()
    return {
        "psnr": float(psnr(held_out, reconstruction).mean()),
        "ssim": float(ssim(held_out, reconstruction).mean()),
        "codebook_used": int((counts > 0).sum()),
        "codebook_size": tokenizer.num_codes,
        "codebook_perplexity": float(np.exp(-(share * np.log(share)).sum())),
        "held_out": len(held_out),
    }


def reconstruction_grid(tokenizer: ImageTokenizer, pictures: np.ndarray) -> PillowImage.Image:
    """Originals above their reconstructions, spread evenly over `pictures` (N, S, S, 3), enlarged without smoothing."""
    chosen = pictures[np.linspace(0, len(pictures) - 1, min(SHOWN_PICTURES, len(pictures))).astype(int)]
    rows = [np.concatenate(list(row), axis=1) for row in (chosen, tokenizer.decode(tokenizer.encode(chosen)))]
    grid = np.concatenate(rows, axis=0)
    scale = max(1, SHOWN_SIDE // tokenizer.image_size)
    return PillowImage.fromarray(grid.repeat(scale, axis=0).repeat(scale, axis=1))
