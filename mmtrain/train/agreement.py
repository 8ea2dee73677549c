"""Before the first step: all ranks must run the same program on the same configuration."""

import hashlib
import platform
import socket
from importlib import metadata
from pathlib import Path

import mmtrain
from mmtrain.config import UserError
from mmtrain.train.distributed import World


def check_ranks(world: World, run_dir: Path) -> None:
    """Raise UserError on all ranks when one has another config.yaml, or other versions; all ranks must call."""
    facts = world.gather({"host": socket.gethostname(), **identity(run_dir)})
    for rank, other in enumerate(facts):
        for name, value in facts[0].items():
            if name != "host" and other[name] != value:
                raise UserError(
                    f"rank {rank} on {other['host']} has {name} {other[name]}, but rank 0 on {facts[0]['host']} has "
                    f"{value}; all hosts need the same program and see the same run directory, {run_dir}"
                )


def identity(run_dir: Path) -> dict[str, str]:
    """What must be the same on all ranks, by a name for people."""
    config = hashlib.sha256((run_dir / "config.yaml").read_bytes()).hexdigest()[:12]
    versions = {f"{package} of version": metadata.version(package) for package in ("torch", "deepspeed", "numpy")}
    return {
        "a config.yaml of fingerprint": config,
        "a mmtrain of fingerprint": code_fingerprint(Path(mmtrain.__file__).parent),
        "Python of version": ".".join(platform.python_version_tuple()[:2]),
        **versions,
    }


def code_fingerprint(package: Path) -> str:
    """12 hexadecimal digits over names and contents of all Python files below `package`."""
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(package)} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]
