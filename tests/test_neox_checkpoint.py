"""gpt-neox's own layout: every form and number of ranks gives the same model, and norms that drifted apart are merged
by the way that was asked for."""

from __future__ import annotations

import importlib.util
import io
import json
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from closeness import assert_close, relative_error
from numpy.typing import NDArray
from program import in_process
from strategies import random_model

from neox.reference import shipped
from neox.reference.checkpoint import neox
from neox.reference.checkpoint.layouts import Source, neox_files
from neox.reference.checkpoint.load import load
from neox.reference.checkpoint.opening import open_checkpoint
from neox.reference.checkpoint.output import write_output
from neox.reference.checkpoint.tensors import (
    AXES,
    build_params,
    layer_prefix,
    named_tensors,
    pipeline,
    tensor_table,
)
from neox.reference.checkpoint.torch_file import torch_tensors
from neox.reference.checkpoint.torch_writer import _state, write_torch
from neox.reference.config import Config
from neox.reference.errors import InputError
from neox.reference.model import (
    Model,
    attention,
    causal_attend,
    forward,
    layer_norm,
    mlp,
    rotary_tables,
)

# Divisible by 4 ranks; no two sizes alike. D = 24, R = 6.
SMALL = Config(104, 96, 2, 4, 136, rotary_pct=0.25, max_position_embeddings=64)
DRIFT = 0.05  # of each norm, from rank to rank: far more than in any trained model, so that it shows


def numbers_of(config: Config = SMALL, seed: int = 0, dtype: str = "float16") -> dict[str, NDArray]:
    model = random_model(config, seed)
    return {name: array.astype(dtype) for name, array in named_tensors(config, model.params).items()}


def written(folder: Path, config: Config, tensors: dict[str, NDArray], ranks: int, step: int = 7) -> Path:
    source = Source("drawn", config, lambda spec: tensors[spec.name].dtype, lambda spec: tensors[spec.name])
    write_output(folder, neox_files(source, ranks, step), {})
    return folder


def read(folder: Path, **how) -> dict[str, NDArray]:
    return {name: tensor.read() for name, tensor in open_checkpoint(folder, **how).tensors.items()}


def assert_same(found: dict[str, NDArray], expected: dict[str, NDArray]) -> None:
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array), name


# All forms are the same model.

CONFIGS = {
    "20B's": SMALL,
    "tied": replace(SMALL, tie_word_embeddings=True),
    "no attention bias": replace(SMALL, attention_bias=False),
    "sequential residual, erf": replace(SMALL, use_parallel_residual=False, hidden_act="gelu"),
}


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_layer_files_of_any_number_of_ranks_are_the_model(tmp_path: Path, config: Config, ranks: int) -> None:
    tensors = numbers_of(config)
    folder = written(tmp_path / "neox", config, tensors, ranks)
    assert len(list((folder / "global_step7").iterdir())) == ranks * (
        config.num_hidden_layers + 3 - config.tie_word_embeddings
    )
    assert_same(read(folder), tensors)
    assert open_checkpoint(folder).config == config
    assert_same(read(folder / "global_step7"), tensors)  # the config lies above it
    ids = [[1, 2, 3]]
    assert np.array_equal(
        forward(load(folder), ids), forward(Model(config, params_of(config, tensors), np.dtype("float32")), ids)
    )


def params_of(config: Config, tensors: dict[str, NDArray]):
    return build_params(config, lambda spec: tensors[spec.name].astype(np.float32))


def save_nested(path: Path, tensors: dict[str, NDArray]) -> None:
    """{"module": tensors, "iteration": 7} as torch.save writes it."""
    write_torch(path, tensors)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    state = _state(tensors)[2:-1]
    outer = pickle.dumps({"iteration": 7}, 2)[:-1]
    module = b"X\x06\x00\x00\x00module" + state + pickle.SETITEM + pickle.STOP
    entries["archive/data.pkl"] = outer + module
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def as_sequential(folder: Path, ranks: int) -> None:
    """Layer files replaced by one file for each rank."""
    step = folder / "global_step7"
    for rank in range(ranks):
        held: dict[str, NDArray] = {}
        for path in sorted(step.glob(f"layer_*-model_{rank:02}-model_states.pt")):
            layer = int(path.name[6:8])
            held |= {f"sequential.{layer}.{name}": t.read().copy() for name, t in torch_tensors(path).items()}
            path.unlink()
        save_nested(step / f"mp_rank_{rank:02}_model_states.pt", held)


