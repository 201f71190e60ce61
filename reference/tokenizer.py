"""Text to token ids and back: byte-level BPE, as the tokenizer.json of a model's folder defines it.

Encoding is left to the `tokenizers` library. Decoding is by bytes: every token stands for some bytes, which need not be
whole characters, and the text is what the bytes of all tokens spell in UTF-8. So text can be streamed: a character
whose last byte has not come yet is held back, and nothing that was printed has to be taken back.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as Library
from tokenizers.decoders import ByteLevel

from neox.reference.checkpoint.hub import find
from neox.reference.errors import InputError

END_OF_TEXT = "<|endoftext|>"


def _printable_bytes() -> dict[str, int]:
    """The characters by which tokenizer.json writes bytes, as GPT-2 began it.

    A byte that is a printable character of Latin-1 is written as itself; the others, in order, as U+0100, U+0101, ...
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{chr(byte): byte for byte in printable}, **{chr(256 + i): byte for i, byte in enumerate(others)}}


BYTES = _printable_bytes()


def bytes_of(token: str) -> bytes:
    """The bytes of a token of the file; a token with a character that writes no byte (runs of spaces) is plain text."""
    if all(character in BYTES for character in token):
        return bytes(BYTES[character] for character in token)
    return token.encode("utf-8")


class Utf8Stream:
    """Bytes in, text out as soon as it is decided. What is no UTF-8 becomes U+FFFD, as in bytes.decode."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, some: bytes) -> str:
        return self._decoder.decode(some)

    def flush(self) -> str:
        """The end of the text: a character of which only the first bytes came is U+FFFD."""
        return self._decoder.decode(b"", final=True)


class Tokenizer:
    """A tokenizer.json. `size`: one more than the largest id that has a token; `eos`: the id of <|endoftext|>, or None;
    `special`: ids that stand for no text.

    The rows of a model's vocabulary are padded to a round number, so it has ids without a token: they decode to
    nothing, and are never sampled.
    """

    def __init__(self, library: Library) -> None:
        vocabulary = library.get_vocab(with_added_tokens=True)
        self._library = library
        self._bytes = {index: bytes_of(token) for token, index in vocabulary.items()}
        self.size: int = max(self._bytes, default=-1) + 1
        self.eos: int | None = library.token_to_id(END_OF_TEXT)
        self.special = frozenset(i for i, token in library.get_added_tokens_decoder().items() if token.special)

    def encode(self, text: str) -> list[int]:
        """Ids of the text, and nothing more; <|endoftext|> written in it becomes the one id that it names.

        InputError if the text holds half of a surrogate pair, which no UTF-8 can express.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            wrong = f"character {error.start} is {text[error.start]!a}"
            raise InputError(f"the text is not valid Unicode: {wrong}, half of a surrogate pair") from error
        return self._library.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text that the ids spell, special tokens included; decode(encode(t)) is t in normal form NFC."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, index: int) -> bytes:
        """What a token adds to the text; nothing for an id without one. InputError if it cannot be an id."""
        if index < 0:
            raise InputError(f"token ids begin at 0, so {index} is none")
        return self._bytes.get(int(index), b"")

    def has_token(self, vocab_size: int) -> NDArray[np.bool_]:  # (V,)
        """Which ids of a model's vocabulary have a token."""
        return np.isin(np.arange(vocab_size), list(self._bytes))

    def to_json(self) -> str:
        """The contents of a tokenizer.json."""
        return self._library.to_str(pretty=True)

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """One piece of text for each id, and a last one: joined, they are decode(ids)."""
        utf8 = Utf8Stream()
        for index in ids:
            yield utf8.feed(self.token_bytes(index))
        yield utf8.flush()


STEP = re.compile(r"(global_)?step\d+")


def tokenizer_file(folder: Path) -> Path:
    """Its tokenizer.json, or as gpt-neox names it; the steps of a training may share the one in the folder above."""
    homes = [folder, folder.parent] if STEP.fullmatch(folder.name) else [folder]
    names = ("tokenizer.json", "20B_tokenizer.json")
    found = [home / name for home in homes for name in names if (home / name).is_file()]
    return found[0] if found else folder / names[0]


def load_tokenizer(path: str | Path, revision: str | None = None) -> Tokenizer:
    """The tokenizer of a model, by folder or name as for `load`, or of a tokenizer.json.

    InputError if there is none, or it cannot be read.
    """
    file = Path(path)
    if not file.is_file():
        file = tokenizer_file(find(path, revision))
    if not file.is_file():
        raise InputError(f"{file} does not exist: text needs the tokenizer.json that belongs to the model")
    try:
        library = Library.from_file(str(file))
    except Exception as error:  # the library raises nothing more specific
        raise InputError(f"{file} is not a tokenizer: {' '.join(str(error).split())}") from error
    if not isinstance(library.decoder, ByteLevel):
        raise InputError(f"{file} is not a byte-level tokenizer, the only kind that is implemented")
    library.no_truncation()
    library.no_padding()
    return Tokenizer(library)
