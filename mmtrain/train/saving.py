"""Writing checkpoints behind the training that goes on: a copy in host memory, a thread per rank, a commit by rank 0.

1. All ranks agree on a hidden folder that all of them see, and on there being room for it.
2. Each copies what it owns to host memory; training goes on.
3. Each writes its file, and beside it FILE.json: bytes and SHA-256, or why it failed.
4. Rank 0 has all of these, writes the state and, last, the manifest, and gives the folder its name.
Threads talk through the folder alone: a collective in a thread would mix with those of the training.
"""

import errno
import hashlib
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch
from torch import Tensor

from mmtrain.config import UserError, sync_folder, write_text_atomic
from mmtrain.train.checkpoint import (
    FORMAT_VERSION,
    HIDDEN,
    MANIFEST,
    STATE,
    candidates,
    discard,
    open_checkpoint,
    open_pieces,
    removable,
    sealed,
    tensors_name,
)
from mmtrain.train.distributed import World
from mmtrain.train.fragments import Fragment

VISIBLE_WITHIN_SECONDS = 10.0  # a network file system may show a new folder to other hosts a little later
POLL_SECONDS = 0.05
WORTH_SAYING_SECONDS = 0.2
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Job:
    """What one rank has to write of one checkpoint."""

    step: int
    partial: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    shapes: dict[str, list[int]]
    state: str
    started: float


