"""Estimates the tokens of a recipe's rows, all and supervised, from the first rows of each source.

Invariant: no tokenizer is needed and there is no network access; validation rows and rows that are
dropped for their length are not counted. Try it:
``mlx-slim plan smollm2-lora data.path=rows.jsonl``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlx_slim.artifacts import public_name
from mlx_slim.config.distill import DistillConfig
from mlx_slim.config.preference import PreferenceRows
from mlx_slim.config.schema import DataConfig, Recipe, SourceConfig
from mlx_slim.data.formats import Dropped, Example, read_example
from mlx_slim.data.pieces import context_tokens, pieces
from mlx_slim.data.preference_rows import read_answers
from mlx_slim.data.readers import count_lines
from mlx_slim.data.sources import RawRow, find_local
from mlx_slim.data.split import quotas
from mlx_slim.progress import stage

CHARACTERS_PER_TOKEN = 4.3  # English text in the tokenizers of the shipped recipes
TEMPLATE_TOKENS = 40  # of a chat template or Alpaca's
_LARGE = 1 << 24  # bytes of files that take a moment to count
SAMPLE = 256  # rows of a source that are read
SUPERVISED = 0.6  # fraction of the tokens of Alpaca-like rows that are answers
# tatsu-lab/alpaca: 52,002 rows, about 520 characters each under the Alpaca template.
_HUB_ROWS = {"tatsu-lab/alpaca": (52_002, 120)}


class RowEstimate(NamedTuple):
    """The rows of one epoch.

    Attributes:
        tokens: Of all of them.
        length: Of the row that a token is in, averaged over tokens.
        basis: How they were counted, as text.
        supervised: Fraction of the tokens that is supervised, where prompts are masked.
        rows: How many.
        common: Tokens that all of them begin with, without those of a template.
    """

    tokens: int
    length: int
    basis: str
    supervised: float
    rows: int
    common: int = 0


def expected_rows(recipe: Recipe, *, local: bool) -> RowEstimate | None:
    """Return the rows of an epoch, or None where a source is on a hub only.

    Args:
        recipe: Its sources.
        local: Read files and the mirror on this machine; else the hub's rows are meant.

    Raises:
        SlimError: If local rows are missing or cannot be read.
    """
    data, limit, compared = recipe.data, recipe.train.max_length, recipe.preference_rows
    answers = 2 if compared == "pairs" else 1  # of a row, each computed with its prompt
    quota_of = quotas(data.max_rows, [source.weight for source in data.sources])
    rows, lengths, weights, learned, begins = [], [], [], [], []
    texts = 0.0  # of which the rows are made
    for source, quota in zip(data.sources, quota_of, strict=True):
        counted = _local(source, data, compared) if local else None
        if counted is None:
            if source.path not in _HUB_ROWS:
                return None
            count, length = _HUB_ROWS[source.path]
            count = max(0, min(count - source.skip, source.limit or count))
            counted = count, np.array([[length, SUPERVISED * length, data.splits("alpaca")]]), ""
        count, sample, begin = counted
        count, quota = count * answers, None if quota is None else quota * answers
        begins.append(begin)
        used, supervised, began = _fitted(sample, data, limit).T
        scale = min(count, count if quota is None else quota) / len(sample)
        rows.append(scale * len(used))
        texts += scale * began.sum() / answers
        lengths.append(used)
        learned.append(supervised)
        weights.append(source.weight)
    if isinstance(data.validation, str):
        validation = 0.0
        if local:
            find_local(SourceConfig(path=data.validation))
    else:
        validation = float(data.validation)
    fraction = validation if validation < 1 else min(1.0, validation / max(1.0, texts))
    trained = [n * weight * (1 - fraction) for n, weight in zip(rows, weights, strict=True)]
    supervised = _total(trained, learned) / max(1.0, _total(trained, lengths))
    if recipe.distill is not None and recipe.distill.method in ("sequence", "rationales"):
        trained, lengths = _with_texts(recipe.distill, trained, lengths, limit)
    tokens = _total(trained, lengths)
    squares = _total(trained, [np.square(used) for used in lengths])
    if tokens < 1:
        return None
    count, mean = round(sum(trained)), tokens / sum(trained)
    basis = f"{count:,} rows of about {mean:.0f} tokens"
    common = int(len(_common_start(begins)) / CHARACTERS_PER_TOKEN)
    return RowEstimate(int(tokens), int(squares / tokens), basis, supervised, count, common)


def _common_start(texts: Sequence[str]) -> str:
    """Return what all of ``texts`` begin with: what the first and the last in order do."""
    first, last = min(texts, default=""), max(texts, default="")
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), None)
    return first[:length]


def _total(trained: list[float], sizes: list[np.ndarray]) -> float:
    """Return the sum over the rows of all sources, from the sizes of some rows of each."""
    pairs = zip(trained, sizes, strict=True)
    return float(sum(n * (some.mean() if len(some) else 0.0) for n, some in pairs))


def _with_texts(
    distill: DistillConfig, trained: list[float], lengths: list[np.ndarray], limit: int
) -> tuple[list[float], list[np.ndarray]]:
    """Return counts and lengths with the rows of each teacher; rationales have maximum length."""
    texts, answers = lengths, distill.weight < 1
    if distill.method == "rationales":
        texts = [np.minimum(used + distill.ask.max_tokens, limit) for used in lengths]
        answers = True
    count = len(distill.teachers)
    with_data = (trained, lengths) if answers else ([], [])
    return with_data[0] + count * trained, with_data[1] + count * texts


def _fitted(sample: np.ndarray, data: DataConfig, limit: int) -> np.ndarray:
    """Return the rows that are trained on: (rows, 3), tokens, supervised, whether a text begins."""
    fitted, context = [], context_tokens(data.split_overlap, limit)
    for length, supervised, splits in sample[sample[:, 0] > 0].tolist():
        if length > limit and splits:
            for part in pieces(int(length), limit, context, 0):
                size, fraction = part.stop - part.start, supervised / length
                fitted.append((size, fraction * (size - part.context), part.start == 0))
        elif length <= limit or data.truncation in ("left", "right"):
            fitted.append((min(length, limit), min(supervised, limit), True))
    return np.array(fitted, float).reshape(-1, 3)


def _local(
    config: SourceConfig, data: DataConfig, compared: PreferenceRows | None
) -> tuple[int, np.ndarray, str] | None:
    """Return the number of rows of a local source, the sizes of the first ones, and their begin.

    Sizes are (rows, 3): tokens, supervised tokens, whether the row is split; the begin is the text
    that all begin with.
    """
    extra = 1 if data.template == "plain" else TEMPLATE_TOKENS
    files: Sequence[Path] | None = None  # None: only counting tells how many rows there are
    if config.task is not None:
        # Imported here: Jinja and what reads tasks are a tenth of what a plan takes.
        from mlx_slim.evaluation.tasks.rows import load_rows, local_rows
        from mlx_slim.evaluation.tasks.spec import find_task
        from mlx_slim.evaluation.tasks.training_rows import training_rows, with_split

        task = with_split(find_task(config.task), config.split)
        if local_rows(task) is None:
            return None
        values = training_rows(task, load_rows(task), config.skip, config.limit)
        rows: Iterable[RawRow] = (RawRow(task.name, i, value) for i, value in enumerate(values, 1))
    else:
        source = find_local(config)
        if source is None:
            return None
        rows, files = source, source.files
    rest = iter(rows)
    first = list(islice(rest, SAMPLE))
    measured = [one for row in first for one in _lengths(row, config, data, extra, compared)]
    sample = np.array([sizes for *sizes, _ in measured]).reshape(-1, 3)
    begin = _common_start([text for tokens, *_, text in measured if tokens])
    large = files is None or sum(file.stat().st_size for file in files) > _LARGE
    with stage(f"counting the rows of {public_name(config.path)}") if large else nullcontext():
        lines = [None] if files is None else [count_lines(file) for file in files]
        if None in lines:
            count = sum(1 for _ in chain(first, rest))
        else:
            total = sum(number or 0 for number in lines)
            count = max(0, min(total - config.skip, config.limit or total))
    return count, sample, begin


def _lengths(
    row: RawRow,
    config: SourceConfig,
    data: DataConfig,
    extra: int,
    compared: PreferenceRows | None,
) -> list[tuple[int, int, bool, str]]:
    """Return a row's tokens and supervised ones, estimated; if it is split; its text.

    A row that compares two answers is two. Of one that is dropped the tokens are 0.
    """
    named = {"columns": data.columns, "system": config.system or data.system}
    try:
        if compared is None:
            format = config.format or data.format
            examples = [read_example(row, format, learn=data.learn, **named)]
        else:
            examples = read_answers(row, compared, **named)
    except Dropped:
        return [(0, 0, False, "")] * (2 if compared == "pairs" else 1)
    return [_length(example, data, extra) for example in examples]


def _length(example: Example, data: DataConfig, extra: int) -> tuple[int, int, bool, str]:
    text = "".join(example.texts)
    sizes = [len(part) / CHARACTERS_PER_TOKEN for part in example.texts]
    total = int(sum(sizes)) + extra
    splits = data.splits(example.kind)
    if example.kind == "text":
        return total, total, splits, text
    weights = example.turn_weights
    learned = sum(size for size, w in zip(sizes, weights, strict=True) if w)
    return total, int(learned), splits, text
