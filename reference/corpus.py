"""Text to train on: documents from a folder, their tokens end to end, and the order in which they are read.

Documents are packed: all ids in one line, <|endoftext|> after each document, cut into rows of equal length whatever
they begin with. Nothing is padded and no position is wasted.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library
from tqdm import tqdm

from neox.reference.errors import InputError
from neox.reference.model import Array
from neox.reference.tokenizer import END_OF_TEXT, Tokenizer

# Reading.

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz")


def _decoded(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: byte {error.start} is {content[error.start]:#04x}") from error


def _line_text(line: str, number: int, path: Path) -> str:
    try:
        text: Any = json.loads(line)["text"]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f'{path}, line {number}: must be a JSON object with a "text"') from error
    if not isinstance(text, str):
        raise InputError(f'{path}, line {number}: "text" must be a string, not {type(text).__name__}')
    return text


def _documents_of(path: Path) -> Iterator[str]:
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    text = _decoded(content, path)
    if path.suffix == ".txt":
        yield text
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _line_text(line, number, path)


def documents(path: str | Path) -> Iterator[str]:
    """The texts of a file, or of all files below a folder in the order of their names.

    A .txt is one document; a .jsonl or .jsonl.gz has one in the "text" of each line. InputError if there is no such
    file, or one cannot be read.
    """
    root = Path(path)
    files = [root] if root.is_file() else sorted(file for file in root.rglob("*") if file.name.endswith(SUFFIXES))
    if not files:
        raise InputError(f"{root} holds no text: no {', '.join(SUFFIXES)}")
    for file in files:
        yield from _documents_of(file)


# The tokenizer.

# GPT-2's way to cut text before pairs are merged, but for numbers, of which every digit is a token of its own: a model
# then sees which digit stands where.
SMALLEST_VOCABULARY = 257
PIECES = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Library:
    """Byte-level BPE as the 20B's, with <|endoftext|> as id 0, and every digit by itself.

    vocab_size: at most so many tokens; InputError if they are too few for every byte to have one.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise InputError(
            f"a vocabulary of {vocab_size} is too small: {END_OF_TEXT} and bytes are {SMALLEST_VOCABULARY}"
        )
    library = Library(models.BPE())
    library.normalizer = normalizers.NFC()
    cut = pre_tokenizers.Split(Regex(PIECES), "isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    return library


# Packing.


@dataclass(frozen=True)
class Packed:
    """Ids of all documents in rows; each row begins with the id that the one before it ends with."""

    ids: Array  # (n,) integers
    length: int  # positions of a row

    @property
    def rows(self) -> int:
        """How many whole rows there are."""
        return (len(self.ids) - 1) // self.length

    def __getitem__(self, indices: Array) -> Array:  # (B,) -> (B,T+1)
        starts = np.asarray(indices)[:, None] * self.length
        return self.ids[starts + np.arange(self.length + 1)].astype(np.int64)

    def split(self, held_out: int) -> tuple[Packed, Packed]:
        """The rows but the last ones, and the last ones. InputError if nothing would be left."""
        if self.rows <= held_out:
            raise InputError(f"{len(self.ids)} tokens are {self.rows} rows of {self.length}: too few to hold some out")
        kept = (self.rows - held_out) * self.length
        return Packed(self.ids[: kept + 1], self.length), Packed(self.ids[kept:], self.length)

    def first(self, rows: int) -> Packed:
        """So many rows of it, or all whole ones if there are fewer."""
        return Packed(self.ids[: min(rows, self.rows) * self.length + 1], self.length)

    def checksum(self) -> int:
        """Tells whether a run goes on with the data it began with."""
        return zlib.crc32(self.ids.tobytes())


def pack(texts: Iterable[str], tokenizer: Tokenizer, length: int) -> Packed:
    """InputError if there is no text in them, or the tokenizer has no <|endoftext|>."""
    if tokenizer.eos is None:
        raise InputError(f"the tokenizer has no {END_OF_TEXT}, which separates documents")
    dtype = np.uint16 if tokenizer.size <= 1 << 16 else np.uint32
    parts = []
    for text in tqdm(texts, "reading", unit="texts", disable=None, leave=False):
        if ids := tokenizer.encode(text):
            parts.append(np.array([*ids, tokenizer.eos], dtype))
    if not parts:
        raise InputError("the corpus is empty: all of its texts are")
    return Packed(np.concatenate(parts), length)


# The order.


@lru_cache(maxsize=2)
def _epoch_order(rows: int, seed: int, epoch: int) -> Array:
    return np.random.default_rng([seed, epoch]).permutation(rows)


def batch_rows(rows: int, batch: int, step: int, seed: int) -> Array:  # (B,)
    """Which rows the update number `step` (from 0) learns from: every row once an epoch, in an order drawn for it.

    It follows from its arguments alone, so a run that was interrupted goes on as if it had not been.
    """
    indices = range(step * batch, (step + 1) * batch)
    return np.array([_epoch_order(rows, seed, i // rows)[i % rows] for i in indices])
