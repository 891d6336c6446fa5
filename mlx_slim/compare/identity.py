"""What a cell's numbers depend on, as one hash.

Invariant: equal keys mean equal inputs by content: recipe and the files that it names, training
rows, models with their tokenizers, the rows, definition and examples of each task, the forgetting
text, and the code that computes (not the code that displays). Anything else, such as a memory
budget or a tracker, may change between two runs. Try it: ``mlx-slim compare matrix-tiny
--dry-run``.
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

from mlx_slim import __version__
from mlx_slim.artifacts import hash_bytes, hash_file, hash_json
from mlx_slim.config.schema import Recipe, SourceConfig
from mlx_slim.data.fingerprint import source_fingerprint
from mlx_slim.data.sources import find as find_source
from mlx_slim.errors import SlimError
from mlx_slim.pruning.options import PruneOptions
from mlx_slim.quantization.calibration import DEFAULT_SOURCE
from mlx_slim.reading import JsonObject

# Parts of the package that cannot change a trained weight or a score.
_SHOWS = {"analyze", "bench", "cli", "compare", "console", "sweeping", "trackers.py", "events.py"}


@lru_cache(maxsize=1)
def code_version() -> str:
    """Return the version, and a hash of the source files that compute."""
    package = Path(__file__).resolve().parents[1]
    files = sorted(package.rglob("*.py"))
    used = [path for path in files if path.relative_to(package).parts[0] not in _SHOWS]
    whole = hash_bytes("".join(hash_file(path) for path in used).encode())
    return f"{__version__}+{whole[:12]}"


def train_key(recipe: Recipe, weights: list[str], named: JsonObject) -> str:
    """Return the identity of a training run.

    Args:
        recipe: The paths of its models and its cache do not count.
        weights: Hashes of the models that it starts from, and of its teachers.
        named: ``finetuning.contents.contents``.
    """
    values = recipe.model_dump(
        mode="json", exclude={"model", "revision", "memory", "report_to", "report_answers"}
    )
    for name in ("log_every", "save_every", "keep", "duty", "keep_awake", "shard"):
        del values["train"][name]
    if values.get("distill"):
        del values["distill"]["cache"]
        for teacher in values["distill"]["teachers"]:
            if Path(teacher["model"] or "").is_dir():
                del teacher["model"]
    return hash_json({"recipe": values, "weights": weights, "named": named, "code": code_version()})


def prune_key(weights: str, options: PruneOptions) -> str:
    """Return the identity of a pruning of a model with that hash; its calibration text counts."""
    text = None
    config = SourceConfig(path=options.calibration or DEFAULT_SOURCE)
    with contextlib.suppress(SlimError):  # a method without calibration needs no text
        text = source_fingerprint(find_source(config), config)
    named = {"prune": asdict(options), "text": text}
    return hash_json({**named, "weights": weights, "code": code_version()})


def score_key(model: str, request: JsonObject) -> str:
    """Return the identity of an evaluation: the model (a key or a hash), and the request."""
    return hash_json({"model": model, "request": request, "code": code_version()})
