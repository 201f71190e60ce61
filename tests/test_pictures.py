"""The programs that look inside a model say and draw what was computed, and end well on bad input."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from closeness import assert_close
from numpy.typing import NDArray
from strategies import TINY, random_model

from neox.reference import forward, load_tokenizer, shipped
from neox.reference.checkpoint.save import model_files, write_folder
from neox.reference.errors import InputError, run
from neox.reference.model import softmax
from neox.reference.trace import run_with_cache, run_with_hooks

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
DRAWS = importlib.util.find_spec("matplotlib") is not None
drawing = pytest.mark.skipif(not DRAWS, reason="matplotlib is not installed")
PROGRAMS = ("logit_lens", "attention", "patching", "training_dynamics")
PROMPT = "Once <b>upon</b> a $time$ and\nso on"


def example(name: str) -> ModuleType:
    """One of the programs, which import each other as scripts do."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(EXAMPLES))


pictures, logit_lens, attention, patching, dynamics = map(example, ("pictures", *PROGRAMS))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three steps of drawn weights, with the tokenizer that ships; step2 serves as a model."""
    tokenizer = load_tokenizer(shipped.path())
    config = replace(TINY, vocab_size=tokenizer.size + 5, max_position_embeddings=96)
    folder = tmp_path_factory.mktemp("series")
    for step in range(3):
        model = random_model(config, step)
        files = model_files(model, "float32", (shipped.path() / "tokenizer.json").read_bytes())
        write_folder(folder / f"step{step}", files)
    return folder


def outcome(module: ModuleType, argv: Sequence[object], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    capsys.readouterr()
    try:
        run(lambda: module.main(list(map(str, argv))))
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def subject(drawn: Path) -> Any:
    return pictures.subject(str(drawn / "step2"), None)


# What the programs share.


def test_tables_fit_the_terminal_and_lose_no_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    heads = [f"h{i}" for i in range(30)]
    cells = [[f"{row}.{i}" for i in range(30)] for row in range(2)]
    text = pictures.table(cells, ["one", "two"], heads)
    assert max(map(len, text.splitlines())) <= 40
    for row, name in enumerate(("one", "two")):
        lines = [line.split()[1:] for line in text.splitlines() if line.startswith(name)]
        assert [cell for line in lines for cell in line] == cells[row]
    assert [word for line in text.splitlines() if line.startswith("   ") for word in line.split()] == heads


def test_labels_are_short_and_printable(drawn: Path) -> None:
    of = pictures.subject(str(drawn / "step2"), None)
    labels = of.labels(range(of.model.config.vocab_size), 8)
    assert all(0 < len(label) <= 8 and label.isprintable() and " " not in label for label in labels)
    assert not any("\N{REPLACEMENT CHARACTER}" in label for label in labels)  # bytes of longer letters have numbers
    assert labels[-1] == f"#{of.model.config.vocab_size - 1}"  # a row of the vocabulary that no token has


def test_shades_are_in_order() -> None:
    assert [pictures.shade(p) for p in (0, 0.05, 0.15, 0.95, 1)] == [" ", " ", ".", "@", "@"]


# Each program.


def test_the_lens_is_read_off_the_residual_stream(drawn: Path) -> None:
    of = subject(drawn)
    ids = of.encode(PROMPT)
    reading = logit_lens.read(of, ids)
    assert np.array_equal(reading.top[-1], forward(of.model, [ids])[0].argmax(-1))
    assert_close(reading.probability[-1], softmax(forward(of.model, [ids])[0].astype(np.float64)).max(-1), 1e-6)
    assert reading.top.shape == (TINY.num_hidden_layers + 1, len(ids))
    cut = reading.last(3)
    assert (cut.ids, cut.top.shape[1]) == (ids[-3:], 3)
    assert np.array_equal(cut.top, reading.top[:, -3:])


def test_depth_is_where_the_answer_stays() -> None:
    top = np.array([[5, 1, 7, 9], [5, 7, 7, 1], [5, 7, 1, 9], [5, 7, 7, 2]])  # three layers
    assert_close(logit_lens.depth(top), np.array([0, 1 / 3, 1, 1]), 1e-15)


def test_the_lens_is_printed_for_every_state(drawn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = outcome(logit_lens, ["--model", drawn / "step2", "--prompt", PROMPT], capsys)
    names = re.findall(r"^(embedding|layer \d+) ", out, re.MULTILINE)
    assert status == 0
    assert names[:4] == ["embedding", "layer 0", "layer 1", "layer 2"]


def test_attention_is_summed_up_by_where_it_goes() -> None:
    """A head that looks at the token before, and one that looks at the first."""
    before, first = np.zeros((5, 5)), np.zeros((5, 5))
    before[range(1, 5), range(4)] = 1
    first[:, 0] = 1
    found = attention.summary(np.stack([before, first])[None])
    assert found["before"].tolist() == [[1, 0.25]]  # the second token's first is the one before it
    assert found["first"].tolist() == [[0.25, 1]]
    assert found["itself"].tolist() == [[0, 0]]


def page_data(page: str) -> dict:
    match = re.search(r"^const data = (.*);$", page, re.MULTILINE)
    assert match is not None
    return json.loads(match[1])


def test_the_page_holds_every_pattern_and_loads_nothing(drawn: Path, tmp_path: Path, capsys) -> None:
    file = tmp_path / "a.html"
    status, _, _ = outcome(attention, ["--model", drawn / "step2", "--prompt", PROMPT, "--html", file], capsys)
    assert status == 0
    page = file.read_text(encoding="utf-8")
    assert not re.search(r"https?:|src=|href=|@import|url\(", page)
    assert page.count("<script>") == page.count("</script>") == 1
    assert "<b>" not in page  # of the prompt
    of, data = subject(drawn), page_data(page)
    ids = of.encode(PROMPT)
    assert data["tokens"] == of.labels(ids, 20)
    found = attention.patterns(of, ids)
    assert len(data["patterns"]) == len(data["heads"]) == found.shape[0] * found.shape[1]
    lower = np.tril_indices(len(ids))
    for i, (name, values) in enumerate(zip(data["heads"], data["patterns"], strict=True)):
        layer, head = divmod(i, found.shape[1])
        assert name == f"layer {layer} head {head}"
        # In 255ths.
        assert_close(np.array(values) / 255, found[layer, head][lower].astype(np.float64), 0, 0.5001 / 255)


def test_one_head_is_shown_where_it_looks(drawn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model", drawn / "step2", "--prompt", PROMPT, "--layer", 1, "--head", 2]
    status, out, _ = outcome(attention, argv, capsys)
    of = subject(drawn)
    ids = of.encode(PROMPT)
    lines = [line.partition("|")[2] for line in out.splitlines() if "|" in line]
    assert status == 0
    assert [len(line) for line in lines] == list(range(1, len(ids) + 1))
    pattern = attention.patterns(of, ids)[1, 2]
    assert lines[-1] == "".join(pictures.shade(float(p)) for p in pattern[-1])


def single_patch(of, texts, name: str, index: tuple) -> NDArray:
    """The logits after the corrupt text with a part of the clean run's array put in."""
    _, clean = run_with_cache(of.model, [texts.clean], name)

    def put(array: NDArray) -> NDArray:
        array = array.copy()
        array[index] = clean[name][index]
        return array

    return run_with_hooks(of.model, [texts.corrupt], {name: put})[0, -1]


