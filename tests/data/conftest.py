"""A byte tokenizer, and a way to prepare rows given as Python objects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.config.schema import DataConfig
from mlx_slim.data.prepare import Prepared, prepare
from tests.support.tiny import CHATML, byte_tokenizer


def load_bytes(folder: Path, *, chat_template: str | None = CHATML, bos: bool = False) -> Any:
    from transformers import AutoTokenizer

    byte_tokenizer(folder, chat_template=chat_template, bos=bos)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The byte tokenizer of a chat model."""
    return load_bytes(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def base_tokens(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The byte tokenizer of a base model: no chat template, a BOS token."""
    return load_bytes(tmp_path_factory.mktemp("tokenizer"), chat_template=None, bos=True)


@pytest.fixture(autouse=True)
def no_mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLX_SLIM_DATA", raising=False)


@pytest.fixture
def make(tmp_path: Path, tokens: Any) -> Any:
    """Return a function: rows (or a path) and settings -> Prepared."""

    def go(
        rows: Any, *, tokenizer: Any = None, max_length: int = 4096, **settings: Any
    ) -> Prepared:
        path = rows
        if isinstance(rows, list):
            path = tmp_path / "rows.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        config = DataConfig(**{"path": str(path), "validation": 0, **settings})
        return prepare(
            config,
            tokenizer or tokens,
            max_length=max_length,
            seed=settings.get("seed", 0),
            folder=tmp_path / "prepared",
        )

    go.tokenizer = tokens  # type: ignore[attr-defined]
    go.folder = tmp_path  # type: ignore[attr-defined]
    return go


def learned(prepared: Prepared, tokenizer: Any, row: int = 0) -> tuple[str, str]:
    """Return the text of a row, and the text of its supervised tokens."""
    ids, supervised = prepared.train.row(row)
    return tokenizer.decode(ids), tokenizer.decode(ids[supervised])
