"""Files of torch.save are read as torch reads them, and nothing that such a file may hold can do harm."""

from __future__ import annotations

import importlib.util
import io
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import seeds

from neox.reference.checkpoint import torch_file
from neox.reference.checkpoint.torch_file import LEGACY, read_torch, torch_tensors
from neox.reference.checkpoint.torch_writer import write_torch
from neox.reference.errors import InputError

# What is right is read.


@given(st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=4), seeds)
def test_what_was_written_is_read(tmp_path_factory, shapes, seed) -> None:
    path = tmp_path_factory.mktemp("torch") / "x.pt"
    rng = np.random.default_rng(seed)
    dtypes = [np.float16, np.float32]
    tensors = {f"t{i}": rng.normal(size=shape).astype(dtypes[i % 2]) for i, shape in enumerate(shapes)}
    write_torch(path, tensors)
    read = torch_tensors(path)
    assert list(read) == list(tensors)
    for name, array in tensors.items():
        assert (read[name].read().dtype, read[name].shape) == (array.dtype, array.shape)
        assert np.array_equal(read[name].read(), array)
        assert not (array.size and read[name].read().flags.writeable)


@pytest.mark.oracle
def test_what_torch_saves_is_read(tmp_path: Path) -> None:
    import ml_dtypes  # noqa: F401 - teaches NumPy bfloat16
    import torch

    torch.manual_seed(0)
    base = torch.randn(6, 8)
    state = torch.nn.Linear(3, 5).state_dict()  # an OrderedDict with versions beside its items
    tensors = {
        "plain": base,
        "transposed": base.T,
        "part": base[2:5, 1::3],
        "shared": base.reshape(-1)[7:],
        "half": base.half(),
        "bfloat": base.bfloat16(),
        "double": base.double(),
        "mask": torch.ones(4, 4, dtype=torch.bool).tril(),
        "count": torch.tensor(3),
        "parameter": torch.nn.Parameter(base.clone()),
        "empty": torch.empty(0, 3),
        "nested": {"state": state, "list": [1, (2.5, None, True, "x"), 2**40, -7]},
    }
    for protocol in (2, 4):
        torch.save(tensors, tmp_path / "x.pt", pickle_protocol=protocol)
        read = read_torch(tmp_path / "x.pt").content
        for name, tensor in tensors.items():
            if isinstance(tensor, torch.Tensor):
                expected = tensor.detach()
                ours = read[name].astype(np.float64)
                assert np.array_equal(ours, expected.double().numpy()), name
        assert read["nested"]["list"] == [1, (2.5, None, True, "x"), 2**40, -7]
        assert list(read["nested"]["state"]) == ["weight", "bias"]
        assert np.shares_memory(read["plain"], read["transposed"])


# What is wrong is refused, in one line.


