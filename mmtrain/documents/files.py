"""The files of a corpus: which there are and which may be opened, and the folder of downloaded pictures."""

from collections.abc import Iterable
from pathlib import Path

from mmtrain.config import CorpusConfig, UserError
from mmtrain.documents.captioned import PICTURE_SUFFIXES, files_below, is_inside, largest_picture_bytes
from mmtrain.documents.corpus import Account, printable
from mmtrain.documents.interleaved import NOT_DOWNLOADED, TOO_LARGE, Picture

UNREADABLE = "unreadable file"
OUTSIDE = "path leaves the folder"


def list_files(config: CorpusConfig, suffixes: tuple[str, ...], how: str, account: Account) -> list[str]:
    """Names, relative to corpus.path, of the files to read; its own name where corpus.path is a file.

    Sorted; folders below are searched, hidden ones and links to folders are not. suffixes: in lower case. Raises
    UserError, which ends with `how` to mend it, where there is nothing to read.
    """
    kinds = " or ".join(suffixes)
    if not config.path:
        raise UserError(f"corpus {config.name} has no corpus.path; {how}.")
    root = Path(config.path)
    if not root.exists():
        raise UserError(f"corpus.path={config.path} does not exist; {how}.")
    if root.is_file() and root.name.lower().endswith(suffixes):
        return [root.name]
    if not root.is_dir():
        raise UserError(f"corpus.path={config.path} is neither a folder nor a {kinds}; {how}.")
    names = []
    resolved = root.resolve()
    for name in files_below(root, suffixes, account):
        path = root / name
        if name != printable(name):  # a partition is JSON
            account.spoil("file name that is not UTF-8", name)
        elif not is_inside(path, resolved):
            account.spoil(OUTSIDE, name)
        elif not path.is_file():  # a pipe would be read forever
            account.spoil(UNREADABLE, name)
        else:
            names.append(name)
    if not names:
        left_out = f" that can be read: {account.summary()}" if account.bad else ""
        raise UserError(f"corpus.path={config.path} holds no {kinds}{left_out}; {how}.")
    return sorted(names)


def file_path(config: CorpusConfig, name: str) -> Path:
    """The path of a file that `list_files` named."""
    assert config.path is not None
    root = Path(config.path)
    return root if root.is_file() else root / name


class PictureFolder:
    """corpus.image_folder: downloaded pictures by name. Raises UserError where it is set and is no folder."""

    def __init__(self, config: CorpusConfig) -> None:
        self._root = Path(config.image_folder).resolve() if config.image_folder else None
        self._largest_bytes = largest_picture_bytes(config.max_pixels)
        if self._root is not None and not self._root.is_dir():
            raise UserError(f"corpus.image_folder={config.image_folder} is no folder; give that of the pictures.")

    def picture(self, label: str, stems: Iterable[str], url: str = "") -> Picture:
        """The file of the first stem that there is, with a suffix of pictures or as it is.

        label, url: name and url of the Picture.
        """
        if self._root is None:
            return Picture(label, None, NOT_DOWNLOADED)
        for name in (stem + suffix for stem in stems if Path(stem).name == stem for suffix in ("", *PICTURE_SUFFIXES)):
            path = self._root / name
            try:
                if not path.is_file():
                    continue
                if not is_inside(path, self._root):
                    return Picture(label, None, OUTSIDE)
                if path.stat().st_size > self._largest_bytes:
                    return Picture(label, None, TOO_LARGE)
                return Picture(label, path.read_bytes(), url=url)
            except (OSError, ValueError):  # ValueError: a NUL in the name
                return Picture(label, None, UNREADABLE)
        return Picture(label, None, NOT_DOWNLOADED)
