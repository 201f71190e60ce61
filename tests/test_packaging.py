"""What is installed, what it imports, and the promises that pyproject.toml and CONTRIBUTING.md make about the files."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

import neox.reference
from neox.reference import shipped

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(neox.reference.__file__).resolve().parent
PACKAGES = ("reference", "gpu", "distributed")
CORE = {"numpy", "safetensors", "tokenizers", "tqdm", "yaml"}
LAZY = {
    "huggingface_hub",
    "ml_dtypes",
}  # only inside functions: the first comes with tokenizers, the second is an extra
SOURCES = sorted(PACKAGE.rglob("*.py"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

in_a_checkout = pytest.mark.skipif(not (ROOT / "reference").is_dir(), reason="the package's sources are not here")
beside_pyproject = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="no pyproject.toml beside tests/")
beside_examples = pytest.mark.skipif(not EXAMPLES, reason="examples/ is not beside tests/")


# Files and folders.


@cache
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def folders_with_python() -> Iterator[Path]:
    for name in PACKAGES:
        for file in sorted((ROOT / name).rglob("*.py")):
            yield file.parent.relative_to(ROOT)


@in_a_checkout
def test_every_folder_with_python_files_is_listed_as_a_package() -> None:
    """A new folder belongs under both packages and package-dir, or it is missing from what is installed."""
    expected = {f"neox.{'.'.join(folder.parts)}": folder.as_posix() for folder in folders_with_python()}
    tool = pyproject()["tool"]["setuptools"]
    assert tool["package-dir"] == expected
    assert sorted(tool["packages"]) == sorted(expected)


@in_a_checkout
def test_every_other_file_of_a_package_is_package_data() -> None:
    tool = pyproject()["tool"]["setuptools"]
    for package, folder in tool["package-dir"].items():
        files = [file for file in (ROOT / folder).iterdir() if file.is_file() and file.suffix not in (".py", ".pyc")]
        patterns = tool["package-data"].get(package, [])
        assert not [file for file in files if not any(fnmatch(file.name, pattern) for pattern in patterns)]


def test_what_is_no_python_was_installed_too() -> None:
    """In a wheel this is the package data; mypy reads types only where there is a py.typed."""
    assert (PACKAGE / "py.typed").is_file()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in shipped.path().iterdir()}


@beside_pyproject
def test_the_core_needs_five_packages() -> None:
    names = {re.split(r"[^\w-]", requirement)[0] for requirement in pyproject()["project"]["dependencies"]}
    names = {"yaml" if name == "pyyaml" else name for name in names}  # which comes with tokenizers in any case
    assert names == CORE


@in_a_checkout
def test_the_version_is_the_same_wherever_it_stands() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (\S+)$", citation, re.MULTILINE) == [pyproject()["project"]["version"]]


# Imports.


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return ["." * node.level + (node.module or "")]
    return []


def everywhere(path: Path) -> set[str]:
    return {name for node in ast.walk(parsed(path)) for name in imported(node)}


def outside_functions(path: Path) -> set[str]:
    """Names imported as soon as the module is."""
    waiting: list[ast.AST] = [parsed(path)]
    names: set[str] = set()
    while waiting:
        node = waiting.pop()
        names.update(imported(node))
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting.extend(ast.iter_child_nodes(node))
    return names


def foreign(names: set[str]) -> set[str]:
    """The packages of others among them."""
    return {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - {"neox"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_reference_imports_its_core_and_nothing_of_its_sisters(path: Path) -> None:
    assert foreign(outside_functions(path)) <= CORE
    assert foreign(everywhere(path)) <= CORE | LAZY
    ours = {name for name in everywhere(path) if name.startswith((".", "neox"))}
    assert not [name for name in ours if not name.startswith("neox.reference")]


def in_a_new_process(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", dedent(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_text_is_continued_where_only_the_core_is_installed() -> None:
    in_a_new_process(
        """
        import sys
        extras = ("torch transformers ml_dtypes matplotlib cupy mpi4py lm_eval starlette uvicorn pytest hypothesis "
                  "huggingface_hub scipy neox.gpu neox.distributed")
        sys.modules.update(dict.fromkeys(extras.split()))  # as Python does for a module that is not installed
        import neox.reference as ref
        from neox.reference import shipped
        model, tokenizer = ref.load(shipped.path()), ref.load_tokenizer(shipped.path())
        ids = list(ref.generate(model, tokenizer.encode("Once upon a time"), max_tokens=3))
        assert len(ids) == 3 and tokenizer.decode(ids)
        """
    )


def test_nothing_is_imported_under_two_names() -> None:
    in_a_new_process(
        """
        import importlib, pkgutil, sys
        from pathlib import Path
        import neox.reference
        for found in pkgutil.walk_packages(neox.reference.__path__, "neox.reference."):
            importlib.import_module(found.name)
        folder = Path(neox.reference.__file__).parent
        files = {name: Path(getattr(module, "__file__", None) or "") for name, module in sys.modules.items()}
        ours = {name: file for name, file in files.items() if folder in file.parents}
        assert len(ours) > 15 and len(set(ours.values())) == len(ours)
        assert all(name.startswith("neox.reference") for name in ours), sorted(ours)
        """
    )


def test_the_tests_see_the_package_under_one_name() -> None:
    files = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items())}
    ours = [name for name, file in files.items() if file and PACKAGE in Path(file).resolve().parents]
    assert ours
    assert not [name for name in ours if not name.startswith("neox.reference")]


# Size and words.


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(parsed(path)) if isinstance(node, ast.FunctionDef)]


def lines(function: ast.FunctionDef) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def test_the_model_is_one_file_of_300_lines() -> None:
    assert len((PACKAGE / "model.py").read_text(encoding="utf-8").splitlines()) <= 300


def test_functions_are_short() -> None:
    sizes = [lines(function) for path in SOURCES for function in functions(path)]
    assert statistics.median(sizes) < 15
    assert max(sizes) <= 40


@beside_examples
def test_functions_of_the_examples_are_no_longer_than_a_screen() -> None:
    assert max(lines(function) for path in EXAMPLES for function in functions(path)) <= 60


def public(path: Path) -> Iterator[ast.FunctionDef]:
    """Functions of the module and methods of its public classes, under names without an underscore."""
    for node in parsed(path).body:
        inside = node.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_") else []
        for child in (node, *inside):
            if isinstance(child, ast.FunctionDef) and not child.name.startswith("_"):
                yield child


def only_lists_fields(node: ast.ClassDef) -> bool:
    silent = [child for child in node.body if isinstance(child, ast.FunctionDef) and not ast.get_docstring(child)]
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    return any(d.startswith("dataclass") for d in decorators) and all(lines(method) <= 3 for method in silent)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_public_function_of_more_than_a_few_lines_says_what_it_does(path: Path) -> None:
    """Three lines with their shapes speak for themselves; a method of a protocol or its twin may be told there."""
    told = {"start", "step", "keep"} if path.name == "generate.py" else set()
    silent = [f.name for f in public(path) if not ast.get_docstring(f) and lines(f) > 3 and f.name not in told]
    assert not silent


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_public_class_says_what_it_is_unless_it_only_lists_fields(path: Path) -> None:
    """A dataclass whose fields carry their shapes, and whose methods speak for themselves, needs no words."""
    classes = [n for n in parsed(path).body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")]
    assert not [c.name for c in classes if not ast.get_docstring(c) and not only_lists_fields(c)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_begins_by_saying_what_it_is(path: Path) -> None:
    assert ast.get_docstring(parsed(path))


def written() -> list[Path]:
    """All that people wrote: sources, texts and settings."""
    folders = [ROOT / name for name in (*PACKAGES, "tests", "examples", ".ci")]
    files = [file for folder in folders for file in folder.rglob("*") if file.suffix in (".py", ".cu", ".cuh", "")]
    texts = [*ROOT.glob("*.md"), *ROOT.glob("*.toml"), *ROOT.glob("*.cff"), *ROOT.glob("*.in")]
    return [file for file in (*files, *texts) if file.is_file()]


@in_a_checkout
def test_no_file_names_a_place_on_one_machine_or_leaves_work_for_later() -> None:
    places = "|".join(("work", "home", "root", "Users", "opt", "mnt"))
    unwanted = re.compile(rf"""(?:^|[\s"'`(=:])/(?:{places})/|\b(?:TO{"DO"}|FIX{"ME"}|XX{"X"})\b|\u2014""")
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in written()
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if unwanted.search(line)
    ]
    assert not found
    assert len(written()) > 40
