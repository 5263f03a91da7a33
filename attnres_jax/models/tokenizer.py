"""Text to tokens and back, exactly: the bytes themselves, or byte pair encoding by sentencepiece.

sentencepiece is imported when a text is encoded: training on finished tokens does not need it.
"""

import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, Integer

SPACE_MARK = "\u2581"  # stands for a space inside sentencepiece
LONGEST_LINE = 1 << 24  # bytes; sentencepiece would leave longer ones out without a word


class CannotTrain(ValueError):
    """A text that a vocabulary of this size cannot be made from; says which size could."""


@runtime_checkable
class Tokenizer(Protocol):
    """`decode(encode(text)) == text`, for any text; the `end` of a document is no text."""

    @property
    def vocab(self) -> int:
        """How many values a token may have."""
        ...

    @property
    def end(self) -> int | None:
        """The token after the last one of a document; None where documents have no end."""
        ...

    def encode(self, text: str) -> Int32[np.ndarray, " tokens"]:
        """The tokens of a text; bytes that are no UTF-8 may come as surrogates, as from a shell."""
        ...

    def decode(self, tokens: Integer[np.ndarray, " tokens"]) -> str:
        """The text of tokens; bytes that are no UTF-8 are marked by U+FFFD."""
        ...


@dataclass(frozen=True)
class Bytes:
    """UTF-8, a byte a token."""

    end: int | None = None
    vocab: int = 256

    def encode(self, text: str) -> Int32[np.ndarray, " tokens"]:
        """Its bytes."""
        return np.frombuffer(text.encode(errors="surrogateescape"), np.uint8).astype(np.int32)

    def decode(self, tokens: Integer[np.ndarray, " tokens"]) -> str:
        """The text of these bytes."""
        return tokens.astype(np.uint8).tobytes().decode(errors="replace")


@dataclass(frozen=True)
class BPE:
    """Byte pair encoding by the sentencepiece model in `file`; what it has not seen becomes bytes."""

    file: Path
    vocab: int
    end: int | None

    @cached_property
    def _model(self) -> Any:
        from sentencepiece import SentencePieceProcessor

        return SentencePieceProcessor(model_file=str(self.file))

    def encode(self, text: str) -> Int32[np.ndarray, " tokens"]:
        """Pieces of words, and bytes where there is no piece; a piece never holds a line end."""
        text = text.encode(errors="surrogateescape").decode(errors="replace")
        mark = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        first, *others = self._model.encode(text.split(SPACE_MARK))
        for tokens in others:  # the mark as bytes, or it would come back as a space
            first += mark + tokens
        return np.array(first, np.int32)

    def decode(self, tokens: Integer[np.ndarray, " tokens"]) -> str:
        """The text of these pieces and bytes."""
        return self._model.decode(tokens.tolist())


def train_bpe(texts: Iterable[str], vocab: int) -> bytes:
    """A sentencepiece model file of `vocab` tokens: 0 is unused, 1 the end, 2 to 257 the bytes.

    The same texts in the same order give the same file. CannotTrain where `vocab` does not suit them.
    """
    from sentencepiece import SentencePieceTrainer

    model, stopped = io.BytesIO(), []
    try:
        SentencePieceTrainer.train(
            sentence_iterator=_lines(texts, stopped),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=LONGEST_LINE,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise CannotTrain(_advice(str(error), vocab)) from error
    finally:
        if stopped:
            raise stopped[0]
    return model.getvalue()


def _lines(texts: Iterable[str], stopped: list[BaseException]) -> Iterator[str]:
    """What sentencepiece learns from; an exception goes to `stopped`, it would make it a text."""
    try:
        for text in texts:
            # Tabs and line ends never enter a piece: they are single bytes, and lines can be encoded apart.
            yield from filter(None, re.split(rf"[\n\t{SPACE_MARK}]+", text))
    except BaseException as error:
        stopped.append(error)


def _advice(message: str, vocab: int) -> str:
    """What sentencepiece says, in a line that ends with a size that would do."""
    most = re.search(r"value <= (\d+)", message)
    least = re.search(r"required_chars\. \d+ vs (\d+)", message)
    if most:
        return f"a vocabulary of {vocab} is too large for this text: at most {most[1]}"
    if least:
        return f"a vocabulary of {vocab} is too small for this text: more than {least[1]}"
    return f"sentencepiece cannot make a vocabulary of {vocab}: {' '.join(message.split())}"
