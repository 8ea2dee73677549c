"""What `mmtrain generate` is asked for: words, generate.prompts, a file or stdin, with their pictures and examples."""

import json
import re
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from mmtrain.config import GenerateConfig, UserError
from mmtrain.config.suggest import known_keys
from mmtrain.documents import BadImage, decode_square, image_from_bytes
from mmtrain.documents.captioned import largest_picture_bytes
from mmtrain.generate import MASK, Request
from mmtrain.objective import pair
from mmtrain.verbs.trained import TrainedRun

NEEDS_PICTURE = ("caption", "question", "infill_image")
TAKES_NO_PICTURE = ("image", "interleaved")
LARGEST_FILE_BYTES = 2**26
NUM_HELD_OUT = 4


@dataclass(frozen=True)
class Asked:
    """One prompt as it was given.

    text and picture (the name of a file): at least one of them. where: how messages call it. data: the bytes of the
    picture where it is no file.
    """

    text: str
    picture: str | None
    seed: int
    where: str
    data: bytes | None = None


def split_words(argv: list[str]) -> tuple[list[str], list[str]]:
    """The prompts among the words of the command line, and its settings; a prompt has no `=`."""
    prompts, settings = [], []
    for word in argv:
        key, equals, _ = word.partition("=")
        if word.startswith("-") or (equals and re.fullmatch(r"[+~]*[\w./]+", key)):
            settings.append(word)
        elif equals:
            raise UserError(
                f"{word!r} holds '=', which makes it a setting; write such a prompt into a file "
                "(generate.prompts_file=FILE) or as 'generate.prompts=[\"...\"]'"
            )
        elif word in known_keys():
            raise UserError(f"{word} is a setting without a value; write {word}=VALUE")
        else:
            prompts.append(word)
    return prompts, settings


def read_prompts(g: GenerateConfig, words: list[str]) -> list[Asked]:
    """What the command asks for, in order, with the picture of each; [] where it names no prompt and no picture.

    Raises UserError for a file that cannot be read, a bad line of it, and pictures that do not fit the prompts.
    """
    sources = {"words": words, "generate.prompts": g.prompts, "generate.prompts_file": g.prompts_file}
    given = [name for name, value in sources.items() if value]
    if len(given) > 1:
        raise UserError(f"prompts come from {' and '.join(given)}; use one of them")
    if g.prompts_file:
        asked = _read_file(g.prompts_file, g.seed)
    else:
        asked = [Asked(text, None, g.seed, f"prompt {i}") for i, text in enumerate(words or g.prompts, 1)]
    if g.task == "caption":
        asked = [_picture_to_caption(one) for one in asked]
    elif g.task == "infill_image" and not asked:
        asked = [Asked("", None, g.seed, f"prompt {i}") for i in range(1, len(g.pictures) + 1)]
    if g.pictures:
        asked = _with_pictures(asked, g)
    for one in asked:
        if one.picture is not None and g.task in TAKES_NO_PICTURE:
            raise UserError(f"{one.where} names a picture, and generate.task={g.task} takes none; leave it out")
        if one.picture is None and g.task in NEEDS_PICTURE:
            raise UserError(f"{one.where} has no picture; give generate.pictures=[FILE], or picture in its JSON line")
    return asked


def _with_pictures(asked: list[Asked], g: GenerateConfig) -> list[Asked]:
    if g.task == "caption" or g.task in TAKES_NO_PICTURE:
        how = "give the files as prompts" if g.task == "caption" else "leave generate.pictures out"
        raise UserError(f"generate.task={g.task} takes no generate.pictures; {how}")
    if len(g.pictures) not in (1, len(asked)):
        raise UserError(
            f"generate.pictures has {len(g.pictures)} files for {len(asked)} prompts; give one for all, or one for each"
        )
    for one in asked:
        if one.picture is not None:
            raise UserError(f"{one.where} names a picture, and so does generate.pictures; use one of them")
    names = g.pictures * len(asked) if len(g.pictures) == 1 else g.pictures
    return [replace(one, picture=name) for one, name in zip(asked, names, strict=True)]


def _picture_to_caption(asked: Asked) -> Asked:
    if asked.text and asked.picture is not None:
        raise UserError(f"{asked.where} has a text and a picture; generate.task=caption takes the picture alone")
    return replace(asked, text="", picture=asked.picture or asked.text)