class Saver:
    """Writes the checkpoints of a run into `folder`, one at a time.

    keep: newest checkpoints that stay; keep_every: those of multiples of this step stay for good (0: none).
    asynchronous: `save` returns when the state is copied, and a thread writes it. A checkpoint that cannot be written
    never stops training: `poll` says so, and `wait` at the end.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        keep: int,
        keep_every: int = 0,
        asynchronous: bool = True,
        patience_seconds: float = 900.0,
    ):
        self.folder, self.world, self.keep, self.keep_every = folder, world, keep, keep_every
        self.asynchronous, self.patience_seconds = asynchronous, patience_seconds
        self._thread: threading.Thread | None = None
        self._buffer: Tensor | None = None
        self._sentences: SimpleQueue[str] = SimpleQueue()
        self._failure: str | None = None
        self._failures_in_a_row = 0

    def save(self, fragments: list[Fragment], shapes: dict[str, list[int]], state: dict[str, Any]) -> None:
        """Save what the ranks own and `state` (JSON-able; state["step"] names it); all ranks must call.

        Waits for the checkpoint in flight, if there is one. What is in `fragments` may change after the return.
        """
        started = time.monotonic()
        self._finish_previous()
        tensors = {f"{kind}.{f.name}": tensor for f in fragments for kind, tensor in f.tensors.items()}
        starts = {f.name: f.start for f in fragments}
        if len(starts) != len(fragments):
            raise ValueError("a rank owns two fragments of one parameter")
        text = json.dumps({"format_version": FORMAT_VERSION, **state})
        partial = self._agree_on_folder(state["step"], sum(tensor.nbytes for tensor in tensors.values()) + len(text))
        if partial is None:
            return
        if self.asynchronous:
            tensors = self._snapshot(tensors)
        metadata = {"starts": json.dumps(starts)}
        job = Job(state["step"], partial, tensors, metadata, shapes, text, started)
        if self.asynchronous:
            # A daemon: a run that ends early ends; what it leaves is hidden.
            self._thread = threading.Thread(target=self._write, args=(job,), name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._write(job)

    def poll(self) -> list[str]:
        """Sentences for the user about checkpoints that were completed or failed; on rank 0, the others have none."""
        sentences = []
        with suppress(Empty):
            while True:
                sentences.append(self._sentences.get_nowait())
        return sentences

    def wait(self) -> str | None:
        """Wait for the checkpoint in flight; why the last one is not complete, None when it is. All ranks must call."""
        if self._thread:
            self._thread.join()
            self._thread = None
        return self.world.gather(self._failure)[0]

    def _finish_previous(self) -> None:
        started = time.monotonic()
        self.wait()
        self._failure = None
        seconds = time.monotonic() - started
        if seconds > WORTH_SAYING_SECONDS and self.world.rank == 0:
            self._say(f"training waited {seconds:.1f} s for the checkpoint before this one: save less often")

    def _agree_on_folder(self, step: int, num_bytes: int) -> Path | None:
        """A new hidden folder that all ranks see; None on all of them, and why in the sentences, when there is none."""
        total = sum(self.world.gather(num_bytes))
        name, failure = self.world.gather(self._make_folder(step, total) if self.world.rank == 0 else None)[0]
        if failure is None:
            deadline = time.monotonic() + VISIBLE_WITHIN_SECONDS
            while not (self.folder / name).is_dir() and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
            blind = [rank for rank, sees in enumerate(self.world.gather((self.folder / name).is_dir())) if not sees]
            if not blind:
                return self.folder / name
            failure = (
                f"rank {blind[0]} does not see {self.folder} of rank 0; put root= on a file system that all hosts share"
            )
        if self.world.rank == 0:
            self._fail(step, failure, self.folder / name if name else None)
        return None

    def _make_folder(self, step: int, num_bytes: int) -> tuple[str, str | None]:
        """Its name, which no host has ever looked up and found missing, and None; or "" and what stands against it."""
        try:
            if not self.folder.is_dir():
                self.folder.mkdir(parents=True)
                sync_folder(self.folder.parent)
            for leftover in self.folder.iterdir():
                if HIDDEN.fullmatch(leftover.name):
                    shutil.rmtree(leftover, ignore_errors=True)
            free = shutil.disk_usage(self.folder).free
            if free < num_bytes * 1.02:
                return "", f"it needs {num_bytes / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free; free some space"
            name = f".step-{step:08d}.{uuid.uuid4().hex[:8]}.partial"
            (self.folder / name).mkdir()
            return name, None
        except OSError as error:
            return "", _reason(error)

    def _snapshot(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies in host memory that is taken once and used again."""
        total = sum(tensor.numel() for tensor in tensors.values())
        if self._buffer is None or self._buffer.numel() != total:
            self._buffer = _host_buffer(total, self.world.device)
        copies = dict(zip(tensors, self._buffer.split([t.numel() for t in tensors.values()]), strict=True))
        for name, tensor in tensors.items():
            copies[name].copy_(tensor.detach(), non_blocking=True)
        if self.world.device.type == "cuda":
            # The copies are queued behind the last step. The next one overwrites what they read, and the host may go
            # on to it: so they must be done, which at the rate of the bus is a fraction of a step.
            torch.cuda.current_stream(self.world.device).synchronize()
        return copies

    def _write(self, job: Job) -> None:
        """In the thread: this rank's file; rank 0 then completes the checkpoint."""
        path = job.partial / tensors_name(self.world.rank, self.world.size)
        try:
            entry = write_tensors(path, job.tensors, job.metadata)
            write_text_atomic(_report(path), json.dumps(entry))
            if self.world.rank == 0:
                self._complete(job)
        except Exception as error:  # training goes on whatever it is
            if self.world.rank == 0:
                self._fail(job.step, _reason(error), job.partial)
            else:
                self._report_failure(path, f"{_reason(error)} (rank {self.world.rank})")

    def _report_failure(self, path: Path, failure: str) -> None:
        """Tell rank 0, which waits for it; on a full disk as soon as there is room, so its own file goes first."""
        deadline = time.monotonic() + self.patience_seconds
        while path.parent.is_dir() and time.monotonic() < deadline:
            with suppress(OSError):
                path.unlink(missing_ok=True)
                write_text_atomic(_report(path), json.dumps({"failure": failure}))
                return
            time.sleep(POLL_SECONDS)

    def _complete(self, job: Job) -> None:
        """Put the reports of all ranks into the manifest, and give the folder its name."""
        final = self.folder / f"step-{job.step:08d}"
        files = self._collect(job.partial)
        with ExitStack() as stack:
            open_pieces(job.partial, job.shapes, files, stack)
        files[STATE] = write_durably(job.partial / STATE, [job.state.encode()])
        manifest = {
            "format_version": FORMAT_VERSION,
            "step": job.step,
            "time": round(time.time(), 3),
            "permanent": bool(self.keep_every) and job.step % self.keep_every == 0,
            "shapes": job.shapes,
            "files": files,
        }
        write_text_atomic(job.partial / MANIFEST, json.dumps(sealed(manifest), indent=1))
        open_checkpoint(job.partial)  # what gets a name can be read
        sync_folder(job.partial)
        replaced = final.with_name(f".{final.name}.replaced")
        if final.exists():  # one that this run could not read: it is at this step again
            os.rename(final, replaced)
        os.rename(job.partial, final)
        sync_folder(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)
        self._failures_in_a_row = 0
        num_bytes = sum(entry["bytes"] for entry in files.values())
        self._say(f"checkpoint {final.name}: {num_bytes / 1e6:,.1f} MB in {time.monotonic() - job.started:.1f} s")
        self._prune(job.step)

    def _collect(self, partial: Path) -> dict[str, Any]:
        """Bytes and SHA-256 of every rank's file, by name, when all are there; raises OSError."""
        deadline = time.monotonic() + self.patience_seconds
        files: dict[str, Any] = {}
        for rank in range(self.world.size):
            name = tensors_name(rank, self.world.size)
            report = _report(partial / name)
            while not report.exists():
                if time.monotonic() > deadline:
                    raise OSError(f"rank {rank} has not written its file after {self.patience_seconds:.0f} s")
                time.sleep(POLL_SECONDS)
            files[name] = json.loads(report.read_text())
            if failure := files[name].get("failure"):
                raise OSError(failure)
            report.unlink()
        return files

    def _prune(self, step: int) -> None:
        try:
            for path in removable(self.folder, self.keep, step):
                discard(path)
        except OSError as error:
            self._say(f"an old checkpoint could not be removed ({_reason(error)}); remove it by hand")

    def _fail(self, step: int, reason: str, partial: Path | None) -> None:
        """On rank 0: note and say that the checkpoint of a step is not there; training goes on."""
        if partial:
            shutil.rmtree(partial, ignore_errors=True)
        self._failures_in_a_row += 1
        before = next((path.name for path in candidates(self.folder)), "none")
        name = self.folder / f"step-{step:08d}"
        self._failure = f"checkpoint {name} could not be written: {reason} (the newest there is: {before})"
        often = f", {self._failures_in_a_row} times in a row now" if self._failures_in_a_row > 1 else ""
        self._say(f"{self._failure}; training goes on{often}")

    def _say(self, sentence: str) -> None:
        self._sentences.put(sentence)


