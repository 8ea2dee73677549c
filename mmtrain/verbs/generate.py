"""`mmtrain generate`: pictures for captions, captions and answers for pictures, gaps filled, pages gone on with."""

import hashlib
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmtrain import __version__
from mmtrain.config import GenerateConfig, UserError, fingerprint, write_text_atomic
from mmtrain.config.artifact import FINGERPRINT_LENGTH
from mmtrain.documents.corpus import printable
from mmtrain.generate import DRAWING_TASKS, Request, Sample, SamplingSettings, check
from mmtrain.track import closing_box
from mmtrain.train.stop import StopSignals
from mmtrain.verbs.prompts import Asked, held_out, read_prompts, split_words, to_requests
from mmtrain.verbs.samples import GRID, GRID_ROWS, RECORD, check_folder, output_folder, picture_grid, write_sample
from mmtrain.verbs.trained import TrainedRun, open_trained, show_progress

FOR_PICTURES = ("guidance", "guidance_schedule", "retrieval_guidance", "contrastive_k", "contrastive_alpha")
"""Settings that count where image tokens are written."""
NOT_MEANT = ("prompts", "prompts_file", "pictures", "out", "batch_size")
"""Settings that do not change what a sample is, or stand in its own record."""
STREAMED = ("caption", "question", "interleaved")


