"""One rank of a small all-reduce with a time limit: `python -m mmtrain.train.all_reduce --run-dir FOLDER`.

What a rank has reached is in FOLDER/rank-R.json, so that whoever waits can name those that did not come.
"""

import argparse
import json
import os
import socket
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

from mmtrain.config import write_text_atomic

STARTED, CONNECTED, DONE, FAILED = "started", "connected", "done", "failed"
LIMIT_SECONDS = 60.0  # of connecting, and of the sum
ELEMENTS = 1 << 20  # of float32: 4 MiB


@dataclass(frozen=True)
class Note:
    """How far a rank has come; seconds: of one sum; time: Unix seconds on its clock when the sum was done."""

    rank: int
    host: str
    stage: str
    reason: str = ""
    backend: str = ""
    seconds: float = 0.0
    time: float = 0.0


def main() -> int:
    """Sum a tensor over all ranks twice, the second time measured; 1 when it fails or is wrong."""
    parser = argparse.ArgumentParser(description="One rank of a small all-reduce; started by `mmtrain doctor`.")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--local_rank", type=int, default=0, help="given by the launcher; the environment decides")
    folder = parser.parse_args().run_dir
    rank, host = int(os.environ.get("RANK", 0)), socket.gethostname()
    write_note(folder, Note(rank, host, STARTED))
    try:
        note = reduce(folder, rank, host)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        note = Note(rank, host, FAILED, reason)
    write_note(folder, note)
    # Not by a return: destroying the process group waits for ranks that do not come.
    sys.stdout.flush()
    os._exit(0 if note.stage == DONE else 1)


def reduce(folder: Path, rank: int, host: str) -> Note:
    """Connect and sum; raises what torch raises."""
    import torch
    import torch.distributed as dist

    from mmtrain.train.distributed import start_world

    world = start_world(timedelta(seconds=LIMIT_SECONDS))
    backend = dist.get_backend()
    write_note(folder, Note(rank, host, CONNECTED, backend=backend))
    for _ in range(2):  # the first one also connects
        tensor = torch.full((ELEMENTS,), rank + 1.0, device=world.device)
        world.barrier()
        began = time.perf_counter()
        smallest, largest = world.sum(tensor).aminmax()
        numbers = smallest.item(), largest.item()  # waits for the device
        seconds = time.perf_counter() - began
    expected = world.size * (world.size + 1) / 2
    if numbers != (expected, expected):
        reason = f"the sum is {numbers[0]:g} to {numbers[1]:g} and should be {expected:g}"
        return Note(rank, host, FAILED, reason, backend)
    now = time.time()
    world.barrier()
    return Note(rank, host, DONE, "", backend, seconds, now)


def write_note(folder: Path, note: Note) -> None:
    """Replace the note of a rank."""
    write_text_atomic(folder / f"rank-{note.rank}.json", json.dumps(asdict(note)))


def read_notes(folder: Path) -> dict[int, Note]:
    """What the ranks have left so far."""
    notes = [Note(**json.loads(file.read_text(encoding="utf-8"))) for file in sorted(folder.glob("rank-*.json"))]
    return {note.rank: note for note in notes}


if __name__ == "__main__":
    sys.exit(main())