def _report(path: Path) -> Path:
    """Where a rank tells rank 0 what became of its file."""
    return path.with_name(f"{path.name}.json")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> dict[str, Any]:
    """Write a safetensors file of flat float32 tensors, on any device, without a second copy of them in memory.

    The format: the length of the header in 8 bytes, the header as JSON, then the bytes of the tensors, all little
    endian. (The file of the library's save_file has to be read again for a checksum, which then vouches for what was
    written and not for what was meant.) Returns its bytes and SHA-256.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or tensor.dim() != 1:
            raise ValueError(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, not flat float32")
        header[name] = {"dtype": "F32", "shape": [tensor.numel()], "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    arrays = (tensor.detach().cpu().contiguous().numpy().astype("<f4", copy=False) for tensor in tensors.values())

    def parts() -> Iterable[Any]:
        yield len(text).to_bytes(8, "little")
        yield text
        yield from arrays

    return write_durably(path, parts())


def write_durably(path: Path, parts: Iterable[Any]) -> dict[str, Any]:
    """Write buffers one after the other and flush them to the disk; the file's bytes and SHA-256."""
    digest, num_bytes = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
            num_bytes += memoryview(part).nbytes
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": num_bytes, "sha256": digest.hexdigest()}


def _host_buffer(size: int, device: torch.device) -> Tensor:
    """`size` float32 in host memory, pinned where a GPU copies into it."""
    return torch.empty(size, dtype=torch.float32, pin_memory=device.type == "cuda")


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        advice = "; free some space, or move root=" if error.errno in NO_ROOM else ""
        return f"{error.strerror}{advice}"
    return str(error) if isinstance(error, (OSError, UserError)) else repr(error)
