"""What a recipe is chosen from: what the user set, the model's config, and the rows, counted.

Invariant: no weights are read. The rows are tokenised by the pipeline of training, so that their
counts are exact; nothing of it stays on the disk. ``choose.py`` goes from here to a recipe. Try it:
``mlx-slim train MODEL --data rows.jsonl --dry-run``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_slim.config.load import DEFAULT, Resolved, from_layers
from mlx_slim.config.schema import DataConfig, SourceConfig
from mlx_slim.config.values import MOST
from mlx_slim.data.ledger import LEDGER_FILE, RowTotals, SourceLedger
from mlx_slim.data.pieces import context_tokens, pieces
from mlx_slim.data.pipeline import Pipeline, PreparedRow
from mlx_slim.data.prepare import Prepared, prepare
from mlx_slim.data.sources import find_local
from mlx_slim.data.split import no_row_left, split_rows
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.scoring.requests import max_length as longest_input
from mlx_slim.evaluation.tasks.training_rows import finder
from mlx_slim.models.load import load_tokenizer, read_config
from mlx_slim.models.row_limits import shortest_limit
from mlx_slim.models.tokenizer import keep_within
from mlx_slim.planner import hyperparameters
from mlx_slim.planner.shapes import training_shapes
from mlx_slim.planner.suggest import changed
from mlx_slim.planner.time import Machine, this_machine
from mlx_slim.planner.work import Speed, measure_speed
from mlx_slim.reading import JsonObject, ModelConfig
from mlx_slim.runtime import from_first_rank, memory_budget, on_gpu, resolve_dtype


@dataclass(frozen=True)
class ChoiceInputs:
    """What is chosen for: all that does not depend on a choice.

    Attributes:
        base: What the user set.
        overrides: Of the command line.
        config: Of the model.
        lengths: Tokens of each usable row, int64 (N,).
        supervised: Supervised ones of them, int64 (N,).
        splits: Whether it is cut into several where it is too long, bool (N,).
        validation: Setting, its rows' tokens, and the reason.
        data: Reason of ``data.path``.
        longest: Tokens that the model reads at most.
        width: Of the model.
        parameters_per_rank: Trainable numbers of an adapter of rank 1.
        budget: Bytes.
        speed: Of this machine, measured.
        machine: Its peak rates, on a GPU, which reaches a part of its rates only; None on a CPU.
    """

    base: Resolved
    overrides: Sequence[str]
    config: ModelConfig
    lengths: np.ndarray
    supervised: np.ndarray
    splits: np.ndarray
    validation: tuple[float | str, int, str]
    data: str
    longest: int
    width: int
    parameters_per_rank: int
    budget: int
    speed: Speed
    machine: Machine | None

    def fitted(self, length: int) -> np.ndarray:
        """Return the tokens of each row of at most ``length`` tokens that these rows give."""
        whole = self.lengths[self.lengths <= length]
        context = context_tokens(self.base.recipe.data.split_overlap, length)
        cut = [
            part.stop - part.start
            for row in self.lengths[(self.lengths > length) & self.splits].tolist()
            for part in pieces(row, length, context, 0)
        ]
        return np.concatenate([whole, np.array(cut, np.int64)])

    def is_fixed(self, key: str) -> bool:
        """Whether the user set ``key``."""
        return key in self.base.overridden


def nested(key: str, value: Any, origin: str) -> tuple[JsonObject, str]:
    """Return a dotted key and its value as a layer of ``from_layers``."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return value, origin


def user_recipe(
    model: str, data: str, method: str | None, budget: str | None, overrides: Sequence[str]
) -> tuple[Resolved, list[str]]:
    """Return what the user set, checked, with wide limits for what is chosen; and all overrides.

    Raises:
        SlimError: If a value is set twice, or cannot be used.
    """
    options = {
        "model": ("MODEL", model),
        "data.path": ("--data", data),
        "method": ("--method", method),
        "memory.budget": ("--budget", budget),
    }
    keys = {override.partition("=")[0].strip() for override in overrides}
    for key, (option, value) in options.items():
        if value is not None and key in keys:
            raise SlimError(f"{key} and {option} set the same thing", f"drop {key}=…")
    words = [*overrides]
    words += [f"{key}={options[key][1]}" for key in ("method", "memory.budget") if options[key][1]]
    wide = {"batch_tokens": MOST, "max_length": 8}
    values = {"model": model, "data": {"path": data}, "train": wide}
    return from_layers([(values, DEFAULT)], Path(data).stem or "run", words), words


