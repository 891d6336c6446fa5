"""A list of runs gives each position what it has in a row alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_slim.data.collate import TokenNode
from mlx_slim.models import token_list
from mlx_slim.models.load import load
from mlx_slim.models.logits_close import Change, logits_close
from mlx_slim.models.token_list import Before, TokenList, longest_row, token_lists
from tests.support.tiny import ARCHITECTURES, MIXTURES, tiny_model

DRAW = random.Random(3)
# A run, three short siblings of which one has children, a run longer than a tile, and its child.
RUNS = [(7, -1), (3, 0), (2, 0), (4, 2), (1, 2), (5, 0), (300, -1), (2, 6)]


def _nodes() -> tuple[list[TokenNode], list[int], list[list[int]]]:
    """Return nodes, their tokens, and the places in the list of each path from a root."""
    nodes: list[TokenNode] = []
    rows: list[list[int]] = []
    for length, parent in RUNS:
        begin = nodes[-1].end if nodes else 0
        above = None if parent < 0 else nodes[parent]
        path = () if above is None else (*above.path, (above.begin, above.end))
        depth = 0 if above is None else above.depth + above.end - above.begin
        nodes.append(TokenNode(begin, begin + length, depth, path))
        rows.append([p for span in (*path, (begin, begin + length)) for p in range(*span)])
    return nodes, [DRAW.randint(3, 200) for _ in range(nodes[-1].end)], rows


def _listed(model: Any, tokens: list[int], passed: TokenList) -> mx.array:
    with token_lists(), passed.computed():
        logits = model(mx.array([tokens]))
        mx.eval(logits)
    return logits[0]


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MIXTURES])
def test_every_position_is_that_of_its_row(tmp_path: Path, architecture: str) -> None:
    model: Any = load(tiny_model(tmp_path / "m", architecture), dtype=mx.float32).model
    nodes, tokens, rows = _nodes()
    assert longest_row(model) > 0
    logits = _listed(model, tokens, TokenList(nodes))
    for row in rows:
        alone = model(mx.array([[tokens[place] for place in row]]))[0]
        assert logits_close(logits[mx.array(row)], alone, Change.SHAPES).close


def test_a_list_behind_what_was_computed_before(tiny: Callable[..., Path]) -> None:
    model: Any = load(tiny("llama"), dtype=mx.float32).model
    nodes, tokens, rows = _nodes()
    before: Before = []
    root = [DRAW.randint(3, 200) for _ in range(9)]
    for piece in (root[:5], root[5:]):  # keys and values of the second stand behind the first's
        passed = TokenList([TokenNode(0, len(piece), 0, ())], before, keep=True)
        _listed(model, piece, passed)
        before = passed.pairs
    assert {keys.shape[1] for keys, _ in before} == {len(root)}
    passed = TokenList(nodes, before)
    logits = _listed(model, tokens, passed)
    assert passed.pairs == []
    for row in rows:
        alone = model(mx.array([root + [tokens[place] for place in row]]))[0, len(root) :]
        assert logits_close(logits[mx.array(row)], alone, Change.SHAPES).close


def test_few_scores_at_a_time_change_nothing(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = load(tiny("llama"), dtype=mx.float32).model
    nodes, tokens, _ = _nodes()
    whole = _listed(model, tokens, TokenList(nodes))
    monkeypatch.setattr(token_list, "BLOCK", 1)
    apart = _listed(model, tokens, TokenList(nodes))
    assert np.abs(np.array(whole) - np.array(apart)).max() < 1e-5


def test_what_is_no_list_is_refused(tiny: Callable[..., Path]) -> None:
    model: Any = load(tiny("llama"), dtype=mx.float32).model
    nodes, tokens, _ = _nodes()
    with pytest.raises(ValueError, match="not a list of 324 positions in float32"):
        _listed(model, tokens[:-1], TokenList(nodes))
    low: Any = load(tiny("llama"), dtype=mx.bfloat16).model
    assert longest_row(low) == 0


def test_nothing_stays_patched(tiny: Callable[..., Path]) -> None:
    stock = mx.fast.rope, mx.fast.scaled_dot_product_attention
    with pytest.raises(RuntimeError), token_lists(), token_lists():
        assert mx.fast.rope is not stock[0]
        raise RuntimeError
    assert (mx.fast.rope, mx.fast.scaled_dot_product_attention) == stock
    model: Any = load(tiny("llama"), dtype=mx.float32).model
    row = mx.array([[5, 6, 7]])
    with token_lists():  # a thread without a list computes as ever
        inside = model(row)
        mx.eval(inside)
    assert mx.array_equal(inside, model(row)).item()
