"""Data configuration in, tokenised rows and their ledger out.

Invariant: every row given is used, or counted in the ledger with a reason; the same sources and
settings give the same rows in the same order, whatever the batches look like later. What is on disk
already under the same fingerprint is reused. Try it: ``mlx-slim data preview smollm2-lora``.
"""

from __future__ import annotations

import filecmp
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_slim.artifacts import atomic_folder, hash_json, remove_folder, write_json
from mlx_slim.config.preference import PreferenceRows
from mlx_slim.config.schema import DataConfig, SourceConfig
from mlx_slim.data import overlap, sources
from mlx_slim.data.collate import RowStore
from mlx_slim.data.fingerprint import fingerprint_difference, source_fingerprint, without_rows
from mlx_slim.data.formats import check_renamed
from mlx_slim.data.ledger import LEDGER_FILE, SourceLedger, split_ledger, totals
from mlx_slim.data.pipeline import (
    ChunkTokenizer,
    Pipeline,
    RowChunk,
    TokenizedChunk,
    tokenize_source,
)
from mlx_slim.data.sources import Source
from mlx_slim.data.split import no_row_left, quotas, split_rows, weighted, whole_units
from mlx_slim.data.store import TokenStore, TokenWriter
from mlx_slim.data.with_prompts import WithPrompts
from mlx_slim.data.workers import Workers
from mlx_slim.errors import RowLimit, SlimError
from mlx_slim.reading import JsonObject, library_errors, read_object, short

__all__ = ["Prepared", "fingerprint_difference", "prepare"]

# Of the stored rows: raise one when the same settings would give other rows.
# 2: with truncation=left the BOS stays in front. 3: weights of turns, tools, exact spans.
# 4: long texts are split.
_VERSION = 4
_VALIDATION_ROWS = "held_out"  # the folder of rows that data.validation names
_FILES = ("rows", _VALIDATION_ROWS, "train.npy", "validation.npy", "prepared.json")
_SPLIT = ("split", "split_overlap")


@dataclass(frozen=True)
class Prepared:
    """What training reads.

    Attributes:
        train: Training rows, sources in order, weights applied.
        validation: Validation rows, or None.
        ledger: Every row accounted for (also in ``data_ledger.json``).
        fingerprint: What the rows were made from; compare with ``fingerprint_difference``.
        note: What a user should know of rows that an older version stored; empty otherwise.
        unit: Neighbouring rows that are never separated: 2 for both answers of a pair.
        with_prompts: Of each unit's first row the prompt is learned too (``data/with_prompts.py``).
    """

    train: TokenStore
    validation: TokenStore | None
    ledger: JsonObject
    fingerprint: JsonObject
    note: str = ""
    unit: int = 1
    with_prompts: bool = False

    @property
    def train_view(self) -> RowStore:
        """The training rows as batches read them."""
        return WithPrompts(self.train, self.unit) if self.with_prompts else self.train

    @property
    def validation_view(self) -> RowStore | None:
        """The validation rows as batches read them."""
        if self.validation is None or not self.with_prompts:
            return self.validation
        return WithPrompts(self.validation, self.unit)

    @property
    def prompted(self) -> TokenStore | None:
        """The validation rows, one a prompt."""
        rows = self.validation
        if rows is None or self.unit == 1:
            return rows
        return TokenStore(rows.folder, index=rows.index[:: self.unit])


# ---------------------------------------------------------------------------- the whole


