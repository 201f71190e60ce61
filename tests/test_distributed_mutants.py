"""Wrong ways to share a model among ranks: each is the right one with a few characters changed, and must be noticed."""

from __future__ import annotations

from types import ModuleType

import pytest
from distributed_checks import CHECKS
from mutants import Mutant

from neox.distributed import candidates, comm, decode, leader, model, sharding

MODULES = (sharding, comm, model, decode, candidates, leader)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def mutant(name: str, check: str, module: ModuleType | type, function: str, *edits: tuple[str, str]) -> Mutant:
    return Mutant(name, check, module, function, edits)


MODEL = (
    mutant(
        "bias on every rank", "ranks_equal_one", model, "layer", ("comm.sum(m + a)", "comm.sum(m + a + biases.mlp)")
    ),
    mutant("bias left out", "ranks_equal_one", model, "layer", ("(biases.mlp + biases.attention)", "biases.mlp")),
    mutant("residual before the sum", "ranks_equal_one", model, "layer", ("comm.sum(m + a)", "comm.sum(m + a + x)")),
    mutant("attention not summed", "ranks_equal_one", model, "layer", ("comm.sum(m + a)", "a + comm.sum(m)")),
    mutant("nothing summed", "ranks_equal_one", model, "layer", ("comm.sum(m + a)", "(m + a)")),
    mutant(
        "two sums a layer",
        "a_token_takes_l_and_two_collectives",
        model,
        "layer",
        ("comm.sum(m + a)", "(comm.sum(m) + comm.sum(a))"),
    ),
    mutant(
        "sequential residual: the bias of the attention left out",
        "ranks_equal_one",
        model,
        "layer",
        ("comm.sum(a) + biases.attention + x", "comm.sum(a) + x"),
    ),
    mutant(
        "sequential residual before the sum",
        "ranks_equal_one",
        model,
        "layer",
        ("comm.sum(a) + biases.attention + x", "comm.sum(a + x) + biases.attention"),
    ),
    mutant(
        "QKV split in thirds",
        "ranks_equal_one",
        model,
        "shard",
        (
            "return tensors[spec.name][slices(spec, comm.rank, comm.ranks)]",
            "cut = slices(spec, comm.rank, comm.ranks)[0]\n"
            "        third = slice(cut.start // 3, cut.stop // 3)\n"
            "        if 'query_key_value' not in spec.name:\n"
            "            return tensors[spec.name][slices(spec, comm.rank, comm.ranks)]\n"
            "        return np.concatenate([each[third] for each in np.split(tensors[spec.name], 3)])",
        ),
    ),
    mutant(
        "every rank's embedding",
        "ranks_equal_one",
        model,
        "embed",
        ("(held.start <= ids) & (ids < held.stop)", "ids >= 0"),
        ("ids[mine] - held.start", "(ids[mine] - held.start) % len(table)"),
    ),
    mutant(
        "ids not counted from the first of the rank",
        "ranks_equal_one",
        model,
        "embed",
        ("ids[mine] - held.start", "ids[mine] % len(table)"),
    ),
    mutant(
        "logits in the wrong order",
        "ranks_equal_one",
        model,
        "forward",
        ("shard.comm.gather(unembed(shard.model, x))", "shard.comm.gather(unembed(shard.model, x))[::-1]"),
    ),
    mutant(
        "norms of rank 0 on all",
        "norms_of_each_rank_are_kept",
        model,
        "new_shard",
        (
            "model = Model(",
            "params = replace(params, final_layer_norm=comm.broadcast(params.final_layer_norm))\n    model = Model(",
        ),
    ),
    mutant(
        "both branches read one norm",
        "norms_of_each_rank_are_kept",
        model,
        "layer",
        ("normed = layer_norm(x, p.post_attention_layernorm", "normed = layer_norm(x, p.input_layernorm"),
    ),
)

COMM = (
    mutant(
        "sum in arrival order",
        "sums_are_in_rank_order",
        comm.VirtualRank,
        "_meet",
        ("meeting.values[self.rank] = value", "meeting.values[meeting.barrier.n_waiting] = value"),
    ),
    mutant(
        "sum from the last rank on",
        "sums_are_in_rank_order",
        comm,
        "sum_in_rank_order",
        ("parts[0]", "parts[-1]"),
        ("parts[1:]", "parts[-2::-1]"),
    ),
    mutant(
        "sum in half precision",
        "sums_are_in_rank_order",
        comm,
        "sum_in_rank_order",
        (".astype(np.promote_types(parts[0].dtype, np.float32))", ".copy()"),
    ),
)

