"""What the doctor looks at on this machine: interpreter, packages, devices, memory, limits, tools."""

import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from mmtrain.config import Config

GIB = 1 << 30
NEEDED_PACKAGES = (
    "torch",
    "deepspeed",
    "webdataset",
    "wandb",
    "hydra-core",
    "omegaconf",
    "numpy",
    "safetensors",
    "tokenizers",
    "pillow",
    "faiss-cpu",
    "rich",
    "matplotlib",
    "vector-quantize-pytorch",
    "resvg-py",
    "pyyaml",
)
OPEN_FILES = 4096  # shards of many sources, connections to every rank, and what Python has open


@dataclass(frozen=True)
class Check:
    """One finding: `status` is pass, warn (works, with a limit) or fail; `mend` says what to do about it."""

    name: str
    status: str
    detail: str
    mend: str = ""


def check_python(config: Config) -> Iterator[Check]:
    """The interpreter."""
    yield Check("python", "pass", f"{platform.python_version()} at {sys.executable}")


def check_packages(config: Config) -> Iterator[Check]:
    """Versions of what mmtrain depends on (`pip check` compares them with what each package asks for)."""
    found, missing = {}, []
    for name in NEEDED_PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        yield Check("packages", "fail", f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    if found:
        yield Check("packages", "pass", ", ".join(f"{name} {version}" for name, version in found.items()))


def check_devices(config: Config) -> Iterator[Check]:
    """The build of torch and the GPUs it sees."""
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Check(
            "torch", "fail", f"cannot be imported: {error}", "install it again: pip install --force-reinstall torch"
        )
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            mend = "install a build of torch that matches the driver (nvidia-smi prints its CUDA version)"
            yield Check("torch", "warn", f"{torch.__version__} ({build}) sees no GPU, but nvidia-smi is here", mend)
        else:
            yield Check("torch", "pass", f"{torch.__version__} ({build}); no GPU, training uses CPU processes")
        return
    yield Check("torch", "pass", f"{torch.__version__} ({build})")
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        bf16 = torch.cuda.get_device_capability(index) >= (8, 0)
        detail = f"{index}: {device.name}, {device.total_memory / GIB:.0f} GiB"
        mend = "" if bf16 else "it has no fast bf16; train with engine.dtype=fp32"
        yield Check("gpu", "pass" if bf16 else "warn", detail, mend)


def check_processor(config: Config) -> Iterator[Check]:
    """Cores and memory that this process may use."""
    cores = len(os.sched_getaffinity(0))
    yield Check("cores", "pass", f"{cores} usable of {os.cpu_count()}")
    memory = _memory_bytes()
    if memory < 6 * GIB:
        mend = "8 GiB are recommended; lower stream.global_batch and image_tokenizer.batch_size"
        yield Check("memory", "warn", f"{memory / GIB:.1f} GiB", mend)
    else:
        yield Check("memory", "pass", f"{memory / GIB:.1f} GiB")


def _memory_bytes() -> int:
    """Physical memory, or the limit of the control group when that is lower."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        limit = Path("/sys/fs/cgroup", name)
        if limit.is_file() and (text := limit.read_text().strip()).isdigit():
            return min(physical, int(text))
    return physical


def check_limits(config: Config) -> Iterator[Check]:
    """How many files this process may open; what stands in the way of InfiniBand."""
    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < 1024:
        mend = f"ulimit -n {OPEN_FILES}" if hard < 0 or hard >= OPEN_FILES else "raise it in /etc/security/limits.conf"
        yield Check("open files", "warn", f"at most {files}", f"raise the limit: {mend}")
    else:
        yield Check("open files", "pass", f"at most {'any number' if files == resource.RLIM_INFINITY else files}")
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if Path("/sys/class/infiniband").is_dir() and locked != resource.RLIM_INFINITY:
        mend = "ulimit -l unlimited; in a container --ulimit memlock=-1"
        yield Check("locked memory", "warn", f"at most {locked >> 10} KiB; InfiniBand needs to lock more", mend)


def check_apt(config: Config) -> Iterator[Check]:
    """What the stamps corpus is fetched with."""
    missing = [name for name in ("apt-get", "dpkg-deb") if shutil.which(name) is None]
    if missing and config.corpus.kind == "stamps" and not config.corpus.path:
        mend = "use corpus=shapes, or corpus=pairs with pictures of your own"
        yield Check("apt", "fail", f"{', '.join(missing)} missing: corpus=stamps cannot be fetched", mend)
    elif missing:
        mend = "only corpus=stamps needs it; shapes and pairs work"
        yield Check("apt", "warn", f"{', '.join(missing)} missing", mend)
    else:
        yield Check("apt", "pass", "apt-get and dpkg-deb are here, corpus=stamps can be fetched")


def check_deepspeed(config: Config) -> Iterator[Check]:
    """DeepSpeed imports, in a process of its own: its import is noisy and may end the process."""
    command = [sys.executable, "-c", "import deepspeed; print(deepspeed.__version__)"]
    mend = "install it again (pip install --force-reinstall deepspeed), or train with engine=ddp"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        yield Check("deepspeed", "fail", "its import takes more than 2 minutes", mend)
        return
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        yield Check("deepspeed", "fail", f"cannot be imported: {reason}", mend)
    else:
        yield Check("deepspeed", "pass", f"{done.stdout.strip().splitlines()[-1]} imports")
    if config.engine.hostfile and shutil.which("pdsh") is None:
        yield Check("pdsh", "fail", "missing, engine.hostfile needs it", "Debian: apt-get install pdsh")
