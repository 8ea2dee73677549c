"""Requests in, texts and pictures out, with the model and the tokenizers of a run."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np

from mmtrain.flops import forward_flops
from mmtrain.generate.guidance import SamplingSettings, check
from mmtrain.generate.sampling import Prompt, Sampled, sample
from mmtrain.generate.scoring import score
from mmtrain.generate.tasks import DRAWING_TASKS, Part, Request, Task, TaskBuilder
from mmtrain.models import Decoder
from mmtrain.tokens import ImageTokenizer, TextTokenizer, Vocabulary

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Sample:
    """Sample `number` of request `prompt`: texts, and (S, S, 3) uint8 pictures, in reading order.

    key: of its random stream; num_tokens, log_probability (nats): of what the model wrote, conditional stream, plain
    softmax over the ids that the grammar allows; scores: of all candidates among which it was the best, in the order
    they were drawn (empty where there was one only).
    """

    prompt: int
    number: int
    parts: tuple[Part, ...]
    key: tuple[int | str, ...]
    num_tokens: int
    log_probability: float
    scores: tuple[float, ...] = ()
    num_retrieved: int = 0

    @property
    def text(self) -> str:
        """Its texts, a blank line between."""
        return "\n\n".join(part for part in self.parts if isinstance(part, str))

    @property
    def pixels(self) -> np.ndarray:
        """(S, S, 3) uint8: its only picture."""
        (picture,) = (part for part in self.parts if not isinstance(part, str))
        return picture


@dataclass
class Sampler:
    """A model with its tokenizers; order: of caption and picture in its training.

    progress(done, total) is called after each batch. stream(text) gets the pieces of a text as they are written,
    where a batch is one sample. lengths: of all sequences that went through the model so far, for the ledger.
    """

    model: Decoder
    vocabulary: Vocabulary
    text: TextTokenizer
    image: ImageTokenizer
    batch_size: int = 64
    order: str = "text_first"
    progress: Progress | None = None
    stream: Callable[[str], None] | None = None
    lengths: list[int] = field(default_factory=list)

    @property
    def flops(self) -> int:
        """Of all sampling so far."""
        return forward_flops(self.model.config, self.vocabulary.size, self.lengths)

    def images(
        self,
        captions: Sequence[str],
        settings: SamplingSettings,
        seed: int,
        num_samples: int = 1,
        retrieved: Sequence[list[np.ndarray]] | None = None,
    ) -> list[Sample]:
        """`num_samples` pictures per caption; retrieved: token ids of the documents to place before each."""
        documents = retrieved or [[] for _ in captions]
        requests = [
            Request(caption, retrieved=found, seed=seed, name=f"prompt {i}")
            for i, (caption, found) in enumerate(zip(captions, documents, strict=True), 1)
        ]
        return list(self.draw(self.tasks("image", requests, settings), settings, num_samples))

    def captions(
        self,
        pictures: np.ndarray,
        settings: SamplingSettings,
        seed: int,
        num_samples: int = 1,
        max_tokens: int = 64,
        retrieved: Sequence[list[np.ndarray]] | None = None,
    ) -> list[Sample]:
        """`num_samples` captions per picture; pictures: (N, S, S, 3) uint8."""
        documents = retrieved or [[] for _ in pictures]
        requests = [
            Request(picture=picture, retrieved=found, seed=seed, name=f"picture {i}")
            for i, (picture, found) in enumerate(zip(pictures, documents, strict=True), 1)
        ]
        tasks = self.tasks("caption", requests, settings, max_text_tokens=max_tokens)
        return list(self.draw(tasks, settings, num_samples))

    def tasks(
        self,
        kind: str,
        requests: Sequence[Request],
        settings: SamplingSettings,
        max_text_tokens: int = 64,
        max_tokens: int = 0,
        region: Sequence[int] = (),
    ) -> list[Task]:
        """The requests as tasks for `draw`; the limits and the region are those of `TaskBuilder`.

        Raises UserError for a request that cannot be sampled.
        """
        num_streams = 1
        if kind in DRAWING_TASKS and settings.is_guided:
            num_streams = 3 if settings.retrieval_guidance else 2
        builder = replace(
            self._builder(),
            max_text_tokens=max_text_tokens,
            max_tokens=max_tokens,
            region=region,
            num_streams=num_streams,
        )
        return [builder.build(kind, self._encoded(request)) for request in requests]

    def draw(
        self,
        tasks: Sequence[Task],
        settings: SamplingSettings,
        num_samples: int = 1,
        best_of: int = 1,
        scorer: str = "likelihood",
    ) -> Iterator[Sample]:
        """`num_samples` samples of each task, in order as they come, each the best of `best_of` candidates.

        scorer: caption = log probability of the request's text given the picture that was drawn; likelihood = mean
        log probability of what was written. A sample depends on its task, the request's seed and its number alone; the
        n-th of several equal tasks has a random stream of its own. Raises UserError before anything is drawn.
        """
        if tasks and tasks[0].kind not in DRAWING_TASKS:
            settings = replace(settings, guidance=1.0, retrieval_guidance=0.0, contrastive_k=0)
        check(settings)
        if scorer == "caption" and best_of > 1:  # what cannot be judged is refused before anything is drawn
            for task in tasks:
                self._builder().judge(task.request, np.zeros(self.image.tokens_per_image, np.int64))
        seeds = self._seeds(tasks)
        rows = list(product(range(len(tasks)), range(num_samples), range(best_of)))
        keys = [(*seeds[i], number, turn) for i, number, turn in rows]
        return self._draw(tasks, rows, keys, settings, best_of, scorer)

    def _draw(
        self,
        tasks: Sequence[Task],
        rows: Sequence[tuple[int, int, int]],
        keys: Sequence[tuple[int | str, ...]],
        settings: SamplingSettings,
        best_of: int,
        scorer: str,
    ) -> Iterator[Sample]:
        """rows: task, number and turn of each candidate; keys: of their random streams."""
        candidates: list[Sample] = []
        for start in range(0, len(rows), self.batch_size):
            batch = slice(start, start + self.batch_size)
            chosen = [tasks[i] for i, _, _ in rows[batch]]
            sampled = self._sample(chosen, keys[batch], settings)
            scores = self._scores(chosen, sampled, scorer) if best_of > 1 else [0.0] * len(chosen)
            written = zip(rows[batch], keys[batch], chosen, sampled, self._parts(chosen, sampled), scores, strict=True)
            for (i, number, turn), key, task, new, parts, value in written:
                likelihood, length = float(new.log_probability.sum()), len(new.tokens)
                candidates.append(Sample(i, number, parts, key, length, likelihood, (value,), task.num_retrieved))
                if turn + 1 == best_of:
                    yield _best(candidates)
                    candidates = []
            if self.progress:
                self.progress(start + len(chosen), len(rows))

    def _encoded(self, request: Request) -> Request:
        """One by one: in a batch convolutions round otherwise, and a code could depend on the other pictures."""
        if request.picture is None:
            return request
        return replace(request, codes=self.image.encode(request.picture[None])[0])

    def _builder(self) -> TaskBuilder:
        return TaskBuilder(self.vocabulary, self.text, self.image, self.model.max_positions, self.order)

    def _sample(
        self, tasks: Sequence[Task], keys: Sequence[tuple[int | str, ...]], settings: SamplingSettings
    ) -> list[Sampled]:
        prompts = [Prompt(t.streams, t.grammar, key, t.cells) for t, key in zip(tasks, keys, strict=True)]
        stream = self.stream if len(tasks) == 1 else None
        sampled = sample(self.model, prompts, settings, None if stream is None else _Writer(self, stream).on_token)
        for task, new in zip(tasks, sampled, strict=True):
            self.lengths += [len(ids) + len(new.tokens) for ids in task.streams]
        return sampled

    def _parts(self, tasks: Sequence[Task], sampled: Sequence[Sampled]) -> list[tuple[Part, ...]]:
        """What was written; pictures as pixels, of which those outside a region are the request's."""

        def picture(task: Task, codes: np.ndarray) -> np.ndarray:
            pixels = self.image.decode(codes[None])[0]  # one by one, as they are encoded
            if task.region is None or task.request.picture is None:
                return pixels
            return task.region.paste(pixels, task.request.picture)

        return [
            tuple(part if isinstance(part, str) else picture(task, part) for part in task.read(new.tokens))
            for task, new in zip(tasks, sampled, strict=True)
        ]

    def _scores(self, tasks: Sequence[Task], sampled: Sequence[Sampled], scorer: str) -> list[float]:
        if scorer == "likelihood":
            return [float(new.log_probability.mean()) for new in sampled]
        prompts, captions = [], []
        for task, new in zip(tasks, sampled, strict=True):
            (codes,) = task.read(new.tokens)
            assert not isinstance(codes, str)
            judge, caption = self._builder().judge(task.request, codes)
            prompts.append(Prompt(judge.streams, judge.grammar, (), judge.cells))
            captions.append(caption)
            self.lengths.append(len(judge.streams[0]) + len(caption))
        return [float(values.sum()) for values in score(self.model, prompts, captions)]

    def _seeds(self, tasks: Sequence[Task]) -> list[tuple[int | str, ...]]:
        """(seed, kind, digest of the prompt, how many equal ones came before) of each task."""
        seen: Counter[tuple[int | str, ...]] = Counter()
        seeds: list[tuple[int | str, ...]] = []
        for task in tasks:
            digest = hashlib.sha256(task.streams[-1].astype("<i8").tobytes()).hexdigest()[:12]
            key = (task.request.seed, task.kind, digest)
            seeds.append((*key, seen[key]))
            seen[key] += 1
        return seeds


class _Writer:
    """Hands on the text of one sample as its ids come."""

    def __init__(self, sampler: Sampler, write: Callable[[str], None]) -> None:
        self._sampler, self._write = sampler, write
        self._ids: list[int] = []
        self._shown = ""

    def on_token(self, step: int, ids: np.ndarray) -> None:
        """step: number of the new token; ids: (1,) its id."""
        v = self._sampler.vocabulary
        if ids[0] == v.brk:
            self._write("\n")
            self._ids, self._shown = [], ""
        if v.text_start <= ids[0] < v.text_end:
            self._ids.append(int(ids[0]) - v.text_start)
            text = self._sampler.text.decode(self._ids)
            # A character of several bytes is not whole yet; so it stays back until it is.
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                self._write(text[len(self._shown) :])
                self._shown = text


def _best(candidates: list[Sample]) -> Sample:
    """The candidate with the largest score, with the scores of all."""
    if len(candidates) == 1:
        return replace(candidates[0], scores=())
    scores = tuple(candidate.scores[0] for candidate in candidates)
    return replace(candidates[int(np.argmax(scores))], scores=scores)
