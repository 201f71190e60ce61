"""README.md is true: its commands run, print what it shows, and its links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from mutants import MUTANTS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
pytestmark = pytest.mark.skipif(not README.is_file(), reason="there is no README.md beside tests/")
TEXT = README.read_text(encoding="utf-8") if README.is_file() else ""

# Run elsewhere, and why; a command that is in neither place fails a test below.
BY_CI = [
    'pip install -e . && python examples/generate.py --prompt "Once upon a time"',
    'pip install -e ".[test]" && pytest -n auto',
    "pytest -n auto -m wrong_kernels",
]
NEEDS_A_DOWNLOAD = [
    'python examples/generate.py --model pythia-160m --prompt "The capital of France is"',
    'python examples/generate.py --model pythia-160m --revision step1000 --prompt "The capital of France is"',
    'python examples/generate.py --model gpt-neox-20b --weights stored --prompt "The capital of France is"',
    "python examples/inspect_checkpoint.py pythia-160m",
    "python examples/convert.py pythia-160m pythia-160m-neox --to neox --ranks 2",
]
IN_ANOTHER_TEST = {
    "python examples/benchmark.py --backend reference": "test_benchmark.py",
    "python examples/benchmark.py --train": "test_benchmark.py",
    'python examples/generate.py --tensor-parallel 4 --prompt "Once upon a time"': "test_launch.py",
    'mpiexec -n 4 python examples/generate.py --tensor-parallel --prompt "Once upon a time"': "test_launch.py",
    'python examples/generate.py --tensor-parallel 2 --backend gpu --device host --prompt "Once upon a time"': (
        "test_launch.py"
    ),
    "python examples/benchmark_ranks.py --backend gpu --device host --dry-run": "test_benchmark_ranks.py",
    "python examples/random_checkpoint.py gpt-neox-20b drawn --layers 2 --to neox --ranks 2": "test_convert.py",
    "python examples/benchmark.py --backend gpu --device host --dry-run": "test_benchmark_gpu.py",
    "python examples/evaluate.py --tasks local_arithmetic --metadata form=short": "test_evaluate.py",
    "python examples/serve.py --port 8080": "test_serve.py",
    "python examples/train.py path/to/texts --out run --steps 2000": "test_train.py",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines()]
ELSEWHERE = [*BY_CI, *NEEDS_A_DOWNLOAD, *IN_ANOTHER_TEST]
SHOWN = dict(re.findall(r"^```sh\n([^\n]*)\n```\n```text\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL))


def run(command: str) -> subprocess.CompletedProcess[str]:
    python = command.replace("python ", f"{sys.executable} ", 1)
    return subprocess.run(python, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in ELSEWHERE])
def test_the_command_runs_and_prints_what_is_shown(command: str) -> None:
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert done.stdout == SHOWN.get(command, done.stdout)


def test_there_is_output_to_compare() -> None:
    assert len(SHOWN) >= 1


def test_every_command_that_does_not_run_here_is_in_the_readme() -> None:
    assert set(ELSEWHERE) <= set(COMMANDS)
    assert all((ROOT / "tests" / test).is_file() for test in IN_ANOTHER_TEST.values())


@pytest.mark.parametrize("command", NEEDS_A_DOWNLOAD)
def test_without_a_network_the_flags_are_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = run(command)
    if done.returncode == 0:
        pytest.skip("the model is in this machine's download cache")
    assert "HF_HUB_OFFLINE is set" in done.stderr


def test_the_first_of_the_two_commands_writes_once_it_is_installed() -> None:
    done = run(BY_CI[0].partition(" && ")[2])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once upon a time")
    assert len(done.stdout) > 100


def test_ci_runs_the_two_commands() -> None:
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    beginnings = re.findall(r"readme_command '([^']+)'", ci)
    found = [next(line for line in TEXT.splitlines() if re.match(beginning, line)) for beginning in beginnings]
    assert found == BY_CI


@pytest.mark.parametrize("snippet", blocks("python"))
def test_the_python_snippet_runs(snippet: str) -> None:
    done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_relative_links_lead_to_files() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if not link.startswith("http")]
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_the_tree_names_what_is_there_and_nothing_else() -> None:
    tree = next(block for block in blocks("text") if block.startswith("reference/"))
    folder, named = ROOT, set()
    for entry, indent, names in re.findall(r"^((  )?(\S+(?:, \S+)*))(?=  )", tree, re.MULTILINE):
        for name in names.split(", "):
            path = (folder if indent else ROOT) / name
            assert path.exists(), entry
            named.add(path)
        if not indent:
            folder = path
    rooms = {path for path in (ROOT / "reference").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert rooms - named <= {ROOT / "reference" / "__init__.py", ROOT / "reference" / "__pycache__"}
    examples = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert examples == set(re.findall(r"[a-z_]+\.py", tree.split("\nexamples/")[1].splitlines()[0]))


def test_the_mutants_are_counted() -> None:
    assert re.findall(r"\[(\d+) mutants\]", TEXT) == [str(len(MUTANTS))]


def test_the_memory_table_is_arithmetic() -> None:
    from neox.reference.config import GPT_NEOX_20B, PYTHIA, parameter_count

    rows = re.findall(
        r"^\| (pythia-\S+|gpt-neox-20b) \| ([\d,]+) \| ([\d.]+) GB \| ([\d.]+) GB \| ([\d.]+) GB \|$",
        TEXT,
        re.MULTILINE,
    )
    assert len(rows) >= 5
    for name, count, float32, float16, cache in rows:
        config = GPT_NEOX_20B if name == "gpt-neox-20b" else PYTHIA[name.removeprefix("pythia-")]
        assert int(count.replace(",", "")) == parameter_count(config)
        needed = 4 * 2 * config.num_hidden_layers * config.hidden_size * 2048
        for shown, size in (
            (float32, 4 * parameter_count(config)),
            (float16, 2 * parameter_count(config)),
            (cache, needed),
        ):
            digits = len(shown.partition(".")[2])
            assert shown == f"{size / 1e9:.{digits}f}", (name, shown, size)
