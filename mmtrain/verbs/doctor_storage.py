"""What the doctor looks at on disks: room for data and checkpoints, whether files survive a rename, shared memory."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mmtrain.config import Config
from mmtrain.verbs.doctor_machine import GIB, Check

SHARED = Path("/dev/shm")
SHARED_BYTES = 1 << 30  # what NCCL's manual gives a container in which GPUs exchange data through it


def check_disks(config: Config) -> Iterator[Check]:
    """Free space where runs and data go, and whether a file there survives write, fsync and rename."""
    for name, setting in (("runs", "root"), ("data", "data_dir")):
        folder = existing_parent(Path(getattr(config, setting)))
        free = shutil.disk_usage(folder).free
        detail, mend = f"{free / GIB:.1f} GiB free at {folder}", f"free some space or set {setting}=DIR on another disk"
        if free < GIB // 4:
            yield Check(name, "fail", detail, mend)
        elif free < 2 * GIB:
            yield Check(name, "warn", detail, mend)
        else:
            yield Check(name, "pass", detail)
        try:
            _write_and_rename(folder)
        except OSError as error:
            problem = f"writing a file in {folder} fails: {error.strerror or error}"
            yield Check(name, "fail", problem, f"choose another place with {setting}=DIR")


def existing_parent(folder: Path) -> Path:
    """`folder` or its nearest parent that exists; the doctor makes no folders."""
    folder = folder.resolve()
    while not folder.is_dir():
        folder = folder.parent
    return folder


def _write_and_rename(folder: Path) -> None:
    """What every checkpoint and shard does: write beside, fsync, rename, read back."""
    with tempfile.TemporaryDirectory(prefix=".mmtrain-doctor-", dir=folder) as scratch:
        first, second = Path(scratch, "written"), Path(scratch, "renamed")
        with open(first, "wb") as file:
            file.write(b"mmtrain")
            file.flush()
            os.fsync(file.fileno())
        os.replace(first, second)
        if second.read_bytes() != b"mmtrain":
            raise OSError("what was written reads differently")


def check_checkpoints(config: Config) -> Iterator[Check]:
    """Whether the checkpoints that the run keeps, and the one being written, have room beside what is there."""
    from mmtrain.train.plan import checkpoint_bytes
    from mmtrain.verbs.flops_count import vocabulary_of

    c, run_dir = config.train, Path(config.root, config.name)
    size = checkpoint_bytes(config, vocabulary_of(config).size)
    kept = min(c.keep_checkpoints, -(-c.steps // c.checkpoint_every))
    for_good = c.steps // c.keep_every if c.keep_every else 0
    there = sum(file.stat().st_size for file in run_dir.glob("checkpoints/step-*/*") if file.is_file())
    folder = existing_parent(run_dir)
    needed, free = size * (kept + for_good + 1), shutil.disk_usage(folder).free + there
    detail = (
        f"{_gib(size)} each, {kept} kept{f' and {for_good} for good' if for_good else ''} and one being written: "
        f"{_gib(needed)} of {_gib(free)} at {folder}"
    )
    mend = "root=DIR on a larger disk, or a smaller train.keep_checkpoints" + (
        ", or a larger train.keep_every" if for_good else ""
    )
    status = "fail" if needed > free else "warn" if needed > 0.8 * free else "pass"
    yield Check("checkpoints", status, detail, "" if status == "pass" else mend)


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:,.1f} GiB" if num_bytes > GIB / 10 else f"{num_bytes / 2**20:,.1f} MiB"


def check_shared_memory(config: Config) -> Iterator[Check]:
    """/dev/shm against what NCCL takes of it to connect the GPUs of this host; gloo takes none."""
    import torch

    gpus = torch.cuda.device_count()
    free = shutil.disk_usage(SHARED).free if SHARED.is_dir() else 0
    detail = f"{_gib(free)} free in {SHARED}"
    if gpus > 1 and free < SHARED_BYTES:
        mend = "in a container: --shm-size=1g, or --ipc=host"
        yield Check("shared memory", "warn", f"{detail}; NCCL may need {_gib(SHARED_BYTES)} for {gpus} GPUs", mend)
    else:
        use = f"NCCL connects {gpus} GPUs through it" if gpus > 1 else "nothing here needs it: NCCL connects no GPUs"
        yield Check("shared memory", "pass", f"{detail}; {use}")
