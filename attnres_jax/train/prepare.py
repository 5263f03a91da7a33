"""A corpus from files: `python -m attnres_jax data prepare`.

Work goes into a draft folder beside the corpus, named after a fingerprint of all that decides the
result: the same command finds it again after a kill. In it the tokenizer, then the tokens part by part,
each file whole or absent and under a checksum; at last the corpus itself, verified and renamed.
"""

import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from attnres_jax.models.tokenizer import BPE, Bytes, CannotTrain, Tokenizer, train_bpe
from attnres_jax.train import data, documents
from attnres_jax.train.documents import Document, Splits, TextError
from attnres_jax.train.progress import Progress

PART = 1 << 22  # bytes of text in a part, at least; a document is never cut
SAMPLE = 1 << 26  # bytes of training text that a tokenizer is made from, at most about
NAMED = 5  # files left out that the summary names; meta.json names them all


class Recipe(NamedTuple):
    """What to make a corpus of, and where."""

    text: Path
    globs: tuple[str, ...]
    out: Path
    tokenizer: str  # bytes or bpe
    vocab: int  # token values
    heldout: float  # fraction of the documents


def prepare(recipe: Recipe) -> None:
    """Make the corpus, or finish it, or say that it is there; TextError for what the user can change."""
    if recipe.out.resolve().is_relative_to(recipe.text.resolve()):
        raise TextError(f"--out={recipe.out} lies inside --text={recipe.text}: name a folder outside")
    try:
        _prepare(recipe)
    except KeyboardInterrupt:
        raise TextError("stopped; the same command goes on from here") from None
    except OSError as error:
        where = error.filename or recipe.out
        raise TextError(f"{where}: {error.strerror}; --text must be readable, --out writable") from error


def fingerprint(recipe: Recipe, chosen: Iterable[Document]) -> str:
    """Of all that decides the bytes of the corpus: contents and their names, and the tokenizer."""
    settings: list[Any] = [data.FORMAT, PART, SAMPLE, recipe.tokenizer, recipe.vocab, recipe.heldout]
    if recipe.tokenizer == "bpe":
        import sentencepiece

        settings.append(sentencepiece.__version__)
    settings += [(document.place, document.sha256) for document in chosen]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def _prepare(recipe: Recipe) -> None:
    names = documents.list_files(recipe.text, recipe.globs)
    with Progress("reading", len(names), "files") as progress:
        found = documents.found(progress.each(documents.examine(recipe.text, names)))
    splits = documents.split(found.documents, recipe.heldout)
    mark = fingerprint(recipe, found.documents)
    draft = recipe.out.with_name(f".{recipe.out.name}.{mark[:16]}")
    if recipe.out.exists():
        _check_same(recipe.out, mark)
        print(f"{recipe.out} is finished already: nothing to do")
    else:
        _make(recipe, splits, found.left_out, draft, mark)
    shutil.rmtree(draft, ignore_errors=True)
    _report(recipe.out, data.read_meta(recipe.out))


def _check_same(out: Path, mark: str) -> None:
    try:
        held = data.read_meta(out).get("fingerprint")
    except data.DataError as error:
        raise TextError(
            f"{out} exists and is no whole corpus ({error}): delete it, or give another --out"
        ) from None
    if held != mark:
        raise TextError(
            f"{out} was made of other text or with other options: delete it, or give another --out"
        )
    data.open_corpus(str(out))


def _make(recipe: Recipe, splits: Splits, left_out: dict[str, str], draft: Path, mark: str) -> None:
    draft.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(recipe, splits.train, draft)
    size = sum(document.size for split in splits for document in split)
    with Progress("encoding", size, "bytes") as progress:
        parts = {
            name: _encode(split, name, tokenizer, draft, progress) for name, split in splits._asdict().items()
        }
    corpus = draft / f"corpus.{secrets.token_hex(8)}"
    corpus.mkdir()
    tokens = {name: _join(files, corpus / f"{name}.bin", tokenizer) for name, files in parts.items()}
    about = {
        "source": f"{recipe.text.resolve().name}, {recipe.tokenizer} {recipe.vocab}",
        "vocab": recipe.vocab,
        "bytes_per_token": sum(document.size for document in splits.heldout) / tokens["heldout"]["tokens"],
        "end": tokenizer.end,
        "tokenizer": {"kind": recipe.tokenizer} | _copy_model(tokenizer, corpus),
        **{name: tokens[name] | {"documents": len(split)} for name, split in splits._asdict().items()},
        "left_out": left_out,
        "fingerprint": mark,
    }
    data.write_meta(corpus, about)
    data.open_corpus(str(corpus))
    data.publish(corpus, recipe.out)


