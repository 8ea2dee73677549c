"""The stamps of Tux Paint (Debian package tuxpaint-stamps-default, GPL-2 and freer): about 950 captioned pictures.

Every picture NAME.png or NAME.svg has NAME.txt beside it: the first line is the English caption, then lines
`xx.utf8=caption`. The package is fetched once with apt, without root.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmtrain.config import CorpusConfig, UserError, build_artifact
from mmtrain.documents.captioned import Caption, CaptionedPicture, captioned_documents, id_of_path, relative_name
from mmtrain.documents.document import Document, Image
from mmtrain.documents.images import BadImage, decode_square, downscale_to_png, image_from_bytes
from mmtrain.documents.reading import Reading

PACKAGE = "tuxpaint-stamps-default"
STAMPS_IN_PACKAGE = Path("usr/share/tuxpaint/stamps")
KEPT_SUFFIXES = (".png", ".svg", ".txt")
FETCH_TIMEOUT_SECONDS = 600
OTHER_CORPORA = "choose corpus=shapes (no download) or corpus=pairs (your own pictures) instead"
# Pictures are stored at up to this multiple of corpus.image_size: enough to change one's mind, small enough to ship.
STORED_SCALE = 4


def _run(command: list[str], folder: Path) -> str:
    """Run a command in `folder`; returns "" or why it failed, in a few words."""
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=FETCH_TIMEOUT_SECONDS,
        )
    except FileNotFoundError:
        return f"{command[0]} is not installed"
    except subprocess.TimeoutExpired:
        return f"{command[0]} took more than {FETCH_TIMEOUT_SECONDS} seconds"
    if done.returncode == 0:
        return ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"{command[0]} ended with code {done.returncode}"


def _download(folder: Path) -> Path:
    """The .deb in `folder`. Tries the machine's package lists, then lists of our own (minimal images have none)."""
    fault = _run(["apt-get", "download", PACKAGE], folder)
    if fault and "not installed" not in fault:
        for name in ("lists/partial", "archives/partial"):
            (folder / name).mkdir(parents=True)
        own = [f"Dir::State::lists={folder.resolve()}/lists", f"Dir::Cache={folder.resolve()}"]
        options = [part for option in own for part in ("-o", option)]
        fault = _run(["apt-get", *options, "update"], folder) or _run(
            ["apt-get", *options, "download", PACKAGE], folder
        )
    packages = sorted(folder.glob(f"{PACKAGE}_*.deb"))
    if fault or not packages:
        raise UserError(f"corpus stamps needs Debian's package {PACKAGE}, and apt-get could not fetch it "
                        f"({fault or 'no file came'}); {OTHER_CORPORA}.")  # fmt: skip
    return packages[0]


def fetch_stamps(cache: Path) -> Path:
    """The folder of the stamps below `cache`, fetched and unpacked at the first call (about 200 MB, no root).

    Raises UserError where apt or dpkg-deb is missing or fails.
    """

    def build(folder: Path) -> None:
        work = folder / "work"
        work.mkdir()
        package = _download(work)
        fault = _run(["dpkg-deb", "-x", str(package.resolve()), str((work / "unpacked").resolve())], work)
        stamps = work / "unpacked" / STAMPS_IN_PACKAGE
        if fault or not stamps.is_dir():
            raise UserError(f"{package.name} cannot be unpacked ({fault or 'no stamps in it'}); {OTHER_CORPORA}.")
        for path in stamps.rglob("*"):  # most files are spoken captions
            if path.is_symlink() or (path.is_file() and path.suffix not in KEPT_SUFFIXES):
                path.unlink()
        stamps.rename(folder / "stamps")
        shutil.copy(work / "unpacked/usr/share/doc" / PACKAGE / "copyright", folder / "copyright")
        shutil.rmtree(work)

    return build_artifact(cache / PACKAGE, build) / "stamps"


