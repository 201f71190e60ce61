"""Training: its equations, torch's AdamW, and what a run leaves on disk, whatever happens to it.

A run that is stopped at any moment and resumed must end as one that was not: the same bits in every checkpoint. Moments
are found by wrapping every call that changes a file, and every update, and stopping before or after the n-th of them.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from closeness import assert_close
from mutants import Mutant
from program import Outcome
from strategies import TINY, random_model
from training_checks import CHECKS, SETTINGS, batches, copied
from training_mutants import MUTANTS

from neox.reference import forward, load, load_tokenizer, train
from neox.reference.checkpoint.tensors import named_tensors
from neox.reference.corpus import Packed, documents, pack, train_tokenizer
from neox.reference.errors import InputError, run
from neox.reference.optimizer import initial_model, no_moments
from neox.reference.tokenizer import Tokenizer

PROGRAM = Path(__file__).resolve().parents[1] / "examples" / "train.py"
STORY = "One day, 12 little fish swam to the shore. The fish saw a crab, and the crab saw 34 fish. It was a day! "
SHAPE = shlex.split("--layers 1 --hidden 16 --heads 2 --vocab-size 300 --length 8 --batch 4 --micro-batch 2")
SHORT = [*SHAPE, *shlex.split("--steps 5 --save-every 3 --learning-rate 0.01")]


# The equations.


@pytest.mark.parametrize("check", CHECKS)
def test_training_is_right(check: str) -> None:
    CHECKS[check]()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_wrong_training_fails(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant.install(monkeypatch)
    with np.errstate(all="ignore"), pytest.raises(AssertionError) as caught:
        CHECKS[mutant.check]()
    assert "no longer contains" not in str(caught.value)


def test_every_check_has_a_mutant_and_every_name_is_used_once() -> None:
    assert {mutant.check for mutant in MUTANTS} == set(CHECKS)
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.oracle
def test_transformers_reads_a_checkpoint(place: Path) -> None:
    """Its model gives our logits, its tokenizer our ids."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    train_in(place)
    folder = place / "run" / "step5"
    ids = transformers.AutoTokenizer.from_pretrained(folder)(STORY).input_ids[:8]
    assert ids == load_tokenizer(folder).encode(STORY)[:8]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        expected = theirs(torch.tensor([ids])).logits.numpy()
    assert_close(forward(load(folder), [ids]), expected, 1e-5)


