"""The adapter of examples/harness.py against the harness's own model for transformers, answer by answer."""

from __future__ import annotations

import importlib
import importlib.util
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from closeness import FLOAT32_STEP
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants import Mutant
from strategies import TINY, random_model

from neox.distributed import virtual
from neox.reference import shipped
from neox.reference.checkpoint.save import model_files, write_folder
from neox.reference.errors import InputError
from neox.reference.scoring import log_likelihoods, rolling_windows

pytest.importorskip("lm_eval", reason="the harness is not installed: pip install -e '.[eval]'")
torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[oracle]'")
pytest.importorskip("accelerate", reason="the harness's model for transformers needs accelerate")

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore"),  # of the harness and its libraries
]

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

# Both programs compute in float32 and differ by some 1e-6 a token: 1e-4 is what is promised. Theirs also adds up the
# log-probabilities of a text in float32, in a few orders at once, each sum rounded to a step of its size.
TOLERANCE = 1e-4
SUMMED = 2 * FLOAT32_STEP

SHAPE = replace(TINY, vocab_size=1024, max_position_embeddings=97, hidden_act="gelu")  # 1024: that of the tokenizer


@pytest.fixture(scope="module")
def harness() -> Iterator[ModuleType]:
    sys.path.append(str(EXAMPLES))  # behind all others: `evaluate` is also a library's name
    yield importlib.import_module("harness")
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    drawn = tmp_path_factory.mktemp("models") / "drawn"
    tokenizer = (shipped.path() / "tokenizer.json").read_bytes()
    write_folder(drawn, model_files(random_model(SHAPE, seed=8), "float32", tokenizer))
    return {"drawn": drawn, "shipped": shipped.path()}


@pytest.fixture(scope="module", params=["drawn", "shipped"])
def both(request: pytest.FixtureRequest, folders: dict[str, Path], harness: ModuleType) -> tuple[Any, Any]:
    """Our adapter and theirs, with a context of 97 tokens."""
    from lm_eval.models.huggingface import HFLM

    folder = str(folders[request.param])
    ours = harness.NeoX(pretrained=folder, max_length=97)
    torch.set_num_threads(1)  # on a busy machine, threads that wait for each other take far longer than one
    exact = {"dtype": torch.float32, "softmax_dtype": torch.float32}
    return ours, HFLM(pretrained=folder, device="cpu", batch_size=4, max_length=97, **exact)


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, argument, index) for index, argument in enumerate(arguments)]


WORDS = ["the", "old", "king", "said", "no", "rose", "12", "a,", "cat", "went", "far", "away", "."]


def words(count: int, seed: int) -> str:
    return " ".join(
        random.Random(seed).choices(
            ["the", "old", "king", "said", "no", "rose", "12", "a,", "cat", "went", "far", "away", "."], k=count
        )
    )


LONG = words(300, 1)

LIKELIHOODS = [
    *(("Question: who was it?\nAnswer:", f" {who}") for who in ("a cat", "the king", "no one", "he", "she", "they")),
    ("Question: who was it?\nAnswer:", " he"),
    ("trailing space ", "joined"),
    ("trailing spaces   ", " joined"),
    ("a tab\t", "and more"),
    ("a line\n", "\nand another"),
    (" \n", "after nothing but white space"),
    ("", "from nothing"),
    ("", "<|endoftext|>after the end"),
    ("<|endoftext|>", "a new text"),
    ("in the middle<|endoftext|>", " of it"),
    (LONG, " and then"),
    (LONG, words(40, 2)),
    (LONG + "  ", "x"),
    ("short", " " + words(45, 3)),
    ("un", "believable"),  # a token may span the border
    ("日本", "語です"),
    ("cafe\u0301", "\u0301s"),
    ("🙂", "🙃 ok"),
]


def close(ours: float, theirs: float) -> bool:
    return abs(ours - theirs) <= TOLERANCE + SUMMED * abs(theirs)


