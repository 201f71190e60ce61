"""Training: one update after the other, and checkpoints from which a run goes on as if it had never stopped.

    for step in 1..steps:
        ids       = the rows drawn for this step
        loss, g   = mean over micro-batches of loss_and_gradient(model, ids)          backward.py
        g         = g scaled to length 1 if it is longer
        w         = AdamW(w, g, learning rate of this step)                           optimizer.py

Everything that a step computes follows from the settings, the data and the state before it. The order of every sum is
fixed by the settings too, not by how many threads share the work.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

from neox.reference.backward import cross_entropy, loss_and_gradient
from neox.reference.checkpoint.load import load
from neox.reference.checkpoint.safetensors_file import read_header
from neox.reference.checkpoint.save import json_bytes, model_files, tensor_bytes, write_folder
from neox.reference.checkpoint.tensors import build_params, named_tensors, tensor_table
from neox.reference.config import read_json
from neox.reference.cores import cores, one_blas_thread
from neox.reference.corpus import Packed, batch_rows
from neox.reference.errors import InputError
from neox.reference.model import Array, Model, forward
from neox.reference.optimizer import AdamW, Moments, Tensors, clip, learning_rate, no_moments, update

OPTIMIZER = "optimizer.safetensors"
TRAINING = "training.json"


@dataclass(frozen=True)
class Settings:
    """Everything that a run is determined by, apart from the model's config and the data."""

    steps: int
    batch: int = 16  # rows of an update
    micro_batch: int = 2  # rows of one gradient; the rows of an update are a multiple
    length: int = 256  # positions of a row
    learning_rate: float = 1e-3  # its peak
    warmup: float = 0.01  # part of the steps
    final_rate: float = 0.1  # of the peak
    clip: float = 1.0
    adam: AdamW = field(default_factory=AdamW)
    seed: int = 0
    save_every: int = 1000

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name not in ("adam", "seed", "warmup") and not value > 0:
                raise InputError(f"{option.name} must be positive, not {value!r}")
        least = {"seed": self.seed, "warmup": self.warmup, "weight_decay": self.adam.weight_decay}
        for name, value in least.items():
            if not 0 <= value < math.inf:
                raise InputError(f"{name} must be zero or more, not {value!r}")
        if self.batch % self.micro_batch:
            raise InputError(f"a batch of {self.batch} rows cannot be cut into micro-batches of {self.micro_batch}")

    def rate(self, step: int) -> float:
        """The learning rate of an update, counted from 1."""
        return learning_rate(step, self.steps, self.learning_rate, self.warmup, self.final_rate)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is kept after so many updates: as of Pythia, powers of two at first, then every N."""
        early = step < self.save_every and step & (step - 1) == 0
        return early or step % self.save_every == 0 or step == self.steps


@dataclass(frozen=True)
class State:
    """A run between two updates. The arrays are changed in place by the next one."""

    step: int  # updates made
    model: Model
    moments: Moments


@dataclass(frozen=True)
class Progress:
    step: int
    loss: float  # mean over the positions of the update, before it
    norm: float  # of the gradient, before clipping
    rate: float


# One update.


def _sum_into(total: Tensors, part: Tensors) -> None:
    for name, gradient in total.items():
        gradient += part[name]


def gradient_of(model: Model, ids: Array, micro_batch: int) -> tuple[float, dict[str, Array]]:
    """Mean loss and gradient over all rows (B,T+1), a micro-batch at a time on each core, added up in their order."""
    parts = [ids[start : start + micro_batch] for start in range(0, len(ids), micro_batch)]
    workers = min(cores(), len(parts))
    loss, total = 0.0, None
    with one_blas_thread(), ThreadPoolExecutor(workers) as pool:
        for part_loss, params in pool.map(lambda part: loss_and_gradient(model, part), parts):
            loss += part_loss
            gradients = named_tensors(model.config, params)
            if total is None:
                total = gradients
            else:
                _sum_into(total, gradients)
    assert total is not None
    for gradient in total.values():
        gradient /= len(parts)
    return loss / len(parts), total


def advance(state: State, settings: Settings, ids: Array) -> tuple[State, Progress]:
    """One update on the rows ids (B,T+1). InputError, before anything is changed, if the loss is not finite."""
    step = state.step + 1
    loss, gradients = gradient_of(state.model, ids, settings.micro_batch)
    norm = clip(gradients, settings.clip)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise InputError(
            f"at step {step} the loss is {loss} and its gradient's length {norm}: train from the last "
            "checkpoint with a lower learning rate"
        )
    rate = settings.rate(step)
    parameters = named_tensors(state.model.config, state.model.params)
    update(settings.adam, parameters, gradients, state.moments, step, rate)
    return State(step, state.model, state.moments), Progress(step, loss, norm, rate)


def updates(state: State, settings: Settings, data: Packed) -> Iterator[tuple[State, Progress]]:
    """The rest of the run, a step at a time. InputError, at once, if the data does not fill one batch."""
    if data.rows < settings.batch:
        given = f"{len(data.ids)} tokens make {data.rows} rows of {data.length}"
        raise InputError(f"{given}, but a batch has {settings.batch}: give more text, or make it smaller")

    def remaining(state: State) -> Iterator[tuple[State, Progress]]:
        while state.step < settings.steps:
            rows = batch_rows(data.rows, settings.batch, state.step, settings.seed)
            state, progress = advance(state, settings, data[rows])
            yield state, progress

    return remaining(state)


def held_out_loss(model: Model, data: Packed, batch: int = 8) -> float:
    """The mean loss over all rows of text that is not trained on, in nats per token."""
    total = 0.0
    for start in range(0, data.rows, batch):
        ids = data[np.arange(start, min(start + batch, data.rows))]
        loss, _ = cross_entropy(forward(model, ids[:, :-1]), ids[:, 1:])
        total += loss * len(ids)
    return total / data.rows


# Checkpoints.


def own_copy(model: Model) -> Model:
    """The same model in float32 arrays that can be written to: those of a file cannot."""
    tensors = named_tensors(model.config, model.params)
    params = build_params(model.config, lambda spec: np.array(tensors[spec.name], np.float32))
    return Model(model.config, params)


def begin(model: Model) -> State:
    """Before the first update of a model, whose arrays the updates will change."""
    return State(0, model, no_moments(named_tensors(model.config, model.params)))


def save_step(folder: Path, state: State, settings: Settings, tokenizer: bytes, checksum: int) -> None:
    """Write step{N} into the folder: a model in Hugging Face's layout, and beside it what training goes on with.

    InputError if it cannot be written, as when the disk is full; the checkpoints before it are untouched.
    """
    moments = {f"{kind}.{name}": array for kind in "mv" for name, array in getattr(state.moments, kind).items()}
    training = {"data": checksum, "settings": asdict(settings)}
    files = {OPTIMIZER: tensor_bytes(moments), TRAINING: json_bytes(training)}
    write_folder(folder / f"step{state.step}", {**model_files(state.model, "float32", tokenizer), **files})


def saved_steps(folder: Path) -> list[int]:
    """The steps of which the folder holds a checkpoint, ascending."""
    names = [path.name.removeprefix("step") for path in folder.glob("step*")]
    return sorted(int(name) for name in names if name.isdigit())


def _read_training(path: Path) -> tuple[Settings, int]:
    """Settings and checksum. InputError if they are not what save_step wrote."""
    content = read_json(path)
    try:
        settings = content["settings"]
        return Settings(**{**settings, "adam": AdamW(**settings["adam"])}), int(content["data"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} does not say how the run was set: {error!r}") from error


def _read_moments(path: Path, model: Model) -> Moments:
    """InputError if they are not those of the model's tensors."""
    stored = read_header(path)
    table = tensor_table(model.config)
    expected = {f"{kind}.{name}": spec.shape for kind in "mv" for name, spec in table.items()}
    if {name: tensor.shape for name, tensor in stored.items()} != expected:
        raise InputError(f"{path} does not belong to the model beside it")
    m, v = ({name: np.array(stored[f"{kind}.{name}"].read()) for name in table} for kind in "mv")
    return Moments(m, v)


def restore(folder: Path) -> tuple[State, Settings, int]:
    """A run as it stood at its last checkpoint: its state, its settings, and the checksum of its data."""
    steps = saved_steps(folder)
    if not steps:
        raise InputError(f"{folder} holds no checkpoint to resume from")
    last = folder / f"step{steps[-1]}"
    settings, checksum = _read_training(last / TRAINING)
    model = own_copy(load(last, weights="stored"))
    return State(steps[-1], model, _read_moments(last / OPTIMIZER, model)), settings, checksum
