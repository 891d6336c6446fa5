"""Parquet: the rows that pyarrow reads, and no file that unpacks to far more than it has."""

from __future__ import annotations

import datetime
import decimal
import random
import resource
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlx_slim.data.parquet import read_parquet
from mlx_slim.errors import SlimError


class Told:
    blank_lines = 0
    unit = ""


def rows_of(path: Path) -> list:
    return [row for _, row in read_parquet(path, Told())]


CHATS = pa.table(
    {
        "prompt": ["a", "bb", "ccc"] * 5,
        "messages": [[{"role": "user", "content": "hello"}, {"role": "assistant"}]] * 15,
        "number": list(range(15)),
    }
)
KINDS = [
    {},
    {"compression": "zstd", "data_page_version": "2.0"},
    {"use_dictionary": False, "compression": "none"},
    {"store_schema": False, "row_group_size": 1},
]


@pytest.mark.parametrize("options", KINDS)
def test_every_type_is_read_as_pyarrow_reads_it(tmp_path: Path, options: Any) -> None:
    pairs = pa.map_(pa.string(), pa.int64())
    table = pa.table(
        {
            "text": ["a", None],
            "large": pa.array(["x", "y"], pa.large_string()),
            "bytes": [b"1", b"2"],
            "fixed": pa.array([b"ab", b"cd"], pa.binary(2)),
            "category": pa.array(["p", "q"]).dictionary_encode(),
            "integer": [1, 2],
            "number": [1.5, None],
            "yes": [True, False],
            "nothing": pa.nulls(2),
            "time": [datetime.datetime(2020, 1, 1)] * 2,
            "price": [decimal.Decimal("1.5")] * 2,
            "pairs": pa.array([[("a", 1)], []], pairs),
            "object": [{"a": "x", "b": [{"c": "d"}]}, None],
            "lists": [[["a"], []], None],
        }
    )
    path = tmp_path / "t.parquet"
    pq.write_table(table, path, **options)
    assert rows_of(path) == pq.read_table(path).to_pylist()
    pq.write_table(table.slice(0, 0), path, **options)
    assert rows_of(path) == []


def dictionary_bomb(path: Path) -> None:
    """200,000 rows of a megabyte in a thousand bytes."""
    indices = pa.nulls(200_000, pa.int32()).fill_null(0)
    long = pa.DictionaryArray.from_arrays(indices, pa.array(["y" * (1 << 20)]))
    pq.write_table(pa.table({"text": long}), path, compression="zstd")


def nested_dictionary_bomb(path: Path) -> None:
    """One row that lists a text of a megabyte 30,000 times."""
    indices = pa.nulls(30_000, pa.int32()).fill_null(0)
    long = pa.DictionaryArray.from_arrays(indices, pa.array(["y" * (1 << 20)]))
    rows = pa.ListArray.from_arrays(pa.array([0, 30_000], pa.int32()), long)
    pq.write_table(pa.table({"messages": rows}), path, compression="zstd")


def page_bomb(path: Path) -> None:
    table = pa.table({"text": ["z" * (65 << 20)]})
    pq.write_table(table, path, compression="zstd", use_dictionary=False)


def row_bomb(path: Path) -> None:
    pq.write_table(pa.table({"text": pa.nulls(20_000_000, pa.string())}), path)


def list_bomb(path: Path) -> None:
    """One row whose list has thirty million nulls."""
    offsets = pa.array([0, 30_000_000], pa.int32())
    rows = pa.ListArray.from_arrays(offsets, pa.nulls(30_000_000, pa.int8()))
    pq.write_table(pa.table({"messages": rows}), path)


def deep_schema(path: Path) -> None:
    kind = pa.string()
    for _ in range(80):
        kind = pa.struct([("a", kind)])
    pq.write_table(pa.table({"text": pa.nulls(1, kind)}), path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (dictionary_bomb, "unpacks to more than"),
        (nested_dictionary_bomb, "row 1: 30001 MB, expected at most 256"),
        (page_bomb, "unpacks to 68,15"),
        (row_bomb, "20,000,000 rows, too many for"),
        (list_bomb, "holds 30,000,000 values"),
        (deep_schema, "nested deeper than 64 levels"),
        (lambda path: path.write_bytes(b""), "not a readable Parquet file: incomplete"),
        (lambda path: path.write_bytes(b"PAR1" + b"\xff" * 8 + b"PAR1"), "footer would take"),
        (lambda path: path.write_bytes(b"PAR1\0\x01\0\0\0PAR1"), "no schema"),
    ],
)
def test_a_file_that_unpacks_to_too_much_is_one_line(tmp_path: Path, make: Any, words: str) -> None:
    path = tmp_path / "t.parquet"
    make(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    with pytest.raises(SlimError, match=words) as caught:
        for _ in read_parquet(path, Told()):
            pass
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("t.parquet")
    assert time.process_time() - start < 3
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * (1 if sys.platform == "darwin" else 1024) < 160 << 20


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, path)
    with pytest.raises(SlimError, match="two columns are called 'text'"):
        rows_of(path)


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    draw = random.Random(0)
    path = tmp_path / "t.parquet"
    sources = []
    for options in KINDS[:3]:
        pq.write_table(CHATS, path, **options)
        sources.append(path.read_bytes())
    refused = 0
    for _ in range(300):
        data = bytearray(draw.choice(sources))
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(4, len(data) - 8)
            data[at : at + draw.randint(0, 4)] = draw.randbytes(draw.randint(0, 4))
        path.write_bytes(data)
        try:
            rows_of(path)
        except SlimError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 200
