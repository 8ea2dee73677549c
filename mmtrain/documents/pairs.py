"""A user's own captioned pictures: a folder with NAME.txt beside each picture, or a captions .jsonl or .csv.

Table columns are image and caption, or file_name and text as in Hugging Face's imagefolder metadata; paths in
it are relative to the table and may not leave its folder.
"""

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mmtrain.config import UserError
from mmtrain.documents.captioned import (
    LARGEST_CAPTION_BYTES,
    PICTURE_SUFFIXES,
    BadSample,
    Caption,
    CaptionedPicture,
    captioned_documents,
    decode_caption,
    files_below,
    id_of_path,
    named_again,
    picture_partitions,
    read_file,
    relative_name,
)
from mmtrain.documents.corpus import Account, Corpus, Partition
from mmtrain.documents.document import Document, Image
from mmtrain.documents.images import image_from_bytes

TABLES_IN_FOLDER = ("captions.jsonl", "captions.csv", "metadata.jsonl", "metadata.csv")
IMAGE_COLUMNS = ("image", "file_name")
CAPTION_COLUMNS = ("caption", "text")
HOW = "set corpus.path to a folder of pictures with NAME.txt beside each NAME.png, or to a captions .jsonl or .csv"


class Pairs(Corpus):
    """One document per picture and caption; the pictures' bytes are kept as they are. meta: path.

    Bad: unreadable, truncated or huge pictures; missing, empty or undecodable captions; paths that leave the folder.
    A partition holds pictures with their captions, or null for one whose caption is in the .txt beside it.
    """

    def partitions(self, account: Account) -> list[Partition]:
        """Some hundred pictures each. Raises UserError for a missing or empty folder or table."""
        table = self._table()
        if table:
            captions_of: dict[str, Any] = _read_table(table, account)
        else:
            captions_of = dict.fromkeys(_captioned_names(self._root(), account))
        if not captions_of and not account.bad:
            what = "lists no pictures" if table else f"holds no pictures ({', '.join(PICTURE_SUFFIXES)})"
            raise UserError(f"corpus.path={self.config.path} {what}; {HOW}.")
        return picture_partitions(captions_of)

    def documents(self, partition: Partition, account: Account) -> Iterator[Document]:
        """Caption, then picture."""

        def prepare(data: bytes, name: str) -> tuple[Image, dict[str, Any]]:
            return image_from_bytes(data, self.config.max_pixels), {}

        root = self._root()
        pictures = self._pictures(partition, root, account)
        yield from captioned_documents(pictures, root, prepare, self.config, account)

    def _pictures(self, partition: Partition, root: Path, account: Account) -> Iterator[CaptionedPicture]:
        """Ids: hash of the path, then -2, -3, ... for further captions (COCO has five)."""
        for stored, captions in partition["pictures"]:
            name = named_again(stored)
            try:
                texts = [_read_caption(root, name)] if captions is None else captions
            except BadSample as error:
                account.spoil(error.reason, name)
                continue
            first_id = f"pairs-{id_of_path(name)}"
            ids = [first_id, *(f"{first_id}-{number}" for number in range(2, len(texts) + 1))]
            yield CaptionedPicture(name, tuple(Caption(text, id, {}) for text, id in zip(texts, ids, strict=True)))

    def _table(self) -> Path | None:
        """The .jsonl or .csv, None for a folder without one. Raises UserError."""
        if not self.config.path:
            raise UserError(f"corpus pairs has no corpus.path; {HOW}.")
        path = Path(self.config.path)
        if path.is_dir():
            return next((path / name for name in TABLES_IN_FOLDER if (path / name).is_file()), None)
        if not path.exists():
            raise UserError(f"corpus.path={path} does not exist; {HOW}.")
        if path.suffix.lower() not in (".jsonl", ".csv"):
            raise UserError(f"corpus.path={path} is neither a folder nor a .jsonl or .csv file; {HOW}.")
        return path

    def _root(self) -> Path:
        """The folder that names are relative to."""
        path = Path(str(self.config.path))
        return path if path.is_dir() else path.parent


def _captioned_names(root: Path, account: Account) -> list[str]:
    """Names of the pictures that have a .txt beside them."""
    names = list(files_below(root, (*PICTURE_SUFFIXES, ".txt"), account))
    texts = {name for name in names if name.endswith(".txt")}
    pictures = [name for name in names if name.lower().endswith(PICTURE_SUFFIXES)]
    for name in sorted(texts - {_caption_name(name) for name in pictures}):
        account.skip("no picture beside it", name)
    for name in pictures:
        if _caption_name(name) not in texts:
            account.spoil("no .txt beside it", name)
    return [name for name in pictures if _caption_name(name) in texts]


def _caption_name(name: str) -> str:
    return PurePosixPath(name).with_suffix(".txt").as_posix()


def _read_caption(root: Path, name: str) -> str:
    return decode_caption(read_file(root, _caption_name(name), LARGEST_CAPTION_BYTES, "caption too long"))


def _jsonl_rows(table: Path, account: Account) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(table, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                yield number, row
            else:
                account.spoil("line is no JSON object", f"{table.name}:{number}")


def _csv_rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(table, encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        columns = rows.fieldnames or ()
        for allowed in (IMAGE_COLUMNS, CAPTION_COLUMNS):
            if not set(allowed) & set(columns):
                raise UserError(f"{table} has no column {' or '.join(allowed)} in its first line: {list(columns)}.")
        for row in rows:
            yield rows.line_num, row


def _name_in(table: Path, name: str) -> str:
    """One spelling per file, so that "./a.png" and "a.png" are one picture. Raises BadSample.

    Where links lead is looked at when the picture is opened.
    """
    relative = relative_name(table.parent / name, table.parent)
    try:
        os.fsencode(relative)
    except UnicodeEncodeError:  # a lone surrogate from a JSON escape
        raise BadSample("no name of a file") from None
    if relative.split("/")[0] == "..":
        raise BadSample("path leaves the folder")
    return relative


def _caption_of_row(text: str) -> str:
    # A lone surrogate from a JSON escape cannot be stored as UTF-8.
    data = text.encode("utf-8", "replace")
    if len(data) > LARGEST_CAPTION_BYTES:
        raise BadSample("caption too long")
    return decode_caption(data)


def _read_table(table: Path, account: Account) -> dict[str, list[str]]:
    """Name -> captions of all good rows."""
    captions_of: dict[str, list[str]] = {}
    rows = _csv_rows(table) if table.suffix.lower() == ".csv" else _jsonl_rows(table, account)
    try:
        for number, row in rows:
            name = next((row[key] for key in IMAGE_COLUMNS if row.get(key)), None)
            text = next((row[key] for key in CAPTION_COLUMNS if row.get(key) is not None), None)
            try:
                if not isinstance(name, str) or not isinstance(text, str):
                    raise BadSample("row without picture or caption")
                name = _name_in(table, name)
                if Path(name).suffix.lower() not in PICTURE_SUFFIXES:
                    raise BadSample("not a PNG, JPEG or WebP picture")
                caption = _caption_of_row(text)
                captions_of.setdefault(name, []).append(caption)
            except BadSample as error:
                account.spoil(error.reason, f"{table.name}:{number}")
    except UnicodeDecodeError as error:
        raise UserError(f"{table} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8.") from error
    except csv.Error as error:
        raise UserError(f"{table} cannot be read as CSV: {error}.") from error
    except OSError as error:
        raise UserError(f"{table} cannot be read: {error.strerror}.") from error
    return captions_of
