"""What tests of several readers need."""

import io
import tarfile
from pathlib import Path

import numpy as np
import PIL.Image

from mmtrain.documents import Document


def write_tar(path: Path, *parts: dict[str, bytes] | tarfile.TarInfo, format: int = tarfile.USTAR_FORMAT) -> Path:
    """Members in order: name -> content, or a header alone."""
    with tarfile.open(path, "w", format=format) as tar:
        for part in parts:
            if isinstance(part, tarfile.TarInfo):
                tar.addfile(part)
                continue
            for name, data in part.items():
                header = tarfile.TarInfo(name)
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    return path


def shape(document: Document) -> list[str | int]:
    """Texts, and for pictures their gray."""
    return [
        s if isinstance(s, str) else int(np.asarray(PIL.Image.open(io.BytesIO(s.data)))[0, 0, 0])
        for s in document.segments
    ]