def main(argv: list[str]) -> int:
    """Sample what the words ask for (default: the first held-out documents) into a folder below RUN/samples."""
    words, settings = split_words(argv)
    run = open_trained(settings)
    g = run.config.generate
    sampling = sampling_settings(g, {word.partition("=")[0] for word in settings})
    asked = read_prompts(g, words) or held_out(run)
    requests = to_requests(run, asked)
    if g.retrieval_guidance and not any(request.retrieved for request in requests):
        raise UserError("generate.retrieval_guidance needs retrieved documents, and there are none; set it to 0")
    tasks = run.sampler.tasks(g.task, requests, sampling, g.max_text_tokens, g.max_tokens, g.region)
    head = describe(run, asked, requests)
    default = run.folder / "samples" / f"{g.task}-step{run.checkpoint.step}-{head['command']}"
    out = Path(os.path.abspath(g.out or default))
    check_folder(out, head["command"])
    samples = run.sampler.draw(tasks, sampling, g.num_samples, g.best_of, scorer(g))
    stop = StopSignals("stopping with the next sample; those before it are kept", "nothing is kept")
    with stop, output_folder(out) as folder:
        records = write_samples(run, asked, samples, folder, stop)
        total = len(asked) * g.num_samples
        record = head | {"complete": len(records) == total, "samples": records}
        write_text_atomic(folder / RECORD, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    run.book("sampling", run.sampler.flops, "generate")
    places = {"samples": os.path.relpath(out), "record": os.path.relpath(out / RECORD)}
    if (out / GRID).exists():
        places["grid"] = os.path.relpath(out / GRID)
    if len(records) < total:
        print(f"mmtrain: stopped after {len(records)} of {total} samples; the same command draws all of them")
    closing_box(f"{len(records)} samples of {head['checkpoint']}", places)
    return 0


def sampling_settings(g: GenerateConfig, given: set[str]) -> SamplingSettings:
    """The sampling settings of the section; given: keys that this command sets.

    Raises UserError for settings that contradict each other or the task.
    """
    settings = SamplingSettings(**{field.name: getattr(g, field.name) for field in fields(SamplingSettings)})
    check(settings)
    if {"generate.guidance", "generate.contrastive_k"} <= given and g.guidance != 1 and g.contrastive_k:
        raise UserError("generate.guidance and generate.contrastive_k use one condition in two ways; give one")
    belongs = dict.fromkeys(FOR_PICTURES, DRAWING_TASKS) | {"region": ("infill_image",), "max_tokens": ("interleaved",)}
    for key, tasks in belongs.items():
        if f"generate.{key}" in given and g.task not in tasks:
            raise UserError(f"generate.{key} is for generate.task={' or '.join(tasks)}, not {g.task}; leave it out")
    if "generate.scorer" in given and g.scorer != scorer(g):
        raise UserError(f"generate.scorer=caption judges a drawn picture; use likelihood with generate.task={g.task}")
    return settings


def scorer(g: GenerateConfig) -> str:
    """The scorer of generate.best_of: the one that is set where there is a picture of a caption to judge."""
    return g.scorer if g.task in ("image", "infill_image") else "likelihood"


def describe(run: TrainedRun, asked: Sequence[Asked], requests: Sequence[Request]) -> dict[str, Any]:
    """What the record says of all samples together; `command` is the same for commands that give the same samples."""
    g = run.config.generate
    head = {
        "checkpoint": f"{run.folder.name}/{run.checkpoint.path.name}",
        "checkpoint_fingerprint": run.checkpoint_fingerprint,
        "vocabulary": run.vocabulary.fingerprint,
        "text_tokenizer": run.text.fingerprint,
        "image_tokenizer": run.image.fingerprint[:FINGERPRINT_LENGTH],
        "task": g.task,
        "settings": {name: value for name, value in asdict(g).items() if name not in NOT_MEANT},
        "made_with": {
            "mmtrain": __version__,
            "torch": torch.__version__,
            "device": run.sampler.image.device.type,
            "dtype": run.dtype,
        },
    }
    meant = [
        (one.text, one.picture, request.seed, _digest([request.picture]), _digest(request.retrieved))
        for one, request in zip(asked, requests, strict=True)
    ]
    return {"command": fingerprint(head, meant)} | head


def _digest(arrays: Sequence[np.ndarray | None]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(b"" if array is None else array.tobytes())
    return digest.hexdigest()


def write_samples(
    run: TrainedRun, asked: Sequence[Asked], samples: Iterator[Sample], folder: Path, stop: StopSignals
) -> list[dict[str, Any]]:
    """Write samples as they come, until somebody asks to stop, and print texts; returns their records."""
    g = run.config.generate
    labels = [printable(one.text or str(one.picture)) for one in asked]
    total = len(asked) * g.num_samples
    streams = sys.stdout.isatty() and g.task in STREAMED and g.best_of == 1 and 1 in (g.batch_size, total)
    if streams:
        run.sampler.stream = lambda piece: print(shown(piece), end="", flush=True)
    records: list[dict[str, Any]] = []
    rows = defaultdict[int, list[np.ndarray]](list)
    with nullcontext() if streams else show_progress(run.sampler, "sampling"):
        while len(records) < total and not stop.asked:
            if streams:
                print(f"{labels[len(records) // g.num_samples]}: ", end="", flush=True)
            sample = next(samples)
            written = write_sample(folder, sample, labels[sample.prompt], g.task == "interleaved")
            records.append(_record(sample, asked[sample.prompt], labels[sample.prompt]) | written)
            if g.task in ("image", "infill_image") and sample.prompt < GRID_ROWS:
                rows[sample.prompt].append(sample.pixels)
            if streams:
                print()
    if rows:
        picture_grid(list(rows.values()), labels).save(folder / GRID)
    elif not streams:
        for record in records:
            print(f"{record['prompt']}: {shown(record['text'])}")
    return records


def _record(sample: Sample, asked: Asked, label: str) -> dict[str, Any]:
    return {
        "prompt": label,
        **({"picture": printable(asked.picture)} if asked.text and asked.picture else {}),
        "number": sample.number,
        "seed": list(sample.key),
        "tokens": sample.num_tokens,
        "log_probability": sample.log_probability,
        **({"scores": list(sample.scores)} if sample.scores else {}),
        "retrieved": sample.num_retrieved,
    }


def shown(text: str) -> str:
    """Text of a model for a terminal: no control characters, which could give it orders."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
