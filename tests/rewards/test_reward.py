"""Rewards of tasks and of functions: what they are given, and one line for what goes wrong."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from mlx_slim.config.reward import RewardConfig
from mlx_slim.errors import SlimError
from mlx_slim.evaluation.scoring.generate import Generation
from mlx_slim.hashing import hash_file
from mlx_slim.rewards.reward import FunctionReward, TaskReward, reward_of
from mlx_slim.rewards.scored_rows import ScoredRow

ROW = ScoredRow(
    "rows.jsonl, line 3",
    [{"role": "system", "content": "s"}, {"role": "user", "content": "2 + 2?"}],
    "So 4.\n#### 4",
    {"prompt": "2 + 2?", "completion": "So 4.\n#### 4", "level": 7},
    False,
)
ANSWERS = [Generation(text, [1, 2], "eos") for text in ("It is 4.\n#### 4", "4", "#### 5")]


def score_file(tmp_path: Path, body: str) -> str:
    file = tmp_path / "score.py"
    file.write_text(f"def f(prompts, completions, **fields):\n    {body}\n")
    return f"{file}:f"


@pytest.mark.parametrize(
    ("metric", "expected"),
    [(None, [1, 0, 0]), ("strict_match", [1, 0, 0]), ("flexible_match", [1, 1, 0])],
)
def test_a_task_scores_by_its_metric(metric: str | None, expected: list[int]) -> None:
    reward = TaskReward("gsm8k", metric)
    assert reward(ROW, ANSWERS) == expected
    assert "<|im_end|>" in reward.until


def test_a_function_is_called_as_by_trl(tmp_path: Path) -> None:
    body = """assert prompts == ["2 + 2?"] * 3 and fields["level"] == [7] * 3
    assert fields["answer"][0].endswith("4") and fields["completion_ids"] == [[1, 2]] * 3
    assert not {"prompt", "completion"} & set(fields)
    return [len(text) for text in completions]"""
    reward = FunctionReward(score_file(tmp_path, body))
    assert reward(ROW, ANSWERS) == [len(answer.text) for answer in ANSWERS]
    assert reward.source and reward.source.sha256 == hash_file(tmp_path / "score.py")


def test_rows_of_messages_come_as_messages(tmp_path: Path) -> None:
    body = """assert prompts[0][-1]["content"] == "2 + 2?"
    return [len(turns[0]["content"]) for turns in completions]"""
    row = ScoredRow(ROW.place, ROW.messages, ROW.answer, {"messages": []}, True)
    assert FunctionReward(score_file(tmp_path, body))(row, ANSWERS)[1] == 1


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("raise KeyError('gold')", "rows.jsonl, line 3: score.py:f: KeyError: 'gold'"),
        ("raise SystemExit(0)", "rows.jsonl, line 3: score.py:f: SystemExit: 0"),
        ("raise GeneratorExit", "rows.jsonl, line 3: score.py:f: GeneratorExit"),
        ("return [1.0]", "rows.jsonl, line 3: score.py:f: 1 rewards for 3 answers"),
        ("return 1.0", "rows.jsonl, line 3: score.py:f: TypeError"),
        ("return [1, 2, float('nan')]", "rows.jsonl, line 3: score.py:f: the reward is nan"),
        ("return [1, 2, 1e200]", "rows.jsonl, line 3: score.py:f: the reward is 1e+200"),
        ("return [1, 2, None]", "rows.jsonl, line 3: score.py:f: the reward is None"),
        ("return ['1', '2', '3']", "rows.jsonl, line 3: score.py:f: the reward is '1'"),
        # its keys, or in an order of their own, would be learned from
        ("return {1: 0.5, 2: 0.5, 3: 1}", "rows.jsonl, line 3: score.py:f: TypeError: a dict"),
        ("return {1.0, 2.0, 3.0}", "rows.jsonl, line 3: score.py:f: TypeError: a set"),
    ],
)
def test_what_a_function_does_wrong_is_one_line(tmp_path: Path, body: str, text: str) -> None:
    reward = FunctionReward(score_file(tmp_path, body))
    with pytest.raises(SlimError) as raised:
        reward(ROW, ANSWERS)
    assert raised.value.message.startswith(text)
    assert "\n" not in raised.value.message and raised.value.hint


def test_a_function_may_be_async_as_with_trl(tmp_path: Path) -> None:
    (tmp_path / "score.py").write_text(
        "import asyncio\n"
        "async def f(completions, **fields):\n"
        "    await asyncio.sleep(0)\n"
        "    return [len(text) for text in completions]\n"
    )
    reward = FunctionReward(f"{tmp_path / 'score.py'}:f")
    expected = [len(answer.text) for answer in ANSWERS]
    assert reward(ROW, ANSWERS) == expected

    async def notebook() -> list[float]:  # where a loop runs already
        return reward(ROW, ANSWERS)

    assert asyncio.run(notebook()) == expected


def test_what_a_function_changes_in_its_row_is_not_there_in_the_next_call(tmp_path: Path) -> None:
    row = ScoredRow(ROW.place, ROW.messages, ROW.answer, {"seen": [0]}, True)
    body = """for seen, turns in zip(fields["seen"], prompts):
        assert len(seen) == 1 and len(turns) == 2  # of each answer, too
        seen.append(1), turns.append(1)
    return [1, 2, 3]"""
    reward = FunctionReward(score_file(tmp_path, body))
    assert reward(row, ANSWERS) == reward(row, ANSWERS) == [1, 2, 3]


def test_an_interrupt_in_a_function_is_one(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        FunctionReward(score_file(tmp_path, "raise KeyboardInterrupt"))(ROW, ANSWERS)


def test_what_a_function_prints_is_no_event(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reward = FunctionReward(score_file(tmp_path, "print('seen'); return [1, 2, 3]"))
    assert reward(ROW, ANSWERS) == [1, 2, 3]
    assert capsys.readouterr() == ("", "seen\n")


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("score.py", "names no function"),
        ("score.txt:f", "names no function"),
        ("absent.py:f", "absent.py does not exist"),
        ("folder.py:f", "folder.py is a folder"),
        ("fifo.py:f", "fifo.py is a FIFO"),
        ("exits.py:f", "exits.py: SystemExit: 0"),
        ("broken.py:f", "SyntaxError"),
        ("score.py:g", "no function is called 'g'"),
    ],
)
def test_a_file_without_the_function_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, text: str
) -> None:
    score_file(tmp_path, "return []")
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "exits.py").write_text("raise SystemExit(0)\n")
    (tmp_path / "folder.py").mkdir()
    os.mkfifo(tmp_path / "fifo.py")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SlimError, match=text):
        FunctionReward(spec)


def test_what_gives_the_reward_is_one_thing(tmp_path: Path) -> None:
    function = FunctionReward(score_file(tmp_path, "return []"))
    assert reward_of(RewardConfig(), function) is function
    with pytest.raises(SlimError, match="both given"):
        reward_of(RewardConfig(task="gsm8k"), function)
    with pytest.raises(SlimError, match="nothing gives one"):
        reward_of(RewardConfig(), None)
    with pytest.raises(SlimError, match="kind multiple_choice"):
        reward_of(RewardConfig(task="arc_easy"), None)
    with pytest.raises(SlimError, match=r"reward.metric=strict is no metric"):
        reward_of(RewardConfig(task="gsm8k", metric="strict"), None)
