"""Where shards come from: a local folder, read in place, or an object store or web server behind a cache.

A store gives files by name, each checked against the size and SHA-256 that a manifest gives. What a URL holds besides
scheme, host and path (user, password, signature) is used, but is in no message and no file name.
"""

import errno
import hashlib
import importlib.util
import io
import json
import os
import re
import threading
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import SystemRandom
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit, urlunsplit

from mmtrain.config import StoreConfig, UserError
from mmtrain.shards.cache import Cache

File = tuple[str, int, str]
"""Name, size in bytes, SHA-256 (hexadecimal) of a file of a store."""

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub", "http": "aiohttp", "https": "aiohttp"}
"""What fsspec needs for each scheme."""

MIRRORED = "location.json"
"""In a local folder: the URL that it stands for."""

_CHUNK_BYTES = 16 << 20  # of an object store: one request each
_UNVERSIONED_BYTES = 512 << 20  # largest manifest; one of 10^5 shards has 34 MB
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 60.0
_EVICTED_TRIES = 10
_NAME = re.compile(r"(?!.*\.\.)[A-Za-z0-9_][A-Za-z0-9._/-]*")
_LOCATION = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)(::|://)|([Pp][Ii][Pp][Ee]):")
_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")


@dataclass
class StoreCounts:
    """What a store did in this process. A hit is a file that the cache had, or that another process downloaded."""

    hits: int = 0
    misses: int = 0
    bytes_downloaded: int = 0
    wait_seconds: float = 0.0


class Store:
    """Files of one location by name; may be used by threads, forked and pickled."""

    def __init__(self, location: str) -> None:
        self.location = location  # without secrets, for messages
        self.counts = StoreCounts()

    def where(self, name: str) -> str:
        """The file's place, for messages."""
        return f"{self.location.rstrip('/')}/{name}"

    def fetch(self, name: str, num_bytes: int | None = None, sha256: str | None = None) -> Path:
        """The file on a local disk. Without size and SHA-256 it is the newest version, of at most 512 MB.

        A cached file may be evicted at any time, though never while it is open or mapped: see `open`.
        Raises UserError if it cannot be had, or not with this content.
        """
        raise NotImplementedError

    def open(self, name: str, num_bytes: int | None = None, sha256: str | None = None) -> BinaryIO:
        """`fetch`, and open for reading. Raises OSError where a local file cannot be opened."""
        raise NotImplementedError

    def sizes(self) -> dict[str, int] | None:
        """Size in bytes of every file, where that is cheap to know, else None."""
        return None

    def prefetch(self, files: Iterable[File]) -> None:
        """Fetch files in the background, the first ones first; what goes wrong is told by `fetch`.

        There is room for 2 x store.prefetch_shards files (tar and index); the rest is left out: ask again later.
        """


def open_store(location: str | Path, config: StoreConfig) -> Store:
    """The store at a path or URL (s3://, gs://, hf://, http://, https://, file://).

    Raises UserError for other schemes, for those that store.schemes leaves out, for chained URLs, and if the package
    that a scheme needs is not installed.
    """
    text = str(location)
    match = None if isinstance(location, Path) else _LOCATION.match(text)
    scheme = (match[1] or match[3]).lower() if match else "file"
    chained = match and "::" in re.sub(r"\[[0-9A-Fa-f:.]*\]", "", text)  # an IPv6 address is no chain
    if chained or scheme not in config.schemes or scheme not in ("file", *PACKAGES):
        reason = "chained URLs are" if chained else f"{scheme}: is"
        raise UserError(
            f"the location {redacted(text)} is refused: {reason} not among store.schemes "
            f"({', '.join(config.schemes)}); give a folder or a plain URL of these"
        )
    if scheme == "file":
        folder = Path(unquote(urlsplit(text).path)) if match else Path(text)
        return _Mirror(folder, config) if (folder / MIRRORED).is_file() else _Folder(folder)
    if importlib.util.find_spec(PACKAGES[scheme]) is None:
        raise UserError(f"reading {scheme}:// needs {PACKAGES[scheme]}; run: pip install {PACKAGES[scheme]}")
    return _Remote(scheme, text, config)


def join_location(location: str | Path, name: str) -> str:
    """The folder `name` inside a folder or URL."""
    return f"{str(location).rstrip('/')}/{name}"


def redacted(url: str) -> str:
    """The URL without user, password, query and fragment."""
    try:
        parts = urlsplit(url)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    except ValueError:
        return "[a malformed URL]"


class _Folder(Store):
    """A local folder: the files themselves, no copy, no hashing."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.folder = folder

    def fetch(self, name: str, num_bytes: int | None = None, sha256: str | None = None) -> Path:
        return self.folder / _checked(name)

    def open(self, name: str, num_bytes: int | None = None, sha256: str | None = None) -> BinaryIO:
        return open(self.fetch(name), "rb")

    def sizes(self) -> dict[str, int]:
        try:
            with os.scandir(self.folder) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        except OSError as error:
            raise UserError(f"cannot read the folder {self.folder} ({error.strerror}); give another one") from error


def mirror(folder: Path, location: str, files: Iterable[str], config: StoreConfig) -> None:
    """Make `folder` stand for a URL: these files are copied now and belong to the folder, all others stay there.

    With the manifest among them, what is fetched later is what was there now, or refused. Raises UserError.
    """
    remote = open_store(location, config)
    folder.mkdir(parents=True)
    for name in files:
        try:
            with remote.open(name) as file:
                data = file.read()
        except OSError as error:
            raise UserError(f"cannot read {remote.where(name)} ({error}); is {location} a folder of shards?") from error
        (folder / name).write_bytes(data)
    (folder / MIRRORED).write_text(json.dumps({"location": location}))


class _Mirror(Store):
    """A local folder with some of the files of a URL, as `mirror` made it."""

    def __init__(self, folder: Path, config: StoreConfig) -> None:
        try:
            location = json.loads((folder / MIRRORED).read_text())["location"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"cannot read {folder / MIRRORED} ({error}); delete {folder} and prepare again") from error
        self._folder, self._remote = _Folder(folder), open_store(location, config)
        self.location = self._remote.location

    @property
    def counts(self) -> StoreCounts:  # type: ignore[override]
        return self._remote.counts

    def fetch(self, name: str, num_bytes: int | None = None, sha256: str | None = None) -> Path:
        own = self._folder.fetch(name)
        return own if own.is_file() else self._remote.fetch(name, num_bytes, sha256)

    def open(self, name: str, num_bytes: int | None = None, sha256: str | None = None) -> BinaryIO:
        own = self._folder.fetch(name)
        return open(own, "rb") if own.is_file() else self._remote.open(name, num_bytes, sha256)

    def prefetch(self, files: Iterable[File]) -> None:
        self._remote.prefetch(files)


class _Remote(Store):
    """A URL read through fsspec, behind the cache."""

    def __init__(self, scheme: str, url: str, config: StoreConfig) -> None:
        super().__init__(redacted(url))
        self._scheme = scheme
        self._config = config
        self._cache = Cache(Path(config.cache_dir), config.cache_bytes)
        try:
            self._parts = urlsplit(url)
            hidden = {self._parts.query, self._parts.username or "", self._parts.password or ""}
        except ValueError:
            raise UserError("the location is a malformed URL; give one such as s3://bucket/folder") from None
        hidden |= {value.partition("=")[2] for value in self._parts.query.split("&")}
        hidden |= {unquote(value) for value in hidden}
        self._hidden = sorted((value for value in hidden if len(value) > 2), key=len, reverse=True)
        self._start()

    def _start(self) -> None:
        """What cannot travel to another process, by pickle or by fork."""
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._filesystem: Any = None
        self._queue: deque[File] = deque()
        self._threads = 0

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_filesystem", "_queue")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.counts = StoreCounts()
        self._start()

    def __repr__(self) -> str:
        return f"Store({self.location})"

    def fetch(self, name: str, num_bytes: int | None = None, sha256: str | None = None) -> Path:
        started = time.perf_counter()
        try:
            if num_bytes is None or sha256 is None:
                return self._fetch_newest(name)
            return self._fetch(name, num_bytes, sha256)
        finally:
            waited = time.perf_counter() - started
            with self._here():
                self.counts.wait_seconds += waited

    def open(self, name: str, num_bytes: int | None = None, sha256: str | None = None) -> BinaryIO:
        for _ in range(_EVICTED_TRIES):
            with suppress(FileNotFoundError):  # evicted before it was opened
                return open(self.fetch(name, num_bytes, sha256), "rb")
        raise UserError(
            f"{self.where(name)} was evicted from the cache {_EVICTED_TRIES} times before it could be read; "
            "raise store.cache_bytes"
        )

    def prefetch(self, files: Iterable[File]) -> None:
        with self._here():
            for file in files:
                if len(self._queue) >= 2 * self._config.prefetch_shards:
                    break
                if file not in self._queue:
                    self._queue.append(file)
            missing = min(len(self._queue), self._config.prefetch_shards) - self._threads
            for _ in range(missing):
                self._threads += 1
                threading.Thread(target=self._fetch_queue, name="prefetch shards", daemon=True).start()

    def _fetch_queue(self) -> None:
        """A background thread: fetch until the queue is empty."""
        while True:
            with self._here():
                if not self._queue:
                    self._threads -= 1
                    return
                file = self._queue.popleft()
            with suppress(Exception):  # whoever needs the file tries again, and is told
                self._fetch(*file)

    def _here(self) -> threading.Lock:
        """The lock of this process."""
        if self._pid != os.getpid():
            self._start()
        return self._lock

    def _fetch(self, name: str, num_bytes: int, sha256: str) -> Path:
        def download(file: BinaryIO) -> None:
            self._download(name, file, num_bytes, sha256)

        # The version is part of the key and the signature of a URL is not: signed anew, it finds the old entries.
        key = hashlib.sha256(f"{self.where(_checked(name))}\n{sha256}".encode()).hexdigest()
        path, downloaded = self._cache.get(key, num_bytes, download)
        with self._here():
            self.counts.hits += not downloaded
            self.counts.misses += downloaded
        return path

    def _fetch_newest(self, name: str) -> Path:
        """A file of unknown version is downloaded each time, and kept under the version that it turns out to be."""
        content = io.BytesIO()
        self._download(_checked(name), content, None, None)
        data = content.getbuffer()
        key = hashlib.sha256(f"{self.where(name)}\n{hashlib.sha256(data).hexdigest()}".encode()).hexdigest()
        with self._here():
            self.counts.misses += 1

        def copy(file: BinaryIO) -> None:
            file.write(data)

        return self._cache.get(key, len(data), copy)[0]

    def _download(self, name: str, file: BinaryIO, num_bytes: int | None, sha256: str | None) -> None:
        """Fill `file`, trying again what may pass. Raises UserError that says what was wrong with the last try."""
        fault, mend, wrong = "", "", 0
        for attempt in range(self._config.retries + 1):
            if attempt:
                longest = min(_FIRST_PAUSE_SECONDS * 2 ** (attempt - 1), _LONGEST_PAUSE_SECONDS)
                time.sleep(longest * SystemRandom().uniform(0.5, 1.0))  # many ranks must not come back as one
            try:
                size, digest = self._receive(name, file, num_bytes)
            except FileNotFoundError:
                fault, mend = "it does not exist", "check the location, or upload the file"
                break
            except Exception as error:  # every backend has its own kinds
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise  # the disk of the cache
                fault, mend = self._explain(error), "check the network and the location, or raise store.retries"
                if _is_refusal(error):
                    mend = "check the location and give credentials that may read it"
                    break
                continue
            with self._here():
                self.counts.bytes_downloaded += size
            if num_bytes is None and not digest:
                fault, mend = f"it has more than {_UNVERSIONED_BYTES:,} bytes", "give a folder of shards"
                break
            if num_bytes is not None and size < num_bytes:
                fault, mend = f"it ended after {size:,} of {num_bytes:,} bytes", "upload the file again"
            elif sha256 is not None and digest != sha256:
                fault, mend = "its content is not what the manifest says (SHA-256)", "upload the file again"
                wrong += 1
                if wrong == 2:
                    break
            else:
                return
        raise UserError(f"cannot fetch {self.where(name)} (try {attempt + 1}): {fault}; {mend}")

    def _receive(self, name: str, file: BinaryIO, num_bytes: int | None) -> tuple[int, str]:
        """Download once; returns size and SHA-256 ("" of a file that is too long)."""
        limit = _UNVERSIONED_BYTES if num_bytes is None else num_bytes
        options: dict[str, Any] = {"cache_type": "none"}
        if self._scheme in ("http", "https", "hf"):
            options["block_size"] = 0  # one request, read as a stream
        if self._scheme in ("http", "https"):
            options["size"] = num_bytes  # otherwise it is asked for first
        parts = self._parts
        url = urlunsplit((self._scheme, parts.netloc, f"{parts.path.rstrip('/')}/{name}", parts.query, ""))
        digest, size = hashlib.sha256(), 0
        file.seek(0)
        with self._open_filesystem().open(url, "rb", **options) as remote:
            while chunk := remote.read(min(_CHUNK_BYTES, limit + 1 - size)):
                size += len(chunk)
                if size > limit:
                    return size, ""
                digest.update(chunk)
                file.write(chunk)
        if num_bytes is None:
            file.truncate(size)  # what an earlier try left
        return size, digest.hexdigest()

    def _open_filesystem(self) -> Any:
        """One file system for all threads; fsspec itself would make one for each."""
        import fsspec  # it takes a while to import, and a local folder never needs it

        with self._here():
            if self._filesystem is None:
                options = _timeouts(self._scheme, self._config.timeout_seconds)
                self._filesystem = fsspec.filesystem(self._scheme, skip_instance_cache=True, **options)
            return self._filesystem

    def _explain(self, error: Exception) -> str:
        """What a library said, on one line and without secrets."""
        text = " ".join(f"{type(error).__name__}: {error}".split())
        for value in self._hidden:
            text = text.replace(value, "[redacted]")
        return _IN_TEXT.sub(lambda match: redacted(match[0]), text)[:300].rstrip(": ")


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise UserError(f"{name!r} cannot be a file of a store; use letters, digits, '.', '_', '-' and '/'")
    return name


def _is_refusal(error: Exception) -> bool:
    """Whether a server will say no again: 4xx but for timeouts and rate limits, or no credentials to give."""
    status = getattr(error, "status", 0)
    if isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429):
        return True
    return isinstance(error, PermissionError) or type(error).__name__ == "NoCredentialsError"


def _timeouts(scheme: str, seconds: float) -> dict[str, Any]:
    """Options of fsspec's file system that make a stalled download fail."""
    if scheme == "s3":
        # Retries are ours: botocore's own would multiply them.
        return {"config_kwargs": {"connect_timeout": seconds, "read_timeout": seconds, "retries": {"max_attempts": 0}}}
    if scheme == "hf":
        return {}  # huggingface_hub has its own: HF_HUB_DOWNLOAD_TIMEOUT
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds)
    if scheme == "gs":
        return {"requests_timeout": timeout}
    # encoded: the URL is sent as it was signed. trust_env: proxies of the environment.
    return {"client_kwargs": {"timeout": timeout, "trust_env": True}, "encoded": True}