def test_patched_parts_are_parts_of_the_difference(drawn: Path) -> None:
    of = subject(drawn)
    texts = patching.pair(of, "Q: What is 31 plus 25?", "Q: What is 31 plus 45?", " 5", " 7")
    found = patching.patched(of, texts)

    def difference(logits: NDArray) -> float:
        return float(logits[texts.right] - logits[texts.wrong])

    clean, corrupt = (difference(forward(of.model, [ids])[0, -1]) for ids in (texts.clean, texts.corrupt))
    assert_close([found.clean, found.corrupt], [clean, corrupt], 1e-5)
    changed = [t for t, (a, b) in enumerate(zip(texts.clean, texts.corrupt, strict=True)) if a != b]
    assert found.residual.shape == (TINY.num_hidden_layers, len(texts.clean))
    assert_close(found.residual[0, [t for t in range(len(texts.clean)) if t not in changed]].max(), 0.0, 0, 1e-4)
    for i, t in ((1, changed[0]), (2, len(texts.clean) - 1)):
        value = difference(single_patch(of, texts, f"blocks.{i}.hook_resid_pre", np.s_[:, t]))
        assert_close(found.residual[i, t], np.float32((value - corrupt) / (clean - corrupt)), 0, 1e-4)
    value = difference(single_patch(of, texts, "blocks.1.attn.hook_z", np.s_[:, :, 3]))
    assert_close(found.heads[1, 3], np.float32((value - corrupt) / (clean - corrupt)), 0, 1e-4)


