"""Trees of HTML pages with local pictures: one interleaved document per page.

From corpus.path, or from a Debian package: much of the free documentation with pictures is packaged there.
"""

import base64
import binascii
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from mmtrain.config import UserError
from mmtrain.documents.captioned import PICTURE_SUFFIXES, id_of_path, is_inside, largest_picture_bytes, relative_name
from mmtrain.documents.corpus import Account, Corpus, Partition, printable
from mmtrain.documents.debian import fetch_debian
from mmtrain.documents.document import Document
from mmtrain.documents.html_page import Page, decode_page, is_too_complex
from mmtrain.documents.interleaved import Picture, interleaved_document

PAGE_SUFFIXES = (".html", ".htm")
PAGES_PER_PARTITION = 50
LARGEST_PAGE_BYTES = 20 * 2**20
# One document is held in memory. No honest page has more pictures.
LARGEST_NUM_PICTURES = 10_000
LARGEST_PICTURES_BYTES = 2**28
OTHER_SUFFIXES = (".gif", ".svg", ".svgz", ".bmp", ".ico", ".tif", ".tiff", ".avif", ".pdf", ".eps")
OTHER_MEDIA_TYPES = ("data:image/svg", "data:image/gif")
OTHER_FORMAT = "picture of another format"
HOW = "set corpus.path to a folder of .html pages, or corpus.debian_package to a package of them"
LONGEST_NAME = 100  # of an src in an account


class Html(Corpus):
    """Pages (.html, .htm) in the order of their paths; meta: path, title.

    Ids are those of the paths. Texts that follow one another are one, a blank line between paragraphs. Left out and
    counted: navigation and hidden elements; pictures from the network, outside the folder, of other formats; pages
    that only lead to others.
    """

    def partitions(self, account: Account) -> list[Partition]:
        """Partitions {"pages": [relative path, ...]}, with links to folders not followed."""
        root, names = self._root(), []

        def spoil(error: OSError) -> None:
            account.spoil("unreadable folder", relative_name(Path(error.filename), root))

        for parent, folders, files in os.walk(root, onerror=spoil):
            for folder in list(folders):
                path = Path(parent, folder)
                if folder.startswith(".") or path.is_symlink():
                    account.skip("hidden or linked folder", relative_name(path, root))
                    folders.remove(folder)
            for file in files:
                if not file.lower().endswith(PAGE_SUFFIXES):
                    continue
                path = Path(parent, file)
                if file.startswith("."):
                    account.skip("hidden page", relative_name(path, root))
                elif not is_inside(path, root):
                    account.skip("page outside the folder", relative_name(path, root))
                else:
                    names.append(relative_name(path, root))
        if not names:
            where = f"corpus.path={self.config.path}" if self.config.path else f"Debian's {self.config.debian_package}"
            raise UserError(f"{where} holds no .html page; {HOW}.")
        names.sort()
        return [
            {"pages": names[start : start + PAGES_PER_PARTITION]} for start in range(0, len(names), PAGES_PER_PARTITION)
        ]

    def documents(self, partition: Partition, account: Account) -> Iterator[Document]:
        """One document per page that shows anything."""
        root = self._root()
        for name in partition["pages"]:
            document = self._document(name, root, account)
            if document is not None:
                yield document

    def _root(self) -> Path:
        """The folder, links followed. Raises UserError where there is none."""
        path, package = self.config.path, self.config.debian_package
        if bool(path) == bool(package):
            raise UserError(f"corpus {self.config.name} needs either a folder or a Debian package; {HOW}.")
        if package:
            return fetch_debian(package, (*PAGE_SUFFIXES, *PICTURE_SUFFIXES), self.cache, HOW).resolve()
        if not Path(path or "").is_dir():
            raise UserError(f"corpus.path={path} is not a folder; {HOW}.")
        return Path(path or "").resolve()

    def _document(self, name: str, root: Path, account: Account) -> Document | None:
        page = _read_page(name, root, account)
        if page is None:
            return None
        pictures = _Pictures(name, root, largest_picture_bytes(self.config.max_pixels), account)
        parts = page.parts(pictures.find, lambda reason: account.skip(reason, name))
        source = self.config.name
        document_id = f"{re.sub('[^A-Za-z0-9_-]', '_', source)}-{id_of_path(name)}"
        meta = {"path": printable(name), "title": page.title}
        return interleaved_document(document_id, source, parts, meta, self.config, account)


