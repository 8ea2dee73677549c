"""Files of a Debian package: fetched once with apt-get and unpacked, without root; nothing of it is run."""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from mmtrain.config import UserError, build_artifact, fingerprint

TIMEOUT_SECONDS = 600
# Debian policy 5.6.1; what reaches a command line can be no option, path, version or pattern.
PACKAGE_NAME = r"[a-z0-9][a-z0-9.+-]+"


def fetch_debian(package: str, suffixes: Sequence[str], cache: Path, otherwise: str) -> Path:
    """The root of the unpacked package (it holds usr/share/...) below `cache`, fetched at the first call.

    Of its files only those whose name ends in one of `suffixes` (lower case, ".png") are kept, and its copyright.
    A link to a kept file becomes that file; all other links are dropped. `otherwise`: what the user can do instead.
    Raises UserError for a name that is none, and where apt-get or dpkg-deb is missing or fails.
    """
    if not re.fullmatch(PACKAGE_NAME, package):
        raise UserError(f"{package!r} is no name of a Debian package: {otherwise}.")

    def build(folder: Path) -> None:
        work, root = folder / "work", folder / "root"
        work.mkdir()
        archive = _download(package, work, otherwise)
        fault = _run(["dpkg-deb", "-x", str(archive.resolve()), str(root.resolve())], work)
        if fault:
            raise UserError(f"{archive.name} cannot be unpacked ({fault}): {otherwise}.")
        _keep_only(root.resolve(), tuple(suffixes), Path("usr/share/doc", package, "copyright"))
        (folder / "package.txt").write_text(f"{archive.name}\n")
        shutil.rmtree(work)

    return build_artifact(cache / f"{package}-{fingerprint(sorted(suffixes))}", build) / "root"


def _run(command: list[str], folder: Path) -> str:
    """Run a command in `folder`; returns "" or why it failed, in a few words."""
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_SECONDS,
        )
    except FileNotFoundError:
        return f"{command[0]} is not installed"
    except subprocess.TimeoutExpired:
        return f"{command[0]} took more than {TIMEOUT_SECONDS} seconds"
    if done.returncode == 0:
        return ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"{command[0]} ended with code {done.returncode}"


def _download(package: str, folder: Path, otherwise: str) -> Path:
    """The .deb in `folder`. Tries the machine's package lists, then lists of our own (minimal images have none)."""
    fault = _run(["apt-get", "download", package], folder)
    if fault and "not installed" not in fault:
        for name in ("lists/partial", "archives/partial"):
            (folder / name).mkdir(parents=True)
        own = [f"Dir::State::lists={folder.resolve()}/lists", f"Dir::Cache={folder.resolve()}"]
        options = [part for option in own for part in ("-o", option)]
        fault = _run(["apt-get", *options, "update"], folder) or _run(
            ["apt-get", *options, "download", package], folder
        )
    archives = sorted(folder.glob(f"{package}_*.deb"))
    if fault or not archives:
        raise UserError(
            f"apt-get could not fetch Debian's package {package} ({fault or 'no file came'}): {otherwise}."
        )
    return archives[0]


def _keep_only(root: Path, suffixes: tuple[str, ...], copyright_file: Path) -> None:
    """Remove all files but the wanted ones below `root` (resolved), and put files in the place of links to them."""
    paths = list(root.rglob("*"))
    links = [path for path in paths if path.is_symlink()]
    for link in links:  # /usr/share/... means the package's own, not this machine's
        leads_to = os.readlink(link)
        if os.path.isabs(leads_to):
            link.unlink()
            link.symlink_to(root / leads_to.lstrip("/"))

    def is_wanted(path: Path) -> bool:
        return path.name.lower().endswith(suffixes) or path == root / copyright_file

    targets = {link: _target(link, root) for link in links}  # all of them before any link of a chain is gone
    for link, target in targets.items():
        link.unlink()
        if target and is_wanted(link) and is_wanted(target):
            os.link(target, link)
    for path in paths:
        if not path.is_dir() and not is_wanted(path):
            path.unlink(missing_ok=True)


def _target(link: Path, root: Path) -> Path | None:
    """The regular file below `root` that a link leads to."""
    try:
        target = link.resolve(strict=True)
        return target if target.is_relative_to(root) and target.is_file() else None
    except (OSError, RuntimeError):  # it leads nowhere, or in a circle
        return None
