import json
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest

from mmtrain.config import UserError
from mmtrain.retrieval import index as module
from mmtrain.retrieval.index import Index, build_index, exact_search, plan_index

N, D = 4000, 16


def clustered(count: int, seed: int) -> np.ndarray:
    centers = np.random.default_rng(0).standard_normal((40, D))
    rng = np.random.default_rng(seed)
    rows = centers[rng.integers(0, 40, count)] + rng.standard_normal((count, D)) * 0.7
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


VECTORS, QUERIES = clustered(N, 1), clustered(300, 2).astype(np.float32)
BUDGET = {"flat": 2**30, "rabitq": 2**30, "hnsw": 2**30, "ivfpq": 2**20}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    module.OPQ_ITERATIONS = 1  # seconds instead of half a minute
    folders = {}
    for kind in BUDGET:
        folders[kind] = tmp_path_factory.mktemp(kind)
        build_index(VECTORS, plan_index(N, D, BUDGET[kind], kind), folders[kind], 0, QUERIES[:100])
    return folders


@pytest.mark.parametrize("kind", BUDGET)
def test_the_nearest_are_found_with_exact_scores(built, kind):
    scores, numbers = Index(built[kind], VECTORS).search(QUERIES[100:], 10)
    products = QUERIES[100:] @ VECTORS.astype(np.float32).T
    assert np.allclose(scores, np.take_along_axis(products, numbers, 1), atol=1e-5)
    assert (np.diff(scores, axis=1) <= 0).all()
    expected = np.argsort(-products, axis=1)[:, :10]
    found = np.mean([np.isin(a, b).mean() for a, b in zip(expected, numbers, strict=True)])
    assert found == 1 if kind == "flat" else found > 0.93
    if kind != "flat":
        facts = json.loads((built[kind] / "index.json").read_text())
        assert facts["recall_at_10"] >= 0.95 and facts["plan"]["depth"] > 0
        assert facts["bytes"] == (built[kind] / "index.faiss").stat().st_size
        if kind == "hnsw":  # the others are mostly tables of their codes, small as they are
            assert facts["bytes"] == pytest.approx(facts["plan"]["bytes"], rel=0.2)


