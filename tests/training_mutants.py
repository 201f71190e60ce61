"""Wrong ways to train, as mutants.py keeps wrong models: each names the check of training_checks.py that must fail."""

from __future__ import annotations

from types import ModuleType

from mutants import Mutant

from neox.reference import backward, corpus, model, optimizer, train


def mutants(module: ModuleType | type, check: str, *rows: tuple[str, str, tuple[tuple[str, str], ...]]) -> list[Mutant]:
    return [Mutant(name, check, module, function, edits) for name, function, edits in rows]


GRADIENT = mutants(
    backward,
    "gradient_is_the_slope",
    ("no gradient of a linear's bias", "linear", (("else summed(dy)", "else 0 * summed(dy)"),)),
    ("a linear's weight transposed wrongly", "linear", (("rows.T @ x", "-rows.T @ x"),)),
    ("a linear's input gradient from its absolute weight", "linear", (("p.weight).", "abs(p.weight))."),)),
    ("LayerNorm without the mean term", "layer_norm", (("    dx -= mean\n", ""),)),
    ("LayerNorm without the scale term", "layer_norm", (("    dx -= product\n", ""),)),
    ("LayerNorm's scale forgotten", "layer_norm", (("    dx /= scale\n", ""),)),
    ("LayerNorm's weight forgotten", "layer_norm", (("dx = dy * p.weight", "dx = dy.copy()"),)),
    ("LayerNorm's weight forgotten in a term", "layer_norm", (("    product *= p.weight", "    #"),)),
    ("no gradient of a norm's bias", "layer_norm", (("summed(dy)", "0 * summed(dy)"),)),
    ("no gradient of a norm's weight", "layer_norm", (("summed(product)", "0 * summed(product)"),)),
    ("a norm's bias left out of what it returned", "normed", (("    y += p.bias\n", ""),)),
    ("gelu without the density", "gelu", (("slope += x *", "slope += 0 * x *"),)),
    ("gelu mirrored", "gelu", (("x > 0", "x < 0"),)),
    ("gelu with half the density", "gelu", (("* math.pi", "* math.pi * 4"),)),
    ("gelu_fast by the slope of its argument alone", "gelu_fast", (("    square += 1\n", ""),)),
    ("gelu_fast without the slope of its argument", "gelu_fast", (("square *= 1 - t", "square *= 0 * t"),)),
    ("gelu_fast's cubic term not tripled", "gelu_fast", (("3 * d", "d"),)),
    ("softmax without the sum", "softmax", (("dy -= np", "dy -= 0 * np"),)),
    ("softmax without the pattern", "softmax", (("    dy *= y\n", ""),)),
    ("rotary not transposed", "apply_rotary", (("-sin", "sin"),)),
    ("rotary left out", "apply_rotary", (("forwards.apply_rotary(dy, cos, -sin)", "dy.copy()"),)),
    ("scores not scaled", "attend", (("math.sqrt(q.shape[-1])", "1.0"),)),
    ("queries and keys swapped", "attend", (("dscores @ k", "dscores @ q"),)),
    ("the keys' gradient not transposed", "attend", (("dscores.swapaxes(-1, -2) @ q", "dscores @ q"),)),
    ("the values' gradient by the pattern, not transposed", "attend", (("pattern.swapaxes(-1, -2) @", "pattern @"),)),
    ("keys not rotated again", "attention", ((", forwards.apply_rotary(k, *rotary)", ", k"),)),
    ("values rotated back", "attention", (("*rotary), dv)", "*rotary), apply_rotary(dv, *rotary))"),)),
    ("q, k, v in thirds", "attention", (("heads, 3, head_dim", "3, heads, head_dim"), ("[..., i, :]", "[:, :, i]"))),
    ("only parallel", "layer", (("dy if config.use_parallel_residual else dx", "dy"),)),
    ("only sequential", "layer", (("dy if config.use_parallel_residual else dx", "dx"),)),
    ("residual forgotten", "layer", (("    dx += dy\n", ""),)),
    ("nothing through the attention", "layer", (("    dx += through_attention\n", ""),)),
    ("an id counted once", "embed", (("np.add.reduceat", "np.maximum.reduceat"),)),
    ("ids not sorted as their gradients", "embed", (("[order], starts)", ", starts)"),)),
    ("the sum of losses, not their mean", "cross_entropy", (("1 / (targets.size * total)", "1 / total"),)),
    ("no minus one at the next id", "cross_entropy", (("- 1 / targets.size", ""),)),
    (
        "tied: only of the embedding",
        "loss_and_gradient",
        (("dembed_in = dembed_out = dembed_in + dembed_out", "dembed_out = dembed_in"),),
    ),
    ("no positions on the way back", "loss_and_gradient", (("np.arange(inputs", "0 * np.arange(inputs"),)),
)

LOSS = mutants(
    backward,
    "loss_is_of_the_next_id",
    ("predicts the id it sees", "loss_and_gradient", (("ids[:, 1:]", "ids[:, :-1]"),)),
    ("largest logit not put back", "cross_entropy", (("np.log(total) - score", "np.log(total) + score"),)),
)

