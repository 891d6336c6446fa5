"""The ledger's sums: written and read by one record."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest

from mlx_slim.data.ledger import RowCount, RowTotals, SourceLedger, totals
from mlx_slim.errors import SlimError


def test_totals_are_read_as_they_are_written() -> None:
    ledger = SourceLedger("a.jsonl", "file", 1.0, [])
    ledger.rows_read, ledger.used, ledger.tokens, ledger.supervised_tokens = 5, 3, 40, 20
    ledger.dropped["empty answer"] = RowCount(2, ["line 4"])
    sums = totals([ledger, ledger], np.array([1, 1, 2], dtype=np.uint64))
    assert (sums.rows_given, sums.rows_dropped, sums.exact_duplicates) == (10, 4, 1)
    assert RowTotals.read({"totals": asdict(sums)}, "data_ledger.json") == sums


def test_a_wrong_sum_is_named() -> None:
    with pytest.raises(SlimError, match=r"data_ledger.json: rows_used is 'x', expected a whole"):
        RowTotals.read({"totals": {"rows_used": "x"}}, "data_ledger.json")
    with pytest.raises(SlimError, match=r"data_ledger.json has no 'totals'"):
        RowTotals.read({}, "data_ledger.json")
