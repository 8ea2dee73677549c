"""A folder of downloaded files, shared by any number of processes and threads, kept below a size.

An entry is one file named by its key. KEY.partial is the entry while somebody downloads it: a lock on that file is the
right to do so, and the rename to KEY ends both. So a killed downloader leaves no lock, only bytes that the next one
overwrites. Readers hold no lock: Linux keeps a removed file until its last descriptor and memory map are gone.
"""

import errno
import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from mmtrain.config import UserError

_ENTRY = re.compile(r"[0-9a-f]{64}(\.partial)?")  # nothing else in the folder is counted or removed
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Cache:
    """Entries by key (64 hexadecimal digits); `limit_bytes` 0: no limit.

    The limit holds for entries and running downloads of all processes together, but one entry always fits.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder.absolute()
        self.limit_bytes = limit_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make store.cache_dir={folder} ({error.strerror}); give another folder") from error

    def find(self, key: str, num_bytes: int) -> Path | None:
        """The entry, marked as just used; None if it is not there in this size."""
        path = self.folder / key
        with suppress(FileNotFoundError):
            if path.stat().st_size == num_bytes:
                with suppress(PermissionError):  # the entry of another user
                    now = time.time_ns()  # the kernel's own time stamps are up to 10 ms behind one another
                    os.utime(path, ns=(now, now))
                return path
        return None

    def get(self, key: str, num_bytes: int, download: Callable[[BinaryIO], None]) -> tuple[Path, bool]:
        """The entry, and whether this call downloaded it: `download` fills a file, or raises and leaves nothing.

        Of several callers anywhere one downloads, the others wait for it.
        """
        partial = self.folder / f"{key}.partial"
        while True:
            path = self.find(key, num_bytes)
            if path is not None:
                return path, False
            with _locked(partial) as file:
                if not _is_at(file, partial):
                    continue  # while we waited it became the entry, or was given up
                path = self.find(key, num_bytes)
                if path is not None:  # it became the entry before we made this file
                    partial.unlink()
                    return path, False
                try:
                    self._make_room(file, num_bytes)
                    download(file)
                    file.flush()
                    os.fsync(file.fileno())
                    os.rename(partial, self.folder / key)
                except BaseException as error:
                    partial.unlink()
                    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                        raise UserError(
                            f"the disk of store.cache_dir={self.folder} is full; free space, lower store.cache_bytes "
                            "or give a folder on another disk"
                        ) from error
                    raise
            return self.folder / key, True

    def _make_room(self, file: BinaryIO, num_bytes: int) -> None:
        """Remove what was not used for the longest time until `file` may grow to `num_bytes`."""
        with _locked(self.folder / ".lock"):
            file.truncate(num_bytes)  # from here on the others count it in full
            total = 0
            entries = []
            for entry in os.scandir(self.folder):
                if not _ENTRY.fullmatch(entry.name):
                    continue
                with suppress(FileNotFoundError):
                    facts = entry.stat()
                    if not entry.name.endswith(".partial"):
                        entries.append((facts.st_mtime_ns, facts.st_size, entry.path))
                    elif _remove_abandoned(entry.path):
                        continue
                    total += facts.st_size
            for _, size, path in sorted(entries):
                if not self.limit_bytes or total <= self.limit_bytes:
                    return
                with suppress(FileNotFoundError):
                    os.unlink(path)
                total -= size


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """The file, made if absent and open for writing, under a lock that nobody else has and that dies with us."""
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            raise UserError(
                f"the file system of {path.parent} has no file locks; set store.cache_dir to a folder on a local disk"
            ) from error
        try:
            yield file
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough where a forked process holds the file too


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether the open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _remove_abandoned(partial: str) -> bool:
    """Remove the file of a killed downloader; whether it was one."""
    with open(partial, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if _is_at(file, Path(partial)):
            os.unlink(partial)
        return True
