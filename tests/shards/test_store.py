"""Shards from web servers and object stores that really run, well and badly, and the cache in front of them."""

import errno
import functools
import hashlib
import json
import mmap
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from base64 import b64encode
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from mmtrain.config import StoreConfig, UserError
from mmtrain.shards import TokenShards, reader, store, write_tokens
from mmtrain.shards.manifest import MANIFEST, index_name, shard_name
from mmtrain.shards.store import MIRRORED, mirror, open_store
from mmtrain.tokens import TokenDocument, TokenSegment, Vocabulary

VOCABULARY = Vocabulary(text_size=300, image_codes=512, num_sentinels=4)
DATA = bytes(range(256)) * 400
SHA256 = hashlib.sha256(DATA).hexdigest()


class Server(ThreadingHTTPServer):
    """Files of a dictionary by path. `faults` are used up one per GET, the last one again and again."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.gets, self.allowed = {"/a/x.tar": DATA}, {}, Counter(), lambda handler: True
        self.stall = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """Clients that hang up are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):  # noqa: N802
        self.do_GET(body=False)

    def do_GET(self, body=True):  # noqa: N802
        path = urlsplit(self.path).path
        data, faults = self.server.files.get(path), self.server.faults.get(path, [])
        fault = faults[0] if faults else None
        if body:
            self.server.gets[path] += 1
            if len(faults) > 1:
                faults.pop(0)
        status = 404 if data is None else 403 if not self.server.allowed(self) else 200
        status = fault if isinstance(fault, int) else status
        if status != 200:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = {"shorter": data[:-9], "wrong": b"?" + data[1:]}.get(fault, data)
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not body:
            return
        if fault == "slow":
            time.sleep(0.3)
        self.wfile.write(data[: len(data) // 2] if fault in ("cut", "stall") else data)
        if fault == "stall":
            self.wfile.flush()
            self.server.stall.wait(20)
        self.close_connection = fault in ("cut", "stall")


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=functools.partial(server.serve_forever, poll_interval=0.01), daemon=True)
    thread.start()
    yield server
    server.stall.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(store, "_FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def config(tmp_path):
    return StoreConfig(cache_dir=str(tmp_path / "cache"), retries=3, timeout_seconds=5.0)


def cached(config):
    return {path.name: path.stat().st_size for path in Path(config.cache_dir).iterdir() if path.name != ".lock"}


def fetch(url, config):
    return open_store(url, config).fetch("x.tar", len(DATA), SHA256)


def write(folder, count=10):
    rows = [np.arange(n % 7, n % 7 + 8, dtype=VOCABULARY.dtype) for n in range(count)]
    documents = [TokenDocument(f"d{n:05d}", row, (TokenSegment("text", 0, 8),), {}) for n, row in enumerate(rows)]
    return write_tokens(folder, documents, VOCABULARY, "t", "i", shard_documents=4)


def serve(server, folder, at="/tokens"):
    server.files |= {f"{at}/{path.name}": path.read_bytes() for path in folder.iterdir()}
    return server.url + at


def same(first, second):
    return len(first) == len(second) and all(
        first.id(i) == second.id(i) and np.array_equal(first.tokens(i), second.tokens(i)) for i in range(len(first))
    )


# Where shards come from


def test_a_folder_is_read_in_place(tmp_path, config):
    (tmp_path / "x.tar").write_bytes(DATA)
    for location in (tmp_path, str(tmp_path), f"file://{tmp_path}"):
        assert fetch(location, config) == tmp_path / "x.tar"
    assert not Path(config.cache_dir).exists()


def test_token_shards_over_http_equal_the_local_ones(tmp_path, server, config):
    write(tmp_path / "tokens")
    there = open_store(serve(server, tmp_path / "tokens"), config)
    shards = TokenShards(there.location, there)
    assert server.gets == {"/tokens/manifest.json": 1, "/tokens/vocabulary.json": 1}, "opening needs no shard"
    assert same(shards, TokenShards(tmp_path / "tokens"))
    assert same(pickle.loads(pickle.dumps(shards)), shards), "a worker opens its own"
    assert server.gets["/tokens/shard-000000.tar"] == 1
    sizes = sum(path.stat().st_size for path in (tmp_path / "tokens").iterdir())
    assert (there.counts.misses, there.counts.bytes_downloaded) == (8, sizes) and there.counts.wait_seconds > 0


def test_token_shards_over_s3_equal_the_local_ones(tmp_path, config, monkeypatch):
    s3fs = pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    moto_server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto_server.start()
    try:
        host, port = moto_server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name, value in {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "s", "DEFAULT_REGION": "us-east-1"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        write(tmp_path / "tokens")
        bucket = s3fs.S3FileSystem(skip_instance_cache=True)
        bucket.mkdir("bucket")
        bucket.put(str(tmp_path / "tokens"), "bucket/data/", recursive=True)
        there = open_store("s3://bucket/data/tokens", config)
        assert same(TokenShards(there.location, there), TokenShards(tmp_path / "tokens"))
        bucket.pipe("bucket/data/tokens/shard-000001.tar", b"changed")
        again = open_store("s3://bucket/data/tokens", StoreConfig(cache_dir=str(tmp_path / "other"), retries=1))
        with pytest.raises(UserError, match=r"s3://bucket/data/tokens/shard-000001.tar .* 7 of .* bytes"):
            TokenShards(again.location, again).tokens(5)
        with pytest.raises(UserError, match=r"s3://bucket/nothing/manifest.json .*does not exist"):
            TokenShards("s3://bucket/nothing", open_store("s3://bucket/nothing", config))
    finally:
        moto_server.stop()


@pytest.mark.parametrize(
    "location",
    [
        "pipe:cat /etc/passwd",
        "PIPE:cat x",
        "simplecache::s3://bucket/x",
        "zip://a.tar::http://host/b.zip",
        "http://host/a::file:///etc",
        "ftp://host/x",
        "memory://x",
        "hf://datasets/a/b",
    ],
)
def test_other_schemes_and_chains_are_refused(location, config):
    config.schemes = ["file", "http", "pipe", "zip", "simplecache", "memory"]
    with pytest.raises(UserError, match=r"is refused: .* not among store.schemes"):
        open_store(location, config)


def test_a_missing_package_is_named_with_the_command(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match="gs:// needs gcsfs; run: pip install gcsfs"):
        open_store("gs://bucket/x", config)


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "x?y", "", "a\\b", "http://host/x"])
def test_names_cannot_lead_elsewhere(name, tmp_path, server, config):
    for location in (tmp_path, server.url):
        with pytest.raises(UserError, match="cannot be a file of a store"):
            open_store(location, config).fetch(name, 1, SHA256)
    assert not server.gets


# Servers that fail


def test_a_server_that_recovers_is_forgiven(server, config, table):
    config.timeout_seconds = 0.2
    server.faults["/a/x.tar"] = [500, "cut", "stall", None]
    there = open_store(server.url + "/a", config)
    assert there.fetch("x.tar", len(DATA), SHA256).read_bytes() == DATA
    assert there.fetch("x.tar", len(DATA), SHA256).read_bytes() == DATA
    assert server.gets["/a/x.tar"] == 4 and (there.counts.hits, there.counts.misses) == (1, 1)
    table(
        "data store gone for a while: an error, a cut, a stall",
        "tried again with growing pauses; no byte differs",
        "so",
    )


@pytest.mark.parametrize(
    ("fault", "tries", "message"),
    [
        (404, 1, "does not exist"),
        (403, 1, "403.*credentials"),
        (500, 4, "500"),
        (429, 4, "429"),
        ("stall", 4, "Timeout"),
        ("cut", 4, "ClientPayloadError"),
        ("shorter", 4, "it ended after 102,391 of 102,400 bytes"),
        ("wrong", 2, "not what the manifest says"),
    ],
)
def test_a_server_that_does_not_is_one_sentence_and_leaves_nothing(server, config, fault, tries, message):
    config.timeout_seconds = 0.1
    server.faults["/a/x.tar"] = [fault]
    with pytest.raises(UserError, match=f"cannot fetch {server.url}/a/x.tar .*{message}") as caught:
        fetch(server.url + "/a", config)
    assert server.gets["/a/x.tar"] == tries and "\n" not in str(caught.value)
    assert cached(config) == {}


def test_a_file_without_end_does_not_fill_the_disk(server, config):
    server.files["/a/x.tar"] = DATA * 200
    there = open_store(server.url + "/a", config)
    with pytest.raises(UserError, match="not what the manifest says"):
        there.fetch("x.tar", len(DATA), SHA256)
    assert there.counts.bytes_downloaded == 2 * (len(DATA) + 1), "two tries, a byte too many each"


def test_nobody_is_not_a_stack_trace(config):
    with pytest.raises(UserError, match="127.0.0.1:9/a/x.tar .*network"):
        fetch("http://127.0.0.1:9/a", config)


def test_wrong_bytes_once_are_downloaded_again(server, config):
    server.faults["/a/x.tar"] = ["wrong", None]
    assert fetch(server.url + "/a", config).read_bytes() == DATA


def test_secrets_open_doors_and_are_told_to_nobody(server, config):
    secrets = ["hunter2/%2F", "hunter2//", "c2lnbmVk%3D", "c2lnbmVk", "some-user"]
    login = "Basic " + b64encode(b"some-user:hunter2//").decode()
    server.allowed = lambda handler: (
        handler.headers.get("Authorization") == login and handler.path.endswith("x.tar?v=1&sig=c2lnbmVk%3D")
    )
    location = server.url.replace("//", "//some-user:hunter2%2F%2F@") + "/a?v=1&sig=c2lnbmVk%3D"
    there = open_store(location, config)
    assert there.fetch("x.tar", len(DATA), SHA256).read_bytes() == DATA
    server.allowed = lambda handler: False
    assert fetch(server.url + "/a?v=1&sig=anew", config).exists(), "signed anew, it is the same file"

    said = [repr(there), there.location, str(list(cached(config)))]
    for fault in (404, 403, 500, "cut", "wrong"):
        server.faults["/a/y.tar"], server.files["/a/y.tar"] = [fault], DATA
        with pytest.raises(UserError) as caught:
            there.fetch("y.tar", len(DATA), SHA256)
        said += traceback.format_exception(caught.value)
    said.append(there._explain(OSError("no some-user with hunter2// at https://me:mine@host/b?token=bearer, or\nelse")))
    assert said[-1] == "OSError: no [redacted] with [redacted] at https://host/b or else"
    with pytest.raises(UserError) as caught:
        open_store(location.replace("http:", "ftp:"), config)
    assert not [secret for secret in secrets if secret in " ".join([*said, str(caught.value)])]


# The cache


# Without the __init__ of the package, which takes seconds to import torch.
CHILD = f"""
import sys, types
sys.modules["mmtrain.shards"] = package = types.ModuleType("mmtrain.shards")
package.__path__ = [{str(Path(store.__file__).parent)!r}]
from mmtrain.config import StoreConfig
from mmtrain.shards.store import open_store
store = open_store(sys.argv[1], StoreConfig(cache_dir=sys.argv[2]))
store._open_filesystem()
print("ready", flush=True)
input()
store.fetch(sys.argv[3], {len(DATA)}, {SHA256!r})
"""


def process(server, config, name):
    """Another process that fetches the file as soon as it gets a line."""
    command = [sys.executable, "-c", CHILD, server.url + "/a", config.cache_dir, name]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_many_processes_and_threads_download_once(server, config):
    server.faults["/a/x.tar"] = ["slow"]
    children = [process(server, config, "x.tar") for _ in range(4)]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    with ThreadPoolExecutor(8) as threads:
        paths = set(threads.map(lambda _: fetch(server.url + "/a", config), range(8)))
    assert [child.wait(30) for child in children] == [0] * 4 and len(paths) == 1
    assert server.gets["/a/x.tar"] == 1 and list(cached(config).values()) == [len(DATA)]


def test_a_killed_downloader_blocks_nobody(server, config):
    left = []
    for name in ("x.tar", "y.tar"):
        server.files[f"/a/{name}"] = DATA
        server.faults[f"/a/{name}"] = ["stall", None]
        child = process(server, config, name)
        child.stdin.write("go\n")
        child.stdin.flush()
        while not server.gets[f"/a/{name}"]:
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        child.wait()
        left += cached(config)
    assert len(set(left)) == len(left) == 2, "the second downloader removed what the first had left"
    assert open_store(server.url + "/a", config).fetch("y.tar", len(DATA), SHA256).read_bytes() == DATA
    assert left[1] == f"{list(cached(config))[0]}.partial" and len(cached(config)) == 1


def test_the_least_recently_used_goes_first_and_what_is_mapped_stays_readable(server, config):
    config.cache_bytes = 3 * len(DATA)
    stranger = Path(config.cache_dir) / "thesis.tex"
    stranger.parent.mkdir()
    stranger.write_bytes(DATA)
    there = open_store(server.url, config)
    paths = {}

    def get(name):
        server.files[f"/{name}"] = DATA
        paths[name] = there.fetch(name, len(DATA), SHA256)
        assert sum(size for key, size in cached(config).items() if key != stranger.name) <= config.cache_bytes

    for name in "abc":
        get(name)
    with there.open("b", len(DATA), SHA256) as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    for name in "ade":
        get(name)
    assert [name for name in "abcde" if paths[name].exists()] == ["a", "d", "e"] and stranger.exists()
    assert mapped[:] == DATA
    get("b")
    assert server.gets["/b"] == 2


def test_one_file_larger_than_the_cache_still_serves(tmp_path, server, config):
    write(tmp_path / "tokens")
    config.cache_bytes = 1
    there = open_store(serve(server, tmp_path / "tokens"), config)
    assert same(TokenShards(there.location, there), TokenShards(tmp_path / "tokens"))
    assert len(cached(config)) == 1


def test_a_file_evicted_before_it_is_opened_is_fetched_again(server, config, monkeypatch):
    there = open_store(server.url + "/a", config)
    fetch, evictions = there.fetch, iter([Path.unlink])
    monkeypatch.setattr(there, "fetch", lambda *file: (path := fetch(*file), next(evictions, Path.exists)(path))[0])
    with there.open("x.tar", len(DATA), SHA256) as file:
        assert file.read() == DATA


def test_running_downloads_count_in_full(server, config):
    config.cache_bytes = 2 * len(DATA)
    server.files |= {"/a/y.tar": DATA, "/a/z.tar": DATA}
    server.faults["/a/y.tar"] = ["slow"]
    there = open_store(server.url + "/a", config)
    first = there.fetch("x.tar", len(DATA), SHA256)
    with ThreadPoolExecutor(2) as threads:
        slow = threads.submit(there.fetch, "y.tar", len(DATA), SHA256)
        while not server.gets["/a/y.tar"]:
            time.sleep(0.005)
        there.fetch("z.tar", len(DATA), SHA256)
        assert not first.exists() and sum(cached(config).values()) == 2 * len(DATA)
        slow.result()


def test_a_cached_file_that_lost_bytes_is_downloaded_again(server, config):
    path = fetch(server.url + "/a", config)
    path.write_bytes(DATA[:-1])
    assert fetch(server.url + "/a", config).read_bytes() == DATA


def test_a_full_disk_is_a_sentence(server, config, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mmtrain.shards.cache.os.fsync", full)
    with pytest.raises(UserError, match="disk of store.cache_dir=.* is full"):
        fetch(server.url + "/a", config)
    assert cached(config) == {} and server.gets["/a/x.tar"] == 1


def test_prefetched_shards_are_hits_and_failures_wait_for_their_reader(tmp_path, server, config):
    write(tmp_path / "tokens", count=16)
    there = open_store(serve(server, tmp_path / "tokens"), config)
    shards = TokenShards(there.location, there)
    server.faults["/tokens/shard-000003.tar"] = [403]
    shards.prefetch([5, 13, 4, 0])
    deadline = time.time() + 10
    while there.counts.misses < 7 and time.time() < deadline:
        time.sleep(0.01)
    assert there.counts.misses == 7, "manifest, vocabulary, two shards, three indices"
    shards.tokens(5), shards.tokens(0)
    assert there.counts.hits == 4 and server.gets["/tokens/shard-000001.tar"] == 1
    assert "/tokens/shard-000002.tar" not in server.gets
    with pytest.raises(UserError, match="shard-000003.tar"):
        shards.tokens(13)


def test_a_forked_process_fetches_too(server, config):
    there = open_store(server.url + "/a", config)
    there.fetch("x.tar", len(DATA), SHA256)
    server.files["/a/y.tar"] = DATA
    child = multiprocessing.get_context("fork").Process(target=there.fetch, args=("y.tar", len(DATA), SHA256))
    child.start()
    child.join(20)
    assert child.exitcode == 0 and server.gets["/a/y.tar"] == 1


# Readers of many shards


def test_few_shards_stay_open(tmp_path, monkeypatch):
    write(tmp_path, count=40)
    everything = TokenShards(tmp_path)
    views = [everything.tokens(i) for i in range(40)]
    monkeypatch.setattr(reader, "_MAPS", 2)
    monkeypatch.setattr(reader, "_INDEX_BYTES", 3 * everything.manifest.shards[0].index_bytes)
    shards = TokenShards(tmp_path)
    held = [(i, shards.tokens(i)) for i in np.random.default_rng(0).permutation(40)]
    assert all(np.array_equal(tokens, views[i]) for i, tokens in held)
    assert len(shards._maps) == 2 and len(shards._indices) == 3


@pytest.mark.parametrize("damage", ["garbage", "compressed", "outside", "modality"])
def test_a_damaged_index_is_a_sentence_at_first_use(tmp_path, damage):
    write(tmp_path)
    path = tmp_path / "shard-000001.index.npz"
    with np.load(path) as content:
        arrays = dict(content)
    if damage == "outside":
        arrays["parts"][0] = ((1 << 63) - 1, 8)  # whose sum overflows
    if damage == "modality":
        arrays["segments"][0, 0] = 9
    (np.savez_compressed if damage == "compressed" else np.savez)(path, **arrays)
    if damage == "garbage":
        path.write_bytes(b"PK" + os.urandom(999))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["shards"][1]["index_bytes"] = path.stat().st_size
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    shards = TokenShards(tmp_path)
    shards.tokens(0)
    with pytest.raises(UserError, match=f"shard index {path} "):
        shards.tokens(4)


@pytest.mark.parametrize("key", ["bytes", "documents", "sha256", "fingerprints"])
def test_a_manifest_of_nonsense_is_a_sentence(tmp_path, key):
    write(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (manifest if key == "fingerprints" else manifest["shards"][1])[key] = ["7"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest.json is damaged"):
        TokenShards(tmp_path)


def peak_bytes():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def test_a_hundred_thousand_shards_open_in_seconds(tmp_path, server, config):
    number = 100_000
    manifest = write(tmp_path, count=4)
    real = manifest.shards[0]
    # The last shard exists and holds the last four of 10^9 documents.
    row = '{"name":"%s","bytes":%d,"sha256":"%s","index_bytes":%d,"index_sha256":"%s","documents":%d'
    row += ',"text_tokens":9,"image_tokens":9}'
    rows = [row % (shard_name(n), 60_000_000, f"{n:064x}", 2_000_000, f"{n:064x}", 10_000) for n in range(number)]
    last, before = shard_name(number - 1), shard_name(number - 2)
    rows[-2] = row % (before, 1, "", 1, "", 19_996)
    rows[-1] = row % (last, real.bytes, real.sha256, real.index_bytes, real.index_sha256, 4)
    head = json.dumps(asdict(replace(manifest, shards=(), documents=10**9)))
    url = serve(server, tmp_path, "/many")
    server.files["/many/manifest.json"] = head.replace('"shards": []', f'"shards": [{",".join(rows)}]').encode()
    server.files[f"/many/{last}"] = server.files[f"/many/{real.name}"]
    server.files[f"/many/{index_name(last)}"] = server.files[f"/many/{index_name(real.name)}"]
    del rows, head

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    memory, started = peak_bytes(), time.perf_counter()
    there = open_store(url, config)
    shards = TokenShards(url, there)
    seconds, megabytes = time.perf_counter() - started, (peak_bytes() - memory) / 1e6
    print(f"{seconds:.2f} s, {megabytes:.0f} MB")
    assert len(shards) == 10**9 and shards.tokens(10**9 - 1).tolist() == list(range(3, 11))
    assert seconds < 20 and megabytes < 300  # for a busy machine; alone on two cores: 1.6 s


def test_a_mirror_keeps_the_version_that_was_there_when_it_was_made(tmp_path, server, config):
    write(tmp_path / "tokens")
    url = serve(server, tmp_path / "tokens")
    folder = tmp_path / "here"
    mirror(folder, url, (MANIFEST, "vocabulary.json"), config)
    here = pickle.loads(pickle.dumps(TokenShards(folder, open_store(folder, config))))
    assert same(here, TokenShards(tmp_path / "tokens")) and here.store.counts.misses > 0
    assert sorted(path.name for path in folder.iterdir()) == [MIRRORED, MANIFEST, "vocabulary.json"]
    shutil.rmtree(config.cache_dir)
    server.files = {path: bytes(len(data)) for path, data in server.files.items()}
    with pytest.raises(UserError, match="not what the manifest says"):
        TokenShards(folder, open_store(folder, config)).tokens(0)
    for location in ('{"location": "pipe:touch x"}', "[]", "?"):
        (folder / MIRRORED).write_text(location)
        with pytest.raises(UserError, match="refused|cannot read"):
            open_store(folder, config)
