"""Parquet tables: every layout, every row a document or counted, and no damage that ends the reading."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmtrain.config import CorpusConfig, UserError
from mmtrain.documents import Document, encode_png
from mmtrain.documents.corpus import Account
from mmtrain.documents.parquet import Parquet
from tests.documents.conftest import shape

CUT = "END_OF_DOCUMENT_TOKEN_TO_BE_REPLACED"


def png(number: int) -> bytes:
    return encode_png(np.full((4, 4, 3), number, dtype=np.uint8))


def url(number: int) -> str:
    return f"https://example.org/{number}.jpg"


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures 0 to 9 under the hash of their URL, with and without a suffix."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(10):
        (folder / f"{sha256(url(number))}{('', '.png', '.jpg', '.jpeg', '.webp')[number % 5]}").write_bytes(png(number))
    return folder


def write(path: Path, columns: dict | pa.Table, **options) -> Path:
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), path, **options)
    return path


def read(path: Path, folder: Path | None = None, **options) -> tuple[list[Document], Account]:
    config = CorpusConfig(name="table", kind="parquet", path=str(path), image_folder=folder and str(folder), **options)
    account = Account(config.on_bad)
    corpus = Parquet(config, Path())
    partitions = json.loads(json.dumps(corpus.partitions(account)))
    documents = [document for part in partitions for document in corpus.documents(part, account)]
    assert len({document.id for document in documents}) == len(documents)
    return documents, account


def test_obelics(tmp_path, folder):
    table = {
        "images": [[url(1), None, url(2)], [None, url(3)], [None], [url(1), url(99)]],
        "texts": [[None, "one", None], [f"before\n\n{CUT}\n\nafter", None], [f"{CUT}\n\nonly"], [None, None]],
        "metadata": [json.dumps([None])] * 4,
        "general_metadata": [json.dumps({"url": f"https://{n}", "warc": "x"}) for n in range(3)] + [None],
    }
    documents, account = read(write(tmp_path / "a.parquet", table), folder)
    assert [shape(document) for document in documents] == [[1, "one", 2], ["before"], ["after", 3], ["only"], [1]]
    hashed = sha256("a.parquet")[:16]
    assert [document.id for document in documents] == [
        f"parquet-{hashed}-{end}" for end in ("0-0", "0-1-0", "0-1-1", "0-2", "0-3")
    ]
    found = {"path": "a.parquet:0:1", "url": "https://1", "pictures": ["https://example.org/3.jpg"]}
    assert documents[2].meta == found and documents[0].source == "table"
    assert account.skipped == {"picture that was not downloaded": 1} and not account.bad
    assert account.examples["picture that was not downloaded"] == "a.parquet:0:3, image 1"
    assert documents == read(tmp_path / "a.parquet", folder)[0]


def test_omnicorpus(tmp_path, folder):
    (folder / ("e" * 64 + ".webp")).write_bytes(png(200))
    facts = {"width": 3, "aesthetic_prob": 0.5, "img_url_sha": "e" * 64}
    table = {
        "general_metadata": [{"url": "https://a", "domain": ["a", "b"], "toxic_prob": 0.1}] * 3,
        "images": pa.array([[None, url(1)], [url(2)], [url(3)]], pa.large_list(pa.large_string())),
        "texts": [["words", None], [None], [None]],
        "metadata": [[None, facts], [{**facts, "img_url_sha": "../" + "e" * 64}], []],
    }
    documents, account = read(write(tmp_path / "a.parquet", table), folder)
    assert [shape(document) for document in documents] == [["words", 200], [2], [3]]
    assert documents[0].meta["url"] == "https://a" and not account.summary()


@pytest.mark.parametrize("make", [lambda n: {"bytes": png(n), "path": "../a.png"}, png])
@pytest.mark.parametrize("column", ["text", "caption", "txt", "captions", None])
def test_a_picture_column_with_and_without_texts(tmp_path, make, column):
    table = {"image": [make(1), make(2), None], **({column: [" one ", "two", "three"]} if column else {})}
    documents, account = read(write(tmp_path / "a.parquet", {**table, "label": [1, 2, 3]}))
    assert [shape(document) for document in documents] == ([["one", 1], ["two", 2]] if column else [[1], [2]])
    assert account.bad == {"missing picture": 1} and account.skipped == {"empty document": 1}


def test_captions_in_a_list_are_a_document_each(tmp_path):
    captions = [["a", "b"], [], None, ["c", None, " "], ["d", "e"]]
    images = [{"bytes": png(n), "path": None} for n in range(4)] + [{"bytes": b"GIF89a", "path": None}]
    documents, account = read(write(tmp_path / "a.parquet", {"image": images, "captions": captions}))
    assert [shape(document) for document in documents] == [["a", 0], ["b", 0], ["c", 3]]
    assert account.bad == {"no caption": 4, "not a PNG, JPEG or WebP picture": 1}


def test_pictures_inside_interleaved_lists(tmp_path):
    table = {"texts": [["one", None], [None, None]], "images": [[None, {"bytes": png(1)}], [{"bytes": png(2)}] * 2]}
    documents, account = read(write(tmp_path / "a.parquet", table))
    assert [shape(document) for document in documents] == [["one", 1], [2, 2]] and not account.summary()
    table["images"] = [[None, png(1)], [png(2), bytes(2**20 + 801)]]
    documents, account = read(write(tmp_path / "a.parquet", table), on_bad="skip", max_pixels=100)
    assert [shape(document) for document in documents] == [["one", 1]]
    assert account.bad == {"picture of too many bytes": 1}
    assert account.skipped == {"document with a bad picture": 1}


def test_texts_alone(tmp_path):
    text = pa.array(["one", None, " ", "two"]).dictionary_encode()
    documents, account = read(write(tmp_path / "a.parquet", {"text": text, "url": ["https://a", None, None, "x"]}))
    assert [shape(document) for document in documents] == [["one"], ["two"]]
    assert documents[0].meta["url"] == "https://a"
    assert account.bad == {"no text": 1} and account.skipped == {"empty document": 1}


def test_rows_that_make_no_document_are_counted(tmp_path, folder, monkeypatch):
    monkeypatch.setattr("mmtrain.documents.parquet.LARGEST_LIST", 1000)
    large = [[b"x" * (2**24 + 1)], [b""] * 1001]
    not_utf8 = pa.array([[b"ok"], [b"\xff"], [b"a"] * 3, None, [b"a", None], [None], *large])
    values = not_utf8.values.view(pa.string())
    texts = pa.ListArray.from_arrays(not_utf8.offsets, values, mask=not_utf8.is_null())
    images = [[None], [None], [None], None, [None, None], [None], [None], [None] * 1001]
    table = pa.table({"texts": texts, "images": pa.array(images, pa.list_(pa.string()))})
    documents, account = read(write(tmp_path / "a.parquet", table), folder)
    assert [shape(document) for document in documents] == [["ok"]]
    assert account.bad == {
        "text is not UTF-8": 1,
        "texts and images are not aligned": 3,
        "neither texts nor images": 1,
        "cell too large": 2,
    }


@pytest.mark.parametrize(
    "table",
    [
        {"a": [1], "b": ["x"]},
        {"image": ["https://a"], "text": ["x"]},
        {"image": [b"x"], "text": [3]},
        {"images": [["a"]], "text": ["x"]},
        {"images": [[3]], "texts": [["x"]]},
        {"text": [["x"]]},
        pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]),
    ],
)
def test_a_table_of_no_known_layout_is_one_sentence(tmp_path, table):
    path = write(tmp_path / "a.parquet", table)
    names = ", ".join(table if isinstance(table, dict) else table.column_names)
    with pytest.raises(UserError, match=f"^a.parquet has the columns {names}, .* understood are texts and images"):
        read(path)


def test_urls_need_the_folder_of_pictures(tmp_path):
    with pytest.raises(UserError, match="set corpus.image_folder"):
        read(write(tmp_path / "a.parquet", {"images": [["u"]], "texts": pa.array([[None]], pa.list_(pa.string()))}))


def test_a_partition_is_a_range_of_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr("mmtrain.documents.parquet.PARTITION_ROWS", 20)
    texts = [f"text {n}" for n in range(95)]
    path = write(tmp_path / "a.parquet", {"text": texts}, row_group_size=10)
    parts = Parquet(CorpusConfig(path=str(path)), Path()).partitions(Account())
    assert [(part["start"], part["stop"], part["rows"]) for part in parts] == [
        (0, 2, 20), (2, 4, 20), (4, 6, 20), (6, 8, 20), (8, 10, 15),
    ]  # fmt: skip
    assert [document.texts[0] for document in read(path)[0]] == texts
    monkeypatch.setattr("mmtrain.documents.parquet.PARTITION_BYTES", 1)
    assert len(Parquet(CorpusConfig(path=str(path)), Path()).partitions(Account())) == 10


def table_of(num_rows: int) -> dict:
    numbers = range(num_rows)
    return {"image": [{"bytes": png(n), "path": None} for n in numbers], "text": [f"t{n}" for n in numbers]}


def test_a_damaged_row_group_costs_its_own_rows(tmp_path):
    options = {"row_group_size": 10, "write_page_checksum": True, "use_dictionary": False}
    path = write(tmp_path / "a.parquet", table_of(40), **options)
    group = pq.read_metadata(path).row_group(1).column(2)
    content = bytearray(path.read_bytes())
    content[group.data_page_offset + group.total_compressed_size - 2] ^= 0xFF
    path.write_bytes(content)
    documents, account = read(path)
    assert [d.texts[0] for d in documents] == [f"t{n}" for n in (*range(10), *range(20, 40))]
    assert account.bad == {"damaged parquet file": 10}
    assert account.examples["damaged parquet file"].startswith("a.parquet:1:0, ")


def test_damage_anywhere_is_counted_and_never_a_crash(tmp_path):
    path = write(tmp_path / "a.parquet", table_of(12), row_group_size=4, write_page_checksum=True)
    content = path.read_bytes()
    for cut in range(0, len(content), 61):
        path.write_bytes(content[:cut])
        documents, account = read(path)
        assert not documents and account.bad == {"damaged parquet file": 1}
    for place in range(0, len(content), 7):
        flipped = bytearray(content)
        flipped[place] ^= 0xFF
        path.write_bytes(flipped)
        try:
            documents, account = read(path)
        except UserError as error:  # a column of another name
            assert "has the columns" in str(error) and "\n" not in str(error)
        else:
            assert len(documents) == 12 or account.bad


def test_a_footer_that_counts_too_few_rows_is_noticed(tmp_path):
    options = {"row_group_size": 4, "store_schema": False, "write_statistics": False}
    path = write(tmp_path / "a.parquet", {"text": [f"t{n}" for n in range(12)]}, **options)
    content = path.read_bytes()
    problems = set()
    for place in range(len(content) - 8 - int.from_bytes(content[-8:-4], "little"), len(content) - 8):
        changed = bytearray(content)
        changed[place] = (changed[place] - 2) % 256  # one less in the numbers of the format
        path.write_bytes(changed)
        try:
            documents, account = read(path)
        except UserError:
            continue
        assert len(documents) == 12 or account.bad
        problems.add(account.examples.get("damaged parquet file", "").partition(", ")[2])
    assert "its footer counts 11 rows in all" in problems and "its footer counts 12 rows in all" in problems


def test_a_file_that_breaks_after_its_rows_were_counted(tmp_path):
    path = write(tmp_path / "a.parquet", table_of(5))
    corpus = Parquet(CorpusConfig(path=str(path)), Path())
    partitions = corpus.partitions(Account())
    path.write_bytes(path.read_bytes()[:-1])
    assert not list(corpus.documents(partitions[0], account := Account()))
    assert account.bad == {"damaged parquet file": 5}


def test_names_are_never_taken_for_addresses(tmp_path, monkeypatch):
    (tmp_path / "s3:").mkdir()
    with open(tmp_path / "s3:" / "b%20 #?\u00e9.parquet", "wb") as file:
        pq.write_table(pa.table({"text": ["a"]}), file)
    monkeypatch.chdir(tmp_path)
    documents, account = read(Path("s3:"))
    assert len(documents) == 1 and not account.summary()
