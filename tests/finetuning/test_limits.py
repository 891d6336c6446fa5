"""Rows that a model would compute wrong are refused by every command; nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_slim.cli.main import run
from mlx_slim.config.load import Resolved, from_values
from mlx_slim.distillation.run import distill
from mlx_slim.errors import SlimError
from mlx_slim.finetuning.run import finetune
from tests.support.adapters import write_adapter
from tests.support.runs import Recorder, losses
from tests.support.tiny import TinyModels, tiny_model

WINDOW = 32
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [8.0 + i for i in range(8)],
    "original_max_position_embeddings": WINDOW,
}
NAMED = f"sliding window of {WINDOW} tokens"


@pytest.fixture(scope="module")
def sliding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose window its class ignores."""
    return tiny_model(tmp_path_factory.mktemp("sliding") / "m", "mistral", sliding_window=WINDOW)


@pytest.fixture(scope="module")
def stretched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rotary embedding changes behind ``WINDOW`` tokens."""
    folder = tmp_path_factory.mktemp("stretched") / "m"
    return tiny_model(folder, "llama", rope_scaling=LONGROPE)


def rows(path: Path, *lengths: int) -> Path:
    """Write text rows of so many bytes, a token each."""
    texts = [("abcdefgh " * 40)[i : i + length] for i, length in enumerate(lengths)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def recipe(
    model: Path,
    data: Path,
    validation: Path | int = 0,
    distill: dict[str, Any] | None = None,
    **train: Any,
) -> Resolved:
    values = {
        "model": str(model),
        "method": "lora",
        "data": {"path": str(data), "validation": str(validation) if validation else 0},
        "train": {"steps": 3, "batch_tokens": 256, "max_length": 128, **train},
    }
    return from_values(values | ({"distill": distill} if distill else {}), "small", "test")


def refused(resolved: Resolved, out: Path, start: Callable[..., Any] = finetune) -> str:
    with pytest.raises(SlimError) as caught:
        start(resolved, out, observer=Recorder())
    assert not out.exists() and caught.value.exit_code == 2
    return str(caught.value)


def test_a_long_row_is_refused_in_training_and_its_line_named(
    sliding: Path, tmp_path: Path
) -> None:
    data = rows(tmp_path / "rows.jsonl", 20, WINDOW + 8, 20)
    text = refused(recipe(sliding, data), tmp_path / "run")
    assert NAMED in text and "rows.jsonl" in text and "2" in text and "max_length=32" in text
    short = recipe(sliding, data, max_length=WINDOW)
    finetune(short, tmp_path / "run", observer=Recorder())
    assert len(losses(tmp_path / "run")) == 3


def test_a_long_validation_row_is_refused(sliding: Path, tmp_path: Path) -> None:
    data = rows(tmp_path / "rows.jsonl", 20, 20)
    other = rows(tmp_path / "other.jsonl", 20, WINDOW + 8)
    text = refused(recipe(sliding, data, validation=other), tmp_path / "run")
    assert NAMED in text and "other.jsonl" in text


@pytest.mark.parametrize("model", ["sliding", "stretched"])
def test_packed_rows_count_by_themselves(
    model: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Rows within the limit, in sequences beyond it, have the losses that they have alone."""
    folder = request.getfixturevalue(model)
    data = rows(tmp_path / "rows.jsonl", *([WINDOW - 12] * 16))
    scores = {}
    for mode in ("packed", "grouped"):
        resolved = recipe(folder, data, batching=mode, steps=1, max_length=128, batch_tokens=512)
        finetune(resolved, tmp_path / mode, observer=Recorder())
        scores[mode] = losses(tmp_path / mode)[1]
    assert scores["packed"] == pytest.approx(scores["grouped"], abs=2e-5)


def test_a_row_beyond_the_original_context_is_refused_in_training(
    stretched: Path, tmp_path: Path
) -> None:
    data = rows(tmp_path / "rows.jsonl", WINDOW + 8, 20)
    text = refused(recipe(stretched, data), tmp_path / "run")
    assert "RoPE" in text and f"longer than {WINDOW} tokens" in text and "rows.jsonl" in text


