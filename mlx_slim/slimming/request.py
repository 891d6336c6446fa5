"""What a search was started with: how it is resumed, and the command that started it.

Invariant: a resume needs the same model, demands and questions; the time that is left, the fraction
to keep and the workers may change. Used by ``slimming/run.py``.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import mlx.nn as nn

from mlx_slim.artifacts import SCHEMA_VERSION
from mlx_slim.cluster.options import PoolOptions
from mlx_slim.cluster.worker import MARKER
from mlx_slim.errors import SlimError
from mlx_slim.models.load import read_config, resolve
from mlx_slim.models.tensors import folder_tensors
from mlx_slim.models.verified_save import stored_dtype
from mlx_slim.quantization.apply import refuse_quantized
from mlx_slim.reading import JsonObject, read_object
from mlx_slim.run_dir import RunKind, changed_values, option_words
from mlx_slim.slimming.candidates import SearchSpace
from mlx_slim.slimming.cost import other_bytes
from mlx_slim.slimming.options import SlimOptions

STATE_FILE = "request.json"
RUN = RunKind(command="slim", holds="search", state=STATE_FILE, before=(MARKER,))
_FIXED = ("context", "kv_bits", "tasks", "limit", "data", "revision", "memory", "disk", "speed")


def space_of(source: str | Path, options: SlimOptions) -> SearchSpace:
    """Return the smaller models of ``source``; no weight is read.

    Raises:
        SlimError: If it is quantized, or not there.
    """
    config = read_config(source, options.revision)
    if "quantization" in config:
        refuse_quantized(nn.Module(), config)
    folder = resolve(source, options.revision)
    return SearchSpace(config, stored_dtype(folder_tensors(folder)), options, other_bytes(folder))


def command_words(source: str | Path, options: SlimOptions) -> list[str]:
    """Return the command that started a search, without its folder."""
    words = ["slim", str(source)]
    plain = SlimOptions()
    for name in ("memory", "disk", "speed", "context", "kv_bits", "keep", "limit", "data"):
        value = getattr(options, name)
        if value != getattr(plain, name):
            words += [
                f"--{name.replace('_', '-')}",
                f"{value:g}" if isinstance(value, float) else str(value),
            ]
    for task in options.tasks:
        words += ["--task", task]
    if options.data_dir is not None:
        words += ["--data-dir", str(options.data_dir)]
    if options.time is not None:
        words += ["--time", f"{options.time:g}s"]
    words += option_words(PoolOptions(options.workers, options.cluster))
    return [*words, *(["--revision", options.revision] if options.revision else [])]


def request_of(source: str | Path, options: SlimOptions) -> JsonObject:
    """Return what a resume must match: the content of ``STATE_FILE``."""
    values = asdict(options)
    return {
        "schema_version": SCHEMA_VERSION,
        "source": str(source),
        **{name: list(v) if isinstance(v := values[name], tuple) else v for name in _FIXED},
    }


def check_same(out: Path, source: str | Path, options: SlimOptions) -> None:
    """Check that the search in ``out`` was started with the same demands.

    Raises:
        SlimError: With what differs.
    """
    old, new = read_object(out / STATE_FILE), request_of(source, options)
    if changed := changed_values(old, new):
        raise SlimError(
            f"{out} was started with other demands: {'; '.join(changed)}",
            "resume with the same values, or start a new search",
        )
