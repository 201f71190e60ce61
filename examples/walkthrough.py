"""Walk one prompt through a model: every intermediate by its name, shape and first values, in the order of model.py.

    python examples/walkthrough.py
    python examples/walkthrough.py --model pythia-70m --prompt "The capital of France is" --layer 3
    python examples/walkthrough.py --model gpt-neox-20b-shape

One layer is shown in full, the others in one line each, with the token that would follow if the model ended there.
Names are those that `forward(model, ids, tap)` calls its tap with. gpt-neox-20b-shape downloads nothing: it draws one
layer of the 20B's width, and tells what the whole model costs.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from neox.reference import model as model_file
from neox.reference import shipped
from neox.reference.checkpoint.hub import find
from neox.reference.checkpoint.load import load
from neox.reference.checkpoint.tensors import build_params, tensor_table
from neox.reference.config import GPT_NEOX_20B, Config, parameter_count, read_config
from neox.reference.costs import cached_numbers, flops
from neox.reference.errors import InputError, Parser, run
from neox.reference.model import Array, Model, Tap, forward, softmax, unembed
from neox.reference.random_weights import random_tensor
from neox.reference.tokenizer import Tokenizer, load_tokenizer

PROMPT = "Once upon a time"
SHAPE_20B = "gpt-neox-20b-shape"
SHAPE_20B_VOCABULARY = 1024  # rows of the two embedding matrices; the 20B's 50,432 would take another 2.4 GB
SHAPE_20B_POSITIONS = 6

# What is shown, in the order in which it is computed.


@dataclass(frozen=True)
class Step:
    name: str  # inside a layer, what follows blocks.N.
    dims: str  # the letters of its shape
    words: str
    equations: tuple[str, ...] = ()  # how the lines of model.py's docstring begin that start here


EMBED = Step("hook_embed", "BTC", "x: the row of each id", ("x = embed_in",))
LAYER = (
    Step("hook_resid_pre", "BTC", "x, as the layer finds it"),
    Step("ln1.hook_scale", "BT1", "sqrt(variance + eps)", ("q, k, v =",)),
    Step("ln1.hook_normalized", "BTC", "(x - mean) / scale"),
    Step("attn.hook_q", "BTHD", "what it looks for"),
    Step("attn.hook_k", "BTHD", "what it is found by"),
    Step("attn.hook_v", "BTHD", "what it hands on"),
    Step("attn.hook_rot_q", "BTHD", "q, turned by position", ("q, k =",)),
    Step("attn.hook_rot_k", "BTHD", "k, turned by position"),
    Step("attn.hook_attn_scores", "BHTS", "scaled; future: -inf", ("attention =",)),
    Step("attn.hook_pattern", "BHTS", "softmax: sums to 1"),
    Step("attn.hook_z", "BTHD", "v, so averaged"),
    Step("hook_attn_out", "BTC", "dense: heads joined"),
    Step("hook_resid_mid", "BTC", "attention + x"),  # in sequential models only
    Step("ln2.hook_scale", "BT1", "sqrt(variance + eps)", ("mlp =",)),
    Step("ln2.hook_normalized", "BTC", "(x - mean) / scale"),
    Step("mlp.hook_pre", "BTF", "dense_h_to_4h"),
    Step("mlp.hook_post", "BTF", "gelu: near 0 below 0"),
    Step("hook_mlp_out", "BTC", "dense_4h_to_h"),
)
PARALLEL_END = Step("hook_resid_post", "BTC", "x, for the next layer", ("x = (mlp",))
SEQUENTIAL_END = Step("hook_resid_post", "BTC", "mlp + x, for the next")
END = (
    Step("ln_final.hook_scale", "BT1", "sqrt(variance + eps)", ("logits =",)),
    Step("ln_final.hook_normalized", "BTC", "(x - mean) / scale"),
)
LOGITS = Step("logits", "BTV", "a score per next token")

SHOWN = {"B": 0, "T": -1, "H": 0}  # of which the values are: the last position, which says what comes next; one head
VALUES = 3
WIDTH = 100  # of the terminal, in columns


def equation(beginning: str) -> str:
    """The line of model.py's pseudocode that begins so, its columns moved together."""
    lines = (re.sub(r" +=", " =", line.strip(), count=1) for line in (model_file.__doc__ or "").splitlines())
    return re.sub(r" {3,}", "   ", next(line for line in lines if line.startswith(beginning)))