@pytest.mark.parametrize("method", ["logits", "mutual"])
def test_rows_are_refused_that_a_teacher_would_compute_wrong(
    tiny: TinyModels, sliding: Path, tmp_path: Path, method: str
) -> None:
    data = rows(tmp_path / "rows.jsonl", 20, WINDOW + 8, 20, 20)
    resolved = recipe(
        tiny(), data, distill={"method": method, "teachers": [{"model": str(sliding)}]}
    )
    text = refused(resolved, tmp_path / "run", start=distill)
    assert NAMED in text and "rows.jsonl" in text


def test_long_texts_and_prompts_are_refused_in_scoring(
    sliding: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("some words to predict, " * 10)
    words = ["eval", str(sliding), "--perplexity", str(text), "-o", str(tmp_path / "out")]
    assert run(words) == 2
    error = capsys.readouterr().err
    assert NAMED in error and "notes.txt, document 0, window 0" in error
    assert "--max-length" in error and not (tmp_path / "out").exists()
    assert run([*words, "--max-length", str(WINDOW)]) == 0
    from tests.support.evals import write_tasks

    choices, generation, _ = write_tasks(tmp_path / "tasks")
    for task in (choices, generation):
        words = ["eval", str(sliding), "--task", str(task), "-o", str(tmp_path / "scores")]
        capsys.readouterr()
        assert run(words) == 2
        error = capsys.readouterr().err
        assert NAMED in error and ", question " in error
        assert not (tmp_path / "scores").exists()


def test_scores_below_the_original_context_do_not_depend_on_what_stands_beside(
    stretched: Path,
) -> None:
    import mlx.core as mx

    from mlx_slim.evaluation.scoring.loglikelihood import LoglikelihoodScorer
    from mlx_slim.evaluation.scoring.plain import plain_score
    from mlx_slim.evaluation.scoring.requests import Request
    from mlx_slim.models.load import load

    model = load(stretched, dtype=mx.float32).model
    root = tuple(range(1, 17))
    requests = [Request((*root, 30 + i, *range(40, 40 + 4 * i)), 16) for i in range(4)]
    expected = [plain_score(model, request.ids, request.start) for request in requests]
    scores = LoglikelihoodScorer(model).score(requests, root)
    for one, other in zip(scores, expected, strict=True):
        assert one.loglikelihood == pytest.approx(other[0], abs=1e-4)


@pytest.mark.parametrize(
    "words",
    [
        ["quantize", "--method", "awq", "--group-size", "32", "--calibration-length", "64"],
        ["prune", "--method", "block-influence", "--ratio", "0.3", "--length", "64"],
    ],
)
def test_long_calibration_rows_are_refused(
    sliding: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("some words to calibrate on, " * 200)
    command = [words[0], str(sliding), "-o", str(tmp_path / "out"), *words[1:]]
    command += ["--calibration", str(text)]
    assert run(command) == 2
    error = capsys.readouterr().err
    assert NAMED in error and "notes.txt" in error and not (tmp_path / "out").exists()
    command[command.index("64")] = str(WINDOW)
    assert run(command) == 0


def test_an_audit_text_is_as_long_as_the_model_computes_right(
    sliding: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("some words to compare on, " * 200)
    adapter = write_adapter(tmp_path / "a", sliding)
    words = ["fuse", str(sliding), "--adapter", str(adapter), "-o", str(tmp_path / "out")]
    assert run([*words, "--calibration", str(text), "--samples", "4"]) == 0
    assert f"{4 * WINDOW} tokens" in capsys.readouterr().out


def test_generation_says_once_that_it_passed_the_window(
    sliding: Path, stretched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(model: Path, tokens: int) -> int:
        words = ["generate", str(model), "--prompt", "hello, hello", "--no-chat-template"]
        assert run([*words, "--max-tokens", str(tokens)]) == 0
        return capsys.readouterr().err.count("note: ")

    assert told(sliding, 60) == 1
    assert told(sliding, 5) == 0
    assert told(stretched, 60) == 0, "computed anew there, as transformers does"
