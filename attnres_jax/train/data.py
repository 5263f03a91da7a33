"""Tokens on disk, and batches by step number.

A corpus is a folder: `train.bin` and `heldout.bin`, raw little-endian tokens, `tokenizer.model` where
there is one, and `meta.json` with their sizes and checksums. It is written under another name and
renamed, so it is whole or absent; it is verified whenever it is opened, then memory-mapped.
"""

import contextlib
import errno
import hashlib
import json
import lzma
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Bool, Int32, Integer, UInt

from attnres_jax.configs.base import UserError
from attnres_jax.models.tokenizer import BPE, Bytes, Tokenizer

AUSTEN = Path(__file__).parent / "austen"
TRAIN_NOVELS = (
    "emma",
    "mansfield_park",
    "northanger_abbey",
    "pride_and_prejudice",
    "sense_and_sensibility",
)
HELDOUT_NOVELS = ("persuasion",)
SPLITS = ("train", "heldout")
MODEL = "tokenizer.model"
FORMAT = 2


class DataError(UserError):
    """A corpus that is missing, damaged or too short; says what to do about it."""


class Corpus(NamedTuple):
    """Two memory-mapped token arrays and what their numbers mean."""

    train: UInt[np.ndarray, " train"]
    heldout: UInt[np.ndarray, " heldout"]
    vocab: int
    bytes_per_token: float  # of the held-out text; ends of documents are tokens, and no bytes
    source: str
    end: int | None  # the token after a document; None where documents follow without one
    tokenizer: Tokenizer | None  # None where the tokens are no text


class Windows(NamedTuple):
    """A batch of held-out text; `mask` marks the predictions that count, padding does not."""

    tokens: Int32[np.ndarray, "B T+1"]
    mask: Bool[np.ndarray, "B T"]


def open_corpus(corpus: str, cache: str | Path | None = None) -> Corpus:
    """The shipped novels (`austen`), cached under `cache`, or a folder made by `data prepare`."""
    if corpus != "austen":
        return _open(Path(corpus), "make it again with data prepare")
    return _open(_austen(Path(cache or cache_dir())), "delete it: the next start makes it anew")