def _tokenizer(recipe: Recipe, train: list[Document], draft: Path) -> Tokenizer:
    if recipe.tokenizer == "bytes":
        return Bytes(end=0)
    file = draft / data.MODEL
    if not _is_sound(file):
        print(f"making a vocabulary of {recipe.vocab}", flush=True)
        try:
            model = train_bpe(_sample(train), recipe.vocab)
        except CannotTrain as error:
            raise TextError(f"--vocab: {error}") from None
        _write_sound(file, [model])
    return BPE(file, recipe.vocab, end=1)


def _sample(train: list[Document]) -> Iterator[str]:
    """The text of every n-th document, about SAMPLE bytes in all; their order is that of a hash."""
    every = math.ceil(sum(document.size for document in train) / SAMPLE)
    return (text for document in train[::every] for text in documents.texts(document))


def _encode(
    split: list[Document], name: str, tokenizer: Tokenizer, draft: Path, progress: Progress
) -> list[Path]:
    """The files of the parts of a split; those that are there and sound are kept."""
    files = []
    for index, part in enumerate(_parts(split)):
        file = draft / f"{name}-{index:05}.bin"
        if not _is_sound(file):
            _write_sound(file, _tokens(part, tokenizer))
        progress.add(sum(document.size for document in part))
        files.append(file)
    return files


def _parts(split: list[Document]) -> Iterator[list[Document]]:
    part, size = [], 0
    for document in split:
        part.append(document)
        size += document.size
        if size >= PART:
            yield part
            part, size = [], 0
    if part:
        yield part


def _tokens(part: list[Document], tokenizer: Tokenizer) -> Iterator[bytes]:
    """The tokens of documents as they lie on disk, each document followed by its end."""
    dtype = data.token_dtype(tokenizer.vocab)
    for document in part:
        for text in documents.texts(document):
            yield tokenizer.encode(text).astype(dtype).tobytes()
        yield np.array(tokenizer.end, dtype).tobytes()


def _write_sound(file: Path, pieces: Iterable[bytes]) -> None:
    """Write `file` whole or not, then its checksum: without the second the first does not count."""
    digest, unfinished = hashlib.sha256(), file.with_name(f"{file.name}.{os.getpid()}")
    with unfinished.open("wb") as out:
        for piece in pieces:
            digest.update(piece)
            out.write(piece)
        out.flush()
        os.fsync(out.fileno())
    unfinished.replace(file)
    data.write(_checksum(file), digest.hexdigest().encode())


def _is_sound(file: Path) -> bool:
    if not (file.is_file() and _checksum(file).is_file()):
        return False
    with file.open("rb") as raw:
        return hashlib.file_digest(raw, "sha256").hexdigest().encode() == _checksum(file).read_bytes()


def _checksum(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256")


def _join(parts: list[Path], file: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    digest = hashlib.sha256()
    with file.open("wb") as out:
        for part in parts:
            raw = part.read_bytes()
            digest.update(raw)
            out.write(raw)
        out.flush()
        os.fsync(out.fileno())
        size = out.tell()
    return {"tokens": size // data.token_dtype(tokenizer.vocab).itemsize, "sha256": digest.hexdigest()}


def _copy_model(tokenizer: Tokenizer, corpus: Path) -> dict[str, Any]:
    if not isinstance(tokenizer, BPE):
        return {}
    raw = tokenizer.file.read_bytes()
    data.write(corpus / data.MODEL, raw)
    return {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}


def _report(out: Path, meta: dict[str, Any]) -> None:
    for name in data.SPLITS:
        print(f"{name:>8}: {meta[name]['documents']:,} documents, {meta[name]['tokens']:,} tokens")
    print(f"held-out text: {meta['bytes_per_token']:.4f} bytes/token, with an end token a document")
    left_out = meta["left_out"]
    for why in dict.fromkeys(left_out.values()):
        names = [repr(name) for name, reason in left_out.items() if reason == why]
        more = ", ..." if len(names) > NAMED else ""
        print(f"left out, {why}: {len(names):,} files: {', '.join(names[:NAMED])}{more}")
    print(f"train on it with --config.data.corpus={out}")