def archive_of(path: Path, content: bytes, data: bytes = b"", compression: int = zipfile.ZIP_STORED) -> Path:
    """A file of torch around any pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/data/0", data)
        archive.writestr("archive/version", "3\n")
    return path


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_torch(path)
    message = str(caught.value)
    assert message.isprintable()
    assert str(path) in message
    assert len(message) < 400
    assert not Path("owned").exists()
    return message


class Call:
    def __init__(self, *parts) -> None:
        self.parts = parts

    def __reduce__(self):
        return self.parts


def tensor_call(shape: tuple, stride: tuple, offset: int = 0, storage: str = "FloatStorage") -> bytes:
    """The pickle of {"x": tensor}, its storage data/0."""
    place = b"(X\x07\x00\x00\x00storagectorch\n" + storage.encode() + b"\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
    rest = pickle.dumps((offset, shape, stride), 2)[2:-1]
    # (storage, offset, shape, stride): the three of `rest` are taken apart by hand.
    numbers = b"".join(pickle.dumps(value, 2)[2:-1] for value in (offset, shape, stride))
    assert rest
    return b"\x80\x02}X\x01\x00\x00\x00xctorch._utils\n_rebuild_tensor_v2\n(" + place + numbers + b"tRs."


# What a hostile file may hold, and what is said of it. Each is (pickle, content of data/0, phrase).
DOUBLED = b")" + b"q\x00h\x00\x86" * 64  # a pair of the last pair twice, and again: printed or hashed, it does not end
TENSOR = b"\x80\x02}X\x01\x00\x00\x00xctorch._utils\n_rebuild_tensor_v2\n("
HOSTILE = {
    "a command": (pickle.dumps({"x": Call(os.system, ("touch owned",))}, 2), b"", "posix.system"),
    "a program": (pickle.dumps({"x": Call(eval, ("1",))}, 2), b"", "eval"),
    "bytes": (pickle.dumps({"x": bytearray(3)}, 2), b"", "_codecs.encode"),
    "a mapping from elsewhere": (pickle.dumps(Call(OrderedDict, ([("a", 1)],)), 2), b"", "made of something else"),
    "a sparse tensor": (b"\x80\x02ctorch._utils\n_rebuild_sparse_tensor\n)R.", b"", "_rebuild_sparse_tensor"),
    "an object": (b"\x80\x02cposixpath\njoin\n)\x81.", b"", "posixpath.join"),
    "an instance": (b"\x80\x02(cposix\nsystem\nX\x01\x00\x00\x00xo.", b"", "the pickle instruction OBJ"),
    "a tensor of objects": (tensor_call((1,), (1,), storage="object"), bytes(8), "torch.object"),
    "a tensor of NumPy's objects": (pickle.dumps({"x": np.array([None])}, 2), b"", "is refused: "),
    "complex numbers": (tensor_call((1,), (1,), storage="ComplexFloatStorage"), bytes(8), "ComplexFloatStorage"),
    "a number seen without end": (tensor_call((1 << 40,), (0,)), bytes(16), "does not fit its storage"),
    "more than is stored": (tensor_call((5,), (1,)), bytes(16), "does not fit its storage"),
    "before what is stored": (tensor_call((2,), (-1,), 1), bytes(16), "shape or strides"),
    "a shape without end": (TENSOR + b"K\x01K\x00" + DOUBLED + DOUBLED + b"tRs.", b"", "shape or strides"),
    "a type without end": (b"\x80\x02(K\x01" + DOUBLED + b"K\x01K\x01K\x01tQ.", b"", "not a storage"),
    "a key without end": (b"\x80\x02}" + DOUBLED + b"K\x01s.", b"", "tuple for a key"),
    "a key of many digits": (b"\x80\x02}\x8a\x09" + b"\x01" * 9 + b"K\x01s.", b"", "int for a key"),
    "a storage elsewhere": (
        tensor_call((1,), (1,)).replace(b"X\x01\x00\x00\x000X", b"X\x0c\x00\x00\x00../../passwdX"),
        bytes(16),
        "data/../../passwd is missing",
    ),
    "a storage of a long name": (
        tensor_call((1,), (1,)).replace(b"X\x01\x00\x00\x000X", b"X\xff\x00\x00\x00" + b"\n" * 255 + b"X"),
        bytes(16),
        "is missing",
    ),
    "instructions without end": (b"\x80\x02" + b"}" * (1 << 20) + b".", b"", "more than 1048576 instructions"),
}


@pytest.mark.parametrize(("content", "data", "phrase"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_are_refused_by_name(tmp_path: Path, content: bytes, data: bytes, phrase: str) -> None:
    assert phrase in refusal(archive_of(tmp_path / "x.pt", content, data))


def test_numbers_in_another_order_of_bytes_are_refused(tmp_path: Path) -> None:
    path = archive_of(tmp_path / "x.pt", pickle.dumps({}, 2))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/byteorder", "big")
    assert "first byte last" in refusal(path)


def test_what_is_left_out_is_never_made(tmp_path: Path) -> None:
    """A name that the caller does not want gets a placeholder, which is no tensor."""
    path = archive_of(tmp_path / "x.pt", pickle.dumps({"x": Call(os.system, ("touch owned",)), "y": 3}, 2))
    content = read_torch(path, frozenset({"posix.system"})).content
    assert (type(content["x"]).__name__, content["y"]) == ("Placeholder", 3)
    assert torch_tensors(path, frozenset({"posix.system"})) == {}


# What the reader does wrong with a check less, and which of these files finds it.

MISTAKES = [
    ("a number seen without end", "prod(shape) > stored or ", ""),
    ("more than is stored", "prod(shape) > stored or (prod(shape) and last >= stored)", "False"),
    ("before what is stored", "0 <= value < 1 << 48", "value < 1 << 48"),
    ("a command", "raise Refused(shown(str(function)))", "self.push(Placeholder())"),
    ("a command", "if str(function) in self.left_out:", "if str(function) not in CALLS:"),
    ("an instance", 'raise Refused(f"the pickle instruction {opcode.name}")', 'return "NONE", None'),
    ("a tensor of objects", "kind.name not in STORAGES", "False"),
    ("a storage elsewhere", "self._entries.get(self.root + name)", 'self._entries.get(self.root + "data/0")'),
    ("a storage of a long name", "len(name) <= 80", "True"),
    ("instructions without end", "range(INSTRUCTIONS_READ)", "range(1 << 60)"),
    ("a key of many digits", "or _is_size(key)", "or isinstance(key, int)"),
    ("a mapping from elsewhere", 'raise Refused("a mapping made of something else")', "return {}"),
]


@pytest.mark.parametrize(("name", "right", "wrong"), MISTAKES, ids=[f"{name}: {wrong}" for name, _, wrong in MISTAKES])
def test_mistakes_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, right: str, wrong: str
) -> None:
    content, data, phrase = HOSTILE[name]
    path = archive_of(tmp_path / "x.pt", content, data)
    monkeypatch.setattr(sys.modules[__name__], "read_torch", with_mistake(right, wrong).read_torch)
    with pytest.raises((AssertionError, pytest.fail.Exception, LookupError)):
        assert phrase in refusal(path)


def with_mistake(right: str, wrong: str) -> ModuleType:
    text = Path(torch_file.__file__).read_text(encoding="utf-8")
    assert text.count(right) == 1, right
    spec = importlib.util.spec_from_loader("mistaken_torch_file", loader=None)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for their annotations
    exec(compile(text.replace(right, wrong), torch_file.__file__, "exec"), module.__dict__)
    return module


@pytest.mark.parametrize(
    ("shape", "stride", "offset"),
    [
        ((5,), (1,), 0),  # more than there is
        ((2,), (4,), 0),
        ((4,), (1,), 1),
        ((1 << 40,), (0,), 0),  # a number seen so often that reading it would not end
        ((1 << 24, 1 << 24, 1 << 24), (0, 0, 0), 0),
        ((2,), (-1,), 1),  # before what there is
        ((1,), (1,), -1),
        ((2, 2), (1,), 0),
        ((2.0,), (1,), 0),
        ((True,), (1,), 0),
        ((1,) * 40, (1,) * 40, 0),
    ],
)
def test_a_tensor_reaches_nowhere_else(tmp_path: Path, shape: tuple, stride: tuple, offset: int) -> None:
    assert "refused" in refusal(archive_of(tmp_path / "x.pt", tensor_call(shape, stride, offset), bytes(16)))


def test_a_tensor_that_fits_is_taken(tmp_path: Path) -> None:
    data = np.arange(4, dtype=np.float32).tobytes()
    read = read_torch(archive_of(tmp_path / "x.pt", tensor_call((2, 2), (1, 2)), data)).content
    assert read["x"].tolist() == [[0, 2], [1, 3]]


def test_no_memory_is_reserved_on_the_files_word(tmp_path: Path) -> None:
    """Python's own machine makes room for every index up to the one that is named: 32 GB here."""
    program = """
import resource, sys
from pathlib import Path
from neox.reference.checkpoint.torch_file import read_torch
from neox.reference.errors import InputError
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
for path in sys.argv[1:]:
    try:
        read_torch(Path(path))
    except InputError:
        pass
"""
    hungry = {
        "memo": b"\x80\x02}r\xff\xff\xff\x7f.",
        "text": b"\x80\x02X\xff\xff\xff\x7fabc.",
        "long": b"\x80\x02\x8b\xff\xff\xff\x7fabc.",
        "frame": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f}.",
        "mappings": b"\x80\x02" + b"}" * (48 << 20) + b".",  # 3.4 GB in Python
    }
    paths = [str(archive_of(tmp_path / name, content)) for name, content in hungry.items()]
    done = subprocess.run([sys.executable, "-c", program, *paths], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_compressed_entries_are_refused(tmp_path: Path) -> None:
    path = archive_of(tmp_path / "x.pt", pickle.dumps({}, 2), compression=zipfile.ZIP_DEFLATED)
    assert "compressed" in refusal(path)


def test_what_is_no_archive_says_what_to_do(tmp_path: Path) -> None:
    for content, phrase in [
        (LEGACY + b"rest", "saved by torch before 1.6"),
        (b"x" * 257 + b"ustar", "saved by torch before 1.6"),
        (b"", "not a whole file"),
        (b"something else", "not a whole file"),
    ]:
        (tmp_path / "x.pt").write_bytes(content)
        assert phrase in refusal(tmp_path / "x.pt")
    assert "cannot read" in refusal(tmp_path / "absent.pt")


def whole_file() -> bytes:
    rng = np.random.default_rng(0)
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"neox-{os.getpid()}.pt"
    write_torch(path, {"a.weight": rng.normal(size=(3, 5)).astype(np.float16), "b": np.ones(7, np.float32)})
    content = path.read_bytes()
    path.unlink()
    return content


WHOLE = whole_file()


def read_or_refused(path: Path, content: bytes) -> None:
    """No other error, and no tensor larger than the file."""
    path.write_bytes(content)
    try:
        read = read_torch(path).content
    except InputError:
        return
    if isinstance(read, dict):
        for value in read.values():
            if isinstance(value, np.ndarray):
                assert value.nbytes <= len(content)
                value.tobytes()


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    for length in range(0, len(WHOLE), 7):
        (tmp_path / "x.pt").write_bytes(WHOLE[:length])
        assert "not a whole file of torch" in refusal(tmp_path / "x.pt")


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=6), st.data())
def test_damaged_files_are_read_or_refused(tmp_path_factory, changes, data) -> None:
    content = bytearray(WHOLE)
    for place, byte in changes:
        content[place] = byte
    if data.draw(st.booleans()):
        start = data.draw(st.integers(0, len(content)))
        content[start:start] = data.draw(st.binary(max_size=20))
    read_or_refused(tmp_path_factory.mktemp("damaged") / "x.pt", bytes(content))


@settings(max_examples=300)
@given(st.lists(st.sampled_from([bytes([code]) for code in range(256)]) | st.binary(max_size=4), max_size=30))
def test_any_pickle_is_read_or_refused(tmp_path_factory, parts) -> None:
    path = tmp_path_factory.mktemp("pickle") / "x.pt"
    archive_of(path, b"\x80\x02}" + b"".join(parts) + b".", bytes(16))
    read_or_refused(path, path.read_bytes())


def test_an_archive_in_memory_is_the_same(tmp_path: Path) -> None:
    """The helper above makes what torch's own layout is: one folder, whatever its name."""
    buffer = io.BytesIO(WHOLE)
    with zipfile.ZipFile(buffer) as archive:
        assert {name.split("/")[0] for name in archive.namelist()} == {"archive"}
