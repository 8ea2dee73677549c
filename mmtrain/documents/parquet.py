"""Parquet tables of documents. The columns say which of these layouts a file has:

- OBELICS, OmniCorpus: `texts` and `images`, aligned lists of strings, one of the two null at each position. An image
  is a URL; the picture lies in corpus.image_folder under metadata[i].img_url_sha (OmniCorpus) or the SHA-256 of
  the URL. Text is cut where OBELICS has END_OF_DOCUMENT_TOKEN_TO_BE_REPLACED: a row makes several documents.
- `texts` and `images` the same way, with the pictures inside: Hugging Face's {bytes, path}, or binary.
- `image` ({bytes, path} or binary) with `text`, `caption`, `txt` or `captions`, the first that is there (a list: one
  document per caption), or with none of them: pictures alone.
- `text` and no picture column: texts alone.

Pictures are never read from the `path` of a table. Rows are decoded one at a time from a buffered stream.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import LocalFileSystem

from mmtrain.config import UserError
from mmtrain.documents.captioned import id_of_path, largest_picture_bytes
from mmtrain.documents.corpus import Account, Corpus, Partition, printable
from mmtrain.documents.document import Document
from mmtrain.documents.files import PictureFolder, file_path, list_files
from mmtrain.documents.interleaved import LARGEST_DOCUMENT_BYTES, TOO_LARGE, Picture, interleaved_document
from mmtrain.documents.record import LARGEST_TEXT_BYTES, BadRecord, aligned, parse_object

HOW = "set corpus.path to a folder of .parquet files, or to one of them"
DAMAGED = "damaged parquet file"
CUT = "END_OF_DOCUMENT_TOKEN_TO_BE_REPLACED"
TEXT_COLUMNS = ("text", "caption", "txt", "captions")
UNDERSTOOD = (
    "texts and images (lists of strings, or images of {bytes, path} or binary), image ({bytes, path} or binary) with "
    f"or without {', '.join(TEXT_COLUMNS[:-1])} or {TEXT_COLUMNS[-1]}, and text without a column of pictures"
)
# What pyarrow raises for damaged files; ValueError for names that are not UTF-8.
ERRORS = (pa.ArrowException, OSError, ValueError)
# A partition ends with the row group that reaches one of these.
PARTITION_ROWS = 8192
PARTITION_BYTES = 2**28
BUFFER_BYTES = 2**20
# Entries of one list: a null takes a bit in the file and a pointer here.
LARGEST_LIST = 100_000

# A text, or a picture that is not read yet.
Part = str | Callable[[], Picture]


@dataclass(frozen=True)
class _Layout:
    """pictures: where they are, "folder", "lists", "column" or "nowhere". texts: the column with text, or None."""

    pictures: str
    texts: str | None


class Parquet(Corpus):
    """Documents in the order of the files' names and then of their rows. Columns that no layout names are not read.

    meta: path (FILE:ROW GROUP:ROW), and the url of the row or of its general_metadata. Of a row group that cannot
    be read to its end every row that did not come is counted; the row groups behind it are read.
    """

    def partitions(self, account: Account) -> list[Partition]:
        PictureFolder(self.config)
        partitions: list[Partition] = []
        for name in list_files(self.config, (".parquet",), HOW, account):
            try:
                with _open(file_path(self.config, name)) as file:
                    schema = file.schema_arrow
                    groups = [file.metadata.row_group(index) for index in range(file.num_row_groups)]
                    sizes = [(max(0, group.num_rows), group.total_byte_size) for group in groups]
                    num_rows = file.metadata.num_rows
            except ERRORS as error:
                account.spoil(DAMAGED, f"{name}, {_first_line(error)}")
                continue
            if _find_layout(schema, name).pictures == "folder" and not self.config.image_folder:
                raise UserError(f"{name} holds URLs; set corpus.image_folder to the folder of downloaded pictures.")
            if num_missing := num_rows - sum(rows for rows, _ in sizes):
                account.spoil(DAMAGED, f"{name}, its footer counts {num_rows} rows in all", abs(num_missing))
            partitions += ({"file": name, **span} for span in _spans(sizes))
        return partitions

    def documents(self, partition: Partition, account: Account) -> Iterator[Document]:
        name = partition["file"]
        folder = PictureFolder(self.config)
        try:
            file = _open(file_path(self.config, name))
            layout = _find_layout(file.schema_arrow, name)
        except ERRORS as error:
            account.spoil(DAMAGED, f"{name}, {_first_line(error)}", partition["rows"])
            return
        with file:
            for group in range(partition["start"], partition["stop"]):
                for index, row in enumerate(_rows(file, group, layout, name, account)):
                    path = f"{name}:{group}:{index}"
                    document_id = f"parquet-{id_of_path(name)}-{group}-{index}"
                    try:
                        meta = {"path": printable(path), **_url(row)}
                        if layout.pictures == "column":
                            yield from self._captioned(row, layout, document_id, meta, account)
                        else:
                            yield from self._interleaved(row, layout, document_id, meta, folder, account)
                    except BadRecord as error:
                        account.spoil(str(error), path)

    def _captioned(
        self, row: pa.RecordBatch, layout: _Layout, document_id: str, meta: dict[str, Any], account: Account
    ) -> Iterator[Document]:
        """One document per caption, the picture behind it; of a row with a bad picture none. Raises BadRecord."""
        captions: list[str] | None = None
        if layout.texts is not None:
            cell = _cell(row, layout.texts)
            found = cell if isinstance(cell, list) else [cell]
            captions = [caption.strip() for caption in found if isinstance(caption, str) and caption.strip()]
            if not captions:
                raise BadRecord("no caption")
            if len(captions) < len(found):
                account.spoil("no caption", meta["path"], len(found) - len(captions))
        picture = self._inside(meta["path"], _cell(row, "image", LARGEST_DOCUMENT_BYTES))
        alone = interleaved_document(document_id, self.config.name, [picture], meta, self.config, account)
        if alone is None:
            return
        if captions is None:
            yield alone
            return
        for number, caption in enumerate(captions):
            yield Document(f"{document_id}-{number}", alone.source, (caption, *alone.segments), alone.meta)

    def _interleaved(
        self,
        row: pa.RecordBatch,
        layout: _Layout,
        document_id: str,
        meta: dict[str, Any],
        folder: PictureFolder,
        account: Account,
    ) -> Iterator[Document]:
        """The documents of a row, cut where OBELICS says. Raises BadRecord before the first of them."""
        documents: list[list[Part]] = [[]]
        for part in self._parts(row, layout, meta["path"], folder):
            if isinstance(part, str):
                before, *others = part.split(CUT)
                documents[-1].append(before)
                documents += ([other] for other in others)
            else:
                documents[-1].append(part)
        # A cut at the start or the end leaves nothing there; a row of nothing is counted as one empty document.
        documents = [parts for parts in documents if any(callable(part) or part.strip() for part in parts)] or [[]]
        for number, parts in enumerate(documents):
            numbered = f"{document_id}-{number}" if len(documents) > 1 else document_id
            loaded = (part if isinstance(part, str) else part() for part in parts)
            document = interleaved_document(numbered, self.config.name, loaded, meta, self.config, account)
            if document:
                yield document

    def _parts(self, row: pa.RecordBatch, layout: _Layout, path: str, folder: PictureFolder) -> list[Part]:
        """The texts and pictures of a row in reading order. Raises BadRecord."""
        assert layout.texts is not None
        texts = _cell(row, layout.texts)
        if layout.pictures == "nowhere":
            if texts is None:
                raise BadRecord("no text")
            return [texts]
        images = _cell(row, "images", LARGEST_DOCUMENT_BYTES)
        positions = aligned(texts, images)
        stems = _stems(row, [image for _, image in positions]) if layout.pictures == "folder" else []
        parts: list[Part] = []
        for index, (text, image) in enumerate(positions):
            label = f"{path}, image {index}"
            if text is not None:
                parts.append(text)
            elif stems:
                parts.append(partial(folder.picture, label, stems[index], str(image)))
            else:
                parts.append(partial(self._inside, label, image))
        return parts

    def _inside(self, label: str, image: Any) -> Picture:
        """A picture of the table: {"bytes": ..., "path": ...}, bytes, or None."""
        data = image.get("bytes") if isinstance(image, dict) else image
        if data is not None and len(data) > largest_picture_bytes(self.config.max_pixels):
            return Picture(label, None, TOO_LARGE)
        path = image.get("path") if isinstance(image, dict) else None
        return Picture(label, data, url=path if isinstance(path, str) else "")


def _open(path: Path) -> pq.ParquetFile:
    # pyarrow takes some relative names for addresses. Without pre_buffer a row group is read in pieces.
    return pq.ParquetFile(
        str(path.absolute()),
        filesystem=LocalFileSystem(),
        buffer_size=BUFFER_BYTES,
        pre_buffer=False,
        page_checksum_verification=True,
    )


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _kind(type_: pa.DataType) -> str:
    """ "text", "picture", either with an "s" for a list of them, or "" for anything else."""
    if pa.types.is_dictionary(type_):
        return _kind(type_.value_type)
    if pa.types.is_list(type_) or pa.types.is_large_list(type_):
        kind = _kind(type_.value_type)
        return f"{kind}s" if kind in ("text", "picture") else ""
    if pa.types.is_string(type_) or pa.types.is_large_string(type_):
        return "text"
    if pa.types.is_struct(type_):
        index = type_.get_field_index("bytes")
        return "picture" if index >= 0 and _kind(type_.field(index).type) == "picture" else ""
    return "picture" if pa.types.is_binary(type_) or pa.types.is_large_binary(type_) else ""


def _find_layout(schema: pa.Schema, name: str) -> _Layout:
    """The layout of a table; `name` is that of its file. Raises UserError where there is none."""
    kinds = {field.name: _kind(field.type) for field in schema if len(schema.get_all_field_indices(field.name)) == 1}
    if kinds.get("texts") == "texts" and kinds.get("images") in ("texts", "pictures"):
        return _Layout("folder" if kinds["images"] == "texts" else "lists", "texts")
    texts = next((column for column in TEXT_COLUMNS if column in schema.names), None)
    if kinds.get("image") == "picture" and (texts is None or kinds.get(texts) in ("text", "texts")):
        return _Layout("column", texts)
    if kinds.get("text") == "text" and "image" not in schema.names and "images" not in schema.names:
        return _Layout("nowhere", "text")
    columns = printable(", ".join(schema.names[:50]))
    raise UserError(f"{name} has the columns {columns}, which are no known layout; understood are {UNDERSTOOD}.")


def _spans(sizes: list[tuple[int, int]]) -> Iterator[dict[str, int]]:
    """Row groups of (rows, bytes) each, cut into partitions: the first, the one behind the last, how many rows."""
    start = num_rows = num_bytes = 0
    for stop, size in enumerate(sizes, start=1):
        num_rows += size[0]
        num_bytes += size[1]
        if num_rows >= PARTITION_ROWS or num_bytes >= PARTITION_BYTES or stop == len(sizes):
            yield {"start": start, "stop": stop, "rows": num_rows}
            start, num_rows, num_bytes = stop, 0, 0


def _is_needed(path: str, layout: _Layout) -> bool:
    """Whether to read a leaf of the table, such as "metadata.list.element.img_url_sha"."""
    root, *_ = path.split(".")
    return (
        root in ("image" if layout.pictures == "column" else "images", layout.texts)
        or path in ("url", "general_metadata", "general_metadata.url")
        or (root == "metadata" and path.endswith(".img_url_sha"))
    )


def _rows(file: pq.ParquetFile, group: int, layout: _Layout, name: str, account: Account) -> Iterator[pa.RecordBatch]:
    """The rows of a row group, tables of one row: a stranger's row may be as large as many honest ones."""
    num_promised = file.metadata.row_group(group).num_rows
    num_read = 0
    problem = "fewer than its footer says"
    try:
        paths = (file.schema.column(index).path for index in range(len(file.schema)))
        columns = [path for path in paths if _is_needed(path, layout)]
        for row in file.iter_batches(batch_size=1, row_groups=[group], columns=columns, use_threads=False):
            yield row
            num_read += 1
    except ERRORS as error:
        problem = _first_line(error)
    if num_read < num_promised:
        account.spoil(DAMAGED, f"{name}:{group}:{num_read}, {problem}", num_promised - num_read)


