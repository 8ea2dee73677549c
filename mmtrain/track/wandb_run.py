"""A run directory as a run on W&B, on its server or in an offline file: the only place that calls wandb.

Row number n of metrics.jsonl is step n of W&B's own count. So W&B itself knows where to go on: nothing is sent twice,
and nothing left out, whatever died in between.
"""

import json
import netrc
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from mmtrain.config.compose import load_frozen
from mmtrain.config.schema import Config
from mmtrain.track.goodput import goodput
from mmtrain.track.metrics import read_rows
from mmtrain.track.secrets import redact
from mmtrain.track.wandb_names import FLOPS, TOKENS, Naming

METRICS_FILE = "metrics.jsonl"
INIT_SECONDS = 30.0
ANSWER_SECONDS = 30.0  # for one request; then it is sent again
DEFAULT_HOSTS = {"api.wandb.ai", "api.forge.coreweave.com"}  # before and since wandb 0.31
CHECKPOINT = re.compile(r"step-(\d{8,})")
MOST_SAMPLES = 200  # of one folder
REFUSED = ("401", "403", "api key", "permission", "unauthorized")

Mode = Literal["online", "offline"]


def has_login() -> bool:
    """Whether a W&B key is at hand: in the environment, or in a netrc file for the configured host."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    server = os.environ.get("WANDB_BASE_URL")
    hosts = {urlparse(server).netloc} if server else DEFAULT_HOSTS
    candidates = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    for path in (Path(candidate).expanduser() for candidate in candidates if candidate):
        try:
            if path.is_file() and hosts & set(netrc.netrc(path).hosts):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def resolve_mode(mode: str) -> str:
    """online, offline or disabled; `auto` follows WANDB_MODE if it is set, else whether there is a login."""
    if mode != "auto":
        return mode
    wish = os.environ.get("WANDB_MODE", "")
    if wish in ("online", "offline", "disabled"):
        return wish
    return "online" if has_login() else "offline"


class WandbRun:
    """The run of a run directory, opened to send what W&B does not have yet. Raises whatever wandb raises.

    files: where wandb keeps its own files; finish_seconds: how long `finish` may take; training: the process whose use
    of the machine W&B shows, if the run is online and just trains.
    """

    def __init__(self, run_dir: Path, mode: Mode, files: Path, finish_seconds: float, training: int = 0):
        self.run_dir = run_dir
        config = load_frozen(run_dir / "config.yaml")
        self._run = _init(run_dir, config, mode, files, finish_seconds, training)
        self.num_rows: int = self._run.starting_step if mode == "online" else rows_offline(files)
        """How many rows of metrics.jsonl W&B has been given."""
        self._read = 0
        self._file: Any = None
        self._naming = Naming()
        self._had: dict[str, Any] = dict(self._run.summary)
        self._run.define_metric(TOKENS, hidden=True)
        self._run.define_metric("*", step_metric=TOKENS)
        self._run.define_metric(FLOPS, step_metric=TOKENS)
        self._run.define_metric("val/*", step_metric=FLOPS)

    @property
    def url(self) -> str | None:
        """Address of the run's page."""
        return self._run.url

    def send_rows(self) -> int:
        """Give W&B the rows that it lacks; returns how many there were."""
        before = self.num_rows
        if self._file is None and (self.run_dir / METRICS_FILE).exists():
            self._file = open(self.run_dir / METRICS_FILE, "rb")  # noqa: SIM115 - read on until the end of the run
        for row in read_rows(self._file) if self._file else ():
            named = self._naming(row)
            if self._read >= self.num_rows:
                self._run.log(named, step=self._read, commit=True)
                self.num_rows = self._read + 1
            self._read += 1
        return self.num_rows - before

    def send_rest(self) -> int:
        """Give W&B the checkpoints (as references), pictures and account that it lacks; returns how many pieces."""
        sent = sum(self._send_checkpoint(step, folder) for step, folder in checkpoints(self.run_dir))
        if (found := reconstructions(self.run_dir)) and "reconstructions" not in self._had:
            self._keep("reconstructions", self._image(found, "held-out pictures and what their tokens decode to"))
            sent += 1
        for record in sorted(self.run_dir.glob("samples/*/samples.json")):
            name = f"samples/{record.parent.name}"
            if name not in self._had and (table := self._table(record)) is not None:
                self._keep(name, table)
                sent += 1
        if account := goodput(self.run_dir):
            numbers = {"ratio": account.ratio, "interruptions": len(account.interruptions)}
            numbers |= {"lost_steps": account.lost_steps, "wall_seconds": account.wall_seconds}
            self._run.summary.update({f"goodput/{key}": value for key, value in numbers.items() if value is not None})
        return sent

    def alert(self, title: str, text: str, level: str) -> None:
        """Have W&B tell the user; one of a title within five minutes."""
        self._run.alert(redact(title), redact(text), level=level, wait_duration=300)

    def finish(self, exit_code: int) -> bool:
        """Send what is still here and end; False when W&B did not take it in time."""
        try:
            self._run.finish(exit_code=exit_code)
        except TimeoutError:
            return False
        return True

    def _keep(self, key: str, value: Any) -> None:
        self._run.summary[key] = self._had[key] = value

    def _send_checkpoint(self, step: int, folder: Path) -> int:
        if step <= self._had.get("checkpoint", 0):
            return 0
        import wandb

        artifact = wandb.Artifact(f"checkpoint-{self._run.id}", type="model", metadata={"step": step})
        artifact.add_reference(folder.resolve().as_uri(), name=folder.name, checksum=False)
        self._run.log_artifact(artifact, aliases=["latest", f"step-{step}"])
        self._keep("checkpoint", step)
        return 1

    def _image(self, path: Path, caption: str | None = None) -> Any:
        import wandb
        from PIL import Image

        with Image.open(path, formats=("PNG", "JPEG")) as picture:
            return wandb.Image(picture.convert("RGB"), caption=caption)

    def _table(self, record: Path) -> Any:
        """The samples of a folder of `mmtrain generate`; None where it has none that can be read."""
        import wandb

        try:
            samples = json.loads(record.read_text(encoding="utf-8"))["samples"][:MOST_SAMPLES]
            rows = []
            for sample in samples:
                names = sample.get("pictures") or [sample.get("file")]
                pictures = [self._image(record.parent / name) for name in names if name and name.endswith(".png")]
                rows.append([redact(str(sample.get(key, ""))) for key in ("prompt", "text")] + [pictures])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        most = max((len(pictures) for *_, pictures in rows), default=0)
        table = wandb.Table(columns=["prompt", "text", *(f"picture {i + 1}" for i in range(most))])
        for prompt, text, pictures in rows:
            table.add_data(prompt, text, *pictures, *[None] * (most - len(pictures)))
        return table if rows else None


