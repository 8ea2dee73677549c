"""`mmtrain doctor`: is this machine ready, and if not, how to mend it."""

import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from mmtrain.config import Config
from mmtrain.config.compose import compose

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
MARKS = {"pass": "ok  ", "warn": "WARN", "fail": "FAIL"}


@dataclass(frozen=True)
class Check:
    """One finding: `status` is pass, warn (works, with a limit) or fail; `mend` says what to do about it."""

    name: str
    status: str
    detail: str
    mend: str = ""


def main(argv: list[str]) -> int:
    """Print every check (as JSON with --json); 0 when nothing fails, else 1."""
    as_json = "--json" in argv
    config = compose([word for word in argv if word != "--json"])
    findings = []
    for check in CHECKS:
        for finding in check(config):
            findings.append(finding)
            if not as_json:
                mend = f"\n       mend: {finding.mend}" if finding.mend else ""
                print(f"{MARKS[finding.status]}  {finding.name:<14}{finding.detail}{mend}", flush=True)
    counts = {status: sum(finding.status == status for finding in findings) for status in MARKS}
    if as_json:
        print(json.dumps({"counts": counts, "checks": [asdict(finding) for finding in findings]}, indent=1))
    else:
        print(f"\n{counts['pass']} well, {counts['warn']} warnings, {counts['fail']} failures")
    return 1 if counts["fail"] else 0


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


def check_disks(config: Config) -> Iterator[Check]:
    """Free space where runs and data go, and whether a file there survives write, fsync and rename."""
    for name, setting in (("runs", "root"), ("data", "data_dir")):
        folder = _existing(Path(getattr(config, setting)))
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


def _existing(folder: Path) -> Path:
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


def check_limits(config: Config) -> Iterator[Check]:
    """Open files, and shared memory for the exchange between processes."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files != resource.RLIM_INFINITY and files < 1024:
        yield Check("open files", "warn", f"at most {files}", "raise the limit: ulimit -n 4096")
    else:
        yield Check("open files", "pass", f"at most {'any number' if files == resource.RLIM_INFINITY else files}")
    shared = Path("/dev/shm")
    if not shared.is_dir() or shutil.disk_usage(shared).total < 64 << 20:
        mend = "NCCL needs it to connect GPUs; in a container: --shm-size=1g"
        yield Check("shared memory", "warn", "/dev/shm is missing or below 64 MiB", mend)
    try:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
    except OSError as error:
        yield Check("loopback", "fail", f"no port on 127.0.0.1: {error.strerror}", "bring it up: ip link set lo up")


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


def check_tracking(config: Config) -> Iterator[Check]:
    """Where W&B would write; no key leaves this function."""
    mode = config.track.wandb
    has_key = bool(os.environ.get("WANDB_API_KEY")) or _netrc_has_key()
    if mode == "auto":
        mode = "online" if has_key else "offline"
    if mode == "online" and not has_key:
        mend = "wandb login, or track.wandb=offline (metrics.jsonl is written in any case)"
        yield Check("wandb", "fail", "track.wandb=online, but no API key is set", mend)
        return
    meaning = {
        "online": "online, an API key is set",
        "offline": "offline, files stay in the run folder (`mmtrain sync` uploads them)",
        "disabled": "disabled; metrics.jsonl is written in any case",
    }
    yield Check("wandb", "pass", meaning[mode])


def _netrc_has_key() -> bool:
    """Whether `wandb login` has left a key."""
    import netrc

    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False


CHECKS: tuple[Callable[[Config], Iterator[Check]], ...] = (
    check_python,
    check_packages,
    check_devices,
    check_processor,
    check_disks,
    check_limits,
    check_apt,
    check_deepspeed,
    check_tracking,
)
