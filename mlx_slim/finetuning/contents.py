"""What identifies the contents of all that a recipe names by path.

Invariant: equal contents give equal values, wherever they are. Used where a run must not be resumed
or reused with other rows: by ``compare`` and ``sweep``.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from mlx_slim.adapters.stack import parse_adapters
from mlx_slim.adapters.store import adapter_hash
from mlx_slim.artifacts import hash_file
from mlx_slim.config.schema import Recipe, SourceConfig
from mlx_slim.data.fingerprint import source_fingerprint
from mlx_slim.evaluation.tasks.training_rows import finder
from mlx_slim.finetuning.build import started_from
from mlx_slim.finetuning.forgetting import read_texts_of
from mlx_slim.reading import JsonObject


def contents(recipe: Recipe) -> JsonObject:
    """Return what identifies the contents of all that a recipe names by path, its models aside.

    Training rows, a file of validation rows, a template's file, the text of ``forgetting``,
    adapters that its own is stacked on or starts from, and those of its teachers.

    Raises:
        SlimError: If one of them is missing.
    """
    data = recipe.data
    sources = list(data.sources)
    if isinstance(data.validation, str):
        validation = {"path": data.validation, "format": data.format, "split": "validation"}
        sources.append(SourceConfig.model_validate(validation))
    with TemporaryDirectory() as folder:
        find = finder(Path(folder))
        hashes: JsonObject = {"rows": [source_fingerprint(find(c), c) for c in sources]}
    if Path(data.template).is_file():
        hashes["template"] = hash_file(Path(data.template))
    if recipe.forgetting is not None:
        hashes["forgetting"] = read_texts_of(recipe.forgetting).sha256
    teachers = recipe.distill.teachers if recipe.distill else []
    adapters = [*recipe.adapter.on, *(t.adapter for t in teachers if t.adapter is not None)]
    folders = [one.folder for name in adapters for one in parse_adapters(name)]
    if folders := [*folders, *started_from(recipe)]:
        hashes["adapters"] = [adapter_hash(folder) for folder in folders]
    return hashes
