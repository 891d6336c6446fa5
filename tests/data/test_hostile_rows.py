"""Rows of others: no file that is none, no bomb, nothing deeper or longer than rows are."""

from __future__ import annotations

import gzip
import json
import os
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from mlx_slim.config.schema import SourceConfig
from mlx_slim.data.sources import find
from mlx_slim.errors import SlimError

DEEP = '{"text": ' + "[" * 500 + "]" * 500 + "}"
TWICE = "{" + ",".join(f'"k{n}": 0' for n in range(200_000)) + ', "k199999": 1}'
LONG = b'{"text": "' + b"x" * (65 << 20)


def refused(path: Path) -> str:
    start = time.thread_time()
    with pytest.raises(SlimError) as caught:
        for _ in find(SourceConfig(path=str(path))):
            pass
    assert time.thread_time() - start < 5
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt", ".parquet", ".arrow"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, suffix: str) -> None:
    fifo, loop, zero = (tmp_path / f"{name}{suffix}" for name in ("fifo", "loop", "zero"))
    os.mkfifo(fifo)
    loop.symlink_to(loop)
    zero.symlink_to("/dev/zero")
    assert "is a FIFO, expected a regular file" in refused(fifo)
    assert "links" in refused(loop)
    assert "is a device" in refused(zero)
    assert "a name of" in refused(tmp_path / ("n" * 5000 + suffix))
    assert "null" in refused(Path(f"a\0b{suffix}"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (DEEP, "nested deeper than 64 levels"),
        ("[" * 100_000, "nested too deeply"),
        ('{"text": ' + "9" * 6000 + "}", "an integer of 6,000 digits, expected at most 64"),
        (TWICE, "the key 'k199999' stands twice"),
        ('{"text": "\\ud800"}', "half of a character"),
        ("7", "a row is a JSON object"),
    ],
    ids=["deep", "deeper", "digits", "twice", "half", "number"],
)
def test_json_is_bounded(tmp_path: Path, text: Any, words: str) -> None:
    for name, whole in (("a.jsonl", text), ("a.json", f"[{text}]")):
        (tmp_path / name).write_text(whole)
        assert words in refused(tmp_path / name)


def test_a_line_has_an_end(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json", "a.txt", "a.csv"):
        (tmp_path / name).write_bytes(LONG)
        assert "more than 64 MB" in refused(tmp_path / name)


def test_a_packed_file_does_not_unpack_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=9) as handle:
        for _ in range(72):
            handle.write((b" " * 1023 + b"\n") * 1024)
    assert "unpacks to more than 6" in refused(path)
    rows = [{"text": "word " * 1000}] * 20
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    assert [row.value for row in find(SourceConfig(path=str(path)))] == rows


def test_an_arrow_file_s_texts_stay_in_their_dictionary(tmp_path: Path) -> None:
    indices = pa.nulls(30_000, pa.int32()).fill_null(0)
    long = pa.DictionaryArray.from_arrays(indices, pa.array(["y" * (1 << 20)]))
    rows = pa.ListArray.from_arrays(pa.array([0, 30_000], pa.int32()), long)
    table = pa.table({"messages": rows})
    with (
        pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    assert "row 1: 30001 MB" in refused(tmp_path / "a.arrow")