def _find_stamps(config: CorpusConfig, cache: Path) -> Path:
    if config.path is None:
        return fetch_stamps(cache)
    folder = Path(config.path)
    if not folder.is_dir():
        raise UserError(f"corpus.path={config.path} is not a folder; leave it out to fetch the stamps with apt.")
    for inside in (STAMPS_IN_PACKAGE, Path("stamps"), Path()):
        if any((folder / inside).glob("*/**/*.txt")):
            return folder / inside
    raise UserError(f"corpus.path={config.path} holds no stamps (pictures with NAME.txt beside them in folders).")


def read_captions(path: Path) -> dict[str, str]:
    """Captions of one NAME.txt by language code ("en", "de", "pt_BR", ...); empty ones are left out."""
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    captions = {"en": lines[0] if lines else ""}
    for line in lines[1:]:
        key, separator, text = line.partition("=")
        if separator and key.endswith(".utf8"):
            captions[key.removesuffix(".utf8").strip()] = text
    return {language: " ".join(text.split()) for language, text in captions.items() if text.strip()}


def _list_pictures(folder: Path, languages: list[str], reading: Reading) -> tuple[list[CaptionedPicture], int]:
    """Pictures with a caption in one of the languages, and how many had none at all."""
    pictures, num_bad = [], 0
    known: set[str] = set()
    paths = sorted(path for path in folder.rglob("*") if path.suffix in (".png", ".svg") and not path.is_symlink())
    stems = {path.with_suffix("") for path in paths if path.suffix == ".png"}
    for path in paths:
        name, stem = relative_name(path, folder), path.with_suffix("")
        if stem.name.endswith(("_mirror", "_flip", "_mirror_flip")):
            reading.skip("mirrored or flipped variant", name)
            continue
        if path.suffix == ".svg" and stem in stems:
            reading.skip("the same picture in another format", name)
            continue
        if not stem.with_suffix(".txt").is_file():
            reading.skip("no .txt beside it", name)
            num_bad += 1
            continue
        texts = read_captions(stem.with_suffix(".txt"))
        known.update(texts)
        category = name.split("/")[0]
        captions = []
        for language in languages:
            if language not in texts:
                reading.skip(f"no caption in {language}", name)
                continue
            # "sr@latin": a document id holds letters, digits, _ and - only.
            document_id = f"stamps-{id_of_path(name)}-{language.replace('@', '_')}"
            captions.append(Caption(texts[language], document_id, {"language": language, "category": category}))
        pictures.append(CaptionedPicture(name, path, tuple(captions)))
    unknown = [language for language in languages if pictures and language not in known]
    if unknown:
        raise UserError(
            f"corpus.languages: no stamp has a caption in {', '.join(unknown)}; there are {', '.join(sorted(known))}."
        )
    return pictures, num_bad


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


def read_stamps(config: CorpusConfig, split: str, cache: Path) -> Reading:
    """One document per picture and language of config.languages; all languages of a picture on one side.

    meta: path, language, category (top folder), stored ("original", "rendered" from SVG, "downscaled" to
    4 x image_size). Raises UserError at the start of the iteration when the package cannot be fetched.
    """
    largest = STORED_SCALE * config.image_size

    def prepare(data: bytes, name: str) -> tuple[Image, dict[str, Any]]:
        if name.endswith(".svg"):
            image, stored = image_from_bytes(_render_svg(data, largest), config.max_pixels), "rendered"
        else:
            image, stored = image_from_bytes(data, config.max_pixels), "original"
            if max(image.width, image.height) > largest:
                image = image_from_bytes(downscale_to_png(data, largest), config.max_pixels)
                stored = "downscaled"
        if decode_square(image.data, 32).min() == 255:  # an SVG that is only text, drawn without fonts
            raise BadImage("blank picture", name)
        return image, {"stored": stored}

    def produce(reading: Reading) -> Iterator[Document]:
        folder = _find_stamps(config, cache)
        pictures, num_bad = _list_pictures(folder, config.languages, reading)
        yield from captioned_documents(reading, pictures, "stamps", config, split, prepare, num_bad)

    return Reading(produce)
