"""Weights & Biases, thin and guarded: no call can raise into training or hold it up for long.

`auto` goes online when a key is at hand (WANDB_API_KEY or a
netrc login) and stays offline otherwise; an online start that fails goes on offline.
"""

import netrc
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from mmtrain.config import TrackConfig
from mmtrain.track.secrets import redact

INIT_SECONDS = 30.0
FINISH_SECONDS = 60.0
STEP_METRIC = "tokens"
DEFAULT_HOSTS = {"api.wandb.ai", "api.forge.coreweave.com"}  # before and since wandb 0.31

# Sections of the W&B page; keys that are not here go to "train".
SECTIONS = {
    "lr": "optim",
    "grad_norm": "optim",
    "tokens_per_second": "perf",
    "step_seconds": "perf",
    "data_seconds": "perf",
    "mfu_causal": "perf",
    "mfu_palm": "perf",
    "hfu": "perf",
    "prepare_seconds": "perf",
    "padding": "data",
    "split_documents": "data",
    "dropped_retrieved": "data",
}
TOP_LEVEL = {"step", "tokens", "flops_total"}


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


def wandb_key(key: str) -> str:
    """Name of a metric on W&B: "loss_text" -> "train/loss_text", "val_loss" -> "val/loss", "lr" -> "optim/lr"."""
    if key in TOP_LEVEL or "/" in key:
        return key
    if key.startswith("val_"):
        return f"val/{key.removeprefix('val_')}"
    return f"{SECTIONS.get(key, 'train')}/{key}"


class WandbSink:
    """One W&B run. `say` gets one line per thing that the user should know; a fault is said once, then all is quiet."""

    def __init__(
        self,
        run_dir: Path,
        name: str,
        config: Mapping[str, Any],
        track: TrackConfig,
        run_id: str,
        say: Callable[[str], None] = print,
    ):
        self._say = say
        self._run: Any = None
        self._folder: Path | None = None
        self.mode = resolve_mode(track.wandb)
        if self.mode == "disabled":
            return
        try:
            self._run = self._start(run_dir, name, config, track, run_id)
            self._folder = Path(self._run.dir).parent
            self._run.define_metric(STEP_METRIC, hidden=True)
            self._run.define_metric("*", step_metric=STEP_METRIC)
        except (Exception, SystemExit) as error:  # wandb.teardown() may call sys.exit()
            self._give_up("start", error)

    def _start(self, run_dir: Path, name: str, config: Mapping[str, Any], track: TrackConfig, run_id: str) -> Any:
        # Its error reports go to a server of theirs, in offline mode too; read when wandb is imported.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb  # half a second, and not needed when disabled

        def init(mode: Literal["online", "offline"]) -> Any:
            settings = wandb.Settings(
                console="off",
                disable_git=True,  # remotes can hold credentials
                finish_timeout=FINISH_SECONDS,
                finish_timeout_raises=False,
                init_timeout=INIT_SECONDS,
                silent=True,  # the tracker says what matters
                save_code=False,
                x_disable_meta=True,  # it would store the command line and the host
                x_disable_stats=mode == "offline",  # its probes ask a cloud's metadata address, also offline
                x_save_requirements=False,
            )
            return wandb.init(
                mode=mode,
                project=track.project,
                entity=track.entity,
                name=name,
                id=run_id,
                resume="allow" if mode == "online" else None,  # offline it has no effect and warns
                dir=str(run_dir),
                config=redact(dict(config)),
                tags=list(track.tags),
                settings=settings,
            )

        if self.mode == "online" and not has_login():  # wandb would ask for a key, and nobody may be there
            self._say("W&B has no key (set WANDB_API_KEY or run `wandb login`); logging offline.")
            self.mode = "offline"
        if self.mode == "online":
            try:
                return init("online")
            except Exception as error:
                self._say(f"W&B cannot be reached ({_first_line(error)}); logging offline.")
                self.mode = "offline"
                wandb.teardown()  # frees the run id, which the failed start still holds
        return init("offline")

    @property
    def url(self) -> str | None:
        """Address of the run's page when online."""
        return getattr(self._run, "url", None) if self.mode == "online" else None

    @property
    def sync_command(self) -> str | None:
        """What uploads an offline run later."""
        return f"wandb sync {self._folder}" if self._folder and self.mode == "offline" else None

    def log(self, row: Mapping[str, Any]) -> None:
        """Log one row; missing values are left out. The x axis is `tokens`: steps overlap after a resume."""
        if self._run is None:
            return
        try:
            self._run.log({wandb_key(key): value for key, value in row.items() if value is not None})
        except Exception as error:
            self._give_up("log", error)

    def samples(self, step: int, tokens: int, captions: list[str], pictures: list[bytes]) -> None:
        """Log encoded pictures (PNG or JPEG) with their captions."""
        if self._run is None:
            return
        try:
            import io

            import wandb
            from PIL import Image

            images = []
            for caption, data in zip(captions, pictures, strict=True):
                with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as picture:
                    images.append(wandb.Image(picture.convert("RGB"), caption=caption))
            self._run.log({"samples": images, "step": step, STEP_METRIC: tokens})
        except Exception as error:
            self._give_up("log pictures", error)

    def close(self, exit_code: int = 0) -> None:
        """Finish the run within FINISH_SECONDS. Safe to call twice."""
        run, self._run = self._run, None
        if run is None:
            return
        try:
            run.finish(exit_code=exit_code)
        except Exception as error:
            self._give_up("finish", error)

    def _give_up(self, what: str, error: BaseException) -> None:
        self._run = None
        self._say(f"W&B failed to {what} ({_first_line(error)}); training goes on without it, metrics.jsonl is kept.")


def _first_line(error: BaseException) -> str:
    """Type and first line of an error, without secrets."""
    message = (str(error).strip().splitlines() or [""])[0][:200]
    return redact(f"{type(error).__name__}: {message}")