def prepare(
    folder: str | Path,
    train: Integer[np.ndarray, " train"],
    heldout: Integer[np.ndarray, " heldout"],
    *,
    vocab: int,
    source: str,
    bytes_per_token: float = 1.0,
    bytewise: bool = False,
) -> None:
    """Write tokens as a corpus folder, in one step; FileExistsError if there is one already.

    `bytewise`: the tokens are the bytes of a text. `train.prepare` makes a corpus from files.
    """
    folder = Path(folder)
    draft = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}")
    draft.mkdir(parents=True)
    try:
        meta = {
            "source": source,
            "vocab": vocab,
            "bytes_per_token": bytes_per_token,
            "end": None,
            "tokenizer": {"kind": "bytes"} if bytewise else None,
            "train": _write_tokens(draft / "train.bin", train, vocab),
            "heldout": _write_tokens(draft / "heldout.bin", heldout, vocab),
        }
        write_meta(draft, meta)
        publish(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """The last file of a corpus: what the others are, under a checksum of its own."""
    meta = {"format": FORMAT, "dtype": token_dtype(meta["vocab"]).str} | meta
    text = json.dumps({"meta": meta, "sha256": _meta_sha256(meta)}, indent=1)
    write(folder / "meta.json", text.encode())


def read_meta(folder: Path) -> dict[str, Any]:
    """What `write_meta` wrote; DataError where that is not there or not whole."""
    file = folder / "meta.json"
    if not file.is_file():
        raise DataError(f"{file.name} is missing")
    try:
        content = json.loads(file.read_bytes())
        meta, found = content["meta"], content["sha256"]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{file.name} cannot be read") from None
    if _meta_sha256(meta) != found:
        raise DataError(f"{file.name} does not match its own checksum")
    if meta["format"] != FORMAT:
        raise DataError(f"its format is {meta['format']}, this version reads {FORMAT}")
    return meta


def token_dtype(vocab: int) -> np.dtype:
    """The narrowest little-endian unsigned type for tokens below `vocab`."""
    return np.min_scalar_type(vocab - 1).newbyteorder("<")


def write(file: Path, raw: bytes) -> None:
    """Write and wait for the disk."""
    with file.open("wb") as out:
        out.write(raw)
        out.flush()
        os.fsync(out.fileno())


def publish(draft: Path, folder: Path) -> None:
    """Rename a finished draft; FileExistsError if another was quicker."""
    try:
        draft.rename(folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        raise FileExistsError(error.errno, "a corpus is there already", str(folder)) from None


class Batches:
    """Endless training batches by step number, whatever came before; see `train_batches`."""

    def __init__(self, rows: grain.MapDataset, batch: int, length: int):
        self._rows: Any = rows
        self.shape = (batch, length + 1)

    def rows(self, step: int, first: int, last: int) -> Int32[np.ndarray, "rows T1"]:
        """Rows `first` to `last` of the batch of a step: a process makes only what its devices hold."""
        start = step * self.shape[0]
        return np.stack([self._rows[start + row] for row in range(first, last)])

    def __getitem__(self, step: int) -> Int32[np.ndarray, "B T1"]:
        return self.rows(step, 0, self.shape[0])


def train_batches(tokens: UInt[np.ndarray, " tokens"], length: int, batch: int, seed: int) -> Batches:
    """Batches int32 [batch, length + 1]; each epoch holds every window once, in an order of its own."""
    windows = _Windows(tokens, length)
    if len(windows) == 0:
        raise DataError(
            f"data.length = {length} needs {length + 1} tokens, the training text has {len(tokens)}"
        )
    # Grain adds the epoch to the seed: unspread, seed 1 would start with seed 0's second epoch.
    spread = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return Batches(grain.MapDataset.source(windows).shuffle(seed=spread).repeat(), batch, length)


def heldout_windows(
    tokens: UInt[np.ndarray, " tokens"], length: int, batch: int, limit: int = 0
) -> Iterator[Windows]:
    """The text in order, each token but the first predicted once; `limit` predictions, 0 for all.

    Every batch has the same shape: what lies beyond the end is masked and zero.
    """
    predictions = min(limit or len(tokens), len(tokens) - 1)
    for first in range(0, predictions, batch * length):
        starts = first + length * np.arange(batch)
        at = starts[:, None] + np.arange(length + 1)
        inside = at <= predictions
        filled = np.where(inside, tokens[np.minimum(at, predictions)], 0)
        yield Windows(filled.astype(np.int32), inside[:, 1:])


@dataclass(frozen=True)
class _Windows:
    """Consecutive windows; neighbours share one token, the last target and first input."""

    tokens: np.ndarray
    length: int

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def __getitem__(self, index: int) -> np.ndarray:
        start = index * self.length
        return self.tokens[start : start + self.length + 1].astype(np.int32)


def cache_dir() -> Path:
    """Where this package keeps what it can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attnres_jax"


def _austen(cache: Path) -> Path:
    """The folder of the novels' bytes; named after the shipped files, so it is never stale."""
    shipped = {name: _shipped(name) for name in (*TRAIN_NOVELS, *HELDOUT_NOVELS)}
    digest = hashlib.sha256(b"".join((b"%d" % FORMAT, *shipped.values()))).hexdigest()
    folder = cache / f"austen-{digest[:12]}"
    if not folder.exists():
        texts = ([_text(n, shipped[n]) for n in names] for names in (TRAIN_NOVELS, HELDOUT_NOVELS))
        train, heldout = (np.frombuffer(b"\n\n\n".join(parts), np.uint8) for parts in texts)
        try:
            with contextlib.suppress(FileExistsError):  # another process was quicker, with the same
                source = "Jane Austen, six novels, bytes"
                prepare(folder, train, heldout, vocab=256, source=source, bytewise=True)
        except OSError as error:
            raise DataError(
                f"cannot write the token cache {folder} ({error.strerror}): "
                "set XDG_CACHE_HOME to a folder that can be written"
            ) from error
    return folder


def _shipped(name: str) -> bytes:
    file = AUSTEN / f"{name}.txt.xz"
    if not file.is_file():
        raise DataError(f"{file} is missing: install attnres-jax again")
    return file.read_bytes()


def _text(name: str, packed: bytes) -> bytes:
    try:
        return lzma.decompress(packed)
    except lzma.LZMAError as error:
        raise DataError(f"{AUSTEN / name}.txt.xz is damaged ({error}): install attnres-jax again") from error


def _write_tokens(file: Path, tokens: np.ndarray, vocab: int) -> dict[str, Any]:
    whole = np.issubdtype(tokens.dtype, np.integer)
    if not whole or len(tokens) < 2 or tokens.min() < 0 or tokens.max() >= vocab:
        raise DataError(f"{file.stem}: expected 2 or more whole numbers from 0 to {vocab - 1}")
    raw = tokens.astype(token_dtype(vocab)).tobytes()
    write(file, raw)
    return {"tokens": len(tokens), "sha256": hashlib.sha256(raw).hexdigest()}


def _meta_sha256(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _open(folder: Path, fix: str) -> Corpus:
    if not folder.is_dir():
        raise DataError(
            f"corpus {str(folder)!r}: no such folder; legal: austen, or a folder made by "
            "python -m attnres_jax data prepare"
        )
    try:
        meta = read_meta(folder)
        tokenizer = _tokenizer(folder / MODEL, meta)
        train, heldout = (_tokens(folder / f"{name}.bin", meta, meta[name]) for name in SPLITS)
    except DataError as error:
        raise DataError(f"corpus {str(folder)!r} is damaged: {error}; {fix}") from None
    return Corpus(
        *(train, heldout, meta["vocab"], meta["bytes_per_token"]),
        *(meta["source"], meta["end"], tokenizer),
    )


def _tokens(file: Path, meta: dict[str, Any], split: dict[str, Any]) -> np.ndarray:
    dtype = np.dtype(meta["dtype"])
    _verify(file, split["tokens"] * dtype.itemsize, split["sha256"])
    return np.memmap(file, dtype=dtype, mode="r")


def _tokenizer(file: Path, meta: dict[str, Any]) -> Tokenizer | None:
    match meta["tokenizer"]:
        case {"kind": "bpe", "bytes": size, "sha256": sha256}:
            _verify(file, size, sha256)
            return BPE(file, meta["vocab"], meta["end"])
        case {"kind": "bytes"}:
            return Bytes(meta["end"])
    return None


def _verify(file: Path, expected: int, sha256: str) -> None:
    size = file.stat().st_size if file.is_file() else 0
    if size != expected:
        raise DataError(f"{file.name} has {size} bytes, not {expected}")
    with file.open("rb") as raw:
        if hashlib.file_digest(raw, "sha256").hexdigest() != sha256:
            raise DataError(f"{file.name} does not match its checksum in meta.json")
