"""The diffusion baseline, as the loop sees it (`train.learner`)."""

from dataclasses import astuple, fields

import numpy as np
import torch
from torch import Tensor

from mmtrain.config import Config, UserError
from mmtrain.diffusion import (
    DiffusionTransformer,
    Pictures,
    Work,
    build_diffusion,
    count_parameters,
    draw_noise,
    forward_flops,
    pad_captions,
    recomputed_flops,
)
from mmtrain.flops import BACKWARD_AND_FORWARD, StepFlops
from mmtrain.models import num_positions
from mmtrain.stream import Batch, BatchCounts
from mmtrain.tokens import Vocabulary
from mmtrain.train.run import Artifacts

AROUND_CAPTION = 3  # <eos>, <break>, <eos>


class PictureLearner:
    """Denoising of the pictures whose documents the stream delivers; sums: those of `diffusion.Work`."""

    num_sums = len(fields(Work))

    def __init__(self, config: Config, artifacts: Artifacts, vocabulary: Vocabulary, device: torch.device) -> None:
        self.config, self.device = config, device
        self.sources = list(artifacts.tokens)
        self.pictures = {
            split: [Pictures(artifacts.pictures[name], split) for name in self.sources]
            for split in ("train", "validation")
        }
        main = self.pictures["train"][0]
        self.mean, self.std = main.mean, main.std
        self.latent: tuple[int, int, int] = main.latents.shape[1:]
        cells, length = self.latent[1] ** 2, config.stream.sequence_length
        longest = max(p.longest_caption for of_split in self.pictures.values() for p in of_split)
        if longest + cells + AROUND_CAPTION > length:
            raise UserError(
                f"a caption of {longest} tokens and a picture of {cells} do not fit stream.sequence_length={length}, and "
                f"model.family=dit learns whole documents; set it to {longest + cells + AROUND_CAPTION} or more"
            )
        self._shape = (config.model, config.diffusion, vocabulary.text_size, num_positions(config) - cells, self.latent)

    @property
    def num_parameters(self) -> int:
        return count_parameters(*self._shape)

    def new_model(self) -> DiffusionTransformer:
        return build_diffusion(*self._shape)

    def inputs(self, batch: Batch, counts: BatchCounts, split: str) -> tuple[dict[str, Tensor], np.ndarray]:
        origin_BS3 = batch["origin"].numpy()
        origin_N3 = origin_BS3[origin_BS3[..., 0] >= 0]
        source_N, _, index_N = origin_N3.T
        latents_NCGG = np.empty((len(origin_N3), *self.latent), np.float32)
        captions: list[np.ndarray] = [np.empty(0, np.int64)] * len(origin_N3)
        for number, pictures in enumerate(self.pictures[split]):
            (chosen,) = np.nonzero(source_N == number)
            latents_NCGG[chosen] = pictures.normalized(index_N[chosen], self.mean, self.std)
            for place, caption in zip(chosen, pictures.captions_of(index_N[chosen]), strict=True):
                captions[place] = caption
        keys = [(self.config.seed, split, self.sources[s], e, i) for s, e, i in origin_N3.tolist()]
        draw = draw_noise(keys, self.latent, self.config.diffusion)
        if split == "train":
            null = np.array([self._shape[2]])
            captions = [null if dropped else c for dropped, c in zip(draw.is_dropped, captions, strict=True)]
        caption_NT, length_N = pad_captions(captions)
        arrays = {
            "latents": latents_NCGG,
            "noise": draw.noise,
            "level": draw.level,
            "caption": caption_NT,
            "length": length_N,
            "loss_weight": np.full(len(origin_N3), self.latent[1] ** 2, np.float32),
        }
        tensors = {name: torch.from_numpy(array).to(self.device, non_blocking=True) for name, array in arrays.items()}
        return tensors, np.array(astuple(Work.of(length_N)), np.int64)

    def flops(self, sums: np.ndarray, tokens: dict[str, int], rows: int) -> tuple[StepFlops, dict[str, int]]:
        """The shares are exact: what is computed at latent cells is the pictures', at caption tokens the text's."""
        work, shape = Work(*sums.tolist()), (self.config.model, self.config.diffusion, self.latent)
        of_pictures, of_captions = (
            BACKWARD_AND_FORWARD * part for part in forward_flops(*shape, work.pictures, work.tokens, work.squares)
        )
        padded_work = work.pictures, work.padded_tokens, work.padded_squares
        hardware = BACKWARD_AND_FORWARD * sum(forward_flops(*shape, *padded_work))
        if self.config.model.activation_checkpointing:
            hardware += recomputed_flops(*shape, *padded_work)
        model = of_pictures + of_captions
        return StepFlops(model, model, hardware), {"image": of_pictures, "text": of_captions}

