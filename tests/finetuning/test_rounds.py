"""Rounds of answers: what is learned from, and that a kill at any moment changes nothing."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_slim import events
from mlx_slim.artifacts import load_tensors
from mlx_slim.config.load import Resolved, from_values
from mlx_slim.errors import Interrupted, SlimError
from mlx_slim.evaluation.scoring import generate
from mlx_slim.finetuning import rounds
from mlx_slim.finetuning.round_answers import Round, RoundFolder, SampledAnswer
from mlx_slim.finetuning.run import finetune
from mlx_slim.finetuning.strategy import CrossEntropyStrategy, TrainingStrategy
from mlx_slim.planner.memory import Prediction
from mlx_slim.round_events import RoundBegun
from mlx_slim.training.rounds import Begun
from tests.support.runs import CtrlC, Recorder, losses, recipe, write_rows
from tests.support.tiny import TinyModels


class Killed(BaseException):
    """Ends a run without any of its exits."""


class OfAnswers:
    """Learns from answers as they are; ``alone``: scores them while the model is put away."""

    targets = None
    log_probs = True
    until: Sequence[str] = ()

    def __init__(self, fraction: float = 1.0, answers: int = 2, alone: bool = False) -> None:
        plain = CrossEntropyStrategy()
        self.student, self.check, self.rows = plain.student, plain.check, plain.rows
        self.objectives, self.record = plain.objectives, plain.record
        self.scorer = self
        self.fraction, self.answers, self.alone = fraction, answers, alone
        self.scored: list[int] = []
        self.waiting: int | None = None

    def place(self, prediction: Prediction, budget: int, observer: events.Observer) -> Prediction:
        return prediction

    def score(self, answers: Round, model: nn.Module, stop: Callable[[], bool]) -> Begun:
        if self.alone and answers.number not in self.scored:
            self.waiting = answers.number
            return Begun.PUT_AWAY
        return Begun.READY

    def score_alone(self, observer: events.Observer) -> bool:
        assert self.waiting is not None
        self.scored.append(self.waiting)
        return True

    def close(self) -> None:
        """Nothing else was loaded."""

    def figures(self, answers: Round) -> dict[str, float]:
        return {"answers": float(len(answers))}


def _recipe(model: Path, data: Path, steps: int = 7, **train: Any) -> Resolved:
    train = {"batch_tokens": 128, **train}
    values = recipe(model, data, steps=steps, **train).recipe.model_dump(exclude_unset=True)
    values["distill"] = {"method": "on-policy"}
    values["rounds"] = {"steps": 3, "max_tokens": 8}
    values["data"]["validation"] = 2
    return from_values(values, "small", "test")


def _strategy(**options: Any) -> TrainingStrategy:
    return OfAnswers(**options)


def _weights(out: Path) -> dict[str, mx.array]:
    return load_tensors(out / "adapters" / "adapters.safetensors")


def _same(one: Path, other: Path) -> None:
    assert losses(one) == losses(other)
    ours, theirs = _weights(one), _weights(other)
    assert all(mx.array_equal(ours[key], theirs[key]).item() for key in ours)
    answers = [
        [[json.loads(line)["ids"] for line in file.read_text().splitlines()]
         for file in sorted(out.glob("rounds/*/answers.jsonl"))]
        for out in (one, other)
    ]  # fmt: skip
    assert answers[0] == answers[1]
    started = [(out / "metrics.jsonl").read_text().count('"started"') for out in (one, other)]
    assert started == [1, 1]


class KillAt(Recorder):
    """Ends the run at the ``count``-th event of a name."""

    def __init__(self, name: str, count: int) -> None:
        super().__init__()
        self.moment = (name, count)

    def notify(self, event: events.Event) -> None:
        super().notify(event)
        name, count = self.moment
        if event.name == name and sum(e.name == name for e in self.events) == count:
            raise Killed


@contextmanager
def _killed_while_answering(patch: pytest.MonkeyPatch, chunk: int) -> Iterator[None]:
    """End the run in the ``chunk``-th chunk of answers, when some of them are computed."""
    calls, real = [], generate.generate_batch

    def generating(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        answers = real(*args, **kwargs)
        if len(calls) == chunk:
            raise Killed
        return answers

    with patch.context() as here:
        here.setattr(generate, "generate_batch", generating)
        with pytest.raises(Killed):
            yield


@pytest.mark.parametrize("alone", [False, True])
def test_a_run_that_is_killed_and_resumed_repeats_the_undisturbed_one(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    monkeypatch.setattr(rounds, "CHUNK", 4)
    resolved = _recipe(tiny(), write_rows(tmp_path / "rows.jsonl"))
    straight, out = tmp_path / "straight", tmp_path / "out"
    observer = Recorder()
    finetune(resolved, straight, observer=observer, strategy=_strategy(alone=alone, fraction=0.7))
    assert [e.step for e in observer.events if isinstance(e, RoundBegun)] == [0, 3, 6]
    page = (straight / "report.html").read_text()
    assert "Answers of the model:" in page and "in 3 rounds" in page and "Time of rounds:" in page

    def run(kill: KillAt | None = None, *, resume: bool = True) -> None:
        listener: Recorder = kill or Recorder()
        strategy = _strategy(alone=alone, fraction=0.7)
        finetune(resolved, out, observer=listener, strategy=strategy, resume=resume)

    with _killed_while_answering(monkeypatch, 2):
        run(resume=False)
    torn = next(out.glob("rounds/round-0/answers.jsonl"))
    assert len(torn.read_text().splitlines()) == 4
    torn.write_text(torn.read_text() + '{"row": 1, "num')
    with pytest.raises(Killed):
        run(KillAt("step", 2))
    with pytest.raises(Killed):
        run(KillAt("step", 2))  # of step 3 or 4: a checkpoint in the midst of a round
    with _killed_while_answering(monkeypatch, 1):
        run()
    with pytest.raises(Killed):
        run(KillAt("round", 1))
    run()
    _same(straight, out)


def test_one_answer_more_a_row_draws_the_others_alike(tiny: TinyModels, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    for count in (1, 2):
        out = tmp_path / str(count)
        finetune(
            _recipe(tiny(), data, steps=1), out, observer=Recorder(),
            strategy=_strategy(answers=count),
        )  # fmt: skip
    lines = [
        {(one["row"], one["number"]): one for one in map(json.loads, file.read_text().splitlines())}
        for file in sorted(tmp_path.glob("*/rounds/round-0/answers.jsonl"))
    ]
    assert {number for _, number in lines[1]} == {0, 1}
    assert all(lines[1][key]["ids"] == one["ids"] for key, one in lines[0].items())
    for one in lines[1].values():
        assert one["prompt"] and len(one["log_probs"]) == len(one["ids"]) <= 8
        assert one["stop_reason"] in ("eos", "length")


def test_dropout_and_random_state_do_not_reach_the_answers(
    tiny: TinyModels, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    texts = []
    for dropout in (0.0, 0.5):
        values = _recipe(tiny(), data, steps=1).recipe.model_dump(exclude_unset=True)
        values["adapter"] = {"dropout": dropout}
        out = tmp_path / str(dropout)
        resolved = from_values(values, "small", "test")
        finetune(resolved, out, observer=Recorder(), strategy=_strategy())
        lines = (out / "rounds" / "round-0" / "answers.jsonl").read_text().splitlines()
        texts.append([json.loads(line)["ids"] for line in lines])
    assert texts[0] == texts[1]


def test_ctrl_c_while_answering_keeps_what_there_is(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "CHUNK", 2)
    resolved = _recipe(tiny(), write_rows(tmp_path / "rows.jsonl"))
    straight, out = tmp_path / "straight", tmp_path / "out"
    finetune(resolved, straight, observer=Recorder(), strategy=_strategy())
    real, seen = rounds.AnswerRounds._answers, []

    def answers(self: Any, step: int, *args: Any) -> Any:
        seen.append(step)
        if seen.count(3) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, step, *args)

    monkeypatch.setattr(rounds.AnswerRounds, "_answers", answers)
    with pytest.raises(Interrupted, match="after step 3 of 7"):
        finetune(resolved, out, observer=Recorder(), strategy=_strategy())
    assert (out / "checkpoints" / "step-3").is_dir()
    count = len((out / "rounds" / "round-1" / "answers.jsonl").read_text().splitlines())
    assert count == 4
    finetune(resolved, out, observer=Recorder(), strategy=_strategy(), resume=True)
    _same(straight, out)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("answers.jsonl", "", "answers.jsonl is not as this run wrote it"),
        ("about.json", '{"micro_batches": [[0, 0, 0, 99]]}', "about.json is not as this run"),
        ("complete.json", "{}", "complete.json has no 'sha256'"),
        ("complete.json", "[", "complete.json cannot be read as JSON"),
    ],
)
def test_each_file_of_a_round_is_as_it_was_written_or_refused(
    tmp_path: Path, name: str, content: str, text: str
) -> None:
    folder = RoundFolder(tmp_path / "round-0", {"micro_batches": [[0, 0, 0, 1]]}, 1)
    folder.append([SampledAnswer(0, 0, "?", "!", "eos", [1])])
    folder.finish(1)
    assert len(RoundFolder.read(folder.path, 1)[0].answers()) == 1
    (folder.path / name).write_text(content)
    with pytest.raises(SlimError, match=text):
        RoundFolder.read(folder.path, 1)[0].answers()


def test_changed_or_missing_answers_are_refused(tiny: TinyModels, tmp_path: Path) -> None:
    resolved, out = _recipe(tiny(), write_rows(tmp_path / "rows.jsonl")), tmp_path / "run"
    with pytest.raises(Interrupted):
        finetune(resolved, out, observer=CtrlC(4), strategy=_strategy())
    folder = out / "rounds" / "round-1"
    text = (folder / "answers.jsonl").read_text()
    (folder / "answers.jsonl").write_text(text.replace('"row"', '"row" ', 1))
    with pytest.raises(SlimError, match=r"answers.jsonl is not as this run wrote it"):
        finetune(resolved, out, observer=Recorder(), strategy=_strategy(), resume=True)
    folder.rename(out / "rounds" / "gone")
    with pytest.raises(SlimError, match=r"round-1 is gone"):
        finetune(resolved, out, observer=Recorder(), strategy=_strategy(), resume=True)


def test_a_longer_run_answers_the_rest_of_a_round_that_its_end_cut_off(
    tiny: TinyModels, tmp_path: Path
) -> None:
    data, train = write_rows(tmp_path / "rows.jsonl"), {"schedule": "constant", "save_every": 3}
    straight, out = tmp_path / "straight", tmp_path / "out"
    observer = Recorder()
    finetune(_recipe(tiny(), data, 8, **train), straight, observer=observer, strategy=_strategy())
    finetune(_recipe(tiny(), data, 4, **train), out, observer=observer, strategy=_strategy())
    longer = _recipe(tiny(), data, 8, **train)
    finetune(longer, out, observer=observer, strategy=_strategy(), resume=True)
    assert losses(out) == losses(straight)


def test_rows_without_a_prompt_are_refused(tiny: TinyModels, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f'{{"text": "once upon a time {i}"}}\n' for i in range(9)))
    with pytest.raises(SlimError, match="training row 1 has no prompt to answer"):
        finetune(_recipe(tiny(), data), tmp_path / "o", observer=Recorder(), strategy=_strategy())
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("batching", ["grouped", "packed"])
def test_answers_in_a_compiled_step_have_two_shapes(
    tiny: TinyModels, tmp_path: Path, batching: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = set()
    real = rounds.AnswerRounds.batches

    def batches(self: Any, step: int, index: int) -> Any:
        ours = real(self, step, index)
        shapes.update((one.tokens_BT.shape, len(one.targets_N)) for one in ours or ())
        return ours

    monkeypatch.setattr(rounds.AnswerRounds, "batches", batches)
    data = write_rows(tmp_path / "rows.jsonl")
    resolved = _recipe(tiny(), data, 4, compile=True, batching=batching)
    finetune(resolved, tmp_path / "out", observer=Recorder(), strategy=_strategy())
    assert 1 <= len(shapes) <= rounds.COMPILED_SHAPES