def test_likelihoods(both: tuple[Any, Any]):
    ours, theirs = both
    cases = [case for case in LIKELIHOODS if case[0].strip() or not case[0]]  # theirs takes no context of white space
    mine, other = (lm.loglikelihood(instances("loglikelihood", cases), disable_tqdm=True) for lm in both)
    for case, (logprob, greedy), (expected, expected_greedy) in zip(cases, mine, other, strict=True):
        assert close(logprob, expected), case
        assert greedy == expected_greedy, case
    blank = ours.loglikelihood(instances("loglikelihood", LIKELIHOODS), disable_tqdm=True)
    assert all(np.isfinite(logprob) for logprob, _ in blank)
    assert theirs.prefix_token_id == ours.prefix_token_id
    assert theirs.max_length == ours.max_length


def test_greedy_flags_are_sometimes_true(both: tuple[Any, Any]):
    """The likeliest continuation of a few texts is one that both call greedy."""
    ours, _ = both
    prompts = ["The old king", "Once upon a time", "Q: What is 1 plus 1?\nA:"]
    answers = ours.generate_until(
        instances("generate_until", [(prompt, {"until": [], "max_gen_toks": 3}) for prompt in prompts])
    )
    cases = [(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True) if "\ufffd" not in answer]
    mine, other = (lm.loglikelihood(instances("loglikelihood", cases), disable_tqdm=True) for lm in both)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in other]
    assert any(greedy for _, greedy in mine)


def test_documents(both: tuple[Any, Any]):
    """The longest has ten times the context, and a log-probability near -3000."""
    documents = [(words(n, n) + end,) for n, end in ((5, ""), (60, " \n"), (97, ""), (250, "\t"), (400, ""))]
    mine, other = (lm.loglikelihood_rolling(instances("r", documents), disable_tqdm=True) for lm in both)
    assert all(map(close, mine, other))
    assert min(mine) < -1000


def test_float32_is_enough(both: tuple[Any, Any], folders: dict[str, Path], harness: ModuleType):
    """The whole difference from float64 of a document near -3000 is less than 1e-4."""
    ours, theirs = both
    wide = harness.NeoX(pretrained=theirs.pretrained, max_length=97, dtype="float64")
    document = instances("r", [(words(260, 9),)])
    (narrow,), (expected,) = (lm.loglikelihood_rolling(document, disable_tqdm=True) for lm in (ours, wide))
    assert expected < -1000
    assert abs(narrow - expected) <= TOLERANCE


def test_answers(both: tuple[Any, Any]):
    prompts = ["The old king", "Once upon a time ", LONG, "Q: What is 2 plus 2?\nA:", words(20, 4), words(21, 5), "x"]
    arguments: list[dict[str, Any]] = [
        {"until": ["\n", " the"], "max_gen_toks": 12, "do_sample": False},
        {"until": "e", "max_gen_toks": 24, "temperature": 0.0},
        {"until": [], "max_gen_toks": 9},
    ]
    cases = [(prompt, some) for some in arguments for prompt in prompts]
    mine, other = (lm.generate_until(instances("generate_until", cases), disable_tqdm=True) for lm in both)
    assert mine == other
    assert len(set(mine)) > 5


# Whole tasks.


def documents(folder: Path) -> None:
    """Files of the tasks over local files, in their own forms."""
    rng = random.Random(3)
    files: dict[str, list[dict[str, Any]]] = {
        "lambada": [{"text": words(15, i)} for i in range(6)],
        "piqa": [
            {"goal": words(4, i), "sol1": words(3, i + 50), "sol2": words(4, i + 90), "label": rng.randrange(2)}
            for i in range(6)
        ],
        "winogrande": [
            {
                "sentence": f"{words(4, i)} _ {words(3, i + 1)}.",
                "option1": "Ann",
                "option2": "Bob",
                "answer": str(1 + i % 2),
            }
            for i in range(6)
        ],
        "arc_easy": [
            {
                "question": words(5, i),
                "choices": {"text": [words(2, 4 * i + j) for j in range(4)], "label": list("ABCD")},
                "answerKey": "ABCD"[i % 4],
            }
            for i in range(6)
        ],
        "hellaswag": [
            {
                "activity_label": "Roof",
                "ctx_a": f"{words(4, i)} [title] x.",
                "ctx_b": "he",
                "endings": [words(3, 9 * i + j) + " [step] y" for j in range(4)],
                "label": str(i % 4),
            }
            for i in range(6)
        ],
    }
    for name, docs in files.items():
        (folder / f"{name}_val.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")