def _read_file(name: str, seed: int) -> list[Asked]:
    """One prompt per line; a line that begins with { is a JSON object. Blank lines are nothing."""
    where = "stdin" if name == "-" else name
    try:
        with nullcontext(sys.stdin.buffer) if name == "-" else open(name, "rb") as file:
            data = file.read(LARGEST_FILE_BYTES + 1)
        text = data.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"the prompts of {where} cannot be read ({error}); give a UTF-8 text file") from error
    if len(data) > LARGEST_FILE_BYTES:
        raise UserError(f"{where} has more than {LARGEST_FILE_BYTES >> 20} MiB of prompts; split it")
    lines = [(f"line {i} of {where}", line.strip()) for i, line in enumerate(text.split("\n"), 1)]
    asked = [
        _read_json(line, seed, place) if line.startswith("{") else Asked(line, None, seed, place)
        for place, line in lines
        if line
    ]
    if not asked:
        raise UserError(f"{where} has no prompt; write one per line")
    return asked


def _read_json(line: str, seed: int, where: str) -> Asked:
    types: dict[str, Any] = {"prompt": str, "picture": str, "seed": int}
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is no JSON object ({error}); write one like {{\"prompt\": \"a cat\"}}") from error
    for key, value in content.items():
        if key not in types:
            raise UserError(f"{where} has the unknown key {key!r}; a line has prompt, picture and seed")
        if not isinstance(value, types[key]) or isinstance(value, bool):
            raise UserError(f"{where}: {key} must be {'a whole number' if key == 'seed' else 'a text'}")
    return Asked(content.get("prompt", ""), content.get("picture"), content.get("seed", seed), where)


def to_requests(run: TrainedRun, asked: list[Asked]) -> list[Request]:
    """The prompts with their pictures read and the documents to place before them."""
    read = cache(partial(_read_picture, run))
    pictures = [None if one.picture is None else read(one.picture, one.data) for one in asked]
    examples = read_examples(run)
    if examples:
        documents = [examples] * len(asked)
    else:
        texts = [one.text.replace(MASK, " ") for one in asked]
        documents = run.retrieved(texts, pictures) or [[] for _ in asked]
    return [
        Request(one.text, picture, None, found, bool(examples), one.seed, one.where)
        for one, picture, found in zip(asked, pictures, documents, strict=True)
    ]


def held_out(run: TrainedRun) -> list[Asked]:
    """The first held-out documents as prompts: their captions, or their pictures for task=caption."""
    g, documents = run.config.generate, run.held_out(NUM_HELD_OUT)
    if g.task == "image":
        return [Asked(d.texts[0], None, g.seed, f"document {d.id}") for d in documents if d.texts]
    if g.task == "caption":
        return [Asked("", d.id, g.seed, f"document {d.id}", d.images[0].data) for d in documents if d.images]
    raise UserError(f"generate.task={g.task} needs prompts; write them after `mmtrain generate`")


def read_examples(run: TrainedRun) -> list[np.ndarray]:
    """Token ids of the documents of generate.examples, each PICTURE=CAPTION."""
    documents = []
    for example in run.config.generate.examples:
        name, equals, caption = example.partition("=")
        if not (name and equals and caption.strip()):
            raise UserError(f"generate.examples has {example!r}; an example is PICTURE=CAPTION, a file and its caption")
        words = np.array(run.text.encode(caption)) + run.vocabulary.text_start
        codes = run.image.encode(_read_picture(run, name, None)[None])[0] + run.vocabulary.image_start
        documents.append(pair(words, codes, run.vocabulary).astype(run.vocabulary.dtype))
    return documents


def _read_picture(run: TrainedRun, name: str, data: bytes | None) -> np.ndarray:
    """(S, S, 3) uint8 of a picture file, or of its bytes where they are at hand."""
    corpus = run.config.corpus
    try:
        if data is None:
            path = Path(name)
            if not path.is_file():  # a pipe would be read forever
                raise UserError(f"picture {name} cannot be read (there is no such file); give PNG, JPEG or WebP files")
            if path.stat().st_size > largest_picture_bytes(corpus.max_pixels):
                raise BadImage("too many bytes", f"corpus.max_pixels={corpus.max_pixels}")
            data = path.read_bytes()
        return decode_square(image_from_bytes(data, corpus.max_pixels).data, corpus.image_size)
    except (OSError, ValueError, BadImage) as error:
        raise UserError(f"picture {name} cannot be read ({error}); give PNG, JPEG or WebP files") from error
