"""Files of a folder as documents: which are text, which are held out, and their text in pieces.

A document is held out by a hash of its path below the folder: whatever other files there are, on every
machine. Documents stand in the order of that hash, so that the first ones are a fair sample.
"""

import codecs
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from attnres_jax.configs.base import UserError

BLOCK = 1 << 16  # bytes read at once, and then to the end of the line


class TextError(UserError):
    """A folder that no corpus can be made from; says what to change."""


class Document(NamedTuple):
    """A UTF-8 text that is not empty and holds no NUL byte."""

    name: str  # its path below the folder, with slashes
    place: str  # sha256 of the name, hexadecimal: order and hold-out
    file: Path
    size: int  # bytes
    sha256: str  # of the content

    @property
    def share(self) -> float:
        """Uniform in [0, 1): held out are the documents whose share is below the fraction asked for."""
        return int(self.place[:16], 16) / 2**64


class Found(NamedTuple):
    """The documents of a folder, and the files that are none: name -> why."""

    documents: list[Document]
    left_out: dict[str, str]


class Splits(NamedTuple):
    """Documents to learn from, and documents to be judged by."""

    train: list[Document]
    heldout: list[Document]


def list_files(folder: Path, globs: Iterable[str]) -> list[str]:
    """Paths below `folder`, with slashes, of the files that match any of `globs`, sorted."""
    if not folder.is_dir():
        raise TextError(f"--text={folder} is not a folder: give the one that holds the text files")
    names = {file.relative_to(folder).as_posix() for glob in globs for file in _glob(folder, glob)}
    if not names:
        wanted = " or ".join(map(repr, globs))
        raise TextError(f"no file in {folder} matches {wanted}: give another --glob, such as '**/*.rst'")
    return sorted(names)


def examine(folder: Path, names: Iterable[str]) -> Iterator[Document | tuple[str, str]]:
    """Read each file once: a document, or its name and why it is none."""
    for name in names:
        yield _examine(folder / name, name)


def found(examined: Iterable[Document | tuple[str, str]]) -> Found:
    """What was examined, documents in the order of their places."""
    examined = list(examined)
    documents = [one for one in examined if isinstance(one, Document)]
    left_out = dict(one for one in examined if not isinstance(one, Document))
    return Found(sorted(documents, key=lambda document: document.place), left_out)


def split(documents: Sequence[Document], fraction: float) -> Splits:
    """Hold out the documents whose share is below `fraction`; TextError where a split is empty."""
    if len(documents) < 2:
        raise TextError(f"a corpus needs 2 documents, one of them held out; there are {len(documents)}")
    heldout = [document for document in documents if document.share < fraction]
    if 0 < len(heldout) < len(documents):
        return Splits([document for document in documents if document.share >= fraction], heldout)
    near = documents[-2:] if heldout else documents[:2]  # in the order of their shares
    legal = (near[0].share + near[1].share) / 2
    raise TextError(
        f"--heldout={fraction:g} holds out {len(heldout)} of {len(documents)} documents; neither split "
        f"may be empty: give another fraction, such as --heldout={legal:.4g}"
    )


def texts(document: Document) -> Iterator[str]:
    """The text in pieces that end with a line, or inside one that is very long.

    TextError at the end if the content is not the one that was examined.
    """
    digest = hashlib.sha256()
    try:
        for raw, text in _pieces(document.file):
            digest.update(raw)
            yield text
        same = digest.hexdigest() == document.sha256
    except UnicodeDecodeError:
        same = False
    if not same:
        raise TextError(f"{document.file} has changed while it was read: give the same command again")


def _glob(folder: Path, glob: str) -> list[Path]:
    try:
        return [file for file in folder.glob(glob) if file.is_file()]
    except (ValueError, NotImplementedError, IndexError):
        raise TextError(f"--glob={glob} is no pattern of paths below --text, as '**/*.txt' is") from None


def _examine(file: Path, name: str) -> Document | tuple[str, str]:
    digest, size = hashlib.sha256(), 0
    try:
        for raw, text in _pieces(file):
            if "\0" in text:
                return name, "holds a NUL byte"
            digest.update(raw)
            size += len(raw)
    except UnicodeDecodeError:
        return name, "is not UTF-8"
    except OSError as error:
        raise TextError(
            f"{file} cannot be read ({error.strerror}): let it be read, or move it away"
        ) from None
    if not size:
        return name, "is empty"
    place = hashlib.sha256(os.fsencode(name)).hexdigest()
    return Document(name, place, file, size, digest.hexdigest())


def _pieces(file: Path) -> Iterator[tuple[bytes, str]]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    with file.open("rb") as content:
        while raw := content.read(BLOCK) + content.readline(BLOCK):
            yield raw, decoder.decode(raw)
        decoder.decode(b"", final=True)