@pytest.mark.parametrize("ranks", [1, 2])
def test_sequential_files_are_the_model(tmp_path: Path, ranks: int) -> None:
    tensors = numbers_of()
    folder = written(tmp_path / "neox", SMALL, tensors, ranks)
    as_sequential(folder, ranks)
    assert "sequential" in open_checkpoint(folder).layout
    assert_same(read(folder), tensors)


def renamed(folder: Path, names: dict[str, str]) -> None:
    for path in folder.glob("global_step7/*.pt"):
        tensors = {names.get(name, name): t.read().copy() for name, t in torch_tensors(path).items()}
        write_torch(path, tensors)


FAMILIES = {
    "linear1": {new: old for new, old in neox.RENAMED.items() if "linear" in new},
    "TransformerEngine": {new: old for new, old in neox.RENAMED.items() if "linear" not in new},
}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_newer_names_are_understood(tmp_path: Path, family: dict[str, str]) -> None:
    tensors = numbers_of()
    folder = written(tmp_path / "neox", SMALL, tensors, 2)
    renamed(folder, {old: new for new, old in family.items()})
    assert_same(read(folder), tensors)


def test_training_state_beside_layer_files_is_never_opened(tmp_path: Path) -> None:
    folder = written(tmp_path / "neox", SMALL, numbers_of(), 2)
    (folder / "global_step7" / "mp_rank_00_model_states.pt").write_bytes(b"not even a file of torch")
    assert_same(read(folder), numbers_of())


