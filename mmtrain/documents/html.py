"""Trees of HTML pages with local pictures: one interleaved document per page.

From corpus.path, or from a Debian package: much of the free documentation with pictures is packaged there.
"""

import base64
import binascii
import posixpath
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from mmtrain.config import UserError
from mmtrain.documents.captioned import (
    PICTURE_SUFFIXES,
    BadSample,
    files_below,
    id_of_path,
    largest_picture_bytes,
    named_again,
    read_file,
    stored_name,
)
from mmtrain.documents.corpus import Account, Corpus, Partition, printable
from mmtrain.documents.debian import fetch_debian
from mmtrain.documents.document import Document
from mmtrain.documents.html_page import Page, decode_page, is_too_complex
from mmtrain.documents.interleaved import MISSING, TOO_LARGE, Picture, interleaved_document

PAGE_SUFFIXES = (".html", ".htm")
PAGES_PER_PARTITION = 50
LARGEST_PAGE_BYTES = 20 * 2**20
OTHER_SUFFIXES = (".gif", ".svg", ".svgz", ".bmp", ".ico", ".tif", ".tiff", ".avif", ".pdf", ".eps")
OTHER_MEDIA_TYPES = ("data:image/svg", "data:image/gif")
OTHER_FORMAT = "picture of another format"
INVALID = "picture without a valid src"
LONGEST_NAME = 100  # of a src that is named in an account
HOW = "set corpus.path to a folder of .html pages, or corpus.debian_package to a package of them"


class Html(Corpus):
    """One document per page (.html, .htm). meta: path, title.

    Left out and counted: navigation and hidden elements, pictures from the network or in other formats, and pages
    that only lead to others. corpus.path is the folder that a src with a leading "/" is relative to.
    """

    def partitions(self, account: Account) -> list[Partition]:
        """Partitions {"pages": [stored name, ...]} in the order of the paths."""
        names = sorted(files_below(self._root(), PAGE_SUFFIXES, account))
        if not names:
            where = self.config.path or f"Debian's {self.config.debian_package}"
            raise UserError(f"corpus {self.config.name}: {where} holds no .html page; {HOW}.")
        return [
            {"pages": [stored_name(name) for name in names[start : start + PAGES_PER_PARTITION]]}
            for start in range(0, len(names), PAGES_PER_PARTITION)
        ]

    def documents(self, partition: Partition, account: Account) -> Iterator[Document]:
        """The documents of the pages that show anything."""
        root = self._root()
        for stored in partition["pages"]:
            document = self._document(root, named_again(stored), account)
            if document is not None:
                yield document

    def _root(self) -> Path:
        path, package = self.config.path, self.config.debian_package
        if path and not package:
            if not Path(path).is_dir():
                raise UserError(f"corpus.path={path} is not a folder; {HOW}.")
            return Path(path)
        if package and not path:
            return fetch_debian(package, (*PAGE_SUFFIXES, *PICTURE_SUFFIXES), self.cache, HOW)
        raise UserError(f"corpus {self.config.name} needs one of corpus.path and corpus.debian_package; {HOW}.")

    def _document(self, root: Path, name: str, account: Account) -> Document | None:
        try:
            data = read_file(root, name, LARGEST_PAGE_BYTES, f"page of more than {LARGEST_PAGE_BYTES >> 20} MB")
        except BadSample as error:
            account.spoil(error.reason, name)
            return None
        text, is_exact = decode_page(data)
        if not is_exact:
            account.spoil("bytes outside the encoding of the page", name)
        if is_too_complex(text):
            account.skip("page too complex to parse", name)
            return None
        page = Page(text)
        if page.is_frameset or page.is_redirect:
            account.skip("frameset page" if page.is_frameset else "redirect page", name)
            return None

        def accepts(src: str) -> bool:
            reason = _why_left_out(src)
            if reason:
                account.skip(reason, _name_of_picture(src, name))
            return not reason

        parts = page.parts(accepts, lambda reason: account.skip(reason, name))
        largest_bytes = largest_picture_bytes(self.config.max_pixels)
        # One by one: nothing may hold all pictures of a page before interleaved_document has counted their bytes.
        loaded = (
            part if isinstance(part, str) else _read_picture(part.src, root, name, largest_bytes) for part in parts
        )
        document_id = f"{re.sub('[^A-Za-z0-9_-]', '_', self.config.name)}-{id_of_path(name)}"
        meta = {"path": printable(name), "title": page.title}
        return interleaved_document(document_id, self.config.name, loaded, meta, self.config, account)


def _name_of_picture(src: str, page: str) -> str:
    return f"{src[:LONGEST_NAME]} in {page}"


def _why_left_out(src: str) -> str:
    """The rule by which a picture is left out, or ""."""
    if _is_data(src):
        return OTHER_FORMAT if src.lower().startswith(OTHER_MEDIA_TYPES) else ""
    try:
        url = urlsplit(src)
    except ValueError:  # "http://[": brackets are for IPv6
        return INVALID
    if url.scheme or url.netloc:
        return "remote picture"
    if not url.path:
        return INVALID
    return OTHER_FORMAT if url.path.lower().endswith(OTHER_SUFFIXES) else ""


def _is_data(src: str) -> bool:
    return src[:5].lower() == "data:"


def _read_picture(src: str, root: Path, page: str, largest_bytes: int) -> Picture:
    """The picture of a src that no rule leaves out: a file, or in the page itself (RFC 2397)."""
    name = _name_of_picture(src, page)
    if _is_data(src):
        header, _, body = src.partition(",")
        data = unquote_to_bytes(body)
        if header.lower().endswith(";base64"):
            with suppress(binascii.Error):  # what is no base64 is no picture either, which is found later
                data = base64.b64decode(data)
        return Picture(name, data)
    path = unquote(urlsplit(src).path, errors="surrogateescape")  # names on disk are bytes in any encoding
    path = path.lstrip("/") if path.startswith("/") else posixpath.join(posixpath.dirname(page), path)
    try:
        return Picture(name, read_file(root, path, largest_bytes, TOO_LARGE), url=src[:LONGEST_NAME])
    except BadSample as error:
        return Picture(name, None, MISSING if error.reason == "missing file" else error.reason)
