"""MMC4: pages as a list of sentences and a list of pictures, each picture assigned to one sentence.

Read are its .jsonl files (also in the .zip they are shipped in, and .gz), whose pictures lie in corpus.image_folder,
and OpenFlamingo's webdataset tars, one KEY.json per page with the pictures in base64. MMC4 does not know where
on the page a picture was: matched_text_index is the sentence that fits it best, one picture per sentence. A picture
without it goes to the sentence with the largest entry of its row of similarity_matrix, the first of equals.
"""

import base64
import gzip
import hashlib
import io
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from mmtrain.config import UserError
from mmtrain.documents.captioned import id_of_path
from mmtrain.documents.corpus import Account, Corpus, Partition, printable
from mmtrain.documents.document import Document
from mmtrain.documents.files import PictureFolder, file_path, list_files
from mmtrain.documents.interleaved import Picture, interleaved_document
from mmtrain.documents.record import BadRecord, parse_object
from mmtrain.documents.tars import DamagedTar
from mmtrain.documents.webdataset import DAMAGED, keyed_members

HOW = "set corpus.path to the folder of MMC4's .jsonl.zip files or OpenFlamingo's tars, or to one of them"
SUFFIXES = (".jsonl", ".jsonl.zip", ".jsonl.gz", ".tar")
# A page with all its pictures in base64.
LARGEST_RECORD_BYTES = 2**26
# Deflate reaches 1,032; text of honest pages stays below 20.
LARGEST_COMPRESSION = 100
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# What damaged archives raise.
ARCHIVE_ERRORS = (OSError, EOFError, ValueError, RuntimeError, struct.error, zlib.error, zipfile.BadZipFile)

# What people call it, the end of its id, and its bytes, None where they are too many.
Record = tuple[str, str, bytes | None]


class Mmc4(Corpus):
    """One document per page, in the order of the files' names and then of their lines.

    Each picture comes before its sentence, and sentences between two pictures are joined by spaces. meta: url, and
    path (FILE:LINE or TAR/KEY).
    """

    def partitions(self, account: Account) -> list[Partition]:
        PictureFolder(self.config)
        return [{"file": name} for name in list_files(self.config, SUFFIXES, HOW, account)]

    def documents(self, partition: Partition, account: Account) -> Iterator[Document]:
        name = partition["file"]
        folder = PictureFolder(self.config)
        is_tar = name.lower().endswith(".tar")
        records = _tar_records if is_tar else _line_records
        for path, suffix, data in records(file_path(self.config, name), name, account):
            try:
                if data is None:
                    raise BadRecord("record too large")
                content = parse_object(data)
                parts = self._parts(content, path, folder, is_tar)
            except BadRecord as error:
                account.spoil(str(error), path)
                continue
            meta = {"path": printable(path)}
            if isinstance(content.get("url"), str):
                meta["url"] = printable(content["url"])
            document_id = f"mmc4-{id_of_path(name)}-{suffix}"
            document = interleaved_document(document_id, self.config.name, parts, meta, self.config, account)
            if document:
                yield document

    def _parts(
        self, content: dict[str, Any], path: str, folder: PictureFolder, is_tar: bool
    ) -> Iterator[str | Picture]:
        """Sentences and pictures in reading order. Raises BadRecord before the first of them."""
        sentences, infos = content.get("text_list"), content.get("image_info")
        if not isinstance(sentences, list) or not all(isinstance(sentence, str) for sentence in sentences):
            raise BadRecord("text_list is no list of strings")
        if not isinstance(infos, list) or not all(isinstance(info, dict) for info in infos):
            raise BadRecord("image_info is no list of objects")
        infos_before: list[list[dict[str, Any]]] = [[] for _ in sentences]
        for index, info in enumerate(infos):
            infos_before[_find_place(content, index, len(sentences))].append(info)

        def parts() -> Iterator[str | Picture]:
            start = 0
            for stop, before in enumerate(infos_before):
                if before:
                    yield " ".join(sentences[start:stop])
                    start = stop
                for info in before:
                    yield self._picture(info, path, folder, is_tar)
            yield " ".join(sentences[start:])

        return parts()

    def _picture(self, info: dict[str, Any], path: str, folder: PictureFolder, is_tar: bool) -> Picture:
        """The bytes from base64, else the file named image_name, else the one named by the SHA-256 of raw_url."""
        name, url, text = (info.get(field) for field in ("image_name", "raw_url", "image_base64"))
        label = f"{path}, {name or url}"
        if isinstance(text, str):
            # OpenFlamingo's script writes Python's b'...'.
            text = text[2:-1] if text.startswith("b'") else text
            try:
                return Picture(label, base64.b64decode(text, validate=True), url=str(url or name or ""))
            except ValueError:
                return Picture(label, None, "broken base64")
        # In OpenFlamingo's tars pictures that could not be downloaded have none, which is damage and no mistake.
        if not self.config.image_folder and not is_tar:
            raise UserError(
                f"{label}: the picture is not in the file; set corpus.image_folder to the folder of downloaded pictures"
            )
        stems = [name] if isinstance(name, str) else []
        if isinstance(url, str):
            stems.append(hashlib.sha256(url.encode("utf-8", "replace")).hexdigest())
        return folder.picture(label, stems, str(url or name or ""))


