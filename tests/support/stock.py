"""Load a model with mlx-lm itself: what a folder of this package must stay readable by.

Invariant: nothing of ``mlx_slim`` is imported, so a model that loads here loads anywhere.
Run: ``python -m pytest tests/evaluation/scoring/test_generate.py``.
"""

from __future__ import annotations

from typing import Any

from mlx_lm import load


def stock_load(path: str, *, adapter_path: str | None = None, **options: Any) -> tuple[Any, Any]:
    """Return mlx-lm's model and tokenizer of a folder, with an adapter's weights if one is named.

    mlx-lm types its result as a pair or a triple, by a flag that no test passes.
    """
    loaded = load(path, adapter_path=adapter_path, **options)
    return loaded[0], loaded[1]
