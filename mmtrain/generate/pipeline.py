"""From captions to pictures and back, with the tokenizers and prompts of a run."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mmtrain.config import UserError
from mmtrain.generate.sampling import SamplingSettings, sample_tokens
from mmtrain.models import Decoder
from mmtrain.objective.assemble import fit_retrieved
from mmtrain.objective.cells import picture_cells
from mmtrain.objective.prompts import caption_prompt, text_to_image_prompt, unconditional_image_prompt
from mmtrain.tokens import ImageTokenizer, TextTokenizer, Vocabulary

SPECIAL_TOKENS = 5  # at most: <eos> <sentinel> <break> before the picture, <eos> <sentinel> after it
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Drawn:
    """A picture, (S, S, 3) uint8: sample `number` of prompt `prompt`."""

    prompt: int
    number: int
    pixels: np.ndarray


@dataclass(frozen=True)
class Written:
    """A caption: sample `number` of picture `prompt`."""

    prompt: int
    number: int
    text: str


@dataclass
class Sampler:
    """A model with its tokenizers; `progress(done, total)` is called after each batch."""

    model: Decoder
    vocabulary: Vocabulary
    text: TextTokenizer
    image: ImageTokenizer
    batch_size: int = 64
    progress: Progress | None = None

    def images(
        self,
        captions: Sequence[str],
        settings: SamplingSettings,
        seed: int,
        num_samples: int = 1,
        retrieved: Sequence[list[np.ndarray]] | None = None,
    ) -> list[Drawn]:
        """`num_samples` pictures per caption; retrieved: token ids of the documents to place before each."""
        v = self.vocabulary
        allowed = np.zeros(v.size, dtype=bool)
        allowed[v.image_start : v.image_end] = True
        prompts, unconditional = [], []
        for index, caption in enumerate(captions):
            if not caption.strip():
                raise UserError(f"prompt {index + 1} is empty; write a caption")
            words = self._text_ids(caption)
            documents = self._fitting(retrieved, index, len(words) + self.image.tokens_per_image)
            prompts.append(text_to_image_prompt(words, documents, v))
            unconditional.append(unconditional_image_prompt(documents, v))
        samples = []
        for keys, rows in self._batches(len(prompts), num_samples):
            batch = [prompts[i] for i in rows], [unconditional[i] for i in rows]
            ids = sample_tokens(
                self.model,
                *batch,
                allowed,
                self.image.tokens_per_image,
                None,
                [(seed, "image", *key) for key in keys],
                settings,
                [picture_cells(row, v) for half in batch for row in half],
                draws_picture=True,
            )
            pixels = self.image.decode(ids - v.image_start)
            samples += [Drawn(*key, pixels=picture) for key, picture in zip(keys, pixels, strict=True)]
        return samples

    def captions(
        self,
        pictures: np.ndarray,
        settings: SamplingSettings,
        seed: int,
        num_samples: int = 1,
        max_tokens: int = 64,
        retrieved: Sequence[list[np.ndarray]] | None = None,
    ) -> list[Written]:
        """`num_samples` captions per picture; pictures: (N, S, S, 3) uint8."""
        v = self.vocabulary
        allowed = np.zeros(v.size, dtype=bool)
        allowed[v.text_start : v.text_end] = True
        allowed[v.eoss] = True
        codes = self.image.encode(pictures) + v.image_start
        needed = self.image.tokens_per_image + max_tokens
        prompts = [caption_prompt(code, self._fitting(retrieved, i, needed), v) for i, code in enumerate(codes)]
        length = min(max_tokens, self.model.max_positions - max(len(prompt) for prompt in prompts))
        samples = []
        for keys, rows in self._batches(len(prompts), num_samples):
            ids = sample_tokens(
                self.model,
                [prompts[i] for i in rows],
                None,
                allowed,
                length,
                v.eoss,
                [(seed, "caption", *key) for key in keys],
                settings,
                [picture_cells(prompts[i], v) for i in rows],
            )
            for key, row in zip(keys, ids, strict=True):
                words = row[: int(np.argmax(row == v.eoss))] if (row == v.eoss).any() else row
                samples.append(Written(*key, text=self.text.decode((words - v.text_start).tolist())))
        return samples

    def _fitting(self, retrieved: Sequence[list[np.ndarray]] | None, index: int, needed: int) -> list[np.ndarray]:
        """The retrieved documents of a prompt that leave room for `needed` tokens and the specials around them."""
        room = self.model.max_positions - needed - SPECIAL_TOKENS
        return fit_retrieved(retrieved[index], room) if retrieved else []

    def _text_ids(self, caption: str) -> np.ndarray:
        return np.asarray(self.text.encode(caption), dtype=np.int64) + self.vocabulary.text_start

    def _batches(self, num_prompts: int, num_samples: int) -> Iterator[tuple[list[tuple[int, int]], list[int]]]:
        """Batches of (prompt, sample number) keys, and the prompt of each."""
        keys = [(prompt, number) for prompt in range(num_prompts) for number in range(num_samples)]
        for start in range(0, len(keys), self.batch_size):
            batch = keys[start : start + self.batch_size]
            yield batch, [prompt for prompt, _ in batch]
            if self.progress:
                self.progress(start + len(batch), len(keys))
