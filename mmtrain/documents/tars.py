"""A tar from a stranger, read once from front to back: every header checked, nothing unpacked, no end in silence.

Python's tarfile stops without a word at a damaged header and at a missing end of the archive, keeps every member
that it has met, and reads a name of any length into memory.
"""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK_BYTES = tarfile.BLOCKSIZE
# Extended headers hold names and times; no honest one is longer.
LARGEST_EXTENSION_BYTES = 2**20
PAX_TYPES = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
EXTENSION_TYPES = (*PAX_TYPES, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
FILE_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE)
# Nothing follows their headers, whatever size those give; tarfile reads them so, too.
BARE_TYPES = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)


class DamagedTar(Exception):
    """The rest of a tar cannot be read. The message says where and why."""


@dataclass(frozen=True)
class Member:
    """One member, its name as the tar has it. is_file: a regular file, neither folder, link nor device."""

    name: str
    num_bytes: int
    is_file: bool
    is_folder: bool
    _file: BinaryIO

    def read(self) -> bytes:
        """The content; only before the next member is asked for."""
        return self._file.read(self.num_bytes)


def read_members(file: BinaryIO) -> Iterator[Member]:
    """The members in order. Their content is passed over unless it is asked for.

    Raises DamagedTar at a header whose checksum is wrong, where the file ends before the tar does (two blocks of
    zeros), and at data after that end: a zeroed stretch looks like an end, too.
    """
    total_bytes = os.fstat(file.fileno()).st_size
    extended: dict[str, str] = {}  # what extended headers say about the next member
    while True:
        offset = file.tell()
        block = file.read(BLOCK_BYTES)
        if len(block) < BLOCK_BYTES:
            raise DamagedTar(f"cut at byte {total_bytes}")
        if _is_zero(block) and not extended:
            _check_end(file)
            return
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.TarError as error:
            raise DamagedTar(f"{error} in the header at byte {offset}") from error
        is_extension = header.type in EXTENSION_TYPES
        num_bytes = header.size if is_extension or "size" not in extended else _number(extended["size"], offset)
        num_blocks = 0 if header.type in BARE_TYPES else -(-num_bytes // BLOCK_BYTES)
        end = file.tell() + num_blocks * BLOCK_BYTES
        if num_bytes < 0 or end > total_bytes:
            raise DamagedTar(f"cut at byte {total_bytes}, inside the member at byte {offset}")
        if is_extension:
            if num_bytes > LARGEST_EXTENSION_BYTES:
                raise DamagedTar(f"an extended header of {num_bytes} bytes at byte {offset}")
            content = file.read(num_bytes)
            if header.type in PAX_TYPES:
                extended |= _pax_records(content, offset)
            elif header.type == tarfile.GNUTYPE_LONGNAME:
                extended["path"] = _text(content.partition(b"\0")[0])
        else:
            name = extended.get("path", header.name)
            extended = {}
            yield Member(name, num_bytes, header.type in FILE_TYPES, header.isdir(), file)
        file.seek(end)


def _is_zero(data: bytes) -> bool:
    return data.count(0) == len(data)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _number(digits: str, offset: int) -> int:
    if not (digits.isascii() and digits.isdigit() and len(digits) < 20):
        raise DamagedTar(f"a size that is no number in the extended header before byte {offset}")
    return int(digits)


def _check_end(file: BinaryIO) -> None:
    """After a block of zeros there must be another, and nothing but zeros behind it."""
    offset = file.tell()
    if len(file.read(BLOCK_BYTES)) < BLOCK_BYTES:
        raise DamagedTar(f"cut at byte {offset}")
    file.seek(offset)
    while chunk := file.read(2**20):
        if not _is_zero(chunk):
            raise DamagedTar(f"more data after the end of the archive at byte {offset}")


def _pax_records(content: bytes, offset: int) -> dict[str, str]:
    """Records "LENGTH KEY=VALUE\\n" of a PAX header (POSIX.1-2008, pax); LENGTH counts the whole record."""
    records: dict[str, str] = {}
    position = 0
    while position < len(content):
        digits, _, _ = content[position : position + 20].partition(b" ")
        end = position + (int(digits) if digits.isdigit() else 0)
        key, separator, value = content[position + len(digits) + 1 : end].partition(b"=")
        if end > len(content) or not separator or not value.endswith(b"\n"):
            raise DamagedTar(f"a broken extended header at byte {offset}")
        records[_text(key)] = _text(value[:-1])
        position = end
    return records
