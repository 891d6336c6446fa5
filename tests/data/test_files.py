"""Data files of every kind: each gives the right rows, or one line that says what is wrong."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.config.schema import SourceConfig
from mlx_slim.data import sources
from mlx_slim.data.readers import count_lines, is_data, suffix_of
from mlx_slim.errors import SlimError

AB, CD = {"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}
ONE, TWO = json.dumps(AB), json.dumps(CD)


def rows(path: Path) -> Any:
    return list(sources.find(SourceConfig(path=str(path))))


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "unit"),
    [
        ("ROWS.JSONL", f"{ONE}\n{TWO}\n", "line"),
        ("a.ndjson", f"{ONE}\n{TWO}", "line"),
        ("bom.jsonl", f"\ufeff{ONE}\r\n{TWO}\r\n", "line"),
        ("cr.jsonl", f"{ONE}\r{TWO}\r", "line"),
        ("array.jsonl", f"[{ONE},{TWO}]", "row"),
        ("array-lines.jsonl", f"\ufeff[\r\n{ONE},\r\n{TWO}\r\n]\r\n", "row"),
        ("pretty.jsonl", json.dumps(AB, indent=1) + "\n" + json.dumps(CD, indent=1), "row"),
        ("pretty.json", "\ufeff" + json.dumps(AB, indent=2) + "\n\n" + json.dumps(CD), "row"),
        ("array.json", json.dumps([AB, CD], indent=1), "row"),
        ("wrapped.json", json.dumps({"version": "0.1.0", "data": [AB, CD]}), "data, row"),
        ("wrapped.jsonl", json.dumps({"rows": [AB, CD], "n": 2}, indent=1), "rows, row"),
        ("a.csv", "prompt,completion\na,b\n\nc,d\n", "line"),
        ("semicolons.csv", "\ufeffprompt;completion\r\na;b\r\nc;d\r\n", "line"),
        ("blank-first.csv", "\n \nprompt;completion\na;b\nc;d\n", "line"),
        ("a.tsv", "prompt\tcompletion\na\tb\nc\td", "line"),
        ("a.jsonl.gz", gzip.compress(f"{ONE}\n{TWO}\n".encode(), mtime=0), "line"),
        ("a.json.gz", gzip.compress(json.dumps([AB, CD]).encode(), mtime=0), "row"),
        ("A.CSV.GZ", gzip.compress(b"prompt,completion\na,b\nc,d\n", mtime=0), "line"),
    ],
)
def test_rows_of_every_kind(tmp_path: Path, name: str, content: Any, unit: str) -> None:
    actual = rows(write(tmp_path / name, content))
    assert [row.value for row in actual] == [AB, CD]
    assert actual[0].place.startswith(f"{name}, {unit} ")


def test_a_single_object_is_a_row_even_where_a_column_is_called_data(tmp_path: Path) -> None:
    row = {"prompt": "a", "completion": "b", "data": "x", "items": []}
    assert rows(write(tmp_path / "a.json", json.dumps(row)))[0].value == row
    assert rows(write(tmp_path / "b.jsonl", ONE))[0].place == "b.jsonl, line 1"


def test_text_keeps_what_unicode_calls_line_ends(tmp_path: Path) -> None:
    row = {"prompt": "a\u2028b\x85c\x00", "completion": "d\u2029e"}
    path = write(tmp_path / "a.jsonl", json.dumps(row, ensure_ascii=False) + f"\n{ONE}\n")
    assert [r.value for r in rows(path)] == [row, AB]
    (actual,) = rows(write(tmp_path / "b.txt", "one\u2028still one\x85\ntwo"))
    assert actual.value == {"text": "one\u2028still one\x85\ntwo"}
    assert len(rows(write(tmp_path / "c.txt", "one\r\rtwo\r"))) == 2


def test_blank_lines_before_a_header_count_as_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "\n\nprompt;completion\na;b\n\nc;d\n")
    assert [row.number for row in rows(path)] == [4, 6]


def test_cells_may_hold_separators_quotes_and_lines(tmp_path: Path) -> None:
    text = 'prompt,completion\n"a, ""b""\r\n\r\nc",d\n'
    (row,) = rows(write(tmp_path / "a.csv", text))
    assert row.value == {"prompt": 'a, "b"\r\n\r\nc', "completion": "d"}
    assert row.place == "a.csv, line 2"


def test_the_index_that_pandas_writes_is_a_column_of_its_own(tmp_path: Path) -> None:
    (row,) = rows(write(tmp_path / "a.csv", ",prompt,completion\n0,a,b\n"))
    assert row.value == {"Unnamed: 0": "0", **AB}


@pytest.mark.parametrize("stream", [True, False])
def test_arrow_files(tmp_path: Path, stream: bool) -> None:
    import pyarrow

    table = pyarrow.Table.from_pylist([AB, CD] * 1500)
    path = str(tmp_path / "a.arrow")
    new = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with new(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=1100)
    assert [row.value for row in rows(Path(path))] == [AB, CD] * 1500
    with pytest.raises(SlimError, match=r"b\.arrow is not a readable Arrow file"):
        rows(write(tmp_path / "b.arrow", Path(path).read_bytes()[:100]))


@pytest.mark.parametrize(
    ("name", "content", "message", "hint"),
    [
        ("a.jsonl", ONE.encode("utf-16"), "a.jsonl is UTF-16", "iconv -f UTF-16"),
        ("a.jsonl", ONE.encode("utf-16-le"), "a.jsonl is UTF-16", "iconv"),
        ("a.csv", "prompt,completion\na,b".encode("utf-32"), "a.csv is UTF-32", "iconv"),
        ("a.jsonl", f"{ONE},\n{TWO},\n", "line 1.*a comma after the object", "remove the commas"),
        ("a.json", f"[{ONE},]", "line 1: .*a comma before the ']'", ""),
        ("a.jsonl", f'{ONE}\n{ONE[:-1]}, "completion": "c"}}', "line 2: .*'completion' stands", ""),
        ("a.json", f'[{ONE[:-1]}, "prompt": "c"}}]', "line 1.*'prompt' stands twice", ""),
        ("a.json", f'{ONE[:-1]},\n"prompt": "c"}}', "line 2.*'prompt' stands twice", ""),
        ("a.jsonl", f'{ONE}\n{{"prompt": "\\ud83d x"}}', "line 2: 'prompt' holds '.ud83d' at", ""),
        ("a.json", '[{"a": {"b": ["x", "\\ude00"]}}]', "row 1: 'a'.b holds '.ude00' at", ""),
        ("a.jsonl", '{"prompt": "a"\n{"prompt": "b"}', "line 2: malformed JSON: expected ','", ""),
        ("a.jsonl", '{"prompt": }\n' + ONE, "line 1, column 12: malformed", "every line"),
        ("a.jsonl", '{"a": ' * 70 + "1" + "}" * 70, "a.jsonl, line 1 is nested deeper", ""),
        ("a.json", f'[{{"n": {"9" * 6000}}}]', "line 1: .*an integer of 6,000 digits", ""),
        ("a.json", '{"train": [{}], "test": [{}]}', "two lists of rows, 'train' and 'test'", ""),
        ("a.json", '{"data": [{}]} {"data": [{}]}', "text after the object", ""),
        (
            "a.csv",
            "prompt,completion\na,b\na,b,c\n",
            "a.csv, line 3: 3 cells, the header has 2",
            "",
        ),
        ("a.csv", "prompt,prompt\na,b\n", "two columns are called 'prompt'", ""),
        ("a.csv", ",prompt,\n0,a,b\n", "a column has no name", ""),
        ("a.csv", 'prompt,completion\na,b\nc,"d', "a.csv, line 3: not a valid table", ""),
        ("a.tsv", 'prompt\tcompletion\n"a" x\tb\n', "a.tsv, line 2: not a valid table", "quote"),
        ("a.csv", "prompt,completion\n", "empty, no row", ""),
        ("a.csv", b"prompt,completion\na,\xe9\n", "a.csv, line 2: byte 0xe9 at byte offset 20", ""),
        (
            "a.jsonl.gz",
            gzip.compress(ONE.encode() * 99, mtime=0)[:30],
            "a.jsonl.gz cannot be unpacked",
            "",
        ),
        ("a.jsonl.gz", ONE, "a.jsonl.gz cannot be unpacked", ""),
        ("a.jsonl.zst", ONE, "unknown extension '.zst'", "data files are .arrow, .csv"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    tmp_path: Path, name: str, content: Any, message: str, hint: str
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(SlimError, match=message) as error:
        rows(path)
    assert hint in error.value.hint
    assert "\n" not in str(error.value)


def test_pairs_of_surrogates_are_characters(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"prompt": "\\ud83d\\ude00", "completion": "b"}')
    assert rows(path)[0].value["prompt"] == "😀"


def test_endings_count_in_any_case_and_with_gz() -> None:
    assert suffix_of("x.train.JSONL.GZ") == ".jsonl.gz"
    assert suffix_of("x.jsonl") == ".jsonl"
    assert not is_data("x.gz")
    assert not is_data(".jsonl")


@pytest.mark.parametrize("name", ["big.jsonl", "big.json", "big.csv", "wrapped.json", "cr.jsonl"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    text = "x" * 4000
    row = json.dumps({"prompt": text, "completion": "b"})
    end = "\r" if name == "cr.jsonl" else "\n"
    if name.endswith(".csv"):
        content = "prompt,completion\n" + f"{text},b\n" * 6000
    elif name.endswith(".json"):
        content = "[" + ",".join([row] * 6000) + "]"
        content = content if name == "big.json" else f'{{"n": 1, "data": {content}}}'
    else:
        content = (row + end) * 6000
    path = write(tmp_path / name, content)
    del content
    tracemalloc.start()
    count = sum(1 for _ in sources.find(SourceConfig(path=str(path))))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 6000
    assert peak < 9_000_000  # of 24 MB


def test_lines_are_counted_where_they_are_rows(tmp_path: Path) -> None:
    assert count_lines(write(tmp_path / "a.jsonl", f"\n\ufeff{ONE}\n\n{TWO}")) == 2
    assert count_lines(write(tmp_path / "b.jsonl", f"[{ONE},{TWO}]")) is None
    assert count_lines(write(tmp_path / "c.jsonl", json.dumps(AB, indent=1))) is None
    assert count_lines(write(tmp_path / "d.csv", "prompt,completion\na,b")) is None


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = pyarrow.array(["a", "b"])
    inner = pyarrow.struct([("role", pyarrow.string()), ("role", pyarrow.string())])
    tables = {
        "completion": pyarrow.table([texts] * 3, names=["prompt", "completion", "completion"]),
        "role": pyarrow.table({"messages": pyarrow.array([[]] * 2, pyarrow.list_(inner))}),
    }
    for name, table in tables.items():
        parquet.write_table(table, tmp_path / "a.parquet")
        with pyarrow.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as file:
            file.write_table(table)
        for suffix in ("parquet", "arrow"):
            with pytest.raises(SlimError, match=f"a.{suffix}: two columns are called '{name}'"):
                rows(tmp_path / f"a.{suffix}")