def _init(run_dir: Path, config: Config, mode: Mode, files: Path, finish_seconds: float, training: int) -> Any:
    # Its error reports go to a server of theirs, in offline mode too; read when wandb is imported.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ["WANDB_SILENT"] = "true"  # we say what matters
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_ARTIFACT_DIR"):  # instead of the home folder
        os.environ.setdefault(name, str(files / "wandb"))
    import wandb

    settings = wandb.Settings(
        console="off",
        disable_git=True,  # remotes can hold credentials
        finish_timeout=finish_seconds,
        finish_timeout_raises=True,
        init_timeout=INIT_SECONDS,
        save_code=False,
        x_disable_meta=True,  # it would store the command line and the host
        x_disable_stats=mode == "offline" or not training,  # its probes ask a cloud's metadata address, also offline
        x_stats_pid=training or os.getpid(),
        x_save_requirements=False,
        # A server that is away or does not answer is asked again for as long as training may last.
        x_file_stream_retry_max=100_000,
        x_file_stream_retry_wait_min_seconds=1.0,
        x_file_stream_retry_wait_max_seconds=30.0,
        x_file_stream_timeout_seconds=ANSWER_SECONDS,
    )
    track = config.track
    facts = json.loads((run_dir / "environment.json").read_text()) if (run_dir / "environment.json").exists() else {}
    return wandb.init(
        mode=mode,
        project=track.project,
        entity=track.entity,
        name=redact(config.name),
        id=(run_dir / "run_id").read_text().strip(),
        resume="allow" if mode == "online" else None,  # offline it has no effect and warns
        dir=str(files),
        config=redact({**asdict(config), "environment": facts}),
        group=redact(track.group or None),
        job_type=redact(track.job_type or None),
        notes=redact(config.notes or None),
        tags=redact(list(track.tags)),
        settings=settings,
    )


def rows_offline(files: Path) -> int:
    """How many rows the offline files of a run hold, those of a killed start included."""
    for folder in sorted(files.glob("wandb/offline-run-*"), reverse=True):
        for path in folder.glob("*.wandb"):
            command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(path)]
            try:
                done = subprocess.run(command, capture_output=True, timeout=600, check=True)
                step = json.loads(done.stdout)["step"]
            except (OSError, subprocess.SubprocessError, ValueError, KeyError):
                continue  # cut before its first record
            if step is not None:
                return int(step) + 1
    return 0


def checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """Step and folder of every complete checkpoint, oldest first."""
    folders = [manifest.parent for manifest in run_dir.glob("checkpoints/*/MANIFEST.json")]
    return sorted((int(match[1]), folder) for folder in folders if (match := CHECKPOINT.fullmatch(folder.name)))


def reconstructions(run_dir: Path) -> Path | None:
    """The picture that the training of the run's image tokenizer left, if there is one."""
    try:
        path = run_dir / json.loads((run_dir / "artifacts.json").read_text())["image_tokenizer"] / "reconstructions.png"
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return path if path.is_file() else None


def explain(error: BaseException) -> str:
    """Why there is no way to W&B, and what to do where that is known."""
    server = redact(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    if any(word in str(error).lower() for word in REFUSED):
        mend = "`wandb login --relogin`, or set WANDB_API_KEY to a key of that server"
        return f"W&B at {server} refuses the key ({first_line(error)}); {mend}"
    return f"W&B at {server} cannot be reached ({first_line(error)})"


def first_line(error: BaseException) -> str:
    """Type and first line of an error, without secrets."""
    message = (str(error).strip().splitlines() or [""])[0][:200]
    return redact(f"{type(error).__name__}: {message}")
