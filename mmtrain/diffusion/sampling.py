"""Latents from noise, by diffusers' samplers with classifier-free guidance (Ho & Salimans 2022)."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from mmtrain.config import DiffusionConfig
from mmtrain.config.randomness import random_stream
from mmtrain.diffusion.count import Work
from mmtrain.diffusion.network import DiffusionTransformer
from mmtrain.diffusion.pictures import pad_captions


@torch.inference_mode()
def sample_latents(
    model: DiffusionTransformer,
    captions: Sequence[np.ndarray],
    keys: Sequence[tuple[int | str, ...]],
    guidance: float,
    config: DiffusionConfig,
    advance: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, Work]:
    """(N, C, G, G) float32, normalized latents of N captions (0-based text ids), and the work that they took.

    keys: of the random stream that each starts from, so that a sample is the same alone and in a batch up to rounding.
    guidance: weight w in v_null + w (v_caption - v_null); 1 computes the captions alone, 0 the null caption alone.
    """
    device = next(model.parameters()).device
    null = np.array([model.null_caption])
    branches = [captions] if guidance == 1 else [[null] * len(captions), captions]
    if guidance == 0:
        branches = [[null] * len(captions)]
    ids_RT, length_R = pad_captions([ids for branch in branches for ids in branch])
    caption, length = torch.from_numpy(ids_RT).to(device), torch.from_numpy(length_R).to(device)
    noise = np.stack([random_stream("sampling", *key).standard_normal(model.latent, np.float32) for key in keys])
    x = torch.from_numpy(noise).to(device)
    scheduler = new_scheduler(config)
    scheduler.set_timesteps(config.sampling_steps, device=device)
    work = Work()
    for number, timestep in enumerate(scheduler.timesteps, 1):
        times = timestep.float().expand(len(ids_RT))
        predicted = model.predict(x.repeat(len(branches), 1, 1, 1), times, caption, length).float()
        if len(branches) == 2:
            without, given = predicted.chunk(2)
            predicted = without + guidance * (given - without)
        x = scheduler.step(predicted, timestep, x, return_dict=False)[0]
        work += Work.of(length_R)
        if advance:
            advance(number)
    return x.float().cpu().numpy(), work


def new_scheduler(config: DiffusionConfig) -> Any:
    """The sampler that the section names, with the noise schedule of the training."""
    import diffusers  # noqa: PLC0415  (slow to import)

    name = config.sampler
    if name == "auto":
        name = "flow_euler" if config.objective == "rectified_flow" else "dpm_solver"
    if name == "flow_euler":
        return diffusers.FlowMatchEulerDiscreteScheduler(config.num_train_timesteps)
    schedule = {"num_train_timesteps": config.num_train_timesteps, "beta_schedule": config.beta_schedule}
    if name == "ddim":
        return diffusers.DDIMScheduler(**schedule, clip_sample=False, timestep_spacing="trailing")
    return diffusers.DPMSolverMultistepScheduler(**schedule, timestep_spacing="trailing")
