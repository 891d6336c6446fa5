"""How many tokens the rows of a recipe are, guessed from the first ones of each source.

Invariant: no tokenizer is needed and the network is never touched; rows that will be held out or
dropped for their length are not counted. Used by ``work.py``; try it:
``mlx-slim plan smollm2-lora data.path=rows.jsonl``.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np

from mlx_slim.config.distill import DistillConfig
from mlx_slim.config.schema import DataConfig, Recipe, SourceConfig
from mlx_slim.data.formats import Dropped, read_example
from mlx_slim.data.readers import count_lines
from mlx_slim.data.sources import RawRow, find_local
from mlx_slim.data.split import quotas
from mlx_slim.evaluation.tasks.rows import load_rows, local_rows
from mlx_slim.evaluation.tasks.spec import find_task
from mlx_slim.evaluation.tasks.training_rows import training_rows, with_split

CHARACTERS_PER_TOKEN = 4.3  # English text in the tokenizers of the shipped recipes
TEMPLATE_TOKENS = 40  # of a chat template or Alpaca's
SAMPLE = 256  # rows of a source that are read
# tatsu-lab/alpaca: 52,002 rows, about 520 characters each under the Alpaca template.
_HUB_ROWS = {"tatsu-lab/alpaca": (52_002, 120)}


class Rows(NamedTuple):
    """The rows of one epoch.

    Attributes:
        tokens: Of all of them.
        length: Of the row that a token stands in, on average, tokens.
        basis: In words.
    """

    tokens: int
    length: int
    basis: str


def expected_rows(recipe: Recipe, *, local: bool) -> Rows | None:
    """Return the rows of an epoch, or None where only a hub has a source.

    Args:
        recipe: Its sources.
        local: Look at files and the mirror on this machine; else what the hub has is meant.

    Raises:
        SlimError: If rows that should lie here do not, or cannot be read.
    """
    data, limit = recipe.data, recipe.train.max_length
    shares = quotas(data.max_rows, [source.weight for source in data.sources])
    rows, lengths, weights = [], [], []
    for source, quota in zip(data.sources, shares, strict=True):
        found = _local(source, data) if local else None
        if found is None:
            if source.path not in _HUB_ROWS:
                return None
            count, length = _HUB_ROWS[source.path]
            count = max(0, min(count - source.skip, source.limit or count))
            found = count, np.array([length])
        count, sample = found
        used = _fitted(sample, data, limit)
        rows.append(min(count, count if quota is None else quota) * len(used) / len(sample))
        lengths.append(used)
        weights.append(source.weight)
    if isinstance(data.validation, str):
        held_out = 0.0
        if local:
            find_local(SourceConfig(path=data.validation))
    else:
        held_out = float(data.validation)
    share = held_out if held_out < 1 else min(1.0, held_out / max(1.0, sum(rows)))
    trained = [n * weight * (1 - share) for n, weight in zip(rows, weights, strict=True)]
    if recipe.distill is not None and recipe.distill.method in ("sequence", "rationales"):
        trained, lengths = _with_texts(recipe.distill, trained, lengths, limit)
    tokens = squares = 0.0
    for n, used in zip(trained, lengths, strict=True):
        tokens += n * (used.mean() if len(used) else 0)
        squares += n * (np.square(used).mean() if len(used) else 0)
    if tokens < 1:
        return None
    count, mean = round(sum(trained)), tokens / sum(trained)
    return Rows(int(tokens), int(squares / tokens), f"{count:,} rows of about {mean:.0f} tokens")


def _with_texts(
    distill: DistillConfig, trained: list[float], lengths: list[np.ndarray], limit: int
) -> tuple[list[float], list[np.ndarray]]:
    """Return counts and lengths with the rows of each teacher; reasons are as long as they may."""
    texts, own = lengths, distill.weight < 1
    if distill.method == "rationales":
        texts, own = [np.minimum(used + distill.ask.max_tokens, limit) for used in lengths], True
    count = len(distill.teachers)
    return (trained if own else []) + count * trained, (lengths if own else []) + count * texts


def _fitted(sample: np.ndarray, data: DataConfig, limit: int) -> np.ndarray:
    """Return the lengths of the rows that stay, as they stay."""
    if data.truncation in ("left", "right"):
        return np.minimum(sample[sample > 0], limit)
    return sample[(sample > 0) & (sample <= limit)]


def _local(config: SourceConfig, data: DataConfig) -> tuple[int, np.ndarray] | None:
    """Return how many rows a source has here, and the lengths of the first; 0: not usable."""
    extra = 1 if data.template == "plain" else TEMPLATE_TOKENS
    if config.task is not None:
        task = with_split(find_task(config.task), config.split)
        if local_rows(task) is None:
            return None
        values = training_rows(task, load_rows(task), config.skip, config.limit)
        rows: Iterable[RawRow] = (RawRow(task.name, i, value) for i, value in enumerate(values, 1))
    else:
        source = find_local(config)
        if source is None:
            return None
        rows = source
    rest = iter(rows)
    first = list(islice(rest, SAMPLE))
    sample = np.array([_length(row, config, data, extra) for row in first])
    lines = [None] if config.task is not None else [count_lines(file) for file in source.files]
    if None in lines:
        count = sum(1 for _ in chain(first, rest))
    else:
        total = sum(number or 0 for number in lines)
        count = max(0, min(total - config.skip, config.limit or total))
    return count, sample


def _length(row: RawRow, config: SourceConfig, data: DataConfig, extra: int) -> int:
    """Return about how many tokens a row is; 0 if nothing can be learned from it."""
    try:
        example: Any = read_example(
            row,
            config.format or data.format,
            columns=data.columns,
            system=config.system or data.system,
        )
    except Dropped:
        return 0
    return int(sum(map(len, example.texts)) / CHARACTERS_PER_TOKEN) + extra