@pytest.mark.parametrize("examples", [0, 5])
def test_tasks(both: tuple[Any, Any], examples: int, tmp_path: Path):
    """Every sample of the local tasks; with five examples most texts are longer than the context."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    documents(tmp_path)
    metadata: Any = {"data": str(tmp_path), "form": "short", "count": 6}
    manager = TaskManager(include_path=str(EXAMPLES / "tasks"), include_defaults=False, metadata=metadata)
    names = ["local_arithmetic_2da", "local_arithmetic_1dc"]
    names += [f"local_{name}" for name in ("lambada", "piqa", "winogrande", "arc_easy", "hellaswag")]
    how: dict[str, Any] = {"tasks": names, "num_fewshot": examples, "task_manager": manager, "log_samples": True}
    mine, other = (lm_eval.simple_evaluate(model=lm, bootstrap_iters=0, **how) for lm in both)
    assert set(mine["samples"]) == set(names)
    for name in names:
        assert len(mine["samples"][name]) == 6
        for own, their in zip(mine["samples"][name], other["samples"][name], strict=True):
            assert own["arguments"] == their["arguments"]
            for ((logprob, greedy),), ((expected, expected_greedy),) in zip(own["resps"], their["resps"], strict=True):
                assert close(logprob, expected)
                assert greedy == expected_greedy
        for metric, value in other["results"][name].items():
            if metric.startswith("acc"):
                assert mine["results"][name][metric] == value


# What the harness does itself, and we too.


def test_rolling_windows_are_the_harness_s():
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    for length in (1, 2, 7):
        for count in range(30):
            ids = list(range(1, count + 1))
            theirs = [make_disjoint_window(w) for w in get_rolling_token_windows(ids, 0, length, 1)]
            assert [tuple(map(list, window)) for window in rolling_windows(ids, 0, length)] == [
                tuple(map(list, window)) for window in theirs
            ]


def check_pairs(both: tuple[Any, Any], harness: ModuleType) -> None:
    ours, theirs = both
    for context, continuation in LIKELIHOODS:
        if context.strip():
            expected = theirs._encode_pair(context, continuation)
            assert harness.pair_of(ours._neox_tokenizer, context, continuation, 0) == expected


def test_pairs_are_the_harness_s(both: tuple[Any, Any], harness: ModuleType):
    check_pairs(both, harness)


pieces = st.sampled_from(
    [" ", "  ", "\t", "\n", "\u00a0", "a", "The", "king", "12", ".", "e\u0301", "語", "<|endoftext|>"]
)
drawn_texts = st.lists(pieces, max_size=8).map("".join)


@settings(max_examples=150)
@given(drawn_texts, drawn_texts)
def test_pairs_of_drawn_texts_are_the_harness_s(both: tuple[Any, Any], context: str, continuation: str):
    """Pieces that join across the border, and white space of all kinds around it."""
    ours, theirs = both
    pair_of = vars(sys.modules["harness"])["pair_of"]
    if context.strip():
        assert pair_of(ours._neox_tokenizer, context, continuation, 0) == theirs._encode_pair(context, continuation)


WRONG_PAIRS = {
    "white space stays with the context": ("context.rstrip()", "context"),
    "encoded apart": ("tokenizer.encode(context + continuation)[len(ids) :]", "tokenizer.encode(continuation)"),
    "only spaces move": ("context.rstrip()", "context.rstrip(' ')"),
    "cut by characters": ("[len(ids) :]", "[len(kept) :]"),
}


@pytest.mark.parametrize("wrong", WRONG_PAIRS)
def test_wrong_pairs_fail(wrong: str, both: tuple[Any, Any], harness: ModuleType, monkeypatch: pytest.MonkeyPatch):
    Mutant(wrong, "", harness, "pair_of", (WRONG_PAIRS[wrong],)).install(monkeypatch)
    with pytest.raises(AssertionError):
        check_pairs(both, harness)


def module_of(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{path.stem}_here", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_documents_are_prepared_as_the_harness_does():
    local = module_of(EXAMPLES / "tasks" / "local.py")
    theirs = module_of(Path(str(importlib.import_module("lm_eval").__file__)).parent / "tasks/hellaswag/utils.py")
    for text in (" [header] How [title] To do [step]  it [x", "a ] b [c] d  e", "[[nested]] x"):
        assert local.without_markup(text) == theirs.preprocess(text)


# What goes wrong.


def test_what_is_not_implemented_says_so(both: tuple[Any, Any], harness: ModuleType):
    ours, _ = both
    for arguments, message in (
        ({"num_beams": 4, "max_gen_toks": 9}, "num_beams=4"),
        ({"max_gen_toks": 97}, "leaves no room in a context of 97"),
    ):
        with pytest.raises(InputError, match=message):
            ours.generate_until(instances("generate_until", [("x", arguments)]))
    with pytest.raises(InputError, match="backend must be reference or gpu, not 'abacus'"):
        harness.NeoX(backend="abacus")
    with pytest.raises(InputError, match="no flavour"):
        harness.NeoX(flavour=1)


def test_kernels_answer_alike(folders: dict[str, Path], harness: ModuleType):
    """The kernels, on the CPU, in float32; one text of each kind of request."""
    how = {"pretrained": str(folders["shipped"]), "max_length": 97}
    reference, kernels = harness.NeoX(**how), harness.NeoX(**how, backend="gpu", device="host", dtype="float32")
    pairs = instances("loglikelihood", LIKELIHOODS[:8])
    mine, other = (lm.loglikelihood(pairs, disable_tqdm=True) for lm in (kernels, reference))
    assert all(close(a, b) and flag == wanted for (a, flag), (b, wanted) in zip(mine, other, strict=True))
    prompts = instances("generate_until", [("The old king", {"until": ["\n"], "max_gen_toks": 5})])
    assert kernels.generate_until(prompts) == reference.generate_until(prompts)
    with pytest.raises(InputError, match="--device must be cuda or host, not tpu"):
        harness.NeoX(backend="gpu", device="tpu")


KERNELS = {"backend": "gpu", "device": "host", "dtype": "float32"}


@pytest.mark.parametrize(("ranks_of_it", "how"), [(3, {}), (2, KERNELS)])
def test_ranks_answer_alike(
    ranks_of_it: int, how: dict[str, str], harness: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    """Of which only the first knows the requests."""
    ranks = importlib.import_module("ranks")
    pairs = instances("loglikelihood", LIKELIHOODS[:8])
    prompts = instances("generate_until", [(words(n, n), {"until": ["."], "max_gen_toks": 6}) for n in (3, 9)])

    def answers(adapter: Any) -> Any:
        return adapter.loglikelihood(pairs, disable_tqdm=True), adapter.generate_until(prompts, disable_tqdm=True)

    alone = answers(harness.NeoX())

    def program(comm: Any) -> Any:
        if comm.rank:
            return ranks.help_with(comm)
        with ranks.lead(comm) as opener:
            monkeypatch.setattr(harness.NeoX, "open", staticmethod(opener))
            return answers(harness.NeoX(**how))

    together = virtual(ranks_of_it, program)[0]
    assert all(close(a, b) and flag == wanted for (a, flag), (b, wanted) in zip(together[0], alone[0], strict=True))
    assert together[1] == alone[1]


@pytest.mark.parametrize("how", [{}, KERNELS], ids=["reference", "kernels"])
def test_samples_differ_by_their_seed(how: dict[str, str], harness: ModuleType):
    arguments = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12, "top_k": 40}
    cases = instances("generate_until", [("The", arguments)] * 3)
    first, again, other = (harness.NeoX(seed=s, **how).generate_until(cases, disable_tqdm=True) for s in (1, 1, 9))
    assert first == again != other
    assert len(set(first)) == 3


def test_a_rolled_document_is_the_sum_of_its_windows(folders: dict[str, Path], harness: ModuleType):
    model, ours = random_model(SHAPE, seed=8), harness.NeoX(pretrained=str(folders["drawn"]))
    text = words(300, 6)
    windows = rolling_windows(ours.tok_encode(text), ours.eot_token_id, 97)
    assert len(windows) > 3
    expected = sum(score.total for score in log_likelihoods(model, windows))
    assert ours.loglikelihood_rolling(instances("r", [(text,), ("",)])) == pytest.approx([expected, 0.0], rel=1e-12)
