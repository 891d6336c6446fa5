"""Rows longer than ``train.max_length``: refused, dropped, or cut on either side."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_slim.errors import SlimError


def test_truncation_policies(make: Any, tokens: Any) -> None:
    rows = [{"prompt": "p" * 20, "completion": "c" * 30}, {"prompt": "a", "completion": "b"}]
    whole = make(rows).train.row(0)[0]
    limit = 60
    assert len(whole) > limit
    with pytest.raises(SlimError, match=r"rows.jsonl, line 1: \d+ tokens, longer than") as error:
        make(rows, truncation="error", max_length=limit)
    assert "drop" in error.value.hint
    dropped = make(rows, truncation="drop", max_length=limit)
    assert len(dropped.train) == 1
    assert dropped.ledger["sources"][0]["rows_dropped"]["longer than 60 tokens"]["count"] == 1
    right = make(rows, truncation="right", max_length=limit)
    assert right.train.row(0)[0].tolist() == whole[:limit].tolist()
    left = make(rows, truncation="left", max_length=limit)
    assert left.train.row(0)[0].tolist() == [whole[0], *whole[1 - limit :]]
    record = left.ledger["sources"][0]
    assert record["rows_truncated"] == {"count": 1, "first": ["rows.jsonl, line 1"]}
    assert record["tokens_cut"] == len(whole) - limit
    cut = make([{"prompt": "p" * 90, "completion": "c"}, *rows], truncation="right", max_length=60)
    assert cut.ledger["sources"][0]["rows_dropped"]["no supervised token left"]["count"] == 1


@pytest.mark.parametrize("length", [200, 100_000])  # the second is cut before it is tokenised
@pytest.mark.parametrize("wrote_bos", [True, False])
def test_a_left_cut_leaves_the_bos_in_front(
    make: Any, tokens: Any, base_tokens: Any, length: int, wrote_bos: bool
) -> None:
    """One that the tokenizer adds, and one that the chat template writes."""
    tokenizer = tokens if wrote_bos else base_tokens
    row = [{"prompt": "p" * length, "completion": "the end"}]
    ids, supervised = make(row, tokenizer=tokenizer, truncation="left", max_length=64).train.row(0)
    assert len(ids) == 64
    assert (ids == tokenizer.bos_token_id).nonzero()[0][0] == 0
    text = tokenizer.decode(ids)
    assert text.startswith("<|im_start|>p")
    assert not supervised[0]
    assert tokenizer.decode(ids[supervised]).strip().startswith("the end")


def test_a_left_cut_without_bos_keeps_the_last_tokens(make: Any, base_tokens: Any) -> None:
    row = [{"text": "".join(map(str, range(100)))}]
    base_tokens.bos_token = None
    whole = make(row, tokenizer=base_tokens).train.row(0)[0]
    cut = make(row, tokenizer=base_tokens, truncation="left", max_length=16).train.row(0)[0]
    base_tokens.bos_token = "<|im_start|>"
    assert cut.tolist() == whole[-16:].tolist()
