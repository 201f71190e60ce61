"""Wrong ways to score, as mutants.py keeps wrong models: each names the check of scoring_checks.py that must fail."""

from __future__ import annotations

from training_mutants import mutants

from neox.reference import scoring

FORWARD = mutants(
    scoring,
    "scores_are_those_of_forward",
    ("a branch sees its future", "reaches", (("-np.inf, dtype)", "0, dtype)"),)),
    ("a branch does not see itself", "reaches", (("(stop - start) + 1)", "(stop - start))"),)),
    ("a branch sees its neighbours", "reaches", (("branch.tokens.start, kept + stop)", "0, kept + stop)"),)),
    ("keys not kept between batches", "cache_after", (("after.keys[index, :, :, :kept] =", "_ ="),)),
    ("values not kept between batches", "cache_after", (("after.values[index, :, :, :kept] =", "_ ="),)),
    ("keys taken for values", "mix_tree", (("gathered(values, part.keys)", "gathered(keys, part.keys)"),)),
    ("the first kept positions, whichever they are", "cache_after", (("batch.kept)", "(slice(0, kept),))"),)),
)

SHARES = mutants(
    scoring.Asked,
    "scores_of_long_texts",
    (
        "rows counted from the batch",
        "between",
        (("self.rows[low:high] - first", "self.rows[low:high] % (last - first)"),),
    ),
    ("targets of another share", "between", (("self.targets[start:stop]", "self.targets[: stop - start]"),)),
)

LONG = mutants(
    scoring,
    "scores_of_long_texts",
    ("a block's own keys only", "reaches", (("branch.tokens.start, kept + stop)", "start, kept + stop)"),)),
    ("the share's start forgotten", "reaches", (("start - first, stop - first", "start - begin, stop - begin"),)),
)

TREE = [
    *mutants(
        scoring,
        "every_token_once",
        ("nothing shared", "leaves", (("shared_length(before, ids)", "0"),)),
        ("not sorted", "leaves", (('key=lambda i: texts[i].astype(">u4").tobytes()', "key=lambda i: i"),)),
        ("sorted by length", "leaves", (('texts[i].astype(">u4").tobytes()', "len(texts[i])"),)),
        ("sorted by a byte of each id", "leaves", (('">u4"', '">u1"'),)),
        ("every text a leaf", "leaves", (("        continue\n", "        pass\n"),)),
        ("parted one early", "shared_length", (("int(parted[0])", "max(0, int(parted[0]) - 1)"),)),
        (
            "positions of the batch",
            "batch_of",
            (("np.arange(leaf.shared, len(leaf.ids))", "np.arange(len(leaf.ids) - leaf.shared)"),),
        ),
        ("kept positions not counted", "batch_of", (("slice(kept + first, kept + last)", "slice(first, last)"),)),
        ("the path of the text before, uncut", "batch_of", (("before = cut(within, leaf.shared)", "before = within"),)),
        (
            "parts joined that do not touch",
            "extended",
            (("path[-1].stop == part.start", "path[-1].stop <= part.start"),),
        ),
        ("a path cut in its first part only", "cut", (("length -= taken", "length = 0"),)),
        (
            "a prediction from one token too early",
            "wanted_of",
            (
                (
                    "lengths[text] - len(targets[text]) : lengths[text]",
                    "lengths[text] - len(targets[text]) - 1 : lengths[text] - 1",
                ),
            ),
        ),
        ("targets not sorted as their tokens", "wanted_of", (("flat[order], order", "flat, order"),)),
        ("progress of the batch", "scores", (("progress(done, total)", "progress(len(part.batch.ids), total)"),)),
        ("greedy if any is", "scores", (("greedy[own].all()", "greedy[own].any()"),)),
    ),
    *mutants(
        scoring.Wanted,
        "one_forward_for_answers_of_one_token",
        (
            "a row for each target",
            "between",
            (
                (
                    "np.unique(self.tokens[start:stop] - first, return_inverse=True)",
                    "self.tokens[start:stop] - first, np.arange(stop - start)",
                ),
            ),
        ),
    ),
    *mutants(
        scoring,
        "batches_are_of_the_size_asked_for",
        ("the whole tree at once", "groups", (("tokens >= limits.tokens", "False"),)),
        ("as many texts as there are", "groups", (("len(group) * longest >= limits.positions", "False"),)),
        ("shared tokens counted", "groups", (("+= leaf.new", "+= len(leaf.ids)"),)),
    ),
]

READ = [
    *mutants(
        scoring,
        "beginnings",
        ("an end of text before everything", "begun", (("    if context:", "    if False:"),)),
        ("an end of text before an end of text", "begun", (("continuation[0] == end_of_text", "False"),)),
    ),
    *mutants(
        scoring,
        "cut_on_the_left",
        ("cut on the right", "text_of", (("[-(limit + 1) :]", "[: limit + 1]"),)),
        ("one token too few", "text_of", (("[-(limit + 1) :]", "[-limit:]"),)),
        ("one token too many", "text_of", (("[-(limit + 1) :]", "[-(limit + 2) :]"),)),
        ("continuations cut as well", "text_of", (("len(continuation) > limit", "False"),)),
        ("an empty context taken", "text_of", (("not len(context)", "False"),)),
    ),
    *mutants(
        scoring,
        "rolling",
        ("the last window not filled up", "rolling_windows", (("stop - length - 1 : start", "start - 1 : start"),)),
        ("a window one too short", "rolling_windows", (("stop - length - 1", "stop - length"),)),
        ("windows overlap", "rolling_windows", (("ids[start:stop])", "ids[start - 1 : stop])"),)),
    ),
]

JUDGED = mutants(
    scoring,
    "judgement_of_huge_logits",
    ("largest logit not subtracted", "judged", (("np.subtract(logits, largest, out=logits)", "pass"),)),
    ("not normalized", "judged", (("chosen - np.log", "chosen - 0 * np.log"),)),
    ("the last of equals", "judged", (("logits.argmax(-1)", "(2 - logits[:, ::-1].argmax(-1))"),)),
    ("overflow passed over", "judged", (("isfinite(largest - logits.min(-1, keepdims=True))", "isfinite(largest)"),)),
)

MUTANTS = (*FORWARD, *SHARES, *LONG, *TREE, *READ, *JUDGED)
