"""Chunks in several processes: the same answers in order, clear ends, nobody left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.config.schema import DataConfig, SourceConfig
from mlx_slim.data import pipeline, workers
from mlx_slim.data.prepare import prepare
from mlx_slim.data.workers import Workers
from mlx_slim.errors import SlimError
from tests.support import chunks


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes from the first chunk on, and chunks of a few rows."""
    monkeypatch.setattr(workers, "ALONE", 0)
    monkeypatch.setattr(pipeline, "_CHUNK_ROWS", 7)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        if sys.platform.startswith("linux"):
            return False
        return subprocess.run(["ps", "-p", str(pid)], capture_output=True).returncode == 0
    return state != "Z"


# ------------------------------------------------------------------ rows


def _mixed_rows() -> list[dict[str, Any]]:
    """Rows that are used, too long, without an answer, equal to others."""
    rows: list[dict[str, Any]] = [
        {"prompt": f"question {n % 50}", "completion": f"answer {n % 50}"} for n in range(90)
    ]
    rows[3]["completion"] = "long " * 40
    rows[11]["prompt"] = "long " * 40
    rows[12]["completion"] = " "
    rows[40] = {"messages": [{"role": "user", "content": "no answer"}]}
    rows[41] = {"instruction": "say é", "output": "é  é"}
    rows[77]["completion"] = "x" * 100_000
    return rows


def test_the_number_of_processes_changes_no_byte(
    tmp_path: Path, tokens: Any, at_once: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = "Which of the nine old brown hens in the red barn will lay eggs today?"
    mirror = tmp_path / "mirror" / "gsm8k" / "test.jsonl"
    mirror.parent.mkdir(parents=True)
    mirror.write_text(json.dumps({"question": question, "answer": "3"}) + "\n", encoding="utf-8")
    monkeypatch.setenv("MLX_SLIM_DATA", str(tmp_path / "mirror"))
    rows = _mixed_rows()
    rows[20]["prompt"] = rows[60]["prompt"] = question
    for name, start in (("a", 0), ("b", 45)):
        lines = [json.dumps(row) for row in rows[start : start + 45]]
        lines.insert(5, "")
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = DataConfig(
        path=[
            SourceConfig(path=str(tmp_path / "a.jsonl")),
            SourceConfig(path=str(tmp_path / "b.jsonl"), weight=1.5),
        ],
        validation=0.1,
    )

    def files(processes: int) -> dict[str, bytes]:
        folder = tmp_path / f"of-{processes}"
        prepare(config, tokens, max_length=150, seed=0, folder=folder, processes=processes)
        every = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in every}

    alone = files(1)
    assert len(alone) == 8
    ledger = json.loads(alone["data_ledger.json"])
    assert ledger["totals"]["rows_given"] == 90
    assert ledger["totals"]["rows_dropped"] > 2
    first = ledger["evaluation_overlap"]["datasets"]["gsm8k"]["first"]
    assert [place.rpartition("/")[2] for place in first] == ["a.jsonl, line 22", "b.jsonl, line 17"]
    assert files(2) == alone
    assert files(3) == alone


