"""Every way to compute attention against a naive float64 one; which tokens of a real batch see which."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmtrain.config import Config, ModelConfig, ObjectiveConfig, RetrievalConfig, StreamConfig, UserError
from mmtrain.config.validate import validate
from mmtrain.documents import Document
from mmtrain.models import Packing, build_model, check_attention, document_mask, document_starts, pack_documents
from mmtrain.models.attention import attend
from mmtrain.models.packing import document_blocks, document_bounds
from mmtrain.objective import unrotate
from mmtrain.retrieval import Neighbours, build_neighbours
from mmtrain.shards import TokenShards, write_documents, write_tokens
from mmtrain.stream import Source, Stream
from tests.stream.conftest import VOCABULARY, token_document

K = 8
PACKINGS = {  # lengths of the documents of each row; 0: padding up to the end
    "one per row": [[20], [20]],
    "several": [[9, 1, 6, 0], [10, 10]],
    "single tokens": [[1] * 20, [19, 0]],
    "a row of padding": [[0], [7, 13]],
    "nothing but padding": [[0], [0]],
}
HEADS = {"every head its own": (3, 3), "grouped": (4, 2), "one for all": (4, 1)}


def documents(rows: list[list[int]], length: int = 20) -> torch.Tensor:
    """(B, S) int32 document ids."""
    ids = torch.full((len(rows), length), -1, dtype=torch.int32)
    for row, lengths in enumerate(rows):
        ends = np.cumsum([0, *lengths])
        for number, n in enumerate(lengths):
            ids[row, ends[number] : ends[number] + n] = number
    return ids


def naive_attention(qkv: np.ndarray, heads: int, document: np.ndarray) -> np.ndarray:
    """(B, S, H, K) float64 by loops, from qkv (B, S, H + 2 G, K); padding is left 0."""
    B, S, _, size = qkv.shape
    kv_heads = (qkv.shape[2] - heads) // 2
    y = np.zeros((B, S, heads, size))
    for b, s, h in np.ndindex(B, S, heads):
        if document[b, s] < 0:
            continue
        seen = [t for t in range(s + 1) if document[b, t] == document[b, s]]
        key = heads + h * kv_heads // heads
        scores = np.exp(qkv[b, seen, key] @ qkv[b, s, h] / math.sqrt(size))
        y[b, s, h] = scores @ qkv[b, seen, key + kv_heads] / scores.sum()
    return y


def random_qkv(document: torch.Tensor, heads: int, kv_heads: int, size: int = K, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*document.shape, heads + 2 * kv_heads, size, generator=generator)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("backend", ["sdpa", "auto", "flex"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_every_backend_is_the_naive_attention(backend: str, packing: str, heads: str) -> None:
    document = documents(PACKINGS[packing])
    qkv = random_qkv(document, *HEADS[heads])
    # flex on a CPU can do the forward pass alone, so pack_documents does not choose it there.
    packed = Packing(blocks=document_blocks(document)) if backend == "flex" else pack_documents(document, backend)
    y = attend(qkv, HEADS[heads][1], packed)
    expected = naive_attention(qkv.double().numpy(), HEADS[heads][0], document.numpy())
    is_token = document.numpy() >= 0
    np.testing.assert_allclose(y.numpy()[is_token], expected[is_token], rtol=1e-5, atol=1e-6)
    assert y.isfinite().all()


def test_auto_lays_short_documents_out_and_masks_long_ones() -> None:
    short, long = documents(PACKINGS["several"]), documents(PACKINGS["single tokens"])
    assert pack_documents(short).mask is None and pack_documents(short).slots is not None
    assert torch.equal(pack_documents(long).mask, document_mask(long))
    assert pack_documents(short, "sdpa").mask is not None
    for backend in ("flex", "varlen"):  # a run of theirs that is looked at on a CPU
        assert pack_documents(short, backend).mask is not None


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("parts", [1, 2])
def test_the_bounds_of_varlen_are_where_documents_begin(packing: str, parts: int) -> None:
    """Of whole batches, and of micro-batches, for which the starts are cut along the rows."""
    document = documents(PACKINGS[packing])
    for rows, starts in zip(document.chunk(parts), document_starts(document).chunk(parts), strict=True):
        bounds = pack_documents(rows, "varlen", starts).bounds
        assert bounds is not None and bounds.dtype == torch.int32
        assert torch.equal(bounds, document_bounds(starts, rows.shape[1]))
        ids = rows.flatten().tolist()
        change = [i for i in range(len(ids)) if i % 20 == 0 or ids[i] != ids[i - 1]]
        assert sorted({*bounds.tolist()}) == [*change, len(ids)]
        assert bounds.diff().min() >= 0


@pytest.mark.parametrize("heads", HEADS)
def test_varlen_gets_its_documents_as_torch_asks_for_them(heads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel needs a GPU (tests/gpu); here stands what its documentation says it computes."""

    def stand_in(q, k, v, bounds_q, bounds_k, max_q, max_k, *, window_size):
        assert q.shape == k.shape == v.shape and window_size == (-1, 0) and torch.equal(bounds_q, bounds_k)
        y = torch.zeros_like(q)
        for first, last in zip(bounds_q.tolist(), bounds_q.tolist()[1:], strict=False):
            assert last - first <= min(max_q, max_k)
            parts = (x[first:last].transpose(0, 1) for x in (q, k, v))
            y[first:last] = F.scaled_dot_product_attention(*parts, is_causal=True).transpose(0, 1)
        return y

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    document = documents(PACKINGS["several"])
    qkv = random_qkv(document, *HEADS[heads])
    y = attend(qkv, HEADS[heads][1], pack_documents(document, "varlen", document_starts(document)))
    expected = naive_attention(qkv.double().numpy(), HEADS[heads][0], document.numpy())
    is_token = document.numpy() >= 0
    np.testing.assert_allclose(y.numpy()[is_token], expected[is_token], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_lets_no_document_see_another_bit_for_bit() -> None:
    document = documents(PACKINGS["several"])
    packing, qkv = Packing(blocks=document_blocks(document)), random_qkv(document, 4, 2)
    before = attend(qkv, 2, packing)
    inside = torch.zeros_like(document, dtype=torch.bool)
    inside[0, 10:16] = True
    changed = torch.where(inside[:, :, None, None], qkv, qkv + 1)
    after = attend(changed, 2, packing)
    assert torch.equal(after[inside], before[inside]) and not torch.equal(after, before)


def test_retrieved_documents_and_their_query_see_each_other_and_no_one_else(tmp_path: Path) -> None:
    """In a batch of the stream: logits of the query change with its retrieved documents, those of others do not."""
    count = 12
    pictures = RetrievalConfig(num_candidates=2, num_documents=2, policy="fixed", max_score=1.0)
    write_documents(tmp_path / "d", (Document(f"a-{i:05d}", "test", (f"word {i % 3}",), {}) for i in range(count)))
    build_neighbours({"train": tmp_path / "d"}, pictures, tmp_path / "n", seed=0)
    write_tokens(tmp_path / "t", (token_document(i, "a", 4, 16) for i in range(count)), VOCABULARY, "t" * 12, "i" * 12)
    tokens = TokenShards(tmp_path / "t")
    source = Source("a", tokens, neighbours=Neighbours(tmp_path / "n" / "train"), memory=tokens)
    settings = StreamConfig(sequence_length=192, global_batch=2, lanes=2)
    batch = Stream([source], VOCABULARY, settings, ObjectiveConfig(masks="none"), pictures, seed=0).batch(0)

    row, document = batch["tokens"][0], batch["document"][0]
    assert (document == 1).any()
    first = torch.nonzero(document == 0).flatten()
    parts = np.split(first.numpy(), np.flatnonzero(row[first].numpy() == VOCABULARY.brk))
    assert len(unrotate(row[first].numpy(), VOCABULARY)) == len(first) and len(parts) >= 6  # three pairs
    retrieved, query = first[:20], first[-16:]

    model = build_model(ModelConfig(layers=1, init_std=0.1, zero_init_outputs=False), VOCABULARY.size, 192)
    model.initialize(0)
    names = ("tokens", "document", "position", "cell")

    def logits_with(places: torch.Tensor) -> torch.Tensor:
        changed = batch["tokens"].clone()
        changed[0, places] = (changed[0, places] + 1) % VOCABULARY.size
        return model.logits(changed, *(batch[name] for name in names[1:]))[0]

    before = logits_with(first[:0])
    assert (logits_with(retrieved)[query] != before[query]).any(-1).all()
    assert torch.equal(logits_with(first)[document == 1], before[document == 1])
    assert torch.equal(logits_with(torch.nonzero(document == 1).flatten())[first], before[first])


@pytest.mark.parametrize(
    ("changes", "dtype", "sentence"),
    [
        ({"attention": "varlen"}, "fp32", "varlen computes in bf16"),
        ({"attention": "varlen", "width": 60, "heads": 5}, "bf16", "multiple of 8"),
        ({"attention": "flex", "width": 64, "heads": 8}, "bf16", "at least 16 channels"),
        ({"family": "chameleon", "norm_after": True, "dropout": 0.1}, "bf16", "do not mix"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(changes: dict, dtype: str, sentence: str) -> None:
    config = Config(model=ModelConfig(**changes))
    config.engine.dtype = dtype
    with pytest.raises(UserError, match=sentence):
        validate(config)


@pytest.mark.parametrize("backend", ["flex", "varlen"])
def test_a_backend_that_cannot_train_here_is_refused(backend: str) -> None:
    with pytest.raises(UserError, match=f"attention={backend} trains on CUDA alone"):
        check_attention(backend, torch.device("cpu"))
    check_attention("auto", torch.device("cpu"))
    check_attention("sdpa", torch.device("cpu"))
