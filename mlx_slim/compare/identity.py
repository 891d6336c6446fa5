"""What a cell's numbers depend on, as one hash.

Invariant: equal keys mean equal inputs: recipe, training rows, weights, the questions asked, and
the code that computes (not the code that shows). Anything else, such as a memory budget or a
tracker, may change between two runs. Try it: ``mlx-slim compare matrix-tiny --dry-run``.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlx_slim import __version__
from mlx_slim.artifacts import hash_bytes, hash_file, hash_json, provenance
from mlx_slim.config.schema import Recipe
from mlx_slim.data.fingerprint import source_print
from mlx_slim.runtime import on_gpu
from mlx_slim.workflows.task_rows import finder

# Parts of the package that cannot change a trained weight or a score.
_SHOWS = {"analyze", "bench", "cli", "compare", "console", "trackers.py", "events.py"}


@lru_cache(maxsize=1)
def code_version() -> str:
    """Return the version, and a hash of the source files that compute."""
    package = Path(__file__).resolve().parents[1]
    files = sorted(package.rglob("*.py"))
    used = [path for path in files if path.relative_to(package).parts[0] not in _SHOWS]
    whole = hash_bytes("".join(hash_file(path) for path in used).encode())
    return f"{__version__}+{whole[:12]}"


def weights_hash(folder: Path) -> str:
    """Return the hash of a model's weights and configuration."""
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
    return hash_json({path.name: hash_file(path) for path in files if path.is_file()})


def rows_print(recipe: Recipe) -> list[dict[str, Any]]:
    """Return what identifies the training rows of a recipe.

    Raises:
        SlimError: If a source is not there.
    """
    with TemporaryDirectory() as folder:
        find = finder(Path(folder))
        return [source_print(find(config), config) for config in recipe.data.sources]


def train_key(recipe: Recipe, weights: list[str], rows: list[dict[str, Any]]) -> str:
    """Return the identity of a training run.

    Args:
        recipe: Where its models and its cache lie makes no difference.
        weights: Hashes of the weights that it starts from, and of its teachers'.
        rows: ``rows_print``.
    """
    values = recipe.model_dump(mode="json", exclude={"model", "revision", "memory", "report_to"})
    for name in ("log_every", "save_every", "keep"):
        del values["train"][name]
    if values.get("distill"):
        del values["distill"]["cache"]
        for teacher in values["distill"]["teachers"]:
            if Path(teacher["model"] or "").is_dir():
                del teacher["model"]
    return hash_json({"recipe": values, "weights": weights, "rows": rows, "code": code_version()})


def prune_key(weights: str, options: dict[str, Any]) -> str:
    """Return the identity of a pruning of weights with that hash."""
    return hash_json({"prune": options, "weights": weights, "code": code_version()})


def score_key(model: str, asked: dict[str, Any]) -> str:
    """Return the identity of an evaluation: what answers (a key or a hash), and what is asked."""
    return hash_json({"model": model, "asked": asked, "code": code_version()})


def machine() -> dict[str, Any]:
    """Return provenance with the machine in words; nothing about the user."""
    import os
    import platform

    import mlx.core as mx

    from mlx_slim.runtime import human_bytes

    name = ""
    if on_gpu():
        name = str(mx.device_info().get("device_name", "GPU"))
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "")
    where = f"{platform.system()} {platform.machine()}"
    memory = human_bytes(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    parts = [name, f"{os.cpu_count()} CPU cores", f"{memory} memory", where]
    return {**provenance(), "machine": ", ".join(part for part in parts if part)}
