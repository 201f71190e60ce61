"""Wrong models: each is the right one with a few characters of a function changed, and names the check that must fail.

The table is also a list of what makes GPT-NeoX what it is. A mutant is given as text to be found in the function's
source and the text that takes its place; where the source no longer has the text, the mutant says so instead of
silently testing nothing.
"""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import pytest

from neox.reference import backward, cores, corpus, decode, model, normal, optimizer, prefill, project, train

MODULES = (normal, cores, project, model, decode, prefill, backward, optimizer, corpus, train)


@dataclass(frozen=True)
class Mutant:
    name: str
    check: str  # of checks.CHECKS, or of training_checks.CHECKS
    module: ModuleType | type  # or the class that has it
    function: str
    edits: tuple[tuple[str, str], ...]  # (text found, text put in its place), one after the other

    def source(self) -> str:
        """The function's source with the edits made."""
        text = textwrap.dedent(inspect.getsource(getattr(self.module, self.function)))
        for found, put in self.edits:
            assert found in text, f"{self.name}: {self.function} no longer contains {found!r}"
            text = text.replace(found, put)
        return text

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Put the changed function wherever the package holds the right one."""
        right = getattr(self.module, self.function)
        wrong = self.build()
        patch.setattr(self.module, self.function, wrong)
        for module in MODULES:
            for name in [name for name, value in vars(module).items() if value is right]:
                patch.setattr(module, name, wrong)
        for table in (model.ACTIVATIONS, backward.ACTIVATIONS):
            for name in [name for name, value in table.items() if value is right]:
                patch.setitem(table, name, wrong)

    def build(self) -> Callable:
        # Annotations stay text, as in the module; globals are the module's own, so that later patches reach them.
        code = compile("from __future__ import annotations\n" + self.source(), f"<{self.name}>", "exec")
        local: dict[str, Callable] = {}
        exec(code, vars(sys.modules[inspect.unwrap(getattr(self.module, self.function)).__module__]), local)
        return local[self.function]


def mutant(name: str, check: str, function: str, *edits: tuple[str, str], module: ModuleType = model) -> Mutant:
    return Mutant(name, check, module, function, edits)


ROTARY = (
    mutant("no rotary", "parity", "attention", ("apply_rotary(q, *rotary), apply_rotary(k, *rotary)", "q, k")),
    mutant("queries not rotated", "parity", "attention", ("apply_rotary(q, *rotary)", "q")),
    mutant("keys not rotated", "parity", "attention", ("apply_rotary(k, *rotary)", "k")),
    mutant("values rotated", "parity", "attention", (", v, tap)", ", apply_rotary(v, *rotary), tap)")),
    mutant(
        "neighbours paired, as GPT-J does",
        "parity",
        "apply_rotary",
        ("x[..., :half], x[..., half : 2 * half]", "x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]"),
        ("y[..., :half]", "y[..., 0 : 2 * half : 2]"),
        ("y[..., half : 2 * half]", "y[..., 1 : 2 * half : 2]"),
    ),
    mutant(
        "turned the other way",
        "parity",
        "apply_rotary",
        ("x1 * cos - x2 * sin", "x1 * cos + x2 * sin"),
        ("x2 * cos + x1 * sin", "x2 * cos - x1 * sin"),
    ),
    mutant("one sign wrong", "parity", "apply_rotary", ("x2 * cos + x1 * sin", "x2 * cos - x1 * sin")),
    mutant("dims beyond R set to zero", "parity", "apply_rotary", ("= x[..., 2 * half :]", "= 0")),
    mutant(
        "the last R dims rotated", "parity", "apply_rotary", ("    cos, sin =", "    x = x[..., ::-1]\n    cos, sin =")
    ),
    mutant("every dim rotated", "parity", "rotary_tables", ("config.rotary_ndims", "config.head_dim")),
    mutant(
        "frequencies of the whole head",
        "parity",
        "rotary_tables",
        ("np.float32(config.rotary_ndims)", "np.float32(config.head_dim)"),
    ),
    mutant("base always 10000", "parity", "rotary_tables", ("config.rotary_emb_base", "10000")),
    mutant("base 500000, as Llama 3", "parity", "rotary_tables", ("config.rotary_emb_base", "500000")),
    mutant("angles always in float32", "parity", "rotary_tables", ("config.rotary_dtype", "np.float32")),
    mutant("angles always in float64", "parity", "rotary_tables", ("config.rotary_dtype", "np.float64")),
    mutant(
        "cos and sin swapped", "parity", "rotary_tables", ("np.cos(", "np.SIN("), ("np.sin(", "np.cos("), ("SIN", "sin")
    ),
    # Attention sees only differences of positions, so parity could miss these two but for the rounding of the tables.
    mutant("positions from 1", "rotary_table", "rotary_tables", ("angle = positions", "angle = (positions + 1)")),
    mutant("positions counted down", "rotary_table", "rotary_tables", ("angle = positions", "angle = -positions")),
)

NORMS = (
    mutant("one norm for both branches", "parity", "layer", ("p.post_attention_layernorm", "p.input_layernorm")),
    mutant(
        "norms swapped",
        "parity",
        "layer",
        ("p.post_attention_layernorm", "p.INPUT"),
        ("p.input_layernorm", "p.post_attention_layernorm"),
        ("p.INPUT", "p.input_layernorm"),
    ),
    mutant("attention without its norm", "parity", "layer", ("config.head_dim, normed,", "config.head_dim, x,")),
    mutant("MLP without its norm", "parity", "layer", ("config.hidden_act, normed,", "config.hidden_act, x,")),
    mutant("no final norm", "parity", "unembed", ("x = layer_norm(", "layer_norm(")),
    mutant("norm's weight forgotten", "parity", "layer_norm", ("y * p.weight + p.bias", "y + p.bias")),
    mutant("norm's bias forgotten", "parity", "layer_norm", (" + p.bias", "")),
    mutant("norm's weight from zero", "parity", "layer_norm", ("y * p.weight", "y * (1 + p.weight)")),
    mutant("mean kept", "parity", "layer_norm", ("x - x.mean(axis=-1, keepdims=True)", "x.copy()")),
    mutant("eps 1e-6", "parity", "layer_norm", ("+ eps", "+ 1e-6")),
    mutant("eps always 1e-5", "parity", "layer_norm", ("+ eps", "+ 1e-5")),
    mutant("eps outside the root", "parity", "layer_norm", ("np.sqrt(variance + eps)", "np.sqrt(variance) + eps")),
    mutant("no eps", "parity", "layer_norm", ("variance + eps", "variance")),
    mutant(
        "unbiased variance",
        "parity",
        "layer_norm",
        ("np.mean(y * y, axis=-1, keepdims=True)", "np.sum(y * y, axis=-1, keepdims=True) / (x.shape[-1] - 1)"),
    ),
    mutant(
        "variance in one pass",
        "norm_of_large_mean",
        "layer_norm",
        (
            "np.mean(y * y, axis=-1, keepdims=True)",
            "np.mean(x * x, axis=-1, keepdims=True) - x.mean(axis=-1, keepdims=True) ** 2",
        ),
    ),
)

ATTENTION = (
    mutant(
        "q of all heads, then k, then v, as GPT-2 does",
        "parity",
        "attention",
        ("reshape(batch, length, -1, 3, head_dim)", "reshape(batch, length, 3, -1, head_dim).swapaxes(2, 3)"),
    ),
    mutant(
        "q, k, v alternating within a head",
        "parity",
        "attention",
        ("reshape(batch, length, -1, 3, head_dim)", "reshape(batch, length, -1, head_dim, 3).swapaxes(3, 4)"),
    ),
    mutant("q and k swapped", "parity", "attention", ("qkv[..., i, :]", "qkv[..., (1, 0, 2)[i], :]")),
    mutant("k and v swapped", "parity", "attention", ("qkv[..., i, :]", "qkv[..., (0, 2, 1)[i], :]")),
    mutant(
        "heads joined dim by dim",
        "parity",
        "attention",
        ("z.reshape(batch, length, -1)", "z.swapaxes(2, 3).reshape(batch, length, -1)"),
    ),
    mutant("scores not scaled", "parity", "attend", ("(q / math.sqrt(q.shape[-1]))", "q")),
    mutant(
        "scores scaled by sqrt(C)",
        "parity",
        "attend",
        ("math.sqrt(q.shape[-1])", "math.sqrt(q.shape[-1] * q.shape[1])"),
    ),
    mutant("scores scaled by D", "parity", "attend", ("math.sqrt(q.shape[-1])", "q.shape[-1]")),
    mutant("no mask", "parity", "causal_mask", ("-np.inf", "0")),
    mutant("one key of the future seen", "parity", "causal_mask", (", 1)", ", 2)")),
    mutant("the query's own key not seen", "parity", "causal_mask", (", 1)", ", 0)")),
    mutant("the past masked", "parity", "causal_mask", ("dtype), 1)", "dtype), 1).T")),
    mutant("masked by -10000", "future_with_huge_scores", "causal_mask", ("-np.inf", "-1e4")),
    mutant("softmax over queries", "parity", "softmax", ("axis=-1", "axis=-2")),
    mutant("softmax in base 2", "parity", "softmax", ("np.exp(", "np.exp2(")),
    mutant(
        "softmax plus one", "parity", "softmax", ("y.sum(axis=-1, keepdims=True)", "1 + y.sum(axis=-1, keepdims=True)")
    ),
    mutant(
        "largest score not subtracted",
        "softmax_of_huge_scores",
        "softmax",
        ("x - x.max(axis=-1, keepdims=True)", "x.copy()"),
    ),
)

MLP_AND_RESIDUAL = (
    mutant("GELU always by tanh", "parity", "mlp", ("ACTIVATIONS[hidden_act]", 'ACTIVATIONS["gelu_fast"]')),
    mutant("GELU always by erf", "parity", "mlp", ("ACTIVATIONS[hidden_act]", 'ACTIVATIONS["gelu"]')),
    mutant("ReLU", "parity", "gelu", ("size * upper_tail(size)", "0")),
    mutant("quick GELU", "parity", "gelu_fast", ("0.5 * x * (1 + np.tanh(inner))", "x / (1 + np.exp(-1.702 * x))")),
    mutant("sqrt(2/pi) to four digits", "activations", "gelu_fast", ("math.sqrt(2 / math.pi)", "0.7979")),
    mutant("cubic term 0.0447", "activations", "gelu_fast", ("0.044715", "0.0447")),
    mutant(
        "a term of the tail lost",
        "activations",
        "upper_tail",
        ("first, second, *rest =", "_, first, second, *rest ="),
        module=normal,
    ),
    mutant(
        "tail in float32",
        "tail_in_float64",
        "upper_tail",
        ("COEFFICIENTS[x.dtype]", "COEFFICIENTS[np.dtype(np.float32)]"),
        module=normal,
    ),
    mutant("residual always sequential", "parity", "layer", ("config.use_parallel_residual", "False")),
    mutant("residual always parallel", "parity", "layer", ("config.use_parallel_residual", "True")),
    mutant("no residual", "parity", "layer", ("m + a + x", "m + a")),
    mutant("residual from the normed input", "parity", "layer", ("m + a + x", "m + a + normed")),
    mutant("attention's branch lost", "parity", "layer", ("m + a + x", "m + x")),
    mutant("MLP's branch lost", "parity", "layer", ("m + a + x", "a + x")),
    mutant("no residual around attention", "parity", "layer", ('"hook_resid_mid", a + x', '"hook_resid_mid", a')),
    mutant("no residual around the MLP", "parity", "layer", ("else m + x", "else m")),
)

BIASES = (
    mutant("no biases", "parity", "linear", ("if p.bias is not None", "if False")),
    mutant(
        "no bias of query_key_value",
        "parity",
        "attention",
        ("linear(x, p.query_key_value)", "project(x, p.query_key_value.weight)"),
    ),
    mutant(
        "no bias of attention's dense",
        "parity",
        "attention",
        ("linear(z.reshape(batch, length, -1), p.dense)", "project(z.reshape(batch, length, -1), p.dense.weight)"),
    ),
    mutant(
        "no bias of dense_h_to_4h",
        "parity",
        "mlp",
        ("linear(x, p.dense_h_to_4h)", "project(x, p.dense_h_to_4h.weight)"),
    ),
    mutant(
        "no bias of dense_4h_to_h",
        "parity",
        "mlp",
        ("return linear(", "return project("),
        ("p.dense_4h_to_h)", "p.dense_4h_to_h.weight)"),
    ),
)

WHOLE_MODEL = (
    mutant("tied head", "parity", "unembed", ("embed_out", "embed_in")),
    mutant(
        "embedding scaled by sqrt(C)",
        "parity",
        "embed",
        ("astype(model.dtype)", "astype(model.dtype) * model.config.hidden_size**0.5"),
    ),
    mutant(
        "last layer left out",
        "parity",
        "forward",
        ("enumerate(model.params.layers)", "enumerate(model.params.layers[:-1])"),
    ),
    mutant(
        "layers in reverse",
        "parity",
        "forward",
        ("enumerate(model.params.layers)", "enumerate(model.params.layers[::-1])"),
    ),
    mutant("first layer every time", "parity", "forward", ("layer(p,", "layer(model.params.layers[0],")),
    mutant("float64 by a NumPy constant", "same_dtype", "attend", ("math.sqrt(q.shape[-1])", "np.sqrt(q.shape[-1])")),
    mutant("float64 tables", "same_dtype", "apply_rotary", ("np.empty_like(x)", "np.empty(x.shape)")),
    mutant(
        "a tap that only looks",
        "taps_replace",
        "attention",
        ('z = tap("hook_z", z.swapaxes(1, 2))', 'z = z.swapaxes(1, 2); tap("hook_z", z)'),
    ),
    mutant(
        "rotated queries that cannot be replaced",
        "taps_replace",
        "attention",
        ("z = mix(q, k, v, tap)", "z = mix(apply_rotary(qkv[..., 0, :].swapaxes(1, 2), *rotary), k, v, tap)"),
    ),
    mutant(
        "patterns that cannot be replaced",
        "taps_replace",
        "attend",
        ("return pattern @ v", "return softmax(scores) @ v"),
    ),
)

STORAGE = (
    mutant("sign of a half lost", "stored_in_fewer_bits", "widen", ("-0x70002000", "0x0FFFE000"), module=project),
    mutant(
        "sign of a half smeared",
        "stored_in_fewer_bits",
        "widen",
        ("bits &= np.int32(-0x70002000)", "pass"),
        module=project,
    ),
    mutant(
        "a half shifted in its own 16 bits", "stored_in_fewer_bits", "widen", (", dtype=np.int32", ""), module=project
    ),
    mutant(
        "a bfloat16 shifted in its own 16 bits",
        "stored_in_fewer_bits",
        "widen",
        (", dtype=np.uint32", ""),
        module=project,
    ),
    mutant("exponent of a half off by one", "stored_in_fewer_bits", "widen", ("2.0**112", "2.0**113"), module=project),
    mutant("bits of a half lost", "stored_in_fewer_bits", "widen", (", 13,", ", 12,"), module=project),
    mutant(
        "last rows not multiplied",
        "stored_in_fewer_bits",
        "_project_widened",
        ("range(first, last, step)", "range(first, last - step, step)"),
        ("np.empty((len(x), outputs), x.dtype)", "np.zeros((len(x), outputs), x.dtype)"),
        module=project,
    ),
    mutant(
        "one block for all rows",
        "stored_in_fewer_bits",
        "_project_widened",
        ("weight[start:stop]", "weight[: stop - start]"),
        module=project,
    ),
    mutant(
        "rows of the last step in no share",
        "shares_are_the_whole",
        "in_shares",
        ("-(-length // step)", "length // step"),
        module=cores,
    ),
    mutant(
        "shares cut within a step",
        "shares_are_the_whole",
        "in_shares",
        ("steps * i // count * step", "steps * i * step // count"),
        module=cores,
    ),
)

CACHE = (
    mutant(
        "keys cached before rotation",
        "cached_is_uncached",
        "attention",
        ("apply_rotary(k, *rotary)", "(apply_rotary(k, *rotary) if mix is causal_attend else k)"),
    ),
    mutant(
        "positions of every piece from 0",
        "cached_is_uncached",
        "through_layers",
        ("np.arange(start, start + ids.shape[1])", "np.arange(ids.shape[1])"),
        module=decode,
    ),
    mutant(
        "each piece over the first",
        "cached_is_uncached",
        "mix_over",
        ("[:, :, start : start + length]", "[:, :, :length]"),
        module=decode,
    ),
    mutant(
        "keys one place late",
        "cached_is_uncached",
        "mix_over",
        (
            "keys[:, :, start : start + length] = k",
            "keys[:, :, start + 1 : start + 1 + length] = k[:, :, : keys.shape[2] - start - 1]",
        ),
        module=decode,
    ),
    mutant(
        "all layers in one cache",
        "cached_is_uncached",
        "mix_over",
        ("cache.values[index]", "cache.values[0]"),
        module=decode,
    ),
    mutant(
        "the next key seen", "cached_is_uncached", "mask_between", ("key <= query", "key <= query + 1"), module=decode
    ),
    mutant(
        "the block's future seen", "cached_is_uncached", "mask_between", ("(key <= query)", "(key >= 0)"), module=decode
    ),
    mutant(
        "only the block's own keys seen",
        "cached_is_uncached",
        "mask_between",
        ("(key <= query)", "(key <= query) & (key >= start)"),
        module=decode,
    ),
    mutant(
        "length not advanced", "cached_is_uncached", "extend", ("cache.length += ids.shape[1]", "pass"), module=decode
    ),
    mutant(
        "length one short",
        "cached_is_uncached",
        "extend",
        ("+= ids.shape[1]", "+= max(ids.shape[1] - 1, 1)"),
        module=decode,
    ),
    mutant(
        "padding seen",
        "padding_changes_nothing",
        "mask_between",
        ("key >= cache.padding[:, None, None]", "key >= 0 * cache.padding[:, None, None]"),
        module=decode,
    ),
    mutant(
        "one padding for all rows",
        "padding_changes_nothing",
        "mask_between",
        ("cache.padding[:, None, None]", "cache.padding.max() + 0 * cache.padding[:, None, None]"),
        module=decode,
    ),
    mutant(
        "one padded key seen",
        "padding_changes_nothing",
        "mask_between",
        ("key >= cache", "key + 1 >= cache"),
        module=decode,
    ),
    # A common shift of all positions is seen only through the rounding of the tables; float64 sees that.
    mutant(
        "positions counted through the padding",
        "padding_changes_nothing",
        "through_layers",
        ("- cache.padding[:, None]", "- 0 * cache.padding[:, None]"),
        module=decode,
    ),
    mutant(
        "logits of the chunk's first token", "prefill_is_forward", "prefill", ("x[:, -1:]", "x[:, :1]"), module=prefill
    ),
    mutant(
        "chunks not counted",
        "prefill_is_forward",
        "prefill",
        ("cache.length += chunk.shape[1]", "pass"),
        module=prefill,
    ),
    mutant(
        "shares at the chunk's start",
        "prefill_is_forward",
        "in_shares",
        ("cache.length + first", "cache.length"),
        module=prefill,
    ),
    mutant(
        "first share's result",
        "prefill_is_forward",
        "in_shares",
        ("bounds[1:]))[-1]", "bounds[1:]))[0]"),
        module=prefill,
    ),
    mutant("shares that do not wait", "shares_wait", "in_shares", (", barrier.wait)", ")"), module=prefill),
    mutant(
        "a refused piece counted",
        "limits_are_kept",
        "checked_for",
        ("    longest =", "    cache.length = stop\n    longest ="),
        module=decode,
    ),
    mutant(
        "padding counted as context",
        "limits_are_kept",
        "checked_for",
        ("stop - int(cache.padding.min())", "stop"),
        module=decode,
    ),
    mutant(
        "context of the shortest row",
        "limits_are_kept",
        "checked_for",
        ("padding.min()", "padding.max()"),
        module=decode,
    ),
    mutant(
        "context one too long",
        "limits_are_kept",
        "checked_for",
        ("longest > model", "longest - 1 > model"),
        module=decode,
    ),
    mutant(
        "context one too short",
        "limits_are_kept",
        "checked_for",
        ("longest > model", "longest >= model"),
        module=decode,
    ),
)

MUTANTS = ROTARY + NORMS + ATTENTION + MLP_AND_RESIDUAL + BIASES + WHOLE_MODEL + STORAGE + CACHE
