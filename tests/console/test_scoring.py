"""What a user sees of an evaluation: live, plain, JSON, and the closing tables."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console as RichConsole

from mlx_slim.artifacts import write_json
from mlx_slim.console import Console
from mlx_slim.console.scoring import Scoring, figure
from mlx_slim.console.tables import _cells, show_comparison, show_results
from mlx_slim.evaluation import stats
from mlx_slim.evaluation.comparison import BITS, MetricComparison, compare
from mlx_slim.events import EvalDone, EvalProgress, EvalStarted, Event, Notice, TaskDone
from tests.evaluation.test_comparison import answers, finished

FIGURE = {"value": 0.4299, "stderr": 0.0049, "k": 4317}


def progress(answered: int) -> EvalProgress:
    return EvalProgress(
        task="hellaswag",
        answered=answered,
        questions=1000,
        metric="acc_norm",
        value=0.43,
        fraction=answered / 2000,
        tokens_per_second=1234.5,
        active_memory_bytes=3_100_000_000,
        peak_memory_bytes=5_200_000_000,
    )


STORY: list[Event] = [
    Notice("loading models/[x]"),
    EvalStarted("models/[x]", ("hellaswag", "gsm8k"), 2000, 128, 0.064, 14_400_000_000),
    *(progress(answered) for answered in (256, 384, 512, 1000)),
    TaskDone("hellaswag", 10, 1000, {"acc_norm": FIGURE}, 61.0, 1234.5, 5_200_000_000),
    Notice("something to know", "warning"),
    EvalDone("models/[x]", "runs/out", 122.0, 5_200_000_000),
]


def show(mode: Any, *, terminal: Any = False, width: Any = 100, rank: Any = 0) -> str:
    file = io.StringIO()
    output = RichConsole(file=file, force_terminal=terminal, width=width, height=30)
    with Console(mode, display=Scoring(), rank=rank, output=output) as console:
        for event in STORY:
            console.notify(event)
    return file.getvalue()


def test_plain_lines() -> None:
    lines = show("auto").splitlines()
    assert lines[1] == "scoring models/[x]: hellaswag, gsm8k: 2,000 questions, 128 answered before"
    assert lines[2].startswith("hellaswag 256/1000 acc_norm 0.4300 1,234 tok/s peak 5.20 GB eta ")
    assert "hellaswag: acc_norm 0.4299 ± 0.0049 (1:01)" in lines
    assert lines[-1] == "results in runs/out (2:02)"
    assert "\x1b" not in show("plain")


def test_quiet_and_other_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert show("quiet") == "results in runs/out (2:02)\n"
    assert capsys.readouterr().err == "warning: something to know\n"
    assert show("auto", rank=1) == ""


def test_json_lines_are_events() -> None:
    records = [json.loads(line) for line in show("json").splitlines()]
    assert [record["event"] for record in records] == [
        *["notice", "eval_started", *["eval_progress"] * 4, "task", "notice", "eval_done"]
    ]
    assert records[1]["tasks"] == ["hellaswag", "gsm8k"]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_live_view_keeps_its_height_and_its_width(width: int) -> None:
    state = Scoring()
    heights = set()
    for moment, event in enumerate(STORY):
        state.update(event, float(moment))
        output = RichConsole(file=io.StringIO(), width=width, height=30)
        output.print(state.view("a [title]"))
        lines = output.file.getvalue().splitlines()  # type: ignore[attr-defined]
        heights.add(len(lines))
        assert max(map(len, lines)) <= width
    assert len(heights) == 1
    text = show("live", terminal=True, width=width)
    assert "models/[x]" in text
    assert "0.4300" in text
    assert "\x1b[?25h" in text


def test_the_remaining_time_follows_from_the_fraction_done() -> None:
    state = Scoring()
    state.update(STORY[1], 0.0)
    assert state.remaining() == "–"
    state.update(progress(1000), 43.6)
    assert state.remaining() == "0:50"  # 0.436 of the work took 43.6 s, half is left
    assert state.remaining(63.6) == "0:30"


@pytest.mark.parametrize("width", [80, 120])
def test_the_result_table_has_errors_counts_speed_and_memory(tmp_path: Path, width: int) -> None:
    out = tmp_path / "out"
    group = {"n": 40, "micro": {"acc": {"value": 0.25, "stderr": 0.07, "k": 10}}}
    result = {
        "model": "models/[x]",
        "adapter": "runs/a",
        "dtype": "float32",
        "chat_template": True,
        "tasks": {
            "hellaswag": {"num_fewshot": 10, "n": 10042, "metrics": {"acc_norm": FIGURE}},
            "mmlu": {
                "num_fewshot": 5,
                "n": 40,
                "metrics": group["micro"],
                "macro": {"acc": {"value": 0.26, "stderr": None, "k": None}},
                "categories": {"stem": group},
            },
        },
        "perplexity": {"n": 3, "bytes": 12345, "metrics": {"bits_per_byte": {"value": 0.81234}}},
    }
    timing = {"seconds": 61.0, "tokens_per_second": 1234.5, "peak_memory_bytes": 5_200_000_000}
    names = ("hellaswag", "mmlu", "perplexity")
    write_json(out / "timings.json", {"tasks": dict.fromkeys(names, timing)})
    file = io.StringIO()
    show_results([result], [out], terminal=RichConsole(file=file, width=width))
    lines = file.getvalue().splitlines()
    assert "models/[x] + runs/a (float32, chat template)" in lines[0]
    rows = {line.split()[0]: " ".join(line.split()) for line in lines[2:]}
    assert rows["hellaswag"] == "hellaswag 10 acc_norm 0.4299 ± 0.0049 4,317/10,042 1,234 5.20 GB"
    assert rows["mmlu"] == "mmlu 5 acc 0.2500 ± 0.0700 10/40 1,234 5.20 GB"
    assert rows["acc,"] == "acc, macro 0.2600"
    assert rows["stem"] == "stem acc 0.2500 ± 0.0700 10/40"
    assert rows["perplexity"] == "perplexity – bits_per_byte 0.8123 12,345 B 1,234 5.20 GB"
    assert max(map(len, lines[:-1])) <= width


def test_the_comparison_fits_80_columns(tmp_path: Path) -> None:
    a = finished(tmp_path / "a", {"arc_challenge": answers("1100" * 60)})
    b = finished(tmp_path / "b", {"arc_challenge": answers("1110" * 60)})
    file = io.StringIO()
    show_comparison(compare(a, b), terminal=RichConsole(file=file, width=80))
    text = file.getvalue()
    assert "arc_challenge: B is higher by 25 points" in text
    assert "60/0" in text
    assert "+25.00" in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_interval_over_few_documents_is_the_one_shown() -> None:
    def shown(first: list[float], second: list[float]) -> str:
        result = stats.paired(first, second)
        return _cells(MetricComparison("perplexity", "bits_per_byte", None, BITS, result, [], []))[
            3
        ]

    low, high = shown([1.5, 1.2], [1.4, 1.2]).split("…")
    assert float(low) < -0.5 and float(high) > 0.5  # a resample of two lies between them
    assert shown([1.5], [1.2]) == "–"


def test_a_figure_without_an_error() -> None:
    assert figure(0.5, None) == "0.5000"
    assert figure(0.4299, 0.0049) == "0.4299 ± 0.0049"


def test_the_folder_is_named_below_the_table(tmp_path: Path) -> None:
    write_json(tmp_path / "timings.json", {"tasks": {}})
    file = io.StringIO()
    empty = {"model": "m", "adapter": None, "dtype": "d", "chat_template": False, "tasks": {}}
    show_results([empty], [tmp_path], terminal=RichConsole(file=file, width=40))
    assert str(tmp_path) in file.getvalue()