def read_inputs(base: Resolved, overrides: Sequence[str]) -> tuple[ChoiceInputs, PreparedRow, Any]:
    """Read model config, tokenizer and rows; return the task, its first row and the tokenizer."""
    recipe = base.recipe
    config = read_config(recipe.model, recipe.revision)
    tokenizer = load_tokenizer(recipe.model, revision=recipe.revision)
    keep_within(tokenizer, [config])
    longest = longest_input(config, tokenizer)
    if limit := shortest_limit([config]):
        longest = min(longest, limit.tokens)
    if "train.max_length" in base.overridden:
        longest = recipe.train.max_length
    source = SourceConfig(path=str(recipe.data.path), format=recipe.data.format)
    separate = None if "data.validation" in base.overridden else _separate(source)
    data = recipe.data.model_copy(update={"validation": separate or 0})
    with TemporaryDirectory() as name:
        folder = Path(name)
        stored = prepare(
            data,
            tokenizer,
            max_length=longest,
            seed=recipe.rows_seed,
            folder=folder,
            find=finder(folder),
        )
        lengths, supervised = np.array(stored.train.lengths), np.array(stored.train.supervised)
        stored_hashes, texts = stored.train.hashes(), stored.train.texts
        splits = _split_where_long(data, stored)
        separate_tokens = int(stored.validation.lengths.sum()) if stored.validation else 0
        pipeline = Pipeline(data, tokenizer, max_length=longest)
        rows = pipeline.rows(finder(folder)(source), source, SourceLedger("", "", 1.0, []), 4096)
        example = next(iter(rows), None)
    assert example is not None, "prepare refuses rows of which none can be used"
    setting, reason = separate, "the validation rows beside the training rows"
    if setting is None:
        setting, reason = recipe.data.validation, ""
        if "data.validation" not in base.overridden:
            setting, reason = hyperparameters.validation_rows(len(np.unique(texts)))
    validation_tokens = separate_tokens
    if not isinstance(setting, str):
        held, trained = split_rows(setting, stored_hashes, texts, recipe.rows_seed)
        twins = len(lengths) - len(held) - len(trained)
        if not len(trained):
            if "data.validation" in base.overridden:
                raise no_row_left(twins)
            setting, reason, twins = 0, "no row differs from the ones to hold out", 0
            held, trained = held[:0], np.arange(len(lengths))
        if len(held):
            reason += "; not trained on" + f", nor are {twins:,} rows that equal one" * (twins > 0)
        validation_tokens = int(lengths[held].sum())
        lengths, supervised, splits = lengths[trained], supervised[trained], splits[trained]
    dtype = resolve_dtype(recipe.train.dtype)
    adapted = changed(recipe, {"method": "lora"})
    config_of_adapters = adapted.adapter.model_copy(update={"modules_to_save": []})
    adapted = adapted.model_copy(update={"adapter": config_of_adapters})
    shapes = training_shapes(config, adapted, dtype)
    task = ChoiceInputs(
        base=base,
        overrides=overrides,
        config=config,
        lengths=lengths,
        supervised=supervised,
        splits=splits,
        validation=(setting, validation_tokens, reason),
        data=f"{_counted(stored.ledger)}; template: {pipeline.template.name}",
        longest=longest,
        width=shapes.width,
        parameters_per_rank=shapes.trainable_parameters // adapted.adapter.rank,
        budget=from_first_rank(lambda: memory_budget(recipe.memory.budget)),
        speed=Speed(**from_first_rank(lambda: asdict(measure_speed(dtype)))),
        machine=_first_machine(dtype) if on_gpu() else None,
    )
    return task, example, tokenizer


def _first_machine(dtype: mx.Dtype) -> Machine:
    """Return the machine of the first rank: all ranks choose alike."""
    fields = from_first_rank(lambda: asdict(this_machine(dtype)))
    values: JsonObject = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return Machine(**values)


def _split_where_long(data: DataConfig, stored: Prepared) -> np.ndarray:
    """Return which rows are cut where they are too long: of plain text, every token is learned."""
    rows, formats = stored.train, [*stored.ledger["sources"][0]["formats"]]
    if data.split is True or formats == ["text"]:
        return np.full(len(rows), data.splits("text"))
    plain = rows.supervised == rows.lengths - 1
    return plain & (data.splits("text") and "text" in formats)


def _separate(source: SourceConfig) -> str | None:
    """Return the path again, if it is a folder with validation rows in files of their own."""
    if not Path(source.path).expanduser().is_dir():
        return None
    with contextlib.suppress(SlimError):
        train = find_local(source)
        validation = find_local(source.model_copy(update={"split": "validation"}))
        if train and validation and not {*train.files} & {*validation.files}:
            return source.path
    return None


def _counted(ledger: JsonObject) -> str:
    """Return what the rows are, and how many are used and dropped."""
    totals, source = RowTotals.read(ledger, LEDGER_FILE), ledger["sources"][0]
    used, total = totals.rows_used, totals.rows_given
    text = f"{used:,} of {total:,} rows ({', '.join(source['formats'])}) can be used"
    if totals.rows_split:
        text += f", {totals.rows_split:,} of them split"
    if dropped := source["rows_dropped"]:
        reasons = (f"{entry['count']:,} {reason}" for reason, entry in dropped.items())
        text += f", dropped: {'; '.join(reasons)}"
    for what, entry in source.get("rows_noted", {}).items():
        text += f", {entry['count']:,} with {what}"
    return f"{text}: {totals.tokens:,} tokens, {totals.supervised_tokens:,} learned"
