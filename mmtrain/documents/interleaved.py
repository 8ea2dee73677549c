"""From the parts of a page to a document: what the readers of interleaved corpora share."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mmtrain.config import CorpusConfig
from mmtrain.documents.corpus import Account, printable
from mmtrain.documents.document import Document, Image
from mmtrain.documents.images import BadImage, image_from_bytes

MISSING = "missing picture"
NOT_DOWNLOADED = "picture that was not downloaded"
TOO_LARGE = "picture of too many bytes"
# A few names in a small file can refer to a large picture a million times.
LARGEST_DOCUMENT_BYTES = 2**30


@dataclass(frozen=True)
class Picture:
    """An encoded picture in its place, not looked at yet.

    name: for people. data: None where there is none; `problem` says why. url: URL or file name that it had where it
    comes from, for rules that look at these.
    """

    name: str
    data: bytes | None
    problem: str = MISSING
    url: str = ""


def interleaved_document(
    document_id: str,
    source: str,
    parts: Iterable[str | Picture],
    meta: dict[str, Any],
    config: CorpusConfig,
    account: Account,
) -> Document | None:
    """The document of texts and pictures in reading order, or None when nothing usable is in it.

    Bad pictures are counted in `account`; corpus.on_bad says whether the document goes on without them
    (drop_image) or is left out (skip). Texts that then follow one another become one, a blank line between them.
    A document may well be all text or all pictures. meta["pictures"] has the URLs of the pictures in order, where they
    have any. A document of more than LARGEST_DOCUMENT_BYTES of pictures is damage.
    """
    segments: list[list[str] | Image] = []
    urls: list[str] = []
    num_bad = num_bytes = 0
    for part in parts:
        if isinstance(part, Picture):
            try:
                if part.data is None:
                    raise BadImage(part.problem, part.name)
                num_bytes += len(part.data)
                if num_bytes > LARGEST_DOCUMENT_BYTES:
                    account.spoil("document too large", document_id)
                    return None
                segments.append(image_from_bytes(part.data, config.max_pixels))
                urls.append(printable(part.url))
            except BadImage as error:
                # Links die: what could not be downloaded is no damage, unless the user says so.
                is_damage = error.reason != NOT_DOWNLOADED or config.on_bad == "fail"
                (account.spoil if is_damage else account.skip)(error.reason, part.name)
                num_bad += 1
        # A lone surrogate from a JSON escape cannot be stored as UTF-8.
        elif text := part.encode("utf-8", "replace").decode().strip():
            if segments and isinstance(segments[-1], list):
                segments[-1].append(text)
            else:
                segments.append([text])
    if num_bad and config.on_bad == "skip":
        account.skip("document with a bad picture", document_id)
        return None
    if not segments:
        account.skip("empty document", document_id)
        return None
    joined = ("\n\n".join(segment) if isinstance(segment, list) else segment for segment in segments)
    return Document(document_id, source, tuple(joined), meta | ({"pictures": urls} if any(urls) else {}))