def shape(dims: str, array: Array) -> str:
    """(B=1,T=6,C=128)"""
    sizes = (f"{letter}={size}" if letter.isalpha() else letter for letter, size in zip(dims, array.shape, strict=True))
    return f"({','.join(sizes)})"


def first_values(dims: str, array: Array) -> str:
    row = array[tuple(SHOWN.get(letter, slice(None)) for letter in dims)]
    return "".join(f" {value:7.3f}" for value in row[:VALUES]) + (" ..." if len(row) > VALUES else "")


def line(step: Step, array: Array) -> str:
    left = f"  {step.name:<24} {shape(step.dims, array):<20}"
    return f"{left}{first_values(step.dims, array):<{8 * VALUES + 4}} {step.words}"


def show(step: Step, array: Array) -> None:
    for beginning in step.equations:
        print(f"\n  {equation(beginning)}")
    print(line(step, array))


def likeliest(logits: Array, count: int) -> Array:  # (V,) -> (count,)
    return np.argsort(-logits, kind="stable")[:count]


def further_layer(model: Model, tokenizer: Tokenizer | None, name: str, x: Array) -> Step:
    """A layer in one line: what the model would say if this were its last."""
    if tokenizer is None:
        return Step(name, "BTC", "x")
    best = likeliest(unembed(model, x[:, -1:])[0, 0], 1)[0]
    return Step(name, "BTC", f"x; would say {tokenizer.decode([best])!r}")


def narrator(model: Model, shown: int, tokenizer: Tokenizer | None) -> Tap:
    """A tap that prints what passes through it."""
    last = PARALLEL_END if model.config.use_parallel_residual else SEQUENTIAL_END
    inside = {step.name: step for step in (*LAYER, last)}
    outside = {step.name: step for step in (EMBED, *END)}

    def tap(name: str, array: Array) -> Array:
        layer = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if layer is None:
            show(outside[name], array)
        elif int(layer[1]) == shown:
            if layer[2] == "hook_resid_pre":
                print(f"\nLayer {shown} (the first is 0): each name in full begins with blocks.{shown}.\n")
            show(inside[layer[2]], array)
        elif layer[2] == "hook_resid_post":
            if int(layer[1]) == 0 or int(layer[1]) == shown + 1:
                print("\nOther layers, each by what it ends with\n")
            show(further_layer(model, tokenizer, f"blocks.{layer[1]}.hook_resid_post", array), array)
        return array

    return tap


# Before and after the walk.


def print_model(name: str, config: Config) -> None:
    sizes = {
        "L": config.num_hidden_layers,
        "V": config.vocab_size,
        "C": config.hidden_size,
        "H": config.num_attention_heads,
        "D": config.head_dim,
        "R": config.rotary_ndims,
        "F": config.intermediate_size,
    }
    print(f"Model   {name}, {parameter_count(config):,} parameters")
    print("        " + "  ".join(f"{letter}={size}" for letter, size in sizes.items()))


