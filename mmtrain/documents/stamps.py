"""The stamps of Tux Paint (Debian package tuxpaint-stamps-default, GPL-2 and freer): about 950 captioned pictures.

Every picture NAME.png or NAME.svg has NAME.txt beside it: the first line is the English caption, then lines
`xx.utf8=caption`. The package is fetched once with apt, without root.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mmtrain.config import UserError
from mmtrain.documents.captioned import (
    LARGEST_CAPTION_BYTES,
    BadSample,
    Caption,
    CaptionedPicture,
    captioned_documents,
    files_below,
    id_of_path,
    named_again,
    picture_partitions,
    read_file,
)
from mmtrain.documents.corpus import Account, Corpus, Partition, printable
from mmtrain.documents.debian import fetch_debian
from mmtrain.documents.document import Document, Image
from mmtrain.documents.images import BadImage, decode_square, downscale_to_png, image_from_bytes

PACKAGE = "tuxpaint-stamps-default"
STAMPS_IN_PACKAGE = Path("usr/share/tuxpaint/stamps")
KEPT_SUFFIXES = (".png", ".svg", ".txt")  # most files are spoken captions
OTHER_CORPORA = "choose corpus=shapes (no download) or corpus=pairs (your own pictures) instead"
# Pictures are stored at up to this multiple of corpus.image_size: enough to change one's mind, small enough to ship.
STORED_SCALE = 4


class Stamps(Corpus):
    """One document per picture and language of config.languages.

    meta: path, language, category (top folder), stored ("original", "rendered" from SVG, "downscaled" to
    4 x image_size). A partition holds pictures with their captions by language.
    """

    def partitions(self, account: Account) -> list[Partition]:
        """Some hundred pictures each. Raises UserError when the package cannot be fetched."""
        root = self._find_stamps()
        captions_of: dict[str, dict[str, str]] = {}
        known: set[str] = set()
        for name in _list_pictures(root, account):
            try:
                texts = read_captions(root, PurePosixPath(name).with_suffix(".txt").as_posix())
            except BadSample as error:
                account.spoil("no .txt beside it" if error.reason == "missing file" else error.reason, name)
                continue
            known.update(texts)
            captions_of[name] = {language: texts[language] for language in self.config.languages if language in texts}
            for language in self.config.languages:
                if language not in texts:
                    account.skip(f"no caption in {language}", name)
        unknown = [language for language in self.config.languages if captions_of and language not in known]
        if unknown:
            raise UserError(
                f"corpus.languages: no stamp has a caption in {', '.join(unknown)}; "
                f"there are {', '.join(sorted(known))}."
            )
        return picture_partitions({name: captions for name, captions in captions_of.items() if captions})

    def documents(self, partition: Partition, account: Account) -> Iterator[Document]:
        """Caption, then picture; the languages of a picture side by side."""
        pictures = (_picture(named_again(stored), captions) for stored, captions in partition["pictures"])
        yield from captioned_documents(pictures, self._find_stamps(), self._prepare, self.config, account)

    def _find_stamps(self) -> Path:
        if self.config.path is None:
            return fetch_debian(PACKAGE, KEPT_SUFFIXES, self.cache, OTHER_CORPORA) / STAMPS_IN_PACKAGE
        folder = Path(self.config.path)
        if not folder.is_dir():
            raise UserError(f"corpus.path={folder} is not a folder; leave it out to fetch the stamps with apt.")
        for inside in (STAMPS_IN_PACKAGE, Path("stamps"), Path()):
            if any((folder / inside).glob("*/**/*.txt")):
                return folder / inside
        raise UserError(f"corpus.path={folder} holds no stamps (pictures with NAME.txt beside them in folders).")

    def _prepare(self, data: bytes, name: str) -> tuple[Image, dict[str, Any]]:
        largest, max_pixels = STORED_SCALE * self.config.image_size, self.config.max_pixels
        if name.lower().endswith(".svg"):
            image, stored = image_from_bytes(_render_svg(data, largest), max_pixels), "rendered"
        else:
            image, stored = image_from_bytes(data, max_pixels), "original"
            if max(image.width, image.height) > largest:
                image, stored = image_from_bytes(downscale_to_png(data, largest), max_pixels), "downscaled"
        if decode_square(image.data, 32).min() == 255:  # an SVG that is only text, drawn without fonts
            raise BadImage("blank picture", name)
        return image, {"stored": stored}


def _list_pictures(root: Path, account: Account) -> list[str]:
    """Names of the pictures, each once."""
    names = list(files_below(root, (".png", ".svg"), account))
    pngs = {name[:-4] for name in names if name.lower().endswith(".png")}
    pictures = []
    for name in names:
        stem = name[:-4]
        if stem.endswith(("_mirror", "_flip", "_mirror_flip")):
            account.skip("mirrored or flipped variant", name)
        elif name.lower().endswith(".svg") and stem in pngs:
            account.skip("the same picture in another format", name)
        else:
            pictures.append(name)
    return pictures


def _picture(name: str, captions: dict[str, str]) -> CaptionedPicture:
    first_id, category = f"stamps-{id_of_path(name)}", printable(name.split("/")[0])
    return CaptionedPicture(
        name,
        tuple(
            # "sr@latin": a document id holds letters, digits, _ and - only.
            Caption(text, f"{first_id}-{language.replace('@', '_')}", {"language": language, "category": category})
            for language, text in captions.items()
        ),
    )


def read_captions(root: Path, name: str) -> dict[str, str]:
    """Captions of NAME.txt by language code ("en", "de", "pt_BR", ...); empty ones are left out. Raises BadSample."""
    data = read_file(root, name, LARGEST_CAPTION_BYTES, "caption too long")
    lines = data.decode("utf-8-sig", errors="replace").splitlines()
    captions = {"en": lines[0] if lines else ""}
    for line in lines[1:]:
        key, separator, text = line.partition("=")
        if separator and key.endswith(".utf8"):
            captions[key.removesuffix(".utf8").strip()] = text
    return {language: " ".join(text.split()) for language, text in captions.items() if text.strip()}


def _render_svg(data: bytes, side: int) -> bytes:
    """An SVG as PNG with its longer side `side`, transparent where nothing is drawn. Raises BadImage."""
    import resvg_py  # here: corpora without SVG must work where the renderer is missing

    try:
        # Without system fonts, so that every machine draws the same. dpi: without it lengths in pt and cm are 0.
        return bytes(
            resvg_py.svg_to_bytes(
                svg_string=data.decode("utf-8"), width=side, height=side, skip_system_fonts=True, dpi=96
            )
        )
    except ValueError as error:  # also UnicodeDecodeError
        raise BadImage("SVG cannot be drawn", str(error)) from error