def test_a_search_looks_no_further_than_it_must(built):
    index = Index(built["rabitq"], VECTORS)
    depth = index.plan.depth
    _, expected = exact_search(VECTORS, QUERIES[:100], 10)

    def recall(depth: int) -> float:
        index.plan = replace(index.plan, depth=depth)
        _, found = index.search(QUERIES[:100], 10)
        return np.mean([np.isin(a, b).mean() for a, b in zip(expected, found, strict=True)])

    assert recall(depth - max(1, depth // 8)) < module.RECALL + module.MARGIN <= recall(depth)


@pytest.mark.parametrize("kind", BUDGET)
def test_what_asks_for_more_than_there_is_gets_all_there_is(built, kind):
    scores, numbers = Index(built[kind], VECTORS).search(QUERIES[:3], 2 * N)
    assert scores.shape == numbers.shape == (3, N)
    assert (scores[numbers < 0] == -np.inf).all() and (numbers[:, 0] >= 0).all()


def test_hnsw_takes_the_place_of_lists_of_which_too_many_must_be_searched(tmp_path, monkeypatch):
    assert plan_index(100_000, 512, 2**30).or_hnsw and not plan_index(100_000, 512, 2**26).or_hnsw
    plan = replace(plan_index(N, D, 2**30, "rabitq"), or_hnsw=True)
    for most, kind in ((N, "rabitq"), (0, "hnsw")):
        monkeypatch.setattr(module, "MOST_LISTS", most)
        build_index(VECTORS, plan, tmp_path, 0, QUERIES[:100])
        assert Index(tmp_path, VECTORS, verify=True).plan.kind == kind


def test_exact_search_over_blocks_is_that_over_all_at_once(monkeypatch):
    expected = exact_search(VECTORS, QUERIES, 20)
    monkeypatch.setattr(module, "BLOCK", 700)
    scores, numbers = exact_search(VECTORS, QUERIES, 20)
    assert np.allclose(scores, expected[0], atol=1e-5)
    assert (numbers == expected[1]).mean() > 0.99  # equal scores may come in another order
    assert exact_search(VECTORS[:0], QUERIES, 5)[1].shape == (300, 0)


def test_the_kind_follows_size_and_memory():
    gib = 2**30
    assert plan_index(99_999, 512, gib).kind == "flat"
    assert plan_index(100_000, 512, gib).kind == "rabitq"
    large = plan_index(340_000_000, 512, 24 * gib)
    assert large.kind == "ivfpq" and large.factory == "OPQ64_512,IVF131072_HNSW32,PQ64x8" and large.bytes <= 24 * gib
    assert plan_index(340_000_000, 512, 16 * gib).factory.endswith("PQ32x8")
    with pytest.raises(UserError, match=r"takes 5.* GiB at the least, and retrieval.index_memory=1 "):
        plan_index(340_000_000, 512, gib)
    with pytest.raises(UserError, match="set retrieval.index=ivfpq"):
        plan_index(340_000_000, 512, gib, "hnsw")


def test_an_interrupted_build_goes_on_with_its_parts(built, tmp_path, monkeypatch):
    kind = "rabitq"  # ivfpq goes the same way, and trains for long
    monkeypatch.setattr(module, "PART", 1500)
    plan, write = plan_index(N, D, BUDGET[kind], kind), module._write_part
    written: list[str] = []

    def dies(index, path: Path) -> None:
        written.append(path.name)
        if written.count("part-0001.faiss") == 1 and path.name == "part-0001.faiss":
            raise KeyboardInterrupt
        write(index, path)

    monkeypatch.setattr(module, "_write_part", dies)
    with pytest.raises(KeyboardInterrupt):
        build_index(VECTORS, plan, tmp_path, 0, QUERIES[:100])
    build_index(VECTORS, plan, tmp_path, 0, QUERIES[:100])
    names = [f"part-{name}.faiss" for name in ("trained", "0000", "0001", "0001", "0002")]
    assert written == names and not list(tmp_path.glob("part-*"))
    whole, parts = (faiss.read_index(str(folder / "index.faiss")) for folder in (built[kind], tmp_path))
    assert whole.ntotal == parts.ntotal == N
    straight, resumed = (Index(folder, VECTORS).search(QUERIES, 10)[1] for folder in (built[kind], tmp_path))
    assert np.array_equal(straight, resumed)


def test_bad_vectors_and_damaged_indices_are_refused(built, tmp_path):
    plan = plan_index(N, D, 2**30)
    with pytest.raises(UserError, match="no vector to search"):
        build_index(VECTORS[:0], plan, tmp_path, 0)
    broken = VECTORS.copy()
    broken[3210, 5] = np.nan
    with pytest.raises(UserError, match="vector 3210 of the memory is not finite"):
        build_index(broken, plan, tmp_path, 0)
    with pytest.raises(UserError, match="4,000 vectors of 16 numbers, not of 3,999 of 16"):
        Index(built["hnsw"], VECTORS[1:])
    with pytest.raises(UserError, match="16 numbers, not of 4,000 of 8"):
        Index(built["hnsw"], VECTORS[:, :8])
    for name in ("index.json", "index.faiss"):
        (tmp_path / name).write_bytes((built["hnsw"] / name).read_bytes())
    changed = bytearray((tmp_path / "index.faiss").read_bytes())
    changed[-100] ^= 1
    (tmp_path / "index.faiss").write_bytes(changed)
    with pytest.raises(UserError, match="has changed"):
        Index(tmp_path, VECTORS, verify=True)
    (tmp_path / "index.faiss").write_bytes(changed[:-1000])
    with pytest.raises(UserError, match="cut short"):
        Index(tmp_path, VECTORS)
    (tmp_path / "index.json").unlink()
    with pytest.raises(UserError, match="cannot read"):
        Index(tmp_path, VECTORS)