def side_by_side(parts: Iterable[str], width: int) -> list[str]:
    """Lines of whole parts."""
    lines = [""]
    for part in parts:
        longer = f"{lines[-1]} | {part}" if lines[-1] else part
        if len(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(part)
    return lines


def print_prompt(ids: list[int], tokenizer: Tokenizer | None) -> None:
    texts = (str(index) if tokenizer is None else f"{index} {tokenizer.decode([index])!r}" for index in ids)
    print("Prompt  " + "\n        ".join(side_by_side(texts, WIDTH - 8)))
    print("        The values shown are those of the last position, and of head 0.")


def print_next(logits: Array, tokenizer: Tokenizer | None) -> None:  # (V,)
    probabilities = softmax(logits.astype(np.float64))
    print("\nNext token")
    for index in likeliest(logits, 5):
        text = "" if tokenizer is None else f"  {tokenizer.decode([index])!r}"
        print(f"  {probabilities[index]:7.2%}  id {index}{text}")


def walk(model: Model, ids: list[int], layer: int, tokenizer: Tokenizer | None) -> None:
    print_prompt(ids, tokenizer)
    logits = forward(model, [ids], narrator(model, layer, tokenizer))
    print(line(LOGITS, logits))
    print_next(logits[0, -1], tokenizer)


# The 20B's width, without its weights.


def drawn(config: Config) -> Model:
    """As random_model, on every core and with a bar."""
    table = tensor_table(config)
    with ThreadPoolExecutor() as pool:
        arrays = pool.map(random_tensor, table.values())
        tensors = dict(zip(table, tqdm(arrays, "drawing weights", len(table), disable=None, leave=False), strict=True))
    return Model(config, build_params(config, lambda spec: tensors[spec.name]))


def print_costs(config: Config) -> None:
    weights, context = parameter_count(config), config.max_position_embeddings
    layer = weights - parameter_count(replace(config, num_hidden_layers=config.num_hidden_layers - 1))
    token, text = cached_numbers(config, 1), cached_numbers(config, context)
    rows = (
        ("parameters", f"{weights:,}", ""),
        ("weights", f"{2 * weights / 1e9:.1f} GB", f"in float16; {4 * weights / 1e9:.1f} GB in float32"),
        ("one layer of them", f"{2 * layer / 1e9:.2f} GB", f"in float16; {4 * layer / 1e9:.2f} GB in float32"),
        ("cache, a token", f"{2 * token / 1e6:.2f} MB", f"in float16; {4 * token / 1e6:.2f} MB in float32"),
        (f"cache, {context} tokens", f"{2 * text / 1e9:.2f} GB", f"in float16; {4 * text / 1e9:.2f} GB in float32"),
        ("first token", f"{flops(config, 0, 1) / 1e9:.1f} GFLOP", "two for each weight of a matrix, embed_in apart"),
        (f"token {context}", f"{flops(config, context - 1, context) / 1e9:.1f} GFLOP", "and attention to all before"),
        (f"prompt of {context}", f"{flops(config, 0, context) / 1e12:.1f} TFLOP", "logits after its last token only"),
    )
    print(f"\nWhat the whole 20B costs: L={config.num_hidden_layers}, V={config.vocab_size}\n")
    for name, cost, note in rows:
        print(f"  {name:<19} {cost:>15}  {note}".rstrip())


def walk_20b_shape() -> None:
    config = replace(GPT_NEOX_20B, num_hidden_layers=1, vocab_size=SHAPE_20B_VOCABULARY)
    print_model("one layer as wide as the 20B's", config)
    print("        Weights and prompt are drawn, so values mean nothing; the vocabulary is cut to 1024 rows.")
    ids = np.random.default_rng(0).integers(0, config.vocab_size, SHAPE_20B_POSITIONS).tolist()
    walk(drawn(config), ids, 0, None)
    print_costs(GPT_NEOX_20B)


# The program.


def walk_model(name: str | None, revision: str | None, prompt: str, layer: int) -> None:
    if name is None and revision is not None:
        raise InputError("--revision needs a --model")
    folder: Path = shipped.path() if name is None else find(name, revision)
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(prompt)
    if not ids:
        raise InputError("the prompt is empty")
    layers = read_config(folder).num_hidden_layers
    if not 0 <= layer < layers:
        raise InputError(f"--layer {layer}: this model's are 0 to {layers - 1}")
    model = load(folder)
    print_model(name or "the small one that comes with the package", model.config)
    walk(model, ids, layer, tokenizer)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description="Walk one prompt through a model.", allow_abbrev=False)
    parser.add_argument("--model", metavar="PATH|NAME", help=f"a folder, a name such as pythia-70m, or {SHAPE_20B}")
    parser.add_argument("--revision", help="of a named model, such as step1000; of a folder, a folder inside it")
    parser.add_argument("--prompt", metavar="TEXT", help=f"without one, {PROMPT!r}")
    parser.add_argument("--layer", type=int, default=0, metavar="N", help="that is shown in full")
    args = parser.parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    if args.model != SHAPE_20B:
        walk_model(args.model, args.revision, PROMPT if args.prompt is None else args.prompt, args.layer)
    elif args.prompt is not None or args.revision is not None or args.layer != 0:
        raise InputError(f"{SHAPE_20B} has one layer and no tokenizer: leave out --prompt, --revision and --layer")
    else:
        walk_20b_shape()


if __name__ == "__main__":
    run(main)
