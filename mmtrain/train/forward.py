"""What workers on other hosts need of this process's environment.

DeepSpeed writes variables between double quotes into the command line of ssh, where `$(...)` in a value runs and
everybody on the machine reads keys. They go through a private file in the run directory instead, which the shell on
each host reads before it starts the workers (`--venv_script` of the launcher).
"""

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

FORWARDED = re.compile(
    r"(AWS|CUDA|CUBLAS|DEEPSPEED|DS|FI|GLOO|GOOGLE|HF|HUGGINGFACE|KMP|MKL|MLFLOW|MMTRAIN|MV2|NCCL|OMP|OPENBLAS"
    r"|PYTORCH|SSL|TORCH|TORCHINDUCTOR|TRITON|UCX|WANDB)_\w+|PYTHON\w+"
    r"|(https?|all|no)_proxy|(HTTPS?|ALL|NO)_PROXY|LD_LIBRARY_PATH|LD_PRELOAD|REQUESTS_CA_BUNDLE|TOKENIZERS_PARALLELISM"
)
OF_THIS_HOST = {"CUDA_VISIBLE_DEVICES", "DS_ENV_FILE"}
# What DeepSpeed puts on the command line by itself; PATH and LD_LIBRARY_PATH are needed here and hold no secrets.
EXPORTED_BY_DEEPSPEED = re.compile(r"(MLFLOW|MV2|NCCL|PYTHON(?!PATH$)|UCX)\w*")
SCRIPT = ".environment.sh"


def environment_script(environment: Mapping[str, str]) -> str:
    """Lines for a POSIX shell that set the forwarded variables to exactly the values they have here."""
    return "".join(
        f"export {name}={shlex.quote(value)}\n"
        for name, value in sorted(environment.items())
        if FORWARDED.fullmatch(name) and name not in OF_THIS_HOST
    )


def write_environment(run_dir: Path, environment: Mapping[str, str]) -> Path:
    """Write the script, which may hold keys, so that only this user reads it."""
    path = run_dir / SCRIPT
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(environment_script(environment))
    return path


def launcher_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without what the launcher would put on a command line."""
    return {name: value for name, value in environment.items() if not EXPORTED_BY_DEEPSPEED.fullmatch(name)}
