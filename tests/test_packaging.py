"""The wheel: what is in it, and that it works away from the checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel with the backend that pyproject.toml names."""
    pytest.importorskip("hatchling", reason="hatchling builds the wheel: make setup installs it")
    folder = tmp_path_factory.mktemp("wheel")
    build = f"from hatchling.build import build_wheel; print(build_wheel({str(folder)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


def test_holds_the_package_the_recipes_and_the_evals(wheel: Any) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for kind in ("recipes", "evals"):
        ours = [path for path in (ROOT / kind).rglob("*") if path.is_file()]
        expected = {
            f"mlx_slim/{path.relative_to(ROOT)}" for path in ours if "__pycache__" not in str(path)
        }
        assert expected and expected <= names
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "mlx_slim").rglob("*.py")}
    assert modules <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith("tests/") or "__pycache__" in name]


def test_works_away_from_the_checkout(wheel: Any, tmp_path: Path) -> None:
    """Installed without dependencies, which the running interpreter lends."""
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    environment = {**os.environ, "PYTHONPATH": str(target)}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "mlx_slim", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = [sys.executable, "-c", "import mlx_slim; print(mlx_slim.__file__)"]
    origin = subprocess.check_output(where, cwd=tmp_path, env=environment, text=True)
    assert Path(origin.strip()).is_relative_to(target)
    assert "0.1.0" in run("--version")
    assert "smollm2-lora" in run("recipes")
    dry = run("train", "smollm2-lora", "train.steps=3", "--dry-run", "-o", str(tmp_path / "run"))
    assert "train.steps" in dry or "steps" in dry


def test_the_lock_covers_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for by_hand in ("parity", "bench"):  # PyTorch
        del extras[by_hand]
    groups = [project["dependencies"], *extras.values()]
    needed = {re.split(r"[\[<>=;~! ]", line)[0].lower() for group in groups for line in group}
    lines = (ROOT / "tests" / "requirements.lock").read_text().splitlines()
    locked = {line.split("==")[0].lower() for line in lines if not line.startswith("#")}
    assert needed <= locked
    assert "torch" not in locked
    assert not [line for line in lines if "://" in line or line.startswith("-")]
    beside = (ROOT / "tests" / "parity" / "requirements.lock").read_text().splitlines()
    pinned = {line.split("==")[0].lower() for line in beside if not line.startswith("#")}
    assert {"torch", "peft", "accelerate", "lm-eval", "xllamacpp"} <= pinned and not pinned & locked
    assert not [line for line in beside if "://" in line or line.startswith("-")]


def test_the_documents_show_what_the_planner_predicts() -> None:
    """All recipes in the guide, some of them in the README."""
    from mlx_slim.cli.plan import table

    def shown(name: str) -> list[str]:
        text = (ROOT / name).read_text(encoding="utf-8")
        return text.split("<!-- plan -->\n", 1)[1].split("\n\n", 1)[0].splitlines()

    predicted = table().splitlines()
    hint = "paste what `mlx-slim plan --table` prints"
    assert shown("docs/memory-and-speed.md") == predicted, hint
    some = shown("README.md")
    assert len(some) > 5 and some == [line for line in predicted if line in some], hint


def test_every_recipe_has_a_make_target() -> None:
    from mlx_slim.config import library

    text = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    line = next(line for line in text.splitlines() if line.startswith("RECIPES :="))
    assert sorted(line.split()[2:]) == library.names("recipes")