def _cell(row: pa.RecordBatch, column: str, largest_bytes: int = LARGEST_TEXT_BYTES) -> Any:
    """The Python value of a column. Raises BadRecord."""
    cell = row.column(column)
    if cell.nbytes > largest_bytes or (
        isinstance(cell[0], pa.ListScalar) and cell[0].is_valid and len(cell[0].values) > LARGEST_LIST
    ):
        raise BadRecord("cell too large")
    try:
        return cell[0].as_py()
    except UnicodeDecodeError:
        raise BadRecord("text is not UTF-8") from None


def _url(row: pa.RecordBatch) -> dict[str, str]:
    """{"url": ...} of the document where the table has it as text."""
    names = row.schema.names
    url = _cell(row, "url") if names.count("url") == 1 else None
    if url is None and "general_metadata" in names:
        facts = _cell(row, "general_metadata")
        if isinstance(facts, str):
            facts = parse_object(facts.encode())
        url = facts.get("url") if isinstance(facts, dict) else None
    return {"url": printable(url)} if isinstance(url, str) else {}


def _stems(row: pa.RecordBatch, urls: list[str | None]) -> list[list[str]]:
    """Per URL what the file of its picture may be called: OmniCorpus's img_url_sha, the SHA-256 of the URL."""
    facts = _cell(row, "metadata") if "metadata" in row.schema.names else None
    if not isinstance(facts, list) or len(facts) != len(urls):
        facts = [None] * len(urls)
    named = [fact.get("img_url_sha") if isinstance(fact, dict) else None for fact in facts]
    hashed = [hashlib.sha256(url.encode()).hexdigest() if url is not None else None for url in urls]
    return [[stem for stem in stems if isinstance(stem, str)] for stems in zip(named, hashed, strict=True)]