def test_what_answers_begin_with_alike_counts_as_text(drawn: Path) -> None:
    of = subject(drawn)
    a, b = of.encode("Q: 1"), of.encode("Q: 2")
    right, wrong = (of.tokenizer.encode(f"Q: 1 b{x}")[len(a) :] for x in "xy")
    shared = [i for i, j in zip(right, wrong, strict=False) if i == j]
    texts = patching.pair(of, "Q: 1", "Q: 2", " bx", " by")
    assert texts.clean == a + shared
    assert texts.corrupt == b + shared
    assert (texts.right, texts.wrong) == (right[len(shared)], wrong[len(shared)])


@pytest.mark.parametrize("program", [logit_lens, attention, patching])
def test_each_shows_the_shipped_model_without_a_flag(program: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = outcome(program, [], capsys)
    assert status == 0
    assert "layer 0" in out


def test_a_series_is_measured_step_by_step(drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    names = ["loss", "copying", "induction", "depth"]
    argv = [drawn, "--metrics", *names, "--steps", 0, 2, 90, "--json", file]  # the nearest to 90 is 2
    status, out, _ = outcome(dynamics, argv, capsys)
    points = json.loads(file.read_text())
    assert status == 0
    assert [point["step"] for point in points] == [0, 2]
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [["step", "0"], ["step", "2"]]
    for point in points:
        of = pictures.subject(str(drawn / f"step{point['step']}"), None)
        ids = of.tokenizer.encode(dynamics.TEXT)[: of.model.config.max_position_embeddings]
        p = softmax(forward(of.model, [ids])[0].astype(np.float64))[np.arange(len(ids) - 1), ids[1:]]
        size = sum(len(of.tokenizer.token_bytes(i)) for i in ids[1:])
        assert abs(point["loss"] + np.log(p).sum() / size) < 1e-6
        assert_close(point["depth"], float(logit_lens.depth(logit_lens.read(of, ids).top).mean()), 1e-12)
        assert 0 <= point["induction"] < 0.2  # drawn weights have learned nothing
        assert point["copying"] < 0.05


def test_arithmetic_is_asked_of_every_checkpoint(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamics, "arithmetic", lambda model, tokenizer: {"addition": 1.0, "subtraction": 0.0})
    point = dynamics.measured(dynamics.open_series(drawn), 1, ["arithmetic"], dynamics.TEXT)
    assert point.values == {"arithmetic": 0.5}


# Pictures.


def drawn_arguments(program: str, drawn: Path) -> list[object]:
    if program == "training_dynamics":
        return [drawn, "--metrics", "loss", "depth"]
    texts = ["--clean", "cost $2$", "--corrupt", "cost $3$", "--right", " 5", "--wrong", " 7"]
    chosen = texts if program == "patching" else ["--prompt", PROMPT]
    return ["--model", drawn / "step2", *chosen]


@drawing
@pytest.mark.parametrize("program", PROGRAMS)
def test_each_is_drawn_whole(program: str, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Dollars and line breaks in tokens are drawn as they are; no text is cut off at an edge."""
    file = tmp_path / "picture.png"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="matplotlib|pyparsing")  # what they say to their developers
        warnings.filterwarnings("error", message="Glyph|constrained_layout not applied")
        status, _, err = outcome(example(program), [*drawn_arguments(program, drawn), "--picture", file], capsys)
    assert status == 0, err
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]
    pixels = pictures.pyplot().imread(file)
    assert min(pixels.shape[:2]) > 200
    edges = (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])
    assert all((edge[..., :3] == 1).all() for edge in edges)  # white: nothing reaches it
    assert pixels[..., :3].std() > 0.02


@pytest.mark.parametrize("program", PROGRAMS)
def test_without_matplotlib_a_picture_is_refused_before_anything_is_computed(
    program: str, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    argv = [*drawn_arguments(program, drawn), "--picture", tmp_path / "p.png"]
    status, out, err = outcome(example(program), argv, capsys)
    assert (status, out) == (2, "")
    assert err == 'error: a picture needs one more package: pip install "neox20b[plot]"\n'


# Bad input.

LONG = "word and " * 400
BAD = [
    ("logit_lens", ["--prompt", ""], "the prompt is empty"),
    ("logit_lens", ["--prompt", LONG], "the model's context 96: shorten it"),
    ("logit_lens", ["--tuned-lens", "nowhere"], "nowhere is not there"),
    ("logit_lens", ["--picture", "a.gif"], r"must end with one of \.png, \.svg, \.pdf"),
    ("logit_lens", ["--picture", "nowhere/a.png"], "there is no folder nowhere"),
    ("attention", ["--layer", "3"], "--layer 3: this model's are 0 to 2"),
    ("attention", ["--head", "0"], "--head needs a --layer"),
    ("attention", ["--layer", "0", "--head", "-1"], "--head -1: this model's are 0 to 4"),
    ("attention", ["--prompt", "a"], "the prompt has one token"),
    ("patching", ["--clean", "a"], "--clean and --corrupt go together"),
    ("patching", ["--clean", "a", "--corrupt", "a"], "are the same tokens"),
    ("patching", ["--clean", "Once upon a", "--corrupt", "a"], r"--clean has \d+ tokens, --corrupt \d+"),
    ("patching", ["--clean", "", "--corrupt", "a"], "--clean is empty"),
    ("patching", ["--clean", "1", "--corrupt", "2", "--right", " b", "--wrong", " b"], "both texts go on alike"),
]


@pytest.mark.parametrize(("program", "argv", "message"), BAD)
def test_bad_input_is_one_line_and_status_2(
    program: str, argv: list[str], message: str, drawn: Path, capsys: pytest.CaptureFixture[str], monkeypatch, tmp_path
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = outcome(example(program), ["--model", drawn / "step2", *argv], capsys)
    lines = [line for line in err.splitlines() if not line.startswith("weights: ")]
    assert (status, out) == (2, "")
    assert len(lines) == 1
    assert re.match(rf"error: .*{message}", lines[0])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere", "--metrics", "loss"], "nowhere"),
        (["--metrics", "perplexity"], "invalid choice: 'perplexity'"),
        (["--text", "nowhere.txt"], "--text nowhere.txt cannot be read"),
    ],
)
def test_bad_input_to_the_measuring_of_a_series(argv: list[str], message: str, capsys, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    status, out, err = outcome(dynamics, argv, capsys)
    assert (status, out) == (2, "")
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_a_revision_is_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="--revision needs a --model"):
        pictures.subject(None, "step1")


def test_without_the_series_one_has_to_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamics, "SERIES", tmp_path / "series")
    with pytest.raises(InputError, match="is not there: name a folder"):
        dynamics.series_of(None)
    (tmp_path / "series" / "step4").mkdir(parents=True)
    assert dynamics.series_of(None).steps == (4,)
