"""Captions in, pictures out, with the diffusion baseline of a run: what `Sampler` is for decoders of tokens."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np

from mmtrain.config import DiffusionConfig, UserError
from mmtrain.diffusion import DiffusionTransformer, Work, forward_flops, sample_latents
from mmtrain.generate.guidance import SamplingSettings, check
from mmtrain.generate.pipeline import Progress, Sample
from mmtrain.generate.tasks import Request
from mmtrain.tokens import ImageTokenizer, TextTokenizer


@dataclass
class PictureSampler:
    """The baseline with its tokenizers; mean, std: (C,) of the latents in its training.

    progress(done, total) is called after each batch. work: of all that went through the model so far.
    """

    model: DiffusionTransformer
    text: TextTokenizer
    image: ImageTokenizer
    diffusion: DiffusionConfig
    mean: np.ndarray
    std: np.ndarray
    batch_size: int = 64
    progress: Progress | None = None
    stream: Callable[[str], None] | None = None
    work: Work = field(default_factory=Work)

    @property
    def flops(self) -> int:
        """Of all sampling so far."""
        model, w = self.model, self.work
        return sum(forward_flops(model.config, self.diffusion, model.latent, w.pictures, w.tokens, w.squares))

    def images(
        self,
        captions: Sequence[str],
        settings: SamplingSettings,
        seed: int,
        num_samples: int = 1,
        retrieved: Sequence[list[np.ndarray]] | None = None,
    ) -> list[Sample]:
        """`num_samples` pictures per caption."""
        requests = [Request(caption, seed=seed, name=f"prompt {i}") for i, caption in enumerate(captions, 1)]
        return list(self.draw(self.tasks("image", requests, settings), settings, num_samples))

    def captions(self, pictures: np.ndarray, *_: object, **__: object) -> list[Sample]:
        """Refused, but for no picture at all."""
        self.tasks("caption", [Request(picture=picture) for picture in pictures], SamplingSettings())
        return []

    def tasks(
        self, kind: str, requests: Sequence[Request], settings: SamplingSettings, *_: object, **__: object
    ) -> list[Request]:
        """The requests, checked; raises UserError for what this model cannot do."""
        if requests and kind != "image":
            raise UserError(f"a diffusion model (model.family=dit) draws pictures alone and cannot do task {kind}; use image")
        for request in requests:
            if len(self._ids(request)) > self.model.max_positions:
                raise UserError(
                    f"{request.name} has {len(self._ids(request))} tokens, more than the {self.model.max_positions} that "
                    "the model knows; shorten it"
                )
        return list(requests)

    def draw(
        self,
        tasks: Sequence[Request],
        settings: SamplingSettings,
        num_samples: int = 1,
        best_of: int = 1,
        scorer: str = "likelihood",
    ) -> Iterator[Sample]:
        """`num_samples` samples of each request, in order; of the settings only the guidance counts.

        A sample depends on its caption, the request's seed and its number alone (and rounding).
        """
        check(settings)
        if best_of > 1:
            raise UserError("generate.best_of needs the probability of a sample, which diffusion does not give; set it to 1")
        if settings.contrastive_k or settings.guidance_schedule != "constant":
            raise UserError("a diffusion model is guided by generate.guidance alone; leave out contrastive_k and guidance_schedule")
        return self._draw(tasks, settings.guidance, num_samples)

    def _draw(self, tasks: Sequence[Request], guidance: float, num_samples: int) -> Iterator[Sample]:
        seeds = self._seeds(tasks)
        rows = list(product(range(len(tasks)), range(num_samples)))
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            keys = [(*seeds[i], number) for i, number in batch]
            captions = [self._ids(tasks[i]) for i, _ in batch]
            latents, work = sample_latents(self.model, captions, keys, guidance, self.diffusion)
            self.work += work
            latents = latents * self.std[:, None, None] + self.mean[:, None, None]
            pictures = self.image.decode_latents(latents, self.diffusion.decode == "codes")
            for (i, number), key, pixels in zip(batch, keys, pictures, strict=True):
                yield Sample(i, number, (pixels,), key, self.image.tokens_per_image, 0.0)
            if self.progress:
                self.progress(start + len(batch), len(rows))

    def _ids(self, request: Request) -> np.ndarray:
        return np.asarray(self.text.encode(request.text), dtype=np.int64)

    def _seeds(self, tasks: Sequence[Request]) -> list[tuple[int | str, ...]]:
        """(seed, kind, digest of the caption, how many equal ones came before) of each request."""
        seen: Counter[tuple[int | str, ...]] = Counter()
        seeds: list[tuple[int | str, ...]] = []
        for task in tasks:
            key = (task.seed, "image", hashlib.sha256(task.text.encode()).hexdigest()[:12])
            seeds.append((*key, seen[key]))
            seen[key] += 1
        return seeds