DECODING = (
    mutant(
        "sampling per rank",
        "texts_equal_those_of_one_rank",
        leader.Performer,
        "perform",
        ("self._decoder.step(order.ids)", "self._decoder.step(self._logits.argmax(-1) + self._held.start)"),
    ),
    mutant(
        "texts that ended are kept",
        "texts_equal_those_of_one_rank",
        leader.Performer,
        "_keep",
        ("self._decoder.keep(rows)", "None"),
    ),
    mutant(
        "samplings of other texts",
        "texts_equal_those_of_one_rank",
        leader.Performer,
        "_keep",
        ("self.selection and self.selection.keep(rows)", "self.selection"),
    ),
    mutant(
        "the selection is always enough",
        "texts_equal_those_of_one_rank",
        candidates,
        "decided",
        ("all(", "True or all("),
    ),
    mutant(
        "cache of all heads",
        "texts_equal_those_of_one_rank",
        decode,
        "new_cache",
        ("dense.shape[1] // config.head_dim", "config.num_attention_heads"),
    ),
    mutant(
        "positions count the padding",
        "texts_equal_those_of_one_rank",
        decode,
        "extend",
        (" - cache.padding[:, None]", ""),
    ),
    mutant(
        "the cache is filled from its beginning",
        "texts_equal_those_of_one_rank",
        decode,
        "extend",
        ("cache.length += length", "cache.length = length"),
    ),
    mutant(
        "the last id is not told",
        "texts_equal_those_of_one_rank",
        leader,
        "_lead",
        ("leader.last = (piece.id,)", "None"),
    ),
    mutant(
        "a gather too many",
        "a_token_takes_l_and_two_collectives",
        leader.Performer,
        "perform",
        ("if self.selection is None", "self._comm.gather(self._logits)\n    if self.selection is None"),
    ),
)

SENT = (
    mutant(
        "one candidate too few",
        "few_candidates_decide",
        candidates,
        "select",
        ("min(selection.count,", "min(selection.count - 1 or 1,"),
    ),
    mutant(
        "the ids are those of the rank's own rows",
        "few_candidates_decide",
        candidates,
        "select",
        ("+= held.start", "+= 0"),
    ),
    mutant(
        "ids that are not allowed are sent",
        "few_candidates_decide",
        candidates,
        "select",
        ("selection.allowed is not None", "False"),
    ),
    mutant("the rest weighs nothing", "few_candidates_decide", candidates, "_rest", ("if not left.size", "if True")),
    mutant(
        "the rest at a temperature of 1",
        "few_candidates_decide",
        candidates,
        "_rest",
        (".mean()", ".mean() ** (1 / sampling.temperature)"),
    ),
    mutant("of the rest only the sum", "few_candidates_decide", candidates, "_rest", (".mean()", ".sum()")),
    mutant(
        "what was not sent lies below every rank's last",
        "few_candidates_decide",
        candidates,
        "decided",
        ("np.max(", "np.min("),
    ),
    mutant(
        "up to and including what was not sent",
        "few_candidates_decide",
        candidates,
        "_decides",
        ("row > least", "row >= least"),
    ),
    mutant(
        "min-p always decides",
        "few_candidates_decide",
        candidates,
        "_decides",
        ("sampling.min_p * (1 - 1e-9)", "1 if sampling.min_p else 0"),
    ),
    mutant(
        "never enough",
        "few_candidates_decide",
        candidates,
        "_decides",
        ("return True", "return False"),
    ),
)

MUTANTS = MODEL + COMM + DECODING + SENT


def install(mutant: Mutant, patch: pytest.MonkeyPatch) -> None:
    """Put the changed function wherever the package holds the right one."""
    right, wrong = getattr(mutant.module, mutant.function), mutant.build()
    patch.setattr(mutant.module, mutant.function, wrong)
    for module in MODULES:
        for name in [name for name, value in vars(module).items() if value is right]:
            patch.setattr(module, name, wrong)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_wrong_program_fails(mutant: Mutant, monkeypatch: pytest.MonkeyPatch):
    install(mutant, monkeypatch)
    with pytest.raises((AssertionError, ValueError, IndexError)):
        CHECKS[mutant.check]()


def test_every_check_has_a_mutant_and_every_name_is_used_once():
    assert {mutant.check for mutant in MUTANTS} == set(CHECKS)
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
