"""No leak in 100,000 contexts as training would see them: neither oneself, nor a copy, nor an evaluation document."""

import hashlib
import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image as Pillow

from mmtrain.config import RetrievalConfig, UserError
from mmtrain.documents import Document, Image, image_from_bytes
from mmtrain.retrieval import Neighbours, build_neighbours, select
from mmtrain.retrieval.blocklist import BlockList
from tests.retrieval.conftest import pair

N, EPOCHS = 2000, 50
CONFIG = RetrievalConfig(num_candidates=4, num_documents=3, policy="fixed", max_score=0.97)


def copied(document: Document, id: str) -> Document:
    """The picture saved again as JPEG under another caption: other bytes, the same look."""
    buffer = io.BytesIO()
    with Pillow.open(io.BytesIO(document.images[0].data)) as opened:
        opened.convert("RGB").resize((48, 48)).save(buffer, "JPEG", quality=92)
    image = image_from_bytes(buffer.getvalue(), 10**6)
    assert hashlib.sha256(image.data).hexdigest() == image.sha256 != document.images[0].sha256
    return Document(id, "test", (f"{document.texts[0]}, once more", image), {})


def window(document: Document) -> tuple[list[str], Image]:
    return document.texts, document.images[0]


@pytest.mark.slow
def test_no_leak_in_100_000_contexts_and_the_planted_ones_are_found(shards, tmp_path):
    documents = [replace(pair(i), meta={"cluster": i}) for i in range(N)]
    # Every tenth has a copy in its cluster, as deduplication that keeps near-duplicates would leave them.
    copies = [replace(copied(documents[i], f"copy-{i}"), meta={"cluster": i}) for i in range(0, N, 10)]
    held_out = [pair(i, "eval") for i in range(N, N + 200)]
    leaks = [copied(document, f"leak-{i}") for i, document in enumerate(held_out)]
    train = [*documents, *copies, *leaks]
    shards("train", train)
    shards("eval", held_out)
    build_neighbours({"train": tmp_path / "train"}, CONFIG, tmp_path / "out", 0, block=[tmp_path / "eval"])
    neighbours = Neighbours(tmp_path / "out/train")
    found = neighbours.facts["left_out"]
    assert min(found[reason] for reason in ("self", "same_cluster", "evaluation")) >= 200

    block = BlockList.of(held_out)
    assert block.blocked([window(leak) for leak in leaks]).all()
    is_leak = block.blocked([window(document) for document in train])
    cluster = np.array([document.meta.get("cluster", -1 - i) for i, document in enumerate(train)])
    candidates = [neighbours.candidates(i) for i in range(N)]
    contexts = 0
    for epoch in range(EPOCHS):
        for i in range(N):
            chosen = candidates[i][select(len(candidates[i]), (0, "test", epoch, i), CONFIG)]
            assert i not in chosen and not is_leak[chosen].any() and (cluster[chosen] != cluster[i]).all()
            contexts += 1
    assert contexts == 100_000 and np.mean([len(of) for of in candidates]) >= 4


def test_a_memory_that_is_an_evaluation_set_is_refused(shards, tmp_path):
    shards("train", map(pair, range(8)))
    with pytest.raises(UserError, match="every document of the memory is in the evaluation sets"):
        folder = tmp_path / "train"
        build_neighbours({"train": folder}, RetrievalConfig(), tmp_path / "out", 0, block=[folder])