@pytest.mark.parametrize("truncation", ["drop", "left", "right"])
def test_where_chunks_end_changes_nothing(
    truncation: str, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outcome(rows: int) -> tuple[Any, ...]:
        monkeypatch.setattr(pipeline, "_CHUNK_ROWS", rows)
        shutil.rmtree(tmp_path / "prepared", ignore_errors=True)
        data = make(_mixed_rows(), max_length=90, truncation=truncation)
        return data.ledger, [[part.tolist() for part in data.train.row(i)] for i in range(80)]

    tmp_path = make.folder
    whole = outcome(1000)
    assert outcome(1) == outcome(7) == whole
    assert json.dumps(outcome(7)[0]) == json.dumps(whole[0])  # the order of reasons too


def test_the_first_row_that_cannot_be_used_is_named(
    tmp_path: Path, tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is wrong with it, and wherever chunks end."""
    good = json.dumps({"prompt": "q", "completion": "a"})
    wrong = {
        "line 4: 1": json.dumps({"prompt": "q", "completion": "long " * 20}),  # 100-odd tokens
        "columns seen: question": json.dumps({"question": "q"}),
        "malformed JSON": "{",
    }
    for order in (list(wrong), list(wrong)[::-1]):
        lines = [good, good, good, *(wrong[name] for name in order)]
        (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        config = DataConfig(path=str(tmp_path / "rows.jsonl"), truncation="error")
        for rows in (1, 2, 4, 5, 100):
            monkeypatch.setattr(pipeline, "_CHUNK_ROWS", rows)
            with pytest.raises(SlimError, match=order[0]) as caught:
                prepare(config, tokens, max_length=90, seed=0, folder=tmp_path / "out")
            assert "line 4" in caught.value.message
    assert not (tmp_path / "out").exists()


def test_few_rows_start_no_process(
    tmp_path: Path, tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    path = tmp_path / "rows.jsonl"
    row = json.dumps({"prompt": "q", "completion": "a"}) + "\n"
    path.write_text(row * 2000, encoding="utf-8")
    config = DataConfig(path=str(path), validation=0)
    data = prepare(config, tokens, max_length=90, seed=0, folder=tmp_path / "o", processes=4)
    assert len(data.train) == 2000


def test_chunks_are_small_in_rows_and_in_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_slim.data.sources import Source

    def sizes(rows: list[dict[str, Any]]) -> list[int]:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        source = Source("rows", "file", [path])
        return [len(chunk) for chunk in pipeline._chunks(source, None)]

    assert sizes([{"text": "x"}] * 600) == [256, 256, 88]
    chat = {"messages": [{"role": "user", "content": "x" * 600_000}] * 2}
    assert sizes([chat, {"text": "x"}, chat]) == [1, 2]


# ------------------------------------------------------------------ processes


def test_answers_come_in_order(at_once: Any) -> None:
    with Workers(chunks.slow_at_first, 3) as pool:
        assert list(pool.map(range(12))) == list(range(12))
        assert list(pool.map(range(3))) == [0, 1, 2]  # the same processes serve the next source


def test_all_processes_work_and_end(at_once: Any) -> None:
    with Workers(chunks.process, 2) as pool:
        pids = set(pool.map(range(40)))
    assert len(pids) == 2
    assert os.getpid() not in pids
    assert not any(alive(pid) for pid in pids)


def test_one_process_is_this_one(at_once: Any) -> None:
    with Workers(chunks.process, 1) as pool:
        assert set(pool.map(range(5))) == {os.getpid()}


def test_the_first_chunks_are_done_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "ALONE", 3)
    with Workers(chunks.process, 2) as pool:
        pids = [*pool.map(range(2)), *pool.map(range(4))]
    assert [pid == os.getpid() for pid in pids] == [True] * 3 + [False] * 3


def test_few_chunks_are_under_way(at_once: Any) -> None:
    taken = []

    def tasks() -> Iterator[int]:
        for number in range(60):
            taken.append(number)
            yield number

    with Workers(chunks.double, 2) as pool:
        ahead = [len(taken) - done for done, _ in enumerate(pool.map(tasks()))]
    assert max(ahead) <= 2 * 2 + 1
    assert ahead[0] >= 1


@pytest.mark.parametrize("count", [1, 2])
def test_the_first_error_in_order_is_raised(count: int, at_once: Any) -> None:
    def tasks() -> Iterator[int]:
        yield from range(5)
        raise SlimError("the file ends in the middle")

    with Workers(chunks.refuse_three, count) as pool:
        answers = pool.map(tasks())
        assert [next(answers) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(SlimError) as caught:
            next(answers)
    assert caught.value.message == "row 3 is wrong"
    assert (caught.value.hint, caught.value.details) == ("fix row 3", ["a detail"])
    with (
        Workers(chunks.double, count) as pool,
        pytest.raises(SlimError, match="the file ends in the middle"),
    ):
        list(pool.map(tasks()))


def test_what_is_printed_there_is_no_answer(
    at_once: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    with Workers(chunks.noisy, 2) as pool:
        assert list(pool.map(range(4))) == [0, 1, 2, 3]
    assert capfd.readouterr().out == ""


def test_a_fault_there_keeps_its_traceback(at_once: Any) -> None:
    with Workers(chunks.broken, 2) as pool, pytest.raises(RuntimeError) as caught:
        list(pool.map([1]))
    assert str(caught.value) == "in a process that tokenises rows: KeyError: 'a fault of ours'"
    assert "chunks.py" in str(caught.value.__cause__)


def test_a_process_that_dies_is_one_clear_line(at_once: Any) -> None:
    with Workers(chunks.die, 2) as pool, pytest.raises(SlimError) as caught:
        list(pool.map(range(8)))
    assert caught.value.message == "a process that tokenises rows died (signal 9)"
    assert "memory" in caught.value.hint


def test_a_process_that_cannot_start_is_one_clear_line(
    at_once: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with Workers(chunks.double, 2) as pool, pytest.raises(SlimError) as caught:
        list(pool.map(range(8)))
    assert caught.value.message == (
        "cannot start a process that tokenises rows: Resource temporarily unavailable"
    )


def test_rows_are_tokenised_without_mlx(at_once: Any) -> None:
    with Workers(chunks.heavy_modules, 2) as pool:
        modules = ["mlx_slim.data.pipeline", "transformers.utils.chat_template_utils"]
        assert list(pool.map([modules])) == [[]]


# A script without a guard: ``multiprocessing`` would run it again in every process.
_SCRIPT = """
import sys, time
sys.path[:] = {path!r}
from mlx_slim.data import workers
from tests.support import chunks
workers.ALONE = 0
with workers.Workers(chunks.process, 2) as pool:
    print(*sorted(set(pool.map(range(30)))), flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nobody_outlives_the_program(number: Any) -> None:
    program = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT.format(path=sys.path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert program.stdout is not None
    assert program.stderr is not None
    pids = [int(pid) for pid in program.stdout.readline().split()]
    assert len(pids) == 2
    if number == signal.SIGINT:  # Ctrl-C goes to all of them
        os.killpg(program.pid, number)
    else:
        program.send_signal(number)
    errors = program.communicate(timeout=30)[1]
    assert program.returncode == -number
    assert errors.count("Traceback") == (number == signal.SIGINT)  # the program's own
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)
