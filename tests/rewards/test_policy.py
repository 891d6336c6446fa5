"""A run that learns from rewards: what it learns, its records, and that a kill changes nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_slim import events
from mlx_slim.artifacts import load_tensors
from mlx_slim.config.load import Resolved, from_values
from mlx_slim.errors import SlimError
from mlx_slim.finetuning.run import finetune
from mlx_slim.rewards.run import train
from tests.support.runs import Recorder, losses, write_rows
from tests.support.tiny import TinyModels

LOW_IDS = """\
def low(prompts, completion_ids, answer, **fields):
    return [sum(one < 130 for one in ids) / len(ids) for ids in completion_ids]
"""
SETTINGS: list[dict[str, Any]] = [
    {"reward": {"beta": 0.04, "loss_type": "grpo"}},
    {"method": "full", "reward": {"mask_truncated": True, "epsilon_high": 0.28}},
]


class Killed(BaseException):
    """Ends a run without any of its exits."""


class KillAt(Recorder):
    """Ends the run at the ``count``-th event of a name."""

    def __init__(self, name: str, count: int) -> None:
        super().__init__()
        self.name, self.count = name, count

    def notify(self, event: events.Event) -> None:
        super().notify(event)
        if event.name == self.name and sum(e.name == self.name for e in self.events) == self.count:
            raise Killed


@pytest.fixture
def reward(tmp_path: Path) -> str:
    (tmp_path / "score.py").write_text(LOW_IDS)
    return f"{tmp_path / 'score.py'}:low"


def resolved(model: Path, tmp_path: Path, **changes: Any) -> Resolved:
    """Return a recipe of six steps in rounds of two."""
    values: dict[str, Any] = {
        "model": str(model),
        "data": {"path": str(write_rows(tmp_path / "rows.jsonl", 12)), "validation": 2},
        "rounds": {"steps": 2, "max_tokens": 6},
        "report_answers": 0,
        "train": {
            "steps": 6,
            "batch_tokens": 128,
            "max_length": 128,
            "save_every": 1,
            "learning_rate": 2e-2,
            "validate_every": 3,
        },
        **changes,
    }
    values["reward"] = {"group_size": 4, **changes.get("reward", {})}
    return from_values(values, "small", "test")


def rounds_of(recorder: Recorder) -> list[dict[str, Any]]:
    return [one.as_record() for one in recorder.events if one.name == "round"]


@pytest.mark.parametrize("changes", SETTINGS, ids=["lora", "full"])
def test_killed_and_resumed_equals_uninterrupted(
    tiny: TinyModels, tmp_path: Path, reward: str, changes: dict[str, Any]
) -> None:
    recipe = resolved(tiny(), tmp_path, **changes)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    recorder = Recorder()
    train(recipe, straight, observer=recorder, reward=reward)
    for number, moment in enumerate([("round", 1), ("step", 1), ("step", 2), ("round", 1)]):
        with pytest.raises(Killed):
            train(recipe, killed, observer=KillAt(*moment), reward=reward, resume=number > 0)
    train(recipe, killed, observer=Recorder(), reward=reward, resume=True)
    assert losses(killed) == losses(straight)
    folder = "model" if recipe.recipe.method == "full" else "adapters"
    for file in (straight / folder).glob("*.safetensors"):
        ours, theirs = load_tensors(file), load_tensors(killed / folder / file.name)
        assert all(mx.array_equal(ours[key], theirs[key]).item() for key in ours)
    for name in ("answers", "rewards"):
        files = sorted(straight.glob(f"rounds/*/{name}.jsonl"))
        assert len(files) == 3
        for file in files if name == "rewards" else ():
            assert file.read_bytes() == (killed / file.relative_to(straight)).read_bytes()


def test_it_learns_what_is_rewarded(tiny: TinyModels, tmp_path: Path, reward: str) -> None:
    settings = {"steps": 16, "batch_tokens": 128, "max_length": 128, "learning_rate": 1e-2}
    recipe = resolved(
        tiny(),
        tmp_path,
        method="full",
        rounds={"steps": 1, "max_tokens": 6},
        train={**settings, "schedule": "constant"},
    )
    recorder = Recorder()
    train(recipe, tmp_path / "run", observer=recorder, reward=reward)
    means = [one["metrics"]["reward"] for one in rounds_of(recorder)]
    assert np.mean(means[-4:]) > np.mean(means[:4]) + 0.15, means


def test_what_a_round_and_a_step_report(tiny: TinyModels, tmp_path: Path, reward: str) -> None:
    recorder = Recorder()
    recipe = resolved(tiny(), tmp_path, reward={"beta": 0.04})
    train(recipe, tmp_path / "run", observer=recorder, reward=reward)
    first = rounds_of(recorder)[0]
    lines = (tmp_path / "run/rounds/round-0/answers.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in lines]
    rewards = np.array([np.mean([token < 130 for token in one["ids"]]) for one in answers])
    groups = rewards.reshape(-1, 4)
    assert first["answers"] == len(answers) and first["metrics"] == pytest.approx(
        {
            "reward": rewards.mean(),
            "reward_std": groups.std(axis=1, ddof=1).mean(),
            "frac_reward_zero_std": (groups.std(axis=1) == 0).mean(),
            "mean_length": np.mean([len(one["ids"]) for one in answers]),
        }
    )
    steps = [one for one in recorder.events if isinstance(one, events.StepDone)]
    assert steps[0].metrics is not None
    assert set(steps[0].metrics) == {"kl", "clip_low", "clip_high", "entropy"}
    assert steps[0].metrics["kl"] == pytest.approx(0, abs=1e-6)
    assert steps[-1].metrics and steps[-1].metrics["kl"] > 0
    scored = [one for one in recorder.events if isinstance(one, events.TaskValidated)]
    assert [one.metric for one in scored] == ["reward", "reward"]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["reward"]["function"] == reward
    assert record["result"]["done"]["best_task"] == max(one.value for one in scored)


def test_a_changed_function_is_refused_on_a_resume(
    tiny: TinyModels, tmp_path: Path, reward: str
) -> None:
    recipe, out = resolved(tiny(), tmp_path), tmp_path / "run"
    with pytest.raises(Killed):
        train(recipe, out, observer=KillAt("step", 1), reward=reward)
    before = sorted(path.name for path in out.rglob("*"))

    def refused(text: str, reward: str | None) -> None:
        with pytest.raises(SlimError, match=text):
            train(recipe, out, observer=Recorder(), reward=reward, resume=True)

    file = tmp_path / "score.py"
    file.write_text(LOW_IDS + "\n")
    refused("its file has other contents now", reward)
    refused("nothing gives one", None)
    (tmp_path / "moved.py").write_text(LOW_IDS)
    (tmp_path / "other.py").write_text(LOW_IDS.replace("low", "other"))
    refused(r"other.py:other is given", f"{tmp_path / 'other.py'}:other")
    assert sorted(path.name for path in out.rglob("*")) == before
    train(
        recipe,
        out,
        observer=Recorder(),
        reward=f"{tmp_path / 'moved.py'}:low",
        resume=True,
    )


def test_test_questions_are_refused_in_validation_rows_too(
    tiny: TinyModels, tmp_path: Path
) -> None:
    (tmp_path / "test.jsonl").write_text('{"prompt": "How many?", "completion": "4"}\n')
    (tmp_path / "mine.yaml").write_text(
        "kind: generation\ndata: {path: test.jsonl}\n"
        "fields: {prompt: text, completion: text}\n"
        'prompt: "{{ prompt }}"\ntarget: "{{ completion }}"\n'
    )
    run = resolved(
        tiny(),
        tmp_path,
        data={
            "path": str(write_rows(tmp_path / "rows.jsonl", 12)),
            "validation": str(tmp_path / "test.jsonl"),
        },
        reward={"task": str(tmp_path / "mine.yaml")},
    )
    with pytest.raises(SlimError, match=r"test.jsonl, line 1: its question is one that mine"):
        train(run, tmp_path / "out", observer=Recorder())
    assert not (tmp_path / "out" / "run.json").exists()


def test_rewards_on_disk_are_not_computed_again(
    tiny: TinyModels, tmp_path: Path, reward: str
) -> None:
    """A function that never returns the same twice is resumed bit for bit all the same."""
    (tmp_path / "score.py").write_text(
        "import random\ndef low(completions, **fields):\n"
        "    return [random.random() for _ in completions]\n"
    )
    recipe, out = resolved(tiny(), tmp_path), tmp_path / "run"
    recorder = KillAt("step", 2)
    with pytest.raises(Killed):
        train(recipe, out, observer=recorder, reward=reward)
    again = Recorder()
    train(recipe, out, observer=again, reward=reward, resume=True)
    first = [e.loss for e in recorder.events if isinstance(e, events.StepDone)]
    repeated = [e for e in again.events if isinstance(e, events.StepDone)]
    assert [e.loss for e in repeated if e.step == 2] == first[1:] and repeated[0].step == 2


def test_a_function_that_fails_leaves_a_run_that_resumes(
    tiny: TinyModels, tmp_path: Path, reward: str
) -> None:
    (tmp_path / "score.py").write_text(
        "def low(prompts, **f):\n    assert not __import__('os').path.exists(__file__ + '.no')\n"
        "    return [float(len(p)) for p in prompts]\n"
    )
    (tmp_path / "score.py.no").touch()
    recipe, out = resolved(tiny(), tmp_path), tmp_path / "run"
    with pytest.raises(SlimError, match=r"rows.jsonl, line \d+: score.py:low: AssertionError"):
        train(recipe, out, observer=Recorder(), reward=reward)
    (tmp_path / "score.py.no").unlink()
    result = train(recipe, out, observer=Recorder(), reward=reward, resume=True)
    assert result.done.step == 6


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"method": "full", "reward": {"beta": 0.1}}, r"reward.beta=0.1 compares with the weights"),
        ({"adapter": {"dropout": 0.1}}, r"adapter.dropout=0.1 changes the probabilities"),
        ({"distill": {}}, "distill and reward are both set"),
        ({"reward": {"group_size": 1}}, r"reward.group_size"),
        ({"reward": {"metric": "acc"}}, r"metric=acc is read of a task"),
        ({"reward": {"loss_type": "ppo"}}, r"reward.loss_type"),
    ],
)
def test_recipes_that_cannot_learn_from_rewards(
    tiny: TinyModels, tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(SlimError) as raised:
        resolved(tiny(), tmp_path, **changes)
    assert re.search(text, f"{raised.value} {raised.value.details}")


def test_reward_and_recipe_belong_together(tiny: TinyModels, tmp_path: Path, reward: str) -> None:
    out, recipe = tmp_path / "run", resolved(tiny(), tmp_path)
    plain = from_values(
        {"model": str(tiny()), "data": {"path": str(tmp_path / "rows.jsonl")}}, "small", "test"
    )
    with pytest.raises(SlimError, match=r"has rewards \(reward:\)"):
        finetune(recipe, out, observer=Recorder())
    with pytest.raises(SlimError, match="draws none"):
        train(plain, out, observer=Recorder(), reward=reward)
    with pytest.raises(SlimError, match="nothing gives one"):
        train(recipe, out, observer=Recorder())
    assert not out.exists()


def test_no_answer_is_longer_than_a_row(tiny: TinyModels, tmp_path: Path) -> None:
    """Those to validation rows too, whatever ``rounds.max_tokens`` is."""
    (tmp_path / "score.py").write_text(
        "from pathlib import Path\n"
        "def f(prompts, completion_ids, **fields):\n"
        "    with Path(__file__ + '.lengths').open('a') as file:\n"
        "        file.writelines(f'{len(ids)}\\n' for ids in completion_ids)\n"
        "    return [0.0] * len(prompts)\n"
    )
    changes: dict[str, Any] = {
        "rounds": {"steps": 1, "max_tokens": 10_000},
        "train": {"steps": 1, "batch_tokens": 64, "max_length": 64, "validate_every": 1},
    }
    recipe = resolved(tiny(), tmp_path, **changes)
    train(recipe, tmp_path / "run", observer=Recorder(), reward=f"{tmp_path / 'score.py'}:f")
    lengths = [int(one) for one in (tmp_path / "score.py.lengths").read_text().split()]
    assert 6 < max(lengths) < 64


def test_on_a_gpu_too(tiny: TinyModels, tmp_path: Path, reward: str, as_on_gpu: None) -> None:
    """bfloat16, a compiled step of few shapes, a quantized base: resumed bit for bit."""
    settings = {"steps": 3, "batch_tokens": 256, "max_length": 128, "save_every": 1}
    recipe = resolved(
        tiny(),
        tmp_path,
        method="qlora",
        quantize={"group_size": 32},
        reward={"beta": 0.04},
        rounds={"steps": 2, "max_tokens": 6},
        train=settings,
    )
    straight, killed, recorder = tmp_path / "straight", tmp_path / "killed", Recorder()
    train(recipe, straight, observer=recorder, reward=reward)
    with pytest.raises(Killed):
        train(recipe, killed, observer=KillAt("step", 1), reward=reward)
    train(recipe, killed, observer=Recorder(), reward=reward, resume=True)
    assert losses(killed) == losses(straight)
    first = next(one for one in recorder.events if isinstance(one, events.StepDone)).metrics
    assert first and first["clip_low"] == first["clip_high"] == 0.0
    assert abs(first["kl"]) < 1e-3  # of bfloat16
