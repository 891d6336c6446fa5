"""The wheel in an empty environment outside the checkout: installed by pip and by uv, then used.

Skips without ``MLX_SLIM_WHEEL``, the folder of the wheel; ``make wheel`` builds it and sets this.
Everything comes from the package index; installing takes minutes where its wheels are not cached.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WHEELS = sorted((ROOT / os.environ.get("MLX_SLIM_WHEEL", "none")).glob("*.whl"))
pytestmark = pytest.mark.skipif(not WHEELS, reason="MLX_SLIM_WHEEL names no wheel: make wheel")
# What python of the environment prints: where the package lies, and the packaged model.
WHERE = "import mlx_slim; print(mlx_slim.__file__)"
MODEL = "from mlx_slim.models.hub import bundled_smollm2; print(bundled_smollm2())"


def run(*words: str | Path, cwd: Path, **variables: str) -> str:
    """Run a command outside of the checkout; return what it printed."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "MLX_SLIM_DATA", "MLX_SLIM_REFERENCE")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env={**environment, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def by_pip(folder: Path) -> Path:
    """Install with pip into a new environment; return its folder of programs."""
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    programs = folder / "venv" / "bin"
    run(programs / "pip", "install", "--quiet", "--no-compile", WHEELS[0], cwd=folder)
    return programs


def by_uv(folder: Path) -> Path:
    """Install with ``uv tool``; uv itself comes from the package index."""
    uv = shutil.which("uv")
    if uv is None:
        run(sys.executable, "-m", "venv", folder / "uv", cwd=folder)
        uv = str(folder / "uv" / "bin" / "uv")
        run(folder / "uv" / "bin" / "pip", "install", "--quiet", "uv", cwd=folder)
    places = {"UV_TOOL_DIR": str(folder / "tools"), "UV_TOOL_BIN_DIR": str(folder / "bin")}
    words = ("tool", "install", "--quiet", "--python", sys.executable, WHEELS[0])
    run(uv, *words, cwd=folder, **places)
    assert (folder / "bin" / "mlx-slim").exists()
    return folder / "tools" / "mlx-slim" / "bin"


@pytest.mark.parametrize("install", [by_pip, by_uv])
def test_installed_from_the_index_it_trains_the_packaged_model(
    tmp_path: Path, install: Callable[[Path], Path]
) -> None:
    programs = install(tmp_path)
    python, slim = programs / "python", programs / "mlx-slim"
    path = f"{tmp_path / 'uv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    where = Path(run(python, "-c", WHERE, cwd=tmp_path).strip())
    assert where.is_relative_to(tmp_path)
    report = json.loads(run(slim, "doctor", "--json", cwd=tmp_path))
    assert report["versions"]["mlx-slim"] == WHEELS[0].name.split("-")[1]
    assert "smollm2-lora" in run(slim, "recipes", cwd=tmp_path)
    assert "hellaswag" in run(slim, "tasks", cwd=tmp_path)
    # A cache of its own for uv's environment, which has no pip to download with.
    cache = {"MLX_SLIM_CACHE": str(tmp_path / "cache")} if install is by_uv else {}
    file = run(python, "-c", MODEL, cwd=tmp_path, PATH=path, **cache).strip()
    run(slim, "convert", file, "-o", "model", cwd=tmp_path)
    rows = [{"prompt": f"{i} and one", "completion": f"{i + 1}"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = ["model=model", "revision=null", "data.path=rows.jsonl"]
    changes += ["data.format=completions", "data.template=auto"]
    changes += [
        "data.validation=0",
        "train.steps=2",
        "train.accumulate=1",
        "train.batch_tokens=256",
        "train.max_length=192",
    ]
    run(slim, "train", "smollm2-lora", *changes, "-o", "run", cwd=tmp_path)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "complete" and record["result"]["done"]["step"] == 2