def _read_page(name: str, root: Path, account: Account) -> Page | None:
    """The page, or None for one that is counted: unreadable, too large, or leading only to others."""
    try:
        with open(root / name, "rb") as file:
            data = file.read(LARGEST_PAGE_BYTES + 1)
    except OSError:
        account.spoil("unreadable page", name)
        return None
    if len(data) > LARGEST_PAGE_BYTES:
        account.skip(f"page larger than {LARGEST_PAGE_BYTES >> 20} MB", name)
        return None
    text, is_exact = decode_page(data)
    if not is_exact:
        account.spoil("bytes outside the page's encoding", name)
    if is_too_complex(text):
        account.skip("page too complex to parse", name)
        return None
    page = Page(text)
    if page.is_frameset or page.is_redirect:
        account.skip("frameset page" if page.is_frameset else "redirect page", name)
        return None
    return page


class _Pictures:
    """Finds the pictures of one page. largest_bytes: of a picture file that is read whole."""

    def __init__(self, page: str, root: Path, largest_bytes: int, account: Account) -> None:
        self._page = page
        self._root = root
        self._largest_bytes = largest_bytes
        self._account = account
        self._num_pictures = 0
        self._num_bytes = 0

    def find(self, src: str) -> Picture | None:
        """The picture that a page's `src` refers to; None when a rule leaves it out, which is counted."""
        src = src.strip()
        name = f"{src[:LONGEST_NAME]} in {self._page}"
        found = self._inside_page(src) if src[:5].lower() == "data:" else self._file(src)
        if isinstance(found, bytes | None):
            self._num_pictures += 1
            self._num_bytes += len(found or b"")
            if self._num_pictures <= LARGEST_NUM_PICTURES and self._num_bytes <= LARGEST_PICTURES_BYTES:
                return Picture(name, found)
            found = "picture beyond the limits of a page"
        self._account.skip(found, name)
        return None

    def _inside_page(self, src: str) -> bytes | str:
        """The bytes in a data: URL (RFC 2397), or why they are left out."""
        header, _, body = src.partition(",")
        if header.lower().startswith(OTHER_MEDIA_TYPES):
            return OTHER_FORMAT
        data = unquote_to_bytes(body)
        if header.lower().endswith(";base64"):
            with suppress(binascii.Error):  # what is no base64 is no picture either, which is found later
                return base64.b64decode(data)
        return data

    def _file(self, src: str) -> bytes | str | None:
        """The bytes of a file, None without the file, or why it is left out. "/" is the folder of the corpus."""
        try:
            url = urlsplit(src)
        except ValueError:  # "http://[": brackets are for IPv6
            return "picture without a valid src"
        if url.scheme or url.netloc:
            return "remote picture"
        if not url.path:
            return "picture without a valid src"
        name = unquote(url.path, errors="surrogateescape")  # names on disk are bytes in any encoding
        if name.lower().endswith(OTHER_SUFFIXES):
            return OTHER_FORMAT
        path = self._root / name.lstrip("/") if name.startswith("/") else (self._root / self._page).parent / name
        if not is_inside(path, self._root):
            return "picture outside the folder"
        try:
            if not path.is_file():  # a pipe would be read forever
                return None
            with open(path, "rb") as file:
                # One that is too large is cut: its header shows too many pixels, or it is found to be truncated.
                return file.read(self._largest_bytes)
        except OSError:
            return None
