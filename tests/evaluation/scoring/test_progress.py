"""Scoring and answering are heard of all the way: no part of the work passes without an event."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_slim.evaluation.run import EvalOptions, evaluate
from mlx_slim.evaluation.scoring import loglikelihood
from mlx_slim.evaluation.scoring.generate import generate_batch
from mlx_slim.evaluation.scoring.loglikelihood import LoglikelihoodScorer
from mlx_slim.evaluation.scoring.requests import Request
from mlx_slim.events import EvalAnswering, EvalProgress, StageProgress
from mlx_slim.models.fidelity import compare
from mlx_slim.models.recorded_logits import RecordedLogits
from mlx_slim.progress import listening
from tests.support.evals import write_tasks
from tests.support.runs import Recorder
from tests.support.stock import stock_load


def stages(recorder: Recorder, name: str) -> list[StageProgress]:
    return [e for e in recorder.events if isinstance(e, StageProgress) and e.stage == name]


def test_an_event_with_every_token_of_an_answer(tiny: Callable[..., Path]) -> None:
    model, tokenizer = stock_load(str(tiny()))
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in ("abc", "defg", "h")]
    recorder = Recorder()
    with listening(recorder):
        generate_batch(model, tokenizer, prompts, 10, ())
    told = stages(recorder, "answering")
    assert (told[0].done, told[-1].done, told[-1].total) == (0, 3, 3) and told[-1].finished
    rises = [later.done - earlier.done for earlier, later in pairwise(told)]
    assert min(rises) >= 0 and max(rises) <= 1.0  # no more than the work of one question
    assert len(told) >= 10  # all three grow side by side: ten tokens each


@pytest.mark.parametrize("threads", [1, 2])
def test_an_event_with_every_batch_of_log_likelihoods(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr(loglikelihood, "default_num_threads", lambda: threads)
    model, _ = stock_load(str(tiny()))
    scorer = LoglikelihoodScorer(model, batch_tokens=64)
    numbers = np.random.default_rng(0).integers(5, 200, (40, 24))
    requests = [Request(tuple(map(int, row)), 20) for row in numbers]
    recorder = Recorder()
    with listening(recorder):
        scorer.score(requests)
    told = stages(recorder, "scoring")
    assert (told[0].done, told[-1].done) == (0, told[-1].total)
    assert max(later.done - earlier.done for earlier, later in pairwise(told)) <= 64
    assert len(told) >= 10


@pytest.mark.parametrize("place", [0, 1], ids=["choices", "answers"])
def test_an_evaluation_tells_of_its_questions_between_what_is_on_disk(
    tiny: Callable[..., Path], tmp_path: Path, place: int
) -> None:
    task = write_tasks(tmp_path / "tasks", 12)[:2][place]
    recorder = Recorder()
    options = EvalOptions(batch_tokens=64, num_fewshot=0)
    evaluate(str(tiny("llama")), str(task), tmp_path / "out", options, observer=recorder)
    told = [e for e in recorder.events if isinstance(e, (EvalAnswering, EvalProgress))]
    assert [event.answered for event in told] == sorted(event.answered for event in told)
    assert [event.fraction for event in told] == sorted(event.fraction for event in told)
    assert told[-1].answered == told[-1].questions == 12 and told[-1].fraction == 1
    assert len(told) >= 6 and isinstance(told[0], EvalAnswering)


def test_a_comparison_tells_of_each_row_that_either_model_reads(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    model, _ = stock_load(str(tiny()))
    rows_NT = mx.array(np.random.default_rng(0).integers(5, 200, (5, 16)))
    recorder = Recorder()
    with listening(recorder):
        compare(RecordedLogits(model, rows_NT, tmp_path), model, rows_NT)
    for name in ("recording what the source answers", "comparing"):
        assert [event.done for event in stages(recorder, name)] == [0, 1, 2, 3, 4, 5, 5]
        assert stages(recorder, name)[0].total == 5
