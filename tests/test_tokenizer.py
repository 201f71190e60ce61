"""The tokenizer: published ids, the round trip of any text, and streams that join to the whole.

The real tokenizer of the 20B is not part of the project. It is looked for in $NEOX_ASSETS/tokenizer; tests that need
it skip where it is absent.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from neox.reference import shipped
from neox.reference.errors import InputError
from neox.reference.tokenizer import Tokenizer, Utf8Stream, bytes_of, load_tokenizer

HERE = Path(__file__).resolve().parent
REAL = Path(os.environ.get("NEOX_ASSETS", "")) / "tokenizer" / "20B_tokenizer.json"
ABSENT = "the 20B's tokenizer is not here: set NEOX_ASSETS to a folder with tokenizer/20B_tokenizer.json"
needs_real = pytest.mark.skipif(not REAL.is_file(), reason=ABSENT)

VECTORS = json.loads((HERE / "data" / "tokenizer_vectors.json").read_text(encoding="utf-8"))


@cache
def loaded(name: str) -> Tokenizer:
    return load_tokenizer(REAL if name == "real" else shipped.path())


@cache
def library(name: str) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(REAL if name == "real" else shipped.path() / "tokenizer.json"))


both = pytest.mark.parametrize("name", ["shipped", pytest.param("real", marks=needs_real)])


# What hypothesis draws.

# Python and the library know different versions of Unicode, so what NFC makes of newer characters may differ between
# the two; of these it is the same in all.
OLD_CHARACTERS = st.characters(exclude_categories=["Cs"]).filter(
    lambda character: unicodedata.ucd_3_2_0.category(character) != "Cn"
)
AWKWARD = [
    " " * 2,
    " " * 24,
    " " * 25,
    "\r\n",
    "\t",
    "e\u0301",
    "\ufffd",
    "\u200d",
    "\0",
    "👩‍👩‍👧‍👦",
    "日本",
    "don't",
    "\ufeff",
]
texts = st.lists(st.text(OLD_CHARACTERS, max_size=8) | st.sampled_from(AWKWARD), max_size=6).map("".join)
ids_of = {"shipped": st.lists(st.integers(0, 1100), max_size=12), "real": st.lists(st.integers(0, 50431), max_size=12)}
# Ids below this stand for single bytes, which rarely make a character.
single_bytes = st.lists(st.integers(0, 257), max_size=12)


# Text to ids and back.


@needs_real
@pytest.mark.parametrize("vector", VECTORS, ids=range(len(VECTORS)))
def test_published_vectors(vector: dict[str, object]) -> None:
    tokenizer = loaded("real")
    assert tokenizer.encode(str(vector["text"])) == vector["ids"]
    expected = vector.get("decoded", unicodedata.normalize("NFC", str(vector["text"])))
    assert tokenizer.decode(vector["ids"]) == expected


@needs_real
def test_the_20b_has_50277_tokens_and_pads_them_with_ids_that_are_not_sampled() -> None:
    tokenizer = loaded("real")
    assert (tokenizer.size, tokenizer.eos) == (50277, 0)
    assert np.array_equal(tokenizer.has_token(50432), np.arange(50432) < 50277)
    assert tokenizer.decode([50277, 12092, 50431, 1533, 10**12]) == "Hello world"
    assert tokenizer.decode([50254]) == " " * 24


def test_the_shipped_tokenizer_fills_the_vocabulary_of_the_shipped_model() -> None:
    tokenizer = loaded("shipped")
    assert (tokenizer.size, tokenizer.eos) == (1024, 0)
    assert tokenizer.has_token(1024).all()
    assert not tokenizer.has_token(1030)[1024:].any()


@both
@given(text=texts)
@example(text="".join(AWKWARD))
def test_decoding_what_was_encoded_gives_the_text_in_nfc(name: str, text: str) -> None:
    assert loaded(name).decode(loaded(name).encode(text)) == unicodedata.normalize("NFC", text)


@both
@given(before=texts, after=texts)
def test_special_tokens_written_in_text_are_single_ids_and_come_back(name: str, before: str, after: str) -> None:
    tokenizer = loaded(name)
    ids = tokenizer.encode(f"{before}<|endoftext|>{after}")
    assert ids == [*tokenizer.encode(before), 0, *tokenizer.encode(after)]
    assert tokenizer.decode([0]) == "<|endoftext|>"


@both
def test_encoding_adds_nothing(name: str) -> None:
    assert loaded(name).encode("") == []
    assert 0 not in loaded(name).encode("a")


def test_what_the_file_would_add_or_cut_off_is_left_alone(tmp_path: Path) -> None:
    changed = tokenizers.Tokenizer.from_file(str(shipped.path() / "tokenizer.json"))
    changed.enable_truncation(2)
    changed.enable_padding(length=50)
    begin = ("<|endoftext|>", 0)
    changed.post_processor = tokenizers.processors.TemplateProcessing(f"{begin[0]} $A", special_tokens=[begin])
    changed.save(str(tmp_path / "tokenizer.json"))
    assert changed.encode("a").ids != loaded("shipped").encode("a")
    text = "Once upon a time there was"
    assert load_tokenizer(tmp_path).encode(text) == loaded("shipped").encode(text)


def test_added_tokens_are_tokens(tmp_path: Path) -> None:
    changed = tokenizers.Tokenizer.from_file(str(shipped.path() / "tokenizer.json"))
    changed.add_tokens([" " * 9])  # as the 20B's runs of spaces
    changed.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.size == 1025
    assert tokenizer.encode(" " * 9) == [1024]
    assert tokenizer.decode([1024]) == " " * 9


# Decoding by bytes.


@both
@settings(max_examples=60)
@given(data=st.data())
def test_decoding_is_the_librarys(name: str, data: st.DataObject) -> None:
    ids = data.draw(ids_of[name] | single_bytes)
    assert loaded(name).decode(ids) == library(name).decode(ids, skip_special_tokens=False)


@both
@settings(max_examples=60)
@given(data=st.data())
def test_a_stream_joins_to_the_whole_whatever_the_ids(name: str, data: st.DataObject) -> None:
    ids = data.draw(ids_of[name] | single_bytes)
    pieces = list(loaded(name).stream(ids))
    assert len(pieces) == len(ids) + 1
    assert "".join(pieces) == loaded(name).decode(ids)


@both
@given(text=st.text(st.sampled_from("aé日🦙"), min_size=1))
def test_a_stream_never_shows_part_of_a_character_and_never_lags_by_more(name: str, text: str) -> None:
    tokenizer = loaded(name)
    ids = tokenizer.encode(text)
    shown = ""
    for count, piece in enumerate(tokenizer.stream(ids)):
        shown += piece
        received = b"".join(map(tokenizer.token_bytes, ids[: count + 1]))
        assert shown == received.decode("utf-8", "ignore")  # drops an incomplete character at the end, and only it
        assert "\ufffd" not in shown
    assert shown == text


@given(some=st.lists(st.binary(max_size=5), max_size=6))
def test_a_stream_of_bytes_decodes_as_all_of_them_at_once(some: list[bytes]) -> None:
    utf8 = Utf8Stream()
    assert "".join(map(utf8.feed, some)) + utf8.flush() == b"".join(some).decode("utf-8", "replace")


def test_every_byte_has_a_token_and_is_written_by_gpt2s_rule() -> None:
    library_alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    assert sorted(b for character in library_alphabet for b in bytes_of(character)) == list(range(256))
    assert bytes_of("Ġa") == b" a"
    assert bytes_of("Ċ") == b"\n"
    assert bytes_of("  ") == b"  "  # a space writes no byte, so this token is plain text


# What a user can cause.


def write(folder: Path, content: bytes) -> Path:
    (folder / "tokenizer.json").write_bytes(content)
    return folder


def not_bytes(folder: Path) -> Path:
    other = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    other.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder, "tokenizer.json does not exist"),
        (lambda folder: folder / "nowhere", "no such folder"),
        (lambda folder: write(folder, b"") / "tokenizer.json", "is not a tokenizer"),
        (lambda folder: write(folder, b"{}"), "is not a tokenizer"),
        (lambda folder: write(folder, b"\xff\xfe"), "is not a tokenizer"),
        (lambda folder: write(folder, (shipped.path() / "tokenizer.json").read_bytes()[:999]), "is not a tokenizer"),
        (not_bytes, "is not a byte-level tokenizer"),
    ],
)
def test_files_that_are_no_tokenizer_are_refused(make: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_tokenizer(make(tmp_path))
    assert "\n" not in str(caught.value)


@both
def test_half_a_surrogate_pair_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"character 2 is '.ud800'"):
        loaded(name).encode("ab\ud800")


@both
def test_ids_below_zero_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="so -1 is none"):
        loaded(name).decode([5, -1])
