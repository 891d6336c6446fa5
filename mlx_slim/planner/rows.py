"""How many tokens the rows of a recipe are, and how many are learned, guessed from the first ones.

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
SUPERVISED = 0.6  # share of Alpaca-like rows that are answers
# tatsu-lab/alpaca: 52,002 rows, about 520 characters each under the Alpaca template.
_HUB_ROWS = {"tatsu-lab/alpaca": (52_002, 120)}


class RowEstimate(NamedTuple):
    """The rows of one epoch.

    Attributes:
        tokens: Of all of them.
        length: Of the row that a token stands in, on average, tokens.
        basis: In words.
        supervised: Share of the tokens that stand in what is learned; where prompts are masked.
    """

    tokens: int
    length: int
    basis: str
    supervised: float


def expected_rows(recipe: Recipe, *, local: bool) -> RowEstimate | None:
    """Return the rows of an epoch, or None where only a hub has a source.

    Args:
        recipe: Its sources.
        local: Look at files and the mirror on this machine; else what the hub has is meant.

    Raises:
        SlimError: If rows that should lie here do not, or cannot be read.
    """
    data, limit = recipe.data, recipe.train.max_length
    shares = quotas(data.max_rows, [source.weight for source in data.sources])
    rows, lengths, weights, learned = [], [], [], []
    for source, quota in zip(data.sources, shares, strict=True):
        found = _local(source, data) if local else None
        if found is None:
            if source.path not in _HUB_ROWS:
                return None
            count, length = _HUB_ROWS[source.path]
            count = max(0, min(count - source.skip, source.limit or count))
            found = count, np.array([[length, SUPERVISED * length]])
        count, sample = found
        used, supervised = _fitted(sample, data, limit).T
        rows.append(min(count, count if quota is None else quota) * len(used) / len(sample))
        lengths.append(used)
        learned.append(supervised)
        weights.append(source.weight)
    if isinstance(data.validation, str):
        held_out = 0.0
        if local:
            find_local(SourceConfig(path=data.validation))
    else:
        held_out = float(data.validation)
    share = held_out if held_out < 1 else min(1.0, held_out / max(1.0, sum(rows)))
    trained = [n * weight * (1 - share) for n, weight in zip(rows, weights, strict=True)]
    supervised = _total(trained, learned) / max(1.0, _total(trained, lengths))
    if recipe.distill is not None and recipe.distill.method in ("sequence", "rationales"):
        trained, lengths = _with_texts(recipe.distill, trained, lengths, limit)
    tokens = _total(trained, lengths)
    squares = _total(trained, [np.square(used) for used in lengths])
    if tokens < 1:
        return None
    count, mean = round(sum(trained)), tokens / sum(trained)
    basis = f"{count:,} rows of about {mean:.0f} tokens"
    return RowEstimate(int(tokens), int(squares / tokens), basis, supervised)


def _total(trained: list[float], sizes: list[np.ndarray]) -> float:
    """Return the sum over the rows of all sources, from the sizes of some rows of each."""
    pairs = zip(trained, sizes, strict=True)
    return float(sum(n * (some.mean() if len(some) else 0.0) for n, some in pairs))


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
    """Return the lengths of the rows that stay, as they stay: (rows, 2), tokens and learned."""
    sample = sample[sample[:, 0] > 0]
    if data.truncation in ("left", "right"):
        return np.minimum(sample, limit)
    return sample[sample[:, 0] <= limit]


def _local(config: SourceConfig, data: DataConfig) -> tuple[int, np.ndarray] | None:
    """Return how many rows a source has here, and (first rows, 2), as ``_length`` has them."""
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
    sample = np.array([_length(row, config, data, extra) for row in first]).reshape(-1, 2)
    lines = [None] if config.task is not None else [count_lines(file) for file in source.files]
    if None in lines:
        count = sum(1 for _ in chain(first, rest))
    else:
        total = sum(number or 0 for number in lines)
        count = max(0, min(total - config.skip, config.limit or total))
    return count, sample


def _length(row: RawRow, config: SourceConfig, data: DataConfig, extra: int) -> tuple[int, int]:
    """Return about how many tokens a row is and how many are learned; 0 if none can be."""
    try:
        example: Any = read_example(
            row,
            config.format or data.format,
            columns=data.columns,
            system=config.system or data.system,
            learn=data.learn,
        )
    except Dropped:
        return 0, 0
    sizes = [len(text) / CHARACTERS_PER_TOKEN for text in example.texts]
    total = int(sum(sizes)) + extra
    if example.kind == "text":
        return total, total
    weights = example.turn_weights
    return total, int(sum(size for size, w in zip(sizes, weights, strict=True) if w))
