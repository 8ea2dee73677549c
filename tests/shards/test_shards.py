import errno
import hashlib
import io
import json
import pickle
import tarfile

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtrain.config import UserError
from mmtrain.documents import Document, Image
from mmtrain.shards import DocumentShards, TokenShards, verify, write_documents, write_tokens
from mmtrain.tokens import TokenDocument, TokenSegment, Vocabulary

VOCABULARY = Vocabulary(text_size=300, image_codes=512, num_sentinels=4)


def picture(data: bytes, extension: str = "png") -> Image:
    return Image(data, 8, 8, hashlib.sha256(data).hexdigest(), extension)


def document(number: int, *segments) -> Document:
    return Document(
        f"doc-{number:05d}", "test", segments or (f"text {number}", picture(bytes([number]) * 7)), {"n": number}
    )


def token_document(number: int, text: int = 3, image: int = 4) -> TokenDocument:
    tokens = [6 + number % 300] * text + [VOCABULARY.brk] + [VOCABULARY.image_start + number % 512] * image
    segments = (TokenSegment("text", 0, text), TokenSegment("image", text + 1, image))
    return TokenDocument(f"doc-{number:05d}", np.array(tokens, VOCABULARY.dtype), segments, {"n": number})


def write(folder, count=10, shard_documents=4):
    return write_tokens(folder, map(token_document, range(count)), VOCABULARY, "t" * 12, "i" * 12, shard_documents)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_documents_come_back_equal_by_index_and_in_order(tmp_path):
    documents = [
        document(0),
        document(1, "é赤\n", picture(b"a", "jpg"), "", picture(b"b" * 999, "webp")),
        document(2, "only text"),
        document(3, picture(b"c"), picture(b"d")),
    ]
    manifest = write_documents(tmp_path, documents, shard_bytes=300)
    shards = DocumentShards(tmp_path)
    assert len(manifest.shards) > 1 and len(shards) == 4
    assert list(shards) == documents and shards[2] == documents[2]
    assert shards.index_of("doc-00003") == 3
    verify(tmp_path)


def test_tokens_are_read_only_views_of_the_file(tmp_path):
    write(tmp_path)
    shards = TokenShards(tmp_path)
    for i in range(10):
        expected = token_document(i)
        tokens = shards.tokens(i)
        assert np.array_equal(tokens, expected.tokens) and tokens.dtype == VOCABULARY.dtype
        assert not tokens.flags.owndata and not tokens.flags.writeable and tokens.ctypes.data % 2 == 0
        assert shards.segments(i) == expected.segments and shards.id(i) == expected.id and shards.meta(i) == {"n": i}
        assert shards.index_of(expected.id) == i
    assert [lengths.tolist() for lengths in shards.lengths()] == [[8] * 4, [8] * 4, [8] * 2]
    assert (shards.manifest.text_tokens, shards.manifest.image_tokens) == (30, 40)
    assert shards.vocabulary == VOCABULARY and len(shards.manifest.shards) == 3
    with pytest.raises(IndexError):
        shards.tokens(10)
    with pytest.raises(KeyError):
        shards.index_of("doc-1")


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, VOCABULARY.sentinel_end - 1), max_size=40), min_size=1, max_size=12),
    st.integers(1, 5),
)
def test_any_ids_round_trip(tmp_path_factory, rows, shard_documents):
    folder = tmp_path_factory.mktemp("tokens")
    documents = [TokenDocument(f"d{n}", np.array(row, VOCABULARY.dtype), (), {}) for n, row in enumerate(rows)]
    write_tokens(folder, documents, VOCABULARY, "t", "i", shard_documents)
    shards = TokenShards(folder)
    assert [shards.tokens(i).tolist() for i in range(len(shards))] == rows
    verify(folder)


