"""Every example runs from start to end on a tiny model, and leaves what its top says."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.fork_server import serve
from tests.support.tiny import tiny_model

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples"
EXAMPLES = sorted(path.name for path in FOLDER.glob("[0-9]*") if path.suffix != ".yaml")
# Example -> what it leaves in its folder, and words that it prints.
EXPECTED = {
    "01_csv_to_ollama.sh": (["run/adapters", "ollama/Modelfile"], "now: ollama create support"),
    "02_4bit_against_float.sh": (["four-bit", "float", "rounded"], "capitals"),
    "03_prune_recover_prove.sh": (["model", "report.json"], "capitals"),
    "04_two_teachers.sh": (["adapters", "run.json"], "done after 4 steps"),
    "05_custom_task.sh": (["samples_capitals.jsonl"], "The capital of France is"),
    "06_resume_after_a_crash.sh": (["killed/run.json"], "4 losses, all equal"),
    "07_python_api.ipynb": (["run/adapters", "before", "after"], "complete best step"),
    "08_qlora_to_peft_and_gguf.sh": (["peft/adapter_config.json", "gguf/Modelfile"], "gguf"),
    "09_stop_before_it_forgets.py": (["adapters", "run.json"], "bits a byte"),
    "10_compare_matrix.sh": (["report.html"], "all agree"),
    "11_chat_with_tools.sh": (["adapters", "run.json"], "<tool_call>"),
    "12_preferences.sh": (["run/adapters", "run/run.json"], "200 validation pairs"),
}
REAL = {"05_custom_task.sh", "06_resume_after_a_crash.sh"}  # start the program itself; one kills it


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A student and a teacher, with room for the longest chat."""
    folder = tmp_path_factory.mktemp("models")
    long: dict[str, Any] = {"max_position_embeddings": 2048, "intermediate_size": 256}
    return (
        tiny_model(folder / "student", **long),
        tiny_model(folder / "teacher", seed=1, **long),
    )


@pytest.fixture(scope="module")
def program() -> Iterator[Path]:
    """A folder whose ``mlx-slim`` starts in milliseconds."""
    with tempfile.TemporaryDirectory() as folder, serve(Path(folder)) as path:
        yield path


@pytest.fixture
def out(models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The output folder, with the environment that makes examples small."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MLX_SLIM_EXAMPLE_MODEL", str(models[0]))
    monkeypatch.setenv("MLX_SLIM_EXAMPLE_TEACHER", str(models[1]))
    monkeypatch.setenv("MLX_SLIM_EXAMPLE_STEPS", "4")
    monkeypatch.setenv("MLX_SLIM_EXAMPLE_OUT", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def shell(path: Path, program: Path | None) -> str:
    """Run a shell script with the ``mlx-slim`` in ``program``, or the real one; return the text."""
    first = f"{program}{os.pathsep}" if program else ""
    done = subprocess.run(
        ["bash", str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
        env={**os.environ, "PATH": f"{first}{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def notebook(path: Path) -> None:
    """Run the code cells of a notebook in order, in one namespace."""
    names: dict[str, object] = {"__name__": "__main__"}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "notebooks are committed without outputs"
            exec(compile("".join(cell["source"]), path.name, "exec"), names)


@pytest.mark.parametrize("name", EXAMPLES)
def test_runs_and_leaves_what_it_says(
    out: Path, name: str, capfd: pytest.CaptureFixture[str], program: Path
) -> None:
    path, printed = FOLDER / name, ""
    if path.suffix == ".sh":
        printed = shell(path, None if name in REAL else program)
    else:
        (notebook if path.suffix == ".ipynb" else _script)(path)
    seen = capfd.readouterr()
    files, words = EXPECTED[name]
    folder = out / name[:2]
    assert not [file for file in files if not (folder / file).exists()]
    assert words in printed + seen.out + seen.err


def _script(path: Path) -> None:
    runpy.run_path(str(path), run_name="__main__")


def test_all_are_listed_and_say_what_they_take() -> None:
    assert set(EXPECTED) == set(EXAMPLES) and len(EXAMPLES) >= 10
    listed = re.findall(r"^\| \[([\w.]+)\]\(\1\)", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert listed == EXAMPLES
    for name in EXAMPLES:
        top = (FOLDER / name).read_text(encoding="utf-8")[:1600]
        assert re.search(r"\bTakes\b.*memory", top, re.DOTALL) and "network" in top, name
        assert re.search(r"\b(Prints|Shows)\b", top), name
        if name.endswith(".sh"):
            assert "set -euo pipefail" in top and os.access(FOLDER / name, os.X_OK)
