"""What can be asked of a model: a prompt of the training layout, a grammar, and a way to read what is written."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from mmtrain.config import UserError
from mmtrain.config.randomness import random_stream
from mmtrain.generate.grammar import Grammar
from mmtrain.generate.regions import Region
from mmtrain.objective import (
    arrange,
    caption_prompt,
    infill_prompt,
    pair,
    picture_cells,
    text_to_image_prompt,
    unconditional_image_prompt,
    unrotate,
)
from mmtrain.objective.assemble import fit_retrieved
from mmtrain.objective.cells import IMAGE
from mmtrain.tokens import ImageTokenizer, TextTokenizer, Vocabulary, tokens_to_segments

MASK = "[MASK]"
DRAWING_TASKS = ("image", "infill_image", "interleaved")
"""Tasks that write image tokens; guidance and CD-K are for them."""
Part = str | np.ndarray


@dataclass(frozen=True)
class Request:
    """One prompt of a user; name: how messages call it.

    text: caption, question or text; picture: (S, S, 3) uint8; codes: (T,) int64 0-based codes of the picture.
    retrieved: ids of the documents to place before it. Those that do not fit are left out, or refused where
    `examples` says that the user chose them.
    """

    text: str = ""
    picture: np.ndarray | None = None
    codes: np.ndarray | None = None
    retrieved: Sequence[np.ndarray] = ()
    examples: bool = False
    seed: int = 0
    name: str = "the prompt"


@dataclass(frozen=True)
class Task:
    """A request as the model sees it.

    streams, cells: (n,) ids of the prompt and their places, the least conditional first. read: new ids to what they
    say: texts, and (T,) codes of whole pictures. reserved: new tokens that retrieved documents must leave room for.
    region: what of the drawn picture is kept, the rest is the request's.
    """

    kind: str
    request: Request
    streams: tuple[np.ndarray, ...]
    cells: tuple[np.ndarray, ...]
    grammar: Grammar
    read: Callable[[np.ndarray], list[Part]]
    reserved: int
    num_retrieved: int = 0
    region: Region | None = None


# Equal grammars are one object, which `sample` then puts on the device once for a whole batch.
@lru_cache(maxsize=64)
def picture_grammar(vocabulary: Vocabulary, num_codes: int) -> Grammar:
    """A whole picture of `num_codes` codes."""
    return Grammar.picture(vocabulary, np.arange(num_codes))


@lru_cache(maxsize=64)
def text_grammar(vocabulary: Vocabulary, max_tokens: int, stop: int) -> Grammar:
    """As `Grammar.text`."""
    return Grammar.text(vocabulary, max_tokens, stop)


@lru_cache(maxsize=64)
def infill_grammar(vocabulary: Vocabulary, spans: tuple[int | tuple[int, int], ...]) -> Grammar:
    """As `Grammar.infill`; spans: for each most tokens of its text, or (first, end) of its cells."""
    return Grammar.infill(vocabulary, [span if isinstance(span, int) else np.arange(*span) for span in spans])


@lru_cache(maxsize=64)
def interleaved_grammar(vocabulary: Vocabulary, num_codes: int, max_tokens: int) -> Grammar:
    """As `Grammar.interleaved`."""
    return Grammar.interleaved(vocabulary, num_codes, max_tokens)


@dataclass(frozen=True)
class TaskBuilder:
    """Requests to tasks, for one model.

    order: of caption and picture in training. region: left, top, right, bottom in pixels, for infill_image.
    num_streams: 1; 2 for guidance and CD-K; 3 to guide by the retrieved documents on their own, too.
    """

    vocabulary: Vocabulary
    text: TextTokenizer
    image: ImageTokenizer
    max_positions: int
    order: str = "text_first"
    max_text_tokens: int = 64
    max_tokens: int = 0
    region: Sequence[int] = ()
    num_streams: int = 1

    def build(self, kind: str, request: Request) -> Task:
        """The task `kind` of a request, with as many of its retrieved documents as fit.

        Raises UserError for an empty prompt, one that is too long, a missing mask, and a region that is none.
        """
        make = {
            "image": self._image,
            "caption": self._caption,
            "question": self._question,
            "infill_text": self._infill_text,
            "infill_image": self._infill_image,
            "interleaved": self._interleaved,
        }[kind]
        if kind not in ("caption", "infill_image") and not request.text.strip():
            raise UserError(f"{request.name} is empty; write a {'question' if kind == 'question' else 'caption'}")
        alone = make(request, [])
        room = self._room(request, alone.streams, alone.reserved) - alone.reserved
        documents = [arrange(ids, self.vocabulary, self._order, random_stream()) for ids in request.retrieved]
        fitting = fit_retrieved(documents, room)
        if request.examples and len(fitting) < len(documents):
            raise UserError(
                f"{request.name}: the examples take {sum(len(ids) + 1 for ids in documents)} tokens, and beside it "
                f"{room} of the model's {self.max_positions} positions are free; give fewer or shorter examples"
            )
        return make(request, fitting) if fitting else alone

    @property
    def _order(self) -> str:
        """A run in random order knows both, and is asked in CM3leon's."""
        return "image_first" if self.order == "image_first" else "text_first"

    @property
    def _stop(self) -> int:
        """What ends a caption that is written after its picture."""
        return self.vocabulary.eos if self._order == "image_first" else self.vocabulary.eoss

    def judge(self, request: Request, codes: np.ndarray) -> tuple[Task, np.ndarray]:
        """The captioning task of a picture (codes: (T,) 0-based), and the ids of the request's caption as its answer.

        Raises UserError when there is no caption, or no room for it.
        """
        v = self.vocabulary
        words = np.append(self._ids(request.text), self._stop)
        if len(words) == 1:
            raise UserError(f"{request.name} has no caption for generate.scorer=caption; use likelihood")
        prompt = caption_prompt(codes + v.image_start, [], v, self._order)
        grammar = text_grammar(v, len(words) - 1, self._stop)
        return self._task("caption", request, [prompt], grammar, []), words

    def _image(self, request: Request, retrieved: list[np.ndarray]) -> Task:
        v, num_codes = self.vocabulary, self.image.tokens_per_image
        full = text_to_image_prompt(self._ids(request.text), retrieved, v, self._order)
        infills = self._order == "image_first"
        grammar = infill_grammar(v, ((0, num_codes),)) if infills else picture_grammar(v, num_codes)
        streams = [*self._unconditional(retrieved, self._order), full]
        return self._task("image", request, streams, grammar, retrieved)

    def _caption(self, request: Request, retrieved: list[np.ndarray]) -> Task:
        return self._answer("caption", request, np.empty(0, np.int64), retrieved)

    def _question(self, request: Request, retrieved: list[np.ndarray]) -> Task:
        # No blank after the last colon: byte-level BPE gives it to the first word of the answer.
        return self._answer("question", request, self._ids(f"Question: {request.text.strip()} Answer:"), retrieved)

    def _infill_text(self, request: Request, retrieved: list[np.ndarray]) -> Task:
        v = self.vocabulary
        first, *rest = request.text.split(MASK)
        if not rest:
            raise UserError(f"{request.name} has no {MASK}; write {MASK} where a word or more is to be filled in")
        # The blank before a word belongs to its first token, so it is masked with the word.
        pieces = [piece.removesuffix(" ") for piece in (first, *rest[:-1])] + rest[-1:]
        caption = np.concatenate([np.append(self._ids(piece), v.unk) for piece in pieces])[:-1]
        masks = np.flatnonzero(caption == v.unk)
        query = caption if request.codes is None else pair(caption, self._codes(request), v, self._order)
        masks += len(query) - len(caption) if self._order == "image_first" else 0
        prompt, cells = infill_prompt(query, [(mask, mask + 1) for mask in masks.tolist()], retrieved, v)
        # An <eoss> follows each, a sentinel goes before all but the first.
        room = self._room(request, [prompt], 3 * len(masks) - 1)
        limit = min(self.max_text_tokens, (room + 1) // len(masks) - 2)
        grammar = infill_grammar(v, (limit,) * len(masks))

        def read(new: np.ndarray) -> list[Part]:
            restored = unrotate(np.concatenate([prompt, new]), v)
            document = restored[1 + sum(len(ids) + 1 for ids in retrieved) :]
            return [part for part in self._parts(document) if isinstance(part, str)]

        return self._task("infill_text", request, [prompt], grammar, retrieved, [cells], read)

    def _infill_image(self, request: Request, retrieved: list[np.ndarray]) -> Task:
        v, caption = self.vocabulary, self._ids(request.text)
        region = Region.of_pixels(self.region, self.image.image_size, self.image.grid)
        runs = region.runs()

        def prompt(words: np.ndarray, documents: list[np.ndarray], masked: bool) -> tuple[np.ndarray, np.ndarray]:
            query = pair(words, self._codes(request), v, self._order)
            start = 0 if self._order == "image_first" else len(words) + 1
            spans = [(start + first, start + end) for first, end in runs]
            numbers = list(range(len(runs)))
            if masked:
                # The caption's sentinel is the last in number: the sentinels to be written are those of all streams.
                place = len(query) - 1 if self._order == "image_first" else 0
                at = len(spans) if place else 0
                spans.insert(at, (place, place + 1))
                numbers.insert(at, len(runs))
            return infill_prompt(query, spans, documents, v, numbers)

        any_caption = np.array([v.unk])
        without = [prompt(any_caption, documents, True) for documents in self._backgrounds(retrieved)]
        full = prompt(caption, retrieved, False) if len(caption) else prompt(any_caption, retrieved, True)
        streams, cells = zip(*without, full, strict=True)
        grammar = infill_grammar(v, tuple(runs))

        def read(new: np.ndarray) -> list[Part]:
            codes = self._codes(request)
            codes[np.concatenate([np.arange(start, end) for start, end in runs])] = new[v.modality(new) == IMAGE]
            return [codes - v.image_start]

        return replace(self._task("infill_image", request, streams, grammar, retrieved, cells, read), region=region)

    def _interleaved(self, request: Request, retrieved: list[np.ndarray]) -> Task:
        v, picture = self.vocabulary, self.image.tokens_per_image
        full = text_to_image_prompt(self._ids(request.text), retrieved, v)
        streams = [*self._unconditional(retrieved, "text_first"), full]
        room = self._room(request, streams, 2)
        limit = min(self.max_tokens or room, room)
        if limit < 2:
            raise UserError(f"generate.max_tokens={limit} is too little for a word and the end; set 2 or more")
        task = self._task("interleaved", request, streams, interleaved_grammar(v, picture, limit), retrieved)
        # Without a limit it takes what is left, so that retrieved documents would never find room.
        return replace(task, reserved=min(limit, self.max_tokens or self.max_text_tokens + picture + 2))

    def _answer(self, kind: str, request: Request, words: np.ndarray, retrieved: list[np.ndarray]) -> Task:
        """A task that writes the rest of a caption that begins with `words`."""
        v = self.vocabulary
        prompt = caption_prompt(self._codes(request), retrieved, v, self._order, words)
        limit = min(self.max_text_tokens, self._room(request, [prompt], 2) - 1)
        return self._task(kind, request, [prompt], text_grammar(v, limit, self._stop), retrieved)

    def _unconditional(self, retrieved: list[np.ndarray], order: str) -> list[np.ndarray]:
        return [unconditional_image_prompt(d, self.vocabulary, order) for d in self._backgrounds(retrieved)]

    def _backgrounds(self, retrieved: list[np.ndarray]) -> list[list[np.ndarray]]:
        """The documents in each stream but the full one."""
        if self.num_streams == 1:
            return []
        return [[], retrieved] if self.num_streams == 3 and retrieved else [retrieved]

    def _task(
        self,
        kind: str,
        request: Request,
        streams: Sequence[np.ndarray],
        grammar: Grammar,
        retrieved: list[np.ndarray],
        cells: Sequence[np.ndarray] | None = None,
        read: Callable[[np.ndarray], list[Part]] | None = None,
    ) -> Task:
        places = cells or [picture_cells(stream, self.vocabulary) for stream in streams]
        self._room(request, streams, grammar.max_length)
        reserved = grammar.max_length
        return Task(
            kind, request, tuple(streams), tuple(places), grammar, read or self._parts, reserved, len(retrieved)
        )

    def _parts(self, ids: np.ndarray) -> list[Part]:
        segments = tokens_to_segments(ids, self.vocabulary)
        return [self.text.decode(found.tolist()) if kind == "text" else found for kind, found in segments]

    def _room(self, request: Request, streams: Sequence[np.ndarray], new: int) -> int:
        """Positions that the streams leave; raises UserError where they are fewer than `new`."""
        longest = max(map(len, streams))
        if longest + new > self.max_positions:
            raise UserError(
                f"{request.name}: its {longest} tokens and {new} new ones exceed the model's {self.max_positions} "
                "positions; shorten it"
            )
        return self.max_positions - longest

    def _ids(self, text: str) -> np.ndarray:
        return np.asarray(self.text.encode(text), dtype=np.int64) + self.vocabulary.text_start

    def _codes(self, request: Request) -> np.ndarray:
        assert request.codes is not None  # the sampler encodes the pictures of all requests at once
        return request.codes + self.vocabulary.image_start