def prepare(
    config: DataConfig,
    tokenizer: Any,
    *,
    max_length: int,
    seed: int,
    folder: Path,
    unchanged: bool = False,
    find: Callable[[SourceConfig], Source] = sources.find,
    processes: int | None = None,
    limit: RowLimit | None = None,
    preference: PreferenceRows | None = None,
) -> Prepared:
    """Tokenise the rows of a recipe into ``folder/tokens`` and write ``folder/data_ledger.json``.

    Args:
        config: The ``data`` section.
        tokenizer: mlx-lm's ``TokenizerWrapper``, or a fast Hugging Face tokenizer.
        max_length: Longest row, tokens.
        seed: Decides the validation split and fractional weights, nothing else.
        folder: Where rows and ledger go; rows of the same fingerprint there are reused.
        unchanged: Refuse, and leave the folder alone, if its rows have another fingerprint.
        find: Finds a source; a caller that knows tasks gives its own.
        processes: That tokenise; None takes one a core. The rows do not depend on it.
        limit: The longest row that all models that read the rows compute right.
        preference: What a row is where answers are compared; both answers of a pair are
            neighbours, the chosen one first.

    Raises:
        SlimError: On unusable sources or rows, each named with file and line.
        ResourceError: If the disk is full.
    """
    if limit is not None and limit.tokens >= max_length:
        limit = None
    pipeline = Pipeline(
        config, tokenizer, max_length=max_length, limit=limit, preference=preference
    )
    sources = [(find(source), source) for source in config.sources]
    validation_source = _validation_source(config, find)
    settings = {
        "version": _VERSION,
        "sources": [source_fingerprint(*pair) for pair in sources],
        "validation": source_fingerprint(*validation_source)
        if validation_source
        else config.validation,
        "template": {"name": pipeline.template.name, "sha256": pipeline.template.key},
        "tokenizer": pipeline.encoder.fingerprint(),
        "settings": {
            "max_length": max_length,
            "seed": seed,
            **config.model_dump(
                include={"mask_prompt", "learn", "truncation", "system", "columns", *_SPLIT}
            ),
            "max_rows": config.max_rows,
            **({"limit": limit.tokens} if limit else {}),  # rows kept from before it was known
        },
        **({"preference": preference} if preference else {}),
    }
    tokens = folder / "tokens"
    state = tokens / "prepared.json"
    stored = read_object(state, fingerprint=dict, ledger=dict) if state.is_file() else None
    if stored is not None and without_rows(stored["fingerprint"]) == settings:
        if not (folder / LEDGER_FILE).is_file():
            write_json(folder / LEDGER_FILE, stored["ledger"])
        return _open(tokens, stored["fingerprint"], stored["ledger"])

    def write(target: Path) -> tuple[JsonObject, JsonObject]:
        checker = overlap.Checker.from_mirror()
        with Workers(ChunkTokenizer(pipeline, checker.index is not None), processes) as workers:
            return _write(
                workers,
                checker,
                sources,
                validation_source,
                settings,
                target,
                config=config,
                seed=seed,
            )

    if stored is not None and unchanged:
        lines = fingerprint_difference(_as_of_today(stored["fingerprint"], settings), settings)
        if lines:
            raise SlimError(
                f"the data of {folder} changed since it was started: {'; '.join(lines)}",
                "resume with the same data, or start a new run",
            )
        version = stored["fingerprint"].get("version")
        with tempfile.TemporaryDirectory() as scratch:
            write(Path(scratch))
            if not _same_rows(tokens, Path(scratch)):
                raise SlimError(
                    f"{folder} was started by an older version (data.version {version}), and this "
                    "one tokenizes or masks its rows differently",
                    "finish it with the version that started it, or start a new run",
                )
        prepared = _open(tokens, stored["fingerprint"], stored["ledger"])
        note = f"{tokens} was written by an older version (data.version {version}): same rows"
        return replace(prepared, note=note)
    with atomic_folder(tokens, replace=True) as temporary:
        fingerprint, ledger = write(temporary)
        write_json(temporary / "prepared.json", {"fingerprint": fingerprint, "ledger": ledger})
        remove_folder(tokens, _FILES)  # of other rows: no file of theirs may stand beside these
    write_json(folder / LEDGER_FILE, ledger)
    return _open(tokens, fingerprint, ledger)


def sources_of(config: DataConfig, store: TokenStore) -> list[tuple[SourceConfig, int | None]]:
    """Return the sources that the folder of a store was made of, with the rows taken of each."""
    if store.folder.name == _VALIDATION_ROWS and isinstance(config.validation, str):
        return [(_validation_config(config, config.validation), None)]
    weights = [source.weight for source in config.sources]
    return list(zip(config.sources, quotas(config.max_rows, weights), strict=True))


def _validation_config(config: DataConfig, path: str) -> SourceConfig:
    return SourceConfig(path=path, format=config.format, split="validation")


def _validation_source(
    config: DataConfig, find: Callable[[SourceConfig], Source]
) -> tuple[Source, SourceConfig] | None:
    if not isinstance(config.validation, str):
        return None
    source = _validation_config(config, config.validation)
    return find(source), source


def _as_of_today(fingerprint: JsonObject, today: JsonObject) -> JsonObject:
    """Return an older version's fingerprint with this version's number and settings.

    Settings that the older version did not have stand at what it did: it learned all answers. It
    split no text: whether there is one to split, the rows themselves say.
    """
    stored = without_rows(fingerprint)
    split = {key: today["settings"][key] for key in _SPLIT}
    settings = {"learn": "all", **split, **stored["settings"]}
    return {**stored, "version": _VERSION, "settings": settings}