def with_frequencies(folder: Path) -> None:
    for path in folder.glob("global_step7/layer_0[23]-*.pt"):
        tensors = {name: t.read().copy() for name, t in torch_tensors(path).items()}
        write_torch(path, {**tensors, neox.FREQUENCIES: np.ones(SMALL.rotary_ndims // 2, np.float16)})


@pytest.mark.parametrize("config", [SMALL, CONFIGS["tied"], CONFIGS["no attention bias"]])
def test_without_a_yaml_the_config_is_in_the_shapes(tmp_path: Path, config: Config) -> None:
    folder = written(tmp_path / "neox", config, numbers_of(config), 2)
    shutil.rmtree(folder / "configs")
    with pytest.raises(InputError, match="--set num_attention_heads"):
        open_checkpoint(folder)
    found = open_checkpoint(folder, {"num_attention_heads": 4}).config
    assert replace(found, max_position_embeddings=64) == config
    with_frequencies(folder)
    assert open_checkpoint(folder).config == found


def test_the_yaml_may_be_spelled_with_hyphens_and_comments_in_several_files(tmp_path: Path) -> None:
    folder = written(tmp_path / "neox", SMALL, numbers_of(), 2)
    settings = json.loads((folder / "configs" / "model.yml").read_text())
    sizes = {name: settings.pop(name) for name in ("num_layers", "hidden_size")}
    text = "# a comment\n{\n" + "".join(
        f'  "{k.replace("_", "-")}": {json.dumps(v)},  # {k}\n' for k, v in settings.items()
    )
    (folder / "configs" / "model.yml").write_text(text + "}\n")
    (folder / "configs" / "sizes.yml").write_text("".join(f"{k}: {v}\n" for k, v in sizes.items()))
    assert open_checkpoint(folder).config == SMALL


# Norms that drifted apart.


def drifted(folder: Path, config: Config = SMALL, seed: int = 3) -> list[dict[str, NDArray]]:
    """Each rank's norms moved by themselves; all that each rank then holds, under the names of the table."""
    rng, held = np.random.default_rng(seed), []
    for rank in range(2):
        mine: dict[str, NDArray] = {}
        for path in sorted(folder.glob(f"global_step7/layer_*-model_{rank:02}-*.pt")):
            tensors = {name: t.read().copy() for name, t in torch_tensors(path).items()}
            for name, array in tensors.items():
                if "norm" in name:
                    array += (DRIFT * rng.normal(size=array.shape)).astype(array.dtype)
            write_torch(path, tensors)
            names = pipeline(config)[int(path.name[6:8])]
            mine |= {names[name]: array.astype(np.float64) for name, array in tensors.items() if name in names}
        held.append(mine)
    return held


def unmerged(held: list[dict[str, NDArray]], config: Config, ids: list[list[int]]) -> NDArray:
    """Logits as the ranks of the training compute them, each with its own norms: float64."""

    def shaped(mine: dict[str, NDArray]):
        return build_params(config, lambda spec: mine[spec.name] if spec.name in mine else np.empty(0))

    ranks = [shaped(mine) for mine in held]
    x = np.concatenate([rank.embed_in for rank in ranks])[np.array(ids)]
    rotary = rotary_tables(config, np.arange(len(ids[0]))[None])
    eps = config.layer_norm_eps
    for i in range(config.num_hidden_layers):
        branches = 0
        for rank in ranks:
            p = rank.layers[i]
            a = attention(p.attention, config.head_dim, layer_norm(x, p.input_layernorm, eps), rotary, causal_attend)
            m = mlp(p.mlp, config.hidden_act, layer_norm(x, p.post_attention_layernorm, eps))
            branches = branches + a + m  # the biases of rows too: each rank has its part
        x = branches + x
    logits = [layer_norm(x, rank.final_layer_norm, eps) @ rank.embed_out.T for rank in ranks]
    return np.concatenate(logits, axis=-1)


IDS = [[5, 17, 3, 99, 60, 2, 8]]


@pytest.fixture
def apart(tmp_path: Path) -> tuple[Path, list[dict[str, NDArray]]]:
    folder = written(tmp_path / "neox", SMALL, numbers_of(), 2)
    return folder, drifted(folder)


def test_the_mean_is_the_mean(apart) -> None:
    folder, held = apart
    name = f"{layer_prefix(0)}.input_layernorm.weight"
    mean = ((held[0][name] + held[1][name]) / 2).astype(np.float16)
    assert np.array_equal(read(folder)[name], mean)


@pytest.mark.parametrize("name", ["tied", "no attention bias"])
def test_folding_is_exact_in_other_models(tmp_path: Path, name: str) -> None:
    config = CONFIGS[name]
    folder = written(tmp_path / "neox", config, numbers_of(config), 2)
    exact = unmerged(drifted(folder, config), config, IDS)
    assert_close(forward(load(folder, dtype="float64", layer_norms="fold"), IDS), exact, rtol=2e-7)


def test_norms_are_kept_apart_for_as_many_ranks(apart) -> None:
    folder, held = apart
    for rank in range(2):
        tensors = read(folder, layer_norms="per_rank", rank=rank, ranks=2)
        for name, spec in tensor_table(SMALL).items():
            if spec.sharding == "replicated":
                assert np.array_equal(tensors[name], held[rank][name].astype(np.float16))
            elif spec.sharding in AXES:
                assert tensors[name].shape == spec.shape
    for ranks in (1, 4):
        with pytest.raises(InputError, match=f"trained on 2 ranks: their norms cannot be kept apart on {ranks}"):
            open_checkpoint(folder, layer_norms="per_rank", ranks=ranks)


@pytest.mark.parametrize("norms", ["mean", "fold"])
def test_a_part_is_that_part_of_the_whole(apart, norms: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = apart
    monkeypatch.setattr(neox, "ROWS", 7)
    for tensor in open_checkpoint(folder, layer_norms=norms).tensors.values():
        whole = tensor.read()
        for cut in (slice(0, 1), slice(3, whole.shape[0] - 5), slice(0, whole.shape[0])):
            index = (cut, *(slice(1, length - 2) for length in whole.shape[1:]))
            assert np.array_equal(tensor.part(index), whole[index])


def test_a_part_that_one_rank_holds_is_not_copied_and_no_other_rank_is_read(apart) -> None:
    folder, _ = apart
    tensors = open_checkpoint(folder).tensors
    for name, spec in tensor_table(SMALL).items():
        if len(spec.shape) == 2:
            axis, half = AXES[spec.sharding], spec.shape[AXES[spec.sharding]] // 2
            index = [slice(0, length) for length in spec.shape]
            index[axis] = slice(half + 1, half + 3)
            merged = tensors[name]
            assert isinstance(merged, neox.Merged)
            for path in folder.glob("global_step7/*-model_00-*"):
                path.touch()  # from now on, reading it is an error
            assert np.shares_memory(merged.part(tuple(index)), merged.parts[1].read())


def test_what_the_merges_do_to_the_logits(apart) -> None:
    """The mean is off in proportion to the drift; folding is as exact as ranks that keep their norms."""
    folder, held = apart
    exact = unmerged(held, SMALL, IDS)
    mean, fold = (forward(load(folder, dtype="float64", layer_norms=how), IDS) for how in ("mean", "fold"))
    assert relative_error(mean, exact) > DRIFT / 5
    # Weights that were half are exact in float32; only biases are rounded to it.
    assert_close(fold, exact, rtol=2e-7)


# What the published mistakes would do.

MISTAKES = [
    ('total if self.sharding == "summed"', 'total / len(arrays) if self.sharding == "summed"'),
    ('total if self.sharding == "summed"', 'arrays[0] if self.sharding == "summed"'),
    ("found.append(part.part(", "found.insert(0, part.part("),
    ("total / len(arrays))", "arrays[0])"),
    ("folded = weight * gain", "folded = weight"),
    ("[weight @ shift + self.bias.part((rows,))", "[self.bias.part((rows,))"),
    ("self.bias.part((rows,)) for", "self.bias.part((slice(0, 1),)) for"),
    ("(weight @ (shift - gain) / gain.size)", "(weight @ shift / gain.size)"),
    ("result[name] = stored.parts[rank]", "result[name] = stored"),
    ("result[name] = stored.parts[rank]", "result[name] = stored.parts[0]"),
]


def with_mistake(right: str, wrong: str) -> ModuleType:
    path = Path(neox.__file__)
    text = path.read_text(encoding="utf-8")
    assert text.count(right) == 1, right
    spec = importlib.util.spec_from_loader("mistaken_neox", loader=None)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    exec(compile(text.replace(right, wrong), str(path), "exec"), module.__dict__)
    return module


def holds(module: ModuleType, folder: Path, held: list[dict[str, NDArray]], tensors: dict[str, NDArray]) -> bool:
    """Whether a module reads a checkpoint of two ranks in every way."""

    def opened(norms: str, rank: int = 0) -> dict[str, NDArray]:
        _, _, found = module.open_neox(folder, {}, norms, rank, 2)
        return {name: tensor.read().astype(np.float64) for name, tensor in found.items()}

    mean, fold = opened("mean"), opened("fold")
    norms = {name for name, spec in tensor_table(SMALL).items() if spec.sharding == "replicated"}
    whole = all(np.array_equal(mean[name], tensors[name].astype(np.float64)) for name in tensors if name not in norms)
    averages = all(np.array_equal(mean[n], ((held[0][n] + held[1][n]) / 2).astype(np.float16)) for n in norms)
    own = all(np.array_equal(opened("per_rank", 1)[name], held[1][name]) for name in norms)
    exact, found = unmerged(held, SMALL, IDS), logits(fold)
    return whole and averages and own and bool(np.abs(found - exact).max() < 1e-6 * np.abs(exact).max())


def logits(tensors: dict[str, NDArray]) -> NDArray:
    params = build_params(SMALL, lambda spec: tensors[spec.name])
    return forward(Model(SMALL, params, np.dtype("float64")), IDS)


def test_the_right_module_holds(apart) -> None:
    assert holds(neox, apart[0], apart[1], numbers_of())


@pytest.mark.parametrize(("right", "wrong"), MISTAKES, ids=[wrong for _, wrong in MISTAKES])
def test_mistakes_are_noticed(apart, right: str, wrong: str) -> None:
    assert not holds(with_mistake(right, wrong), apart[0], apart[1], numbers_of())


# Bad input.


def damaged(tmp_path: Path, damage: Callable[[Path], object]) -> str:
    folder = written(tmp_path / "neox", SMALL, numbers_of(), 2)
    damage(folder)
    with pytest.raises(InputError) as caught:
        read(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def of_another_model(folder: Path, **change) -> None:
    other = written(folder.with_name("other"), replace(SMALL, **change), numbers_of(replace(SMALL, **change), 1), 2)
    name = "global_step7/layer_02-model_01-model_states.pt"
    shutil.copy(other / name, folder / name)


def contradicting(folder: Path) -> None:
    path = folder / "configs" / "model.yml"
    path.write_text(path.read_text().replace('"hidden_size": 96', '"hidden_size": 192'))


def command() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00ls\x85R.")
    return buffer.getvalue()


COMMAND = command()
BAD = {
    "a layer's rank is missing": (
        lambda f: (f / "global_step7" / "layer_03-model_01-model_states.pt").unlink(),
        "lacks layer_03-model_01-model_states.pt",
    ),
    "a layer is missing": (
        lambda f: [path.unlink() for path in f.glob("global_step7/layer_02-*")],
        "missing: gpt_neox.layers.0",
    ),
    "latest points nowhere": (lambda f: (f / "latest").write_text("global_step9"), "names global_step9, which is not"),
    "latest points elsewhere": (lambda f: (f / "latest").write_text("../other"), "must name a folder such as"),
    "latest is empty": (lambda f: (f / "latest").write_bytes(b"\xff"), "must name a folder such as"),
    "a shard is of a wider model": (lambda f: of_another_model(f, intermediate_size=264), "is of another model"),
    "a shard is of another model": (lambda f: of_another_model(f, layer_norm_eps=1e-3), "is of another model"),
    "a file is a command": (
        lambda f: (f / "global_step7" / "layer_00-model_01-model_states.pt").write_bytes(COMMAND),
        "layer_00-model_01-model_states.pt is refused: posix.system",
    ),
    "a file cut short": (
        lambda f: (f / "global_step7" / "layer_00-model_01-model_states.pt").write_bytes(b"PK\x03\x04" + b"x" * 90),
        "is not a whole file of torch",
    ),
    "the yaml contradicts the shapes": (contradicting, "does not fit its config; misshapen"),
    "the yaml is no yaml": (lambda f: (f / "configs" / "model.yml").write_text("{a: ["), "is not valid yaml"),
    "the yaml is a list": (lambda f: (f / "configs" / "model.yml").write_text("- 1"), "must hold a mapping"),
    "two yamls disagree": (
        lambda f: (f / "configs" / "b.yml").write_text("hidden-size: 100"),
        "but another file of",
    ),
}


@pytest.mark.parametrize(("damage", "phrase"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line(tmp_path: Path, damage: Callable[[Path], object], phrase: str) -> None:
    assert phrase in damaged(tmp_path, damage)


@pytest.mark.parametrize(("damage", "phrase"), BAD.values(), ids=BAD)
def test_bad_input_ends_a_program_with_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object], phrase: str
) -> None:
    folder = written(tmp_path / "neox", SMALL, numbers_of(), 2)
    shutil.copy(shipped.path() / "tokenizer.json", folder)
    damage(folder)
    ended = in_process(["--model", str(folder), "--prompt", "a"], b"", capsys)
    assert (ended.status, ended.stdout) == (2, "")
    errors = [line for line in ended.stderr.splitlines() if not line.startswith("model: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert phrase in errors[0]


def test_a_shard_of_another_model_of_the_same_shape_is_noticed_by_its_norms(tmp_path: Path) -> None:
    tensors = numbers_of()
    name = f"{layer_prefix(0)}.input_layernorm.weight"
    other = {**tensors, name: -tensors[name]}
    folder = written(tmp_path / "neox", SMALL, tensors, 2)
    wrong = written(tmp_path / "other", SMALL, other, 2)
    shard = "global_step7/layer_02-model_01-model_states.pt"
    shutil.copy(wrong / shard, folder / shard)
    with pytest.raises(InputError, match=r"is of another model: .* is far from that of layer_02-model_00"):
        open_checkpoint(folder)


def test_a_shard_of_another_model_trained_from_other_numbers_is_noticed(tmp_path: Path) -> None:
    folder, wrong = (written(tmp_path / f"{seed}", SMALL, numbers_of(SMALL, seed), 2) for seed in (0, 1))
    shard = "global_step7/layer_03-model_01-model_states.pt"
    shutil.copy(wrong / shard, folder / shard)
    with pytest.raises(InputError, match=r"layer_03-model_01-model_states\.pt is of another model"):
        open_checkpoint(folder)


def test_other_settings_in_a_yaml_may_be_of_any_kind(tmp_path: Path) -> None:
    folder = written(tmp_path / "neox", SMALL, numbers_of(), 1)
    (folder / "configs" / "a.yml").write_text(
        "optimizer: {type: Adam, params: {betas: [0.9, 0.95]}}\nnested: [[[1]]]\n"
    )
    (folder / "configs" / "b.yml").write_text("data-path: text\nsteps: 150000\nnothing:\n3: 4\n")
    assert open_checkpoint(folder).config == SMALL


@pytest.mark.parametrize(
    "line",
    [
        "a: !!timestamp x",
        "a: !!int ''",
        "a: !!bool x",
        "a: !!float x",
        "a: !!python/object/apply:os.system [ls]",
        "a: !!set 3",
        "? [a]\n: 1",
        "a: 2001-99-99",
        "<<: 3",
        "a: " + "{a: " * 3000,
        "a: &a [*a]",
        "a0: &a0 [lol]\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(11)),
        "a0: &a0 {x: 1}\n" + "".join(f"a{i + 1}: &a{i + 1} {{<<: [*a{i}, *a{i}]}}\n" for i in range(60)),
        "- a\n" * (1 << 17),
        "a: \udc80",
    ],
)
def test_a_yaml_that_is_none_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "x.yml"
    path.write_text(line, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(InputError, match="is not valid yaml"):
        neox.read_yaml(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_layers", "1000000000"),  # whose table of tensors would not end
        ("num_layers", "2.0"),
        ("hidden_size", "0x" + "f" * 9000),
        ("hidden_size", "[96]"),
        ("rotary_pct", "1e999"),
        ("no_weight_tying", '"false"'),
        ("bias_gelu_fusion", "1"),
        ("norm", "rmsnorm"),
        ("pos_emb", "{rotary: 1}"),
    ],
)
def test_values_that_cannot_be_are_refused(tmp_path: Path, key: str, value: str) -> None:
    folder = written(tmp_path / "neox", SMALL, numbers_of(), 1)
    path = folder / "configs" / "model.yml"
    settings = json.loads(path.read_text())
    path.write_text("".join(f"{k}: {value if k == key else json.dumps(v)}\n" for k, v in settings.items()))
    with pytest.raises(InputError) as caught:
        open_checkpoint(folder)
    assert len(str(caught.value)) < 400
    path.write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in settings.items()))
    assert open_checkpoint(folder).config == SMALL


def test_names_in_files_do_not_break_the_line(tmp_path: Path) -> None:
    folder = written(tmp_path / "neox", SMALL, numbers_of(), 1)
    write_torch(folder / "global_step7" / "layer_00-model_00-model_states.pt", {"a\n\x1b[2Jb": np.ones(3, np.float16)})
    with pytest.raises(InputError, match="does not fit its config") as caught:
        open_checkpoint(folder)
    assert str(caught.value).isprintable()


def test_several_steps_without_latest_have_to_be_chosen_from(tmp_path: Path) -> None:
    folder = written(tmp_path / "neox", SMALL, numbers_of(), 1)
    shutil.copytree(folder / "global_step7", folder / "global_step9")
    (folder / "latest").unlink()
    with pytest.raises(InputError, match="holds global_step7, global_step9 and no latest: choose one by --revision"):
        open_checkpoint(folder)
    assert load(folder, revision="global_step9").config == SMALL
