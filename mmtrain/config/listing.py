"""The configuration groups on disk: which folder holds them, which options exist, what each is for."""

import os
from pathlib import Path

from mmtrain.config.errors import UserError

CONFIG_DIR_VARIABLE = "MMTRAIN_CONFIG_DIR"
"""`mmtrain --config-dir DIR` sets it, so that the processes that a verb starts see the same folder."""


def conf_folder() -> Path:
    """The configuration that came with mmtrain: inside the package (wheel) or beside it (checkout)."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise UserError(f"mmtrain's own configuration is missing beside {package}; install mmtrain again")


def search_path(config_dir: Path | None = None) -> list[Path]:
    """Folders that options are read from: mmtrain's own, then the user's (an argument or --config-dir)."""
    if config_dir is None and os.environ.get(CONFIG_DIR_VARIABLE):
        config_dir = Path(os.environ[CONFIG_DIR_VARIABLE])
    if config_dir is None:
        return [conf_folder()]
    if not config_dir.is_dir():
        raise UserError(f"--config-dir {config_dir} is not a folder; give one that holds experiment/NAME.yaml")
    return [conf_folder(), config_dir.resolve()]


def summary(path: Path) -> str:
    """What an option is for: the first comment line of its file that is not a Hydra directive."""
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.strip()
        if text.startswith("#") and not text.lstrip("# ").startswith("@"):
            return text.lstrip("# ")
        if text and not text.startswith("#"):
            break
    return ""


def groups(config_dir: Path | None = None) -> dict[str, dict[str, Path]]:
    """Every group with its options: group -> option -> file. The first folder of the search path wins."""
    found: dict[str, dict[str, Path]] = {}
    for folder in search_path(config_dir):
        for path in sorted(folder.glob("*/*.yaml")):
            found.setdefault(path.parent.name, {}).setdefault(path.stem, path)
    return found