def _same_rows(old: Path, new: Path) -> bool:
    """Return whether two folders of rows hold the same tokens, targets, weights and split."""
    files = [
        {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
        - {Path("prepared.json")}
        for folder in (old, new)
    ]
    return files[0] == files[1] and all(
        filecmp.cmp(old / name, new / name, shallow=False) for name in files[0]
    )


def _open(tokens: Path, fingerprint: JsonObject, ledger: JsonObject) -> Prepared:
    key = hash_json(fingerprint)
    with library_errors(f"{short(tokens)} is damaged", "remove it: it is made again"):
        index, chosen = (np.load(tokens / f"{part}.npy") for part in ("train", "validation"))
    train = TokenStore(tokens / "rows", index=index, fingerprint=f"{key}:train")
    name = _VALIDATION_ROWS if (tokens / _VALIDATION_ROWS).is_dir() else "rows"
    validation = None
    if len(chosen):
        validation = TokenStore(tokens / name, index=chosen, fingerprint=f"{key}:validation")
    unit = unit_of(fingerprint)
    return Prepared(train, validation, ledger, fingerprint, unit=unit)


def unit_of(fingerprint: JsonObject) -> int:
    """Return how many neighbouring rows are never separated."""
    return 2 if fingerprint.get("preference") == "pairs" else 1


def _write(
    workers: Workers[RowChunk, TokenizedChunk],
    checker: overlap.Checker,
    sources: list[tuple[Source, SourceConfig]],
    validation_source: tuple[Source, SourceConfig] | None,
    settings: JsonObject,
    folder: Path,
    *,
    config: DataConfig,
    seed: int,
) -> tuple[JsonObject, JsonObject]:
    """Read, tokenise, split; return the full fingerprint and the ledger."""
    unit = unit_of(settings)
    writer = TokenWriter(folder / "rows")
    ledgers: list[SourceLedger] = []
    row_quotas = quotas(config.max_rows, [source.weight for _, source in sources])
    bounds = [0]
    for (source, source_config), quota in zip(sources, row_quotas, strict=True):
        ledger = SourceLedger(source.name, source.kind, source_config.weight, source.ignored)
        ledgers.append(ledger)
        for answer in tokenize_source(workers, source, source_config, ledger, quota):
            writer.add(answer.tokens)
            for raw, texts in answer.texts:
                checker.add(raw, texts)
        bounds.append(len(writer))
    hashes = writer.close()
    check_renamed(config.columns, set().union(*(ledger.columns for ledger in ledgers)))
    if not len(hashes):
        reasons = "; ".join(text for ledger in ledgers for text in ledger.reasons())
        cut = "data.truncation=left" if "preference" in settings else "data.split=true"
        shorter = f"raise train.max_length, or cut rows with {cut}; "
        raise SlimError(
            f"no row can be used: {sum(ledger.rows_read for ledger in ledgers):,} given, {reasons}",
            shorter * ("longer than" in reasons) + "see them with: mlx-slim data preview",
        )
    validation_ledger = None
    if validation_source:
        validation_ledger = SourceLedger(
            validation_source[0].name, validation_source[0].kind, 1.0, []
        )
        held_writer = TokenWriter(folder / _VALIDATION_ROWS)
        for answer in tokenize_source(workers, *validation_source, validation_ledger):
            held_writer.add(answer.tokens)
        held_hashes = held_writer.close()
        if not len(held_hashes):
            raise SlimError(
                f"no row of the validation file {validation_source[0].name} can be used"
            )
        validation, candidates = np.arange(len(held_hashes)), len(hashes)
        remaining = np.flatnonzero(~np.isin(hashes, held_hashes))
    else:
        validation, remaining = split_rows(config.validation, hashes, writer.texts(), seed)
        candidates = len(hashes) - len(validation)
    remaining = whole_units(remaining, unit)
    if not len(remaining):
        raise no_row_left(candidates // unit)
    train = weighted(remaining, bounds, [source.weight for _, source in sources], seed, unit)
    np.save(folder / "train.npy", train)
    np.save(folder / "validation.npy", validation)
    fingerprint = {
        **settings,
        "sources": [
            {**source, "rows": ledger.rows_read}
            for source, ledger in zip(settings["sources"], ledgers, strict=True)
        ],
    }
    ledger = {
        "schema_version": 1,
        "template": settings["template"]["name"],
        "max_length": settings["settings"]["max_length"],
        "truncation": config.truncation,
        "sources": [ledger.as_record() for ledger in ledgers],
        "totals": asdict(totals(ledgers, hashes)),
        "split": split_ledger(
            config.validation,
            train[::unit],
            validation[::unit],
            (candidates - len(remaining)) // unit,
        ),
        "evaluation_overlap": checker.report(),
    }
    if validation_ledger:
        ledger["validation_source"] = validation_ledger.as_record()
    return fingerprint, ledger