@pytest.mark.oracle
@pytest.mark.parametrize("tied", [False, True])
def test_twenty_steps_are_those_of_torch(tied: bool) -> None:
    """autograd through transformers, and torch's AdamW with the same rates; the gradient is clipped in every step.

    torch's own clipping divides by the length plus 1e-6, and so is not what it says to within rounding.
    """
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from test_backward import same_tables

    ours = copied(random_model(replace(TINY, tie_word_embeddings=tied), seed=1, dtype="float64"))
    theirs = same_tables(ours)
    groups = [[p for p in theirs.parameters() if p.ndim == dims] for dims in (2, 1)]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.01}, {"params": groups[1], "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    state = train.begin(ours)
    for step, ids in enumerate(batches(SETTINGS, TINY.vocab_size), 1):
        state, progress = train.advance(state, SETTINGS, ids)
        logits = theirs(torch.from_numpy(ids[:, :-1]), use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(ids[:, 1:]).flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = sum(float((p.grad**2).sum()) for p in theirs.parameters()) ** 0.5
        assert norm > SETTINGS.clip
        for p in theirs.parameters():
            p.grad *= SETTINGS.clip / norm
        for group in optimizer.param_groups:
            group["lr"] = SETTINGS.rate(step)
        optimizer.step()
        assert_close(np.array([progress.loss, progress.norm]), np.array([loss.item(), norm]), 1e-9)
    expected = {name: p.detach().numpy() for name, p in theirs.named_parameters()}
    for name, actual in named_tensors(ours.config, ours.params).items():
        # An entry with a small gradient moves by its m / sqrt(v), in which the gradient's rounding is large: 1e-10.
        assert_close(actual, expected[name.replace("embed_out", "lm_head")], 1e-9)


def test_cores_share_the_work_without_changing_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    m = random_model(TINY, seed=2)
    ids = np.random.default_rng(0).integers(0, TINY.vocab_size, (6, 9))
    results = []
    for cores in (1, 2, 3):
        monkeypatch.setattr(train, "cores", lambda cores=cores: cores)
        results.append(train.gradient_of(m, ids, 1))
    for loss, gradients in results[1:]:
        assert loss == results[0][0]
        assert all(np.array_equal(gradients[name], g) for name, g in results[0][1].items())


def test_the_loss_falls() -> None:
    """A model of a text that repeats ten ids learns it nearly by heart."""
    config = replace(TINY, num_hidden_layers=1)
    settings = train.Settings(steps=60, batch=4, micro_batch=4, length=16, learning_rate=0.02)
    data = Packed(np.tile(np.arange(10), 60), settings.length)
    state = train.begin(initial_model(config, 0))
    losses = [progress.loss for _, progress in train.updates(state, settings, data)]
    assert abs(losses[0] - np.log(config.vocab_size)) < 0.5  # logits of deviation sqrt(2/5) at first
    assert losses[-1] < 0.1


def test_what_forward_has_shown_it_does_not_write_to() -> None:
    """The gradient keeps intermediates as they are shown, without copies."""
    shown: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def keep(name: str, array: np.ndarray) -> np.ndarray:
        shown[name] = array, array.copy()
        return array

    for parallel in (True, False):
        forward(random_model(replace(TINY, use_parallel_residual=parallel)), np.arange(12).reshape(2, 6), keep)
        assert len(shown) > 30
        assert all(np.array_equal(array, copy) for array, copy in shown.values())


# Running the program.


@cache
def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_program", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def outcome_of(argv: Sequence[str | Path], capsys: pytest.CaptureFixture[str]) -> Outcome:
    """As the shell would see it."""
    capsys.readouterr()
    try:
        with np.errstate(all="ignore"):
            run(lambda: module().main([str(word) for word in argv]))
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    captured = capsys.readouterr()
    return Outcome(status, captured.out, captured.err)


def train_in(folder: Path, *more: str | Path) -> None:
    with np.errstate(all="ignore"):
        module().main([str(word) for word in (folder / "text", "--out", folder / "run", *SHORT, *more)])


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No picture, and no waiting for the disk, which both take longer than such a run; one test draws it."""
    monkeypatch.setattr(module(), "find_spec", lambda name: None)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a text."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(STORY * 6, encoding="utf-8")
    lines = "".join(json.dumps({"text": STORY[i:]}) + "\n" for i in range(3))
    (tmp_path / "text" / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return tmp_path


def contents(folder: Path) -> dict[str, str]:
    """A hash of every file below it, by its path."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_a_run_leaves_checkpoints_that_every_reader_reads(place: Path) -> None:
    train_in(place)
    assert train.saved_steps(place / "run") == [0, 1, 2, 3, 5]
    first, last = (load(place / "run" / f"step{step}") for step in (0, 5))
    tokenizer = load_tokenizer(place / "run" / "step5")
    assert tokenizer.decode(tokenizer.encode(STORY)) == STORY
    assert last.config.vocab_size == tokenizer.size
    held = pack([STORY], tokenizer, 8)
    assert train.held_out_loss(last, held) < train.held_out_loss(first, held) - 0.1
    lines = [json.loads(line) for line in (place / "run" / "losses.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert [line["step"] for line in lines if "held_out" in line] == [0, 1, 2, 3, 5]
    assert all(0 < line["norm"] < 100 and 0 < line["rate"] <= 0.01 for line in lines[1:])


def test_the_losses_are_drawn_where_matplotlib_is(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(module(), "find_spec", importlib.util.find_spec)
    train_in(place)
    assert (place / "run" / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_can_begin_with_a_model(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It keeps the model's tokenizer and shape, and goes on from its weights."""
    train_in(place)
    argv: list[str | Path] = [place / "text", "--out", place / "more", *SHORT, "--from", place / "run" / "step5"]
    outcome = outcome_of([*argv, "--layers", "7"], capsys)
    assert outcome.status == 0, outcome
    assert (place / "more" / "tokenizer.json").read_bytes() == (place / "run" / "tokenizer.json").read_bytes()
    ended, begun = load(place / "run" / "step5"), load(place / "more" / "step0")
    assert begun.config == ended.config
    expected = named_tensors(ended.config, ended.params)
    for name, array in named_tensors(begun.config, begun.params).items():
        assert np.array_equal(array, expected[name])
    (place / "wide.json").write_text(train_tokenizer([STORY], 310).to_str(), encoding="utf-8")
    wide = outcome_of([*argv[:2], place / "other", *argv[3:], "--tokenizer", place / "wide.json"], capsys)
    assert "tokens, but the model of --from knows" in complaint(wide)
    long = outcome_of([*argv[:2], place / "other", *argv[3:], "--length", "9"], capsys)
    assert "rows of 9 tokens, but the context of the model of --from is 8" in complaint(long)


class Killed(BaseException):
    """Nothing in the program catches it, as nothing catches SIGKILL; but what has been buffered is lost."""


def moments(monkeypatch: pytest.MonkeyPatch, stop_at: int) -> list[str]:
    """Kill at the n-th of the moments before and after every update and every call that changes a file; their names."""
    passed: list[str] = []

    def moment(name: str) -> None:
        passed.append(name)
        if len(passed) == stop_at:
            raise Killed(name)

    def watch(owner: Any, name: str) -> None:
        right = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            moment(f"before {name}")
            result = right(*args, **kwargs)
            moment(f"after {name}")
            return result

        monkeypatch.setattr(owner, name, watched)

    for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "replace"), (Path, "mkdir"), (train, "update")):
        watch(owner, name)
    watch(shutil, "rmtree")
    watch(module().Losses, "add")
    return passed


def test_a_run_that_is_killed_at_any_moment_ends_as_if_it_were_not(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        passed = moments(patch, stop_at=0)
        train_in(place)
        total = len(passed)
    expected = contents(place / "run")
    assert total > 60
    for stop_at in range(1, total + 1):
        shutil.rmtree(place / "run")
        with monkeypatch.context() as patch:
            moments(patch, stop_at)
            with pytest.raises(Killed):
                train_in(place)
        train_in(place, "--resume")
        assert contents(place / "run") == expected, stop_at


def test_a_process_that_is_killed_ends_as_if_it_were_not(place: Path) -> None:
    steps = ["--steps", "200", "--save-every", "20"]
    command = [sys.executable, str(PROGRAM), str(place / "text"), *SHAPE, *steps]
    subprocess.run([*command, "--out", str(place / "whole")], check=True, capture_output=True, timeout=120)
    with subprocess.Popen([*command, "--out", str(place / "run")], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if line.startswith("step 40"))
        process.send_signal(signal.SIGKILL)
    subprocess.run([*command, "--out", str(place / "run"), "--resume"], check=True, capture_output=True, timeout=120)
    expected, actual = contents(place / "whole"), contents(place / "run")
    expected.pop("losses.png", None)
    actual.pop("losses.png", None)
    assert actual == expected


# What can go wrong.


def complaint(outcome: Outcome) -> str:
    """The one line of an error."""
    assert outcome.status == 2, outcome
    assert outcome.stdout == ""
    errors = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, outcome.stderr
    assert outcome.stderr.endswith(errors[0] + "\n")
    assert "Traceback" not in outcome.stderr
    return errors[0]


WHOLE = STORY.encode() * 6
BAD_TEXT: dict[str, tuple[dict[str, bytes], str]] = {
    "no files": ({}, "holds no text: no .txt, .jsonl"),
    "no files that are read": ({"notes.md": WHOLE}, "holds no text: no .txt, .jsonl"),
    "only empty texts": ({"a.txt": b"", "b.jsonl": b'{"text": ""}\n'}, "the corpus is empty"),
    "not UTF-8": ({"a.txt": b"caf\xe9 au lait"}, "a.txt is not UTF-8: byte 3 is 0xe9"),
    "a gzip file cut off": ({"a.txt": WHOLE, "b.jsonl.gz": gzip.compress(b'{"text": "a"}\n')[:-9]}, "b.jsonl.gz"),
    "no gzip file": ({"a.txt": WHOLE, "b.jsonl.gz": b'{"text": "a"}\n'}, "cannot read"),
    "no JSON": ({"a.txt": WHOLE, "c.jsonl": b"{}\n{"}, "c.jsonl, line 1: must be a JSON object"),
    "a text that is a number": (
        {"c.jsonl": b'{"text": "a"}\n{"text": 7}\n'},
        'line 2: "text" must be a string, not int',
    ),
    "less than a batch": ({"a.txt": STORY.encode()}, "rows of 8, but a batch has 4"),
    "less than a row": ({"a.txt": b"one"}, "too few to hold some out"),
}


@pytest.mark.parametrize("name", BAD_TEXT)
def test_bad_text_is_refused_in_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files, phrase = BAD_TEXT[name]
    (tmp_path / "text").mkdir()
    for file, content in files.items():
        (tmp_path / "text" / file).write_bytes(content)
    assert phrase in complaint(outcome_of([tmp_path / "text", "--out", tmp_path / "run", *SHORT], capsys))
    assert not train.saved_steps(tmp_path / "run")


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv: list[str | Path] = [tmp_path / "nowhere", "--out", tmp_path / "run", *SHORT]
    assert "nowhere holds no text" in complaint(outcome_of(argv, capsys))


BAD_FLAGS = {
    "--steps 0": "steps must be positive, not 0",
    "--micro-batch 3": "a batch of 4 rows cannot be cut into micro-batches of 3",
    "--learning-rate -1": "learning_rate must be positive, not -1.0",
    "--learning-rate nan": "learning_rate must be positive, not nan",
    "--heads 3": "hidden_size 16 cannot be divided among 3 attention heads",
    "--vocab-size 100": "a vocabulary of 100 is too small",
    "--tokenizer nowhere.json": "nowhere.json",
    "--held-out nowhere": "nowhere holds no text",
    "--length 0": "length must be positive, not 0",
    "--seed x": "--seed",
    "--seed -1": "seed must be zero or more, not -1",
    "--warmup nan": "warmup must be zero or more, not nan",
    "--weight-decay -0.1": "weight_decay must be zero or more, not -0.1",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_are_refused_in_one_line(flags: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv: list[str | Path] = [place / "text", "--out", place / "run", *SHORT, *flags.split()]
    assert BAD_FLAGS[flags] in complaint(outcome_of(argv, capsys))


CHANGES = {
    "--steps 6": "steps of the run in --out is 5, but now it is 6",
    "--seed 1": "seed of the run in --out is 0, but now it is 1",
    "--weight-decay 0.5": "adam of the run in --out",
    "--layers 2": "the model of the run in --out",
}


@pytest.mark.parametrize("flags", CHANGES)
def test_a_run_is_resumed_as_it_was_begun(flags: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_in(place)
    before = contents(place / "run")
    again: list[str | Path] = [place / "text", "--out", place / "run", *SHORT]
    assert "holds a run already" in complaint(outcome_of(again, capsys))
    assert CHANGES[flags] in complaint(outcome_of([*again, *flags.split(), "--resume"], capsys))
    (place / "text" / "c.txt").write_text(STORY)
    assert "the checksum of the text" in complaint(outcome_of([*again, "--resume"], capsys))
    assert contents(place / "run") == before


DAMAGE = {
    "optimizer.safetensors": (b"", "optimizer.safetensors is not a whole safetensors file"),
    "training.json": (b"{}", "training.json does not say how the run was set: KeyError('settings')"),
    "model.safetensors": (b"half", "model.safetensors is not a whole safetensors file"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_not_resumed(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_in(place)
    content, phrase = DAMAGE[name]
    (place / "run" / "step5" / name).write_bytes(content)
    argv: list[str | Path] = [place / "text", "--out", place / "run", *SHORT, "--resume"]
    assert phrase in complaint(outcome_of(argv, capsys))


def test_moments_of_another_model_are_not_resumed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_in(place)
    (place / "run" / "step5" / "optimizer.safetensors").write_bytes(
        (place / "run" / "step5" / "model.safetensors").read_bytes()
    )
    argv: list[str | Path] = [place / "text", "--out", place / "run", *SHORT, "--resume"]
    assert "optimizer.safetensors does not belong to the model beside it" in complaint(outcome_of(argv, capsys))


def full_from(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """The disk is full from the n-th file on that is written."""
    calls = iter(range(1, 10**6))
    right = os.fsync

    def fsync(descriptor: int) -> None:
        if next(calls) >= call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        right(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_full_disk_leaves_the_last_checkpoint_and_nothing_else(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_in(place)
    expected = contents(place / "run")
    for call in (1, 2, 3, 7, 8, 14, 20, 27):  # among the files of the first, second, ... checkpoint
        shutil.rmtree(place / "run")
        with monkeypatch.context() as patch:
            full_from(patch, call)
            outcome = outcome_of([place / "text", "--out", place / "run", *SHORT], capsys)
        assert "No space left on device" in complaint(outcome)
        left = contents(place / "run")
        assert not [name for name in left if ".partial" in name]
        for name, content in left.items():
            assert expected[name] == content or name == "losses.jsonl"
        train_in(place, "--resume")
        assert contents(place / "run") == expected


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_losses_that_cannot_be_written_end_the_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = module().Losses(place / "losses.jsonl", 0)
    losses.file.close()
    losses.file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115  closed below, as the program does
    with pytest.raises(InputError, match=r"cannot write .*losses.jsonl: No space left on device"):
        losses.add({"step": 1})
    losses.close()


def test_a_loss_that_is_not_a_number_ends_the_run_at_its_step(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate far too high; the weights that gave no loss are not kept."""
    rates = ["--learning-rate", "1e30"]
    said = complaint(outcome_of([place / "text", "--out", place / "run", *SHORT, *rates], capsys))
    step = int(said.partition("at step ")[2].split()[0])
    assert 1 < step <= 5
    assert said.endswith("train from the last checkpoint with a lower learning rate")
    saved = train.saved_steps(place / "run")
    assert saved
    assert saved[-1] == max(s for s in (0, 1, 2, 3) if s < step)


def test_a_step_that_fails_changes_nothing() -> None:
    m = copied(random_model(TINY, seed=1))
    m.params.layers[0].mlp.dense_h_to_4h.bias[3] = np.nan  # type: ignore[index]
    before = copied(m)
    state = train.State(4, m, no_moments(named_tensors(m.config, m.params)))
    with pytest.raises(InputError, match="at step 5 the loss is nan"), np.errstate(all="ignore"):
        train.advance(state, SETTINGS, next(iter(batches(SETTINGS, TINY.vocab_size))))
    for name, array in named_tensors(m.config, m.params).items():
        assert np.array_equal(array, named_tensors(m.config, before.params)[name], equal_nan=True)
    assert not any(np.any(array) for array in state.moments.m.values())


# Text.


def test_documents_come_in_the_order_of_their_names(place: Path) -> None:
    (place / "text" / "sub").mkdir()
    (place / "text" / "sub" / "c.jsonl").write_text('{"text": "c"}\n\n{"text": ""}\n', encoding="utf-8")
    (place / "text" / "notes.md").write_text("not read", encoding="utf-8")
    (place / "text" / "bom.txt").write_bytes(b"\xef\xbb\xbfmarked")
    found = list(documents(place / "text"))
    assert found == [STORY * 6, *(STORY[i:] for i in range(3)), "marked", "c", ""]
    assert list(documents(place / "text" / "sub" / "c.jsonl")) == ["c", ""]


@pytest.fixture(scope="module")
def small_tokenizer() -> Tokenizer:
    return Tokenizer(train_tokenizer([STORY * 3, "Q: What is 48 plus 76?\nA: 124"], 320))


def test_every_digit_is_a_token(small_tokenizer: Tokenizer) -> None:
    for number in ("124", "0", "98765", " 48", "-7"):
        pieces = [small_tokenizer.decode([i]) for i in small_tokenizer.encode(number)]
        assert sum(any(c.isdigit() for c in piece) for piece in pieces) == sum(c.isdigit() for c in number)
    assert small_tokenizer.eos == 0


def test_every_text_comes_back(small_tokenizer: Tokenizer) -> None:
    for text in ("", "a", STORY, "caf\u00e9 \u4f60\u597d \U0001f600\n\n\t  x  ", "\x00\x7f", "it's  they'll"):
        assert small_tokenizer.decode(small_tokenizer.encode(text)) == text


def test_documents_are_packed_with_an_end_after_each(small_tokenizer: Tokenizer) -> None:
    data = pack(["One day", "", "the crab"], small_tokenizer, 4)
    assert small_tokenizer.decode(data.ids.tolist()) == "One day<|endoftext|>the crab<|endoftext|>"
    assert data.checksum() != pack(["One day", "the crabs"], small_tokenizer, 4).checksum()


def test_the_held_out_loss_is_the_mean_over_its_tokens(small_tokenizer: Tokenizer) -> None:
    """In batches of 8 rows with a last one of 3, against every row by itself."""
    m = random_model(replace(TINY, vocab_size=320))
    data = pack([STORY * 9], small_tokenizer, 7).first(19)
    assert data.rows == 19
    single = [train.held_out_loss(m, Packed(data.ids[7 * i : 7 * i + 8], 7)) for i in range(19)]
    assert_close(np.array(train.held_out_loss(m, data)), np.mean(single), 1e-6)
