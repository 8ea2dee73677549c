import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image as Pillow

from mmtrain.config import RetrievalConfig, UserError
from mmtrain.documents import Document, image_from_bytes
from mmtrain.retrieval import Neighbours, build_neighbours
from mmtrain.retrieval.blocklist import BlockList
from tests.retrieval.conftest import pair, picture

LONG = "the quick brown fox jumps over the lazy dog while nine tired wizards watch from the old stone bridge"
HELD_OUT = [
    Document("caption", "eval", ("Two girls play chess in a park.", picture("red", 900, 64)), {}),
    Document("page", "eval", (LONG,), {}),
    Document("short", "eval", ("a dog",), {}),
]


def reencoded(document: Document, size: int, quality: int) -> Document:
    with Pillow.open(io.BytesIO(document.images[0].data)) as opened:
        buffer = io.BytesIO()
        opened.convert("RGB").resize((size, size)).save(buffer, "JPEG", quality=quality)
    image = image_from_bytes(buffer.getvalue(), 10**6)
    return Document("planted", "train", ("something else is written here", image), {})


LEAKS = {
    "the caption": Document("planted", "train", ("two girls play chess in a park",), {}),
    "the caption inside a text": Document("planted", "train", ("Look: two girls play chess in a park today",), {}),
    "a run of 13 words": Document("planted", "train", (f"I saw {LONG[:75]} and left",), {}),
    "the same bytes": Document("planted", "train", ("other words", HELD_OUT[0].segments[1]), {}),
    "larger": reencoded(HELD_OUT[0], 128, 90),
    "smaller": reencoded(HELD_OUT[0], 48, 80),
}


@pytest.mark.parametrize("leak", LEAKS)
def test_planted_leaks_are_found(tmp_path, leak):
    BlockList.of(HELD_OUT).save(tmp_path / "block.npz")
    assert BlockList.load(tmp_path / "block.npz").blocks(LEAKS[leak])
    assert not BlockList.of([]).blocks(LEAKS[leak])


def test_unrelated_documents_pass():
    block = BlockList.of(HELD_OUT)
    others = [pair(i) for i in range(200)]
    assert not any(block.blocks(document) for document in others)
    assert not block.blocks(Document("a", "train", ("a dog",), {}))  # said of many pictures
    assert not block.blocks(Document("a", "train", (LONG[:40],), {}))


def test_what_is_in_an_evaluation_set_is_never_retrieved(shards, tmp_path):
    leaks = [replace(leak, id=f"leak-{i}") for i, leak in enumerate(LEAKS.values())]
    train = shards("train", [*map(pair, range(40)), *leaks])
    shards("block", HELD_OUT)
    config = RetrievalConfig(num_candidates=50, max_score=1.0, query_dropout=0.0)
    for name, block in (("free", []), ("blocked", [tmp_path / "block"])):
        build_neighbours({"train": tmp_path / "train"}, config, tmp_path / name, 0, block=block)
    free, blocked = (Neighbours(tmp_path / name / "train") for name in ("free", "blocked"))
    leaked = set(range(40, 46))
    assert leaked <= set(np.concatenate([free.candidates(i) for i in range(len(train))]).tolist())
    assert not leaked & set(np.concatenate([blocked.candidates(i) for i in range(len(train))]).tolist())
    assert blocked.facts["left_out"]["evaluation"] > 0


def test_a_memory_that_is_an_evaluation_set_is_refused(shards, tmp_path):
    shards("train", map(pair, range(8)))
    with pytest.raises(UserError, match="every document of the memory is in the evaluation sets"):
        folder = tmp_path / "train"
        build_neighbours({"train": folder}, RetrievalConfig(), tmp_path / "out", 0, block=[folder])


def test_a_damaged_block_list_is_refused(tmp_path):
    path = tmp_path / "block.npz"
    BlockList.of(HELD_OUT).save(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="no block list"):
        BlockList.load(path)