FUTURE = [
    *mutants(
        backward,
        "future_has_no_part",
        ("mask forgotten on the way back", "softmax", (("dy *= y", "dy *= np.maximum(y, 1e-3)"),)),
        ("the whole row answers for its sum", "softmax", (("dy *= y", "dy *= 1 + y"),)),
    ),
    *mutants(model, "loss_is_of_the_next_id", ("mask forgotten", "causal_mask", (("-np.inf", "0"),))),
]

KINDS = mutants(
    backward,
    "float32_stays",
    ("gelu in float64", "gelu", (("slope += x", "slope = slope + x"), ("math.sqrt(", "np.sqrt("))),
    ("the embedding's gradient in float64", "embed", ((", dx.dtype)", ")"),)),
)

ADAMW = mutants(
    optimizer,
    "adamw_by_hand",
    ("weight decay through the means, as in Adam", "update", (("(1 - adam.beta1) * g", "(1 - adam.beta1) * (g + p)"),)),
    ("no weight decay", "update", (("p *= 1 - rate * adam.weight_decay", "pass"),)),
    ("weight decay of vectors too", "update", (("p.ndim > 1", "True"),)),
    ("weight decay without the rate", "update", (("1 - rate * adam", "1 - adam"),)),
    ("no correction of the first mean", "update", (("rate / (1 - adam.beta1**step)", "rate"),)),
    ("no correction of the second mean", "update", (("math.sqrt(1 - adam.beta2**step)", "1"),)),
    ("steps from zero", "update", (("**step", "**(step + 1)"),)),
    ("eps inside the root", "update", (("np.sqrt(v)", "np.sqrt(v + adam.eps)"), ("+= adam.eps", "+= 0"))),
    ("eps forgotten", "update", (("denominator += adam.eps", "pass"),)),
    ("betas swapped", "update", (("adam.beta1", "adam.B"), ("adam.beta2", "adam.beta1"), ("adam.B", "adam.beta2"))),
)

CLIP = [
    *mutants(
        optimizer,
        "clipping",
        ("each tensor clipped by itself", "clip", (("largest / norm", "largest / np.linalg.norm(gradient)"),)),
        ("short gradients made long", "clip", (("norm > largest", "norm > 0"),)),
        ("the length after clipping", "clip", (("return norm", "return min(norm, largest)"),)),
        ("entries clipped", "clip", (("gradient *= largest / norm", "np.clip(gradient, -1, 1, out=gradient)"),)),
    ),
    *mutants(
        train,
        "steps_are_their_equations",
        ("clipped before it is added up", "_sum_into", (("    for name", "    clip(part, 0.05)\n    for name"),)),
        (
            "clipped after the update",
            "advance",
            (
                ("    norm = clip(gradients, settings.clip)\n", "    norm = 1.0\n"),
                ("    return State", "    norm = clip(gradients, settings.clip)\n    return State"),
            ),
        ),
        ("micro-batches added, not averaged", "gradient_of", (("gradient /= len(parts)", "gradient *= 1.0"),)),
        ("only the last micro-batch", "_sum_into", (("gradient += part[name]", "gradient[...] = part[name]"),)),
        ("the rate of the step before", "advance", (("settings.rate(step)", "settings.rate(step - 1)"),)),
    ),
]

SCHEDULE = mutants(
    optimizer,
    "schedule",
    ("no warm-up", "learning_rate", (("if step <= rising", "if False"),)),
    ("warm-up from the peak", "learning_rate", (("peak * step / rising", "peak"),)),
    ("a line down", "learning_rate", (("(1 + math.cos(math.pi * passed)) / 2", "(1 - passed)"),)),
    ("down to nothing", "learning_rate", (("(final + (1 - final) * ", "("),)),
    ("a cosine that counts the warm-up", "learning_rate", (("(step - rising) / (steps - rising)", "step / steps"),)),
)

START = mutants(
    optimizer,
    "first_weights",
    ("outputs drawn like the rest", "initial_tensor", (("spec.name.endswith(OUTPUTS)", "False"),)),
    ("Xavier's deviation", "initial_tensor", (("2 / (5 * config.hidden_size)", "1 / config.hidden_size"),)),
    ("outputs drawn as GPT-2's", "initial_tensor", (("2 / config.num", "0.02 / config.num"),)),
    ("norms of zero", "initial_tensor", (('"norm.weight"', '"nothing"'),)),
)

ORDER = [
    *mutants(
        corpus,
        "every_row_once_an_epoch",
        ("rows drawn with replacement", "_epoch_order", ((".permutation(rows)", ".integers(0, rows, rows)"),)),
        ("every epoch in one order", "_epoch_order", (("[seed, epoch]", "[seed]"),)),
        ("an order that no seed changes", "_epoch_order", (("[seed, epoch]", "[epoch]"),)),
        (
            "the end of an epoch left out",
            "batch_rows",
            (("step * batch, (step + 1) * batch", "step % 2 * 3, step % 2 * 3 + 3"),),
        ),
    ),
    *mutants(
        corpus.Packed,
        "rows_overlap_by_one",
        ("rows without the next id", "__getitem__", (("self.length + 1", "self.length"),)),
        ("rows overlap by half", "__getitem__", (("* self.length\n", "* (self.length // 2)\n"),)),
        ("held-out rows are trained on", "split", (("self.ids[: kept + 1]", "self.ids"),)),
    ),
]

MUTANTS = [*GRADIENT, *LOSS, *FUTURE, *KINDS, *ADAMW, *CLIP, *SCHEDULE, *START, *ORDER]