def test_plain_webdataset_reads_token_shards(tmp_path):
    write(tmp_path, count=9, shard_documents=4)
    samples = []
    for number in range(3):
        samples += list(webdataset.WebDataset(str(tmp_path / f"shard-{number:06d}.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"doc-{n:05d}" for n in range(9)]
    for number, sample in enumerate(samples):
        assert np.array_equal(np.load(io.BytesIO(sample["npy"])), token_document(number).tokens)
        content = json.loads(sample["json"])
        assert content == {
            "id": f"doc-{number:05d}",
            "segments": [["text", 0, 3], ["image", 4, 4]],
            "meta": {"n": number},
        }


def test_plain_webdataset_reads_document_shards(tmp_path):
    write_documents(tmp_path, [document(n) for n in range(3)])
    samples = list(webdataset.WebDataset(str(tmp_path / "shard-000000.tar"), shardshuffle=False))
    assert [sample["0.png"] for sample in samples] == [bytes([n]) * 7 for n in range(3)]
    content = json.loads(samples[1]["json"])
    assert content["texts"] == ["text 1", None] and content["images"] == [None, "0.png"] and content["source"] == "test"


def test_same_input_gives_the_same_bytes(tmp_path):
    assert write(tmp_path / "a").fingerprint == write(tmp_path / "b").fingerprint
    assert files(tmp_path / "a") == files(tmp_path / "b")
    with tarfile.open(tmp_path / "a" / "shard-000000.tar") as tar:
        assert {(member.mtime, member.uid, member.mode, bool(member.pax_headers)) for member in tar} == {
            (0, 0, 0o644, False)
        }


def test_reader_survives_pickling_to_a_worker(tmp_path):
    write(tmp_path)
    shards = TokenShards(tmp_path)
    shards.tokens(0)
    assert np.array_equal(pickle.loads(pickle.dumps(shards)).tokens(9), token_document(9).tokens)


@pytest.mark.parametrize("name", ["shard-000001.tar", "shard-000002.index.npz"])
def test_truncated_or_missing_file_is_refused_by_name(tmp_path, name):
    write(tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(UserError, match=name):
        TokenShards(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        TokenShards(tmp_path)


@pytest.mark.parametrize("name", ["shard-000001.tar", "shard-000001.index.npz"])
def test_flipped_byte_is_found_by_verify(tmp_path, name):
    write(tmp_path)
    path = tmp_path / name
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=name):
        verify(tmp_path)


def test_verify_compares_counts_with_the_content(tmp_path):
    write(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["shards"][2]["image_tokens"] += 1
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"shard-000002.tar.*image"):
        verify(tmp_path)


def test_folder_without_manifest_or_of_another_version_or_kind_is_refused(tmp_path):
    with pytest.raises(UserError, match="no manifest.json"):
        TokenShards(tmp_path)
    write(tmp_path)
    with pytest.raises(UserError, match="documents shards are needed"):
        DocumentShards(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 9'))
    with pytest.raises(UserError, match="version 9"):
        TokenShards(tmp_path)


def test_manifest_cannot_lead_out_of_the_folder(tmp_path):
    write(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace("shard-000001.tar", "../shard-000001.tar"))
    with pytest.raises(UserError, match="unexpected shard name"):
        TokenShards(tmp_path)


def test_exchanged_vocabulary_is_refused(tmp_path):
    write(tmp_path)
    Vocabulary(301, 512, 4).save(tmp_path / "vocabulary.json")
    with pytest.raises(UserError, match="not the vocabulary"):
        TokenShards(tmp_path)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([document(1), document(1)], "occurs twice"),
        ([Document("a.b", "test", ("x",), {})], "cannot be a shard key"),
        ([Document("../a", "test", ("x",), {})], "cannot be a shard key"),
        ([], "no document"),
    ],
)
def test_bad_documents_are_refused_and_leave_nothing(tmp_path, documents, message):
    with pytest.raises(UserError, match=message):
        write_documents(tmp_path, documents)
    assert files(tmp_path) == {}


def test_full_disk_is_a_user_error_and_leaves_nothing(tmp_path, monkeypatch):
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mmtrain.shards.writer.os.fsync", full)
    with pytest.raises(UserError, match=r"disk is full.*bytes"):
        write(tmp_path)
    assert files(tmp_path) == {}


def test_interrupted_writing_is_invisible_and_cleaned_by_the_next(tmp_path):
    (tmp_path / "shard-000007.tar").write_bytes(b"from a killed writer")
    (tmp_path / ".shard-000008.tar.partial").write_bytes(b"half")
    with pytest.raises(UserError, match="interrupted"):
        TokenShards(tmp_path)
    write(tmp_path)
    assert "shard-000007.tar" not in files(tmp_path) and len(TokenShards(tmp_path)) == 10
    with pytest.raises(UserError, match="already holds shards"):
        write(tmp_path)
