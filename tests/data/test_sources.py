"""Files, folders, mirrors and the hub; truncation, splits, weights, the ledger and the store."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_slim.config.schema import DataConfig, SourceConfig
from mlx_slim.data import sources
from mlx_slim.data.prepare import fingerprint_difference, prepare
from mlx_slim.data.store import TokenStore
from mlx_slim.errors import SlimError

ROWS = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(40)]


def read(path: Any, **settings: Any) -> Any:
    return [row.value for row in sources.find(SourceConfig(path=str(path), **settings))]


def jsonl(path: Path, rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ------------------------------------------------------------------ sources


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.json").write_text(json.dumps(ROWS, indent=2))
    (tmp_path / "c.json").write_text("\ufeff" + "\n".join(map(json.dumps, ROWS)))
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(ROWS), tmp_path / "d.parquet", row_group_size=7
    )
    for name in ("a.jsonl", "b.json", "c.json", "d.parquet"):
        assert read(tmp_path / name) == ROWS, name


def test_text_files_give_paragraphs(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\nline\n\n\n\ntwo\r\n\nthree")
    source = sources.find(SourceConfig(path=str(tmp_path / "a.txt")))
    rows = list(source)
    assert [row.value["text"] for row in rows] == ["one\nline", "two", "three"]
    assert [row.number for row in rows] == [1, 6, 8]


def test_folders_take_the_split_or_all(tmp_path: Path) -> None:
    jsonl(tmp_path / "all" / "b.jsonl", ROWS[2:])
    jsonl(tmp_path / "all" / "a.jsonl", ROWS[:2])
    (tmp_path / "all" / "README.md").write_text("x")
    source = sources.find(SourceConfig(path=str(tmp_path / "all")))
    assert [row.value for row in source] == ROWS
    assert source.ignored == ["README.md"]
    jsonl(tmp_path / "split" / "train-0.jsonl", ROWS[:3])
    jsonl(tmp_path / "split" / "test.jsonl", ROWS[3:])
    assert read(tmp_path / "split") == ROWS[:3]
    assert read(tmp_path / "split", split="test") == ROWS[3:]
    (tmp_path / "empty").mkdir()
    with pytest.raises(SlimError, match="holds no data file"):
        read(tmp_path / "empty")


def test_a_mirror_stands_for_the_hub_and_a_path_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jsonl(tmp_path / "mirror" / "alpaca" / "train.jsonl", ROWS)
    monkeypatch.setenv("MLX_SLIM_DATA", str(tmp_path / "mirror"))
    monkeypatch.chdir(tmp_path)
    assert read("tatsu-lab/alpaca") == read("alpaca") == ROWS
    with pytest.raises(SlimError, match="no split 'trian'") as error:
        read("tatsu-lab/alpaca", split="trian")
    assert "train" in error.value.hint
    jsonl(tmp_path / "tatsu-lab" / "alpaca" / "train.jsonl", ROWS[:1])
    assert read("tatsu-lab/alpaca") == ROWS[:1]


def test_offline_never_asks_the_hub(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import socket\n"
        "def no(*a, **k): raise SystemExit('network touched')\n"
        "socket.socket.connect = no\nsocket.getaddrinfo = no\n"
        "from mlx_slim.config.schema import SourceConfig\n"
        "from mlx_slim.data import sources\n"
        "from mlx_slim.errors import SlimError\n"
        "try: sources.find(SourceConfig(path='nobody/nothing'))\n"
        "except SlimError as error: print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert "HF_HUB_OFFLINE is set" in done.stdout, done.stderr
    assert "network touched" not in done.stderr
    assert done.stdout.count("\n") == 1


def test_a_hub_data_set_is_pinned_and_streams(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    requested = {}

    def load_dataset(name: Any, config: Any, **rest: Any) -> Any:
        requested.update(name=name, config=config, **rest)
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("some/set:main@abc123", split="test") == ROWS
    assert requested == {
        "name": "some/set",
        "config": "main",
        "split": "test",
        "revision": "abc123",
    }
    source = sources.find(SourceConfig(path="some/set"))
    assert source.fingerprint()["sha256"] == source.fingerprint()["sha256"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "a.jsonl, line 3, column .*malformed JSON"),
        ("a.jsonl", b"", "empty"),
        ("a.jsonl", b"\n \n", "empty"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', "line 2: a row is a JSON object, not list"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "line 2: byte 0xe9 at byte offset 24 is"),
        ("a.json", b'[{"text": "a"},\n{"text": }]', "a.json, line 2: malformed JSON"),
        ("a.json", b'[{"text": "a"}\n{"text": "b"}]', "line 2: malformed JSON: expected ','"),
        ("a.json", b'[{"text": "a"}', "line 1: malformed JSON: expected ',' or ']', found 'the en"),
        ("a.json", b'[{"text": "a"}] x', "text after the array"),
        ("a.json", b"[]", "empty"),
        ("a.json", b'[{"text": "a"},\n3]', "row 2: a row is a JSON object, not int"),
        ("a.json", b'[{"text": "a"},\n{"text": "\xe9"}]', "line 2: byte 0xe9 at byte offset 26 is"),
        ("a.parquet", b"nonsense", "a.parquet is not a readable Parquet file"),
        ("a.xls", b"a,b", "unknown extension '.xls'"),
        ("a.txt", b"ok\n\xff", "a.txt, line 2: byte 0xff at byte offset 3"),
        ("a.txt", b'\n{"text": "x"}\n', "a.txt holds rows in JSON, .* .name it a.jsonl"),
    ],
)
def test_bad_files_are_one_clear_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SlimError, match=message) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(SlimError, match="does not exist") as error:
        read(tmp_path / "row.jsonl")
    assert "rows.jsonl" in error.value.hint
    with pytest.raises(SlimError, match="does not exist"):
        read(tmp_path / "nowhere" / "row.jsonl")
    if os.geteuid() != 0:
        path.chmod(0)
        with pytest.raises(SlimError, match="Permission denied"):
            read(path)


def test_blank_lines_are_skipped_and_counted(make: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"text": "a"}\n\n  \n{"text": "b"}\n')
    record = make(path).ledger["sources"][0]
    assert (record["rows_used"], record["blank_lines_skipped"]) == (2, 3)


@pytest.mark.parametrize("policy", ["drop", "left", "right"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_ten_megabyte_line(make: Any, tmp_path: Path, policy: str, suffix: str) -> None:
    rows = [{"prompt": "a", "completion": "x" * 10_000_000}, ROWS[0]]
    path = jsonl(tmp_path / "big.jsonl", rows)
    if suffix == ".json":
        path = tmp_path / "big.json"
        path.write_text(json.dumps(rows))
    start = time.perf_counter()
    prepared = make(path, truncation=policy, max_length=64)
    assert time.perf_counter() - start < 20
    record = prepared.ledger["sources"][0]
    assert record["rows_given"] == 2
    dropped = sum(entry["count"] for entry in record["rows_dropped"].values())
    assert record["rows_used"] + dropped == 2
    assert dropped == (policy == "drop")


def test_nothing_usable_says_why(make: Any) -> None:
    with pytest.raises(SlimError, match="no row can be used: 40 given, 40 longer than 8 tokens"):
        make(ROWS, max_length=8)


# ------------------------------------------------------------------ split, weights, duplicates


def texts(store: TokenStore) -> Any:
    return [bytes(store.row(i)[0].astype(np.uint16)) for i in range(len(store))]


def test_validation_fraction_count_and_path(make: Any, tmp_path: Path) -> None:
    fraction = make(ROWS, validation=0.1)
    assert (len(fraction.train), len(fraction.validation)) == (36, 4)
    assert not set(texts(fraction.train)) & set(texts(fraction.validation))
    assert sorted(texts(fraction.train) + texts(fraction.validation)) == sorted(
        texts(make(ROWS).train)
    )
    count = make(ROWS, validation=7)
    assert (len(count.train), len(count.validation)) == (33, 7)
    path = jsonl(tmp_path / "held.jsonl", ROWS[:3])
    file = make(ROWS, validation=str(path))
    assert (len(file.train), len(file.validation)) == (37, 3)
    assert file.ledger["split"]["removed_from_train_as_duplicates_of_validation"] == 3
    with pytest.raises(SlimError, match="validation=40 rows, but only 40"):
        make(ROWS, validation=40)
    with pytest.raises(SlimError, match="no training row is left"):
        make(ROWS[:3], validation=str(path))


def test_the_split_depends_on_the_seed_alone(tmp_path: Path, tokens: Any) -> None:
    path = jsonl(tmp_path / "rows.jsonl", ROWS)
    config = DataConfig(path=str(path), validation=0.2)

    def split(seed: Any, name: Any) -> Any:
        created = prepare(config, tokens, max_length=512, seed=seed, folder=tmp_path / name)
        assert created.validation is not None
        return texts(created.validation)

    assert split(0, "a") == split(0, "b") != split(1, "c")


def test_one_row_and_an_empty_fraction(make: Any) -> None:
    for rows in (ROWS[:1], ROWS[:5]):
        prepared = make(rows, validation=0.02)
        assert len(prepared.train) == len(rows)
        assert prepared.validation is None


def test_duplicates_are_counted_and_never_on_both_sides(make: Any) -> None:
    rows = ROWS + ROWS
    prepared = make(rows, validation=10)
    assert prepared.ledger["totals"]["exact_duplicates"] == 40
    assert not set(texts(prepared.train)) & set(texts(prepared.validation))
    assert prepared.ledger["split"]["removed_from_train_as_duplicates_of_validation"] > 0


def test_weights_repeat_and_halve(make: Any, tmp_path: Path) -> None:
    a, b = jsonl(tmp_path / "a.jsonl", ROWS[:10]), jsonl(tmp_path / "b.jsonl", ROWS[10:30])
    mix: Any = [{"path": str(a), "weight": 2.5}, {"path": str(b), "weight": 0.5}]

    def go(**settings: Any) -> Any:
        return prepare(
            DataConfig(path=mix, validation=0, **settings), make.tokenizer, max_length=512,
            seed=3, folder=tmp_path / "mix",
        )  # fmt: skip

    prepared = go()
    assert len(prepared.train) == 25 + 10
    assert len(set(texts(prepared.train))) == 20
    assert prepared.ledger["split"]["train_rows_distinct"] == 20
    assert texts(go().train) == texts(prepared.train)
    small = go(max_rows=6)
    assert [s["rows_given"] for s in small.ledger["sources"]] == [5, 1]


def test_max_rows_reads_no_further(make: Any, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ROWS[:5])
    path.write_text(path.read_text() + "broken\n")
    assert len(make(path, max_rows=5).train) == 5


# ------------------------------------------------------------------ store, cache, fingerprint


def test_rows_of_the_same_fingerprint_are_reused(make: Any, tmp_path: Path) -> None:
    first = make(ROWS, validation=3)
    state = tmp_path / "prepared" / "tokens" / "prepared.json"
    before = state.stat().st_mtime_ns
    again = make(ROWS, validation=3)
    assert state.stat().st_mtime_ns == before
    assert again.ledger == first.ledger
    assert again.fingerprint == first.fingerprint
    assert again.train.fingerprint == first.train.fingerprint
    assert texts(again.train) == texts(first.train)
    assert json.loads((tmp_path / "prepared" / "data_ledger.json").read_text()) == first.ledger


def test_differences_are_said_in_words(make: Any) -> None:
    first = make(ROWS).fingerprint
    other = make(ROWS[:-1], max_length=100, mask_prompt=False).fingerprint
    lines = fingerprint_difference(first, other)
    assert any("sha256" in line and "rows.jsonl" in line for line in lines)
    assert "data.settings.max_length: 4096 → 100" in lines
    assert "data.settings.mask_prompt: True → False" in lines
    assert any(".rows: 40 → 39" in line for line in lines)
    assert fingerprint_difference(first, first) == []


def test_the_store_says_what_it_holds(make: Any) -> None:
    store = make(ROWS).train
    rows = [store.row(i) for i in range(len(store))]
    assert store.lengths.tolist() == [len(ids) for ids, _ in rows]
    assert store.supervised.tolist() == [mask.sum() for _, mask in rows]
    assert rows[0][0].dtype == np.int32
    assert rows[0][1].dtype == np.bool_
    with pytest.raises(ValueError, match="read-only"):
        rows[0][0][0] = 1


def test_a_damaged_store_is_refused(make: Any) -> None:
    folder = make(ROWS).train.folder
    with (folder / "ids.bin").open("r+b") as file:
        file.truncate(40)
    with pytest.raises(SlimError, match="damaged"):
        TokenStore(folder)
    (folder / "ids.bin").unlink()
    with pytest.raises(SlimError, match="cannot be read"):
        TokenStore(folder)


def test_nothing_is_left_after_a_failure(make: Any, tmp_path: Path) -> None:
    with pytest.raises(SlimError):
        make([*ROWS, {"x": "y"}])
    assert not (tmp_path / "prepared").exists()


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_reading_streams(tmp_path: Path, suffix: str) -> None:
    import tracemalloc

    rows = [{"text": "x" * 1000}] * 20_000
    path = jsonl(tmp_path / "a.jsonl", rows)
    if suffix == ".json":
        path = tmp_path / "a.json"
        path.write_text(json.dumps(rows))
    assert path.stat().st_size > 20e6
    tracemalloc.start()
    count = sum(1 for _ in sources.find(SourceConfig(path=str(path))))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 8e6


def test_a_source_can_be_a_range_of_rows(make: Any, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": f"row {i}"} for i in range(10)])
    raws = list(sources.find(SourceConfig(path=str(path), skip=3, limit=2)))
    assert [(raw.number, raw.value["text"]) for raw in raws] == [(4, "row 3"), (5, "row 4")]
    whole = make("", path=[{"path": str(path)}])
    part = make("", path=[{"path": str(path), "skip": 8}])
    assert (len(whole.train), len(part.train)) == (10, 2)
    assert part.fingerprint != whole.fingerprint
    with pytest.raises(SlimError, match="skip=10 leaves no row"):
        make("", path=[{"path": str(path), "skip": 10}])
    with pytest.raises(SlimError, match="is a task"):
        sources.find(SourceConfig(path="task:gsm8k"))
