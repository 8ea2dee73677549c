"""A user's own captioned pictures: a folder with NAME.txt beside each picture, or a captions .jsonl or .csv.

Table columns are image and caption, or file_name and text as in Hugging Face's imagefolder metadata; paths in
it are relative to the table and may not leave its folder.
"""

import csv
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmtrain.config import CorpusConfig, UserError
from mmtrain.documents.captioned import (
    LARGEST_CAPTION_BYTES,
    PICTURE_SUFFIXES,
    Caption,
    CaptionedPicture,
    captioned_documents,
    id_of_path,
    is_inside,
    relative_name,
)
from mmtrain.documents.document import Document, Image
from mmtrain.documents.images import image_from_bytes
from mmtrain.documents.reading import Reading

TABLES_IN_FOLDER = ("captions.jsonl", "captions.csv", "metadata.jsonl", "metadata.csv")
IMAGE_COLUMNS = ("image", "file_name")
CAPTION_COLUMNS = ("caption", "text")
HOW = "set corpus.path to a folder of pictures with NAME.txt beside each NAME.png, or to a captions .jsonl or .csv"

# Relative name and caption of every good entry; bad ones are counted on the reading.
Entries = list[tuple[str, str]]


def _read_caption_file(path: Path) -> tuple[str, str]:
    """(caption, "") or ("", reason why there is none)."""
    try:
        if path.stat().st_size > LARGEST_CAPTION_BYTES:
            return "", "caption too long"
        text = " ".join(path.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError:
        return "", "caption is not UTF-8"
    except OSError:
        return "", "unreadable file"
    return text, "" if text else "empty caption"


def _from_folder(root: Path, reading: Reading) -> Entries:
    entries = []
    resolved = root.resolve()
    for parent, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for filename in sorted(names):
            path = Path(parent, filename)
            if filename.startswith(".") or path.suffix.lower() not in PICTURE_SUFFIXES:
                continue
            name, caption_path = relative_name(path, root), path.with_suffix(".txt")
            if not caption_path.is_file():
                reading.skip("no .txt beside it", name)
            elif not (is_inside(path, resolved) and is_inside(caption_path, resolved)):
                reading.skip("path leaves the folder", name)
            else:
                caption, reason = _read_caption_file(caption_path)
                if reason:
                    reading.skip(reason, name)
                else:
                    entries.append((name, caption))
    return entries


def _jsonl_rows(table: Path, reading: Reading) -> Iterator[tuple[int, dict[str, Any]]]:
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
                reading.skip("line is no JSON object", f"{table.name}:{number}")


def _csv_rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(table, encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        columns = rows.fieldnames or ()
        for allowed in (IMAGE_COLUMNS, CAPTION_COLUMNS):
            if not set(allowed) & set(columns):
                raise UserError(f"{table} has no column {' or '.join(allowed)} in its first line: {list(columns)}.")
        for row in rows:
            yield rows.line_num, row


def _from_table(table: Path, reading: Reading) -> Entries:
    entries = []
    root = table.parent.resolve()
    rows = _csv_rows(table) if table.suffix.lower() == ".csv" else _jsonl_rows(table, reading)
    try:
        for number, row in rows:
            where = f"{table.name}:{number}"
            name = next((row[key] for key in IMAGE_COLUMNS if row.get(key)), None)
            text = next((row[key] for key in CAPTION_COLUMNS if row.get(key) is not None), None)
            if not isinstance(name, str) or not isinstance(text, str):
                reading.skip("row without picture or caption", where)
            elif not is_inside(table.parent / name, root):
                reading.skip("path leaves the folder", where)
            elif Path(name).suffix.lower() not in PICTURE_SUFFIXES:
                reading.skip("not a PNG, JPEG or WebP picture", name)
            elif len(text.encode("utf-8", "replace")) > LARGEST_CAPTION_BYTES:
                reading.skip("caption too long", where)
            elif not text.strip():
                reading.skip("empty caption", where)
            else:  # one spelling per file, so that "./a.png" and "a.png" are one picture
                name = relative_name(table.parent / name, table.parent)
                # A lone surrogate from a JSON escape cannot be stored as UTF-8.
                entries.append((name, " ".join(text.encode("utf-8", "replace").decode().split())))
    except UnicodeDecodeError as error:
        raise UserError(f"{table} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8.") from error
    except csv.Error as error:
        raise UserError(f"{table} cannot be read as CSV: {error}.") from error
    except OSError as error:
        raise UserError(f"{table} cannot be read: {error.strerror}.") from error
    return entries


def _list_entries(config: CorpusConfig, reading: Reading) -> tuple[Path, Entries]:
    """The folder that names are relative to, and the entries."""
    if not config.path:
        raise UserError(f"corpus pairs has no corpus.path; {HOW}.")
    path = Path(config.path)
    if path.is_dir():
        table = next((path / name for name in TABLES_IN_FOLDER if (path / name).is_file()), None)
        entries = _from_table(table, reading) if table else _from_folder(path, reading)
        if not entries and not reading.skipped:
            raise UserError(f"corpus.path={config.path} holds no pictures (.png, .jpg, .jpeg, .webp); {HOW}.")
        return path, entries
    if not path.exists():
        raise UserError(f"corpus.path={config.path} does not exist; {HOW}.")
    if path.suffix.lower() not in (".jsonl", ".csv"):
        raise UserError(f"corpus.path={config.path} is neither a folder nor a .jsonl or .csv file; {HOW}.")
    entries = _from_table(path, reading)
    if not entries and not reading.skipped:
        raise UserError(f"corpus.path={config.path} lists no pictures; {HOW}.")
    return path.parent, entries


def _group(root: Path, entries: Entries) -> list[CaptionedPicture]:
    """One picture per file with all its captions (COCO has five). Ids: hash of the path, then -2, -3, ..."""
    captions_of: dict[str, list[str]] = defaultdict(list)
    for name, caption in entries:
        captions_of[name].append(caption)
    pictures = []
    for name, captions in captions_of.items():
        first_id = f"pairs-{id_of_path(name)}"
        ids = [first_id, *(f"{first_id}-{number}" for number in range(2, len(captions) + 1))]
        documents = tuple(Caption(text, document_id, {}) for text, document_id in zip(captions, ids, strict=True))
        pictures.append(CaptionedPicture(name, root / name, documents))
    return pictures


def read_pairs(config: CorpusConfig, split: str) -> Reading:
    """One document per picture and caption; the pictures' bytes are kept as they are. meta: path.

    Skipped and counted: unreadable, truncated or huge pictures; missing, empty or undecodable captions; paths
    that leave the folder. Raises UserError, when the iteration starts, for a missing or empty folder or table,
    and at its end when nothing is usable or more than config.max_bad_fraction is bad (the train split).
    """

    def prepare(data: bytes, name: str) -> tuple[Image, dict[str, Any]]:
        return image_from_bytes(data, config.max_pixels), {}

    def produce(reading: Reading) -> Iterator[Document]:
        root, entries = _list_entries(config, reading)
        num_bad = sum(reading.skipped.values())
        yield from captioned_documents(reading, _group(root, entries), "pairs", config, split, prepare, num_bad)

    return Reading(produce)