def _find_place(content: dict[str, Any], index: int, num_sentences: int) -> int:
    """The sentence of picture `index`. Raises BadRecord."""
    place = content["image_info"][index].get("matched_text_index")
    if place is None:
        matrix = content.get("similarity_matrix")
        row = matrix[index] if isinstance(matrix, list) and index < len(matrix) else None
        if (
            isinstance(row, list)
            and len(row) == num_sentences > 0
            and all(type(entry) is int or (type(entry) is float and math.isfinite(entry)) for entry in row)
        ):
            place = row.index(max(row))
    if type(place) is not int or not 0 <= place < num_sentences:
        raise BadRecord("picture without a place")
    return place


def _tar_records(path: Path, name: str, account: Account) -> Iterator[Record]:
    """The KEY.json members of a tar."""
    seen: set[str] = set()
    try:
        with open(path, "rb") as file:
            for key, suffix, member in keyed_members(file, name, account):
                if suffix != "json":
                    account.skip("member that is not needed", f"{name}/{member.name}")
                elif key in seen:
                    account.spoil("duplicate key", f"{name}/{key}")
                else:
                    seen.add(key)
                    data = member.read() if member.num_bytes <= LARGEST_RECORD_BYTES else None
                    yield f"{name}/{key}", id_of_path(key), data
    except (DamagedTar, OSError) as error:
        account.spoil(DAMAGED, f"{name}, {error}")


def _line_records(path: Path, name: str, account: Account) -> Iterator[Record]:
    """The lines of a .jsonl, counted from 1 through all members of an archive."""
    number = 0
    try:
        budget = LARGEST_RECORD_BYTES + LARGEST_COMPRESSION * path.stat().st_size
        for file in _open_members(path, name, account):
            while line := file.readline(LARGEST_RECORD_BYTES + 1):
                number += 1
                data = line if len(line) <= LARGEST_RECORD_BYTES else None
                budget -= len(line)
                while line and not line.endswith(b"\n") and budget > 0:
                    line = file.readline(2**20)
                    budget -= len(line)
                if budget <= 0:
                    account.spoil("unpacks to too much", f"{name}:{number}")
                    return
                if data is None or not data.isspace():
                    yield f"{name}:{number}", str(number), data
        if number == 0:
            account.spoil("empty file", name)
    except ARCHIVE_ERRORS as error:
        account.spoil("damaged file", f"{name}:{number}, {error}")


def _open_members(path: Path, name: str, account: Account) -> Iterator[BinaryIO]:
    """The .jsonl files in `path`."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        with gzip.open(path) as file:
            yield cast(BinaryIO, file)
    elif suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if not member.filename.endswith(".jsonl") or PurePosixPath(member.filename).name.startswith("."):
                    account.skip("member that is not needed", f"{name}/{member.filename}")
                    continue
                if member.compress_type not in COMPRESSIONS:
                    raise zipfile.BadZipFile("another compression than deflate")
                with archive.open(member) as file:
                    yield cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, file), 2**16))
    else:
        with open(path, "rb") as file:
            yield file
