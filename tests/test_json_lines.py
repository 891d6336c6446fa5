"""JSON lines are cut at line feeds only, in every file that the house reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_slim.artifacts import json_lines, read_records
from mlx_slim.config.schema import SourceConfig
from mlx_slim.data.sources import find_local
from mlx_slim.distillation.answers import AnswerFile
from mlx_slim.errors import SlimError
from mlx_slim.evaluation import jobs
from mlx_slim.evaluation.results import encode, read_samples
from mlx_slim.evaluation.run import EvalOptions, evaluate
from mlx_slim.evaluation.scoring.perplexity import read_texts
from mlx_slim.events import Saved
from mlx_slim.training.metrics import MetricsFile
from tests.support.evals import result_files, samples_of, write_tasks
from tests.support.tiny import fixed_answer_model

CUTS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
TEXT = "".join(f"a{cut}" for cut in CUTS)


def as_lines(records: list[dict]) -> bytes:
    """Return lines with bare separators in the strings and a carriage return between values."""
    lines = [json.dumps(record, ensure_ascii=False).replace(": ", ":\r") for record in records]
    return "".join(line + "\n" for line in lines).encode()


def test_a_line_ends_at_a_line_feed(tmp_path: Path) -> None:
    data = b"one\rtwo\xe2\x80\xa8three\n\x85\x0b\nlast"
    (tmp_path / "f").write_bytes(data)
    expected = [(1, b"one\rtwo\xe2\x80\xa8three\n"), (2, b"\x85\x0b\n"), (3, b"last")]
    assert list(json_lines(data)) == list(json_lines(tmp_path / "f")) == expected


def test_samples(tmp_path: Path) -> None:
    records = [{"doc_id": i, "generation": TEXT * 3} for i in range(3000)]
    (tmp_path / "s.jsonl").write_bytes(encode(records))
    assert read_samples(tmp_path / "s.jsonl") == records
    (tmp_path / "s.jsonl").write_bytes(as_lines(records))
    assert read_samples(tmp_path / "s.jsonl") == records


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b'{"a": ', "line 1500 is damaged"),
        (b"[1]", "line 1500 is not a JSON object"),
        (b'{"a": 1}, {"b": 2}', "line 1500 is damaged"),
        (b"\xff", "line 1500 is damaged"),
    ],
)
def test_a_damaged_line_is_named_and_those_before_it_are_read(
    tmp_path: Path, line: bytes, text: str
) -> None:
    lines = [b'{"a": 1}'] * 2000
    lines[1499] = line
    (tmp_path / "s.jsonl").write_bytes(b"\n".join(lines))
    seen = []
    records = read_records(tmp_path / "s.jsonl")
    with pytest.raises(SlimError, match=text):
        while True:
            seen.append(next(records))
    assert len(seen) == 1499
    with pytest.raises(SlimError, match="does not exist"):
        read_samples(tmp_path / "none.jsonl")


def test_metrics_are_rewound_to_the_same_bytes(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    retained = as_lines([{"event": "step", "step": i, "note": TEXT} for i in (1, 2)])
    file.path.write_bytes(retained + as_lines([{"event": "step", "step": 3}]))
    saved = Saved(2, "checkpoints/step-2")
    file.rewind(saved)
    assert file.path.read_bytes() == retained + (json.dumps(saved.as_record()) + "\n").encode()


def test_answers_of_teachers(tmp_path: Path) -> None:
    keys = ("id", "teacher", "prompt_hash", "settings_hash", "stop_reason", "generation")
    (tmp_path / "answers.jsonl").write_bytes(as_lines([dict.fromkeys(keys, TEXT)] * 2))
    assert len(AnswerFile(tmp_path / "answers.jsonl")._lines) == 1


def test_rows_of_users_and_held_out_texts(tmp_path: Path) -> None:
    rows = [{"text": TEXT}, {"text": f"{TEXT}2"}]
    (tmp_path / "rows.jsonl").write_bytes(as_lines(rows))
    source = find_local(SourceConfig(path=str(tmp_path / "rows.jsonl")))
    assert source is not None
    assert [row.value for row in source] == rows
    assert read_texts(tmp_path / "rows.jsonl").documents == [row["text"] for row in rows]


@pytest.mark.parametrize("answer", ["x\u2028\x85\x0b\x0c\x1c\x1d\x1e\ry", "x\u2029y"])
def test_an_answer_may_hold_any_line_separator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    monkeypatch.setattr(jobs, "GENERATION_CHUNK", 8)
    tasks = write_tasks(tmp_path / "tasks")
    model, out = fixed_answer_model(tmp_path / "speaks", answer), tmp_path / "out"
    options = EvalOptions()
    spec = tasks[1].read_text().replace("- a\n", "").replace("max_tokens: 12", "max_tokens: 30")
    task = tasks[1].with_name("any_answer.yaml")
    task.write_text(spec)
    evaluate(model, [str(task)], out, options)
    assert {sample["generation"] for sample in samples_of(out, "any_answer")} == {answer}
    complete = result_files(out)
    (out / "results.json").unlink()
    progress = out / "progress.jsonl"
    progress.write_bytes(progress.read_bytes().split(b"\n")[0] + b"\n")
    evaluate(model, [str(task)], out, options, resume=True)
    assert result_files(out) == complete
